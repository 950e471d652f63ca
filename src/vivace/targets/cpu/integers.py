"""Division, remainder and shifts that never trap: the machine's instructions fault on x/0 and on INT_MIN/-1.

Meaning: x / 0 is 0 and x mod 0 is 0 for integers (as NumPy gives); INT_MIN / -1 wraps; shifting by the width or more
gives 0, or the sign. Floating-point remainders are exact.
"""

from __future__ import annotations

import math

from vivace.base.dtypes import DType
from vivace.targets.cpu.builder import Builder, Value, literal


def divide(b: Builder, x: Value, y: Value, t: DType) -> Value:
    """x / y cut off toward zero."""
    if isinstance(y.const, int) and y.const not in (0, -1):
        return b.op("sdiv" if t.is_signed else "udiv", x, y)
    zero = b.compare("icmp eq", y, literal(0, y.type))
    if x.bits < 64 and (x.lanes or y.lanes):
        # Vectors have no integer division. The quotient of 32-bit numbers in f64 (16-bit: f32) is exact enough.
        wide = "double" if x.bits == 32 else "float"
        there, back = ("sitofp", "fptosi") if t.is_signed else ("uitofp", "fptoui")
        safe = b.select(zero, literal(1, y.type), y)
        q = b.op("fdiv", b.convert(there, x, wide), b.convert(there, safe, wide))
        # One bit more, for INT_MIN / -1.
        whole = b.convert(back, q, "i64" if x.bits == 32 else "i32")
        return b.select(zero, literal(0, x.type), b.convert("trunc", whole, x.type))
    bad = zero
    if t.is_signed:
        bad = b.op("or", zero, b.compare("icmp eq", y, literal(-1, y.type)))
    q = b.op("sdiv" if t.is_signed else "udiv", x, b.select(bad, literal(1, y.type), y))
    if t.is_signed:
        minus = b.compare("icmp eq", y, literal(-1, y.type))
        q = b.select(minus, b.op("sub", literal(0, x.type), x), q)
    return b.select(zero, literal(0, x.type), q)


def remainder(b: Builder, fn: str, x: Value, y: Value, t: DType) -> Value:
    """`mod` has the sign of the divisor, `fmod` of the dividend."""
    if t.is_float:
        return _float_remainder(b, fn, x, y)
    r = b.op("sub", x, b.op("mul", divide(b, x, y, t), y))
    r = b.select(b.compare("icmp eq", y, literal(0, y.type)), literal(0, x.type), r)
    if fn == "fmod" or not t.is_signed:
        return r
    apart = b.compare("icmp slt", b.op("xor", r, y), literal(0, r.type))
    apart = b.op("and", apart, b.compare("icmp ne", r, literal(0, r.type)))
    return b.op("add", r, b.select(apart, y, literal(0, r.type)))


def _float_remainder(b: Builder, fn: str, x: Value, y: Value) -> Value:
    """Long division in f64, some bits of the quotient per round, each multiple subtracted exactly."""
    x, y = b.match(x, y)
    narrow = x.type == "float"
    p = b.convert("fpext", x, "double") if narrow else x
    q = b.convert("fpext", y, "double") if narrow else y
    a, d = b.call("llvm.fabs", p), b.call("llvm.fabs", q)
    zero, infinity = literal(0.0, "double"), literal(math.inf, "double")
    divisors = [d]
    if not narrow:  # Quotients of f64 may overflow: first take the remainder of multiples of the divisor.
        for _ in range(2):
            small = b.compare("fcmp olt", divisors[0], literal(1.0, "double"))
            larger = b.select(small, b.op("fmul", divisors[0], literal(2.0**1000, "double")), divisors[0])
            divisors.insert(0, larger)
    r = a
    for divisor in divisors:
        r = _long_division(b, r, divisor, narrow)
    # x / inf is x; everything that is no number, or has no quotient, gives NaN.
    r = b.select(b.compare("fcmp oeq", d, infinity), a, r)
    bad = b.op("or", b.compare("fcmp oeq", d, zero), b.compare("fcmp oeq", a, infinity))
    bad = b.op("or", bad, b.compare("fcmp uno", a, d))
    r = b.call("llvm.copysign", b.select(bad, literal(math.nan, "double"), r), p)
    if fn == "mod":
        one = literal(1.0, "double")
        signs = b.op("fmul", b.call("llvm.copysign", one, r), b.call("llvm.copysign", one, q))
        moved = b.select(b.compare("fcmp olt", signs, zero), b.op("fadd", r, q), r)
        r = b.select(b.compare("fcmp oeq", r, zero), b.call("llvm.copysign", zero, q), moved)
    return b.convert("fptrunc", r, "float") if narrow else r


def _long_division(b: Builder, r: Value, d: Value, narrow: bool) -> Value:
    """The remainder of r / d, both positive. `narrow`: they are numbers of f32."""
    has_fma = b.isa.has_fma
    # Bits of the quotient whose product with d is exact: in a fused operation, with 24 bits of d, with half of d.
    exact_bits = 50 if has_fma else 28 if narrow else 25
    rounds = -(-(278 if narrow else 1025) // (exact_bits - 1))
    mask = literal(-1 << (53 - exact_bits), "i64")
    high = b.bitcast(b.op("and", b.bitcast(d, "i64"), literal(-1 << 27, "i64")), "double")
    low = b.op("fsub", d, high)
    zero = literal(0.0, "double")

    def step(_: Value, carried: list[Value]) -> list[Value]:
        (r,) = carried
        cut = b.bitcast(b.op("and", b.bitcast(b.op("fdiv", r, d), "i64"), mask), "double")
        m = b.call("llvm.trunc", cut)
        if has_fma:
            rest = b.fma(b.fneg(m), d, r)
        elif narrow:
            rest = b.op("fsub", r, b.op("fmul", m, d))
        else:
            rest = b.op("fsub", b.op("fsub", r, b.op("fmul", m, high)), b.op("fmul", m, low))
        # The quotient may have been rounded up to a whole number.
        return [b.select(b.compare("fcmp olt", rest, zero), b.op("fadd", rest, d), rest)]

    (r,) = b.loop(literal(0, "i64"), literal(rounds, "i64"), 1, step, [r])
    return b.select(b.compare("fcmp oge", r, d), b.op("fsub", r, d), r)


def shift(b: Builder, fn: str, x: Value, y: Value, t: DType) -> Value:
    """Shifts; `shr` of a signed type keeps the sign."""
    bits = x.bits
    opcode = "shl" if fn == "shl" else "ashr" if t.is_signed else "lshr"
    if isinstance(y.const, int) and 0 <= y.const < bits:
        return b.op(opcode, x, y)
    over = b.compare("icmp uge", y, literal(bits, y.type))
    amount = b.select(over, literal(bits - 1, y.type), y)
    value = b.op(opcode, x, amount)
    return value if opcode == "ashr" else b.select(over, literal(0, x.type), value)
