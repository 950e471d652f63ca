"""Ops that multiply and sum over shared axes. Sums are taken in f32 for half types and exactly for integers.

matmul(a, b)                      NumPy semantics: 1-D operands and broadcast batch dims included
conv{strides, dilations, before, after, group, layout}(x, w, bias?)
        any number of spatial axes, one entry of strides, dilations, before and after (zero padding) for each;
        layout NCHW: x [N,C,spatial...]; NHWC: x [N,spatial...,C], the output likewise; w is [OC,C/group,spatial...]
        in both
conv_transpose{strides, dilations, before, after, output_padding, group, layout}(x, w, bias?)
        w [C,OC/group,spatial...]; before and after crop the full output
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from vivace.base.dims import Dim, prod
from vivace.base.errors import GraphError
from vivace.graph.graph import Attrs, Op, Type
from vivace.graph.ops.shapes import broadcast, need, same, window_out

Array = np.ndarray


def _wide(dtype: np.dtype) -> np.dtype:
    """Where products are summed: f64 holds the products of integers up to 32 bits exactly for any real depth."""
    if dtype.kind in "iu":
        return np.dtype(np.int64) if dtype.itemsize == 8 else np.dtype(np.float64)
    return dtype if dtype in (np.dtype(np.float32), np.dtype(np.float64)) else np.dtype(np.float32)


def _one_dtype(a: Type, b: Type, where: str) -> None:
    if a.dtype is not b.dtype:
        raise GraphError(f"operands are {a} and {b}", where=where, expected="one dtype")


def _matmul(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    a, b = need(types, 0, "matmul"), need(types, 1, "matmul")
    _one_dtype(a, b, "matmul")
    if not a.rank or not b.rank:
        raise GraphError(f"operands are {a} and {b}", where="matmul", expected="at least one axis each")
    same(a.shape[-1], b.shape[-2 if b.rank > 1 else 0], "matmul")
    batch = broadcast((a.shape[:-2], b.shape[:-2]), "matmul")
    return (Type(a.dtype, (*batch, *a.shape[-2:-1], *(b.shape[-1:] if b.rank > 1 else ()))),)


def _to(out: Array, dtype: np.dtype) -> Array:
    """Back from the accumulator; integers wrap."""
    out = np.asarray(out)
    return out.astype(np.int64).astype(dtype) if dtype.kind in "iu" else out.astype(dtype, copy=False)


def _matmul_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    a, b = xs
    assert a is not None and b is not None
    wide = _wide(a.dtype)
    with np.errstate(all="ignore"):
        return (_to(np.matmul(a.astype(wide, copy=False), b.astype(wide, copy=False)), a.dtype),)


def _matmul_flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    return 0 if ins[0] is None else 2 * outs[0].size * ins[0].shape[-1]


def split_layout(shape: tuple[Dim, ...], layout: str) -> tuple[Dim, Dim, tuple[Dim, ...]]:
    """`(batch, channels, spatial)` of an activation's shape."""
    return (shape[0], shape[1], shape[2:]) if layout == "NCHW" else (shape[0], shape[-1], shape[1:-1])


def join_layout(n: Dim, c: Dim, spatial: Sequence[Dim], layout: str) -> tuple[Dim, ...]:
    return (n, c, *spatial) if layout == "NCHW" else (n, *spatial, c)


def channels_first(x: Array, layout: str) -> Array:
    return x if layout == "NCHW" else np.moveaxis(x, -1, 1)


def to_layout(x: Array, layout: str) -> Array:
    return x if layout == "NCHW" else np.ascontiguousarray(np.moveaxis(x, 1, -1))


def check_spatial(types: Sequence[Type | None], attrs: Attrs, names: Sequence[str], where: str) -> int:
    """The number of spatial axes, every per-axis attribute having that many entries."""
    n = need(types, 0, where).rank - 2
    if n < 0 or attrs["layout"] not in ("NCHW", "NHWC"):
        raise GraphError(
            f"operand is {types[0]}, layout {attrs['layout']!r}", where=where, expected="[N,C,...] NCHW or NHWC"
        )
    for name in names:
        if len(attrs[name]) != n:
            raise GraphError(f"{name} is {attrs[name]}", where=where, expected=f"{n} entries")
    if any(isinstance(s, int) and s < 1 for s in (*attrs["strides"], *attrs["dilations"])):
        raise GraphError("a stride or dilation is below 1", where=where)
    return n


def _conv_operands(types: Sequence[Type | None], attrs: Attrs, where: str, n: int) -> tuple[Type, Type]:
    x, w = need(types, 0, where), need(types, 1, where)
    _one_dtype(x, w, where)
    if w.rank != n + 2:
        raise GraphError(f"operands are {x} and {w}", where=where, expected="one rank")
    return x, w


def _bias(types: Sequence[Type | None], channels: Dim, where: str) -> None:
    if len(types) > 2 and (b := types[2]) is not None:
        if b.rank != 1:
            raise GraphError(f"bias is {b}", where=where, expected="one axis")
        same(b.shape[0], channels, where)


def _conv(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    n = check_spatial(types, attrs, ("strides", "dilations", "before", "after"), "conv")
    x, w = _conv_operands(types, attrs, "conv", n)
    batch, c, spatial = split_layout(x.shape, attrs["layout"])
    same(c, w.shape[1] * attrs["group"], "conv")
    if isinstance(w.shape[0], int) and w.shape[0] % attrs["group"]:
        raise GraphError(f"{w.shape[0]} filters do not divide into {attrs['group']} groups", where="conv")
    _bias(types, w.shape[0], "conv")
    out = [
        window_out(d, k, *rest)
        for d, k, *rest in zip(
            spatial, w.shape[2:], *(attrs[a] for a in ("strides", "dilations", "before", "after")), strict=True
        )
    ]
    if any(isinstance(d, int) and d < 0 for d in out):
        raise GraphError(f"the filter {w} is larger than the padded input {x}", where="conv")
    return (Type(x.dtype, join_layout(batch, w.shape[0], out, attrs["layout"])),)


def _add_bias(out: Array, bias: Array | None) -> Array:
    return out if bias is None else out + bias.astype(out.dtype).reshape(-1, *[1] * (out.ndim - 2))


def _conv_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x, w, bias = xs[0], xs[1], xs[2] if len(xs) > 2 else None
    assert x is not None and w is not None
    dtype, g, wide = x.dtype, attrs["group"], _wide(x.dtype)
    x = channels_first(x, attrs["layout"]).astype(wide)
    x = np.pad(x, [(0, 0), (0, 0), *zip(attrs["before"], attrs["after"], strict=True)])
    n, (oc, cg), kernel = x.shape[0], w.shape[:2], w.shape[2:]
    steps = list(zip(kernel, attrs["strides"], attrs["dilations"], strict=True))
    out_shape = [(d - e * (k - 1) - 1) // s + 1 for d, (k, s, e) in zip(x.shape[2:], steps, strict=True)]
    w = w.astype(wide).reshape(g, oc // g, cg, *kernel)
    out = np.zeros((n, g, oc // g, int(np.prod(out_shape, dtype=np.int64))), wide)
    with np.errstate(all="ignore"):
        for tap in product(*map(range, kernel)):  # one matrix product for each position in the filter
            window = tuple(
                slice(t * e, t * e + s * (o - 1) + 1, s) if o else slice(0, 0)
                for t, o, (_, s, e) in zip(tap, out_shape, steps, strict=True)
            )
            part = x[(slice(None), slice(None), *window)].reshape(n, g, cg, out.shape[-1])
            at: tuple[Any, ...] = (..., *tap)
            weight = w[at]
            out += part * weight if cg == 1 else np.matmul(weight, part)
    out = _add_bias(out.reshape(n, oc, *out_shape), bias)
    return (to_layout(_to(out, dtype), attrs["layout"]),)


def _conv_flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    w = ins[1]
    assert w is not None
    return 2 * outs[0].size * prod(w.shape[1:]) + (outs[0].size if len(ins) > 2 and ins[2] is not None else 0)


def _transpose_out(size: Dim, k: Dim, stride: int, dilation: int, before: Dim, after: Dim, extra: Dim) -> Dim:
    return stride * (size - 1) + extra + (k - 1) * dilation + 1 - before - after


_PER_AXIS = ("strides", "dilations", "before", "after", "output_padding")


def _conv_transpose(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    n = check_spatial(types, attrs, _PER_AXIS, "conv_transpose")
    x, w = _conv_operands(types, attrs, "conv_transpose", n)
    batch, c, spatial = split_layout(x.shape, attrs["layout"])
    same(c, w.shape[0], "conv_transpose")
    channels = w.shape[1] * attrs["group"]
    _bias(types, channels, "conv_transpose")
    out = [_transpose_out(*t) for t in zip(spatial, w.shape[2:], *(attrs[a] for a in _PER_AXIS), strict=True)]
    return (Type(x.dtype, join_layout(batch, channels, out, attrs["layout"])),)


def _conv_transpose_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x, w, bias = xs[0], xs[1], xs[2] if len(xs) > 2 else None
    assert x is not None and w is not None
    dtype, g, wide = x.dtype, attrs["group"], _wide(x.dtype)
    x = channels_first(x, attrs["layout"]).astype(wide)
    (n, c), spatial, kernel = x.shape[:2], x.shape[2:], w.shape[2:]
    ocg = w.shape[1]
    steps = list(zip(spatial, kernel, attrs["strides"], attrs["dilations"], attrs["output_padding"], strict=True))
    full = [s * max(d - 1, 0) + p + (k - 1) * e + 1 for d, k, s, e, p in steps]
    out = np.zeros((n, g, ocg, *full), wide)
    flat, w = x.reshape(n, g, c // g, -1), w.astype(wide).reshape(g, c // g, ocg, *kernel)
    with np.errstate(all="ignore"):
        for tap in product(*map(range, kernel)):
            at: tuple[Any, ...] = (..., *tap)
            weight = w[at].swapaxes(1, 2)
            part = np.matmul(weight, flat).reshape(n, g, ocg, *spatial)
            window = tuple(
                slice(t * e, t * e + s * (d - 1) + 1, s) if d else slice(0, 0)
                for t, (d, _, s, e, _p) in zip(tap, steps, strict=True)
            )
            out[(slice(None), slice(None), slice(None), *window)] += part
    before, after = attrs["before"], attrs["after"]
    out = np.pad(out, [(0, 0)] * 3 + [(max(-b, 0), max(-a, 0)) for b, a in zip(before, after, strict=True)])
    crop = tuple(slice(max(b, 0), d - max(a, 0)) for b, a, d in zip(before, after, out.shape[3:], strict=True))
    out = out[(slice(None), slice(None), slice(None), *crop)]
    return (to_layout(_to(_add_bias(out.reshape(n, g * ocg, *out.shape[3:]), bias), dtype), attrs["layout"]),)


def _conv_transpose_flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    x, w = ins[0], ins[1]
    assert x is not None and w is not None
    return 2 * x.size * prod(w.shape[1:])


FAMILY = (
    Op("matmul", _matmul, _matmul_run, _matmul_flops, False, 1e-7, "contraction"),
    Op("conv", _conv, _conv_run, _conv_flops, False, 1e-7, "contraction"),
    Op("conv_transpose", _conv_transpose, _conv_transpose_run, _conv_transpose_flops, False, 1e-7, "contraction"),
)
