"""Kernels that work block by block: what one stage makes for a block, the next reads while it is in the cache.

    for block in blocks:                       in parallel, with the parts
        each stage of `once`
        for part in parts:
            for step in steps:                 in order
                each stage of `each`
            each stage of `last`

Rules:
* LOCAL: buffers of `local` are private to a thread and lie in its scratch. What `once` leaves there holds for all
  parts of the block; the other stages may not change it. Everything else that stages read or write is a parameter.
* SYMBOLS: a stage is a kernel of its own, whose run-time dims may include `block`, `part` and, in `each`, `step`; the
  others are dims of the whole. `parts` and the sizes of local buffers are dims of the whole, `steps` may vary with
  block and part.
* AGAIN: each thread that works on a block runs `once` for it, so `once` may write local buffers only.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.dims import Dim, maximum, minimum, symbols
from vivace.loops.contraction import Contraction, Depthwise, contraction_dims, contraction_params
from vivace.loops.kernel import Buffer, Kernel, dims_of
from vivace.loops.pack import Pack, pack_dims

PLACES = BLOCK, PART, STEP = "block", "part", "step"


@dataclass(frozen=True, slots=True)
class Stage:
    """A kernel that computes all of its units in one call.

    `offsets`: for some of its parameters, how many elements further on element 0 lies; dims over `block`, `part` and
    `step`. The stage is left out where `when` is 0.
    """

    spec: Kernel | Contraction | Depthwise | Pack
    offsets: tuple[tuple[Buffer, Dim], ...] = ()
    when: Dim = 1

    @property
    def params(self) -> tuple[Buffer, ...]:
        return contraction_params(self.spec) if isinstance(self.spec, (Contraction, Depthwise)) else self.spec.params


@dataclass(frozen=True, slots=True)
class Blocked:
    """A kernel of several stages over blocks, their parts, and steps in these. `grain`: parts worth handing to a thread
    at once, where `once` is dear.
    """

    name: str
    blocks: Dim
    parts: Dim
    once: tuple[Stage, ...]
    each: tuple[Stage, ...]
    local: tuple[Buffer, ...]
    steps: Dim = 1
    last: tuple[Stage, ...] = ()
    grain: Dim = 1

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (*self.once, *self.each, *self.last)

    @property
    def params(self) -> tuple[Buffer, ...]:
        """The buffers in calling order: those that are read, then those that are written."""
        every = dict.fromkeys(b for s in self.stages for b in s.params if b not in self.local)
        return tuple(sorted(every, key=lambda b: b.writable))


def blocked_dims(k: Blocked) -> tuple[str, ...]:
    """Names of the run-time dims, sorted."""
    names: set[str] = set()
    dims: list[Dim] = [k.blocks, k.parts, k.steps, k.grain, *(d for b in k.local for d in (*b.shape, *b.strides))]
    for s in k.stages:
        names.update(_dims(s.spec))
        dims += [s.when, *(offset for _, offset in s.offsets)]
    names.update(x.name for d in dims for x in symbols(d))
    return tuple(sorted(names.difference(PLACES)))


def _dims(spec: Kernel | Contraction | Depthwise | Pack) -> tuple[str, ...]:
    match spec:
        case Kernel():
            return dims_of(spec)
        case Contraction() | Depthwise():
            return contraction_dims(spec)
        case Pack():
            return pack_dims(spec)


def extent_of(b: Buffer) -> Dim:
    """Elements from the first to the last of a local buffer, which has some."""
    extent: Dim = 1
    for d, s in zip(b.shape, b.strides, strict=True):
        extent = extent + (d - 1) * s
    return extent


def block_sizes(total: Dim, size: int, n_blocks: Dim, number: Dim) -> list[tuple[Dim, Dim]]:
    """How many of `total` a block of at most `size` may have, and when (1 or 0) block `number` has so many: stages of
    known sizes are faster than one of a size that depends on the block.
    """
    if not isinstance(total, int):
        return [(minimum(size, total - number * size), 1)]
    assert isinstance(n_blocks, int)
    left = total - (n_blocks - 1) * size
    if left == size or n_blocks < 1:
        return [(size, 1)]
    is_last = maximum(0, number - (n_blocks - 2))
    return [(size, 1 - is_last), (left, is_last)]
