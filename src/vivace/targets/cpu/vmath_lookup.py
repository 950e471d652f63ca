"""erf and gelu of f32 from tables in registers, for AVX-512: 20 and 16 instructions on 16 lanes, where polynomials and
an exponential (`vmath`) take 40, each of which waits for the one before.

    |x| = k/8 + t        |t| <= 1/16, k = 0 .. 31
    erf(|x|) = p_k(t)            where k >= 11
             = |x| + p_k(t)      below: small results keep their accuracy

    |x| = k * 23/128 + t
    P(X < x) = 1/2 + sign(x) * q_k(t) for a normal X, which gelu multiplies x with: a half is there in any case

p_k and q_k are Taylor series in the middle of their piece, the highest power replaced by lower ones that are closest to
it. vpermi2ps looks a coefficient up in two registers by the low five bits of k, which are those of k + 2**23.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from vivace.targets.cpu.builder import Builder, Value, literal
from vivace.targets.cpu.vmath64 import erf_series

LANES = 16
_ROWS = 2 * LANES
_FIRST_WHOLE = 11  # from here on p_k is all of erf
_LARGEST = 3.9374997615814209  # the last f32 that rounds to k = 31; erf of it is 1 in f32
_ERF_STEP, _ERF_DEGREE = 1 / 8, 5
_ERF_ROUNDER = 2.0**20  # 23 bits behind the point are 2**-3
# Multiples of the step are exact. Half of erf is 1/2 in f32 at 31 of them, and q_k is off by 2**-28 at most.
_SHARE_STEP, _SHARE_DEGREE = 23 / 128, 4
_ROUNDER = 2.0**23

Table = tuple[tuple[float, ...], ...]


@cache
def _erf_coefficients() -> Table:
    """For each power of t, from 0 on, those of all k."""
    rows = []
    for k in range(_ROWS):
        c = _economized(erf_series(k * _ERF_STEP, _ERF_DEGREE + 2), _ERF_STEP / 2)
        if k < _FIRST_WHOLE:
            c[0], c[1] = c[0] - k * _ERF_STEP, c[1] - 1
        rows.append(c if k else [0.0, *c[1:]])  # erf(0) is 0
    return tuple(zip(*rows, strict=True))


@cache
def _share_coefficients() -> Table:
    unit = math.sqrt(0.5)
    series = ([c * unit**j / 2 for j, c in enumerate(erf_series(k * _SHARE_STEP * unit, _SHARE_DEGREE + 2))]
              for k in range(_ROWS))  # fmt: skip
    return tuple(zip(*(_economized(c, _SHARE_STEP / 2) for c in series), strict=True))


def _economized(series: Sequence[float], half: float) -> list[float]:
    """A polynomial of a degree less, closest to the given one for |t| <= half.

    Source: Lanczos 1938, "Trigonometric interpolation of empirical and analytical functions" (Chebyshev polynomials).
    """
    *c, last = series
    n = len(c)
    # The least that u**n and lower powers can reach on [-1, 1] is 2**(1 - n), that of the Chebyshev polynomial.
    for j in range(1, n // 2 + 1):
        share = n * (-1) ** j * math.factorial(n - j - 1) / (math.factorial(j) * math.factorial(n - 2 * j) * 4**j)
        c[n - 2 * j] -= last * share * half ** (2 * j)
    return c


def erf(b: Builder, x: Value) -> Value:
    """Of 16 lanes. NaN stays: it looks up anything."""
    a = b.call("llvm.fabs", x)
    largest, rounder = literal(_LARGEST, "float"), literal(_ERF_ROUNDER, "float")
    a = b.select(b.compare("fcmp olt", largest, a), largest, a)
    rounded = b.op("fadd", a, rounder)
    t = b.op("fsub", a, b.op("fsub", rounded, rounder))
    is_small = b.compare("fcmp ole", a, literal((_FIRST_WHOLE - 0.5) * _ERF_STEP, "float"))
    base = b.select(is_small, a, literal(0.0, "float"))
    total = _polynomial(b, "erf", _erf_coefficients(), t, b.bitcast(rounded, "i32"))
    return b.call("llvm.copysign", b.op("fadd", total, base), x)


def normal_share(b: Builder, x: Value) -> Value:
    """0.5 * (1 + erf(x / sqrt(2))) of 16 lanes, off by at most 2**-24. Of NaN it is 1/2 or 1."""
    full, name = f"<{LANES} x float>", "llvm.x86.avx512.mask.range.ps.512"
    b.declare(f"{full} @{name}({full}, {full}, i32, {full}, i16, i32)", name)
    largest = literal((_ROWS - 1) * _SHARE_STEP, "float", LANES)
    # The smaller one in magnitude, without its sign.
    a = b.inst(f"call {full} @{name}({x}, {largest}, i32 10, {full} poison, i16 -1, i32 4)", "float", LANES, x)
    rounder = literal(_ROUNDER, "float")
    rounded = b.fma(a, literal(1 / _SHARE_STEP, "float"), rounder)
    t = b.fma(b.op("fsub", rounded, rounder), literal(-_SHARE_STEP, "float"), a)
    above = _polynomial(b, "normal_share", _share_coefficients(), t, b.bitcast(rounded, "i32"))
    return b.op("fadd", b.call("llvm.copysign", above, x), literal(0.5, "float"))


def _polynomial(b: Builder, name: str, table: Table, t: Value, row: Value) -> Value:
    """The polynomial of each lane's row."""
    total: Value | None = None
    for power in range(len(table) - 1, -1, -1):
        c = _look_up(b, f"{name}_coefficients_{power}", table[power], row)
        total = c if total is None else b.fma(total, t, c)
    assert total is not None
    return total


def _look_up(b: Builder, place_name: str, values: Sequence[float], row: Value) -> Value:
    full, name = f"<{LANES} x float>", "llvm.x86.avx512.vpermi2var.ps.512"
    b.declare(f"{full} @{name}({full}, <{LANES} x i32>, {full})", name)
    entries = ", ".join(str(literal(v, "float")) for v in values)
    place = b.global_constant(place_name, f"[{_ROWS} x float] [{entries}]")
    halves = []
    for at in (0, LANES):
        p = b.inst(f"getelementptr float, {place}, i64 {at}", "ptr", 0)
        halves.append(b.inst(f"load {full}, {p}, align 64, !invariant.load !0", "float", LANES, p))
    return b.inst(f"call {full} @{name}({halves[0]}, {row}, {halves[1]})", "float", LANES, row)
