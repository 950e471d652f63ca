"""Attention without its scores in memory.

    for (batch, head) and each block of queries:
        queries turned, so that they stand side by side
        for each chunk of keys:
            p[t, s] = score(k[t] . q[s])                scale, softcap, causal and mask in the epilogue
            softmax over t, with the maximum and the sum so far, in powers of 2
            o[s] = o[s] * exp(old maximum - new) + sum over t of p[t, s] v[t]
        out[s] = o[s] / sum

Scores stand with queries side by side: a maximum or a sum over keys is one of whole vectors, and the second product
reads them as it needs them. They, o and the sums of a block stay in the caches; whatever the number of keys, scratch
has one size. Keys of few rows are one chunk, whose product is finished at once.

Where a head has one query, all is done in another way (`attention_decode`). Where that shows when the model runs, the
kernel holds both ways.

A row without any visible key is NaN, as its definition says: 0 / 0. Starting the maximum at the least finite number
keeps chunks without visible keys from making NaN of the others.

Sources: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from vivace.base.dims import Dim, ceildiv, maximum, minimum, symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Node
from vivace.loops.blocked import STEP, Stage, block_sizes
from vivace.loops.contraction import Axis, Contraction, Packing
from vivace.loops.expressions import add, div, mul, sub
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
    Store,
    Unary,
)
from vivace.lower.choices import Choice
from vivace.lower.rules.epilogue import ACC
from vivace.lower.views import View

F32 = DType.f32
QUERIES = 64  # of a block: four 512-bit vectors, which hide the latency of their sums
# Keys of a chunk, at most: scores of a block, keys and values of a chunk take 32 KiB each. 1500 keys take 0.94 of the
# time that they take in chunks of 250; 197 keys take 0.92 of it as one chunk of that with two. 64 keys are slower.
KEYS, ALONE = 128, 256
LOG2E = math.log2(math.e)
LOWEST = float(np.finfo(np.float32).min)


def sizes_of(n_queries: Dim, n_keys: Dim, choice: Choice) -> tuple[int, int]:
    """Queries of a block and keys of a chunk, at most; where sizes are known, those that are there."""
    queries, keys = choice.rows or QUERIES, choice.tiles or KEYS
    if isinstance(n_queries, int):
        queries = max(1, min(queries, n_queries))
    if isinstance(n_keys, int):
        n_chunks = -(-n_keys // keys) if n_keys > (choice.tiles or ALONE) else 1
        keys = -(-n_keys // n_chunks)
    return queries, keys


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
    queries: int  # of a block
    keys: int  # of a chunk

    @property
    def operands(self) -> list[Operand]:
        return [x for x in (self.q, self.k, self.v, self.mask, self.turned, self.out) if x is not None]

    @property
    def n_queries(self) -> Dim:
        return self.q.view.shape[2]

    @property
    def n_keys(self) -> Dim:
        return self.k.view.shape[2]

    def score(self, product: Expr, mask: Operand | None, s: Dim, t: Dim, ahead: Dim | None, over: float = 1.0) -> Expr:
        """A score from q . k, divided by `over` where no mask is added to it. `ahead`, where it matters: how many keys
        the query sees beyond this one.
        """
        attrs = self.node.attrs
        e, factor = product, attrs["scale"]
        if cap := attrs.get("softcap", 0.0):
            e, factor = Unary("tanh", mul(e, number(factor / cap))), cap
        if factor != over:
            e = mul(e, number(factor / over))
        if mask is not None:
            m = Load(mask.buffer, (s, t))
            e = Select(m, e, number(-np.inf)) if m.buffer.dtype is DType.bool else add(e, m)
        if ahead is not None:
            e = Select(Binary("ge", Index(ahead, DType.i32), Const(0, DType.i32)), e, number(-np.inf))
        return e

    def blocks(self, part: Dim) -> Blocks:
        """The general way; `part` numbers the blocks of queries of a head. Kernels of a single chunk need no sums from
        step to step."""
        n_queries, n_keys, width = self.n_queries, self.n_keys, self.v.view.shape[3]
        block, chunk = self.queries, self.keys
        step = symbol(STEP, 0)
        first = part * block
        causal = bool(self.node.attrs["causal"]) and n_queries != 1
        # Keys beyond what the last query of the block sees are not computed.
        seen = maximum(1, minimum(n_keys, n_keys - n_queries + first + block)) if causal else n_keys
        alone = isinstance(n_keys, int) and n_keys <= chunk
        steps: Dim = 1 if alone else ceildiv(seen, chunk)
        start: Dim = 0 if alone else step * chunk
        keys: Dim = seen if alone else minimum(chunk, seen - start)
        if not causal and isinstance(n_keys, int) and n_keys % chunk == 0:
            keys = chunk
        state = _State.of(block, chunk, self.q.view.shape[3], width)
        each, last = [], []
        for here, when in block_sizes(n_queries, block, ceildiv(n_queries, block), part):
            some = _Queries(self, state, here, first, _Chunk(chunk, start, keys), causal, alone)
            each += [replace(s, when=s.when * when) for s in some.stages()]
            last += [] if alone else [replace(some.at_the_end(), when=when)]
        used = {b for s in (*each, *last) for b in s.params}
        return Blocks(each, last, [b for b in state.buffers if b in used], steps)

    def result(self, e: Expr) -> Expr:
        return result_of(self.out.buffer.dtype, e)

    def divided(self, o: Buffer, total: Buffer, queries: Dim) -> Kernel:
        """The results of a block: weighted sums over sums of weights."""
        s, e, out = symbol("s", 0), symbol("e", 0), self.out.buffer
        result = self.result(mul(Load(o, (s, e)), Read("inverse", F32)))
        columns = For("e", self.v.view.shape[3], (Store(out, (s, e), result),), "vector")
        inverse = Let("inverse", div(number(1), Load(total, (s,))))
        return Kernel("k", (o, total, out), (For("s", queries, (inverse, columns)),))


@dataclass(frozen=True, slots=True)
class _State:
    """What a thread keeps of a block."""

    q: Buffer
    p: Buffer
    inverse: Buffer
    top: Buffer
    total: Buffer
    rescale: Buffer
    sums: Buffer

    @staticmethod
    def of(block: int, chunk: int, depth: Dim, width: Dim) -> _State:
        row = -(-block // 16) * 16
        inverse, top, total, rescale = (scratch(name, row) for name in ("inverse", "top", "total", "rescale"))
        sums = scratch("sums", row, ceildiv(width, 16) * 16)
        return _State(scratch("turned_q", depth, row), scratch("p", chunk, row), inverse, top, total, rescale, sums)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return self.q, self.p, self.inverse, self.top, self.total, self.rescale, self.sums


@dataclass(frozen=True, slots=True)
class _Chunk:
    """`keys` from key `start` on, at most `most`."""

    most: int
    start: Dim
    keys: Dim


@dataclass(frozen=True, slots=True)
class _Queries:
    """The stages of one block of `here` queries from query `first` on."""

    a: Attention
    state: _State
    here: Dim
    first: Dim
    chunk: _Chunk
    causal: bool
    alone: bool

    @property
    def late(self) -> float:
        """What the softmax multiplies scores with, for powers of 2: with an added mask of the lowest number they would
        overflow before.
        """
        mask = self.a.mask
        return LOG2E if mask is not None and mask.buffer.dtype is not DType.bool else 1.0

    def stages(self) -> list[Stage]:
        """Scores, weights, and the weighted sums so far; where all keys are one chunk, the results."""
        softmax = (_softmax if self.alone else _online_softmax)(self.state, self.chunk.keys, self.here, self.late)
        return [*self._turned(), self._scores(), Stage(softmax), self._values()]

    def _turned(self) -> list[Stage]:
        """Queries side by side, as the first product reads them; once for all chunks."""
        q, state, n, d = self.a.q, self.state, symbol("n", 0), symbol("d", 0)
        if q.row == 1:
            return []
        row = Store(state.q, (d, n), Load(q.buffer, (n, d)))
        turn = For("d", q.view.shape[3], (For("n", self.here, (row,), "vector"),))
        is_first = 1 if self.alone else 1 - minimum(1, symbol(STEP, 0))
        return [Stage(Kernel("k", (q.buffer, state.q), (turn,)), (q.moved(self.first * q.row),), is_first)]

    def _scores(self) -> Stage:
        a, state, chunk = self.a, self.state, self.chunk
        p, row, depth = state.p, state.p.strides[0], a.q.view.shape[3]
        n, t = symbol("n", 0, a.queries - 1), symbol("t", 0, chunk.most - 1)
        ahead = n + self.first + a.n_keys - a.n_queries - t - chunk.start if self.causal else None
        epilogue = a.score(ACC, a.turned, n, t, ahead, self.late / LOG2E)
        q, down, offsets = state.q, row, [a.k.moved(chunk.start * a.k.row)]
        if a.q.row == 1:
            q, down = a.q.buffer, a.q.column
            offsets.append(a.q.moved(self.first))
        if a.turned is not None:
            offsets.append(a.turned.moved(self.first * a.turned.row + chunk.start * a.turned.column))
        scores = Contraction(
            "k", (), (Axis("t", chunk.keys, a.k.row, 0, row),), (Axis("d", depth, a.k.column, down),), self.here,
            a.k.buffer, q, p, Packing("plain"), None if epilogue is ACC else epilogue,
            () if a.turned is None else (a.turned.buffer,),
        )  # fmt: skip
        return Stage(scores, tuple(offsets))

    def _values(self) -> Stage:
        a, state, chunk = self.a, self.state, self.chunk
        width, out, p = a.v.view.shape[3], a.out, state.p
        down, across = a.v.row, a.v.column
        packing = Packing("plain") if across == 1 or width == 1 else Packing("transposed", n_stride=across)
        s, n = symbol("s", 0), symbol("n", 0)
        values = Contraction(
            "k", (), (Axis("s", self.here, 1, 0, out.row),), (Axis("t", chunk.keys, p.strides[0], down),), width,
            p, a.v.buffer, out.buffer, packing, a.result(mul(ACC, Load(state.inverse, (s,)))), (state.inverse,),
        )  # fmt: skip
        v_offset = a.v.moved(chunk.start * down)
        if self.alone:
            return Stage(values, (v_offset, out.moved(self.first * out.row)))
        so_far = add(ACC, mul(Load(state.sums, (s, n)), Load(state.rescale, (s,))))
        values = replace(
            values, rows=(Axis("s", self.here, 1, 0, state.sums.strides[0]),), out=state.sums,
            epilogue=Select(is_first(), ACC, so_far), extra=(state.sums, state.rescale),
        )  # fmt: skip
        return Stage(values, (v_offset,))

    def at_the_end(self) -> Stage:
        """The results of a block of several chunks."""
        a, state = self.a, self.state
        return Stage(a.divided(state.sums, state.total, self.here), (a.out.moved(self.first * a.out.row),))


def is_first() -> Binary:
    """Whether a stage meets the first chunk of keys."""
    return Binary("eq", Index(symbol(STEP, 0)), Const(0, DType.i64))


def _softmax(state: _State, keys: Dim, queries: Dim, late: float) -> Kernel:
    """p = 2**(late * (p - max)), and 1 / sum."""
    p, s, t = state.p, symbol("s", 0), symbol("t", 0)
    body = (
        Let("top", Reduce("maxnum", "u", keys, Load(p, (symbol("u", 0), s)))),
        For("t", keys, (Store(p, (t, s), exp_below(Load(p, (t, s)), Read("top", F32), late)),)),
        Let("total", Reduce("add", "t", keys, Load(p, (t, s)))),
        Store(state.inverse, (s,), div(number(1), Read("total", F32))),
    )
    return Kernel("k", (p, state.inverse), (For("s", queries, body, "vector"),))


def _online_softmax(state: _State, keys: Dim, queries: Dim, late: float) -> Kernel:
    """p = 2**(late * (p - max)) for the maximum so far, the sum so far, and what earlier sums are to be multiplied
    with."""
    p, s, t = state.p, symbol("s", 0), symbol("t", 0)
    body = (
        Let("old", Select(is_first(), number(LOWEST), Load(state.top, (s,)))),
        Let("chunk_top", Reduce("maxnum", "u", keys, Load(p, (symbol("u", 0), s)))),
        Let("top", Binary("max", Read("old", F32), Read("chunk_top", F32))),
        Let("rescale", exp_below(Read("old", F32), Read("top", F32), late)),
        Store(state.top, (s,), Read("top", F32)),
        Store(state.rescale, (s,), Read("rescale", F32)),
        For("t", keys, (Store(p, (t, s), exp_below(Load(p, (t, s)), Read("top", F32), late)),)),
        Let("chunk_total", Reduce("add", "t", keys, Load(p, (t, s)))),
        Let("before", Select(is_first(), number(0), mul(Load(state.total, (s,)), Read("rescale", F32)))),
        Store(state.total, (s,), add(Read("before", F32), Read("chunk_total", F32))),
    )
    return Kernel("k", (p, state.top, state.total, state.rescale), (For("s", queries, body, "vector"),))


def result_of(out: DType, e: Expr) -> Expr:
    """What is stored of a result: it may be rounded to half precision."""
    return e if out is F32 else Cast(out, e)


def as_f32(x: Load) -> Expr:
    """An element that may be stored in half precision."""
    return x if x.buffer.dtype is F32 else Cast(F32, x)


def number(x: float) -> Const:
    return Const(float(x), F32)


def exp_below(x: Expr, top: Expr, unit: float = LOG2E) -> Expr:
    """2**(unit * (x - top)) for x that is not above top."""
    below = sub(x, top)
    return Unary("exp2", below if unit == 1.0 else mul(below, number(unit)))
