"""tree_ensemble: rows walk down packed trees, many walks at a time.

The trees become one table of records, laid out by level, the children of a node next to each other: `no`, then `yes`.
A step is then `at = child + (x[feature] <= threshold)`, without a branch. A leaf's threshold is NaN, which nothing is
below, and its child is itself, so that a walk stays there; the bits of the NaN are the number of its row of votes.
A record is the threshold and one word, `child << bits | feature`, or two words where one is too narrow; a node that NaN
takes to `yes` has one more bit.

A step waits for the one before, so several walks go side by side: those of ROWS rows down one tree while there are so
many rows, else those of one row down GROUP trees. Votes are added tree by tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vivace.base.dims import Dim, ceildiv, minimum, symbol
from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.graph.graph import Value
from vivace.loops.kernel import (
    Alloc,
    Binary,
    Buffer,
    Cast,
    Const,
    Expr,
    For,
    Guard,
    Index,
    Kernel,
    Let,
    Load,
    Read,
    Stmt,
    Store,
    Unary,
)
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.elementwise import Params
from vivace.lower.views import View

I32, F32 = DType.i32, DType.f32
ROWS = 16
SIDE = 4  # walks side by side in one piece of code; the processor overlaps further ones
VOTES = 8  # rows of votes added before the sum is stored: a store and the load after it take as long as five additions
ROW_BITS = 22  # of a NaN that say which row of votes a leaf has
WORD_BITS = 31  # for child and feature in one word
_NAN = 0x7FC00000
_NEUTRAL = {"add": 0.0, "min": float("inf"), "max": float("-inf")}


@dataclass(frozen=True, slots=True)
class Packed:
    """Trees as the kernel reads them.

    `records`: threshold and word, or threshold, word and child (`is_wide`); the record of the root of tree t is t.
    `bits` of a word stand below the child; the lowest of them is set where NaN goes to `yes`, if `is_flagged`.
    `depths`: after how many steps the walks of each tree have ended. `votes`: rows of `n_targets` numbers, and space.
    """

    records: np.ndarray
    depths: np.ndarray
    votes: np.ndarray
    bits: int
    is_flagged: bool
    n_targets: int

    @property
    def is_wide(self) -> bool:
        return bool(self.records.shape[1] == 3)

    @property
    def n_trees(self) -> int:
        return len(self.depths)

    @property
    def depth(self) -> int:
        return int(self.depths.max())

    @property
    def tables(self) -> tuple[tuple[str, np.ndarray], ...]:
        return ("records", self.records), ("depths", self.depths), ("votes", self.votes)


def pack(
    features: np.ndarray, thresholds: np.ndarray, missing: np.ndarray, children: np.ndarray, roots: np.ndarray,
    leaves: np.ndarray,
) -> Packed:  # fmt: skip
    """Lay the nodes out by level. A node that several share has one place; elsewhere a record leads there."""
    place = np.full(len(features), -1, np.int64)
    level, start = roots.astype(np.int64), 0
    parts: list[tuple[np.ndarray, ...]] = []
    while level.size:
        spots = start + np.arange(level.size)
        start += level.size
        tests = np.zeros(level.size, bool)
        waiting = np.flatnonzero(level >= 0)
        waiting = waiting[place[level[waiting]] < 0]
        _, first = np.unique(level[waiting], return_index=True)
        tests[waiting[first]] = True
        node = level[tests]
        place[node] = spots[tests]
        child = np.where(level < 0, spots, 0)
        child[level >= 0] = place[level[level >= 0]]
        child[tests] = start + 2 * np.arange(node.size)
        threshold = np.where(level < 0, _NAN | ~level, _NAN)
        threshold[tests] = thresholds[node].view(np.int32)
        word = np.zeros(level.size, np.int64)
        word[tests] = features[node].astype(np.int64) << 1 | missing[node]
        parts.append((threshold, child, word, tests))
        level = children[node].reshape(-1).astype(np.int64)
    threshold, child, word, tests = (np.concatenate(p) for p in zip(*parts, strict=True))
    is_flagged = bool(np.any(word & 1))
    word = word if is_flagged else word >> 1
    bits = int(word.max()).bit_length()
    fits = int(child.max()).bit_length() + bits <= WORD_BITS
    words = [threshold, child << bits | word] if fits else [threshold, word, child]
    return Packed(
        records=np.ascontiguousarray(np.stack(words, axis=1).astype(np.int32)),
        depths=_depths(child, tests, len(roots)),
        votes=np.concatenate([leaves.reshape(-1), np.zeros(leaves.shape[1] + 16, np.float32)]),
        bits=bits if fits else 0,
        is_flagged=is_flagged,
        n_targets=leaves.shape[1],
    )


def _depths(child: np.ndarray, tests: np.ndarray, n_trees: int) -> np.ndarray:
    """For each tree the steps until all walks stand still."""
    depths = np.zeros(n_trees, np.int32)
    at, tree, steps = np.arange(n_trees), np.arange(n_trees), 0
    while True:
        moves = child[at] != at
        at, tree = at[moves], tree[moves]
        if not at.size:
            return depths
        steps += 1
        depths[tree] = steps
        both = tests[at]
        keys = np.concatenate([child[at], child[at[both]] + 1]) * n_trees + np.concatenate([tree, tree[both]])
        at, tree = np.divmod(np.unique(keys), n_trees)


class _Walks:
    """The statements of one kernel. `at` holds the record where each walk stands, `sums` the votes so far, by rows of
    whole vectors."""

    def __init__(self, params: Params, packed: Packed, x: View, tables: Sequence[View], fn: str) -> None:
        self.params, self.packed, self.x, self.fn = params, packed, x, fn
        self.records, self.depths, self.votes = tables
        n_targets = packed.n_targets
        self.wide = min(w for w in (1, 2, 4, 8, -(-n_targets // 16) * 16) if w >= n_targets)
        self.side = min(SIDE, packed.n_trees)
        n_walks = -(-packed.n_trees // self.side) * self.side
        self.at = Buffer("at", I32, (max(ROWS, n_walks),), (1,), writable=True)
        self.sums = Buffer("sums", F32, (ROWS, self.wide), (self.wide, 1), writable=True)

    def one_row(self, row: Dim, out: Buffer) -> tuple[Stmt, ...]:
        """A row down all trees, level by level."""
        n, side = self.packed.n_trees, self.side
        z, t, j, c = symbol("z", 0), symbol("t", 0), symbol("j", 0, side - 1), symbol("c", 0)
        # Walks beyond the last tree are copies of its: they fill up the last group.
        start = Store(self.at, (z,), Index(minimum(z, n - 1), I32))
        groups = ceildiv(n, side)
        level = For("t", groups, (For("j", side, self._step(t * side + j, row), "unroll"),))
        adds: list[Stmt] = []
        if n // VOTES:
            first = symbol("s", 0) * VOTES
            adds.append(For("s", n // VOTES, self._add([first + k for k in range(VOTES)], 0)))
        if n % VOTES:
            adds.append(For("q", n % VOTES, self._add([n // VOTES * VOTES + symbol("q", 0)], 0)))
        return (
            For("z", groups * side, (start,), "vector"),
            For("l", self.packed.depth, (level,)),
            self._clear(1),
            *adds,
            For("c", self.packed.n_targets, (Store(out, (row, c), Load(self.sums, (0, c))),), "vector"),
        )

    def rows(self, first: Dim, out: Buffer) -> tuple[Stmt, ...]:
        """ROWS rows down one tree after the other."""
        t, z, i, j, r, c = (symbol(v, 0) for v in ("t", "z", "i", "j", "r", "c"))
        place = i * SIDE + j
        side = For("j", SIDE, self._step(place, first + place), "unroll")
        tree = (
            For("z", ROWS, (Store(self.at, (z,), Index(t, I32)),), "vector"),
            Let("d", self.params.load(self.depths, (t,))),
            For("l", symbol("d", 0), (For("i", ROWS // SIDE, (side,)),)),
            For("r", ROWS, self._add([r], r)),
        )
        stored = For("c", self.packed.n_targets, (Store(out, (first + r, c), Load(self.sums, (r, c))),), "vector")
        return self._clear(ROWS), For("t", self.packed.n_trees, tree), For("r", ROWS, (stored,))

    def _clear(self, n: int) -> Stmt:
        y, e = symbol("y", 0), symbol("e", 0)
        nothing = Const(_NEUTRAL[self.fn], F32)
        return For("y", n, (For("e", self.wide, (Store(self.sums, (y, e), nothing),), "vector"),))

    def _word(self, at: Dim, k: int, dtype: DType = I32) -> Expr:
        r = self.records
        return self.params.load(replace(r, dtype=dtype, shape=r.shape[:1], strides=r.strides[:1], offset=k), (at,))

    def _step(self, place: Dim, row: Dim) -> tuple[Stmt, ...]:
        """The walk at `place` goes down one level."""
        p, at = self.packed, symbol("k", 0)
        word, value = Read("w", I32), Read("v", F32)
        below = self._word(at, 2) if p.is_wide else Binary("shr", word, Const(p.bits, I32))
        feature: Expr = word if p.is_wide else Binary("bitand", word, Const((1 << p.bits) - 1, I32))
        yes: Expr = Binary("le", value, self._word(at, 0, F32))
        if p.is_flagged:
            feature = Binary("shr", feature, Const(1, I32))
            flag = Binary("ne", Binary("bitand", word, Const(1, I32)), Const(0, I32))
            yes = Binary("or", yes, Binary("and", Unary("isnan", value), flag))
        return (
            Let("k", Load(self.at, (place,))),
            Let("w", self._word(at, 1)),
            Let("f", feature),
            Let("v", self.params.load(self.x, (row, symbol("f", 0)))),
            Store(self.at, (place,), Binary("add", below, Cast(I32, yes))),
        )

    def _add(self, walks: Sequence[Dim], row: Dim) -> tuple[Stmt, ...]:
        """The votes of the leaves where some walks ended, in order. What lies behind a row of votes is added to the
        rest of the vector, which nothing reads."""
        lets: list[Stmt] = []
        e = symbol("e", 0)
        total: Expr = Load(self.sums, (row, e))
        for k, walk in enumerate(walks):
            number = Binary("bitand", self._word(symbol(f"k{k}", 0), 0), Const((1 << ROW_BITS) - 1, I32))
            lets += [Let(f"k{k}", Load(self.at, (walk,))), Let(f"n{k}", number)]
            vote = self.params.load(self.votes, (symbol(f"n{k}", 0) * self.packed.n_targets + e,))
            total = Binary(self.fn, total, vote)
        return (*lets, For("e", self.wide, (Store(self.sums, (row, e), total),), "vector"))


def lower_tree_ensemble(ctx: Lowering, g: Group) -> None:
    """One kernel: blocks of ROWS rows in parallel; the rows that are left go one by one."""
    node = g.anchor
    assert node.inputs[0] is not None
    packed = pack(*(_data(v) for v in node.inputs[1:]))
    x, out, name = ctx.view(node.inputs[0]), ctx.target(node.outputs[0]), node.outputs[0].name
    if x.storage is None:
        x = ctx.contiguous(x, node.inputs[0].name)
    tables = [ctx.constant(a, f"{name}_{what}", (what, node)) for what, a in packed.tables]
    params = Params()
    walks = _Walks(params, packed, x, tables, node.attrs["reduce"])
    result = params.buffer(out, writable=True)
    n, b = out.shape[0], symbol("b", 0)
    left = Index(n - b * ROWS)
    full = Guard(Binary("ge", left, Const(ROWS, DType.i64)), walks.rows(b * ROWS, result))
    one = For("r", n - b * ROWS, walks.one_row(b * ROWS + symbol("r", 0), result))
    rest = Guard(Binary("lt", left, Const(ROWS, DType.i64)), (one,))
    body: tuple[Stmt, ...] = (Alloc(walks.at), Alloc(walks.sums), full, rest)
    order = sorted(range(len(params.buffers)), key=lambda i: params.buffers[i].writable)
    spec = Kernel("k", tuple(params.buffers[i] for i in order), (For("b", ceildiv(n, ROWS), body, "parallel"),))
    ctx.emit("tree_ensemble", spec, [params.views[i] for i in order], len(order) - 1, (node,), node.cost.flops)


def _data(v: Value | None) -> np.ndarray:
    if v is None or v.data is None:
        raise UnsupportedError("the trees depend on data", where="tree_ensemble", expected="constants")
    return v.data
