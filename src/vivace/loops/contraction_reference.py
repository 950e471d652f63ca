"""The meaning of `Contraction` and `Depthwise`, in NumPy: sums in f64, rounded once, then the epilogue as the loop IR
defines it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vivace.base.dims import Dim, evaluate
from vivace.loops.contraction import Axis, Contraction, Depthwise
from vivace.loops.kernel import Buffer, Expr
from vivace.loops.reference import value_of

Array = np.ndarray


def run_contraction(c: Contraction, arrays: Mapping[Buffer, Array], dims: Mapping[str, int] | None = None) -> None:
    """Compute a contraction. `arrays` are one-dimensional, element 0 where the buffer begins; `out` is written in
    place."""
    env = dict(dims or {})
    n = evaluate(c.n, env)
    a = arrays[c.a][_offsets([*c.batch, *c.rows, *c.taps], "a", env)]
    b = _right_operand(c, arrays[c.b], n, env)
    sizes = [evaluate(x.extent, env) for x in (*c.batch, *c.rows, *c.taps)]
    n_batch, n_rows = len(c.batch), len(c.rows)
    batch, rows = sizes[:n_batch], sizes[n_batch : n_batch + n_rows]
    depth = int(np.prod(sizes[n_batch + n_rows :], dtype=int))
    n_units, n_points = int(np.prod(batch, dtype=int)), int(np.prod(rows, dtype=int))
    left = a.astype(np.float64).reshape(n_units, n_points, depth)
    right = b.astype(np.float64).reshape(n_units, depth, n)
    total = (left @ right).astype(c.acc_dtype.numpy).reshape(*batch, *rows, n)
    axes = [*c.batch, *c.rows]
    place = _offsets(axes, "out", env)[..., None] + np.arange(n)
    _finish(c.epilogue, total, place, [x.name for x in axes] + ["n"], arrays, c.out, env)


def run_depthwise(d: Depthwise, arrays: Mapping[Buffer, Array], dims: Mapping[str, int] | None = None) -> None:
    """Compute a depthwise convolution, as `run_contraction` does; the symbol of its channel is `c`."""
    env = dict(dims or {})
    channels = np.arange(evaluate(d.channels, env))
    a = arrays[d.a][_offsets([*d.rows, *d.taps], "a", env)[..., None] + channels].astype(np.float64) + d.a_offset
    b = arrays[d.b][_offsets(d.taps, "b", env)[..., None] + channels].astype(np.float64)
    total = (a * b).sum(axis=tuple(range(len(d.rows), len(d.rows) + len(d.taps)))).astype(np.float32)
    place = _offsets(d.rows, "out", env)[..., None] + channels
    _finish(d.epilogue, total, place, [x.name for x in d.rows] + ["c"], arrays, d.out, env)


def _offsets(axes: Sequence[Axis], operand: str, env: Mapping[str, int]) -> Array:
    """Addresses in elements over the grid of the axes."""
    total = np.zeros((), np.int64)
    for x in axes:
        steps: dict[str, Dim] = {"a": x.a, "b": x.b, "out": x.out}
        total = total[..., None] + np.arange(evaluate(x.extent, env)) * evaluate(steps[operand], env)
    return total


def _right_operand(c: Contraction, b: Array, n: int, env: Mapping[str, int]) -> Array:
    """B over batch, taps and n, whichever way it lies."""
    axes = [*c.batch, *c.taps]
    if c.packing.kind != "panels":
        step = evaluate(c.packing.n_stride, env) if c.packing.kind == "transposed" else 1
        return b[_offsets(axes, "b", env)[..., None] + np.arange(n) * step]
    lanes, sizes = c.packing.lanes, [evaluate(x.extent, env) for x in axes]
    n_panels = -(-n // lanes)
    n_batch = len(c.batch)
    packed = b[: int(np.prod(sizes)) * n_panels * lanes].reshape(*sizes[:n_batch], n_panels, *sizes[n_batch:], lanes)
    return np.moveaxis(packed, n_batch, -2).reshape(*sizes, n_panels * lanes)[..., :n]


def _finish(
    epilogue: Expr | None,
    total: Array,
    place: Array,
    names: list[str],
    arrays: Mapping[Buffer, Array],
    out: Buffer,
    env: Mapping[str, int],
) -> None:
    grid = np.ogrid[tuple(slice(size) for size in total.shape)]
    symbols: dict[str, Array | int] = {**env, **dict(zip(names, grid))}
    value = total if epilogue is None else value_of(epilogue, arrays, symbols, {"acc": total})
    arrays[out][place] = np.broadcast_to(value, place.shape).astype(out.dtype.numpy)
