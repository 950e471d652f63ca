"""Index arithmetic that exporters write out: ranges compared with zero, gathers that take everything in order, and
products of one-hot rows, which are gathers."""

from __future__ import annotations

import numpy as np

from vivace.base.dims import Dim
from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.graph.rewrite import At, Example, Outcome, Rule, rule, scalar


def _uniform(v: Value | None, at: At) -> bool | None:
    """The truth value that a constant, or an expanded one, holds everywhere."""
    n = at.by(v, "expand", "reshape")
    if n is not None:
        return _uniform(n.inputs[0], at)
    if v is None or v.data is None or v.dtype is not DType.bool or not v.data.size:
        return None
    low, high = bool(v.data.min()), bool(v.data.max())
    return low if low == high else None


@rule("and", "or", examples=(lambda e: e.not_(e.and_(e.x("bool[2,3]"), e.const(True))),))
def drop_neutral_truth(n: Node, at: At) -> Outcome:
    """x and true = x; x or false = x"""
    neutral = n.op.name == "and"
    for a, b in ((0, 1), (1, 0)):
        kept = n.inputs[a]
        if kept is not None and _uniform(n.inputs[b], at) is neutral:
            return kept if kept.type == n.output.type else at.op.expand(kept, shape=n.output.shape)
    return None


def line_of(v: Value | None, at: At) -> tuple[int, Dim] | None:
    """`(axis, length)` where `v` holds its own index along that axis, whatever the others: an iota that was reshaped
    or expanded."""
    n = at.by(v, "iota", "reshape", "expand")
    if n is None:
        return None
    if n.op.name == "iota":
        axis = n.attrs["axis"] % n.output.rank
        return axis, n.output.shape[axis]
    found = line_of(n.inputs[0], at)
    x, out = n.inputs[0], n.output
    if found is None or x is None:
        return None
    axis, length = found
    if n.op.name == "expand":
        axis += out.rank - x.rank
        return (axis, length) if out.shape[axis] == length else None
    old = [i for i, d in enumerate(x.shape) if d != 1]
    new = [i for i, d in enumerate(out.shape) if d != 1]
    if axis not in old or [x.shape[i] for i in old] != [out.shape[i] for i in new]:
        return None
    return new[old.index(axis)], length


@rule(
    "ge", "gt", "lt", "le",
    examples=(
        lambda e: e.ge(e.reshape(e.iota(shape=(5,), axis=0, dtype=DType.i64), shape=(5, 1)), 0),
        lambda e: e.lt(e.iota(shape=(2, 5), axis=1, dtype=DType.i64), 0),
    ),
)  # fmt: skip
def compare_index_with_zero(n: Node, at: At) -> Outcome:
    """iota >= 0 = true; iota > -1 = true; iota < 0 = false"""
    c = scalar(n.inputs[1])
    if c is None or line_of(n.inputs[0], at) is None:
        return None
    known = {"ge": c <= 0, "gt": c < 0, "lt": c <= 0, "le": c < 0}[n.op.name]
    if not known:
        return None
    return at.op.expand(at.op.const(n.op.name in ("ge", "gt")), shape=n.output.shape)


def _everything(e: Example) -> Value:
    mask = e.x("bool[B,T]")
    b, t = mask.shape
    rows = e.reshape(e.iota(shape=(b,), axis=0, dtype=DType.i64), shape=(b, 1, 1))
    keys = e.iota(shape=(t,), axis=0, dtype=DType.i64)
    parts = [e.reshape(e.expand(p, shape=(b, 1, t)), shape=(b, 1, t, 1)) for p in (rows, keys)]
    return e.not_(e.gather_nd(mask, e.concat(*parts, axis=3), batch_dims=0))


@rule("gather_nd", examples=(_everything,))
def gather_everything(n: Node, at: At) -> Outcome:
    """gather_nd(x, (iota along axis i, iota along axis j, ...)) = x, reshaped and expanded, where each range covers
    its axis of x"""
    x = n.inputs[0]
    grid = at.by(n.inputs[1], "concat")
    if (
        x is None
        or grid is None
        or n.attrs["batch_dims"]
        or grid.attrs["axis"] % grid.output.rank != grid.output.rank - 1
    ):
        return None
    lines = [line_of(p, at) for p in grid.inputs]
    if any(p is None or p.shape[-1] != 1 for p in grid.inputs) or len(lines) > x.rank:
        return "an index is no single range"
    axes: list[int] = []
    for line, d in zip(lines, x.shape):
        if line is None or line[1] != d or line[0] in axes or line[0] == grid.output.rank - 1:
            return "an index does not run over its whole axis"
        axes.append(line[0])
    k, rank = len(axes), grid.output.rank - 1
    perm = tuple(sorted(range(k), key=lambda i: axes[i])) + tuple(range(k, x.rank))
    thin: tuple[Dim, ...] = tuple(x.shape[axes.index(i)] if i in axes else 1 for i in range(rank)) + x.shape[k:]
    moved = x if perm == tuple(range(x.rank)) else at.op.transpose(x, perm=perm)
    placed = moved if thin == moved.shape else at.op.reshape(moved, shape=thin)
    return placed if placed.type == n.output.type else at.op.expand(placed, shape=n.output.shape)


@rule(
    "gather",
    examples=(
        lambda e: e.exp(
            e.gather(e.x("f32[N,3]"), e.iota(shape=(e.inputs[0].shape[0],), axis=0, dtype=DType.i64), axis=0)
        ),
    ),
)
def gather_all_rows(n: Node, at: At) -> Outcome:
    """gather(x, iota over the whole axis) = x"""
    x, idx = n.inputs
    line = line_of(idx, at)
    if x is None or idx is None or line is None or idx.rank != 1 or line[1] != x.shape[n.attrs["axis"]]:
        return None
    return x


def _one_hot(v: Value | None, at: At) -> tuple[Value, Value] | None:
    """The comparands of eq where `v` is 1 where they are equal and 0 elsewhere."""
    n = at.by(v, "cast", "where")
    if n is None or not n.output.dtype.is_float:
        return None
    if n.op.name == "where" and (scalar(n.inputs[1]), scalar(n.inputs[2])) != (1, 0):
        return None
    same = at.by(n.inputs[0], "eq")
    a, b = same.inputs if same is not None else (None, None)
    return None if a is None or b is None or n.output.shape != same.output.shape else (a, b)  # type: ignore[union-attr]


def _is_line(v: Value, n: Dim, at: At) -> bool:
    """Whether `v` holds 0, 1, ... n - 1 along its last axis."""
    if v.data is not None and isinstance(n, int) and v.rank and v.shape[-1] == n:
        return bool(np.all(v.data == np.arange(n)))
    return line_of(v, at) == (v.rank - 1, n)


def _hot_rows(e: Example) -> Value:
    hot = e.eq(e.reshape(e.x("i32[2,5]"), shape=(2, 5, 1)), e.const(np.arange(4, dtype=np.int32)))
    return e.matmul(e.cast(hot, to=DType.f32), e.w("f32[4,3]"))


@rule("matmul", examples=(_hot_rows,))
def gather_one_hot(n: Node, at: At) -> Outcome:
    """cast(x == 0..n-1) @ w = rows of w at x, zeros where x is outside, for finite constants w"""
    found, w = _one_hot(n.inputs[0], at), n.inputs[1]
    if found is None or w is None or w.data is None or w.rank != 2:
        return None
    ids, line = found if _is_line(found[1], w.shape[0], at) else found[::-1]
    if not _is_line(line, w.shape[0], at) or not ids.dtype.is_int or not ids.rank or ids.shape[-1] != 1:
        return "what is compared is no range beside one number per row"
    if ids.shape[:-1] != n.output.shape[:-1]:
        return "the range varies along other axes"
    if not np.all(np.isfinite(w.data)):
        return "a weight is not finite"
    op, size = at.op, w.data.shape[0]
    flat = op.reshape(ids, shape=ids.shape[:-1])
    flat = flat if flat.dtype in (DType.i32, DType.i64) else op.cast(flat, to=DType.i64)
    inside = op.and_(op.ge(flat, 0), op.lt(flat, size))
    rows = at.const(np.concatenate([w.data, np.zeros((1, w.data.shape[1]), w.data.dtype)]), "weight")
    return op.gather(rows, op.where(inside, flat, op.expand(op.const(size, flat.dtype), shape=flat.shape)), axis=0)


@rule(
    "argmax",
    examples=(
        lambda e: e.argmax(e.softmax(e.x("f32[N,6]"), axis=1), axis=1, keepdims=False, select_last=False),
        lambda e: e.argmax(e.log_softmax(e.x("f32[2,6,3]"), axis=1), axis=1, keepdims=True, select_last=False),
    ),
)
def argmax_before_softmax(n: Node, at: At) -> Outcome:
    """argmax(softmax(x)) = argmax(x) where the largest x is finite; elsewhere softmax is NaN throughout: 0"""
    m, op = at.by(n.inputs[0], "softmax", "log_softmax"), at.op
    if m is None or m.inputs[0] is None:
        return None
    x, axis = m.inputs[0], n.attrs["axis"] % m.output.rank
    if m.attrs["axis"] % x.rank != axis:
        return f"{m.op.name} runs along another axis"
    if n.attrs["select_last"]:
        return "of equal ones it takes the last"
    if not at.only_use(m.output):
        return f"the {m.op.name} has other readers"
    keep = n.attrs["keepdims"]
    top, best = op.reduce_max(x, axes=(axis,), keepdims=keep), op.argmax(x, axis=axis, keepdims=keep, select_last=False)
    is_finite = op.lt(op.abs(top), op.const(np.inf, x.dtype))
    none = op.expand(op.const(0, DType.i64), shape=n.output.shape)
    return op.where(is_finite, best, none)


# For our own code, where choosing rows costs no step of its own; elsewhere it is more nodes than before.
NATIVE_RULES: tuple[Rule, ...] = (gather_one_hot, argmax_before_softmax)
RULES: tuple[Rule, ...] = (drop_neutral_truth, compare_index_with_zero, gather_everything, gather_all_rows)
