"""Reductions: inside a vector loop as loops over vectors of accumulators, elsewhere vectorized over the reduced axis.

Directly nested Reduces of one function share accumulators; neighbouring lets over one axis share their loop inside a
vector loop; a row that is stored and then reduced is walked once. Vectorizing over the reduced axis re-associates sums:
partial sums per lane, several vectors of them, then added pairwise; the result depends on the instruction set, but not
on threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vivace.base.dims import Dim, bounds
from vivace.base.dtypes import DType
from vivace.loops.analysis import varies, widest_bits
from vivace.loops.kernel import Binary, Cast, Expr, Reduce, Store, dtype_of
from vivace.targets.cpu.arithmetic import binary, extreme
from vivace.targets.cpu.builder import Builder, Value, literal, type_bits
from vivace.targets.cpu.env import Env, scalar
from vivace.targets.cpu.isa import has_masks
from vivace.targets.cpu.lanes import tail_mask
from vivace.targets.cpu.memory import register_type, store

Emit = Callable[[Env, Expr], Value]

_UNROLL_LIMIT = 9  # a 3x3 window is written out; more would cost compile time
_ACCUMULATORS = 4  # vectors of partial results: enough to hide the latency of an addition


def identity(fn: str, t: DType) -> Value:
    """The start value of a reduction. For max and min of integers the least and greatest number."""
    kind = register_type(t)
    if fn in ("add", "mul"):
        return literal(0 if fn == "add" else 1, kind)
    if t.is_float:
        return literal(float("inf") if fn == "min" else float("-inf"), kind)
    if t is DType.bool:
        return literal(fn == "min", "i1")
    bits = type_bits(kind)
    lo, hi = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if t.is_signed else (0, (1 << bits) - 1)
    return literal(hi if fn == "min" else lo, kind)


def combine(env: Env, fn: str, total: Value, x: Value, t: DType) -> Value:
    """One step of a reduction."""
    if t is DType.bool and fn in ("add", "mul"):
        return env.b.op("or" if fn == "add" else "and", total, x)
    if fn == "maxnum" and t.is_float:  # one instruction: `total` is no NaN
        return env.b.select(env.b.compare("fcmp ogt", x, total), x, total)
    if fn in ("max", "min", "maxnum"):
        return extreme(env.b, fn.removesuffix("num"), x, total, t)
    return binary(env.b, fn, total, x, t)


def _accumulate(env: Env, emit: Emit, fn: str, total: Value, x: Expr, t: DType) -> Value:
    if fn == "add" and t.is_float and isinstance(x, Binary) and x.fn == "mul":
        return env.b.fma(emit(env, x.a), emit(env, x.b), total)
    return combine(env, fn, total, emit(env, x), t)


def reduce(env: Env, e: Reduce, emit: Emit) -> Value:
    """The value of a Reduce; `emit` gives the value of the reduced expression."""
    t, axes, x = dtype_of(e), [(e.var, e.extent)], e.x
    while isinstance(x, Reduce) and x.fn == e.fn:
        axes.append((x.var, x.extent))
        x = x.x
    varying = {name for name, v in (*env.symbols.items(), *env.names.items()) if v.lanes}
    if env.lane is not None and varies(e, varying | {env.lane}):
        start = env.b.widen(identity(e.fn, t), env.lanes)
        return _nest(env, emit, e.fn, axes, x, t, [start], scalar_context=False)[0]
    outer = env.at(lane="", lanes=0)
    if env.plain:
        return _nest(outer, emit, e.fn, axes, x, t, [identity(e.fn, t)], scalar_context=False)[0]
    partial = _nest(outer, emit, e.fn, axes, x, t, None, scalar_context=True)
    result: Value | None = None
    for p in partial:
        one = _horizontal(env, e.fn, p, t)
        result = one if result is None else combine(env, e.fn, result, one, t)
    assert result is not None
    return result


def reduce_stored(env: Env, s: Store, e: Reduce, emit: Emit) -> Value:
    """Store the values of a row and reduce them on the way; `e` reduces what `s` stores, or rounds to store."""
    value = s.value.x if isinstance(s.value, Cast) and s.value.x == e.x else s.value
    whole = Cast(dtype_of(e), e.x)  # as one value, also where it is a product

    def through(at: Env, x: Expr) -> Value:
        if x is not whole:
            return emit(at, x)
        v = at.b.widen(emit(at, value), at.lanes)
        store(at, s.buffer, s.index, v)
        return v

    return reduce(env, replace(e, x=whole), through)


def reduce_together(env: Env, es: Sequence[Reduce], emit: Emit) -> list[Value] | None:
    """The values of several Reduces over one axis, in one loop, so that what they share is loaded once.

    None where they would not be computed lane by lane: over the reduced axis, each is better off alone.
    """
    varying = {name for name, v in (*env.symbols.items(), *env.names.items()) if v.lanes}
    if env.lane is None or not all(varies(e, varying | {env.lane}) and not isinstance(e.x, Reduce) for e in es):
        return None
    starts = [env.b.widen(identity(e.fn, dtype_of(e)), env.lanes) for e in es]

    def body(i: Value, carried: list[Value]) -> list[Value]:
        inside = env.at({es[0].var: i})
        return [_accumulate(inside, emit, e.fn, c, e.x, dtype_of(e)) for e, c in zip(es, carried, strict=True)]

    return env.b.loop(literal(0, "i64"), scalar(env, es[0].extent), 1, body, starts)


def _widths(env: Env, extent: Dim, x: Expr, var: str) -> tuple[int, int]:
    """Lanes of one vector, and of the unrolled vector (0: none), for a reduction over `var`."""
    lanes = env.b.isa.vector_bits // max(widest_bits(x, {var}), 8)
    hi = bounds(extent)[1]
    while hi is not None and lanes > 1 and lanes // 2 >= hi:
        lanes //= 2
    many = lanes * _ACCUMULATORS
    if hi is not None and hi < many:
        many = 0
    return lanes, many


def _nest(
    env: Env,
    emit: Emit,
    fn: str,
    axes: list[tuple[str, Dim]],
    x: Expr,
    t: DType,
    totals: list[Value] | None,
    scalar_context: bool,
) -> list[Value]:
    if totals is None:
        var, extent = axes[-1]
        lanes, many = _widths(env, extent, x, var)
        start = identity(fn, t)
        totals = [env.b.widen(start, n) for n in dict.fromkeys((many, lanes)) if n > 1]
        if not has_masks(env.b.isa) or not totals:
            totals.append(start)
    (var, extent), rest = axes[0], axes[1:]
    if scalar_context and not rest:
        return _vectorized(env, emit, fn, var, extent, x, t, totals)
    n = extent if isinstance(extent, int) else -1
    n_inner = 1
    for _, inner in rest:
        n_inner *= inner if isinstance(inner, int) else _UNROLL_LIMIT + 1

    def body(i: Value, carried: list[Value]) -> list[Value]:
        inside = env.at({var: i})
        if rest:
            return _nest(inside, emit, fn, rest, x, t, carried, scalar_context)
        return [_accumulate(inside, emit, fn, carried[0], x, t)]

    if 0 <= n <= _UNROLL_LIMIT and n * n_inner <= _UNROLL_LIMIT and not scalar_context:
        for k in range(n):
            totals = body(literal(k, "i64"), totals)
        return totals
    return env.b.loop(literal(0, "i64"), scalar(env, extent), 1, body, totals)


def _vectorized(
    env: Env, emit: Emit, fn: str, var: str, extent: Dim, x: Expr, t: DType, totals: list[Value]
) -> list[Value]:
    """The innermost reduced axis, its values spread over the lanes; one accumulator per width in `totals`."""
    b, n = env.b, scalar(env, extent)
    start = literal(0, "i64")
    results = []
    for k, total in enumerate(totals):
        lanes = total.lanes
        last = k == len(totals) - 1
        masked = last and lanes > 0 and has_masks(b.isa)

        def body(i: Value, carried: list[Value], lanes: int = lanes, masked: bool = masked) -> list[Value]:
            if not lanes:
                return [_accumulate(env.at({var: i}), emit, fn, carried[0], x, t)]
            if not masked:
                return [_accumulate(env.at({var: i}, lane=var, lanes=lanes), emit, fn, carried[0], x, t)]
            mask = tail_mask(b, i, n, lanes)
            value = _accumulate(env.at({var: i}, lane=var, lanes=lanes, mask=mask), emit, fn, carried[0], x, t)
            return [b.select(mask, value, carried[0])]

        if last:
            stop, step = n, max(lanes, 1)
        else:
            step = lanes
            stop = _rounded_down(b, start, n, lanes)
        results += b.loop(start, stop, step, body, [total])
        start = stop
    return results


def _rounded_down(b: Builder, start: Value, n: Value, lanes: int) -> Value:
    """The greatest start + k*lanes <= n."""
    if isinstance(n.const, int) and isinstance(start.const, int):
        return literal(start.const + (n.const - start.const) // lanes * lanes, "i64")
    return b.op("and", n, literal(-lanes, "i64"))


def _horizontal(env: Env, fn: str, v: Value, t: DType) -> Value:
    """All lanes combined, halving the vector each time."""
    b = env.b
    while v.lanes > 1:
        half = v.lanes // 2
        v = combine(env, fn, b.part(v, 0, half), b.part(v, half, half), t)
    return b.inst(f"extractelement {v}, i64 0", v.type, 0, v) if v.lanes else v
