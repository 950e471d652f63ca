"""What each element-wise op does to one element, as a loop-IR expression."""

from __future__ import annotations

import math
from collections.abc import Callable

from vivace.base.dtypes import DType
from vivace.base.errors import InternalError
from vivace.graph.graph import Attrs, Node
from vivace.graph.ops.quantized import BYTES, RANGES
from vivace.loops.kernel import Binary, Cast, Const, Expr, Lookup, Select, Unary, dtype_of
from vivace.lower.requantize import quantize, rounded_product

_DIRECT_UNARY = frozenset(
    [
        "neg",
        "abs",
        "sqrt",
        "exp",
        "log",
        "log1p",
        "expm1",
        "erf",
        "sin",
        "cos",
        "tan",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "asinh",
        "acosh",
        "atanh",
        "sigmoid",
        "floor",
        "ceil",
        "round",
        "sign",
        "not",
        "bitnot",
        "isnan",
        "isinf",
    ]
)
_DIRECT_BINARY = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "pow",
        "max",
        "min",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "and",
        "or",
        "xor",
        "bitand",
        "bitor",
        "bitxor",
        "shl",
        "shr",
    ]
)


def const(value: float, like: Expr) -> Const:
    """A constant of the type of another expression."""
    return literal(value, dtype_of(like))


def _clip(x: Expr, lo: float | None, hi: float | None) -> Expr:
    if lo is not None:
        x = Binary("max", x, const(lo, x))
    if hi is not None:
        x = Binary("min", x, const(hi, x))
    return x


_BY_TANH: Attrs = {"approximate": "tanh"}


def _gelu(x: Expr, attrs: Attrs) -> Expr:
    half_x = Binary("mul", x, const(0.5, x))
    if attrs.get("approximate", "none") == "tanh":
        # x + 0.044715 x^3 = x (1 + 0.044715 x^2)
        inner = Binary("mul", x, Binary("add", const(1.0, x), Binary("mul", const(0.044715, x), Binary("mul", x, x))))
        gate: Expr = Unary("tanh", Binary("mul", inner, const(math.sqrt(2 / math.pi), x)))
    elif dtype_of(x) is DType.f32:
        return Unary("gelu", x)
    else:
        gate = Unary("erf", Binary("mul", x, const(1 / math.sqrt(2), x)))
    return Binary("mul", half_x, Binary("add", gate, const(1.0, x)))


def _for_8_bits(e: Expr) -> Expr:
    """The factors of what is rounded to the 8 bits of bf16 or bytes, no more exact than that asks for."""
    match e:
        case Unary(fn="gelu", x=x):
            return Unary("gelu_bf16", x)
        case Binary(fn="mul", a=Binary(fn="mul", a=x), b=Binary(a=Unary(x=inner))) if e == _gelu(x, _BY_TANH):
            return Binary("mul", x, Unary("sigmoid_bf16", Binary("add", inner, inner)))
        case Binary(fn="mul" | "div" as fn, a=a, b=b):
            return Binary(fn, _for_8_bits(a), _for_8_bits(b))
        case Unary(fn="exp", x=x):
            return Unary("exp2_bf16", Binary("mul", x, const(math.log2(math.e), x)))
        case Unary(fn="sigmoid", x=x):
            return Unary("sigmoid_bf16", x)
    return e


_COMPOSED: dict[str, Callable[[Expr, Attrs], Expr]] = {
    "relu": lambda x, a: Binary("max", x, const(0, x)),
    "silu": lambda x, a: Binary("mul", x, Unary("sigmoid", x)),
    "gelu": _gelu,
    "leaky_relu": lambda x, a: Select(Binary("lt", x, const(0, x)), Binary("mul", x, const(a["alpha"], x)), x),
    "hard_sigmoid": lambda x, a: _clip(
        Binary("add", Binary("mul", x, const(a["alpha"], x)), const(a["beta"], x)), 0.0, 1.0
    ),
    "hard_swish": lambda x, a: Binary(
        "mul", x, _clip(Binary("add", Binary("mul", x, const(1 / 6, x)), const(0.5, x)), 0.0, 1.0)
    ),
    "clip": lambda x, a: _clip(x, a.get("min"), a.get("max")),
    "cast": lambda x, a: Cast(a["to"], _for_8_bits(x) if (dtype_of(x), a["to"]) == (DType.f32, DType.bf16) else x),
}


def _quantize(args: list[Expr], to: DType) -> Expr:
    """A known zero point is added after rounding to an integer, another one in f32, where it is exact too."""
    x, scale, zero = args
    scaled = x if isinstance(scale, Const) and scale.value == 1 else Binary("div", x, scale)
    if dtype_of(x) is DType.f32 and to in BYTES and (brief := _for_8_bits(x)) != x:
        # No more exact than its function: a division would take as long as that.
        inverse = const(1 / scale.value, x) if isinstance(scale, Const) else Binary("div", const(1, x), scale)
        scaled = Binary("mul", brief, inverse)
    if isinstance(zero, Const):
        return quantize(scaled, int(zero.value), to)
    low, high = RANGES[to]
    moved = Binary("add", Unary("round", scaled), Cast(DType.f32, zero))
    clipped = Binary("min", Binary("max", moved, Const(float(low), DType.f32)), Const(float(high), DType.f32))
    return Cast(to, Cast(DType.i32, Unary("round", clipped)))


def _dequantize(args: list[Expr]) -> Expr:
    q, scale, zero = args
    if isinstance(zero, Const) and (rounded := _rounded(q, int(zero.value))) is not None:
        return Binary("mul", rounded, scale)
    wide: Expr = Cast(DType.i32, q)
    if not isinstance(zero, Const):
        wide = Binary("sub", wide, Cast(DType.i32, zero))
    elif zero.value:
        wide = Binary("sub", wide, Const(int(zero.value), DType.i32))
    return Binary("mul", Cast(DType.f32, wide), scale)


def _rounded(q: Expr, zero: int) -> Expr | None:
    """q - zero as the f32 that `quantize` rounds, where `q` is its expression: integers that nobody stores are never
    made."""
    match q:
        case Cast(x=Binary(fn="add", a=Cast(dtype=DType.i32, x=Unary(fn="round") as x), b=Const(value=added))):
            return (rounded_product(x) or x) if added == zero else None
        case Cast(x=Cast(dtype=DType.i32, x=Unary(fn="round") as x)):
            return (rounded_product(x) or x) if zero == 0 else None
    return None


def scalar(node: Node, args: list[Expr]) -> Expr:
    """The expression of an element-wise node over its operands' elements."""
    name = node.op.name
    if name in _DIRECT_UNARY:
        return Unary(name, args[0])
    if name in _COMPOSED:
        return _COMPOSED[name](args[0], node.attrs)
    if name in _DIRECT_BINARY:
        return Binary(name, args[0], args[1])
    if name == "quantize":
        return _quantize(args, node.outputs[0].dtype)
    if name == "dequantize":
        return _dequantize(args)
    if name == "lookup":
        return Lookup(bytes.fromhex(node.attrs["table"]), node.attrs["to"], args[0])
    if name == "mod":
        return Binary("fmod" if node.attrs.get("fmod") else "mod", args[0], args[1])
    if name == "where":
        return Select(args[0], args[1], args[2])
    raise InternalError(f"no expression for the op {name!r}", where="lower.scalar")


def literal(value: object, dtype: DType) -> Const:
    """A constant of the IR from a NumPy scalar."""
    item = value.item() if hasattr(value, "item") else value
    return Const(float(item) if dtype.is_float else bool(item) if dtype is DType.bool else int(item), dtype)  # type: ignore[arg-type]
