"""Attention where a head has one query, as in decoding: the heads that share keys together, so that a key and a value
come from memory once for all of them.

    for (batch, group of heads) and each chunk of keys:
        p[r, t] = score(k[t] . q[r])           rows of k as they lie; scale, softcap and mask follow; fetches v
        top[r] = max of p[r]
        p[r, t] = 2**(p[r, t] - top[r])        in the units of exp2
        total[r], sums[r] = sum over t of p[r, t], of p[r, t] v[t]
    for (batch, head):                         a step of its own
        out = sum over chunks of 2**(top - largest top) sums / the same of totals

`r` numbers the heads of a group. As many heads meet a key or value at once as have their sums in registers. Few groups
alone would not share out evenly: three for two threads take 4/3 of the time that their halves do.

A long cache comes from memory, and what the processor fetches by itself stops at the end of each page, of which caches
have small ones: keys are asked for some ahead, and values meanwhile too, as many as half of the second-level cache
holds, so that the sums find them near.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vivace.base.dims import Dim, ceildiv, maximum, minimum, symbol
from vivace.base.machine import Isa, host
from vivace.loops.blocked import BLOCK, PART, Stage
from vivace.loops.expressions import div, mul
from vivace.loops.kernel import Alloc, Binary, Buffer, Expr, Fetch, For, Kernel, Let, Load, Read, Reduce, Stmt, Store
from vivace.lower.rules.attention_stages import (
    F32,
    LOWEST,
    Attention,
    Operand,
    as_f32,
    exp_below,
    number,
    operand,
    result_of,
)
from vivace.lower.views import View

_LEAST_KEYS = 64  # of a chunk
_MOST_UNITS = 32  # groups of heads times chunks: enough to even out over some threads

_LINE_BYTES, _MOST_LINES = 64, 16
_AHEAD_BYTES = 4096  # a page: what memory delivers in the time that it takes to answer, and some more


def heads_of(view: View, share: int, name: str, at: tuple[Dim, Dim], writable: bool = False) -> Operand:
    """[batch, head, 1, column] as the matrix [head of the group, column] of the batch element and group at `at`."""
    batch, head, _, column = view.strides
    shape = (view.shape[0], view.shape[1] // share, share, view.shape[3])
    return operand(replace(view, shape=shape, strides=(batch, head * share, head, column)), name, at, writable)


@dataclass(frozen=True, slots=True)
class Chunks:
    """The keys of each group in chunks, and what is kept of one: `sums` f32[batch * groups * chunks, heads of a group,
    columns] and, with the chunks of a head side by side, `levels` f32[batch * groups, heads of a group, 2, chunks]:
    tops and totals.
    """

    n_keys: Dim
    share: int  # heads of a group
    most: int
    width: Dim  # columns

    @property
    def length(self) -> Dim:
        return maximum(_LEAST_KEYS, ceildiv(self.n_keys, self.most))

    @property
    def count(self) -> Dim:
        return ceildiv(self.n_keys, self.length)

    @property
    def row(self) -> Dim:
        """Columns of `sums`, whole vectors."""
        return ceildiv(self.width, 16) * 16

    def sizes(self, n_groups: Dim) -> tuple[Dim, Dim]:
        """Elements of `sums` and of `levels`, for all groups of the batch."""
        return n_groups * self.count * self.share * self.row, n_groups * self.share * 2 * self.most


def chunks_of(n_keys: Dim, groups: int, share: int, width: Dim) -> Chunks:
    return Chunks(n_keys, share, max(1, _MOST_UNITS // groups), width)


def decode(a: Attention, chunks: Chunks, isa: Isa) -> tuple[Stage, Buffer, tuple[Buffer, Buffer]]:
    """A chunk, a buffer for its scores, and where its sums and levels go; queries and mask of `a` are matrices of the
    heads of a group."""
    share, block, part = chunks.share, symbol(BLOCK, 0), symbol(PART, 0)
    start = part * chunks.length
    keys = minimum(chunks.length, chunks.n_keys - start)
    p = Buffer("scores", F32, (share, chunks.length), (ceildiv(chunks.length, 16) * 16, 1), True)
    sums = Buffer("chunk_sums", F32, (share, chunks.width), (chunks.row, 1), True)
    levels = Buffer("levels", F32, (share, 2), (2 * chunks.most, chunks.most), True)
    at_once = isa.n_vector_registers // 4 - 2  # four vectors of a value, and as many sums for each head
    some = [range(first, min(first + at_once, share)) for first in range(0, share, at_once)]
    body: list[Stmt] = []
    for heads in some:
        body.append(_products(a, p, heads, keys))
    for r in range(share):
        body += _softmax(a, p, levels, r, keys)
    for heads in some:
        body.append(_sums(a, p, sums, heads, keys))
    offsets = [a.q.moved(0), a.k.moved(start * a.k.row), a.v.moved(start * a.v.row)]
    if a.mask is not None:
        offsets.append(a.mask.moved(start * a.mask.column))
    kernel = Kernel("k", (*(x for x, _ in offsets), p, sums, levels), tuple(body))
    offsets.append((sums, (block * chunks.count + part) * share * chunks.row))
    offsets.append((levels, block * share * 2 * chunks.most + part))
    return Stage(kernel, tuple(offsets)), p, (sums, levels)


def joined(out: View, chunks: Chunks, when: Dim) -> Kernel:
    """The results of all heads, of the sums and levels that `decode` left; nothing where `when` is 0."""
    batch, heads = out.shape[:2]
    groups, share = heads // chunks.share, chunks.share
    b, g, r, c, e = (symbol(x, 0) for x in "bgrce")
    kept = Buffer("chunk_sums", F32, (batch * groups, chunks.count, share, chunks.width), _dense(chunks), False)
    row = 2 * chunks.most
    levels = Buffer("levels", F32, (batch * groups, share, 2, chunks.count), (share * row, row, chunks.most, 1), False)
    per_batch, per_head, _, column = out.strides
    places = (per_batch, per_head * share, per_head, column)
    to = Buffer("out", out.dtype, (batch, groups, share, chunks.width), places, True)
    weights = Buffer("weights", F32, (chunks.most,), (1,), True)
    top, total = Load(levels, (b * groups + g, r, 0, c)), Load(levels, (b * groups + g, r, 1, c))

    def over_chunks(x: Expr) -> Expr:
        return Reduce("add", "c", chunks.count, mul(Load(weights, (c,)), x))

    result = mul(over_chunks(Load(kept, (b * groups + g, c, r, e))), Read("inverse", F32))
    body: tuple[Stmt, ...] = (
        Alloc(weights),
        Let("top", Reduce("max", "c", chunks.count, top)),
        For("c", chunks.count, (Store(weights, (c,), exp_below(top, Read("top", F32))),), "vector"),
        Let("inverse", div(number(1), over_chunks(total))),
        For("e", chunks.width, (Store(to, (b, g, r, e), result_of(out.dtype, result)),), "vector"),
    )
    for name, extent in (("r", share), ("g", groups), ("b", batch * when)):
        body = (For(name, extent, body, "parallel"),)
    return Kernel("k", (kept, levels, to), body)


def _dense(chunks: Chunks) -> tuple[Dim, ...]:
    return chunks.count * chunks.share * chunks.row, chunks.share * chunks.row, chunks.row, 1


def _fetches(x: Operand, row: Dim, level: int) -> list[Stmt]:
    """Asks for all lines of a row of keys or values."""
    n_bytes = _row_bytes(x)
    step = _LINE_BYTES // x.buffer.dtype.size_bytes
    return [Fetch(x.buffer, (row, step * line), level) for line in range(-(-n_bytes // _LINE_BYTES))]


def _row_bytes(x: Operand) -> int:
    """0 where a row is no run of known length, or too long for a few fetches."""
    width, size = x.view.shape[3], x.buffer.dtype.size_bytes
    if not isinstance(width, int) or x.column != 1 or width * size > _MOST_LINES * _LINE_BYTES:
        return 0
    return width * size


def _ahead(a: Attention, t: Dim) -> list[Stmt]:
    """Asks for a key ahead, and for value `t`."""
    found: list[Stmt] = []
    if n_bytes := _row_bytes(a.k):
        found += _fetches(a.k, t + max(1, _AHEAD_BYTES // n_bytes), 1)
    if n_bytes := _row_bytes(a.v):
        found += _fetches(a.v, minimum(t, host().cache_bytes(2) // 2 // n_bytes), 2)
    return found


def _products(a: Attention, p: Buffer, heads: range, keys: Dim) -> For:
    t, d, depth = symbol("t", 0), symbol("d", 0), a.q.view.shape[3]
    key = as_f32(Load(a.k.buffer, (t, d)))
    products = [Let(f"p{r}", Reduce("add", "d", depth, mul(as_f32(Load(a.q.buffer, (r, d))), key))) for r in heads]
    ahead = _ahead(a, t) if heads.start == 0 else []
    return For("t", keys, (*ahead, *products, *(Store(p, (r, t), Read(f"p{r}", F32)) for r in heads)))


def _softmax(a: Attention, p: Buffer, levels: Buffer, r: int, keys: Dim) -> list[Stmt]:
    """The powers of head `r`, their largest score and their sum. Without any visible key the top is the least number,
    as others may see some."""
    u, t = symbol("u", 0), symbol("t", 0)
    score = a.score(Load(p, (r, u)), a.mask, r, u, None)
    found: list[Stmt] = [] if isinstance(score, Load) else [For("u", keys, (Store(p, (r, u), score),), "vector")]
    power = exp_below(Load(p, (r, t)), Read(f"top{r}", F32))
    return [
        *found,
        Let(f"top{r}", Binary("max", number(LOWEST), Reduce("maxnum", "u", keys, Load(p, (r, u))))),
        For("t", keys, (Store(p, (r, t), power),), "vector"),
        Store(levels, (r, 0), Read(f"top{r}", F32)),
        Store(levels, (r, 1), Reduce("add", "t", keys, Load(p, (r, t)))),
    ]


def _sums(a: Attention, p: Buffer, sums: Buffer, heads: range, keys: Dim) -> For:
    t, e = symbol("t", 0), symbol("e", 0)
    value = as_f32(Load(a.v.buffer, (t, e)))
    found = [Let(f"sum{r}", Reduce("add", "t", keys, mul(Load(p, (r, t)), value))) for r in heads]
    stores = [Store(sums, (r, e), Read(f"sum{r}", F32)) for r in heads]
    return For("e", a.v.view.shape[3], (*found, *stores), "vector")
