"""The image: everything an engine needs at run time, as plain data that can be saved and read back.

An image knows no LLVM, no ONNX and no graph: lines of instructions over numbered storages and kernels. Sizes, offsets
and units are
dims; an arena storage number k lies at the byte offset named by the symbol `@k`, which a binding fixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vivace.base.dims import Dim
from vivace.base.specs import TensorSpec
from vivace.graph.graph import Node
from vivace.lower.plan import Operand, Plan, Spec, Step
from vivace.lower.schedule import Schedule, schedule
from vivace.lower.views import Storage, View


@dataclass(frozen=True, slots=True)
class StorageEntry:
    """A storage by number. Bytes; `constant` is an index into the image's constants; moments say how long an arena
    storage lives."""

    kind: str
    n_bytes: Dim
    index: int = -1
    first: int = 0
    last: int = 0


@dataclass(frozen=True, slots=True)
class KernelEntry:
    """A compiled kernel: its symbol and the dims that it takes after its pointers."""

    symbol: str
    dims: tuple[str, ...]
    units: Dim
    grain: Dim
    scratch_bytes: Dim


@dataclass(frozen=True, slots=True)
class ForeignEntry:
    """A node that another provider runs: a small ONNX model, and views `(storage, byte offset, dtype, shape)` in its
    order."""

    model: bytes
    inputs: tuple[tuple[int, Dim, str, tuple[Dim, ...]], ...]
    outputs: tuple[tuple[int, Dim, str, tuple[Dim, ...]], ...]


@dataclass(frozen=True, slots=True)
class LineEntry:
    """One instruction: run a kernel on operands `(storage, byte offset)`, call a foreign node, count or jump
    (kinds: see `schedule.Line`)."""

    kind: str
    kernel: int = -1
    operands: tuple[tuple[int, Dim], ...] = ()
    target: int = -1
    serial: bool = False
    beside: bool = False
    label: str = ""
    nodes: tuple[str, ...] = ()
    flops: Dim = 0
    n_bytes: Dim = 0


@dataclass(frozen=True, slots=True)
class Image:
    """A linked program. `objects` are machine code for `isa`; `constants` the weights; `facts` free metadata for
    people."""

    isa: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    storages: tuple[StorageEntry, ...]
    kernels: tuple[KernelEntry, ...]
    lines: tuple[LineEntry, ...]
    foreign: tuple[ForeignEntry, ...]
    objects: tuple[bytes, ...]
    constants: tuple[np.ndarray, ...]
    facts: dict[str, object]


class Compiled:
    """What the linker needs of the code generator: the entry of a spec, by number, and the objects."""

    def __init__(self, entries: Sequence[KernelEntry], objects: Sequence[bytes], number: Callable[[Spec], int]) -> None:
        self.entries, self.objects, self.number = tuple(entries), tuple(objects), number


def link(
    plan: Plan, compiled: Compiled, isa: str, foreign_model: Callable[[Node], bytes], facts: dict[str, object]
) -> Image:
    """Number everything of a plan."""
    line_up: Schedule = schedule(plan)
    numbers: dict[Storage, int] = {}
    storages: list[StorageEntry] = []
    constants: list[np.ndarray] = []

    def number(s: Storage) -> int:
        if s not in numbers:
            numbers[s] = len(storages)
            index = s.index
            if s.kind == "constant":
                assert s.data is not None
                index = len(constants)
                constants.append(s.data)
            first, last = line_up.lifetimes.get(s, (0, 0))
            storages.append(StorageEntry(s.kind, s.bytes, index, first, last))
        return numbers[s]

    def operand(o: Operand) -> tuple[int, Dim]:
        return number(o.storage), o.offset * o.storage.dtype.size_bytes

    def place(v: View) -> tuple[int, Dim, str, tuple[Dim, ...]]:
        assert v.storage is not None
        return number(v.storage), v.offset * v.dtype.size_bytes, str(v.dtype), v.shape

    lines: list[LineEntry] = []
    foreign: list[ForeignEntry] = []
    for line in line_up.lines:
        if line.step is not None:
            s: Step = line.step
            names = tuple(dict.fromkeys(o for n in s.nodes for o in n.origin if not o.startswith("+")))
            lines.append(
                LineEntry(
                    "run", compiled.number(s.spec), tuple(map(operand, s.operands)), -1, line.serial, line.beside, s.label, names,
                    s.flops, s.bytes,
                )
            )  # fmt: skip
        elif line.foreign is not None:
            f = line.foreign
            lines.append(LineEntry("foreign", len(foreign), label=f.label, nodes=tuple(f.node.origin)))
            foreign.append(
                ForeignEntry(
                    foreign_model(f.node),
                    tuple(place(v) for v in f.inputs if v is not None),
                    tuple(map(place, f.outputs)),
                )
            )
        else:
            cells = tuple(operand(o) for o in (line.cond, line.limit) if o is not None)
            lines.append(LineEntry(line.kind, operands=cells, target=line.target))
    for s_in in plan.storages:
        if s_in.kind in ("input", "output"):
            number(s_in)
    return Image(
        isa,
        tuple(TensorSpec(v.name, v.dtype, v.shape) for v in plan.inputs),
        tuple(TensorSpec(v.name, v.dtype, v.shape) for v in plan.outputs),
        tuple(storages),
        compiled.entries,
        tuple(lines),
        tuple(foreign),
        compiled.objects,
        tuple(constants),
        facts,
    )
