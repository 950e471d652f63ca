"""Attention as three steps per head: scores, softmax, weighted sum. Grouped queries share keys without copying them."""

from __future__ import annotations

import numpy as np

from vivace.base.dims import Dim
from vivace.base.dtypes import DType
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Value
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering


def expand_attention(g: Group) -> Graph:
    """The graph that an attention node stands for.

    q [B,H,S,D] with H = G*R, k [B,G,T,D], v [B,G,T,E]: scores [B,G,R,S,T] = q . k^T * scale (+ mask), softmax, times v.
    """
    node = g.anchor
    q, k, v = node.inputs[:3]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    assert q is not None and k is not None and v is not None
    attrs = node.attrs
    b = Builder(node.origin, prefix=f"{node.outputs[0].name}_")
    ins = [b.input(x.name, x.type) for x in (q, k, v)]
    m = b.input(mask.name, mask.type) if mask is not None else None
    heads, n_groups = q.shape[1], k.shape[1]
    share = heads // n_groups
    s, t, d, e = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    qs, ks, vs = ins
    grouped = share != 1
    if grouped:
        qs = b.reshape(qs, shape=(q.shape[0], n_groups, share, s, d))
        ks = b.reshape(ks, shape=(k.shape[0], n_groups, 1, t, d))
        vs = b.reshape(vs, shape=(v.shape[0], n_groups, 1, t, e))
    rank = 5 if grouped else 4
    scores = b.matmul(qs, b.transpose(ks, perm=(*range(rank - 2), rank - 1, rank - 2)))
    scale = attrs["scale"]
    if scale != 1.0:
        scores = b.mul(scores, b.const(scale, q.dtype))
    if attrs.get("softcap", 0.0):
        cap = attrs["softcap"]
        scores = b.mul(b.tanh(b.mul(scores, b.const(1.0 / cap, q.dtype))), b.const(cap, q.dtype))
    low = b.const(-np.inf, q.dtype)
    if m is not None:
        mask_shape: tuple[Dim, ...] = (1,) * (4 - m.rank) + m.shape
        m = b.reshape(m, shape=mask_shape)
        if grouped:
            per_head = mask_shape[1] != 1
            m = b.reshape(m, shape=(mask_shape[0], *((n_groups, share) if per_head else (1, 1)), *mask_shape[2:]))
        scores = b.where(m, scores, low) if m.dtype is DType.bool else b.add(scores, m)
    if attrs["causal"]:
        row = b.iota(shape=(s, t), axis=0, dtype=DType.i64)
        col = b.iota(shape=(s, t), axis=1, dtype=DType.i64)
        shift = b.reshape(b.dims(values=(t - s,)), shape=())
        scores = b.where(b.le(col, b.add(row, shift)), scores, low)
    weights = b.softmax(scores, axis=rank - 1)
    out = b.matmul(weights, vs)
    return b.finish([b.reshape(out, shape=node.outputs[0].shape)])


def lower_attention(ctx: Lowering, g: Group) -> None:
    """Lower the expanded graph in place."""
    graph = expand_attention(g)
    inner = Lowering(graph, ctx.isa, parent=ctx)
    for inside, outside in zip(graph.inputs, [v for v in g.anchor.inputs if v is not None], strict=True):
        inner.views[inside] = ctx.view(outside)
    y: Value = g.anchor.outputs[0]
    ctx.body += inner.run([(graph.outputs[0], ctx.target(y))])
