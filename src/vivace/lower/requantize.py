"""From 32-bit sums back to 8 bits, as QLinearConv and QLinearMatMul of ONNX define it:

    q = saturate(round_half_even(f32(acc + bias) * scale) + zero_point)

in f32, one rounding per operation. The result is clipped before it is rounded, which gives the same integers and never
converts a number that is out of the range of i32.
"""

from __future__ import annotations

from vivace.base.dtypes import DType
from vivace.graph.ops.quantized import RANGES
from vivace.loops.kernel import Binary, Cast, Const, Expr, Read, Unary

ACC = Read("acc", DType.i32)


def requantize(
    acc: Expr,
    scale: Expr,
    zero_point: int,
    out: DType,
    lo: int | None = None,
    hi: int | None = None,
    is_bounded: bool = False,
) -> Expr:
    """The epilogue of an integer contraction. `acc` is i32 with all integer terms added; `scale` is
    `a_scale * b_scale / out_scale` in f32, per tensor or per channel; `lo` and `hi` narrow the range of the result (a
    fused ReLU is `lo=zero_point`). `is_bounded`: see `quantize`.
    """
    return quantize(Binary("mul", Cast(DType.f32, acc), scale), zero_point, out, lo, hi, is_bounded)


def quantize(
    x: Expr, zero_point: int, out: DType, lo: int | None = None, hi: int | None = None, is_bounded: bool = False
) -> Expr:
    """Integers of 4 to 16 bits from numbers that are already divided by their scale; NaN gives any.

    `is_bounded` promises that |x| < 2**30: it is then clipped as an integer, by the instruction that narrows it.
    """
    least, most = RANGES[out]
    least, most = least if lo is None else max(lo, least), most if hi is None else min(hi, most)
    if is_bounded:
        whole: Expr = Cast(DType.i32, Unary("round", x))
        if zero_point:
            whole = Binary("add", whole, Const(zero_point, DType.i32))
        whole = Binary("min", Binary("max", whole, Const(least, DType.i32)), Const(most, DType.i32))
        return Cast(out, whole)
    floor, ceiling = Const(float(least - zero_point), DType.f32), Const(float(most - zero_point), DType.f32)
    clipped = Binary("min", Binary("max", x, floor), ceiling)
    rounded: Expr = Cast(DType.i32, Unary("round", clipped))
    if zero_point:
        rounded = Binary("add", rounded, Const(zero_point, DType.i32))
    return Cast(out, rounded)
