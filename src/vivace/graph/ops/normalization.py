"""Ops that normalize along axes, attention, and windows that average or take the maximum.

softmax{axis}(x)   log_softmax{axis}(x)
layer_norm{axis, epsilon}(x, scale?, bias?)    over axes axis..rank-1; scale and bias broadcast against those axes
rms_norm{axis, epsilon}(x, scale?)             x / sqrt(mean(x^2) + epsilon) * scale
attention{scale, causal, softcap}(q [B,H,S,D], k [B,G,T,D], v [B,G,T,E], mask?) -> [B,H,S,E]
        H % G == 0: head h reads group h // (H / G). scores = q k^T * scale; softcap c > 0: c * tanh(scores / c);
        causal: query i sees keys <= i + T - S; a bool mask keeps True, a float mask is added; it broadcasts to
        [B,H,S,T].
        A row that sees no key gives NaN, as softmax of -inf everywhere does.
max_pool{kernel, strides, dilations, before, after, layout}(x)           padding never wins
avg_pool{kernel, strides, dilations, before, after, count_include_pad, layout}(x)

Half types are computed in f32. Ceil mode of ONNX is a larger `after`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from vivace.base.dims import Dim, prod
from vivace.base.dtypes import DType
from vivace.base.errors import GraphError
from vivace.graph.graph import Attrs, Op, Type
from vivace.graph.ops.contraction import channels_first, check_spatial, join_layout, split_layout, to_layout
from vivace.graph.ops.reduction import accumulator, lowest
from vivace.graph.ops.shapes import axis_of, broadcast, need, same, window_out

Array = np.ndarray


def _softmax_infer(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x = need(types, 0, "softmax")
    axis_of(attrs["axis"], x.rank, "softmax")
    return (x,)


def _shifted(x: Array, axis: int) -> Array:
    """`x - max(x)` in the accumulator's type."""
    x = x.astype(accumulator(x.dtype), copy=False)
    return x - x.max(axis=axis, keepdims=True, initial=-np.inf)


def _softmax(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x = xs[0]
    assert x is not None
    with np.errstate(all="ignore"):
        e = np.exp(_shifted(x, attrs["axis"]))
        return ((e / e.sum(axis=attrs["axis"], keepdims=True)).astype(x.dtype),)


def _log_softmax(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x = xs[0]
    assert x is not None
    with np.errstate(all="ignore"):
        shifted = _shifted(x, attrs["axis"])
        return ((shifted - np.log(np.exp(shifted).sum(axis=attrs["axis"], keepdims=True))).astype(x.dtype),)


def _norm_infer(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x = need(types, 0, "layer_norm")
    tail = x.shape[axis_of(attrs["axis"], x.rank, "layer_norm") :]
    for t in types[1:]:
        if t is not None:
            if t.dtype is not x.dtype:
                raise GraphError(f"operands are {x} and {t}", where="layer_norm", expected="one dtype")
            if broadcast((tail, t.shape), "layer_norm") != tail:
                raise GraphError(f"{t} does not broadcast to the normalized axes of {x}", where="layer_norm")
    return (x,)


def _layer_norm(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x = xs[0]
    assert x is not None
    axes = tuple(range(attrs["axis"], x.ndim))
    with np.errstate(all="ignore"):
        wide = x.astype(accumulator(x.dtype), copy=False)
        centred = wide - wide.mean(axis=axes, keepdims=True)
        variance = np.square(centred).mean(axis=axes, keepdims=True)
        out = centred / np.sqrt(variance + wide.dtype.type(attrs["epsilon"]))
        return (_affine(out, xs).astype(x.dtype),)


def _affine(out: Array, xs: Sequence[Array | None]) -> Array:
    if len(xs) > 1 and xs[1] is not None:
        out = out * xs[1].astype(out.dtype)
    if len(xs) > 2 and xs[2] is not None:
        out = out + xs[2].astype(out.dtype)
    return out


def _rms_norm(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x = xs[0]
    assert x is not None
    axes = tuple(range(attrs["axis"], x.ndim))
    with np.errstate(all="ignore"):
        wide = x.astype(accumulator(x.dtype), copy=False)
        mean = np.square(wide).mean(axis=axes, keepdims=True)
        return (_affine(wide / np.sqrt(mean + wide.dtype.type(attrs["epsilon"])), xs).astype(x.dtype),)


def _attention_infer(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    q, k, v = (need(types, i, "attention") for i in range(3))
    if not q.rank == k.rank == v.rank == 4 or not q.dtype is k.dtype is v.dtype:
        raise GraphError(f"operands are {q}, {k}, {v}", where="attention", expected="rank 4 and one dtype")
    (b, h, s, d), (kb, g, t, kd), (vb, vg, vt, e) = q.shape, k.shape, v.shape
    for x, y in ((b, kb), (b, vb), (g, vg), (t, vt), (d, kd)):
        same(x, y, "attention")
    if not isinstance(h, int) or not isinstance(g, int) or not g or h % g:
        raise GraphError(f"{h} heads and {g} groups", where="attention", expected="heads in a multiple of the groups")
    if len(types) > 3 and (mask := types[3]) is not None:
        if mask.dtype not in (DType.bool, q.dtype):
            raise GraphError(f"mask is {mask}", where="attention", expected=f"bool or {q.dtype}")
        if broadcast((mask.shape, (b, h, s, t)), "attention") != (b, h, s, t):
            raise GraphError(f"mask {mask} does not broadcast to the scores", where="attention")
    return (Type(q.dtype, (b, h, s, e)),)


def _attention(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    q, k, v, mask = (*xs[:3], xs[3] if len(xs) > 3 else None)
    assert q is not None and k is not None and v is not None
    dtype, wide = q.dtype, accumulator(q.dtype)
    n, h, s, d = q.shape
    group, t = k.shape[1:3]
    grouped = q.astype(wide).reshape(n, group, h // group, s, d)
    with np.errstate(all="ignore"):
        scores = (grouped @ k.astype(wide)[:, :, None].swapaxes(-1, -2)) * wide.type(attrs["scale"])
        scores = scores.reshape(n, h, s, t)
        if attrs["softcap"]:
            scores = np.tanh(scores / wide.type(attrs["softcap"])) * wide.type(attrs["softcap"])
        if attrs["causal"]:
            seen = np.arange(t)[None, :] <= np.arange(s)[:, None] + t - s
            scores = np.where(seen, scores, wide.type(-np.inf))
        if mask is not None:
            scores = (
                np.where(mask, scores, wide.type(-np.inf)) if mask.dtype == np.bool_ else scores + mask.astype(wide)
            )
        (p,) = _softmax((scores,), {"axis": -1})
        out = p.reshape(n, group, h // group, s, t) @ v.astype(wide)[:, :, None]
    return (out.reshape(n, h, s, v.shape[-1]).astype(dtype),)


def _attention_flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    q, k, v = ins[:3]
    assert q is not None and k is not None and v is not None
    scores = prod(q.shape[:3]) * k.shape[2]
    return scores * (2 * q.shape[3] + 2 * v.shape[3] + 12)


_WINDOW = ("kernel", "strides", "dilations", "before", "after")


def _pool_infer(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    check_spatial(types, attrs, _WINDOW, "pool")
    x = need(types, 0, "pool")
    batch, c, spatial = split_layout(x.shape, attrs["layout"])
    out = [window_out(d, *rest) for d, *rest in zip(spatial, *(attrs[a] for a in _WINDOW), strict=True)]
    if any(isinstance(d, int) and d < 0 for d in out):
        raise GraphError(f"the window {attrs['kernel']} is larger than the padded input {x}", where="pool")
    return (Type(x.dtype, join_layout(batch, c, out, attrs["layout"])),)


def _windows(x: Array, attrs: Attrs, fill: float) -> list[Array]:
    """The padded input (channels first) at each position of the window, each in the shape of the output."""
    x = np.pad(x, [(0, 0), (0, 0), *zip(attrs["before"], attrs["after"], strict=True)], constant_values=fill)
    steps = list(zip(x.shape[2:], attrs["kernel"], attrs["strides"], attrs["dilations"], strict=True))
    out = [(d - e * (k - 1) - 1) // s + 1 for d, k, s, e in steps]
    return [
        x[
            (
                ...,
                *(
                    slice(t * e, t * e + s * (o - 1) + 1, s) if o else slice(0, 0)
                    for t, o, (_, _k, s, e) in zip(tap, out, steps, strict=True)
                ),
            )
        ]
        for tap in product(*map(range, attrs["kernel"]))
    ]


def _max_pool(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x = xs[0]
    assert x is not None
    wide = channels_first(x, attrs["layout"]).astype(accumulator(x.dtype), copy=False)
    windows = _windows(wide, attrs, lowest(wide.dtype))
    out = windows[0].copy()
    for w in windows[1:]:
        np.maximum(out, w, out=out)
    return (to_layout(out.astype(x.dtype, copy=False), attrs["layout"]),)


def _avg_pool(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x = xs[0]
    assert x is not None
    wide = channels_first(x, attrs["layout"]).astype(accumulator(x.dtype), copy=False)
    total = sum(_windows(wide, attrs, 0.0))
    inside = np.ones((1, 1, *wide.shape[2:]), wide.dtype)
    count = sum(_windows(inside, attrs, 1.0 if attrs["count_include_pad"] else 0.0))
    with np.errstate(all="ignore"):
        return (to_layout(np.asarray(total / count).astype(x.dtype, copy=False), attrs["layout"]),)


def _pool_flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    return outs[0].size * prod(tuple(attrs["kernel"]))


def _per_element(flops: int) -> object:
    return lambda ins, outs, attrs: outs[0].size * flops


def _op(
    name: str,
    infer: object,
    run: object,
    flops: object,
    exact: bool = False,
    tolerance: float = 1e-6,
    kind: str = "reduction",
) -> Op:
    return Op(name, infer, run, flops, exact, tolerance, kind)  # type: ignore[arg-type]


FAMILY = (
    _op("softmax", _softmax_infer, _softmax, _per_element(12)),
    _op("log_softmax", _softmax_infer, _log_softmax, _per_element(12)),
    _op("layer_norm", _norm_infer, _layer_norm, _per_element(8)),
    _op("rms_norm", _norm_infer, _rms_norm, _per_element(5)),
    _op("attention", _attention_infer, _attention, _attention_flops, kind="contraction"),
    _op("max_pool", _pool_infer, _max_pool, _pool_flops, True, 0.0),
    _op("avg_pool", _pool_infer, _avg_pool, _pool_flops),
)
