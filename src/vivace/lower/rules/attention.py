"""Attention without its scores in memory, as one step (`attention_stages` has its parts).

Not handled so, but as three steps over scores in memory: other types than f32, no keys, empty heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from vivace.base.dims import Dim, ceildiv, maximum, minimum, symbol
from vivace.base.dtypes import DType
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Node
from vivace.loops.blocked import BLOCK, PART, Blocked
from vivace.loops.contraction import Axis, Contraction, Packing
from vivace.loops.kernel import Binary, Buffer, Const, Expr, Load
from vivace.lower.choices import BLOCKS, Choice, Site
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.attention_decode import chunks_of, decode, heads_of, joined
from vivace.lower.rules.attention_halves import RUN, HalfAttention, sizes_of_halves
from vivace.lower.rules.attention_stages import F32, Attention, Blocks, Operand, operand, sizes_of
from vivace.lower.rules.epilogue import ACC
from vivace.lower.views import View

MOST_QUERIES, MOST_KEYS = 256, 4096  # of a block and a chunk that may be chosen


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
    decodes: Dim = 0  # whether there is one query, and more keys than that
    if n_queries != k_value.shape[2]:
        is_one = maximum(0, 2 - n_queries) * minimum(1, n_queries)
        decodes = int(n_queries == 1) if isinstance(n_queries, int) else is_one
    target = ctx.target(g.output)
    out = target
    if out.strides[-1] != 1 and out.shape[-1] != 1:
        out = ctx.temporary(f"{node.outputs[0].name}_dense", out.dtype, out.shape)
    q = ctx.operand(q_value)
    half = q.dtype is DType.bf16
    k, v = (ctx.operand(x) if half else ctx.view(x) for x in (k_value, v_value))
    if 1 not in (q.strides[3], depth if half else q.strides[2], depth):  # halves are read in rows
        q = ctx.contiguous(q, f"{q_value.name}_rows")
    if (1 not in (k.strides[3], depth) and (decodes != 0 or (half and k.strides[2] != 1))) or k.storage is None:
        k = ctx.contiguous(k, f"{k_value.name}_rows")
    if 1 not in (v.strides[3], v.strides[2], v.shape[3]) or (v.strides[3] != 1 and (decodes != 0 or half)):
        v = ctx.contiguous(v, f"{v_value.name}_rows")
    share = heads // groups
    block, part = symbol(BLOCK, 0), symbol(PART, 0)
    causal = bool(node.attrs["causal"])

    def sizes(choice: Choice) -> tuple[int, int]:
        c, n_keys = _possible(choice), k.shape[2]
        return sizes_of_halves(n_queries, n_keys, causal, c) if half else sizes_of(n_queries, n_keys, c)

    site = _site(ctx, node, q, k, out, sizes)
    queries, keys = sizes(ctx.choices.of(site.spec))
    n_parts = ceildiv(n_queries, queries)
    # The heads that share keys follow each other, so that these come from memory, or are packed, once.
    n_blocks = maximum(n_parts, 1)  # no division by zero where tiles are chosen for no queries
    in_head, of_group = (part % n_blocks, part // n_blocks) if share > 1 else (part, 0)
    shared = (block // groups, block % groups)
    here = (shared[0], shared[1] * share + of_group)
    keys_of, values_of = operand(k, "k", shared), operand(v, "v", shared)
    mask, scores_shape = _mask(ctx, node), (*q.shape[:3], k.shape[2])
    used: list[Operand] = []
    found = Blocks([], [], [], 0)
    if decodes != 1:
        at_hand = operand(q, "q", here), keys_of, values_of, operand(out, "o", here, writable=True)
        a = Attention(node, *at_hand, *_masks(ctx, mask, scores_shape, here, half), queries, keys)
        found = HalfAttention(a, in_head, ctx.isa).blocks() if half else a.blocks(in_head)
        used += a.operands
        if decodes != 0:
            found = found.unless(decodes)
    last, local, parts = list(found.last), list(found.local), share * n_parts
    kept: dict[Buffer, View] = {}
    chunks = chunks_of(k.shape[2], groups, share, v.shape[3])
    if decodes != 0:
        of_heads = heads_of(q, share, "qs", shared)
        masks = None if mask is None else heads_of(mask.expand(scores_shape), share, "masks", shared)
        one = Attention(node, of_heads, keys_of, values_of, operand(out, "o", here, True), masks, None, 1, keys)
        stage, scores, partial = decode(one, chunks, ctx.isa)
        last.append(replace(stage, when=decodes))
        local.append(scores)
        used += one.operands
        parts = parts * (1 - decodes) + chunks.count * decodes
        names = [f"{node.outputs[0].name}_{b.name}" for b in partial]
        sizes_kept = chunks.sizes(q.shape[0] * groups * decodes)
        kept = {b: ctx.temporary(name, F32, (n,)) for b, name, n in zip(partial, names, sizes_kept)}
    spec = Blocked(
        "k",
        q.shape[0] * groups,
        parts,
        found.once,
        tuple(found.each),
        tuple(local),
        found.steps,
        tuple(last),
        found.grain,
    )
    places = {x.buffer: x.view for x in used} | kept
    views = [places[b] for b in spec.params]
    written = [i for i, b in enumerate(spec.params) if b.writable]
    ctx.emit("attention", spec, views, written, g.nodes, node.cost.flops, site=site if decodes != 1 else None)
    if decodes != 0:
        views, kernel = [*kept.values(), out], joined(out, chunks, decodes)
        flops = 2 * views[0].shape[0]
        ctx.emit("attention_join", kernel, views, 2, g.nodes, flops, updates=decodes != 1)
    if out is not target:
        ctx.copy(out, target)


def _site(ctx: Lowering, node: Node, q: View, k: View, out: View, sizes: Callable[[Choice], tuple[int, int]]) -> Site:
    """The attention as a site: its scores, with all that tells it from others in their epilogue."""
    a, b, result = (x.buffer(name) for x, name in ((q, "a"), (k, "b"), (out, "attention")))
    names, masks = ("m0", "m1", "m2"), [x for x in node.inputs[3:] if x is not None]
    batch = tuple(Axis(names[i], q.shape[i], q.strides[i], k.strides[i], out.strides[i]) for i in range(2))
    rows, taps = (Axis(names[2], q.shape[2], q.strides[2], 0, out.strides[2]),), (Axis("k", q.shape[3], q.strides[3]),)
    epilogue: Expr = Binary("mul", ACC, Const(float(node.attrs["scale"]), F32))
    for number in (float(node.attrs.get("softcap", 0.0)), float(node.attrs["causal"])):
        epilogue = Binary("max", epilogue, Const(number, F32))
    for x in masks:
        epilogue = Binary("add", epilogue, Load(Buffer("mask", x.dtype, x.shape, x.shape), (0,) * x.rank))
    packing = Packing("transposed", n_stride=k.strides[2])
    scores = Contraction("k", batch, rows, taps, k.shape[2], a, b, result, packing, epilogue)
    return Site(ctx.choices.key(scores), scores, (BLOCKS,), sizes)


def _possible(choice: Choice) -> Choice:
    """A choice, which may come from a file, as far as blocks can be so large: in whole runs."""

    def whole(n: int | None, most: int) -> int | None:
        return None if n is None else min(-(-max(n, 1) // RUN) * RUN, most)

    return Choice(rows=whole(choice.rows, MOST_QUERIES), tiles=whole(choice.tiles, MOST_KEYS))


def _mask(ctx: Lowering, node: Node) -> View | None:
    """The mask as it lies, with four axes."""
    if len(node.inputs) < 4 or node.inputs[3] is None:
        return None
    mask = ctx.view(node.inputs[3])
    mask = mask.expand((1,) * (4 - len(mask.shape)) + mask.shape)
    return mask if mask.storage is not None else ctx.contiguous(mask, "mask")


def _masks(
    ctx: Lowering, mask: View | None, shape: tuple[Dim, ...], at: tuple[Dim, Dim], in_rows: bool
) -> tuple[Operand | None, Operand | None]:
    """The mask as it lies, and where `in_rows` does not say that it is only read so, with queries side by side."""
    if mask is None:
        return None, None
    as_it_lies = operand(mask.expand(shape), "mask", at)
    if in_rows or mask.expand(shape).strides[2] in (0, 1):
        return as_it_lies, as_it_lies
    if mask not in ctx.copies:  # once for all layers that share it
        ctx.copies[mask] = ctx.contiguous(mask.transpose((0, 1, 3, 2)), "mask_turned").transpose((0, 1, 3, 2))
    return as_it_lies, operand(ctx.copies[mask].expand(shape), "turned", at)


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
