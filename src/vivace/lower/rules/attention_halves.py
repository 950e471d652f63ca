"""The stages of an attention whose products are products of bf16, with f32 sums.

    for (batch, group of heads):
        k and v packed as such products read them                     once for all heads and queries of the group
        for each head of the group and block of queries:
            for each chunk of keys:
                p[s, t] = score(q[s] . k[t])                          f32
                softmax over t, with the maximum and the sum so far   f32; w[s, t] = exp(p - maximum) in bf16
                o[s] = o[s] * exp(old maximum - new) + sum over t of w[s, t] v[t]
            out[s] = o[s] / sum

Scores stand with keys side by side here: the second product reads weights in runs of keys. A run is filled up to whole
tile rows (`RUN`), with zeros in the weights and in the packed values. A weight is rounded to 8 bits, so its exponential
is computed no more exactly than that asks for (`exp2_bf16`); the sum that divides a row is that of the exponentials.

Where the number of queries is known, the last block has stages of its own for its size. What else holds for
`attention_stages` holds here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vivace.base.dims import Dim, ceildiv, maximum, minimum, symbol
from vivace.base.dtypes import DType
from vivace.base.machine import Isa, host
from vivace.loops.blocked import STEP, Stage, block_sizes
from vivace.loops.contraction import Axis, Contraction, Packing
from vivace.loops.expressions import mul
from vivace.loops.kernel import (
    Binary,
    Buffer,
    Cast,
    Const,
    For,
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
from vivace.loops.pack import Pack
from vivace.lower.arithmetic import choose_arithmetic
from vivace.lower.choices import Choice
from vivace.lower.rules.attention_stages import (
    F32,
    LOG2E,
    LOWEST,
    Attention,
    Blocks,
    exp_below,
    is_first,
    number,
    scratch,
)
from vivace.lower.rules.epilogue import ACC
from vivace.lower.tile import panel_lanes, staged_stride

BF16 = DType.bf16
QUERIES = 64  # of a block, at most
KEYS = 256  # of a chunk, at most, where more would be computed in vain or nobody knows how many there are
ROWS = 32  # queries of two tile registers
WHOLE = 16  # keys of a vector: scores beyond the last key are not read
RUN = 32  # keys that a row of a tile register holds
_STATISTICS = ("inverse", "top", "largest", "total", "rescale")


def room() -> int:
    """Scores of a block, at most, where that can be known."""
    return host().cache_bytes(2) // 8 // F32.size_bytes


def sizes_of_halves(n_queries: Dim, n_keys: Dim, causal: bool, choice: Choice) -> tuple[int, int]:
    """Queries of a block and keys of a chunk, at most; where sizes are known, those that are there.

    The fewer the chunks, the less is rescaled, as long as the scores of a block fill no more than an eighth of the
    second-level cache: 1500 queries and keys take 72 % of the time in blocks of 32 and one chunk of what they take in
    blocks of 64 and chunks of 256. Blocks are whole tile registers.
    """
    queries, keys = QUERIES, KEYS
    if isinstance(n_keys, int) and not causal:
        queries = QUERIES if QUERIES * n_keys <= room() else ROWS
        keys = max(KEYS, room() // queries)
    queries, keys = choice.rows or queries, choice.tiles or keys
    if isinstance(n_queries, int):
        even = -(-n_queries // max(1, -(-n_queries // queries)))
        queries = max(1, min(n_queries, -(-even // ROWS) * ROWS))
    if isinstance(n_keys, int):
        n_chunks = -(-n_keys // keys)
        keys = -(-n_keys // (n_chunks * RUN)) * RUN
    return queries, keys


@dataclass(frozen=True, slots=True)
class HalfAttention:
    """The stages of `a`; `part` numbers the blocks of queries of one head."""

    a: Attention
    part: Dim
    isa: Isa

    @property
    def factor(self) -> float:
        """A number above 0 with which scores are multiplied as late as in the softmax, where it costs nothing."""
        attrs, mask = self.a.node.attrs, self.a.mask
        is_late = (
            attrs["scale"] > 0 and not attrs.get("softcap", 0.0) and (mask is None or mask.buffer.dtype is DType.bool)
        )
        return float(attrs["scale"]) if is_late else 1.0

    def blocks(self) -> Blocks:
        a = self.a
        n_queries, n_keys = a.n_queries, a.n_keys
        block, chunk = a.queries, a.keys
        n_parts = ceildiv(n_queries, block)
        first = self.part * block
        causal = bool(a.node.attrs["causal"]) and n_queries != 1
        seen = maximum(1, minimum(n_keys, n_keys - n_queries + first + block)) if causal else n_keys
        alone = isinstance(n_keys, int) and n_keys <= chunk
        packs = self._packs(0 if alone else chunk)
        state = _State.of(block, chunk, a.v.view.shape[3])
        steps: Dim = 1 if alone else ceildiv(seen, chunk)
        each, last = [], []
        for rows, when in block_sizes(n_queries, block, n_parts, self.part):
            some = _Rows(self, rows, first, chunk, causal, alone, packs, state)
            for chunk_of, here in self._chunks(chunk, seen, alone):
                each += [replace(s, when=when * here) for s in some.of_chunk(chunk_of)]
            last += [] if alone else [replace(some.at_the_end(), when=when)]
        once = tuple(Stage(p, (operand.moved(0),)) for p, operand in zip(packs, (a.k, a.v), strict=True))
        used = {b for s in (*each, *last, *once) for b in s.params}
        local = [b for b in (*(p.out for p in packs), *state.buffers) if b in used]
        return Blocks(each, last, local, steps, once, maximum(1, n_parts // 4))

    def _chunks(self, chunk: int, seen: Dim, alone: bool) -> list[tuple[_Chunk, Dim]]:
        """The chunks that a step may compute, and when (1 or 0) it does: sizes are numbers where they can be."""
        n_keys, step = self.a.n_keys, symbol(STEP, 0)
        if alone:
            return [(_Chunk(0, seen, RUN * ceildiv(n_keys, RUN)), 1)]
        start, in_chunk = step * chunk, chunk // RUN
        if not isinstance(n_keys, int) or seen is not n_keys:
            run = RUN * minimum(in_chunk, ceildiv(n_keys, RUN) - step * in_chunk)
            return [(_Chunk(start, minimum(chunk, seen - start), run), 1)]
        left = (n_keys - 1) % chunk + 1
        if left == chunk:
            return [(_Chunk(start, chunk, chunk), 1)]
        is_last = maximum(0, step - (n_keys // chunk - 1))
        return [(_Chunk(start, chunk, chunk), 1 - is_last), (_Chunk(start, left, -(-left // RUN) * RUN), is_last)]

    def _packs(self, block: int) -> tuple[Pack, Pack]:
        a, ar = self.a, choose_arithmetic(BF16, BF16, self.isa)
        n_keys, depth, width = a.n_keys, a.k.view.shape[3], a.v.view.shape[3]
        wide = RUN if ar.is_tile else 2 * self.isa.n_f32_lanes
        lanes = min(wide, panel_lanes(n_keys, self.isa, ar))
        k = _pack(depth, n_keys, a.k.column, a.k.row, a.k.buffer, lanes)
        v = _pack(n_keys, width, a.v.row, a.v.column, a.v.buffer, panel_lanes(width, self.isa, ar), RUN, block)
        return k, v


def _pack(
    k: Dim, n: Dim, k_stride: Dim, n_stride: Dim, b: Buffer, lanes: int, multiple: int = 2, block: int = 0
) -> Pack:
    if n == 1:
        n_stride = 1
    elif k == 1:
        k_stride = 1
    pack = Pack("k", (), k, n, k_stride, n_stride, b, b, lanes, multiple, block)
    return replace(pack, out=Buffer(f"{b.name}_panels", BF16, (pack.size,), (1,), True))


@dataclass(frozen=True, slots=True)
class _State:
    """What a thread keeps of a block."""

    p: Buffer
    w: Buffer
    inverse: Buffer
    top: Buffer
    largest: Buffer
    total: Buffer
    rescale: Buffer
    sums: Buffer

    @staticmethod
    def of(block: int, chunk: int, width: Dim) -> _State:
        def rows(name: str, columns: Dim, dtype: DType) -> Buffer:
            return Buffer(name, dtype, (block, columns), (staged_stride(columns, dtype.size_bytes), 1), True)

        inverse, top, largest, total, rescale = (scratch(name, ceildiv(block, 16) * 16) for name in _STATISTICS)
        sums = rows("sums", width, F32)
        return _State(rows("p", chunk, F32), rows("w", chunk, BF16), inverse, top, largest, total, rescale, sums)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return self.p, self.w, self.inverse, self.top, self.largest, self.total, self.rescale, self.sums


@dataclass(frozen=True, slots=True)
class _Chunk:
    """`keys` from key `start` on, filled up to `run`."""

    start: Dim
    keys: Dim
    run: Dim


@dataclass(frozen=True, slots=True)
class _Rows:
    """The stages of one block of `rows` queries from query `first` on."""

    half: HalfAttention
    rows: Dim
    first: Dim
    chunk: int
    causal: bool
    alone: bool
    packs: tuple[Pack, Pack]
    state: _State

    def of_chunk(self, chunk: _Chunk) -> list[Stage]:
        """Scores, weights, and the weighted sums so far; where all keys are one chunk, the results."""
        a, state, here, v = self.half.a, self.state, self.rows, self.packs[1]
        out, s, n = a.out.buffer, symbol("s", 0), symbol("n", 0)
        values = Contraction(
            "k", (), (Axis("s", here, state.w.strides[0], 0, a.out.row),), (Axis("t", chunk.run, 1),),
            a.v.view.shape[3], state.w, v.out, out, Packing("panels", v.lanes),
            a.result(mul(ACC, Load(state.inverse, (s,)))), (state.inverse,),
        )  # fmt: skip
        if self.alone:
            softmax = Stage(_softmax(state, here, chunk, self.half.factor))
            return [self._scores(chunk), softmax, Stage(values, (a.out.moved(self.first * a.out.row),))]
        so_far = Binary("add", ACC, mul(Load(state.sums, (s, n)), Load(state.rescale, (s,))))
        values = replace(
            values, rows=(Axis("s", here, state.w.strides[0], 0, state.sums.strides[0]),), out=state.sums,
            epilogue=Select(is_first(), ACC, so_far), extra=(state.sums, state.rescale),
        )  # fmt: skip
        panels = (v.out, chunk.start * (v.n_panels * v.lanes))
        return [
            self._scores(chunk),
            Stage(_online_softmax(state, here, chunk, self.half.factor)),
            Stage(values, (panels,)),
        ]

    def at_the_end(self) -> Stage:
        """The results of a block of several chunks."""
        a = self.half.a
        return Stage(a.divided(self.state.sums, self.state.total, self.rows), (a.out.moved(self.first * a.out.row),))

    def _scores(self, chunk: _Chunk) -> Stage:
        a, k, start = self.half.a, self.packs[0], chunk.start
        s, n = symbol("s", 0), symbol("n", 0, self.chunk - 1)
        ahead = s + self.first + a.n_keys - a.n_queries - n - start if self.causal else None
        epilogue = a.score(ACC, a.mask, s, n, ahead, self.half.factor)
        keys = chunk.keys if epilogue is not ACC else ceildiv(chunk.keys, WHOLE) * WHOLE
        scores = Contraction(
            "k", (), (Axis("s", self.rows, a.q.row, 0, self.state.p.strides[0]),), (Axis("d", k.k, 1),), keys,
            a.q.buffer, k.out, self.state.p, Packing("panels", k.lanes),
            None if epilogue is ACC else epilogue, () if a.mask is None else (a.mask.buffer,),
        )  # fmt: skip
        offsets = [a.q.moved(self.first * a.q.row), (k.out, start * k.rows)]
        if a.mask is not None:
            offsets.append(a.mask.moved(self.first * a.mask.row + start * a.mask.column))
        return Stage(scores, tuple(offsets))


def _tops(state: _State, queries: Dim, chunk: _Chunk) -> For:
    """The largest number among the scores of each row. A NaN needs no place there: it makes its weight, and so the sum
    of the row, NaN."""
    s, v = symbol("s", 0), symbol("v", 0)
    return For("s", queries, (Store(state.top, (s,), Reduce("maxnum", "v", chunk.keys, Load(state.p, (s, v)))),))


def _weights(state: _State, chunk: _Chunk, factor: float) -> tuple[Stmt, ...]:
    """w = exp(factor * (p - top)), and zeros up to the end of the run; the sum of the exponentials as `chunk_total`."""
    s, t, z, keys = symbol("s", 0), symbol("t", 0), symbol("z", 0), chunk.keys
    below = Binary("sub", Load(state.p, (s, t)), Read("here", F32))
    power = Unary("exp2_bf16", mul(below, number(factor * LOG2E)))
    found: list[Stmt] = [
        Let("here", Load(state.top, (s,))),
        For("t", keys, (Store(state.w, (s, t), Cast(BF16, power)),), "vector"),
        Let("chunk_total", Reduce("add", "t", keys, power)),
    ]
    if keys != chunk.run:
        found.append(For("z", chunk.run - keys, (Store(state.w, (s, keys + z), Const(0.0, BF16)),), "vector"))
    return tuple(found)


def _softmax(state: _State, queries: Dim, chunk: _Chunk, factor: float) -> Kernel:
    """The weights of each row, and 1 / their sum."""
    inverse = Binary("div", number(1), Read("chunk_total", F32))
    rows = For("s", queries, (*_weights(state, chunk, factor), Store(state.inverse, (symbol("s", 0),), inverse)))
    return Kernel("k", (state.p, state.w, state.top, state.inverse), (_tops(state, queries, chunk), rows))


def _online_softmax(state: _State, queries: Dim, chunk: _Chunk, factor: float) -> Kernel:
    """The weights for the maximum so far, their sum so far, and what earlier sums are to be multiplied with."""
    s = symbol("s", 0)
    largest = Binary("max", Read("old", F32), Load(state.top, (s,)))
    rescale = exp_below(Read("old", F32), Read("new", F32), factor * LOG2E)
    before = mul(Load(state.total, (s,)), Load(state.rescale, (s,)))
    steps = (
        Let("old", Select(is_first(), number(LOWEST), Load(state.largest, (s,)))),
        Let("new", largest),
        Store(state.largest, (s,), Read("new", F32)),
        Store(state.top, (s,), Read("new", F32)),
        Store(state.rescale, (s,), rescale),
        Store(state.total, (s,), Select(is_first(), number(0), before)),
    )
    so_far = Binary("add", Load(state.total, (s,)), Read("chunk_total", F32))
    body = (
        _tops(state, queries, chunk),
        For("s", queries, steps, "vector"),
        For("s", queries, (*_weights(state, chunk, factor), Store(state.total, (s,), so_far))),
    )
    params = (state.p, state.w, state.top, state.largest, state.total, state.rescale)
    return Kernel("k", params, body)
