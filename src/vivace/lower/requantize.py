"""From 32-bit sums back to 8 bits, as QLinearConv and QLinearMatMul of ONNX define it:

    q = saturate(round_half_even(f32(acc + bias) * scale) + zero_point)

in f32, one rounding per operation. The result is clipped before it is rounded, which gives the same integers and never
converts a number that is out of the range of i32.

Numbers that nobody stores are rounded on the way: an integer that is multiplied again (`rounded_product`) and a sum of
products (`summed`) take fused multiply-adds, of which each rounds once where the nodes round twice.
"""

from __future__ import annotations

from vivace.base.dtypes import DType
from vivace.graph.ops.quantized import RANGES
from vivace.loops.kernel import Binary, Cast, Const, Expr, Fma, Read, Unary

ACC = Read("acc", DType.i32)
_TO_WHOLE = 1.5 * 2.0**23  # plus less than 2**22, f32 has no place for fractions


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


def rounded_product(x: Expr) -> Expr | None:
    """A product, clipped and rounded as `quantize` does it, in fewer instructions: an addition rounds to a whole
    number, half to even. `x` is in f32.

    Before/After: round(min(max(a * s, lo), hi)) -> min(max(fma(a, s, W), W + lo), W + hi) - W
    Error: a * s is not rounded before it is rounded to a whole number.
    Unless: the limits are not whole numbers below 2**22.
    """
    match x:
        case Unary(
            fn="round",
            x=Binary(
                fn="min",
                a=Binary(fn="max", a=Binary(fn="mul", a=a, b=s), b=Const(value=lo)),
                b=Const(value=hi, dtype=DType.f32),
            ),
        ) if all(v == int(v) and abs(v) < 2**22 for v in (lo, hi)):
            whole = Const(_TO_WHOLE, DType.f32)
            moved = Binary("max", Fma(a, s, whole), Const(_TO_WHOLE + lo, DType.f32))
            return Binary("sub", Binary("min", moved, Const(_TO_WHOLE + hi, DType.f32)), whole)
    return None


def summed(x: Expr) -> Expr:
    """A sum of products as multiply-adds, zero points as one constant; through what a ReLU or a clip is.

    Before/After: (f32(q - z) * s) + r * t -> fma(f32(q), s, fma(r, t, -z * s))
    """
    match x:
        case Binary(fn="max" | "min" as fn, a=a, b=Const() as limit):
            return Binary(fn, summed(a), limit)
        case Binary(fn="add"):
            moved = 0.0
            products: list[tuple[Expr, Expr]] = []
            rest: list[Expr] = []
            for term in _terms(x):
                match term:
                    case Binary(
                        fn="mul", a=Cast(dtype=DType.f32, x=Binary(fn="sub", a=q, b=Const(value=z))), b=Const() as s
                    ):
                        products.append((Cast(DType.f32, q), s))
                        moved -= z * s.value
                    case Binary(fn="mul", a=a, b=b):
                        products.append((a, b))
                    case _:
                        rest.append(term)
            if not products:
                return x
            start = [*([Const(moved, DType.f32)] if moved else []), *rest]
            if not start:
                a, b = products.pop()
                start = [Binary("mul", a, b)]
            total = start[0]
            for term in start[1:]:
                total = Binary("add", total, term)
            for a, b in reversed(products):
                total = Fma(a, b, total)
            return total
    return x


def _terms(x: Expr) -> list[Expr]:
    match x:
        case Binary(fn="add", a=a, b=b):
            return [*_terms(a), *_terms(b)]
    return [x]
