"""Ops that reduce or scan axes.

reduce_sum|reduce_max|reduce_min|reduce_prod|reduce_mean{axes: tuple, keepdims}(x)
        axes are non-negative and ascending; an empty axis gives the neutral element (sum 0, prod 1, max -inf or the
        least integer, mean NaN)
argmax|argmin{axis, keepdims, select_last}(x) -> i64
cumsum{axis, exclusive, reverse}(x)

Half types accumulate in f32; max and min propagate NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vivace.base.dims import Dim
from vivace.base.dtypes import DType
from vivace.base.errors import GraphError
from vivace.graph.graph import Attrs, Op, Type
from vivace.graph.ops.shapes import axis_of, need

Array = np.ndarray


def _reduced(shape: tuple[Dim, ...], axes: tuple[int, ...], keepdims: bool) -> tuple[Dim, ...]:
    if keepdims:
        return tuple(1 if i in axes else d for i, d in enumerate(shape))
    return tuple(d for i, d in enumerate(shape) if i not in axes)


def _infer(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x, axes = need(types, 0, "reduce"), attrs["axes"]
    if list(axes) != sorted(set(axes)) or any(not 0 <= a < x.rank for a in axes):
        raise GraphError(f"axes are {axes} for rank {x.rank}", where="reduce", expected="ascending axes of the operand")
    return (Type(x.dtype, _reduced(x.shape, axes, attrs["keepdims"])),)


def accumulator(dtype: np.dtype) -> np.dtype:
    """The type in which sums are taken: at least f32 for floats, the type itself otherwise."""
    if dtype.kind in "iub" or dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        return dtype
    return np.dtype(np.float32)


def lowest(dtype: np.dtype) -> float | int | bool:
    return False if dtype.kind == "b" else int(np.iinfo(dtype).min) if dtype.kind in "iu" else -np.inf


def highest(dtype: np.dtype) -> float | int | bool:
    return True if dtype.kind == "b" else int(np.iinfo(dtype).max) if dtype.kind in "iu" else np.inf


def _mean(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    count = int(np.prod([x.shape[a] for a in axis], dtype=np.int64))
    total = x.sum(axis=axis, keepdims=keepdims, dtype=x.dtype)
    if x.dtype.kind in "iu":
        return np.asarray(np.trunc(total / max(count, 1))).astype(x.dtype)
    return np.asarray(total / x.dtype.type(count))


_RUN: dict[str, Callable[[Array, tuple[int, ...], bool], Array]] = {
    "reduce_sum": lambda x, axis, keep: x.sum(axis=axis, keepdims=keep, dtype=x.dtype),
    "reduce_prod": lambda x, axis, keep: x.prod(axis=axis, keepdims=keep, dtype=x.dtype),
    "reduce_mean": _mean,
    "reduce_max": lambda x, axis, keep: x.max(axis=axis, keepdims=keep, initial=lowest(x.dtype)),
    "reduce_min": lambda x, axis, keep: x.min(axis=axis, keepdims=keep, initial=highest(x.dtype)),
}


def _reduction(name: str) -> Op:
    def run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
        x = xs[0]
        assert x is not None
        if not attrs["axes"]:
            return (x,)
        with np.errstate(all="ignore"):
            out = _RUN[name](x.astype(accumulator(x.dtype), copy=False), tuple(attrs["axes"]), attrs["keepdims"])
        return (np.asarray(out).astype(x.dtype, copy=False),)

    exact = name in ("reduce_max", "reduce_min")
    return Op(name, _infer, run, _flops, exact, 0.0 if exact else 1e-7, "reduction")


def _flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    return 0 if ins[0] is None else ins[0].size


def _arg_infer(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x = need(types, 0, "argmax")
    axis = axis_of(attrs["axis"], x.rank, "argmax")
    return (Type(DType.i64, _reduced(x.shape, (axis,), attrs["keepdims"])),)


def _arg(pick: Callable[..., Array]) -> Callable[[Sequence[Array | None], Attrs], tuple[Array, ...]]:
    def run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
        x, axis = xs[0], attrs["axis"]
        assert x is not None
        x = x.astype(accumulator(x.dtype), copy=False)
        if attrs["select_last"]:
            out = x.shape[axis] - 1 - pick(np.flip(x, axis), axis=axis, keepdims=attrs["keepdims"])
        else:
            out = pick(x, axis=axis, keepdims=attrs["keepdims"])
        return (np.asarray(out, dtype=np.int64),)

    return run


def _cumsum(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x, axis = xs[0], attrs["axis"]
    assert x is not None
    y = np.flip(x, axis) if attrs["reverse"] else x
    y = np.cumsum(y, axis=axis, dtype=accumulator(x.dtype))
    if attrs["exclusive"]:
        first = np.zeros_like(np.take(y, [0] if y.shape[axis] else [], axis=axis))
        y = np.concatenate([first, np.take(y, np.arange(y.shape[axis] - 1), axis=axis)], axis=axis)
    return ((np.flip(y, axis) if attrs["reverse"] else y).astype(x.dtype),)


FAMILY = (
    *(_reduction(name) for name in _RUN),
    Op("argmax", _arg_infer, _arg(np.argmax), _flops, kind="reduction"),
    Op("argmin", _arg_infer, _arg(np.argmin), _flops, kind="reduction"),
    Op("cumsum", lambda types, attrs: (need(types, 0, "cumsum"),), _cumsum, _flops, False, 1e-7),
)
