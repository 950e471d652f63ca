"""Attention (opset 23 and newer) and Microsoft's MultiHeadAttention.

What the core op cannot say (sliding windows, lengths per batch, softcap after a mask, intermediate outputs) is left to
the body by which ONNX defines the operator.
"""

from __future__ import annotations

import math

import numpy as np

from vivace.base.dims import Dim
from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.onnx.call import Call, Result, onnx_op
from vivace.onnx.scope import Fallback, UseBody


def _heads(c: Call, x: Value, n: int) -> Value:
    """[B,S,n*D] -> [B,n,S,D]."""
    b, s, width = x.shape
    if not isinstance(width, int) or not n or width % n:
        raise c.error(f"{x.type} does not divide into {n} heads")
    return c.transpose(c.reshape(x, shape=(b, s, n, width // n)), perm=(0, 2, 1, 3))


def _joined(c: Call, y: Value) -> Value:
    """[B,H,S,E] -> [B,S,H*E]."""
    b, h, s, e = y.shape
    return c.reshape(c.transpose(y, perm=(0, 2, 1, 3)), shape=(b, s, h * e))


def _positions(c: Call, n: Dim, axis: int) -> Value:
    return c.iota(shape=(n, 1) if axis == 0 else (1, n), axis=axis, dtype=DType.i64)


def _lower_triangle(c: Call, queries: Dim, keys: Dim, offset: Dim) -> Value:
    """bool[S,T]: key j is seen by query i where j <= i + offset."""
    rows = c.add(_positions(c, queries, 0), c.dims([offset], ()))
    return c.le(_positions(c, keys, 1), rows)


def _masked(c: Call, mask: Value, allowed: Value) -> Value:
    """A bool or additive mask that also hides what is not allowed."""
    if mask.dtype is DType.bool:
        return c.and_(mask, allowed)
    return c.where(allowed, mask, c.like(mask, -np.inf))


def _zero_where_blind(c: Call, y: Value, mask: Value) -> Value:
    """Rows that see no key are 0 in ONNX, where the core op gives NaN."""
    if mask.shape[-1] == 1:
        return y
    seen = mask if mask.dtype is DType.bool else c.gt(mask, c.like(mask, -np.inf))
    return c.where(c.reduce_max(seen, axes=(seen.rank - 1,), keepdims=True), y, c.like(y, 0))


@onnx_op("Attention", since=23)
def attention(
    c: Call,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    past_k: Value | None = None,
    past_v: Value | None = None,
    lengths: Value | None = None,
) -> Result:
    names = [*c.node.output, "", "", ""]
    softcap, causal = c.attr("softcap", 0.0), bool(c.attr("is_causal", 0))
    windowed = c.attr("left_window_size", -1) != -1 or c.attr("right_window_size", -1) != -1
    half_sums = q.dtype not in (DType.f32, DType.f64) and q.dtype is not k.dtype
    if names[3] or lengths is not None or windowed or half_sums or (softcap and (mask is not None or causal)):
        raise UseBody("it has a form of attention that is not core")
    flat = q.rank == 3
    if flat:
        heads = (c.attr("q_num_heads", 0), c.attr("kv_num_heads", 0))
        q, k, v = _heads(c, q, heads[0]), _heads(c, k, heads[1]), _heads(c, v, heads[1])
    if not all(isinstance(x.shape[1], int) for x in (q, k, v)):
        raise Fallback("its number of heads depends on the sizes of inputs")
    offset: Dim = 0
    if past_k is not None and past_v is not None:
        offset = past_k.shape[2]
        k, v = c.concat(past_k, k, axis=2), c.concat(past_v, v, axis=2)
    queries, keys = q.shape[2], k.shape[2]
    if (
        mask is not None
        and mask.shape[-1] not in (1, keys)
        and isinstance(mask.shape[-1], int)
        and isinstance(keys, int)
    ):
        raise UseBody("its mask is shorter than the keys")
    aligned = offset == keys - queries
    if causal and (mask is not None or not aligned):
        allowed = _lower_triangle(c, queries, keys, offset)
        mask, causal = allowed if mask is None else _masked(c, mask, allowed), False
    scale = c.attr("scale", None)
    if scale is None:
        if not isinstance(q.shape[3], int):
            raise Fallback("its head size depends on the sizes of inputs")
        scale = 1 / math.sqrt(q.shape[3])
    y = c.attention(q, k, v, mask, scale=float(scale), causal=causal, softcap=float(softcap))
    if mask is not None:
        y = _zero_where_blind(c, y, mask)
    return (_joined(c, y) if flat else y, k, v)[: c.n_outputs]


@onnx_op("MultiHeadAttention", domain="com.microsoft")
def multi_head_attention(
    c: Call,
    q: Value,
    k: Value | None = None,
    v: Value | None = None,
    bias: Value | None = None,
    padding: Value | None = None,
    scores_bias: Value | None = None,
    past_k: Value | None = None,
    past_v: Value | None = None,
    *rest: Value,
) -> Result:
    if k is None or v is None or q.rank != 3 or k.rank != 3 or v.rank != 3 or any(r is not None for r in rest):
        raise Fallback("its operands are packed")
    n = c.attr("num_heads")
    if bias is not None:
        widths = [x.shape[2] for x in (q, k, v)]
        starts = (0, widths[0], widths[0] + widths[1])
        q, k, v = (c.add(x, c.sliced(bias, 0, s, w)) for x, s, w in zip((q, k, v), starts, widths))
    q, k, v = (_heads(c, x, n) for x in (q, k, v))
    if past_k is not None and past_v is not None:
        k, v = c.concat(past_k, k, axis=2), c.concat(past_v, v, axis=2)
    mask = scores_bias
    if padding is not None:
        if padding.rank != 2:
            raise Fallback("its padding mask is not [batch, keys]")
        keep = c.reshape(c.cast_to(padding, DType.bool), shape=(padding.shape[0], 1, 1, padding.shape[1]))
        hidden = c.where(keep, c.like(q, 0), c.like(q, c.attr("mask_filter_value", -10000.0)))
        mask = hidden if mask is None else c.add(mask, hidden)
    scale = c.attr("scale", 0.0) or 1 / math.sqrt(_static(q.shape[3]))
    y = c.attention(q, k, v, mask, scale=float(scale), causal=bool(c.attr("unidirectional", 0)), softcap=0.0)
    return (_joined(c, y), k, v)[: c.n_outputs]


def _static(d: Dim) -> int:
    if not isinstance(d, int):
        raise Fallback("its head size depends on the sizes of inputs")
    return d


@onnx_op("RotaryEmbedding", since=23)
def rotary_embedding(c: Call, x: Value, cos: Value, sin: Value, positions: Value | None = None) -> Value:
    """Rotates pairs of the first `rotary_embedding_dim` features of each head. Source: ONNX operator
    RotaryEmbedding.
    """
    flat = x.rank == 3
    y = _heads(c, x, c.attr("num_heads", 0)) if flat else x
    width = y.shape[3]
    turned = c.attr("rotary_embedding_dim", 0) or _static(width)
    if positions is not None:
        cos, sin = c.gather(cos, positions, axis=0), c.gather(sin, positions, axis=0)
    half = turned // 2
    cos, sin = (c.reshape(c.sliced(t, 2, 0, half), shape=(t.shape[0], 1, t.shape[1], half)) for t in (cos, sin))
    part, rest = c.sliced(y, 3, 0, turned), c.sliced(y, 3, turned, width - turned)
    if c.attr("interleaved", 0):
        pairs = c.reshape(part, shape=(*part.shape[:3], half, 2))
        left, right = (c.reshape(c.sliced(pairs, 4, i, 1), shape=(*part.shape[:3], half)) for i in (0, 1))
    else:
        left, right = c.sliced(part, 3, 0, half), c.sliced(part, 3, half, half)
    real, imaginary = c.sub(c.mul(cos, left), c.mul(sin, right)), c.add(c.mul(sin, left), c.mul(cos, right))
    if c.attr("interleaved", 0):
        real, imaginary = (c.reshape(t, shape=(*t.shape, 1)) for t in (real, imaginary))
        out = c.reshape(c.concat(real, imaginary, axis=4), shape=part.shape)
    else:
        out = c.concat(real, imaginary, axis=3)
    out = out if turned == width else c.concat(out, rest, axis=3)
    return _joined(c, out) if flat else out
