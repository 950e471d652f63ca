"""Elementary functions of f32 as instructions on vectors (or scalars) of any width; no calls, and no tables but for erf
and gelu with AVX-512 (`vmath_lookup`).

`f32` emits one function. Exact where IEEE says so: infinities, NaN, signed zeros, overflow and gradual underflow (but
a sigmoid below 2**-126 is 0: maps of probabilities hold many such, and Intel's CPUs take 150 cycles for a vector of
them).
Largest errors in units in the last place (tests measure them on dense samples; without fused multiply-add in
parentheses):

    exp 0.9 (1.2)   log 0.8   erf 1 (1.1)   sin cos 1.6   sigmoid 2.1   tanh 2.3 (2.6)
    tan asin acos atan sinh cosh asinh acosh atanh log1p expm1 pow, computed in f64 (`vmath64`): 0.51
    exp2, for weights of softmax, 2**-22.5 of itself
    gelu 2**-23 of x, 2**-24 below 0

and in units of bf16, once they are rounded to it:

    exp2_bf16 0.52   sigmoid_bf16 0.54   gelu_bf16 0.64, or 2**-22
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

from vivace.targets.cpu import vmath64, vmath_lookup
from vivace.targets.cpu.builder import Builder, Value, literal

_LOG2E = math.log2(math.e)
_LN2_HI, _LN2_LO = 0.693359375, -2.12194440e-4  # nine bits, so that multiples up to 2**15 are exact; and the rest


def polynomial(b: Builder, x: Value, coefficients: Sequence[float]) -> Value:
    """Horner's scheme, highest coefficient first."""
    total = literal(coefficients[0], x.type)
    for c in coefficients[1:]:
        total = b.fma(total, x, literal(c, x.type))
    return total


def _c(v: float) -> Value:
    return literal(v, "float")


def _i(v: int) -> Value:
    return literal(v, "i32")


def clamp_above(b: Builder, x: Value, limit: float) -> Value:
    """min(x, limit), NaN stays; one instruction."""
    c = literal(limit, x.type)
    return b.select(b.compare("fcmp olt", c, x), c, x)


def copy_sign(b: Builder, magnitude: Value, sign: Value) -> Value:
    return b.call("llvm.copysign", magnitude, sign)


def _scale(b: Builder, x: Value, n: Value) -> Value:
    """x * 2**n for integral n in [-300, 300], with one rounding when the result is denormal."""
    if b.isa.vector_bits == 512 and x.lanes in (4, 8, 16, 32, 64):
        return _scalef(b, x, n)
    k = b.convert("fptosi", n, "i32")
    half = b.op("ashr", k, _i(1))
    rest = b.op("sub", k, half)
    for part in (half, rest):
        x = b.op("fmul", x, b.bitcast(b.op("shl", b.op("add", part, _i(127)), _i(23)), "float"))
    return x


def _scalef(b: Builder, x: Value, n: Value, there: Value | None = None) -> Value:
    """The same for any n, rounded down, as one AVX-512 instruction per register; 0 where `there` does not hold."""
    width = min(x.lanes, 16)
    mask = "i16" if width == 16 else "i8"
    name = f"llvm.x86.avx512.mask.scalef.ps.{width * 32}"
    rounding = ", i32 4" if width == 16 else ""
    full = f"<{width} x float>"
    b.declare(f"{full} @{name}({full}, {full}, {full}, {mask}{', i32' if rounding else ''})", name)

    def one(p: Value, q: Value, *conditions: Value) -> Value:
        bits, other = f"{mask} -1", "poison"
        for c in conditions:  # of 16 lanes
            bits, other = str(b.inst(f"bitcast {c} to {mask}", mask, 0, c)), "zeroinitializer"
        text = f"call {full} @{name}({p}, {q}, {full} {other}, {bits}{rounding})"
        return b.inst(text, "float", width, p, q, *conditions)

    n = b.widen(n, x.lanes)
    return b.per_part(width, one, x, n, *(() if there is None else (there,)))


def exp2(b: Builder, x: Value) -> Value:
    """2**x, 0 where it is below 2**-126: a weight of a softmax over the largest one."""
    # Minimax for 2**r on [0, 1]: relative error 2**-23.7.
    coefficients = (0.0018775766751991023, 0.008989340090524656, 0.055826318053216945, 0.24015361704442703,
                    0.6931530732001585, 0.9999999250635268)  # fmt: skip
    return _power(b, x, coefficients)


def exp2_bf16(b: Builder, x: Value) -> Value:
    """2**x, off by at most 2**-13.6 of itself; 0 where it is below 2**-126."""
    # Minimax for 2**r on [0, 1]: relative error 2**-13.7.
    return _power(b, x, (0.07802452264047893, 0.2260671554274834, 0.6958335404947531, 0.9999252185627154))


def _power(b: Builder, x: Value, coefficients: Sequence[float]) -> Value:
    """2**x from a polynomial for 2**r on [0, 1]."""
    # Lanes of small results take no part: an operation that underflows takes 150 cycles on Intel's CPUs.
    if b.isa.vector_bits == 512 and x.lanes in (16, 32, 64):
        there = b.compare("fcmp uge", x, _c(-126.0))
        return _scalef(b, polynomial(b, _fraction(b, x), coefficients), x, there)
    far = b.compare("fcmp olt", x, _c(-126.0))
    x = b.select(far, _c(0.0), clamp_above(b, x, 128.0))
    n = b.call("llvm.floor", x)
    p = polynomial(b, b.op("fsub", x, n), coefficients)
    power = b.bitcast(b.op("shl", b.op("add", b.convert("fptosi", n, "i32"), _i(127)), _i(23)), "float")
    return b.select(far, _c(0.0), b.op("fmul", p, power))


def sigmoid_bf16(b: Builder, x: Value) -> Value:
    """1 / (1 + exp(-x)), off by at most 2**-12.7 of itself."""
    return _logistic(b, b.op("fmul", x, _c(-_LOG2E)))


def gelu(b: Builder, x: Value) -> Value:
    """x * 0.5 * (1 + erf(x / sqrt(2))), of -infinity NaN as that is."""
    if b.isa.vector_bits == 512 and x.lanes % vmath_lookup.LANES == 0 and x.lanes:
        share = b.per_part(vmath_lookup.LANES, lambda part: vmath_lookup.normal_share(b, part), x)
        return b.op("fmul", x, share)
    return b.op("fmul", b.op("fmul", x, _c(0.5)), b.op("fadd", erf(b, b.op("fmul", x, _c(math.sqrt(0.5)))), _c(1.0)))


def gelu_bf16(b: Builder, x: Value) -> Value:
    """x * 0.5 * (1 + erf(x / sqrt(2))), off by at most 2**-10.9 of itself and 2**-22."""
    # The logarithm of P(X > x) / P(X < x) for a normal X, in bits, over x: minimax on [-6, 6] for the error of gelu.
    t = polynomial(b, b.op("fmul", x, x), (-7.328670565119261e-07, 1.7977347804217878e-05, 0.000998928717705254,
                                           -0.10733734989433627, -2.3001375099357517))  # fmt: skip
    return b.op("fmul", x, _logistic(b, b.op("fmul", t, x)))


def _logistic(b: Builder, t: Value) -> Value:
    """1 / (1 + 2**t), off by at most 2**-12.7 of itself."""
    total, one = b.op("fadd", exp2_bf16(b, t), _c(1.0)), _c(1.0)
    if b.isa.vector_bits != 512 or t.lanes not in (16, 32, 64):
        return b.op("fdiv", one, total)
    full, name = "<16 x float>", "llvm.x86.avx512.rcp14.ps.512"
    b.declare(f"{full} @{name}({full}, {full}, i16)", name)
    return b.per_part(16, lambda p: b.inst(f"call {full} @{name}({p}, {full} poison, i16 -1)", "float", 16, p), total)


def _fraction(b: Builder, x: Value) -> Value:
    """x - floor(x), 0 of infinities, as one AVX-512 instruction per register."""
    full, name = "<16 x float>", "llvm.x86.avx512.mask.reduce.ps.512"
    b.declare(f"{full} @{name}({full}, i32, {full}, i16, i32)", name)

    def one(p: Value) -> Value:
        return b.inst(f"call {full} @{name}({p}, i32 9, {full} poison, i16 -1, i32 4)", "float", 16, p)

    return b.per_part(16, one, x)


def exp(b: Builder, x: Value) -> Value:
    # Lanes whose result is 0 do not compute it: an operation that underflows takes 150 cycles on Intel's CPUs, and most
    # of what a mask hides from a softmax does. Beyond 89 the result is infinity.
    is_far = b.compare("fcmp olt", x, _c(-104.0))
    near = b.select(is_far, _c(0.0), clamp_above(b, x, 89.0))
    return b.select(is_far, _c(0.0), _exp_near(b, near))


def _exp_near(b: Builder, x: Value) -> Value:
    """exp of numbers in [-104, 89], and of NaN."""
    n = b.call("llvm.roundeven", b.op("fmul", x, _c(_LOG2E)))
    r = b.fma(n, _c(-_LN2_HI), x)
    r = b.fma(n, _c(-_LN2_LO), r)
    # Minimax for exp on |r| <= ln(2)/2: relative error 3e-9 before rounding.
    p = polynomial(
        b, r, (0.0013951717410236597, 0.008369598537683487, 0.0416661873459816, 0.16666512191295624, 0.5, 1, 1)
    )
    return _scale(b, p, n)


def log(b: Builder, x: Value) -> Value:
    """Source: Cephes logf."""
    tiny = b.compare("fcmp olt", x, _c(2.0**-126))
    bits = b.bitcast(b.select(tiny, b.op("fmul", x, _c(2.0**23)), x), "i32")
    # Subtracting the bits of sqrt(1/2) leaves exponent and mantissa of m in [sqrt(1/2), sqrt(2)).
    shifted = b.op("sub", bits, _i(0x3F3504F3))
    k = b.op("ashr", shifted, _i(23))
    m = b.bitcast(b.op("add", b.op("and", shifted, _i(0x7FFFFF)), _i(0x3F3504F3)), "float")
    e = b.op("fsub", b.convert("sitofp", k, "float"), b.select(tiny, _c(23.0), _c(0.0)))
    f = b.op("fsub", m, _c(1.0))
    z = b.op("fmul", f, f)
    coefficients = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
                    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip
    y = b.op("fmul", b.op("fmul", polynomial(b, f, coefficients), f), z)
    y = b.fma(e, _c(_LN2_LO), y)
    y = b.fma(z, _c(-0.5), y)
    result = b.fma(e, _c(_LN2_HI), b.op("fadd", f, y))
    result = b.select(b.compare("fcmp oeq", x, _c(math.inf)), x, result)
    result = b.select(b.compare("fcmp oeq", x, _c(0.0)), _c(-math.inf), result)
    return b.select(b.compare("fcmp ult", x, _c(0.0)), _c(math.nan), result)


def sigmoid(b: Builder, x: Value) -> Value:
    limit = 87.33  # whose exponential is the last one that is not denormal
    e = _exp_near(b, b.fneg(clamp_above(b, b.call("llvm.fabs", x), limit)))
    top = b.select(b.compare("fcmp olt", x, _c(0.0)), e, _c(1.0))
    near = b.op("fdiv", top, b.op("fadd", e, _c(1.0)))
    return b.select(b.compare("fcmp olt", x, _c(-limit)), _c(0.0), near)


def tanh(b: Builder, x: Value) -> Value:
    """(e - 1) / (e + 1) with e = exp(2|x|), where e - 1 is built without cancellation."""
    a = clamp_above(b, b.call("llvm.fabs", x), 9.2)
    n = b.call("llvm.roundeven", b.op("fmul", a, _c(2 * _LOG2E)))
    r = b.fma(n, _c(-_LN2_HI / 2), a)
    r = b.fma(n, _c(-_LN2_LO / 2), r)
    r = b.op("fadd", r, r)
    q = polynomial(b, r, (0.0013951717410236597, 0.008369598537683487, 0.0416661873459816, 0.16666512191295624, 0.5))
    p = b.fma(b.op("fmul", r, r), q, r)
    power = b.bitcast(b.op("shl", b.op("add", b.convert("fptosi", n, "i32"), _i(127)), _i(23)), "float")
    m = b.fma(power, p, b.op("fsub", power, _c(1.0)))
    return copy_sign(b, b.op("fdiv", m, b.op("fadd", m, _c(2.0))), x)


def erf(b: Builder, x: Value) -> Value:
    """Source: the two minimax polynomials published by N. Juffa: 1 - exp(p(|x|)) above 0.93, x * q(x*x) below. With
    AVX-512 whole registers go by tables.
    """
    if b.isa.vector_bits == 512 and x.lanes % vmath_lookup.LANES == 0 and x.lanes:
        return b.per_part(vmath_lookup.LANES, lambda part: vmath_lookup.erf(b, part), x)
    a = b.call("llvm.fabs", x)
    s = b.op("fmul", x, x)
    small = polynomial(
        b, s, (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
    )
    small = b.fma(small, x, x)
    a = clamp_above(b, a, 4.0)
    t = polynomial(b, a, (-1.72853470e-5, 3.83197126e-4, -3.88396438e-3, 2.42546219e-2, -1.06777877e-1, -6.34846687e-1,
                          -1.28717512e-1))  # fmt: skip
    large = b.op("fsub", _c(1.0), _exp_near(b, b.fma(t, a, b.fneg(a))))
    return b.select(b.compare("fcmp ogt", a, _c(0.927734375)), copy_sign(b, large, x), small)


_FAR, _LEAST_EXPONENT = 1e5, -7  # numbers above 1e5 are m * 2**e with a 24-bit m and e >= -7
_TWO_OVER_PI = 0xA2F9836E4E441529FC2757D1F534DDC0DB6295993C439041FE5163ABDEBBC561  # times 2**256


@cache
def _far_table() -> str:
    """For each exponent e from -7 to 104, (2**e * 2/pi) mod 4 as three numbers: two of 28 bits and the rest."""
    numbers = []
    for e in range(_LEAST_EXPONENT, 105):
        rest = (_TWO_OVER_PI << (e + 7)) % (4 << 263)
        for unit in (26, 54):
            part = rest >> (263 - unit)
            numbers.append(math.ldexp(part, -unit))
            rest -= part << (263 - unit)
        numbers.append(math.ldexp(rest >> 110, 110 - 263))
    text = ", ".join(f"double {literal(v, 'double').text}" for v in numbers)
    return f"[{len(numbers)} x double] [{text}]"


def _reduced_far(b: Builder, x: Value) -> tuple[Value, Value]:
    """The same for large numbers: the quotient modulo 4 from as many bits of 2/pi as matter. Source: Payne and Hanek,
    1983."""
    bits = b.bitcast(x, "i32")
    exponent = b.op("and", b.op("lshr", bits, _i(23)), _i(255))
    row = b.op("sub", exponent, _i(150 + _LEAST_EXPONENT))
    # Lanes that are not large, or no number, read any row.
    row = b.call("llvm.umin", row, _i(104 - _LEAST_EXPONENT))
    m = b.op("or", b.op("and", bits, _i(0x7FFFFF)), _i(0x800000))
    m = b.convert("sitofp", m, "double")
    table, start = b.global_constant("two_over_pi", _far_table()), b.op("mul", row, _i(3))
    parts = [b.lookup(table, b.convert("zext", b.op("add", start, _i(k)), "i64"), "double") for k in range(3)]
    q, middle, last = (b.op("fmul", m, p) for p in parts)
    whole = b.call("llvm.roundeven", q)
    f = b.op("fsub", q, whole)
    step = b.call("llvm.roundeven", b.op("fadd", f, middle))
    t = b.op("fadd", b.op("fadd", b.op("fsub", f, step), middle), last)
    # Infinity must give NaN.
    t = b.op("fadd", t, b.convert("fpext", b.op("fsub", x, x), "double"))
    r = b.op("fmul", t, literal(math.pi / 2, "double"))
    n = b.convert("fptosi", b.op("fadd", whole, step), "i32")
    negative = b.compare("icmp slt", bits, _i(0))
    return b.select(negative, b.fneg(r), r), b.select(negative, b.op("sub", _i(0), n), n)


def _reduced(b: Builder, x: Value) -> tuple[Value, Value]:
    """x - n * pi/2 in f64, and n mod 4 as i32."""
    bits, r = vmath64.reduce_half_pi(b, b.convert("fpext", x, "double"))
    n = b.convert("trunc", bits, "i32")
    far = b.compare("fcmp ogt", b.call("llvm.fabs", x), _c(_FAR))
    some = b.call("llvm.vector.reduce.or", far, t="i1") if far.lanes else far

    def slow() -> list[Value]:
        far_r, far_n = _reduced_far(b, x)
        return [b.select(far, far_r, r), b.select(far, far_n, n)]

    r, n = b.branch(some, slow, [r, n], is_rare=True)
    return r, n


def _sine_of_quadrant(b: Builder, r: Value, n: Value) -> Value:
    """sin(r + n * pi/2). Source: Cephes sinf, cosf."""
    r = b.convert("fptrunc", r, "float")
    z = b.op("fmul", r, r)
    sine = polynomial(b, z, (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1))
    sine = b.fma(b.op("fmul", sine, z), r, r)
    cosine = polynomial(b, z, (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2))
    cosine = b.fma(b.op("fmul", cosine, z), z, b.fma(z, _c(-0.5), _c(1.0)))
    odd = b.convert("trunc", n, "i1")
    value = b.bitcast(b.select(odd, cosine, sine), "i32")
    sign = b.op("shl", b.op("and", n, _i(2)), _i(30))
    return b.bitcast(b.op("xor", value, sign), "float")


def sin(b: Builder, x: Value) -> Value:
    r, n = _reduced(b, x)
    return b.select(b.compare("fcmp oeq", x, _c(0.0)), x, _sine_of_quadrant(b, r, n))


def cos(b: Builder, x: Value) -> Value:
    r, n = _reduced(b, x)
    return _sine_of_quadrant(b, r, b.op("add", n, _i(1)))


def tan(b: Builder, x: Value) -> Value:
    r, n = _reduced(b, x)
    n = b.convert("zext", n, "i64")
    one = literal(1, "i64")
    wide = b.op("fdiv", vmath64.sine_of_quadrant(b, r, n), vmath64.sine_of_quadrant(b, r, b.op("add", n, one)))
    return b.select(b.compare("fcmp oeq", x, _c(0.0)), x, b.convert("fptrunc", wide, "float"))


_OWN: dict[str, Callable[[Builder, Value], Value]] = {
    "exp": exp, "log": log, "sigmoid": sigmoid, "tanh": tanh, "erf": erf, "sin": sin, "cos": cos,
    "tan": tan, "exp2": exp2, "gelu": gelu, "exp2_bf16": exp2_bf16, "sigmoid_bf16": sigmoid_bf16,
    "gelu_bf16": gelu_bf16,
}  # fmt: skip


def f32(b: Builder, fn: str, *x: Value) -> Value:
    """The function `fn` of f32 values."""
    if fn in _OWN:
        return _OWN[fn](b, *x)
    wide = vmath64.f64(b, fn, *(b.convert("fpext", v, "double") for v in b.match(*x)))
    return b.convert("fptrunc", wide, "float")
