"""The image: everything an engine needs at run time, as plain data that can be saved and read back.

An image knows no LLVM, no ONNX and no graph: lines of instructions over numbered storages and kernels. Sizes, offsets
and units are dims; an arena storage number k lies at the byte offset named by the symbol `@k`, which a binding fixes.

This module imports no other of lowering, so that a process that only loads engines stays light.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vivace.base.dims import Dim
from vivace.base.specs import TensorSpec

FLOPS_PER_NS, BYTES_PER_NS = 50.0, 10.0


def estimate_ns(flops: int, n_bytes: int) -> float:
    """A rough time of a step on one core: only for deciding what is worth sharing."""
    return max(flops / FLOPS_PER_NS, n_bytes / BYTES_PER_NS)


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


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a program that several providers run in turn: an image of ours, or an ONNX model for `provider`.

    A part takes and gives values by name: inputs of the program, and what parts before it gave. A model of no bytes is
    the portable one, that is the program as a whole.
    """

    provider: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    image: Image | None = None
    model: bytes = b""
