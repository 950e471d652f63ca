"""Attention where a head has one query, as in decoding: the heads that share keys together, so that a key and a value
come from memory once for all of them.

    for (batch, group of heads):
        p[r, t] = score(k[t] . q[r])           rows of k as they lie; scale, softcap and mask follow; fetches v
        p[r] = softmax over t                  in powers of 2, not yet divided by its sum
        out[r] = sum over t of p[r, t] v[t] / sum of p[r]

`r` numbers the heads of a group. As many heads meet a key or value at once as have their sums in registers.

A long cache comes from memory, and what the processor fetches by itself stops at the end of each page, of which caches
have small ones: keys are asked for some ahead, and values meanwhile too, as many as half of the second-level cache
holds, so that the sums find them near.
"""

from __future__ import annotations

from dataclasses import replace

from vivace.base.dims import Dim, ceildiv, minimum, symbol
from vivace.base.machine import Isa, host
from vivace.loops.blocked import Stage
from vivace.loops.expressions import mul
from vivace.loops.kernel import Binary, Buffer, Expr, Fetch, For, Kernel, Let, Load, Read, Reduce, Stmt, Store
from vivace.lower.rules.attention_stages import F32, Attention, Operand, as_f32, exp_below, number, operand
from vivace.lower.views import View

_LINE_BYTES, _MOST_LINES = 64, 16
_AHEAD_BYTES = 4096  # a page: what memory delivers in the time that it takes to answer, and some more


def heads_of(view: View, share: int, name: str, at: tuple[Dim, Dim], writable: bool = False) -> Operand:
    """[batch, head, 1, column] as the matrix [head of the group, column] of the batch element and group at `at`."""
    batch, head, _, column = view.strides
    shape = (view.shape[0], view.shape[1] // share, share, view.shape[3])
    return operand(replace(view, shape=shape, strides=(batch, head * share, head, column)), name, at, writable)


def decode(a: Attention, share: int, isa: Isa) -> tuple[Stage, Buffer]:
    """The whole of a group, and a buffer for its scores; queries, mask and results of `a` are matrices of its heads."""
    keys = a.n_keys
    p = Buffer("scores", F32, (share, keys), (ceildiv(keys, 16) * 16, 1), True)
    at_once = isa.n_vector_registers // 4 - 2  # four vectors of a value, and as many sums for each head
    some = [range(first, min(first + at_once, share)) for first in range(0, share, at_once)]
    body: list[Stmt] = []
    for heads in some:
        body.append(_products(a, p, heads))
    for r in range(share):
        body += _softmax(a, p, r)
    for heads in some:
        body.append(_sums(a, p, heads))
    operands = [x for x in (a.q, a.k, a.v, a.mask) if x is not None]
    kernel = Kernel("k", (*(x.buffer for x in operands), p, a.out.buffer), tuple(body))
    return Stage(kernel, tuple(x.moved(0) for x in (*operands, a.out))), p


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


def _products(a: Attention, p: Buffer, heads: range) -> For:
    t, d, depth = symbol("t", 0), symbol("d", 0), a.q.view.shape[3]
    key = as_f32(Load(a.k.buffer, (t, d)))
    products = [Let(f"p{r}", Reduce("add", "d", depth, mul(as_f32(Load(a.q.buffer, (r, d))), key))) for r in heads]
    ahead = _ahead(a, t) if heads.start == 0 else []
    return For("t", a.n_keys, (*ahead, *products, *(Store(p, (r, t), Read(f"p{r}", F32)) for r in heads)))


def _softmax(a: Attention, p: Buffer, r: int) -> list[Stmt]:
    """The powers of head `r`, and 1 / their sum as `inverse`."""
    u, t = symbol("u", 0), symbol("t", 0)
    score = a.score(Load(p, (r, u)), a.mask, r, u, None)
    found: list[Stmt] = [] if isinstance(score, Load) else [For("u", a.n_keys, (Store(p, (r, u), score),), "vector")]
    power = exp_below(Load(p, (r, t)), Read(f"top{r}", F32))
    total: Expr = Reduce("add", "t", a.n_keys, Load(p, (r, t)))
    return [
        *found,
        Let(f"top{r}", Reduce("maxnum", "u", a.n_keys, Load(p, (r, u)))),
        For("t", a.n_keys, (Store(p, (r, t), power),), "vector"),
        Let(f"inverse{r}", Binary("div", number(1), total)),
    ]


def _sums(a: Attention, p: Buffer, heads: range) -> For:
    t, e = symbol("t", 0), symbol("e", 0)
    value = as_f32(Load(a.v.buffer, (t, e)))
    sums = [Let(f"sum{r}", Reduce("add", "t", a.n_keys, mul(Load(p, (r, t)), value))) for r in heads]
    results = [a.result(mul(Read(f"sum{r}", F32), Read(f"inverse{r}", F32))) for r in heads]
    stores = [Store(a.out.buffer, (r, e), result) for r, result in zip(heads, results, strict=True)]
    return For("e", a.v.view.shape[3], (*sums, *stores), "vector")
