"""Identities: nodes that change nothing, and pairs that cancel or are one op in two steps. All are exact, for NaN and
-0 too."""

from __future__ import annotations

import math

import numpy as np

from vivace.base.dtypes import DType
from vivace.base.errors import GraphError
from vivace.graph.graph import Node, Value
from vivace.graph.ops.shapes import broadcast
from vivace.graph.rewrite import At, Outcome, Rule, rule, scalar


def _filled(v: Value | None, number: float) -> bool:
    if v is None or v.data is None or not v.data.size or v.data.dtype == object:
        return False
    return bool(np.all(v.data == number))


@rule(
    "mul", "div", "pow",
    examples=(lambda e: e.exp(e.mul(e.x("f32[2,4]"), 1)), lambda e: e.neg(e.div(e.x("i64[4]"), 1))),
)  # fmt: skip
def drop_one(n: Node, at: At) -> Outcome:
    """x * 1 = x / 1 = x ^ 1 = x"""
    x, c = n.inputs
    assert x is not None
    if not _filled(c, 1):
        return None
    return x if x.type == n.output.type else "the constant widens the result"


@rule("add", "sub", "or", "bitor", "xor", "bitxor", "shl", "shr", examples=(lambda e: e.neg(e.add(e.x("i64[4]"), 0)),))
def drop_zero(n: Node, at: At) -> Outcome:
    """x + 0 = x for integers (for floats -0 + 0 is 0); x + (-0.0) = x - 0.0 = x"""
    x, c = n.inputs
    assert x is not None
    if not _filled(c, 0):
        return None
    if x.dtype.is_float:
        assert c is not None and c.data is not None
        if bool(np.all(np.signbit(c.data))) is not (n.op.name == "add"):
            return "-0.0 + 0.0 is 0.0"
    return x if x.type == n.output.type else "the constant widens the result"


@rule("mul", examples=(lambda e: e.neg(e.mul(e.x("i64[4]"), 0)),))
def multiply_by_zero(n: Node, at: At) -> Outcome:
    """x * 0 = 0 for integers (a float may be NaN or infinite)"""
    x, c = n.inputs
    if x is None or not x.dtype.is_int or not _filled(c, 0) or not n.output.type.is_static:
        return None
    zeros = np.zeros((), x.dtype.numpy)
    return at.op.expand(at.const(zeros), shape=n.output.shape) if n.output.rank else at.const(zeros)


@rule("mul", examples=(lambda e: e.mul(e.x("f32[2,4]"), -1),))
def multiply_by_minus_one(n: Node, at: At) -> Outcome:
    """x * -1 = -x"""
    x, c = n.inputs
    assert x is not None
    return at.op.neg(x) if x.dtype.is_signed and _filled(c, -1) and x.type == n.output.type else None


@rule("pow", examples=(lambda e: e.pow(e.x("f32[2,4]"), 2),))
def square(n: Node, at: At) -> Outcome:
    """x ^ 2 = x * x"""
    x, c = n.inputs
    return at.op.mul(x, x) if scalar(c) == 2 and x is not None and x.type == n.output.type else None


TWICE_IS_NONE = ("neg", "not", "bitnot")
TWICE_IS_ONCE = ("abs", "relu", "floor", "ceil", "round", "sign")


@rule(*TWICE_IS_NONE, examples=(lambda e: e.exp(e.neg(e.neg(e.x("f32[4]")))),))
def cancel_twice(n: Node, at: At) -> Outcome:
    """-(-x) = x, not(not x) = x"""
    m = at.by(n.inputs[0], n.op.name)
    return m.inputs[0] if m else None


@rule(*TWICE_IS_ONCE, examples=(lambda e: e.relu(e.relu(e.x("f32[4]"))),))
def once_is_enough(n: Node, at: At) -> Outcome:
    """f(f(x)) = f(x) for abs, relu, floor, ceil, round, sign"""
    return n.inputs[0] if at.by(n.inputs[0], n.op.name) else None


_SMALL = {DType.i8, DType.i16, DType.u8, DType.u16, DType.bool}
_EXACT_IN = {
    DType.f64: {DType.f32, DType.f16, DType.bf16, DType.i32, DType.u32, *_SMALL},
    DType.f32: {DType.f16, DType.bf16, *_SMALL},
    DType.i64: {DType.i32, DType.u32, *_SMALL},
    DType.i32: _SMALL,
}


@rule(
    "cast",
    examples=(
        lambda e: e.exp(e.cast(e.x("f32[4]"), to=DType.f32)),
        lambda e: e.cast(e.cast(e.x("i32[4]"), to=DType.i64), to=DType.f32),
        lambda e: e.exp(e.cast(e.cast(e.x("f32[4]"), to=DType.f64), to=DType.f32)),
    ),
)
def join_casts(n: Node, at: At) -> Outcome:
    """cast(x, its dtype) = x; cast(cast(x, wide), to) = cast(x, to) where `wide` holds every x exactly"""
    x, to = n.inputs[0], n.attrs["to"]
    assert x is not None
    if x.dtype is to:
        return x
    m = at.by(x, "cast")
    if m is None or m.inputs[0] is None:
        return None
    if m.inputs[0].dtype not in _EXACT_IN.get(x.dtype, ()):
        return f"{x.dtype} does not hold every {m.inputs[0].dtype}"
    return at.op.cast(m.inputs[0], to=to)


@rule(
    "not",
    examples=(
        lambda e: e.not_(e.eq(e.x("f32[4]"), e.x("f32[4]"))),
        lambda e: e.not_(e.lt(e.x("i32[4]"), e.x("i32[4]"))),
    ),
)
def negate_comparison(n: Node, at: At) -> Outcome:
    """not(a == b) = a != b; for integers also not(a < b) = a >= b (a NaN compares false both ways)"""
    m = at.by(n.inputs[0], "eq", "ne", "lt", "le", "gt", "ge")
    if m is None or not at.only_use(m.output):
        return None
    a, b = m.inputs
    assert a is not None
    opposite = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}[m.op.name]
    if a.dtype.is_float and opposite not in ("eq", "ne"):
        return "a NaN compares false both ways"
    return getattr(at.op, opposite)(a, b)


def _bounds(n: Node) -> tuple[float, float] | None:
    """The interval that a node clips to."""
    if n.op.name == "relu":
        return 0.0, math.inf
    if n.op.name == "clip":
        low, high = n.attrs.get("min"), n.attrs.get("max")
        return (-math.inf if low is None else low, math.inf if high is None else high)
    c = scalar(n.inputs[1]) if len(n.inputs) > 1 else None
    if c is None or (isinstance(c, float) and math.isnan(c)):
        return None
    return (float(c), math.inf) if n.op.name == "max" else (-math.inf, float(c))


CLIPPING = ("relu", "clip", "max", "min")


@rule(
    *CLIPPING,
    examples=(
        lambda e: e.min(e.max(e.x("f32[4]"), -1), 1),
        lambda e: e.clip(e.relu(e.x("f32[4]")), min=-1.0, max=6.0),
        lambda e: e.relu(e.clip(e.x("f32[4]"), min=-1.0, max=None)),
        lambda e: e.max(e.x("f32[4]"), 0),
    ),
)
def join_clips(n: Node, at: At) -> Outcome:
    """max(x, 0) = relu(x); min(max(x, a), b) = clip(x, a, b); clips of clips are one clip"""
    x = n.inputs[0]
    assert x is not None
    outer = _bounds(n)
    if outer is None or x.type != n.output.type or not x.dtype.is_float:
        return None
    m = at.by(x, *CLIPPING)
    joins = m is not None and m.inputs[0] is not None and m.inputs[0].type == x.type and at.only_use(x)
    inner = _bounds(m) if m is not None and joins else None
    if inner is not None and m is not None:
        # the outer bounds win where the intervals do not meet: clip(clip(x, a, b), c, d) stays inside [c, d]
        low, high = (min(max(v, outer[0]), outer[1]) for v in inner)
        x = m.inputs[0]
    elif n.op.name == "relu" or (n.op.name == "clip" and outer != (0.0, math.inf)):
        return None
    else:
        low, high = outer
    if (low, high) == (0.0, math.inf):
        return at.op.relu(x)
    if (low, high) == (-math.inf, math.inf):
        return x
    return at.op.clip(x, min=None if low == -math.inf else low, max=None if high == math.inf else high)


BROADCASTING = (
    "add", "sub", "mul", "div", "pow", "max", "min", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "mod",
    "where",
)  # fmt: skip


@rule(
    *BROADCASTING,
    examples=(
        lambda e: e.add(e.expand(e.x("f32[1,4]"), shape=(3, 4)), e.x("f32[3,4]")),
        lambda e: e.where(e.expand(e.x("bool[1,4]"), shape=(3, 4)), e.x("f32[3,4]"), e.x("f32[3,1]")),
    ),
)
def broadcast_by_the_reader(n: Node, at: At) -> Outcome:
    """expand(x, s) + y = x + y where y has the result's shape"""
    ins = list(n.inputs)
    changed = False
    for i, v in enumerate(ins):
        m = at.by(v, "expand")
        if m is None:
            continue
        tried = [*ins[:i], m.inputs[0], *ins[i + 1 :]]
        try:
            fits = broadcast([u.shape for u in tried if u is not None], n.op.name) == n.output.shape
        except GraphError:
            fits = False
        if fits:
            ins, changed = tried, True
    return at.op.emit(n.op, ins, dict(n.attrs)) if changed else None


@rule(
    *(f"reduce_{k}" for k in ("sum", "max", "min", "prod", "mean")),
    examples=(lambda e: e.exp(e.reduce_mean(e.x("f32[2,1,3]"), axes=(1,), keepdims=True)),),
)
def reduce_nothing(n: Node, at: At) -> Outcome:
    """a reduction over axes of extent 1 is a reshape, or nothing"""
    x = n.inputs[0]
    assert x is not None
    if any(x.shape[a] != 1 for a in n.attrs["axes"]):
        return None
    return x if x.type == n.output.type else at.op.reshape(x, shape=n.output.shape)


RULES: tuple[Rule, ...] = (
    drop_one,
    drop_zero,
    multiply_by_zero,
    multiply_by_minus_one,
    square,
    cancel_twice,
    once_is_enough,
    join_casts,
    negate_comparison,
    join_clips,
    broadcast_by_the_reader,
    reduce_nothing,
)
