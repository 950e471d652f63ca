"""Attention without its scores in memory, as one step (`attention_stages` has its parts).

Not handled so, but as three steps over scores in memory: other types than f32, no keys, empty heads.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vivace.base.dims import Dim, ceildiv, maximum
from vivace.base.dtypes import DType
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Node
from vivace.loops.blocked import Blocked, Stage
from vivace.loops.kernel import Buffer
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.attention_stages import F32, QUERIES, Attention, Operand, operand


def lower_attention(ctx: Lowering, g: Group) -> None:
    """Append one step, or several for what it does not handle."""
    q, k, v = (x for x in g.anchor.inputs[:3])
    assert q is not None and k is not None and v is not None
    sizes = (k.shape[2], q.shape[3], v.shape[3])
    if q.dtype is F32 and all(d != 0 for d in sizes):
        _lower_blocked(ctx, g)
    else:
        _lower_steps(ctx, g)


def _lower_blocked(ctx: Lowering, g: Group) -> None:
    node = g.anchor
    q_value, k_value, v_value = node.inputs[:3]
    assert q_value is not None and k_value is not None and v_value is not None
    heads, groups = q_value.shape[1], k_value.shape[1]
    assert isinstance(heads, int) and isinstance(groups, int)
    n_queries, depth = q_value.shape[2:]
    decodes = max(0, 2 - n_queries) if isinstance(n_queries, int) else maximum(0, 2 - n_queries)
    target = ctx.target(g.output)
    out = target
    if out.strides[-1] != 1 and out.shape[-1] != 1:
        out = ctx.temporary(f"{node.outputs[0].name}_dense", out.dtype, out.shape)
    q, k, v = (ctx.view(x) for x in (q_value, k_value, v_value))
    if 1 not in (q.strides[3], q.strides[2], depth):
        q = ctx.contiguous(q, f"{q_value.name}_rows")
    if (1 not in (k.strides[3], depth) and decodes != 0) or k.storage is None:
        k = ctx.contiguous(k, f"{k_value.name}_rows")
    if 1 not in (v.strides[3], v.strides[2], v.shape[3]) or (v.strides[3] != 1 and decodes != 0):
        v = ctx.contiguous(v, f"{v_value.name}_rows")
    share = heads // groups
    a = Attention(
        node, operand(q, "q", heads), operand(k, "k", heads, share), operand(v, "v", heads, share),
        operand(out, "o", heads, writable=True), *_masks(ctx, node, heads, decodes)
    )  # fmt: skip
    each: list[Stage] = []
    last: list[Stage] = []
    local: list[Buffer] = []
    steps: Dim = 0
    if decodes != 1:
        blocks = a.blocks()
        each, last, steps = blocks.each, blocks.last, blocks.steps
        local += blocks.local
    if decodes != 0:
        stage, scores = a.decode()
        last.append(replace(stage, when=decodes))
        local.append(scores)
    if decodes not in (0, 1):
        last[:-1] = [replace(s, when=1 - decodes) for s in last[:-1]]
        steps = steps * (1 - decodes)
    if steps == 0:
        each = []
    parts = ceildiv(n_queries, QUERIES)
    spec = Blocked("k", q.shape[0] * heads, parts, (), tuple(each), tuple(local), steps, tuple(last))
    found = {x.buffer: x.view for x in (a.q, a.k, a.v, a.out, a.mask, a.turned) if x is not None}
    views = [found[b] for b in spec.params]
    written = [i for i, b in enumerate(spec.params) if b.writable]
    ctx.emit("attention", spec, views, written, g.nodes, node.cost.flops)
    if out is not target:
        ctx.copy(out, target)


def _masks(ctx: Lowering, node: Node, heads: int, decodes: Dim) -> tuple[Operand | None, Operand | None]:
    """The mask as it lies, for one query, and as blocks read it, where queries stand side by side."""
    if len(node.inputs) < 4 or node.inputs[3] is None:
        return None, None
    q, k = node.inputs[0], node.inputs[1]
    assert q is not None and k is not None
    mask = ctx.view(node.inputs[3])
    mask = replace(
        mask, shape=(1,) * (4 - len(mask.shape)) + mask.shape, strides=(0,) * (4 - len(mask.shape)) + mask.strides
    )
    if mask.storage is None:
        mask = ctx.contiguous(mask, "mask")
    shape = (*q.shape[:3], k.shape[2])
    as_it_lies = operand(mask.expand(shape), "mask", heads)
    strides = mask.expand(shape).strides
    if decodes == 1 or strides[2] in (0, 1):
        return as_it_lies, as_it_lies
    if mask not in ctx.copies:  # once for all layers that share it
        ctx.copies[mask] = ctx.contiguous(mask.transpose((0, 1, 3, 2)), "mask_turned").transpose((0, 1, 3, 2))
    return as_it_lies, operand(ctx.copies[mask].expand(shape), "turned", heads)


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
    if g.output.dtype is not out.dtype:
        out = b.cast(out, to=g.output.dtype)
    return b.finish([b.reshape(out, shape=node.outputs[0].shape)])


def _lower_steps(ctx: Lowering, g: Group) -> None:
    """Lower the expanded graph in place: scores, softmax, weighted sum."""
    graph = expand_attention(g)
    inner = Lowering(graph, ctx.isa, parent=ctx)
    for inside, outside in zip(graph.inputs, [v for v in g.anchor.inputs if v is not None], strict=True):
        inner.views[inside] = ctx.view(outside)
    ctx.body += inner.run([(graph.outputs[0], ctx.target(g.output))])
