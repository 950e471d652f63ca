"""The slices of a batch that is not computed at once (`vivace.lower.image.Batch`).

Rules:
* SIDE BY SIDE: as many slices as make each thread equal work are computed side by side, each by one thread
  (`vivace.runtime.crew`). What is left of a batch are slices one after another, each shared out step by step.
* NEAR: so are all where the values of one row alone would not stay near: memory is bound by what stays near, for each
  thread.
* STOPPED: at most `AT_ONCE` slices a thread are one call of native code, between which an interrupt is heard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType

from vivace.base.dims import as_symbol, evaluate
from vivace.base.machine import host
from vivace.base.specs import TensorSpec
from vivace.lower.image import Batch, Image, is_near, rows_that_stay_near

AT_ONCE = 16  # ResNet-50 in f32 then hears it within 1.5 s


@dataclass(frozen=True, slots=True, eq=False)
class Dims:
    """The dims that a context is bound to for one or several slices."""

    values: dict[str, int]


@dataclass(frozen=True, slots=True)
class Slices:
    """`n` slices of the same dims side by side, or one that all threads share; and the rows of all of them, of each
    input and output (`...`: all)."""

    dims: Dims
    rows: tuple[slice | EllipsisType, ...]
    n: int = 1


def whole_specs(image: Image) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What an engine takes and gives in one call."""
    if image.batch is None:
        return image.inputs, image.outputs
    return tuple(map(image.batch.whole, image.inputs)), tuple(map(image.batch.whole, image.outputs))


def slices_of(
    batch: Batch | None, dims: Mapping[str, int], shapes: Callable[[], Sequence[tuple[int, ...]]],
    arena_bytes: Callable[[Mapping[str, int]], int], n_threads: int,
) -> list[Slices]:  # fmt: skip
    """How `n_threads` compute a call with these dims, whose inputs and outputs have these `shapes`; nothing for all at
    once."""
    if batch is None:
        return []
    name = as_symbol(batch.rows)
    total = dims[name.name] if name else evaluate(batch.rows, dims)
    if total < 2 or (batch.each is None and name is None):
        return []

    def with_rows(n: int) -> dict[str, int]:
        return {**dims, name.name: n} if name else {}

    cache_bytes = host().cache_bytes(2)
    each = batch.each or rows_that_stay_near(arena_bytes(with_rows(1)), cache_bytes)
    if each >= total:
        return []
    if batch.each is None:
        each = _shared_evenly(total, each, n_threads)
    beside = 0
    if n_threads > 1 and is_near(arena_bytes(with_rows(each)), cache_bytes):
        beside = total // each // n_threads * n_threads
    per_row = [shape[0] // total for shape in shapes()]
    bound: dict[int, Dims] = {}
    found: list[Slices] = []
    start = 0
    while start < total:
        n = max(1, min(beside - start // each, AT_ONCE * n_threads))
        rows = min(each, total - start)
        own = bound.setdefault(rows, Dims(with_rows(rows)))
        found.append(Slices(own, tuple(slice(c * start, c * (start + n * rows)) for c in per_row), n))
        start += n * rows
    return found


def _shared_evenly(total: int, most: int, n_threads: int) -> int:
    """Of at most `most` rows a slice, so many that each thread gets as many of full size."""
    own = total // n_threads
    return most if own == 0 else -(-own // -(-own // most))
