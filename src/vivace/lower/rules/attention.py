"""Attention without its scores in memory.

    for (batch, head) and each block of queries:
        for each chunk of keys:
            p[t, s] = score(k[t] . q[s])                scale, softcap, causal and mask in the epilogue
            softmax over t, with the maximum and the sum so far
            o[s] = o[s] * exp(old maximum - new) + sum over t of p[t, s] v[t]
        out[s] = o[s] / sum

Scores stand with queries side by side: a maximum or a sum over keys is one of whole vectors, and the second product
reads them as it needs them. They, o and the sums of a block stay in the caches; whatever the number of keys, scratch
has one size. Keys of few rows are one chunk, whose product is finished at once.

Where a head has one query (decoding), rows of k are multiplied with it as they lie. Where that shows when the model runs,
the kernel holds both ways.

A row without any visible key is NaN, as its definition says: 0 / 0. Starting the maximum at the least finite number keeps
chunks without visible keys from making NaN of the others.

Sources: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention".

Not handled, and computed as three steps over scores in memory: other types than f32, no keys, empty heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vivace.base.dims import Dim, ceildiv, maximum, minimum, symbol
from vivace.base.dtypes import DType
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Node, Value
from vivace.loops.blocked import BLOCK, PART, STEP, Blocked, Stage
from vivace.loops.contraction import Axis, Contraction, Packing
from vivace.loops.kernel import Binary, Buffer, Const, Expr, For, Index, Kernel, Let, Load, Read, Reduce, Select, Stmt, Store, Unary
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.epilogue import ACC
from vivace.lower.views import View

F32 = DType.f32
QUERIES = 64  # of a block: four 512-bit vectors, which hide the latency of their sums
KEYS = 256  # of a chunk, at most: scores of a block take 64 KiB
LOWEST = float(np.finfo(np.float32).min)


def lower_attention(ctx: Lowering, g: Group) -> None:
    """Append one step, or several for what it does not handle."""
    q, k, v = (x for x in g.anchor.inputs[:3])
    assert q is not None and k is not None and v is not None
    sizes = (k.shape[2], q.shape[3], v.shape[3])
    if q.dtype is F32 and all(d != 0 for d in sizes):
        _lower_blocked(ctx, g)
    else:
        _lower_steps(ctx, g)


@dataclass(frozen=True, slots=True)
class _Operand:
    """A view of [batch, head, rows, columns] as the matrix of one head: element 0 lies `offset` after the view's."""

    view: View
    buffer: Buffer
    offset: Dim

    @property
    def row(self) -> Dim:
        return self.buffer.strides[0]

    @property
    def column(self) -> Dim:
        return self.buffer.strides[1]

    def moved(self, elements: Dim) -> tuple[Buffer, Dim]:
        return self.buffer, self.offset + elements


def _matrix(view: View, name: str, heads: int, share: int = 1, writable: bool = False) -> _Operand:
    """The matrix of the head that a block computes; `share` heads have it together."""
    block = symbol(BLOCK, 0)
    offset = block // heads * view.strides[0] + block % heads // share * view.strides[1]
    return _Operand(view, Buffer(name, view.dtype, view.shape[2:], view.strides[2:], writable), offset)


def _local(name: str, *shape: Dim) -> Buffer:
    strides = tuple(shape[-1] if i < len(shape) - 1 else 1 for i in range(len(shape)))
    return Buffer(name, F32, shape, strides, True)


def _lower_blocked(ctx: Lowering, g: Group) -> None:
    node = g.anchor
    q_value, k_value, v_value = node.inputs[:3]
    assert q_value is not None and k_value is not None and v_value is not None
    heads, groups = q_value.shape[1], k_value.shape[1]
    assert isinstance(heads, int) and isinstance(groups, int)
    n_queries, depth = q_value.shape[2:]
    decodes = max(0, 2 - n_queries) if isinstance(n_queries, int) else maximum(0, 2 - n_queries)
    target = ctx.target(node.outputs[0])
    out = target
    if out.strides[-1] != 1 and out.shape[-1] != 1:
        out = ctx.temporary(f"{node.outputs[0].name}_dense", F32, out.shape)
    q, k, v = (ctx.view(x) for x in (q_value, k_value, v_value))
    if 1 not in (q.strides[3], q.strides[2], depth):
        q = ctx.contiguous(q, f"{q_value.name}_rows")
    if (1 not in (k.strides[3], depth) and decodes != 0) or k.storage is None:
        k = ctx.contiguous(k, f"{k_value.name}_rows")
    if 1 not in (v.strides[3], v.strides[2], v.shape[3]) or (v.strides[3] != 1 and decodes != 0):
        v = ctx.contiguous(v, f"{v_value.name}_rows")
    share = heads // groups
    a = _Attention(
        node, _matrix(q, "q", heads), _matrix(k, "k", heads, share), _matrix(v, "v", heads, share),
        _matrix(out, "o", heads, writable=True), *_masks(ctx, node, heads, decodes)
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


def _masks(ctx: Lowering, node: Node, heads: int, decodes: Dim) -> tuple[_Operand | None, _Operand | None]:
    """The mask as it lies, for one query, and as blocks read it, where queries stand side by side."""
    if len(node.inputs) < 4 or node.inputs[3] is None:
        return None, None
    q, k = node.inputs[0], node.inputs[1]
    assert q is not None and k is not None
    mask = ctx.view(node.inputs[3])
    mask = replace(mask, shape=(1,) * (4 - len(mask.shape)) + mask.shape, strides=(0,) * (4 - len(mask.shape)) + mask.strides)
    if mask.storage is None:
        mask = ctx.contiguous(mask, "mask")
    shape = (*q.shape[:3], k.shape[2])
    as_it_lies = _matrix(mask.expand(shape), "mask", heads)
    strides = mask.expand(shape).strides
    if decodes == 1 or strides[2] in (0, 1):
        return as_it_lies, as_it_lies
    if mask not in ctx.copies:  # once for all layers that share it
        ctx.copies[mask] = ctx.contiguous(mask.transpose((0, 1, 3, 2)), "mask_turned").transpose((0, 1, 3, 2))
    return as_it_lies, _matrix(ctx.copies[mask].expand(shape), "turned", heads)


@dataclass(frozen=True, slots=True)
class _Blocks:
    each: list[Stage]
    last: list[Stage]
    local: list[Buffer]
    steps: Dim


@dataclass(frozen=True, slots=True)
class _Attention:
    """The stages of one attention."""

    node: Node
    q: _Operand
    k: _Operand
    v: _Operand
    out: _Operand
    mask: _Operand | None
    turned: _Operand | None

    @property
    def n_queries(self) -> Dim:
        return self.q.view.shape[2]

    @property
    def n_keys(self) -> Dim:
        return self.k.view.shape[2]

    def score(self, product: Expr, mask: _Operand | None, s: Dim, t: Dim, ahead: Dim | None) -> Expr:
        """A score from q . k. `ahead`, where it matters: how many keys the query sees beyond this one."""
        attrs = self.node.attrs
        e = product
        if attrs["scale"] != 1.0:
            e = _mul(e, _number(attrs["scale"]))
        if cap := attrs.get("softcap", 0.0):
            e = _mul(Unary("tanh", _mul(e, _number(1.0 / cap))), _number(cap))
        if mask is not None:
            m = Load(mask.buffer, (s, t))
            e = Select(m, e, _number(-np.inf)) if m.buffer.dtype is DType.bool else Binary("add", e, m)
        if ahead is not None:
            e = Select(Binary("ge", Index(ahead, DType.i32), Const(0, DType.i32)), e, _number(-np.inf))
        return e

    def blocks(self) -> _Blocks:
        """The general way. Kernels of a single chunk need no sums from step to step."""
        n_queries, n_keys, depth, width = self.n_queries, self.n_keys, self.q.view.shape[3], self.v.view.shape[3]
        part, step = symbol(PART, 0), symbol(STEP, 0)
        first = part * QUERIES
        causal = bool(self.node.attrs["causal"]) and n_queries != 1
        block = QUERIES if not isinstance(n_queries, int) else min(QUERIES, n_queries)
        here: Dim = block if isinstance(n_queries, int) and n_queries % block == 0 else minimum(block, n_queries - first)
        # Keys beyond what the last query of the block sees are not computed.
        seen = maximum(1, minimum(n_keys, n_keys - n_queries + first + block)) if causal else n_keys
        n_chunks = max(1, -(-n_keys // KEYS)) if isinstance(n_keys, int) else 0
        chunk = -(-n_keys // n_chunks) if n_chunks else KEYS  # type: ignore[operator]
        alone = n_chunks == 1
        steps: Dim = 1 if alone else ceildiv(seen, chunk)
        start: Dim = 0 if alone else step * chunk
        keys: Dim = seen if alone else minimum(chunk, seen - start)
        if not causal and isinstance(n_keys, int) and n_keys % chunk == 0:
            keys = chunk
        row = -(-block // 16) * 16
        p, inverse = _local("p", chunk, row), _local("inverse", row)
        s, t, n = symbol("s", 0, block - 1), symbol("t", 0, chunk - 1), symbol("n", 0, block - 1)
        local = [p, inverse]

        ahead = n + first + n_keys - n_queries - t - start if causal else None
        epilogue = self.score(ACC, self.turned, n, t, ahead)
        down, across = self.q.column, self.q.row
        packing = Packing("transposed", n_stride=across) if down == 1 or depth == 1 else Packing("plain")
        scores = Contraction(
            "k", (), (Axis("t", keys, self.k.row, 0, row),), (Axis("d", depth, self.k.column, down),), here,
            self.k.buffer, self.q.buffer, p, packing, None if epilogue is ACC else epilogue,
            () if self.turned is None else (self.turned.buffer,),
        )  # fmt: skip
        offsets = [self.k.moved(start * self.k.row), self.q.moved(first * across)]
        if self.turned is not None:
            offsets.append(self.turned.moved(first * self.turned.row + start * self.turned.column))
        each = [Stage(scores, tuple(offsets))]

        down, across = self.v.row, self.v.column
        packing = Packing("plain") if across == 1 or width == 1 else Packing("transposed", n_stride=across)
        values = Contraction(
            "k", (), (Axis("s", here, 1, 0, self.out.row),), (Axis("t", keys, row, down),), width,
            p, self.v.buffer, self.out.buffer, packing, _mul(ACC, Load(inverse, (s,))), (inverse,),
        )  # fmt: skip
        v_offset, out_offset = self.v.moved(start * down), self.out.moved(first * self.out.row)
        if alone:
            each.append(Stage(_softmax(p, keys, here, (s, t), inverse)))
            each.append(Stage(values, (v_offset, out_offset)))
            return _Blocks(each, [], local, steps)
        top, total, rescale = (_local(name, row) for name in ("top", "total", "rescale"))
        o = _local("sums", row, -(-width // 16) * 16)  # type: ignore[operator]
        local += [top, total, rescale, o]
        each.append(Stage(_online_softmax(p, keys, here, (s, t), (top, total, rescale))))
        so_far = Binary("add", ACC, _mul(Load(o, (s, n_of(width))), Load(rescale, (s,))))
        is_first = Binary("eq", Index(step), Const(0, DType.i64))
        values = replace(
            values, rows=(Axis("s", here, 1, 0, o.strides[0]),), out=o, epilogue=Select(is_first, ACC, so_far), extra=(o, rescale)
        )
        each.append(Stage(values, (v_offset,)))
        local.remove(inverse)
        return _Blocks(each, [Stage(_divided(o, total, self.out.buffer, here, width), (out_offset,))], local, steps)

    def decode(self) -> tuple[Stage, Buffer]:
        """The whole of a head with a single query, and the buffer for its scores."""
        keys, depth, width = self.n_keys, self.q.view.shape[3], self.v.view.shape[3]
        p = _local("scores", keys)
        t, u, d, e = symbol("t", 0), symbol("u", 0), symbol("d", 0), symbol("e", 0)
        product = Reduce("add", "d", depth, _mul(Load(self.q.buffer, (0, d)), Load(self.k.buffer, (t, d))))
        body: list[Stmt] = [For("t", keys, (Store(p, (t,), product),))]
        score = self.score(Load(p, (u,)), self.mask, 0, u, None)
        if not isinstance(score, Load):
            body.append(For("u", keys, (Store(p, (u,), score),), "vector"))
        t0, t1, t2 = (symbol(f"t{i}", 0) for i in range(3))
        body += [
            Let("top", Reduce("max", "t0", keys, Load(p, (t0,)))),
            For("t1", keys, (Store(p, (t1,), Unary("exp", Binary("sub", Load(p, (t1,)), Read("top", F32)))),), "vector"),
            Let("inverse", Binary("div", _number(1), Reduce("add", "t2", keys, Load(p, (t2,))))),
        ]
        t3 = symbol("t3", 0)
        total = Reduce("add", "t3", keys, _mul(Load(p, (t3,)), Load(self.v.buffer, (t3, e))))
        body.append(For("e", width, (Store(self.out.buffer, (0, e), _mul(total, Read("inverse", F32))),), "vector"))
        operands = [x for x in (self.q, self.k, self.v, self.mask) if x is not None]
        kernel = Kernel("k", (*(x.buffer for x in operands), p, self.out.buffer), tuple(body))
        return Stage(kernel, tuple(x.moved(0) for x in (*operands, self.out))), p


def n_of(width: Dim) -> Dim:
    return symbol("n", 0, width - 1 if isinstance(width, int) else None)


def _softmax(p: Buffer, keys: Dim, queries: Dim, at: tuple[Dim, Dim], inverse: Buffer) -> Kernel:
    """p = exp(p - max), and 1 / sum."""
    s, t = at
    body = (
        Let("top", Reduce("max", "u", keys, Load(p, (symbol("u", 0), s)))),
        For("t", keys, (Store(p, (t, s), _exp_below(Load(p, (t, s)), Read("top", F32))),)),
        Let("total", Reduce("add", "w", keys, Load(p, (symbol("w", 0), s)))),
        Store(inverse, (s,), Binary("div", _number(1), Read("total", F32))),
    )
    return Kernel("k", (p, inverse), (For("s", queries, body, "vector"),))


def _online_softmax(
    p: Buffer, keys: Dim, queries: Dim, at: tuple[Dim, Dim], state: tuple[Buffer, Buffer, Buffer]
) -> Kernel:
    """p = exp(p - max) for the maximum so far, the sum so far, and what earlier sums are to be multiplied with."""
    s, t = at
    top, total, rescale = state
    is_first = Binary("eq", Index(symbol(STEP, 0)), Const(0, DType.i64))
    body = (
        Let("old", Select(is_first, _number(LOWEST), Load(top, (s,)))),
        Let("chunk_top", Reduce("max", "u", keys, Load(p, (symbol("u", 0), s)))),
        Let("top", Binary("max", Read("old", F32), Read("chunk_top", F32))),
        Let("rescale", _exp_below(Read("old", F32), Read("top", F32))),
        Store(top, (s,), Read("top", F32)),
        Store(rescale, (s,), Read("rescale", F32)),
        For("t", keys, (Store(p, (t, s), _exp_below(Load(p, (t, s)), Read("top", F32))),)),
        Let("chunk_total", Reduce("add", "w", keys, Load(p, (symbol("w", 0), s)))),
        Let("before", Select(is_first, _number(0), _mul(Load(total, (s,)), Read("rescale", F32)))),
        Store(total, (s,), Binary("add", Read("before", F32), Read("chunk_total", F32))),
    )
    return Kernel("k", (p, top, total, rescale), (For("s", queries, body, "vector"),))


def _divided(o: Buffer, total: Buffer, out: Buffer, queries: Dim, width: Dim) -> Kernel:
    """The results of a block: weighted sums over sums of weights."""
    s, e = symbol("s", 0), symbol("e", 0)
    columns = For("e", width, (Store(out, (s, e), _mul(Load(o, (s, e)), Read("inverse", F32))),), "vector")
    inverse = Let("inverse", Binary("div", _number(1), Load(total, (s,))))
    return Kernel("k", (o, total, out), (For("s", queries, (inverse, columns)),))


def _mul(a: Expr, b: Expr) -> Expr:
    return Binary("mul", a, b)


def _number(x: float) -> Const:
    return Const(float(x), F32)


def _exp_below(x: Expr, top: Expr) -> Expr:
    return Unary("exp", Binary("sub", x, top))


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


def _lower_steps(ctx: Lowering, g: Group) -> None:
    """Lower the expanded graph in place: scores, softmax, weighted sum."""
    graph = expand_attention(g)
    inner = Lowering(graph, ctx.isa, parent=ctx)
    for inside, outside in zip(graph.inputs, [v for v in g.anchor.inputs if v is not None], strict=True):
        inner.views[inside] = ctx.view(outside)
    y: Value = g.anchor.outputs[0]
    ctx.body += inner.run([(graph.outputs[0], ctx.target(y))])
