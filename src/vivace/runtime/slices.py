"""The slices of a batch that is not computed at once (`vivace.lower.image.Batch`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType

from vivace.base.dims import as_symbol, evaluate
from vivace.base.machine import host
from vivace.base.specs import TensorSpec
from vivace.lower.image import Batch, Image, rows_that_stay_near


@dataclass(frozen=True, slots=True, eq=False)
class Dims:
    """The dims that a context is bound to for one or several slices."""

    values: dict[str, int]


@dataclass(frozen=True, slots=True)
class Slice:
    """One run: its dims, and its rows of each input and output (`...`: all)."""

    dims: Dims
    rows: tuple[slice | EllipsisType, ...]


def whole_specs(image: Image) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What an engine takes and gives in one call."""
    if image.batch is None:
        return image.inputs, image.outputs
    return tuple(map(image.batch.whole, image.inputs)), tuple(map(image.batch.whole, image.outputs))


def slices_of(
    batch: Batch | None, dims: Mapping[str, int], shapes: Callable[[], Sequence[tuple[int, ...]]],
    arena_bytes: Callable[[Mapping[str, int]], int],
) -> list[Slice]:  # fmt: skip
    """How to compute a call with these dims, whose inputs and outputs have these `shapes`; none for all at once."""
    if batch is None:
        return []
    name = as_symbol(batch.rows)
    total = dims[name.name] if name else evaluate(batch.rows, dims)
    each = batch.each
    if each is None:
        if total < 2 or name is None:
            return []
        each = rows_that_stay_near(arena_bytes({**dims, name.name: 1}), host().cache_bytes(2))
    if each >= total:
        return []
    per_row = [shape[0] // total for shape in shapes()]
    bound: dict[int, Dims] = {}
    found = []
    for start in range(0, total, each):
        n = min(each, total - start)
        values = bound.setdefault(n, Dims({**dims, name.name: n} if name else {}))
        found.append(Slice(values, tuple(slice(c * start, c * (start + n)) for c in per_row)))
    return found
