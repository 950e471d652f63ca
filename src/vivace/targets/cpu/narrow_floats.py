"""Floats of 8 and 4 bits in memory, one per byte, as f32 in registers; to the nearest, half to even.

    format        exponent  mantissa  bias  largest  infinity  NaN
    f8e4m3fn      4         3         7     0x7e     -         0x7f
    f8e4m3fnuz    4         3         8     0x7f     -         0x80, and no negative zero
    f8e5m2        5         2         15    0x7b     0x7c      0x7d to 0x7f
    f8e5m2fnuz    5         2         16    0x7f     -         0x80, and no negative zero
    f4e2m1        2         1         1     0x7      -         -
    f8e8m0        8         0         127   0xfe     -         0xff; powers of two, no sign, no zero

What is too large becomes infinity where there is one, else NaN, else the largest; a cast that saturates cuts it off
before. Source: ONNX, "Float stored in 8 bits"; OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.targets.cpu.builder import Builder, Value, literal

_NAN, _INFINITY = 0x7FC00000, 0x7F800000


@dataclass(frozen=True, slots=True)
class _Format:
    """`beyond` is what a number that is too large becomes, `nan` the code of NaN, without the sign; `is_uz` tells that
    the code of negative zero is NaN."""

    exponent: int
    mantissa: int
    bias: int
    largest: int
    beyond: int
    nan: int
    is_uz: bool = False

    @property
    def sign(self) -> int:
        return 1 << (self.exponent + self.mantissa)


_FORMATS = {
    DType.f8e4m3fn: _Format(4, 3, 7, 0x7E, 0x7F, 0x7F),
    DType.f8e4m3fnuz: _Format(4, 3, 8, 0x7F, 0x80, 0x80, True),
    DType.f8e5m2: _Format(5, 2, 15, 0x7B, 0x7C, 0x7E),
    DType.f8e5m2fnuz: _Format(5, 2, 16, 0x7F, 0x80, 0x80, True),
    DType.f4e2m1: _Format(2, 1, 1, 0x7, 0x7, 0x0),
}


def widened(b: Builder, v: Value, t: DType) -> Value:
    """The number of a byte, exactly."""

    def n(x: int) -> Value:
        return literal(x, "i32")

    wide = b.convert("zext", v, "i32")
    if t is DType.f8e8m0:
        power = b.select(b.compare("icmp eq", wide, n(0)), n(1 << 22), b.op("shl", wide, n(23)))
        return b.bitcast(b.select(b.compare("icmp eq", wide, n(255)), n(_NAN), power), "float")
    f = _FORMATS[t]
    sign = b.op("shl", b.op("and", wide, n(f.sign)), n(31 - f.exponent - f.mantissa))
    code = b.op("and", wide, n(f.sign - 1))
    # Exponent and mantissa in place, rescaled: exact for normals and denormals alike.
    moved = b.bitcast(b.op("shl", code, n(23 - f.mantissa)), "float")
    number = b.bitcast(b.op("fmul", moved, literal(2.0 ** (127 - f.bias), "float")), "i32")
    if f.is_uz:
        is_nan = b.compare("icmp eq", wide, n(f.sign))
        return b.bitcast(b.select(is_nan, n(_NAN), b.op("or", number, sign)), "float")
    if f.beyond > f.largest:
        number = b.select(b.compare("icmp ugt", code, n(f.largest)), n(_NAN), number)
    if f.beyond not in (f.largest, f.nan):
        number = b.select(b.compare("icmp eq", code, n(f.beyond)), n(_INFINITY), number)
    return b.bitcast(b.op("or", number, sign), "float")


def narrowed(b: Builder, v: Value, t: DType) -> Value:
    """The byte of a number, rounded. Raises: UnsupportedError for f8e8m0, which has its own rules of rounding."""
    if t not in _FORMATS:
        raise UnsupportedError(f"no code generator that rounds to {t}")

    def n(x: int) -> Value:
        return literal(x, "i32")

    f = _FORMATS[t]
    bits, dropped = b.bitcast(v, "i32"), 23 - f.mantissa
    sign = b.op("lshr", b.op("and", bits, n(-(1 << 31))), n(31 - f.exponent - f.mantissa))
    x = b.op("and", bits, n(0x7FFFFFFF))
    # Normal results: rebias, then round to nearest even on the bits that go.
    odd = b.op("and", b.op("lshr", x, n(dropped)), n(1))
    rebias = (1 << (dropped - 1)) - 1 - ((127 - f.bias) << 23)
    normal = b.op("lshr", b.op("add", b.op("add", x, n(rebias)), odd), n(dropped))
    # Denormal results: adding a number whose last place is their unit lets the addition do the rounding.
    unit = 24 - f.bias - f.mantissa
    added = b.bitcast(b.op("fadd", b.bitcast(x, "float"), literal(2.0**unit, "float")), "i32")
    denormal = b.op("sub", added, n((127 + unit) << 23))
    code = b.select(b.compare("icmp ult", x, n((128 - f.bias) << 23)), denormal, normal)
    code = b.select(b.compare("icmp ugt", code, n(f.largest)), n(f.beyond), code)
    code = b.select(b.compare("icmp ugt", x, n(_INFINITY)), n(f.nan), code)
    signed = b.op("or", code, sign)
    if f.is_uz:
        signed = b.select(b.compare("icmp eq", b.op("and", code, n(f.sign - 1)), n(0)), code, signed)
    return b.convert("trunc", signed, "i8")
