"""Attention, from eager exports, from `scaled_dot_product_attention`, and with keys repeated for groups of queries.

    softmax(q @ k^T * scale + mask) @ v       in any order of scaling (q, k, both, the scores; by product or quotient)
    where(isnan(p), 0, p) around the softmax  torch's guard for rows that see no key
    where(keep, scores, -huge)                a boolean mask
    c * tanh(scores / c)                      a soft cap
    reshape(expand(reshape(k)))               keys and values repeated for groups of queries

A guard is kept, on the result, where the mask can hide a whole row (a boolean mask, or one that holds -inf). Where it
cannot, the guard goes: it would only turn a NaN that came with the inputs into 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.graph.rewrite import At, Example, Outcome, Rule, rule, scalar

HUGE = 1e4
"""A score this far below zero has weight 0 after softmax; exporters use -1e4 for f16 and the least finite float
elsewhere."""


@dataclass(slots=True)
class _Scores:
    """What lies between `q @ k^T` and the softmax."""

    root: Node | None = None
    scale: float = 1.0
    softcap: float = 0.0
    masks: list[Value] = field(default_factory=list)
    reason: str = ""


def _factor(v: Value | None, at: At) -> tuple[Value | None, float]:
    """`v` as `x * c`."""
    m = at.by(v, "mul", "div")
    if m is None:
        return v, 1.0
    for a, b in ((0, 1), (1, 0)) if m.op.name == "mul" else ((0, 1),):
        c = scalar(m.inputs[b])
        x = m.inputs[a]
        if c is not None and x is not None and x.type == m.output.type and not (m.op.name == "div" and c == 0):
            return x, (1 / c if m.op.name == "div" else float(c))
    return v, 1.0


def _read_scores(v: Value | None, at: At) -> _Scores:
    """Walk from the softmax's operand to `q @ k^T`."""
    found = _Scores()
    while True:
        if v is None or not at.only_use(v):
            found.reason = "the scores are used elsewhere too"
            return found
        n = at.by(v)
        if n is None:
            found.reason = "the scores are no product"
            return found
        if n.op.name == "matmul":
            found.root = n
            return found
        x, c = _factor(v, at)
        if x is not v:
            found.scale *= c
            v = x
        elif n.op.name in ("add", "where") and (found.scale != 1 or found.softcap):
            found.reason = "the mask comes before the scale"  # (s + m) * c would scale the mask too
            return found
        elif n.op.name == "add":
            v = _split_mask(n, found, at)
        elif n.op.name == "where":
            v = _split_choice(n, found, at)
        elif n.op.name == "tanh" and found.scale != 1 and not found.softcap:
            x, c = _factor(n.inputs[0], at)
            cap = found.scale
            if not math.isclose(c * cap, 1.0, rel_tol=1e-5):
                found.reason = "tanh without matching factors"
                return found
            found.softcap, found.scale = cap, 1.0
            v = x
        else:
            found.reason = f"{n.op.name} stands between the product and the softmax"
            return found


def _depth_to_matmul(v: Value | None, at: At) -> bool:
    """True when a product of two matrices lies on the way up through scaling and masking."""
    for _ in range(8):
        n = at.by(v, "matmul", "add", "mul", "div", "where", "tanh")
        if n is None:
            return False
        if n.op.name == "matmul":
            return True
        v = (
            n.inputs[1]
            if n.op.name == "where" and not _depth_to_matmul(n.inputs[2], at)
            else n.inputs[2 if n.op.name == "where" else 0]
        )
    return False


def _split_mask(n: Node, found: _Scores, at: At) -> Value | None:
    a, b = n.inputs
    if not _depth_to_matmul(a, at):
        a, b = b, a
    if a is None or a.type != n.output.type or b is None:
        return None
    if not (b.data is not None and not np.any(b.data)):
        found.masks.append(b)
    return a


def _split_choice(n: Node, found: _Scores, at: At) -> Value | None:
    """where(keep, scores, -huge), or where(drop, -huge, scores)"""
    cond, a, b = n.inputs
    if cond is None or a is None or b is None:
        return None
    low_b, low_a = scalar(b), scalar(a)
    if low_b is not None and low_b <= -HUGE and a.type == n.output.type:
        found.masks.append(cond if low_b == -math.inf else at.op.where(cond, at.op.const(0.0, a.dtype), b))
        return a
    if low_a is not None and low_a <= -HUGE and b.type == n.output.type:
        found.masks.append(at.op.not_(cond) if low_a == -math.inf else at.op.where(cond, a, at.op.const(0.0, b.dtype)))
        return b
    return None


def _is_finite(v: Value, at: At, depth: int = 6) -> bool:
    """True when a mask is built from finite constants alone, so that no row is lost."""
    if v.dtype is DType.bool or depth == 0:
        return False
    if v.data is not None:
        return bool(np.all(np.isfinite(v.data)))
    n = at.by(v)
    if n is None:
        return False
    if n.op.name == "where":
        return all(u is not None and _is_finite(u, at, depth - 1) for u in n.inputs[1:])
    if n.op.name in ("expand", "reshape", "slice", "transpose", "concat", "gather"):
        return n.inputs[0] is not None and _is_finite(n.inputs[0], at, depth - 1)
    if n.op.name == "cast":
        return n.inputs[0] is not None and (n.inputs[0].dtype is DType.bool or n.inputs[0].dtype.is_int)
    if n.op.name in ("mul", "add", "sub"):
        # (1 - keep) * -huge: finite as long as the product of finite parts is
        return all(u is not None and _is_finite(u, at, depth - 1) for u in n.inputs)
    return False


def _unguarded(v: Value | None, at: At) -> tuple[Value | None, bool]:
    """The softmax behind `where(isnan(p), 0, p)`."""
    n = at.by(v, "where")
    if n is None or scalar(n.inputs[1]) != 0:
        return v, False
    test = at.by(n.inputs[0], "isnan")
    return (n.inputs[2], True) if test is not None and test.inputs[0] is n.inputs[2] else (v, False)


def _sdpa(e: Example) -> Value:
    q, k, v = e.x("f32[2,3,4,8]"), e.x("f32[2,3,5,8]"), e.x("f32[2,3,5,6]")
    keep = e.where(e.x("bool[2,1,4,5]"), 0.0, e.const(np.float32(-3.4028235e38)))
    kt = e.transpose(k, perm=(0, 1, 3, 2))
    p = e.softmax(e.add(e.matmul(e.mul(q, 0.6), e.mul(kt, 0.6)), keep), axis=3)
    return e.matmul(e.where(e.isnan(p), e.const(np.float32(0)), p), v)


def _eager(e: Example) -> Value:
    q, k, v = e.x("f32[2,3,4,8]"), e.x("f32[2,5,3,8]"), e.x("f32[2,3,5,6]")
    scores = e.div(e.matmul(q, e.transpose(k, perm=(0, 2, 3, 1))), 3.0)
    return e.matmul(e.softmax(e.add(scores, e.x("f32[2,1,1,5]")), axis=-1), v)


def _three_axes(e: Example) -> Value:
    q, k, v = e.x("f32[6,4,8]"), e.x("f32[6,5,8]"), e.x("f32[6,5,8]")
    scores = e.where(e.x("bool[4,5]"), e.matmul(q, e.transpose(k, perm=(0, 2, 1))), e.const(np.float32(-1e9)))
    return e.matmul(e.softmax(scores, axis=2), v)


def _capped(e: Example) -> Value:
    q, k, v = e.x("f32[1,2,4,8]"), e.x("f32[1,2,8,5]"), e.x("f32[1,2,5,8]")
    capped = e.mul(e.tanh(e.div(e.mul(e.matmul(q, k), 0.35), 30.0)), 30.0)
    return e.matmul(e.softmax(capped, axis=3), v)


def _lost_rows(e: Example) -> Value:
    q, k, v = e.x("f32[1,2,4,8]"), e.x("f32[1,2,8,5]"), e.x("f32[1,2,5,8]")
    keep = e.ge(e.iota(shape=(4, 5), axis=0, dtype=DType.i64), e.add(e.iota(shape=(4, 5), axis=1, dtype=DType.i64), 1))
    p = e.softmax(e.where(keep, e.matmul(q, k), e.const(np.float32(-np.inf))), axis=3)
    return e.matmul(e.where(e.isnan(p), e.const(np.float32(0)), p), v)


def _by_groups(e: Example) -> Value:
    q, k, v = e.x("f32[2,2,3,4,8]"), e.x("f32[2,2,1,8,5]"), e.x("f32[2,2,1,5,8]")
    return e.matmul(e.softmax(e.add(e.matmul(q, k), e.x("f32[2,1,1,4,5]")), axis=4), v)


@rule("matmul", examples=(_sdpa, _eager, _three_axes, _capped, _lost_rows, _by_groups))
def fuse_attention(n: Node, at: At) -> Outcome:
    """softmax(q @ k^T * scale + mask) @ v = attention(q, k, v, mask), for every place of the scale and every guard"""
    p, v = n.inputs
    if p is None or v is None:
        return None
    behind, guarded = _unguarded(p, at)
    soft = at.by(behind, "softmax")
    if soft is None or behind is None:
        return None
    rank = n.output.rank
    if soft.attrs["axis"] % soft.output.rank != soft.output.rank - 1 or not p.dtype.is_float:
        return "the softmax is not over the last axis"
    if (
        (not guarded and not at.only_use(p))
        or (guarded and len(at.users(behind)) != 2)
        or at.is_output(behind)
        or at.is_output(p)
    ):
        return "the weights are used elsewhere too"
    if guarded and not at.only_use(p):
        return "the guarded weights are used elsewhere too"
    scores = _read_scores(soft.inputs[0], at)
    if scores.root is None:
        return scores.reason
    q, q_scale = _factor(scores.root.inputs[0], at)
    kt, k_scale = _factor(scores.root.inputs[1], at)
    if q is None or kt is None or not q.rank == kt.rank == v.rank == rank or not 2 <= rank <= 5:
        return "query, key and value have different ranks"
    if len(scores.masks) > 1 and any(m.dtype is DType.bool for m in scores.masks):
        return "it has several masks"
    k = at.op.transpose(kt, perm=(*range(rank - 2), rank - 1, rank - 2))
    if not _batches_agree(q, k, v):
        return f"query, key and value are {q.type}, {k.type}, {v.type}"
    attrs: dict[str, object] = {"scale": scores.scale * q_scale * k_scale, "causal": False, "softcap": scores.softcap}
    mask: Value | None = None
    for m in scores.masks:
        mask = m if mask is None else at.op.add(mask, m)
    out = _emit(at, (q, k, v), mask, attrs)
    if isinstance(out, str):
        return out
    if guarded and mask is not None and not all(_is_finite(m, at) for m in scores.masks):
        # a row that sees no key is NaN throughout, before and after the product with v
        out = at.op.where(at.op.isnan(out), at.op.const(0.0, out.dtype), out)
    return out if out.type == n.output.type else f"the result would be {out.type}"


def _batches_agree(q: Value, k: Value, v: Value) -> bool:
    if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        return False
    if q.rank < 4:
        return q.shape[:-2] == k.shape[:-2]
    if q.rank == 5:  # [B,G,R,S,D] and [B,G,1,T,D]: R queries share the keys of their group
        fixed = all(isinstance(d, int) for d in q.shape[1:3])
        return fixed and q.shape[:2] == k.shape[:2] and k.shape[2] == 1
    heads, groups = q.shape[1], k.shape[1]
    return isinstance(heads, int) and isinstance(groups, int) and q.shape[0] == k.shape[0] and groups in (1, heads)


def _emit(at: At, qkv: tuple[Value, Value, Value], mask: Value | None, attrs: dict[str, object]) -> Value | str:
    """attention on operands of rank 4; lower ranks get the missing axes and lose them again, groups join the heads."""
    rank = qkv[0].rank
    if rank == 5:
        return _emit_grouped(at, qkv, mask, attrs)
    if rank == 4:
        if mask is not None and mask.rank > 4:
            return "the mask has more axes than the scores"
        return at.op.attention(*qkv, mask, **attrs)

    def wide(x: Value) -> Value:
        shape = (x.shape[0], 1, *x.shape[1:]) if rank == 3 else (1, 1, *x.shape)
        return at.op.reshape(x, shape=shape)

    if mask is not None and mask.rank == rank == 3:
        mask = wide(mask)
    out: Value = at.op.attention(*map(wide, qkv), mask, **attrs)
    shape = (out.shape[0], *out.shape[2:]) if rank == 3 else out.shape[2:]
    return at.op.reshape(out, shape=shape)


def _emit_grouped(at: At, qkv: tuple[Value, Value, Value], mask: Value | None, attrs: dict[str, object]) -> Value | str:
    """[B,G,R,S,D] as [B,G*R,S,D]; a mask must not tell groups from queries inside them."""
    (b, g, r, s, d), e = qkv[0].shape, qkv[2].shape[4]
    q = at.op.reshape(qkv[0], shape=(b, g * r, s, d))
    k, v = (at.op.reshape(x, shape=(b, g, *x.shape[3:])) for x in qkv[1:])
    if mask is not None and mask.rank > 2:
        lead = (1,) * (5 - mask.rank) + mask.shape[:-2]
        if lead[1:] not in ((1, 1), (g, r)):
            return f"the mask is {mask.type}"
        mask = at.op.reshape(mask, shape=(lead[0], lead[1] * lead[2], *mask.shape[-2:]))
    out = at.op.attention(q, k, v, mask, **attrs)
    return at.op.reshape(out, shape=(b, g, r, s, e))


def _unrepeated(v: Value | None, at: At) -> Value | None:
    """`x [B,G,T,D]` where `v [B,G*R,T,D]` repeats each of its groups R times."""
    flat = at.by(v, "reshape")
    wide = at.by(flat.inputs[0], "expand") if flat is not None else None
    if flat is None or wide is None or wide.inputs[0] is None or wide.output.rank != 5:
        return None
    b, g, r, t, d = wide.output.shape
    if flat.output.shape != (b, g * r, t, d) or wide.inputs[0].shape != (b, g, 1, t, d):
        return None
    thin = at.by(wide.inputs[0], "reshape")
    if thin is not None and thin.inputs[0] is not None and thin.inputs[0].shape == (b, g, t, d):
        return thin.inputs[0]
    return at.op.reshape(wide.inputs[0], shape=(b, g, t, d))


def _grouped(e: Example) -> Value:
    q, k, v = e.x("f32[2,6,4,8]"), e.x("f32[2,2,5,8]"), e.x("f32[2,2,5,8]")

    def repeated(x: Value) -> Value:
        wide = e.expand(e.reshape(x, shape=(2, 2, 1, 5, 8)), shape=(2, 2, 3, 5, 8))
        return e.reshape(wide, shape=(2, 6, 5, 8))

    return e.attention(q, repeated(k), repeated(v), scale=0.3, causal=False, softcap=0.0)


@rule("attention", examples=(_grouped,))
def group_queries(n: Node, at: At) -> Outcome:
    """attention(q, repeat(k), repeat(v)) = attention(q, k, v): the op knows groups of queries"""
    k, v = _unrepeated(n.inputs[1], at), _unrepeated(n.inputs[2], at)
    if k is None or v is None:
        return None
    if k.shape[:3] != v.shape[:3]:
        return "keys and values are repeated differently"
    return at.op.emit(n.op, (n.inputs[0], k, v, *n.inputs[3:]), dict(n.attrs))


def _scaled_query(e: Example) -> Value:
    q, k, v = e.x("f32[2,3,4,8]"), e.x("f32[2,3,5,8]"), e.x("f32[2,3,5,8]")
    return e.attention(e.mul(q, 0.5), k, v, scale=0.3, causal=False, softcap=0.0)


@rule("attention", examples=(_scaled_query,))
def scale_into_attention(n: Node, at: At) -> Outcome:
    """attention(q * c, k, v, scale) = attention(q, k, v, scale * c)"""
    q, c = _factor(n.inputs[0], at)
    k, d = _factor(n.inputs[1], at)
    if (c == 1 and d == 1) or q is None or k is None:
        return None
    if not at.only_use(n.inputs[0]) and c != 1:
        return "the scaled query is used elsewhere too"
    return at.op.emit(n.op, (q, k, *n.inputs[2:]), {**n.attrs, "scale": n.attrs["scale"] * c * d})


RULES: tuple[Rule, ...] = (fuse_attention, group_queries, scale_into_attention)
