"""Ops that read or write at computed positions; negative indices count from the end, as in ONNX.

gather{axis}(data, indices)                              data[..., indices, ...]: the axis is replaced by the axes of
        indices
gather_elements{axis}(data, indices)                     out[i][j] = data[indices[i][j]][j] for axis 0; beside the axis
        the indices reach no further than the data
gather_nd{batch_dims}(data, indices)                     the last axis of indices holds coordinates
scatter_elements{axis, reduction}(data, indices, updates)
scatter_nd{reduction}(data, indices, updates)            reduction none|add|mul|max|min; with none, the last of equal
        positions wins
topk{axis, k, largest, sorted}(x) -> values, indices     i64 indices; of equal elements the one with the lower index
        comes first
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vivace.base.dims import Dim, bounds
from vivace.base.dtypes import DType
from vivace.base.errors import GraphError
from vivace.graph.graph import Attrs, Op, Type
from vivace.graph.ops.shapes import axis_of, need, same

Array = np.ndarray
_INDEX = (DType.i32, DType.i64)
REDUCTIONS = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def _indices(types: Sequence[Type | None], i: int, where: str) -> Type:
    t = need(types, i, where)
    if t.dtype not in _INDEX:
        raise GraphError(f"indices are {t}", where=where, expected="i32 or i64")
    return t


def _gather(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x, idx = need(types, 0, "gather"), _indices(types, 1, "gather")
    axis = axis_of(attrs["axis"], x.rank, "gather")
    return (Type(x.dtype, (*x.shape[:axis], *idx.shape, *x.shape[axis + 1 :])),)


def _check(idx: Array, size: int, where: str) -> Array:
    if idx.size and (idx.min() < -size or idx.max() >= size):
        raise GraphError(f"an index is outside [-{size}, {size})", where=where)
    return np.where(idx < 0, idx + size, idx)


def _gather_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x, idx = xs
    assert x is not None and idx is not None
    axis = attrs["axis"]
    return (np.take(x, _check(idx, x.shape[axis], "gather"), axis=axis),)


def _gather_elements(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x, idx = need(types, 0, "gather_elements"), _indices(types, 1, "gather_elements")
    _check_lines(x, idx, attrs["axis"], "gather_elements")
    return (Type(x.dtype, idx.shape),)


def _check_lines(x: Type, idx: Type, axis: int, where: str) -> None:
    """Raises: GraphError where indices of lines along an axis cannot fit those of the data."""
    axis = axis_of(axis, x.rank, where)
    if x.rank != idx.rank:
        raise GraphError(f"operands are {x} and {idx}", where=where, expected="one rank")
    for d, (n, most) in enumerate(zip(idx.shape, x.shape, strict=True)):
        least = bounds(n - most)[0]
        if d != axis and least is not None and least > 0:
            raise GraphError(
                f"operands are {x} and {idx}", where=where, expected="indices that reach no further than the data"
            )


def _positions(idx: Array, axis: int, size: int, where: str) -> tuple[Array, ...]:
    grid: list[Array] = list(np.indices(idx.shape, sparse=True))
    grid[axis] = _check(idx, size, where)
    return tuple(np.broadcast_arrays(*grid))


def _gather_elements_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x, idx = xs
    assert x is not None and idx is not None
    axis = attrs["axis"] % x.ndim
    return (x[_positions(idx, axis, x.shape[axis], "gather_elements")],)


def _gather_nd(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x, idx, b = need(types, 0, "gather_nd"), _indices(types, 1, "gather_nd"), attrs["batch_dims"]
    depth = idx.shape[-1] if idx.rank else None
    if not isinstance(depth, int) or not 0 <= b < idx.rank or b + depth > x.rank:
        raise GraphError(
            f"operands are {x} and {idx}", where="gather_nd", expected="coordinates within the rank of the data"
        )
    for d in range(b):
        same(x.shape[d], idx.shape[d], "gather_nd")
    return (Type(x.dtype, (*idx.shape[:-1], *x.shape[b + depth :])),)


def _coordinates(x: Array, idx: Array, b: int, where: str) -> tuple[Array, ...]:
    batch = [g[(...,) + (None,) * (idx.ndim - 1 - b)] for g in np.asarray(np.indices(idx.shape[:b]))]
    return (*batch, *(_check(idx[..., i], x.shape[b + i], where) for i in range(idx.shape[-1])))


def _gather_nd_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x, idx = xs
    assert x is not None and idx is not None
    where = _coordinates(x, idx, attrs["batch_dims"], "gather_nd")
    return (np.asarray(x[where]) if where else np.broadcast_to(x, (*idx.shape[:-1], *x.shape)).copy(),)


def _scatter_elements(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x, idx, updates = _scattered(types, attrs)
    _check_lines(x, idx, attrs["axis"], "scatter_elements")
    return _updated(x, updates, idx.shape, "scatter_elements")


def _scatter_nd(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x, idx, updates = _scattered(types, attrs)
    depth = idx.shape[-1] if idx.rank else None
    if not isinstance(depth, int) or depth > x.rank:
        raise GraphError(
            f"operands are {x} and {idx}", where="scatter_nd", expected="coordinates within the rank of the data"
        )
    return _updated(x, updates, (*idx.shape[:-1], *x.shape[depth:]), "scatter_nd")


def _scattered(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, Type, Type]:
    """Data, indices and updates."""
    x, idx, updates = need(types, 0, "scatter"), _indices(types, 1, "scatter"), need(types, 2, "scatter")
    if updates.dtype is not x.dtype:
        raise GraphError(f"operands are {x} and {updates}", where="scatter", expected="one dtype")
    if attrs["reduction"] != "none" and attrs["reduction"] not in REDUCTIONS:
        raise GraphError(f"reduction {attrs['reduction']!r} is unknown", where="scatter")
    return x, idx, updates


def _updated(x: Type, updates: Type, wanted: Sequence[Dim], where: str) -> tuple[Type, ...]:
    if updates.rank != len(wanted):
        raise GraphError(f"updates are {updates}", where=where, expected=str(Type(x.dtype, tuple(wanted))))
    for got, want in zip(updates.shape, wanted, strict=True):
        same(got, want, where)
    return (x,)


def _scatter_into(x: Array, where: tuple[Array, ...], updates: Array, reduction: str) -> Array:
    out = x.copy()
    if reduction == "none":
        out[where] = updates
    elif out.dtype.kind in "fiub":
        REDUCTIONS[reduction].at(out, where, updates)
    else:  # ml_dtypes have no `ufunc.at`
        wide = out.astype(np.float32)
        REDUCTIONS[reduction].at(wide, where, updates.astype(np.float32))
        out = wide.astype(x.dtype)
    return out


def _scatter_elements_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x, idx, updates = xs
    assert x is not None and idx is not None and updates is not None
    axis = attrs["axis"] % x.ndim
    return (_scatter_into(x, _positions(idx, axis, x.shape[axis], "scatter_elements"), updates, attrs["reduction"]),)


def _scatter_nd_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x, idx, updates = xs
    assert x is not None and idx is not None and updates is not None
    return (_scatter_into(x, _coordinates(x, idx, 0, "scatter_nd"), updates, attrs["reduction"]),)


def _topk(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x = need(types, 0, "topk")
    axis = axis_of(attrs["axis"], x.rank, "topk")
    shape = (*x.shape[:axis], attrs["k"], *x.shape[axis + 1 :])
    return Type(x.dtype, shape), Type(DType.i64, shape)


def _topk_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x, axis, k = xs[0], attrs["axis"], attrs["k"]
    assert x is not None
    if k > x.shape[axis]:
        raise GraphError(f"k is {k}", where="topk", expected=f"at most {x.shape[axis]}, the size of axis {axis}")
    if attrs["largest"]:  # a stable descending order: sort the reversed axis ascending, then reverse
        n = x.shape[axis]
        order = np.flip(n - 1 - np.argsort(np.flip(x, axis), axis=axis, kind="stable"), axis)
    else:
        order = np.argsort(x, axis=axis, kind="stable")
    order = np.take(order, np.arange(k), axis=axis)
    return np.take_along_axis(x, order, axis), order.astype(np.int64)


def _no_flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    return 0


def _updates_flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    return 0 if attrs["reduction"] == "none" or ins[2] is None else ins[2].size


FAMILY = (
    Op("gather", _gather, _gather_run, _no_flops),
    Op("gather_elements", _gather_elements, _gather_elements_run, _no_flops),
    Op("gather_nd", _gather_nd, _gather_nd_run, _no_flops),
    Op("scatter_elements", _scatter_elements, _scatter_elements_run, _updates_flops),
    Op("scatter_nd", _scatter_nd, _scatter_nd_run, _updates_flops),
    Op("topk", _topk, _topk_run, _no_flops),
)
