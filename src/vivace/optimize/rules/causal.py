"""Masks that hide the keys after a query and nothing else: attention knows them as `causal`, and skips what they hide.

    where(columns <= rows + (T - S), 0, -inf)     computed, as a boolean or added, however its comparison is turned
    a triangle of constants                       as older exporters leave it

Exact: instead of -inf a mask may hold a number below `HIDDEN`, but only where every query sees some key, since a row
of equal scores is no row of NaN.
"""

from __future__ import annotations

import numpy as np

from vivace.base.dims import Dim, bounds
from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.graph.rewrite import At, Example, Outcome, Rule, rule, scalar

HIDDEN = -1e30
"""Added to any score that f32 products give in earnest, this leaves a weight of exactly 0 after softmax."""

_MIRRORED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}
_NEGATED = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le"}


def _computed(e: Example) -> Value:
    q, k, v = e.x("f32[2,6,N,8]"), e.x("f32[2,2,N,8]"), e.x("f32[2,2,N,8]")
    n = q.shape[2]
    line = e.iota(shape=(n,), axis=0, dtype=DType.i64)
    seen = e.le(e.reshape(line, shape=(1, n)), e.reshape(line, shape=(n, 1)))
    mask = e.where(seen, e.const(np.float32(0)), e.const(np.finfo(np.float32).min))
    return e.attention(q, k, v, e.reshape(mask, shape=(1, 1, n, n)), scale=0.3, causal=False, softcap=0.0)


def _with_cache(e: Example) -> Value:
    q, k, v = e.x("f32[2,6,3,8]"), e.x("f32[2,2,5,8]"), e.x("f32[2,2,5,8]")
    rows = e.add(e.iota(shape=(3, 1), axis=0, dtype=DType.i64), e.const(np.int64(3)))
    seen = e.gt(rows, e.iota(shape=(5,), axis=0, dtype=DType.i64))
    return e.attention(q, k, v, seen, scale=0.3, causal=False, softcap=0.0)


def _constant(e: Example) -> Value:
    q, k, v = e.x("f32[2,6,4,8]"), e.x("f32[2,2,4,8]"), e.x("f32[2,2,4,8]")
    mask = np.where(np.tri(4, dtype=bool), 0, -np.inf).astype(np.float32)[None, None]
    return e.attention(q, k, v, e.const(mask), scale=0.3, causal=False, softcap=0.0)


@rule("attention", examples=(_computed, _with_cache, _constant))
def causal_mask(n: Node, at: At) -> Outcome:
    """attention(q, k, v, what hides exactly the later keys) = attention{causal=true}(q, k, v)"""
    q, k, mask = n.inputs[0], n.inputs[1], n.inputs[3] if len(n.inputs) > 3 else None
    if q is None or k is None or mask is None or n.attrs["causal"]:
        return None
    if not _hides_later(mask, q.shape[2], k.shape[2], at):
        return "the mask is not known to hide the later keys alone"
    return at.op.emit(n.op, n.inputs[:3], {**n.attrs, "causal": True})


def _hides_later(mask: Value, s: Dim, t: Dim, at: At) -> bool:
    low = bounds(t - s)[0]
    all_see = low is not None and low >= 0
    if mask.data is not None:
        return isinstance(s, int) and isinstance(t, int) and _is_triangle(mask.data, s, t, all_see)
    mask = _bare(mask, at)
    seen = True
    if (n := at.by(mask, "where")) is not None:
        a, b = scalar(n.inputs[1]), scalar(n.inputs[2])
        if a is None or b is None or sorted((a, b))[1] != 0:
            return False
        hidden = min(a, b)
        if not (hidden == -np.inf or (hidden <= HIDDEN and all_see)):
            return False
        seen = a == 0
        assert n.inputs[0] is not None
        mask = _bare(n.inputs[0], at)
    elif mask.dtype is not DType.bool:
        return False
    if (n := at.by(mask, "not")) is not None:
        assert n.inputs[0] is not None
        seen, mask = not seen, _bare(n.inputs[0], at)
    n = at.by(mask, *_MIRRORED)
    if n is None or n.output.shape[-2:] != (s, t) or any(d != 1 for d in n.output.shape[:-2]):
        return False
    return _compares_positions(n, seen, t - s, at)


def _bare(v: Value, at: At) -> Value:
    """The matrix that `v` spreads over batches and heads, or converts between floats."""
    while (n := at.by(v, "reshape", "expand", "cast")) is not None and n.inputs[0] is not None:
        inner = n.inputs[0]
        match n.op.name:
            case "cast" if not (inner.dtype.is_float and v.dtype.is_float):
                return v
            case "reshape" if _without_ones(inner.shape) != _without_ones(v.shape):
                return v
            case "expand" if inner.shape[-2:] != v.shape[-2:]:
                return v
        v = inner
    return v


def _compares_positions(n: Node, seen: bool, offset: Dim, at: At) -> bool:
    """Whether `n` says `column <= row + offset` (or, where not `seen`, the opposite)."""
    left, right = (_position(v, at) for v in n.inputs)
    if left is None or right is None or left[0] == right[0]:
        return False
    op = n.op.name
    if left[0] == "row":
        left, right, op = right, left, _MIRRORED[op]
    if not seen:
        op = _NEGATED[op]
    reach = right[1] - left[1] - (1 if op == "lt" else 0)
    return op in ("le", "lt") and reach == offset


def _position(v: Value | None, at: At) -> tuple[str, Dim] | None:
    """`row` or `column`, and what is added to its number."""
    if v is None:
        return None
    wide = [len(v.shape) - i for i, d in enumerate(v.shape) if d != 1]
    if wide not in ([1], [2]):
        return None
    axis = "column" if wide == [1] else "row"
    total: Dim = 0
    while (n := at.by(v, "reshape", "cast", "add")) is not None:
        if n.op.name == "cast" and not (v.dtype.is_int and n.inputs[0] is not None and n.inputs[0].dtype.is_int):
            return None
        if n.op.name == "add":
            parts = [_number(u, at) for u in n.inputs]
            if (parts[0] is None) == (parts[1] is None):
                return None
            number = parts[0] if parts[0] is not None else parts[1]
            assert number is not None
            total = total + number
            v = n.inputs[1 if parts[0] is not None else 0]
        else:
            v = n.inputs[0]
        assert v is not None
    line = at.by(v, "iota")
    if line is None or any(d != 1 for i, d in enumerate(v.shape) if i != line.attrs["axis"] % v.rank):
        return None
    return axis, total


def _number(v: Value | None, at: At) -> Dim | None:
    """The whole number that a value of one element holds."""
    known = scalar(v)
    if known is not None:
        return known if isinstance(known, int) else None
    while (n := at.by(v, "reshape")) is not None:
        v = n.inputs[0]
    n = at.by(v, "dims")
    if n is None or len(n.attrs["values"]) != 1:
        return None
    value: Dim = n.attrs["values"][0]
    return value


def _is_triangle(mask: np.ndarray, s: int, t: int, all_see: bool) -> bool:
    if mask.shape[-2:] != (s, t) or mask.size != s * t:
        return False
    seen = np.arange(t) <= np.arange(s)[:, None] + t - s
    mask = mask.reshape(s, t)
    if mask.dtype == np.bool_:
        return bool((mask == seen).all())
    hidden = mask[~seen]
    gone = (hidden == -np.inf) | ((hidden <= HIDDEN) & all_see)
    return bool((mask[seen] == 0).all() and gone.all())


def _without_ones(shape: tuple[Dim, ...]) -> list[Dim]:
    return [d for d in shape if d != 1]


RULES: tuple[Rule, ...] = (causal_mask,)
