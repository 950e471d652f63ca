"""Scales, biases and pads that disappear into the constant weights of conv and conv_transpose, pads also into pools.

What BatchNormalization leaves after import (a product and a sum with constants per channel) goes away here.
"""

from __future__ import annotations

import math

import numpy as np

from vivace.graph.graph import Node, Value
from vivace.graph.rewrite import At, Example, Outcome, rule

Array = np.ndarray
SHARED_BYTES = 1 << 20
"""Weights up to this size may be copied for one of their readers."""


def per_channel(c: Value | None, channels: int, axis: int, rank: int) -> Array | None:
    """The vector that a broadcast constant applies along `axis` of a rank-`rank` tensor, if it varies along no other
    axis."""
    if c is None or c.data is None or c.rank > rank:
        return None
    shape = (1,) * (rank - c.rank) + c.data.shape
    if any(d != 1 for i, d in enumerate(shape) if i != axis) or shape[axis] not in (1, channels):
        return None
    return np.broadcast_to(c.data.reshape(-1), (channels,))


def is_finite(*arrays: Array | None) -> bool:
    """Whether no element of constants is infinite or NaN: (x * 1e-30) * 1e30 may be finite where 1e30 * 1e30 is not."""
    return all(a is None or bool(np.isfinite(a).all()) for a in arrays)


def _weights(n: Node, at: At) -> tuple[Array, Array | None] | None:
    """The constant filter and bias of a conv, bias None where there is none."""
    w = n.inputs[1]
    b = n.inputs[2] if len(n.inputs) > 2 else None
    if w is None or is_shared(w, at) or w.data is None or (b is not None and b.data is None):
        return None
    return w.data, None if b is None else b.data


def is_shared(v: Value | None, at: At) -> bool:
    """True for large weights that another node reads too: they would be there twice."""
    return v is not None and v.data is not None and v.data.nbytes > SHARED_BYTES and len(at.users(v)) > 1


def _channels(n: Node) -> tuple[int, int]:
    """The number of output channels and their axis."""
    w = n.inputs[1]
    assert w is not None and w.data is not None
    channels = w.data.shape[0] if n.op.name == "conv" else w.data.shape[1] * n.attrs["group"]
    return channels, 1 if n.attrs["layout"] == "NCHW" else n.output.rank - 1


def _scale_filters(n: Node, w: Array, s: Array) -> Array:
    """Filters that give `s` times the output, channel by channel."""
    ones = (1,) * (w.ndim - 2)
    if n.op.name == "conv":
        return w * s.reshape(-1, 1, *ones)
    g = n.attrs["group"]
    split = w.reshape(g, w.shape[0] // g, *w.shape[1:]) * s.reshape(g, 1, w.shape[1], *ones)
    return np.asarray(split).reshape(w.shape)


def _apply(n: Node, at: At, w: Array, b: Array | None) -> Outcome:
    dtype = n.output.dtype.numpy
    bias = None if b is None else at.const(b.astype(dtype), "bias")
    return at.op.emit(
        n.op, (n.inputs[0], at.const(np.ascontiguousarray(w.astype(dtype)), "weight"), bias), dict(n.attrs)
    )


def _conv(
    e: Example, x: str = "f32[1,4,5,5]", w: str = "f32[6,2,3,3]", group: int = 2, pad: int = 1, **more: object
) -> Value:
    value = e.x(x)
    return _conv_on(e, value, w, group, pad)


def _conv_on(e: Example, x: Value, w: str, group: int, pad: int) -> Value:
    weight = e.w(w)
    n = weight.rank - 2
    return e.conv(
        x, weight, strides=(1,) * n, dilations=(1,) * n, before=(pad,) * n, after=(pad,) * n, group=group, layout="NCHW"
    )


def _conv_transpose(e: Example) -> Value:
    two = (1, 1)
    return e.conv_transpose(
        e.x("f32[1,4,5,5]"), e.w("f32[4,3,2,2]"), strides=(2, 2), dilations=two, before=(0, 0), after=(0, 0),
        output_padding=(0, 0), group=2, layout="NCHW",
    )  # fmt: skip


@rule(
    "mul", "div",
    examples=(
        lambda e: e.mul(_conv(e), e.w("f32[6,1,1]")),
        lambda e: e.div(_conv(e, "f32[2,3,7]", "f32[6,3,3]", 1), e.w("f32[1,6,1]", 1.0, 2.0)),
        lambda e: e.mul(_conv_transpose(e), e.w("f32[6,1,1]")),
    ),
)  # fmt: skip
def scale_into_conv(n: Node, at: At) -> Outcome:
    """conv(x, w, b) * s = conv(x, w * s, b * s) for a constant per output channel"""
    m = at.by(n.inputs[0], "conv", "conv_transpose")
    if m is None or n.inputs[1] is None or n.inputs[1].data is None:
        return None
    found = _weights(m, at)
    if found is None:
        return "the filters are not constant, or shared"
    if not at.only_use(m.output):
        return f"%{m.output.name} is used elsewhere too"
    channels, axis = _channels(m)
    s = per_channel(n.inputs[1], channels, axis, m.output.rank)
    if s is None or n.output.type != m.output.type:
        return "the factor is not one per channel"
    w, b = found
    s = 1 / s if n.op.name == "div" else s
    filters, bias = _scale_filters(m, w, s), None if b is None else b * s
    if not is_finite(s, filters, bias):
        return "a factor, or what it makes of a weight, is not finite"
    return _apply(m, at, filters, bias)


@rule(
    "add",
    examples=(lambda e: e.add(_conv(e), e.w("f32[6,1,1]")), lambda e: e.add(_conv_transpose(e), e.w("f32[1,6,1,1]"))),
)
def bias_into_conv(n: Node, at: At) -> Outcome:
    """conv(x, w, b) + c = conv(x, w, b + c) for a constant per output channel"""
    m = at.by(n.inputs[0], "conv", "conv_transpose")
    if m is None or n.inputs[1] is None or n.inputs[1].data is None:
        return None
    b = m.inputs[2] if len(m.inputs) > 2 else None
    if m.inputs[1] is None or m.inputs[1].data is None or (b is not None and b.data is None):
        return "the filters are not constant, or shared"
    if not at.only_use(m.output):
        return f"%{m.output.name} is used elsewhere too"
    channels, axis = _channels(m)
    c = per_channel(n.inputs[1], channels, axis, m.output.rank)
    if c is None or n.output.type != m.output.type:
        return "the summand is not one per channel"
    bias = at.const((c if b is None or b.data is None else b.data + c).astype(n.output.dtype.numpy), "bias")
    return at.op.emit(m.op, (m.inputs[0], m.inputs[1], bias), dict(m.attrs))


def _before(n: Node, at: At, op: str) -> tuple[Node, Array, Array | None, Array] | str | None:
    """What applies a constant per input channel (a vector) to what a conv reads, and the conv's filter and bias."""
    m = at.by(n.inputs[0], op)
    x, c = (None, None) if m is None else m.inputs
    if m is None or x is None or c is None or c.data is None or x.type != m.output.type:
        return None
    found = _weights(n, at)
    if found is None:
        return "the filters are not constant, or shared"
    if not at.only_use(m.output):
        return f"%{m.output.name} is used elsewhere too"
    w, b = found
    channels, axis = w.shape[1] * n.attrs["group"], 1 if n.attrs["layout"] == "NCHW" else n.output.rank - 1
    vector = per_channel(c, channels, axis, m.output.rank)
    return "the constant is not one per channel" if vector is None else (m, w, b, vector)


@rule(
    "conv",
    examples=(lambda e: _conv_on(e, e.mul(e.x("f32[1,4,5,5]"), e.w("f32[4,1,1]")), "f32[6,2,3,3]", 2, 1),),
)
def scale_before_conv(n: Node, at: At) -> Outcome:
    """conv(x * s, w, b) = conv(x, w * s, b) for a constant per input channel; zero padding stays zero"""
    found = _before(n, at, "mul")
    if not isinstance(found, tuple):
        return found
    m, w, b, s = found
    g = n.attrs["group"]
    split = w.reshape(g, w.shape[0] // g, *w.shape[1:]) * s.reshape(g, 1, w.shape[1], *(1,) * (w.ndim - 2))
    if not is_finite(s, split):
        return "a factor, or what it makes of a weight, is not finite"
    bias = n.inputs[2] if b is not None else None
    weight = at.const(np.ascontiguousarray(split.reshape(w.shape).astype(w.dtype)), "weight")
    return at.op.emit(n.op, (m.inputs[0], weight, bias), dict(n.attrs))


@rule(
    "conv",
    examples=(lambda e: _conv_on(e, e.add(e.x("f32[1,4,5,5]"), e.w("f32[4,1,1]")), "f32[6,2,3,3]", 2, 0),),
)
def bias_before_conv(n: Node, at: At) -> Outcome:
    """conv(x + c, w, b) = conv(x, w, b + sum(w * c)) without padding (zeros at the border would have to be c)"""
    found = _before(n, at, "add")
    if not isinstance(found, tuple):
        return found
    if any(p != 0 for p in (*n.attrs["before"], *n.attrs["after"])):
        return "the conv pads with zeros"
    m, w, b, c = found
    g = n.attrs["group"]
    taps = w.astype(np.float64).reshape(g, w.shape[0] // g, w.shape[1], -1).sum(axis=-1)
    extra = np.einsum("goc,gc->go", taps, c.astype(np.float64).reshape(g, -1)).reshape(-1)
    bias = (extra if b is None else b + extra).astype(w.dtype)
    return at.op.emit(n.op, (m.inputs[0], n.inputs[1], at.const(bias, "bias")), dict(n.attrs))


def _padded(e: Example, pad_value: float, pool: str) -> Value:
    x = e.pad(e.x("f32[1,4,5,5]"), before=(0, 0, 1, 0), after=(0, 0, 1, 1), mode="constant", value=pad_value)
    window = {
        "kernel": (2, 2),
        "strides": (1, 1),
        "dilations": (1, 1),
        "before": (0, 0),
        "after": (0, 0),
        "layout": "NCHW",
    }
    if pool == "conv":
        return _conv_on(e, x, "f32[6,2,3,3]", 2, 0)
    more = {"count_include_pad": True} if pool == "avg_pool" else {}
    return getattr(e, pool)(x, **window, **more)


@rule(
    "conv", "max_pool", "avg_pool",
    examples=(
        lambda e: _padded(e, 0.0, "conv"),
        lambda e: _padded(e, -math.inf, "max_pool"),
        lambda e: _padded(e, 0.0, "avg_pool"),
    ),
)  # fmt: skip
def pad_into_window(n: Node, at: At) -> Outcome:
    """conv(pad(x, 0)) = conv(x) with larger pads; max_pool takes pads of -inf, avg_pool pads of 0 that it counts"""
    m = at.by(n.inputs[0], "pad")
    if m is None or m.inputs[0] is None:
        return None
    a, attrs = m.attrs, dict(n.attrs)
    spatial = slice(2, None) if attrs["layout"] == "NCHW" else slice(1, -1)
    if a["mode"] != "constant" or a["value"] != (-math.inf if n.op.name == "max_pool" else 0):
        return f"it pads with {a['mode']} {a['value']}"
    before, after = tuple(a["before"][spatial]), tuple(a["after"][spatial])
    if sum(p != 0 for p in (*a["before"], *a["after"])) != sum(p != 0 for p in (*before, *after)):
        return "it pads the batch or the channels"
    if n.op.name == "avg_pool":
        inside = any(p != 0 for p in (*attrs["before"], *attrs["after"]))
        if inside and not attrs["count_include_pad"]:
            return "the pool does not count its own pads"
        attrs["count_include_pad"] = True
    attrs["before"] = tuple(p + q for p, q in zip(attrs["before"], before))
    attrs["after"] = tuple(p + q for p, q in zip(attrs["after"], after))
    if n.op.name == "max_pool" and any(
        not isinstance(p, int) or p >= k
        for pads in (attrs["before"], attrs["after"])
        for p, k in zip(pads, attrs["kernel"])
    ):
        return "a window could lie in the pads alone"
    return at.op.emit(n.op, (m.inputs[0], *n.inputs[1:]), attrs)
