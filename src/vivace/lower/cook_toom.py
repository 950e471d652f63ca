"""Small convolutions with fewer products: the Cook-Toom matrices for chosen points, exact, and their use.

F(m, 3) computes m neighbouring results of a filter with 3 taps by `n = m + 2` products instead of 3m:

    y = At [(G w) * (Bt d)]        At: m x n,  G: n x 3,  Bt: n x n,  d: n inputs, w: 3 taps

as polynomial products by evaluation at n - 1 finite points and infinity. In two dimensions the matrices act on rows,
then on columns.

Points: 0, pairs +p and -p, infinity. A pair shares its even and odd parts, which halves the work of the transforms.

At stride 2 a filter of 3 taps is one of 2 taps over the even inputs and one of a single tap over the odd ones. Two
results take 3 products for the first, at the points 0, 1 (which is that of all inputs of a tap) and infinity, and 2 for
the second, by the same weight: 5 instead of 6.

    y0 = (d0 - d2) w0 + d2 (w0 + w2) + d1 w1
    y1 = d2 (w0 + w2) + (d4 - d2) w2 + d3 w1

Source: Lavin and Gray 2015, "Fast algorithms for convolutional neural networks"; Barabasz et al. 2018, "Error analysis
and improving the accuracy of Winograd convolution", on how the error grows with the points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np

from vivace.base.dtypes import DType
from vivace.loops.kernel import Binary, Const, Expr

Row = tuple[Fraction, ...]
N_TAPS = 3

# The positive points of each pair, by m. For m = 4 the ratio 2 of the usual +-1, +-2 is kept and their scale changed,
# which balances the point at infinity against zero: measured over 64 and 256 channels, errors halve (root mean square
# 2.0 to 2.2 times that of a sequential f32 sum, +-1, +-2 4 times). Their polynomials have coefficients that f32 holds
# exactly.
PAIRS: dict[int, tuple[Fraction, ...]] = {2: (Fraction(1),), 4: (Fraction(3, 4), Fraction(3, 2))}


@dataclass(frozen=True, slots=True)
class CookToom:
    """The three matrices for F(m, 3)."""

    m: int
    at: tuple[Row, ...]
    g: tuple[Row, ...]
    bt: tuple[Row, ...]

    @property
    def n(self) -> int:
        return self.m + N_TAPS - 1


@cache
def cook_toom(m: int) -> CookToom:
    """The matrices for the points in `PAIRS`, in the order 0, +p, -p, .., infinity."""
    points = [Fraction(0)]
    for p in PAIRS[m]:
        points += [p, -p]
    g: list[Row] = []
    bt: list[Row] = []
    for k, p in enumerate(points):
        others = [q for j, q in enumerate(points) if j != k]
        norm = math.prod(p - q for q in others)
        g.append(tuple(p**i / norm for i in range(N_TAPS)))
        bt.append((*_with_roots(others), Fraction(0)))
    g.append((Fraction(0),) * (N_TAPS - 1) + (Fraction(1),))
    bt.append(tuple(_with_roots(points)))
    at = tuple((*(p**i for p in points), Fraction(int(i == m - 1))) for i in range(m))
    return CookToom(m, at, tuple(g), tuple(bt))


def _with_roots(roots: Sequence[Fraction]) -> list[Fraction]:
    """The coefficients, constant first, of the monic polynomial with these roots."""
    poly = [Fraction(1)]
    for q in roots:
        poly = [(poly[i - 1] if i else 0) - q * (poly[i] if i < len(poly) else 0) for i in range(len(poly) + 1)]
    return poly


def amplification(m: int, stride: int = 1) -> float:
    """How far sums of magnitudes exceed inputs times weights: the largest of |At| (|G| 1 * |Bt| 1)."""
    if m == 1:
        return 1.0
    if stride > 1:
        return 2.0 + 2.0 + 1.0
    t = cook_toom(m)
    sizes = [sum(map(abs, g)) * sum(map(abs, b)) for g, b in zip(t.g, t.bt, strict=True)]
    return float(max(sum(abs(a) * s for a, s in zip(row, sizes, strict=True)) for row in t.at))


def n_inputs(m: int, stride: int = 1) -> int:
    """Inputs of m results, and as many products; 1 for m = 1, which stands for an axis with a single tap."""
    return (m - 1) * stride + N_TAPS if m > 1 else 1


def tile_sizes(stride: int) -> tuple[int, ...]:
    """Every m that there is."""
    return tuple(PAIRS) if stride == 1 else (2,) if stride == 2 else ()


def runs(m: int, stride: int) -> tuple[tuple[int, int], ...]:
    """The products of an axis in their order, as runs: of how many weights, and how many products share each."""
    return ((n_inputs(m), 1),) if stride == 1 else ((3, 1), (1, 2))


def n_weights(m: int, stride: int) -> int:
    """Of the products of an axis."""
    return sum(n for n, _ in runs(m, stride))


def transform_weights(w: np.ndarray, m: tuple[int, int], stride: int = 1) -> np.ndarray:
    """G w G' of every filter, in f64, rounded once.

    Shapes: `w: f32[oc, c, taps, taps]` -> `f32[n, n, c, oc]`
    """
    rows, columns = (_filter_matrix(k, stride) for k in m)
    return np.einsum("ai,bj,ocij->abco", rows, columns, np.asarray(w, np.float64), optimize=True).astype(np.float32)


def _filter_matrix(m: int, stride: int) -> np.ndarray:
    if m == 1:
        return np.eye(1)
    if stride > 1:
        return np.array([[1.0, 0, 0], [1, 0, 1], [0, 0, 1], [0, 1, 0]])
    return np.array([[float(x) for x in row] for row in cook_toom(m).g])


def transform_input(m: int, d: Sequence[Expr], stride: int = 1) -> list[Expr]:
    """Bt d."""
    if m == 1:
        return list(d)
    if stride > 1:
        return [Binary("sub", d[0], d[2]), d[2], Binary("sub", d[4], d[2]), d[1], d[3]]
    bt = cook_toom(m).bt
    found = [_sum(bt[0], d)]
    for k in range(1, len(bt) - 1, 2):
        even = _sum([x if i % 2 == 0 else Fraction(0) for i, x in enumerate(bt[k])], d)
        odd = _sum([x if i % 2 else Fraction(0) for i, x in enumerate(bt[k])], d)
        # Row k is the polynomial with root -p but not +p; row k + 1 has the same with its odd coefficients negated.
        found += [Binary("add", even, odd), Binary("sub", even, odd)]
    return [*found, _sum(bt[-1], d)]


def transform_output(m: int, v: Sequence[Expr], keep: Callable[[Expr], Expr], stride: int = 1) -> list[Expr]:
    """At v. `keep` names a value that is used several times."""
    if m == 1:
        return list(v)
    if stride > 1:
        return [Binary("add", Binary("add", v[1], v[end]), v[own]) for end, own in ((0, 3), (2, 4))]
    pairs = [
        (keep(Binary("add", v[k], v[k + 1])), keep(Binary("sub", v[k], v[k + 1]))) for k in range(1, len(v) - 1, 2)
    ]
    found: list[Expr] = []
    for i in range(m):
        terms = [pair[i % 2] for pair in pairs]
        y = _sum([p**i for p in PAIRS[m]], terms)
        if i == 0:
            y = Binary("add", v[0], y)
        if i == m - 1:
            y = Binary("add", y, v[-1])
        found.append(y)
    return found


def _sum(row: Sequence[Fraction], d: Sequence[Expr]) -> Expr:
    """The products of a row of coefficients with values, those with coefficient 1 first."""
    total: Expr | None = None
    for c, x in sorted(((c, x) for c, x in zip(row, d, strict=True) if c), key=lambda t: (t[0] != 1, t[0] < 0)):
        term = x if abs(c) == 1 else Binary("mul", Const(float(abs(c)), DType.f32), x)
        if total is None:
            assert c > 0, row
            total = term
        else:
            total = Binary("add" if c > 0 else "sub", total, term)
    assert total is not None
    return total
