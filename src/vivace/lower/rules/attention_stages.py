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

Where a head has one query (decoding), rows of k are multiplied with it as they lie. Where that shows when the model
runs, the kernel holds both ways.

A row without any visible key is NaN, as its definition says: 0 / 0. Starting the maximum at the least finite number
keeps chunks without visible keys from making NaN of the others.

Sources: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vivace.base.dims import Dim, ceildiv, maximum, minimum, symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Node
from vivace.loops.blocked import PART, STEP, Stage
from vivace.loops.contraction import Axis, Contraction, Packing
from vivace.loops.kernel import (
    Binary,
    Buffer,
    Cast,
    Const,
    Expr,
    For,
    Index,
    Kernel,
    Let,
    Load,
    Read,
    Reduce,
    Select,
    Stmt,
    Store,
    Unary,
)
from vivace.lower.rules.epilogue import ACC
from vivace.lower.views import View

F32 = DType.f32
QUERIES = 64  # of a block: four 512-bit vectors, which hide the latency of their sums
KEYS = 256  # of a chunk, at most: scores of a block take 64 KiB; 128 to 512 and 128 queries were as fast (Zen 4)
LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True, slots=True)
class Operand:
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


def operand(view: View, name: str, at: tuple[Dim, Dim], writable: bool = False) -> Operand:
    """The matrix of the batch element and head at `at`, dims over the numbers of block and part."""
    offset = at[0] * view.strides[0] + at[1] * view.strides[1]
    return Operand(view, Buffer(name, view.dtype, view.shape[2:], view.strides[2:], writable), offset)


def scratch(name: str, *shape: Dim, dtype: DType = F32) -> Buffer:
    """A dense buffer of a thread."""
    strides = tuple(shape[-1] if i < len(shape) - 1 else 1 for i in range(len(shape)))
    return Buffer(name, dtype, shape, strides, True)


@dataclass(frozen=True, slots=True)
class Blocks:
    each: list[Stage]
    last: list[Stage]
    local: list[Buffer]
    steps: Dim
    once: tuple[Stage, ...] = ()
    grain: Dim = 1

    def unless(self, other: Dim) -> Blocks:
        """The same, left out where `other` is 1."""
        here = 1 - other
        once, last = ([replace(s, when=s.when * here) for s in stages] for stages in (self.once, self.last))
        return replace(self, steps=self.steps * here, once=tuple(once), last=last)


@dataclass(frozen=True, slots=True)
class Attention:
    """The stages of one attention. `mask` is read with keys side by side, `turned` with queries."""

    node: Node
    q: Operand
    k: Operand
    v: Operand
    out: Operand
    mask: Operand | None
    turned: Operand | None

    @property
    def n_queries(self) -> Dim:
        return self.q.view.shape[2]

    @property
    def n_keys(self) -> Dim:
        return self.k.view.shape[2]

    def score(
        self, product: Expr, mask: Operand | None, s: Dim, t: Dim, ahead: Dim | None, scale: float | None = None
    ) -> Expr:
        """A score from q . k. `ahead`, where it matters: how many keys the query sees beyond this one. `scale`, where
        another than the node's is wanted.
        """
        attrs = self.node.attrs
        e = product
        scale = attrs["scale"] if scale is None else scale
        if scale != 1.0:
            e = mul(e, number(scale))
        if cap := attrs.get("softcap", 0.0):
            e = mul(Unary("tanh", mul(e, number(1.0 / cap))), number(cap))
        if mask is not None:
            m = Load(mask.buffer, (s, t))
            e = Select(m, e, number(-np.inf)) if m.buffer.dtype is DType.bool else Binary("add", e, m)
        if ahead is not None:
            e = Select(Binary("ge", Index(ahead, DType.i32), Const(0, DType.i32)), e, number(-np.inf))
        return e

    def blocks(self) -> Blocks:
        """The general way. Kernels of a single chunk need no sums from step to step."""
        n_queries, n_keys, depth, width = self.n_queries, self.n_keys, self.q.view.shape[3], self.v.view.shape[3]
        part, step = symbol(PART, 0), symbol(STEP, 0)
        first = part * QUERIES
        causal = bool(self.node.attrs["causal"]) and n_queries != 1
        block: int = QUERIES if not isinstance(n_queries, int) else min(QUERIES, n_queries)
        here: Dim = (
            block if isinstance(n_queries, int) and n_queries % block == 0 else minimum(block, n_queries - first)
        )
        # Keys beyond what the last query of the block sees are not computed.
        seen = maximum(1, minimum(n_keys, n_keys - n_queries + first + block)) if causal else n_keys
        n_chunks, chunk = 0, KEYS
        if isinstance(n_keys, int):
            n_chunks = -(-n_keys // KEYS)
            chunk = -(-n_keys // n_chunks)
        alone = n_chunks == 1
        steps: Dim = 1 if alone else ceildiv(seen, chunk)
        start: Dim = 0 if alone else step * chunk
        keys: Dim = seen if alone else minimum(chunk, seen - start)
        if not causal and isinstance(n_keys, int) and n_keys % chunk == 0:
            keys = chunk
        row = -(-block // 16) * 16
        p, inverse = scratch("p", chunk, row), scratch("inverse", row)
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
            p, self.v.buffer, self.out.buffer, packing, self.result(mul(ACC, Load(inverse, (s,)))), (inverse,),
        )  # fmt: skip
        v_offset, out_offset = self.v.moved(start * down), self.out.moved(first * self.out.row)
        if alone:
            each.append(Stage(_softmax(p, keys, here, (s, t), inverse)))
            each.append(Stage(values, (v_offset, out_offset)))
            return Blocks(each, [], local, steps)
        top, total, rescale = (scratch(name, row) for name in ("top", "total", "rescale"))
        o = scratch("sums", row, -(-width // 16) * 16)
        local += [top, total, rescale, o]
        each.append(Stage(_online_softmax(p, keys, here, (s, t), (top, total, rescale))))
        so_far = Binary("add", ACC, mul(Load(o, (s, symbol("n", 0))), Load(rescale, (s,))))
        is_first = Binary("eq", Index(step), Const(0, DType.i64))
        values = replace(
            values,
            rows=(Axis("s", here, 1, 0, o.strides[0]),),
            out=o,
            epilogue=Select(is_first, ACC, so_far),
            extra=(o, rescale),
        )
        each.append(Stage(values, (v_offset,)))
        local.remove(inverse)
        return Blocks(each, [Stage(self.divided(o, total, here), (out_offset,))], local, steps)

    def result(self, e: Expr) -> Expr:
        """What is stored of a result: it may be rounded to half precision."""
        out = self.out.buffer.dtype
        return e if out is F32 else Cast(out, e)

    def divided(self, o: Buffer, total: Buffer, queries: Dim) -> Kernel:
        """The results of a block: weighted sums over sums of weights."""
        s, e, out = symbol("s", 0), symbol("e", 0), self.out.buffer
        result = self.result(mul(Load(o, (s, e)), Read("inverse", F32)))
        columns = For("e", self.v.view.shape[3], (Store(out, (s, e), result),), "vector")
        inverse = Let("inverse", Binary("div", number(1), Load(total, (s,))))
        return Kernel("k", (o, total, out), (For("s", queries, (inverse, columns)),))

    def decode(self) -> tuple[Stage, Buffer]:
        """The whole of a head with a single query, and the buffer for its scores."""
        keys, depth, width = self.n_keys, self.q.view.shape[3], self.v.view.shape[3]
        p = scratch("scores", keys)
        t, u, d, e = symbol("t", 0), symbol("u", 0), symbol("d", 0), symbol("e", 0)
        product = Reduce("add", "d", depth, mul(_f32(Load(self.q.buffer, (0, d))), _f32(Load(self.k.buffer, (t, d)))))
        body: list[Stmt] = [For("t", keys, (Store(p, (t,), product),))]
        score = self.score(Load(p, (u,)), self.mask, 0, u, None)
        if not isinstance(score, Load):
            body.append(For("u", keys, (Store(p, (u,), score),), "vector"))
        t0, t1, t2 = (symbol(f"t{i}", 0) for i in range(3))
        body += [
            Let("top", Reduce("maxnum", "t0", keys, Load(p, (t0,)))),
            For(
                "t1", keys, (Store(p, (t1,), Unary("exp", Binary("sub", Load(p, (t1,)), Read("top", F32)))),), "vector"
            ),
            Let("inverse", Binary("div", number(1), Reduce("add", "t2", keys, Load(p, (t2,))))),
        ]
        t3 = symbol("t3", 0)
        total = Reduce("add", "t3", keys, mul(Load(p, (t3,)), _f32(Load(self.v.buffer, (t3, e)))))
        result = self.result(mul(total, Read("inverse", F32)))
        body.append(For("e", width, (Store(self.out.buffer, (0, e), result),), "vector"))
        operands = [x for x in (self.q, self.k, self.v, self.mask) if x is not None]
        kernel = Kernel("k", (*(x.buffer for x in operands), p, self.out.buffer), tuple(body))
        return Stage(kernel, tuple(x.moved(0) for x in (*operands, self.out))), p


def _softmax(p: Buffer, keys: Dim, queries: Dim, at: tuple[Dim, Dim], inverse: Buffer) -> Kernel:
    """p = exp(p - max), and 1 / sum."""
    s, t = at
    body = (
        Let("top", Reduce("maxnum", "u", keys, Load(p, (symbol("u", 0), s)))),
        For("t", keys, (Store(p, (t, s), exp_below(Load(p, (t, s)), Read("top", F32))),)),
        Let("total", Reduce("add", "w", keys, Load(p, (symbol("w", 0), s)))),
        Store(inverse, (s,), Binary("div", number(1), Read("total", F32))),
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
        Let("old", Select(is_first, number(LOWEST), Load(top, (s,)))),
        Let("chunk_top", Reduce("maxnum", "u", keys, Load(p, (symbol("u", 0), s)))),
        Let("top", Binary("max", Read("old", F32), Read("chunk_top", F32))),
        Let("rescale", exp_below(Read("old", F32), Read("top", F32))),
        Store(top, (s,), Read("top", F32)),
        Store(rescale, (s,), Read("rescale", F32)),
        For("t", keys, (Store(p, (t, s), exp_below(Load(p, (t, s)), Read("top", F32))),)),
        Let("chunk_total", Reduce("add", "w", keys, Load(p, (symbol("w", 0), s)))),
        Let("before", Select(is_first, number(0), mul(Load(total, (s,)), Read("rescale", F32)))),
        Store(total, (s,), Binary("add", Read("before", F32), Read("chunk_total", F32))),
    )
    return Kernel("k", (p, top, total, rescale), (For("s", queries, body, "vector"),))


def mul(a: Expr, b: Expr) -> Expr:
    return Binary("mul", a, b)


def _f32(x: Load) -> Expr:
    """An element that may be stored in half precision."""
    return x if x.buffer.dtype is F32 else Cast(F32, x)


def number(x: float) -> Const:
    return Const(float(x), F32)


def exp_below(x: Expr, top: Expr) -> Expr:
    return Unary("exp", Binary("sub", x, top))
