"""Kernels that work block by block: what one stage makes for a block, the next reads while it is in the cache.

    for block in blocks:                       in parallel, with the parts
        each stage of `once`
        for part in parts:
            each stage of `each`

Rules:
* LOCAL: buffers of `local` are private to a thread, of static size, and lie in its scratch. What `once` leaves there
  holds for all parts of the block; `each` may not change it. Everything else that stages read or write is a parameter.
* SYMBOLS: a stage is a kernel of its own, whose run-time dims may include `block` and `part`; the others are dims of
  the whole.
* AGAIN: a thread that begins in the middle of a block runs `once` for it too, so `once` may write local buffers only.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.dims import Dim, prod, symbols
from vivace.loops.contraction import Contraction, contraction_dims, contraction_params
from vivace.loops.kernel import Buffer, Kernel, dims_of

BLOCK, PART = "block", "part"


@dataclass(frozen=True, slots=True)
class Stage:
    """A kernel that computes all of its units in one call.

    `offsets`: for some of its parameters, how many elements further on element 0 lies; dims over `block` and `part`.
    """

    spec: Kernel | Contraction
    offsets: tuple[tuple[Buffer, Dim], ...] = ()

    @property
    def params(self) -> tuple[Buffer, ...]:
        return contraction_params(self.spec) if isinstance(self.spec, Contraction) else self.spec.params


@dataclass(frozen=True, slots=True)
class Blocked:
    """A kernel of several stages over blocks and their parts."""

    name: str
    blocks: Dim
    parts: int
    once: tuple[Stage, ...]
    each: tuple[Stage, ...]
    local: tuple[Buffer, ...]

    @property
    def params(self) -> tuple[Buffer, ...]:
        """The buffers in calling order: those that are read, then those that are written."""
        every = dict.fromkeys(b for s in (*self.once, *self.each) for b in s.params if b not in self.local)
        return tuple(sorted(every, key=lambda b: b.writable))


def blocked_dims(k: Blocked) -> tuple[str, ...]:
    """Names of the run-time dims, sorted."""
    names: set[str] = set()
    for s in (*k.once, *k.each):
        names.update(contraction_dims(s.spec) if isinstance(s.spec, Contraction) else dims_of(s.spec))
    names.update(x.name for d in (k.blocks, *(o for s in (*k.once, *k.each) for _, o in s.offsets)) for x in symbols(d))
    return tuple(sorted(names - {BLOCK, PART}))


def extent_of(b: Buffer) -> int:
    """Elements from the first to the last of a local buffer."""
    size = prod(b.shape)
    assert isinstance(size, int), b
    return 1 + sum((d - 1) * s for d, s in zip(b.shape, b.strides, strict=True)) if size else 0  # type: ignore[operator, misc]
