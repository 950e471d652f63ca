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
    """One instruction: run a kernel on operands `(storage, byte offset)`, call a foreign node, count or jump, or end
    the run where it `lacks` what the label says (kinds: see `schedule.Line`)."""

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
    lacks: Dim = 0


# What all values between layers may take before a batch is computed in slices, in second-level caches of a core: up to
# there, as much as lives at a time comes from near enough. ResNet-50 in batches of 1, 2, 4, 8 and 16, whose values take
# 5.3 MB an image, took 44.5, 43.9, 43.0, 46.9 and 49.4 ms an image in f32, and half as large 20.0, 18.6, 18.7, 21.3 and
# 21.7 ms in bf16 (one thread, 2 MiB of second-level cache, third-level cache shared with others).
NEAR_CACHES = 6


def rows_that_stay_near(bytes_per_row: int, cache_bytes: int) -> int:
    """How many rows of a batch to compute at a time."""
    return max(1, int(NEAR_CACHES * cache_bytes) // max(bytes_per_row, 1))


def is_near(n_bytes: int, cache_bytes: int) -> bool:
    """Whether so many bytes of values stay near."""
    return n_bytes <= NEAR_CACHES * cache_bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that may be computed in slices: `rows` lie along the first axis of every input and output.

    A program for any number of rows (`rows` is a symbol of its inputs) takes as many as stay near. One for `each` rows
    takes those: the specs in the image are of `each` rows, those of the engine of all.
    """

    rows: Dim
    each: int | None = None

    def whole(self, spec: TensorSpec) -> TensorSpec:
        """What the engine takes or gives, by what one slice does."""
        if self.each is None:
            return spec
        first, *rest = spec.shape
        return TensorSpec(spec.name, spec.dtype, (first // self.each * self.rows, *rest))


@dataclass(frozen=True, slots=True)
class Appended:
    """Output number `output` begins with input number `input` along `axis`: both may be views of one array.

    A call gives the dims named `room`, how many places the axis of the output has in memory, and `kept`, how many of
    those of the input are to be copied.
    """

    input: int
    output: int
    axis: int
    room: str
    kept: str


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
    batch: Batch | None = None
    appended: tuple[Appended, ...] = ()


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
