"""erf of f32 from tables in registers, for AVX-512: 20 instructions on 16 lanes, where polynomials and an exponential
(`vmath`) take 40, each of which waits for the one before.

    |x| = k/8 + t        |t| <= 1/16, k = 0 .. 31
    erf(|x|) = p_k(t)            where k >= 11
             = |x| + p_k(t)      below: small results keep their accuracy

p_k is the Taylor series around k/8, its sixth power replaced by lower ones that are closest to it. vpermi2ps looks a
coefficient up in two registers by the low five bits of k, which are those of |x| + 2**20: it rounds to eighths.
"""

from __future__ import annotations

from functools import cache

from vivace.targets.cpu.builder import Builder, Value, literal
from vivace.targets.cpu.vmath64 import erf_series

LANES = 16
_STEPS, _ROWS, _DEGREE = 8, 2 * LANES, 5
_FIRST_WHOLE = 11  # from here on p_k is all of erf
_LARGEST = 3.9374997615814209  # the last f32 that rounds to k = 31; erf of it is 1 in f32
_ROUNDER = 2.0**20  # 23 bits behind the point are 2**-3


@cache
def _coefficients() -> tuple[tuple[float, ...], ...]:
    """For each power of t, from 0 on, those of all k."""
    half, rows = 1 / (2 * _STEPS), []
    for k in range(_ROWS):
        *c, last = erf_series(k / _STEPS, _DEGREE + 2)
        if k < _FIRST_WHOLE:
            c[0], c[1] = c[0] - k / _STEPS, c[1] - 1
        # Chebyshev: 32 u**6 is within 1 of 48 u**4 - 18 u**2 + 1 for |u| <= 1.
        for power, share in ((4, 48 / 32), (2, -18 / 32), (0, 1 / 32)):
            c[power] += last * share * half ** (_DEGREE + 1 - power)
        rows.append(c if k else [0.0, *c[1:]])  # erf(0) is 0
    return tuple(zip(*rows, strict=True))


def erf(b: Builder, x: Value) -> Value:
    """Of 16 lanes. NaN stays: it looks up anything."""
    a = b.call("llvm.fabs", x)
    largest, rounder = literal(_LARGEST, "float"), literal(_ROUNDER, "float")
    a = b.select(b.compare("fcmp olt", largest, a), largest, a)
    rounded = b.op("fadd", a, rounder)
    t, row = b.op("fsub", a, b.op("fsub", rounded, rounder)), b.bitcast(rounded, "i32")
    is_small = b.compare("fcmp ole", a, literal((_FIRST_WHOLE - 0.5) / _STEPS, "float"))
    base = b.select(is_small, a, literal(0.0, "float"))
    total: Value | None = None
    for power in range(_DEGREE, -1, -1):
        c = _look_up(b, power, row)
        total = c if total is None else b.fma(total, t, c)
    assert total is not None
    return b.call("llvm.copysign", b.op("fadd", total, base), x)


def _look_up(b: Builder, power: int, row: Value) -> Value:
    full, name = f"<{LANES} x float>", "llvm.x86.avx512.vpermi2var.ps.512"
    b.declare(f"{full} @{name}({full}, <{LANES} x i32>, {full})", name)
    entries = ", ".join(str(literal(v, "float")) for v in _coefficients()[power])
    place = b.global_constant(f"erf_coefficients_{power}", f"[{_ROWS} x float] [{entries}]")
    halves = []
    for at in (0, LANES):
        p = b.inst(f"getelementptr float, {place}, i64 {at}", "ptr", 0)
        halves.append(b.inst(f"load {full}, {p}, align 64, !invariant.load !0", "float", LANES, p))
    return b.inst(f"call {full} @{name}({halves[0]}, {row}, {halves[1]})", "float", LANES, row)
