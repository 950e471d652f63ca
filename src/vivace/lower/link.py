"""Linking: every storage, kernel and constant of a plan gets its number in an image (see `image`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vivace.base.dims import Dim
from vivace.base.specs import TensorSpec
from vivace.graph.graph import Node
from vivace.lower.image import ForeignEntry, Image, KernelEntry, LineEntry, StorageEntry
from vivace.lower.plan import Operand, Plan, Spec, Step
from vivace.lower.schedule import Schedule, schedule
from vivace.lower.views import Storage, View


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
                    "run", compiled.number(s.spec), tuple(map(operand, s.operands)), -1,
                    line.serial, line.beside, s.label, names,
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
        elif line.demand is not None:
            names = tuple(o for n in line.demand.nodes for o in n.origin)
            lines.append(LineEntry("demand", label=line.demand.expected, nodes=names, lacks=line.demand.lacks))
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
        appended=plan.appended,
    )
