"""Conversions and functions of one and two values, each as its element type asks.

Values are what `Env` and `memory` make: bool is i1, f16 and bf16 are computed in f32. The meaning is that of the loop
IR.
"""

from __future__ import annotations

from vivace.base.dtypes import NARROW_FLOATS, DType
from vivace.base.errors import InternalError, UnsupportedError
from vivace.targets.cpu import vmath, vmath64
from vivace.targets.cpu.builder import Builder, Value, literal, type_bits
from vivace.targets.cpu.integers import divide, remainder, shift
from vivace.targets.cpu.memory import four_bits, from_memory, register_type, to_memory

_FLOAT_COMPARE = {"eq": "oeq", "ne": "une", "lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge"}
_ARITHMETIC = {"add": ("fadd", "add"), "sub": ("fsub", "sub"), "mul": ("fmul", "mul")}
_BITWISE = {"bitand": "and", "bitor": "or", "bitxor": "xor", "and": "and", "or": "or", "xor": "xor"}
_ROUNDING = {"floor": "llvm.floor", "ceil": "llvm.ceil", "round": "llvm.roundeven"}


def cast(b: Builder, v: Value, source: DType, target: DType) -> Value:
    """Numbers keep their value where the target can hold it; fractions are cut off; integers wrap; bool is `!= 0`."""
    if source is target:
        return v
    if target in (DType.f16, DType.bf16, *NARROW_FLOATS):
        v = cast(b, v, source, DType.f32)
        bits = to_memory(b, v, target)
        return from_memory(b, bits, target)
    if target in (DType.i4, DType.u4):
        return four_bits(b, cast(b, v, source, DType.i8), target)
    t = register_type(target)
    if target is DType.bool:
        return b.compare("fcmp une" if source.is_float else "icmp ne", v, literal(0, v.type))
    if source is DType.bool:
        return b.convert("uitofp" if target.is_float else "zext", v, t)
    if source.is_float and target.is_float:
        return v if v.type == t else b.convert("fpext" if t == "double" else "fptrunc", v, t)
    if target.is_float:
        return b.convert("sitofp" if source.is_signed else "uitofp", v, t)
    if source.is_float:
        return _to_integer(b, v, target)
    wanted = type_bits(t)
    if v.bits == wanted:
        return v
    return b.convert("trunc" if wanted < v.bits else "sext" if source.is_signed else "zext", v, t)


def _to_integer(b: Builder, v: Value, target: DType) -> Value:
    """Small types pass through i32, so that out-of-range numbers wrap as C compilers make them."""
    t = register_type(target)
    if target is DType.u64:
        return b.convert("fptoui", v, t)
    via = "i64" if target in (DType.u32, DType.i64) else "i32"
    value = b.convert("fptosi", v, via)
    return value if via == t else b.convert("trunc", value, t)


def unary(b: Builder, fn: str, v: Value, t: DType) -> Value:
    """One function of one value of type `t`."""
    if t.is_float:
        return _unary_float(b, fn, v)
    match fn:
        case "not":
            return (
                b.op("xor", v, literal(True, "i1")) if t is DType.bool else b.compare("icmp eq", v, literal(0, v.type))
            )
        case "bitnot":
            return b.op("xor", v, literal(-1, v.type))
        case "neg":
            return b.op("sub", literal(0, v.type), v)
        case "abs":
            negative = b.op("sub", literal(0, v.type), v)
            return b.select(b.compare("icmp slt", v, literal(0, v.type)), negative, v) if t.is_signed else v
        case "sign":
            positive = b.convert("zext", b.compare("icmp ne", v, literal(0, v.type)), v.type)
            return b.op("or", positive, b.op("ashr", v, literal(v.bits - 1, v.type))) if t.is_signed else positive
        case "floor" | "ceil" | "round":
            return v
        case "isnan" | "isinf":
            return literal(False, "i1", v.lanes)
    raise UnsupportedError(f"function {fn} of {t}", expected="a floating-point operand", where=b.name)


def _unary_float(b: Builder, fn: str, v: Value) -> Value:
    match fn:
        case "neg":
            return b.fneg(v)
        case "abs":
            return b.call("llvm.fabs", v)
        case "sqrt":
            return b.call("llvm.sqrt", v)
        case "floor" | "ceil" | "round":
            return b.call(_ROUNDING[fn], v)
        case "recip":
            return b.op("fdiv", literal(1.0, v.type), v)
        case "isnan":
            return b.compare("fcmp uno", v, v)
        case "isinf":
            return b.compare("fcmp oeq", b.call("llvm.fabs", v), literal(float("inf"), v.type))
        case "not":
            return b.compare("fcmp oeq", v, literal(0.0, v.type))
        case "sign":
            one = b.call("llvm.copysign", literal(1.0, v.type), v)
            return b.select(b.compare("fcmp one", v, literal(0.0, v.type)), one, v)
    return vmath.f32(b, fn, v) if v.type == "float" else vmath64.f64(b, fn, v)


def binary(b: Builder, fn: str, x: Value, y: Value, t: DType) -> Value:
    """One function of two values of type `t`."""
    if fn in _FLOAT_COMPARE:
        if t.is_float:
            return b.compare(f"fcmp {_FLOAT_COMPARE[fn]}", x, y)
        sign = "" if fn in ("eq", "ne") else "s" if t.is_signed else "u"
        return b.compare(f"icmp {sign}{fn}", x, y)
    if fn in ("max", "min"):
        return extreme(b, fn, x, y, t)
    if fn in _ARITHMETIC:
        return b.op(_ARITHMETIC[fn][0 if t.is_float else 1], x, y)
    if fn in _BITWISE:
        return b.op(_BITWISE[fn], x, y)
    if fn in ("shl", "shr"):
        return shift(b, fn, x, y, t)
    if fn == "pow":
        if t.is_float:
            return vmath.f32(b, fn, x, y) if x.type == "float" else vmath64.f64(b, fn, x, y)
        wide = vmath64.f64(b, fn, cast(b, x, t, DType.f64), cast(b, y, t, DType.f64))
        return cast(b, b.call("llvm.roundeven", wide), DType.f64, t)
    if fn == "div":
        return b.op("fdiv", x, y) if t.is_float else divide(b, x, y, t)
    if fn in ("mod", "fmod"):
        return remainder(b, fn, x, y, t)
    raise InternalError(f"unknown function {fn}", where=b.name)


def extreme(b: Builder, fn: str, x: Value, y: Value, t: DType) -> Value:
    """max or min; NaN if either is NaN."""
    if t is DType.bool:
        return b.op("or" if fn == "max" else "and", x, y)
    if not t.is_float:
        return b.call(f"llvm.{'s' if t.is_signed else 'u'}{fn}", x, y)
    if y.const is not None:
        x, y = y, x
    # As the machine's instruction, this gives y where either is NaN.
    result = b.select(b.compare("fcmp ogt" if fn == "max" else "fcmp olt", x, y), x, y)
    if x.const is not None and x.const == x.const:
        return result
    return b.select(b.compare("fcmp uno", x, x), x, result)
