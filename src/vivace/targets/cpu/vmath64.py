"""Elementary functions of f64 as instructions on vectors (or scalars) of any width.

Largest errors in units in the last place:

    exp 1.1   log 0.8   atan 1   log1p 1.4   expm1 acos asinh acosh 2   erf atanh 2.1
    sin cos sigmoid asin tanh 2.5   sinh cosh 3.1   tan 4   pow 1 + 2 * |y * log(x)|

sin, cos and tan hold their bounds for |x| up to 1e6; beyond, the error grows with x, and above 1e15 they give NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

from vivace.targets.cpu.builder import Builder, Value, literal

_LOG2E = math.log2(math.e)
_LN2_HI, _LN2_LO = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_MAGIC = 1.5 * 2.0**52  # adding it rounds to an integer, which then stands in the low bits
_TRIG_LIMIT = 1e15  # beyond, the quotient by pi/2 does not fit the rounding trick
_EXP = tuple(1 / math.factorial(k) for k in range(13, -1, -1))


def _c(v: float) -> Value:
    return literal(v, "double")


def _poly(b: Builder, x: Value, coefficients: Sequence[float]) -> Value:
    total = _c(coefficients[0])
    for c in coefficients[1:]:
        total = b.fma(total, x, _c(c))
    return total


def _abs(b: Builder, x: Value) -> Value:
    return b.call("llvm.fabs", x)


def _sign_of(b: Builder, magnitude: Value, x: Value) -> Value:
    return b.call("llvm.copysign", magnitude, x)


def _less(b: Builder, x: Value, limit: float) -> Value:
    return b.compare("fcmp olt", x, _c(limit))


def _clamp(b: Builder, x: Value, lo: float, hi: float) -> Value:
    x = b.select(b.compare("fcmp olt", _c(hi), x), _c(hi), x)
    return b.select(b.compare("fcmp ogt", _c(lo), x), _c(lo), x)


def _nearest(b: Builder, x: Value) -> tuple[Value, Value]:
    """x rounded to an integer, as f64 and as the low bits of an i64."""
    shifted = b.op("fadd", x, _c(_MAGIC))
    return b.op("fsub", shifted, _c(_MAGIC)), b.bitcast(shifted, "i64")


def _power_of_two(b: Builder, k: Value) -> Value:
    return b.bitcast(b.op("shl", b.op("add", k, literal(1023, "i64")), literal(52, "i64")), "double")


def _exp_parts(b: Builder, x: Value) -> tuple[Value, Value]:
    """r and n with x = r + n * log(2), n as i64 (sign-extended)."""
    n, bits = _nearest(b, b.op("fmul", x, _c(_LOG2E)))
    r = b.fma(n, _c(-_LN2_HI), x)
    r = b.fma(n, _c(-_LN2_LO), r)
    low = b.op("ashr", b.op("shl", bits, literal(48, "i64")), literal(48, "i64"))
    return r, low


def exp(b: Builder, x: Value) -> Value:
    x = _clamp(b, x, -746.0, 710.0)
    r, n = _exp_parts(b, x)
    half = b.op("ashr", n, literal(1, "i64"))
    p = b.op("fmul", _poly(b, r, _EXP), _power_of_two(b, half))
    return b.op("fmul", p, _power_of_two(b, b.op("sub", n, half)))


def expm1(b: Builder, x: Value) -> Value:
    y = _clamp(b, x, -50.0, 710.0)
    r, n = _exp_parts(b, y)
    p = b.fma(b.op("fmul", r, r), _poly(b, r, _EXP[:-2]), r)
    t = _power_of_two(b, b.op("sub", n, literal(1, "i64")))
    m = b.fma(t, p, b.op("fsub", t, _c(0.5)))
    return b.select(b.compare("fcmp oeq", x, _c(0.0)), x, b.op("fadd", m, m))


def log(b: Builder, x: Value) -> Value:
    """Source: fdlibm e_log.c."""
    tiny = b.compare("fcmp olt", x, _c(2.0**-1022))
    bits = b.bitcast(b.select(tiny, b.op("fmul", x, _c(2.0**52)), x), "i64")
    shifted = b.op("sub", bits, literal(0x3FE6A09E667F3BCD, "i64"))
    k = b.op("ashr", shifted, literal(52, "i64"))
    mantissa = b.op("and", shifted, literal((1 << 52) - 1, "i64"))
    m = b.bitcast(b.op("add", mantissa, literal(0x3FE6A09E667F3BCD, "i64")), "double")
    e = b.convert("sitofp", b.convert("trunc", k, "i32"), "double")
    e = b.op("fsub", e, b.select(tiny, _c(52.0), _c(0.0)))
    f = b.op("fsub", m, _c(1.0))
    s = b.op("fdiv", f, b.op("fadd", f, _c(2.0)))
    z = b.op("fmul", s, s)
    r = _poly(b, z, (1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01,
                     2.222219843214978396e-01, 2.857142874366239149e-01, 3.999999999940941908e-01,
                     6.666666666666735130e-01))  # fmt: skip
    r = b.op("fmul", r, z)
    half = b.op("fmul", b.op("fmul", f, _c(0.5)), f)
    low = b.fma(e, _c(_LN2_LO), b.op("fmul", s, b.op("fadd", half, r)))
    result = b.fma(e, _c(_LN2_HI), b.op("fsub", f, b.op("fsub", half, low)))
    result = b.select(b.compare("fcmp oeq", x, _c(math.inf)), x, result)
    result = b.select(b.compare("fcmp oeq", x, _c(0.0)), _c(-math.inf), result)
    return b.select(b.compare("fcmp ult", x, _c(0.0)), _c(math.nan), result)


def log1p(b: Builder, x: Value) -> Value:
    u = b.op("fadd", x, _c(1.0))
    lost = b.op("fsub", x, b.op("fsub", u, _c(1.0)))
    corrected = b.op("fadd", log(b, u), b.op("fdiv", lost, u))
    plain = b.compare("fcmp olt", _abs(b, b.op("fsub", u, _c(2.0**53))), _c(2.0**53))  # 0 < u < 2**54
    result = b.select(plain, corrected, log(b, u))
    return b.select(b.compare("fcmp oeq", x, _c(0.0)), x, result)


def sigmoid(b: Builder, x: Value) -> Value:
    e = exp(b, b.fneg(_abs(b, x)))
    top = b.select(_less(b, x, 0.0), e, _c(1.0))
    return b.op("fdiv", top, b.op("fadd", e, _c(1.0)))


def tanh(b: Builder, x: Value) -> Value:
    a = _clamp(b, _abs(b, x), 0.0, 20.0)
    m = expm1(b, b.op("fadd", a, a))
    return _sign_of(b, b.op("fdiv", m, b.op("fadd", m, _c(2.0))), x)


def sinh(b: Builder, x: Value) -> Value:
    a = _abs(b, x)
    m = expm1(b, a)
    small = b.op("fmul", _c(0.5), b.op("fadd", m, b.op("fdiv", m, b.op("fadd", m, _c(1.0)))))
    root = exp(b, b.op("fmul", a, _c(0.5)))
    large = b.op("fmul", b.op("fmul", root, _c(0.5)), root)
    return _sign_of(b, b.select(_less(b, a, 22.0), small, large), x)


def cosh(b: Builder, x: Value) -> Value:
    a = _abs(b, x)
    e = exp(b, a)
    small = b.op("fmul", _c(0.5), b.op("fadd", e, b.op("fdiv", _c(1.0), e)))
    root = exp(b, b.op("fmul", a, _c(0.5)))
    large = b.op("fmul", b.op("fmul", root, _c(0.5)), root)
    return b.select(_less(b, a, 22.0), small, large)


def asinh(b: Builder, x: Value) -> Value:
    a = _abs(b, x)
    s = b.op("fmul", a, a)
    root = b.call("llvm.sqrt", b.op("fadd", s, _c(1.0)))
    small = log1p(b, b.op("fadd", a, b.op("fdiv", s, b.op("fadd", root, _c(1.0)))))
    large = b.op("fadd", log(b, a), _c(math.log(2)))
    return _sign_of(b, b.select(_less(b, a, 2.0**28), small, large), x)


def acosh(b: Builder, x: Value) -> Value:
    t = b.op("fsub", x, _c(1.0))
    root = b.call("llvm.sqrt", b.fma(t, t, b.op("fadd", t, t)))
    small = log1p(b, b.op("fadd", t, root))
    large = b.op("fadd", log(b, x), _c(math.log(2)))
    result = b.select(_less(b, x, 2.0**28), small, large)
    return b.select(b.compare("fcmp ult", x, _c(1.0)), _c(math.nan), result)


def atanh(b: Builder, x: Value) -> Value:
    a = _abs(b, x)
    m = log1p(b, b.op("fdiv", b.op("fadd", a, a), b.op("fsub", _c(1.0), a)))
    return _sign_of(b, b.op("fmul", m, _c(0.5)), x)


def atan(b: Builder, x: Value) -> Value:
    """Source: Cephes atan."""
    a = _abs(b, x)
    steep, middle = b.compare("fcmp ogt", a, _c(2.41421356237309504880)), b.compare("fcmp ogt", a, _c(0.66))
    top = b.select(steep, _c(-1.0), b.select(middle, b.op("fsub", a, _c(1.0)), a))
    bottom = b.select(steep, a, b.select(middle, b.op("fadd", a, _c(1.0)), _c(1.0)))
    base = b.select(steep, _c(math.pi / 2), b.select(middle, _c(math.pi / 4), _c(0.0)))
    lost = 6.123233995736765886130e-17  # what rounding pi/2 lost
    rest = b.select(steep, _c(lost), b.select(middle, _c(lost / 2), _c(0.0)))
    t = b.op("fdiv", top, bottom)
    z = b.op("fmul", t, t)
    p = _poly(b, z, (-8.750608600031904122785e-1, -1.615753718733365076637e1, -7.500855792314704667340e1,
                     -1.228866684490136173410e2, -6.485021904942025371773e1))  # fmt: skip
    q = _poly(b, z, (1.0, 2.485846490142306297962e1, 1.650270098316988542046e2, 4.328810604912902668951e2,
                     4.853903996359136964868e2, 1.945506571482613964425e2))  # fmt: skip
    y = b.fma(b.op("fmul", t, z), b.op("fdiv", p, q), t)
    return _sign_of(b, b.op("fadd", base, b.op("fadd", y, rest)), x)


def asin(b: Builder, x: Value) -> Value:
    product = b.op("fmul", b.op("fsub", _c(1.0), x), b.op("fadd", _c(1.0), x))
    return atan(b, b.op("fdiv", x, b.call("llvm.sqrt", product)))


def acos(b: Builder, x: Value) -> Value:
    ratio = b.op("fdiv", b.op("fsub", _c(1.0), x), b.op("fadd", _c(1.0), x))
    half = atan(b, b.call("llvm.sqrt", ratio))
    return b.op("fadd", half, half)


def reduce_half_pi(b: Builder, x: Value) -> tuple[Value, Value]:
    """n with its low bits right (i64), and x - n * pi/2. Source of the parts of pi/2: fdlibm e_rem_pio2.c."""
    n, bits = _nearest(b, b.op("fmul", x, _c(2 / math.pi)))
    # Parts of 33 bits: n * part is exact for n up to 2**20 also without fused multiply-add.
    r = b.fma(n, _c(-1.57079632673412561417e00), x)
    r = b.fma(n, _c(-6.07710050630396597660e-11), r)
    r = b.fma(n, _c(-2.02226624879595063154e-21), r)
    return bits, b.select(_less(b, _abs(b, x), _TRIG_LIMIT), r, _c(math.nan))


def sine_of_quadrant(b: Builder, r: Value, n: Value) -> Value:
    """sin(r + n * pi/2). Source: fdlibm k_sin.c, k_cos.c."""
    z = b.op("fmul", r, r)
    sine = _poly(b, z, (1.58969099521155010221e-10, -2.50507602534068634195e-08, 2.75573137070700676789e-06,
                        -1.98412698298579493134e-04, 8.33333333332248946124e-03,
                        -1.66666666666666324348e-01))  # fmt: skip
    sine = b.fma(b.op("fmul", sine, z), r, r)
    cosine = _poly(b, z, (-1.13596475577881948265e-11, 2.08757232129817482790e-09, -2.75573143513906633035e-07,
                          2.48015872894767294178e-05, -1.38888888888741095749e-03,
                          4.16666666666666019037e-02))  # fmt: skip
    cosine = b.fma(b.op("fmul", cosine, z), z, b.fma(z, _c(-0.5), _c(1.0)))
    value = b.bitcast(b.select(b.convert("trunc", n, "i1"), cosine, sine), "i64")
    sign = b.op("shl", b.op("and", n, literal(2, "i64")), literal(62, "i64"))
    return b.bitcast(b.op("xor", value, sign), "double")


def sin(b: Builder, x: Value) -> Value:
    n, r = reduce_half_pi(b, x)
    return b.select(b.compare("fcmp oeq", x, _c(0.0)), x, sine_of_quadrant(b, r, n))


def cos(b: Builder, x: Value) -> Value:
    n, r = reduce_half_pi(b, x)
    return sine_of_quadrant(b, r, b.op("add", n, literal(1, "i64")))


def tan(b: Builder, x: Value) -> Value:
    return b.op("fdiv", sin(b, x), cos(b, x))


_ERF_STEPS, _ERF_TERMS = 8, 12


def erf_series(c: float, n_terms: int) -> list[float]:
    """Taylor coefficients of erf around c, from erf' and the recurrence of Hermite polynomials."""
    slope = 2 / math.sqrt(math.pi) * math.exp(-c * c)
    h = [1.0, 2 * c]
    for j in range(1, n_terms):
        h.append(2 * c * h[j] - 2 * j * h[j - 1])
    return [math.erf(c)] + [slope * (-1) ** (j - 1) * h[j - 1] / math.factorial(j) for j in range(1, n_terms)]


@cache
def _erf_table() -> str:
    """Taylor coefficients of erf around k/8, k = 0 .. 48."""
    rows = [v for k in range(6 * _ERF_STEPS + 1) for v in erf_series(k / _ERF_STEPS, _ERF_TERMS)]
    return f"[{len(rows)} x double] [{', '.join(f'double {_c(v).text}' for v in rows)}]"


def erf(b: Builder, x: Value) -> Value:
    a = _clamp(b, _abs(b, x), 0.0, 6.0)
    n, bits = _nearest(b, b.op("fmul", a, _c(float(_ERF_STEPS))))
    d = b.op("fsub", a, b.op("fmul", n, _c(1 / _ERF_STEPS)))
    # NaN has arbitrary low bits: keep the index in the table.
    row = b.call("llvm.umin", b.op("and", bits, literal(63, "i64")), literal(6 * _ERF_STEPS, "i64"))
    table = b.global_constant("erf_table", _erf_table())
    start = b.op("mul", row, literal(_ERF_TERMS, "i64"))
    total: Value | None = None
    for j in range(_ERF_TERMS - 1, -1, -1):
        c = b.lookup(table, b.op("add", start, literal(j, "i64")), "double")
        total = c if total is None else b.fma(total, d, c)
    assert total is not None
    return _sign_of(b, total, x)


def pow(b: Builder, x: Value, y: Value) -> Value:  # the function's name in the IR
    """As C's pow: 1 for y = 0 or x = 1, NaN for a negative x with fractional y."""
    one = _c(1.0)
    r = exp(b, b.op("fmul", y, log(b, _abs(b, x))))
    whole = b.compare("fcmp oeq", b.call("llvm.floor", y), y)
    half = b.op("fmul", y, _c(0.5))
    odd = b.op("and", whole, b.compare("fcmp une", b.call("llvm.floor", half), half))
    negative = b.compare("icmp slt", b.bitcast(x, "i64"), literal(0, "i64"))
    r = b.select(b.op("and", negative, odd), b.fneg(r), r)
    finite_negative = b.op("and", _less(b, x, 0.0), b.compare("fcmp one", x, _c(-math.inf)))
    fractional = b.op("and", b.compare("fcmp ord", y, y), b.compare("fcmp une", b.call("llvm.floor", y), y))
    r = b.select(b.op("and", finite_negative, fractional), _c(math.nan), r)
    unit = b.op("and", b.compare("fcmp oeq", _abs(b, x), one), b.compare("fcmp oeq", _abs(b, y), _c(math.inf)))
    trivial = b.op("or", b.compare("fcmp oeq", y, _c(0.0)), b.compare("fcmp oeq", x, one))
    return b.select(b.op("or", trivial, unit), one, r)


_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "exp": exp, "log": log, "sigmoid": sigmoid, "tanh": tanh, "erf": erf, "sin": sin, "cos": cos, "tan": tan,
    "sinh": sinh, "cosh": cosh, "asin": asin, "acos": acos, "atan": atan, "asinh": asinh, "acosh": acosh,
    "atanh": atanh, "log1p": log1p, "expm1": expm1, "pow": pow,
}  # fmt: skip


def f64(b: Builder, fn: str, *x: Value) -> Value:
    """The function `fn` of f64 values."""
    return _FUNCTIONS[fn](b, *x)
