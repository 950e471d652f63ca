"""Ops that move or repeat data without arithmetic. Attributes hold dims, so shapes may be symbolic.

reshape{shape}                    same elements, row-major order
transpose{perm}
expand{shape}                     broadcast to `shape` (NumPy's broadcast_to)
slice{starts, sizes, steps}       one entry per axis; element i of an axis is input `start + i * step`; steps may be
negative
pad{before, after, mode, value}   one entry per axis, non-negative; mode constant|edge|reflect|wrap; value used by
constant
concat{axis}(x0, x1, ...)
iota{shape, axis, dtype}          the index along `axis`
dims{values}                      i64[len(values)], the values of dims
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vivace.base.dims import Dim, bounds
from vivace.base.dtypes import DType
from vivace.base.errors import GraphError
from vivace.graph.graph import Attrs, Op, Type
from vivace.graph.ops.shapes import DimMismatch, axis_of, broadcast, need, same

Array = np.ndarray


def _no_flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    return 0


def _reshape(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x = need(types, 0, "reshape")
    out = Type(x.dtype, tuple(attrs["shape"]))
    if out.size != x.size:
        raise DimMismatch(x.size, out.size, f"reshape {x} to {out}")
    return (out,)


def _transpose(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x, perm = need(types, 0, "transpose"), attrs["perm"]
    if sorted(perm) != list(range(x.rank)):
        raise GraphError(f"perm {perm} is no permutation of {x.rank} axes", where="transpose")
    return (Type(x.dtype, tuple(x.shape[p] for p in perm)),)


def _expand(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x, shape = need(types, 0, "expand"), tuple(attrs["shape"])
    if broadcast((x.shape, shape), "expand") != shape:
        raise GraphError(f"{x} does not broadcast to {shape}", where="expand")
    return (Type(x.dtype, shape),)


def _slice(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x = need(types, 0, "slice")
    if not len(attrs["starts"]) == len(attrs["sizes"]) == len(attrs["steps"]) == x.rank:
        raise GraphError("starts, sizes and steps need one entry per axis", where="slice")
    for n, start, size, step in zip(x.shape, attrs["starts"], attrs["sizes"], attrs["steps"], strict=True):
        last = start + (size - 1) * step
        ends = (start, last, n - 1 - start, n - 1 - last) if (bounds(size)[0] or 0) > 0 else ()
        if any(_is_negative(d) for d in (size, *ends)):
            raise GraphError(f"{size} places from {start} by {step} are not in {x}", where="slice")
    return (Type(x.dtype, tuple(attrs["sizes"])),)


def _is_negative(d: Dim) -> bool:
    """For certain."""
    most = bounds(d)[1]
    return most is not None and most < 0


def _slice_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x = xs[0]
    assert x is not None
    for axis, (start, size, step) in enumerate(zip(attrs["starts"], attrs["sizes"], attrs["steps"], strict=True)):
        x = np.take(x, start + step * np.arange(size), axis=axis)
    return (x,)


def _pad(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x = need(types, 0, "pad")
    if not len(attrs["before"]) == len(attrs["after"]) == x.rank:
        raise GraphError("before and after need one entry per axis", where="pad")
    return (Type(x.dtype, tuple(b + d + a for b, d, a in zip(attrs["before"], x.shape, attrs["after"], strict=True))),)


def _pad_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x, mode = xs[0], attrs["mode"]
    assert x is not None
    widths = list(zip(attrs["before"], attrs["after"], strict=True))
    if mode == "constant":
        return (np.pad(x, widths, constant_values=attrs["value"]),)
    return (np.pad(x, widths, mode=mode),)


def _concat(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    first = need(types, 0, "concat")
    axis = axis_of(attrs["axis"], first.rank, "concat")
    total: Dim = 0
    for i in range(len(types)):
        t = need(types, i, "concat")
        if t.dtype is not first.dtype or t.rank != first.rank:
            raise GraphError(f"operands are {first} and {t}", where="concat", expected="one dtype and rank")
        for d in range(first.rank):
            if d != axis:
                same(first.shape[d], t.shape[d], "concat")
        total = total + t.shape[axis]
    return (Type(first.dtype, (*first.shape[:axis], total, *first.shape[axis + 1 :])),)


def _iota_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    shape, axis = attrs["shape"], attrs["axis"]
    line = np.arange(shape[axis], dtype=attrs["dtype"].numpy)
    return (np.broadcast_to(line.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape).copy(),)


def _dims_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    return (np.array(attrs["values"], dtype=np.int64),)


def _op(name: str, infer: object, run: object) -> Op:
    return Op(name, infer, run, _no_flops, kind="movement")  # type: ignore[arg-type]


FAMILY = (
    _op("reshape", _reshape, lambda xs, attrs: (xs[0].reshape(attrs["shape"]),)),
    _op("transpose", _transpose, lambda xs, attrs: (xs[0].transpose(attrs["perm"]),)),
    _op("expand", _expand, lambda xs, attrs: (np.broadcast_to(xs[0], attrs["shape"]).copy(),)),
    _op("slice", _slice, _slice_run),
    _op("pad", _pad, _pad_run),
    _op("concat", _concat, lambda xs, attrs: (np.concatenate(xs, axis=attrs["axis"]),)),
    _op("iota", lambda types, attrs: (Type(attrs["dtype"], tuple(attrs["shape"])),), _iota_run),
    _op("dims", lambda types, attrs: (Type(DType.i64, (len(attrs["values"]),)),), _dims_run),
)
