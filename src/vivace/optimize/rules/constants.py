"""Constants: computed at compile time, moved together, kept on the right side; conditions that are known are
followed."""

from __future__ import annotations

import numpy as np

from vivace.base.dims import Dim, Expr, symbols
from vivace.base.dtypes import DType
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Node, Type, Value
from vivace.graph.ops.control import narrower
from vivace.graph.pattern import COMMUTATIVE
from vivace.graph.rewrite import At, Example, Outcome, Rule, rule, scalar, splice

GROWTH, FREE_BYTES = 4, 64 << 10
"""A folded constant may hold four times its operands (u8 weights become f32) and 64 KiB for nothing: no huge `expand`
or `iota`."""


def _is_symbolic(attr: object) -> bool:
    if isinstance(attr, tuple):
        return any(map(_is_symbolic, attr))
    return isinstance(attr, Expr) or (isinstance(attr, Type) and not attr.is_static)


def _bytes(v: Value) -> Dim:
    return v.type.bytes


@rule(
    "*",
    examples=(
        lambda e: e.add(e.x("f32[4]"), e.exp(e.w("f32[4]"))),
        lambda e: e.mul(e.x("i64[3]"), e.iota(shape=(3,), axis=0, dtype=DType.i64)),
    ),
)
def fold_constant(n: Node, at: At) -> Outcome:
    """f(constants) is computed at compile time, unless the result is much larger than its operands."""
    if any(v is not None and v.data is None for v in n.inputs):
        return None
    if n.op.name in ("onnx", "loop", "dequantize") or any(isinstance(a, Graph) for a in n.attrs.values()):
        return None
    if any(map(_is_symbolic, n.attrs.values())) or not all(v.type.is_static for v in n.outputs):
        return "its attributes are symbolic"
    room = FREE_BYTES + GROWTH * sum(v.data.nbytes for v in n.inputs if v is not None and v.data is not None)
    size = sum(v.type.bytes for v in n.outputs if isinstance(v.type.bytes, int))
    if size > room:
        return f"the result has {size} bytes, more than {room}"
    arrays = n.op.evaluate([None if v is None else v.data for v in n.inputs], n.attrs)
    return tuple(
        at.const(np.ascontiguousarray(a).astype(v.dtype.numpy, copy=False).reshape(a.shape), v.name)
        for a, v in zip(arrays, n.outputs)
    )


def _if_example(e: Example) -> Value:
    x = e.x("f32[4]")
    branches = []
    for op in ("neg", "exp"):
        b = Builder()
        branches.append(b.finish([getattr(b, op)(b.input("x", x.type))], op))
    return e.if_(e.const(np.bool_(True)), x, then=branches[0], **{"else": branches[1]})


@rule("if", examples=(_if_example,))
def follow_known_condition(n: Node, at: At) -> Outcome:
    """if(true, ...) = its `then` graph in place"""
    known = scalar(n.inputs[0])
    if known is None:
        return "the condition is not constant"
    branch: Graph = n.attrs["then" if known else "else"]
    outer = {s.name: s for v in n.inputs if v is not None for d in v.shape for s in symbols(d)}
    if narrower(branch, outer):
        return "the branch is meant for fewer sizes"
    return splice(at, branch, [v for v in n.inputs[1:] if v is not None])


@rule(*sorted(COMMUTATIVE), examples=(lambda e: e.add(e.w("f32[4]"), e.x("f32[2,4]")),))
def constant_to_the_right(n: Node, at: At) -> Outcome:
    """c + x = x + c, for every commutative op"""
    a, b = n.inputs
    if a is None or b is None or a.data is None or b.data is not None:
        return None
    return at.op.emit(n.op, (b, a), dict(n.attrs))


@rule("sub", examples=(lambda e: e.sub(e.x("f32[2,4]"), e.w("f32[4]")),))
def subtract_as_add(n: Node, at: At) -> Outcome:
    """x - c = x + (-c), exactly"""
    x, c = n.inputs
    if x is None or c is None or c.data is None or x.data is not None or not c.dtype.is_signed:
        return None
    return at.op.add(x, at.const(-c.data))


@rule("div", examples=(lambda e: e.div(e.x("f32[2,4]"), e.const(np.float32(8))),))
def divide_as_multiply(n: Node, at: At) -> Outcome:
    """x / c = x * (1 / c) where c holds powers of two: exact"""
    x, c = n.inputs
    if x is None or c is None or c.data is None or x.data is not None or c.dtype not in (DType.f32, DType.f64):
        return None
    mantissa, exponent = np.frexp(c.data)
    limit = 100 if c.dtype is DType.f32 else 1000
    if not np.all(np.abs(mantissa) == 0.5) or np.any(np.abs(exponent) > limit):
        return "the divisor is not a power of two"
    return at.op.mul(x, at.const(1 / c.data))


@rule(
    "add", "mul",
    examples=(
        lambda e: e.add(e.add(e.x("f32[2,4]"), e.w("f32[4]")), e.w("f32[2,4]")),
        lambda e: e.mul(e.mul(e.x("f32[2,4]"), e.w("f32[4]")), e.w("f32[1]")),
    ),
)  # fmt: skip
def join_constants(n: Node, at: At) -> Outcome:
    """(x + c) + d = x + (c + d); (x * c) * d = x * (c * d): one rounding fewer"""
    inner, d = n.inputs
    m = at.by(inner, n.op.name)
    if d is None or d.data is None or m is None:
        return None
    x, c = m.inputs
    if c is None or x is None or c.data is None or x.data is not None:
        return None
    if not at.only_use(inner):
        return f"%{m.output.name} is used elsewhere too"
    joined = (np.add if n.op.name == "add" else np.multiply)(c.data, d.data)
    if joined.nbytes > max(c.data.nbytes, d.data.nbytes):
        return "the joined constant would be larger than both"
    if c.dtype.is_float:
        wide = np.abs(joined.astype(np.float64))
        zero = (c.data == 0) | (d.data == 0) if n.op.name == "mul" else wide == 0
        if not np.all(np.isfinite(wide)) or np.any((wide < 1e-30) & ~zero):
            return "the joined constant would overflow or underflow"
    result = at.op.emit(n.op, (x, at.const(joined.astype(c.dtype.numpy))), {})
    return result if result[0].type == n.output.type else "the constants widen the result"


@rule("where", examples=(lambda e: e.where(e.const(np.array([True, True])), e.x("f32[2]"), e.x("f32[3,2]")),))
def choose_known(n: Node, at: At) -> Outcome:
    """where(true, a, b) = a; where(c, a, a) = a"""
    cond, a, b = n.inputs
    wide = at.by(cond, "expand", "reshape")
    cond = wide.inputs[0] if wide is not None else cond
    assert cond is not None and a is not None and b is not None
    if a is b:
        kept = a
    elif cond.data is not None and cond.data.size and cond.data.min() == cond.data.max():
        kept = a if cond.data.flat[0] else b
    else:
        return None
    return kept if kept.type == n.output.type else at.op.expand(kept, shape=n.output.shape)


@rule("where", examples=(lambda e: e.where(e.not_(e.x("bool[4]")), e.x("f32[4]"), e.x("f32[4]")),))
def choose_by_the_opposite(n: Node, at: At) -> Outcome:
    """where(not c, a, b) = where(c, b, a)"""
    m = at.by(n.inputs[0], "not")
    return at.op.where(m.inputs[0], n.inputs[2], n.inputs[1]) if m else None


RULES: tuple[Rule, ...] = (
    fold_constant,
    follow_known_condition,
    constant_to_the_right,
    subtract_as_add,
    divide_as_multiply,
    join_constants,
    choose_known,
    choose_by_the_opposite,
)
