"""Integers that may be symbolic: tensor dims, index arithmetic of the loop IR, sizes and offsets.

A `Dim` is an `int` or an `Expr`. An `Expr` is a polynomial with integer coefficients over *atoms*: named symbols with
bounds, and `floordiv`, `mod`, `min`, `max` of other dims. Polynomials are kept in one canonical form, so two equal
polynomials compare equal and hash alike. Anything that becomes constant collapses to a plain `int`.

Rules:
* CANONICAL: build only through the operators and the functions here, never through the constructors of atoms.
* BOUNDS: a symbol's bounds are part of it; every other bound is derived. `None` means unbounded.
* EXACT: `floordiv` and `mod` follow Python (toward minus infinity). Divisors are assumed non-zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Union

from vivace.base.errors import ModelError

Dim = Union[int, "Expr"]
Bound = int | None


@dataclass(frozen=True, slots=True)
class Symbol:
    """A named integer with inclusive bounds."""

    name: str
    lo: Bound = 0
    hi: Bound = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Apply:
    """A non-polynomial function of two dims: fn is one of `//`, `%`, `min`, `max`."""

    fn: str
    a: Dim
    b: Dim

    def __str__(self) -> str:
        return f"{self.fn}({self.a}, {self.b})" if self.fn in ("min", "max") else f"({self.a}){self.fn}({self.b})"


Atom = Symbol | Apply
Monomial = tuple[Atom, ...]


def _order(atom: Atom) -> str:
    return atom.name if isinstance(atom, Symbol) else "~" + str(atom)


@dataclass(frozen=True, slots=True)
class Expr:
    """A non-constant polynomial: sorted `(monomial, coefficient)` pairs; the empty monomial is the constant term."""

    terms: tuple[tuple[Monomial, int], ...]

    def __add__(self, other: Dim) -> Dim:
        terms = dict(self.terms)
        for m, c in _terms(other):
            terms[m] = terms.get(m, 0) + c
        return _make(terms)

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return _make({m: -c for m, c in self.terms})

    def __sub__(self, other: Dim) -> Dim:
        return self + (-other)

    def __rsub__(self, other: Dim) -> Dim:
        return -self + other

    def __mul__(self, other: Dim) -> Dim:
        terms: dict[Monomial, int] = {}
        for m, c in self.terms:
            for n, d in _terms(other):
                key = tuple(sorted(m + n, key=_order))
                terms[key] = terms.get(key, 0) + c * d
        return _make(terms)

    __rmul__ = __mul__

    def __floordiv__(self, other: Dim) -> Dim:
        return floordiv(self, other)

    def __rfloordiv__(self, other: Dim) -> Dim:
        return floordiv(other, self)

    def __mod__(self, other: Dim) -> Dim:
        return mod(self, other)

    def __rmod__(self, other: Dim) -> Dim:
        return mod(other, self)

    def __str__(self) -> str:
        text = ""
        for m, c in self.terms:
            factors = ([str(abs(c))] if abs(c) != 1 or not m else []) + [str(a) for a in m]
            sign = "-" if c < 0 else "+" if text else ""
            text += sign + "*".join(factors)
        return text

    __repr__ = __str__


def _terms(d: Dim) -> tuple[tuple[Monomial, int], ...]:
    return d.terms if isinstance(d, Expr) else (((), int(d)),) if d else ()


def _make(terms: dict[Monomial, int]) -> Dim:
    kept = {m: c for m, c in terms.items() if c}
    if not kept:
        return 0
    if len(kept) == 1 and () in kept:
        return kept[()]
    # Highest degree first, the constant last: the order in which people write polynomials.
    return Expr(tuple(sorted(kept.items(), key=lambda t: (-len(t[0]), [_order(a) for a in t[0]]))))


def symbol(name: str, lo: Bound = 0, hi: Bound = None) -> Dim:
    """A symbolic integer, or a plain int when its bounds pin it."""
    if lo is not None and lo == hi:
        return lo
    return Expr((((Symbol(name, lo, hi),), 1),))


def as_symbol(d: Dim) -> Symbol | None:
    """The symbol that `d` is, if it is nothing but one symbol."""
    if isinstance(d, Expr) and len(d.terms) == 1:
        ((m, c),) = d.terms
        if c == 1 and len(m) == 1 and isinstance(m[0], Symbol):
            return m[0]
    return None


def bounds(d: Dim) -> tuple[Bound, Bound]:
    """Inclusive bounds of a dim, derived from those of its symbols."""
    if not isinstance(d, Expr):
        return int(d), int(d)
    lo: Bound = 0
    hi: Bound = 0
    for m, c in d.terms:
        tlo, thi = reduce(_mul_bounds, (_atom_bounds(a) for a in m), _exactly(c))
        lo = None if lo is None or tlo is None else lo + tlo
        hi = None if hi is None or thi is None else hi + thi
    return lo, hi


def _exactly(c: int) -> tuple[Bound, Bound]:
    return c, c


def _mul_bounds(x: tuple[Bound, Bound], y: tuple[Bound, Bound]) -> tuple[Bound, Bound]:
    def corner(p: float, q: float) -> float:
        return 0.0 if p == 0 or q == 0 else p * q

    def real(b: tuple[Bound, Bound]) -> tuple[float, float]:
        return (-math.inf if b[0] is None else b[0], math.inf if b[1] is None else b[1])

    if None not in x and None not in y:
        exact = [p * q for p in x for q in y]  # type: ignore[operator]
        return min(exact), max(exact)
    corners = [corner(p, q) for p in real(x) for q in real(y)]
    lo, hi = min(corners), max(corners)
    return (None if math.isinf(lo) else int(lo), None if math.isinf(hi) else int(hi))


def _atom_bounds(a: Atom) -> tuple[Bound, Bound]:
    if isinstance(a, Symbol):
        return a.lo, a.hi
    (alo, ahi), (blo, bhi) = bounds(a.a), bounds(a.b)
    if a.fn == "min":
        return (None if alo is None or blo is None else min(alo, blo), _least(ahi, bhi))
    if a.fn == "max":
        return (_greatest(alo, blo), None if ahi is None or bhi is None else max(ahi, bhi))
    if a.fn == "%":
        return (0, None if bhi is None else max(bhi - 1, 0)) if blo is not None and blo >= 0 else (None, None)
    if blo is None or blo <= 0:
        return None, None
    lo = None if alo is None else alo // blo if alo < 0 else 0 if bhi is None else alo // bhi
    hi = None if ahi is None else ahi // blo if ahi >= 0 else -1 if bhi is None else ahi // bhi
    return lo, hi


def never_falls(d: Dim) -> bool:
    """Whether a dim provably never falls when one of its symbols grows."""
    if not isinstance(d, Expr):
        return True
    grown = [(atoms, c) for atoms, c in d.terms if atoms]
    return all(c > 0 and all(_grows(a) for a in atoms) for atoms, c in grown)


def _grows(a: Atom) -> bool:
    """Whether an atom never falls and is never negative."""
    lo, _ = _atom_bounds(a)
    if lo is None or lo < 0:
        return False
    if isinstance(a, Symbol) or (a.fn in ("min", "max") and never_falls(a.b)):
        return isinstance(a, Symbol) or never_falls(a.a)
    return a.fn == "//" and isinstance(a.b, int) and a.b > 0 and never_falls(a.a)


def _least(a: Bound, b: Bound) -> Bound:
    return b if a is None else a if b is None else min(a, b)


def _greatest(a: Bound, b: Bound) -> Bound:
    return b if a is None else a if b is None else max(a, b)


def exact_div(a: Dim, b: Dim) -> Dim | None:
    """`a / b` when the polynomial `b` divides `a` without remainder, else None."""
    if not isinstance(b, Expr):
        if b == 0 or any(c % b for _, c in _terms(a)):
            return None
        return _make({m: c // b for m, c in _terms(a)})
    lead, lead_c = b.terms[0]
    quotient: Dim = 0
    rest: Dim = a
    for _ in range(64):
        if not isinstance(rest, Expr):
            return quotient if rest == 0 else None
        m, c = rest.terms[0]
        left = list(m)
        for atom in lead:
            if atom not in left:
                return None
            left.remove(atom)
        if c % lead_c:
            return None
        part = _make({tuple(left): c // lead_c})
        quotient, rest = quotient + part, rest - part * b
    return None


def floordiv(a: Dim, b: Dim) -> Dim:
    """`a // b`, simplified."""
    if not isinstance(a, Expr) and not isinstance(b, Expr):
        return int(a) // int(b)
    if (q := exact_div(a, b)) is not None:
        return q
    if isinstance(b, Expr):
        alo, ahi = bounds(a)
        blo, _ = bounds(b)
        if alo is not None and alo >= 0 and ahi is not None and blo is not None and ahi < blo:
            return 0
        return _apply("//", a, b)
    if b < 0:
        return _apply("//", -a, -b)
    # (b*q + r) // b == q + r // b for any integers, so the divisible terms leave the division.
    whole = _make({m: c // b for m, c in _terms(a) if c % b == 0})
    rest = _make({m: c for m, c in _terms(a) if c % b})
    if isinstance(rest, Expr):
        shift = dict(rest.terms).get((), 0)
        if shift and not 0 <= shift < b:
            whole, rest = whole + shift // b, rest - shift + shift % b
    lo, hi = bounds(rest)
    if lo is not None and hi is not None and lo // b == hi // b:
        return whole + lo // b
    if isinstance(rest, Expr) and len(rest.terms) == 1 and rest.terms[0][1] == 1 and len(rest.terms[0][0]) == 1:
        atom = rest.terms[0][0][0]  # (x // c) // b == x // (c * b)
        if isinstance(atom, Apply) and atom.fn == "//" and isinstance(atom.b, int) and atom.b > 0:
            return whole + floordiv(atom.a, atom.b * b)
    return whole + _apply("//", rest, b)


def mod(a: Dim, b: Dim) -> Dim:
    """`a % b`, simplified."""
    if not isinstance(a, Expr) and not isinstance(b, Expr):
        return int(a) % int(b)
    if exact_div(a, b) is not None:
        return 0
    if isinstance(b, int) and b > 0:
        a = _make({m: c % b for m, c in _terms(a)})
        lo, hi = bounds(a)
        if lo is not None and lo >= 0 and hi is not None and hi < b:
            return a
    return _apply("%", a, b)


def minimum(a: Dim, b: Dim) -> Dim:
    return _extreme("min", a, b)


def maximum(a: Dim, b: Dim) -> Dim:
    return _extreme("max", a, b)


def _extreme(fn: str, a: Dim, b: Dim) -> Dim:
    lo, hi = bounds(a - b)
    if hi is not None and hi <= 0:
        return a if fn == "min" else b
    if lo is not None and lo >= 0:
        return b if fn == "min" else a
    for x, y in ((a, b), (b, a)):
        match y:
            case Expr(terms=(((Apply(fn=inner, a=p, b=q),), 1),)) if {fn, inner} == {"min", "max"} and x in (p, q):
                return x  # min(x, max(x, q)) = x
    x, y = sorted((a, b), key=str)
    return _apply(fn, x, y)


def ceildiv(a: Dim, b: Dim) -> Dim:
    """The quotient rounded up."""
    return -floordiv(-a, b) if not isinstance(a, Expr) else floordiv(a + b - 1, b)


def _apply(fn: str, a: Dim, b: Dim) -> Dim:
    return Expr((((Apply(fn, a, b),), 1),))


def prod(dims: tuple[Dim, ...] | list[Dim]) -> Dim:
    result: Dim = 1
    for d in dims:
        result = result * d
    return result


def symbols(d: Dim) -> Iterator[Symbol]:
    """Every symbol in a dim, in order of appearance, possibly repeated."""
    for m, _ in _terms(d):
        for a in m:
            if isinstance(a, Symbol):
                yield a
            else:
                yield from symbols(a.a)
                yield from symbols(a.b)


def substitute(d: Dim, env: Mapping[str, Dim]) -> Dim:
    """Replace symbols by name; an env of ints for every symbol gives an int."""
    if not isinstance(d, Expr):
        return d
    total: Dim = 0
    for m, c in d.terms:
        term: Dim = c
        for a in m:
            if isinstance(a, Symbol):
                v = env.get(a.name)
                term = term * (Expr((((a,), 1),)) if v is None else v)
            else:
                term = term * FUNCTIONS[a.fn](substitute(a.a, env), substitute(a.b, env))
        total = total + term
    return total


def evaluate(d: Dim, env: Mapping[str, int]) -> int:
    """The value of a dim. Raises: ModelError naming the symbols that have no value."""
    v = substitute(d, env)
    if isinstance(v, Expr):
        missing = sorted({s.name for s in symbols(v)})
        raise ModelError(f"dim {d} cannot be evaluated", expected=f"values for {', '.join(missing)}")
    return v


TYPICAL = 64
"""What a size that only a run will tell is taken for, where sizes are compared: a middling number of channels, rows,
columns or tokens."""


def typical(d: Dim) -> int:
    """A dim as a number, at least 1 where only a run will tell: its symbols at `TYPICAL`, within their bounds."""
    if isinstance(d, int):
        return d
    within = {s.name: max(s.lo or 0, TYPICAL if s.hi is None else min(TYPICAL, s.hi)) for s in symbols(d)}
    return max(evaluate(d, within), 1)


FUNCTIONS = {"//": floordiv, "%": mod, "min": minimum, "max": maximum}


def linear(d: Dim, name: str) -> tuple[Dim, Dim] | None:
    """`(coefficient, rest)` with `d == coefficient * name + rest` and neither containing `name`, else None."""
    coefficient: Dim = 0
    rest: Dim = 0
    for m, c in _terms(d):
        hits = [a for a in m if isinstance(a, Symbol) and a.name == name]
        others = tuple(a for a in m if not (isinstance(a, Symbol) and a.name == name))
        if any(isinstance(a, Apply) and any(s.name == name for s in symbols(_make({(a,): 1}))) for a in others):
            return None
        if len(hits) > 1:
            return None
        if hits:
            coefficient = coefficient + _make({others: c})
        else:
            rest = rest + _make({m: c})
    return coefficient, rest
