"""What names mean where an expression is emitted: loop variables, dims, lets, buffers, the vector lane, the mask.

A dim becomes a `LaneDim`: a scalar base, and a vector of what each lane adds to it. A dim that does not vary over the
lanes has no vector part. The vector part is kept in i32 where its magnitude is known to fit, because gathers and
comparisons of i32 cost half; it is i64 otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vivace.base.dims import Apply, Dim, Expr, Symbol, bounds, linear, symbols
from vivace.base.errors import InternalError
from vivace.loops.kernel import Buffer
from vivace.loops.kernel import Expr as LoopExpr
from vivace.targets.cpu.builder import Builder, Value, literal

_I32_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class LaneDim:
    """`base + vector[lane]`; `limit` bounds the magnitude of an i32 vector."""

    base: Value
    vector: Value | None = None
    limit: int = 0


@dataclass(frozen=True, slots=True)
class Env:
    """The context of an expression; `at` makes the context of an inner loop.

    `symbols` maps loop variables, run-time dims and integer lets to i64 values (vectors where they vary over the
    lanes). `names` maps lets, and what the context supplies such as `acc`, to values. When `lane` is a name, `lanes`
    consecutive values of it are computed at once, the first being `symbols[lane]`; `mask` says which of them count
    (None: all). `invariant` holds the buffers that nothing writes while the function runs. `plain` forbids to vectorize
    over reduced axes. `given` holds loads and reductions whose values are known already.
    """

    b: Builder
    symbols: dict[str, Value] = field(default_factory=dict)
    names: dict[str, Value] = field(default_factory=dict)
    buffers: dict[Buffer, Value] = field(default_factory=dict)
    invariant: frozenset[Buffer] = frozenset()
    lane: str | None = None
    lanes: int = 0
    mask: Value | None = None
    plain: bool = False
    given: dict[LoopExpr, Value] = field(default_factory=dict)

    def at(
        self,
        symbols: dict[str, Value] | None = None,
        lane: str | None = None,
        lanes: int = 0,
        mask: Value | None = None,
        plain: bool | None = None,
    ) -> Env:
        """An inner context that inherits names; a new lane replaces the mask as well."""
        inner = replace(self, symbols={**self.symbols, **(symbols or {})}, names=dict(self.names))
        if lane is not None:
            inner = replace(inner, lane=lane if lanes else None, lanes=lanes, mask=mask)
        return inner if plain is None else replace(inner, plain=plain)

    def masked(self, cond: Value) -> Env:
        """The context where a condition over the lanes holds as well."""
        mask = cond if self.mask is None else self.b.op("and", self.mask, cond)
        return replace(self, symbols=dict(self.symbols), names=dict(self.names), mask=self.b.widen(mask, self.lanes))


def is_uniform(env: Env, d: Dim) -> bool:
    """Whether a dim is the same in all lanes."""
    if env.lane is None:
        return True
    return all(s.name != env.lane and not _symbol(env, s.name).lanes for s in symbols(d))


def lane_stride(env: Env, d: Dim) -> int | Dim | None:
    """What one lane adds to a dim: 0 where it is uniform, None where it is not linear."""
    if is_uniform(env, d):
        return 0
    assert env.lane is not None
    parts = linear(d, env.lane)
    if parts is None or not is_uniform(env, parts[0]) or not is_uniform(env, parts[1]):
        return None
    return parts[0]


def _symbol(env: Env, name: str) -> Value:
    try:
        return env.symbols[name]
    except KeyError:
        raise InternalError(
            f"symbol {name} has no value here", where=env.b.name, expected=f"one of {', '.join(env.symbols)}"
        ) from None


def scalar(env: Env, d: Dim) -> Value:
    """The value of a dim as an i64; the lane symbol stands for its first lane."""
    if not isinstance(d, Expr):
        return literal(d, "i64")
    total = literal(0, "i64")
    for _, term in sorted_terms(env, d):
        total = env.b.iadd(total, term)
    return total


def sorted_terms(env: Env, d: Dim) -> list[tuple[int, Value]]:
    """The terms of a polynomial with their levels, outermost first, so that sums of invariant terms stay outside
    loops."""
    if not isinstance(d, Expr):
        return [(0, literal(d, "i64"))] if d else []
    values = []
    for monomial, coefficient in d.terms:
        product = literal(coefficient, "i64")
        for factor in sorted((_atom(env, a) for a in monomial), key=lambda v: v.level):
            product = env.b.imul(product, factor)
        values.append((product.level, product))
    return sorted(values, key=lambda t: (t[0], t[1].text))


def _atom(env: Env, a: Symbol | Apply) -> Value:
    if isinstance(a, Symbol):
        return _symbol(env, a.name)
    x, y = scalar(env, a.a), scalar(env, a.b)
    if a.fn in ("min", "max"):
        return env.b.call(f"llvm.s{a.fn}", x, y)
    q = _floordiv(env, x, y, a)
    return q if a.fn == "//" else env.b.op("sub nsw", x, env.b.imul(q, y))


def _floordiv(env: Env, x: Value, y: Value, a: Apply) -> Value:
    """Python's `//` of scalars or vectors; the divisor is made at least 1 (rule SPECULATE of the builder)."""
    b = env.b
    d = y.const
    if isinstance(d, int) and d > 0 and d & (d - 1) == 0:
        return x if d == 1 else b.op("ashr", x, literal(d.bit_length() - 1, x.type))
    if not isinstance(d, int):
        y = b.call("llvm.smax", y, literal(1, y.type))
    lo = bounds(a.a)[0]
    if lo is not None and lo >= 0:
        return b.op("udiv", x, y)
    q = b.op("sdiv", x, y)
    r = b.op("sub nsw", x, b.op("mul nsw", q, y))
    negative = b.compare("icmp slt", r, literal(0, x.type))
    return b.op("add nsw", q, b.convert("sext", negative, x.type))


def per_lane(env: Env, d: Dim) -> LaneDim:
    """The value of a dim in each lane."""
    if is_uniform(env, d):
        return LaneDim(scalar(env, d))
    assert isinstance(d, Expr)
    total = LaneDim(literal(0, "i64"))
    for monomial, coefficient in d.terms:
        product = LaneDim(literal(coefficient, "i64"))
        for a in monomial:
            product = _times(env, product, _lane_atom(env, a))
        total = _plus(env, total, product)
    return total


def as_vector(env: Env, x: LaneDim, t: str = "i64") -> Value:
    """All lanes of a dim as one vector."""
    b = env.b
    base = x.base if t == x.base.type else b.convert("trunc", x.base, t)
    if x.vector is None:
        return b.widen(base, env.lanes)
    vector = x.vector
    if vector.type != t:
        vector = b.convert("sext" if t == "i64" else "trunc", vector, t)
    return b.iadd(vector, base) if t == "i64" else b.op("add", vector, base)


def _widened(env: Env, x: LaneDim) -> LaneDim:
    """With the vector part in i64."""
    if x.vector is None or x.vector.type == "i64":
        return x
    return LaneDim(x.base, env.b.convert("sext", x.vector, "i64"))


def _plus(env: Env, x: LaneDim, y: LaneDim) -> LaneDim:
    base = env.b.iadd(x.base, y.base)
    if x.vector is None or y.vector is None:
        known = x if y.vector is None else y
        return LaneDim(base, known.vector, known.limit)
    if x.vector.type != y.vector.type or x.limit + y.limit >= _I32_LIMIT:
        x, y = _widened(env, x), _widened(env, y)
    assert x.vector is not None and y.vector is not None
    return LaneDim(base, env.b.op("add", x.vector, y.vector), x.limit + y.limit)


def _times(env: Env, x: LaneDim, y: LaneDim) -> LaneDim:
    b = env.b
    if x.vector is not None and y.vector is not None:
        return LaneDim(literal(0, "i64"), b.op("mul", as_vector(env, x), as_vector(env, y)))
    if x.vector is None:
        x, y = y, x
    base = b.imul(x.base, y.base)
    if x.vector is None:
        return LaneDim(base)
    factor = y.base.const
    if x.vector.type == "i32" and isinstance(factor, int) and x.limit * abs(factor) < _I32_LIMIT:
        vector = x.vector if factor == 1 else b.op("mul", x.vector, literal(factor, "i32"))
        return LaneDim(base, vector, x.limit * abs(factor))
    wide = _widened(env, x)
    assert wide.vector is not None
    return LaneDim(base, b.imul(wide.vector, y.base))


def _lane_atom(env: Env, a: Symbol | Apply) -> LaneDim:
    b = env.b
    if isinstance(a, Symbol):
        value = _symbol(env, a.name)
        if a.name == env.lane:
            return LaneDim(value, b.lane_numbers(env.lanes, "i32"), env.lanes)
        return LaneDim(literal(0, "i64"), value) if value.lanes else LaneDim(value)
    x, y = per_lane(env, a.a), per_lane(env, a.b)
    if x.vector is None and y.vector is None:
        return LaneDim(_atom(env, a))
    if a.fn in ("min", "max"):
        return LaneDim(literal(0, "i64"), b.call(f"llvm.s{a.fn}", as_vector(env, x), as_vector(env, y)))
    q = _lane_floordiv(env, x, y, a)
    if a.fn == "//":
        return q
    return _plus(env, x, _times(env, LaneDim(literal(-1, "i64")), _times(env, q, y)))


def _lane_floordiv(env: Env, x: LaneDim, y: LaneDim, a: Apply) -> LaneDim:
    b, d = env.b, y.base.const
    small = isinstance(d, int) and d > 0 and y.vector is None and x.vector is not None and x.vector.type == "i32"
    if not small or x.limit + d >= _I32_LIMIT:  # type: ignore[operator]
        return LaneDim(literal(0, "i64"), _floordiv(env, as_vector(env, x), as_vector(env, y), a))
    # (base + v) // d == base // d + (base % d + v) // d, and the last needs 32 bits only.
    assert isinstance(d, int) and x.vector is not None
    q = _floordiv(env, x.base, y.base, a)
    r = b.convert("trunc", b.op("sub nsw", x.base, b.imul(q, y.base)), "i32")
    v = b.op("add", x.vector, r)
    # Lanes count up from zero unless a coefficient is negative: then shift by a multiple of d and back.
    shift = -(-x.limit // d)
    v = b.op("add", v, literal(shift * d, "i32"))
    v = b.op("sub", b.op("udiv", v, literal(d, "i32")), literal(shift, "i32"))
    return LaneDim(q, v, x.limit // d + 2)
