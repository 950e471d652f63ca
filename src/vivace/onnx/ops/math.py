"""Arithmetic: element-wise functions, MatMul, Gemm, Einsum, CumSum."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np

from vivace.base.dims import prod
from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.graph.ops.shapes import same
from vivace.onnx.call import Call, Result, onnx_op
from vivace.onnx.scope import Fallback
from vivace.onnx.tensors import dtype_of

UNARY = {
    "Abs": "abs", "Neg": "neg", "Sqrt": "sqrt", "Exp": "exp", "Log": "log", "Erf": "erf", "Sin": "sin",
    "Cos": "cos", "Tan": "tan", "Asin": "asin", "Acos": "acos", "Atan": "atan", "Sinh": "sinh", "Cosh": "cosh",
    "Tanh": "tanh", "Asinh": "asinh", "Acosh": "acosh", "Atanh": "atanh", "Sigmoid": "sigmoid",
    "Floor": "floor", "Ceil": "ceil", "Round": "round", "Sign": "sign", "Relu": "relu", "BitwiseNot": "bitnot",
    "Not": "not", "IsNaN": "isnan",
}  # fmt: skip
BINARY = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "BitwiseAnd": "bitand", "BitwiseOr": "bitor",
    "BitwiseXor": "bitxor", "Equal": "eq", "Greater": "gt", "GreaterOrEqual": "ge", "Less": "lt",
    "LessOrEqual": "le", "And": "and", "Or": "or", "Xor": "xor",
}  # fmt: skip


def _unary(core: str) -> Callable[[Call, Value], Value]:
    return lambda c, x: getattr(c, core)(x)


def _binary(core: str) -> Callable[[Call, Value, Value], Value]:
    return lambda c, a, b: getattr(c, core)(a, b)


for _name, _core in UNARY.items():
    onnx_op(_name)(_unary(_core))
for _name, _core in BINARY.items():
    onnx_op(_name)(_binary(_core))


@onnx_op("Max")
def maximum(c: Call, *xs: Value) -> Value:
    return reduce(c.max, xs)


@onnx_op("Min")
def minimum(c: Call, *xs: Value) -> Value:
    return reduce(c.min, xs)


@onnx_op("Sum")
def total(c: Call, *xs: Value) -> Value:
    return reduce(c.add, xs)


@onnx_op("Mean")
def mean(c: Call, *xs: Value) -> Value:
    return c.div(reduce(c.add, xs), c.like(xs[0], len(xs)))


@onnx_op("Reciprocal")
def reciprocal(c: Call, x: Value) -> Value:
    return c.div(c.like(x, 1), x)


@onnx_op("IsInf", since=10)
def is_inf(c: Call, x: Value) -> Value:
    high, low = c.attr("detect_positive", 1), c.attr("detect_negative", 1)
    if high and low:
        return c.isinf(x)
    if not high and not low:
        return c.full(x.shape, False, DType.bool)
    return c.eq(x, c.like(x, np.inf if high else -np.inf))


@onnx_op("Pow")
def power(c: Call, x: Value, y: Value) -> Value:
    if y.data is not None and y.data.size == 1 and y.rank <= x.rank and float(y.data.reshape(-1)[0]) in (1.0, 2.0):
        return c.mul(x, x) if float(y.data.reshape(-1)[0]) == 2.0 else x
    if x.dtype is y.dtype:
        return c.pow(x, y)
    if x.dtype.is_float:
        return c.pow(x, c.cast_to(y, x.dtype))
    if y.dtype.is_float:  # an integer to a fractional power is computed in f64 and truncated
        return c.cast_to(c.pow(c.cast_to(x, DType.f64), c.cast_to(y, DType.f64)), x.dtype)
    return c.pow(x, c.cast_to(y, x.dtype))


@onnx_op("Mod", since=10)
def modulo(c: Call, a: Value, b: Value) -> Value:
    return c.mod(a, b, fmod=bool(c.attr("fmod", 0)))


@onnx_op("BitShift", since=11)
def bit_shift(c: Call, a: Value, b: Value) -> Value:
    return c.shl(a, b) if c.attr("direction") == "LEFT" else c.shr(a, b)


_SATURATING = {
    DType.f8e4m3fn: 448.0,
    DType.f8e4m3fnuz: 240.0,
    DType.f8e5m2: 57344.0,
    DType.f8e5m2fnuz: 57344.0,
    DType.f4e2m1: 6.0,
}


@onnx_op("Cast")
def cast(c: Call, x: Value) -> Value:
    return cast_value(c, x, dtype_of(c.attr("to"), c.site))


@onnx_op("CastLike", since=15)
def cast_like(c: Call, x: Value, like: Value) -> Value:
    return cast_value(c, x, like.dtype)


def cast_value(c: Call, x: Value, to: DType) -> Value:
    if DType.string in (to, x.dtype) and to is not x.dtype:
        raise Fallback("it converts strings")
    if to is DType.f8e8m0 and x.dtype is not to:
        raise Fallback("it rounds to powers of two")
    if to in _SATURATING and c.attr("saturate", 1) and x.dtype.is_float:
        wide = c.cast_to(x, DType.f64 if x.dtype is DType.f64 else DType.f32)
        x = c.clip(wide, min=-_SATURATING[to], max=_SATURATING[to])
    return c.cast_to(x, to)


@onnx_op("MatMul")
def matmul(c: Call, a: Value, b: Value) -> Value:
    return c.matmul(a, b)


@onnx_op("Gemm")
def gemm(c: Call, a: Value, b: Value, bias: Value | None = None) -> Value:
    a = c.transpose(a, perm=(1, 0)) if c.attr("transA", 0) else a
    b = c.transpose(b, perm=(1, 0)) if c.attr("transB", 0) else b
    alpha, beta = c.attr("alpha", 1.0), c.attr("beta", 1.0)
    if alpha != 1 and b.data is not None:
        b, alpha = c.mul(b, c.like(b, alpha)), 1.0
    y = c.matmul(a, b)
    if alpha != 1:
        y = c.mul(y, c.like(y, alpha))
    if bias is None or beta == 0:
        return y
    return c.add(y, bias if beta == 1 else c.mul(bias, c.like(bias, beta)))


@onnx_op("CumSum", since=11)
def cumsum(c: Call, x: Value, axis: Value) -> Value:
    along = c.axis(int(c.scalar(axis, "the axis")), x.rank)
    return c.cumsum(x, axis=along, exclusive=bool(c.attr("exclusive", 0)), reverse=bool(c.attr("reverse", 0)))


@onnx_op("Einsum", since=12)
def einsum(c: Call, *xs: Value) -> Result:
    """Contracts operands from left to right, each step as one batched matmul."""
    equation = c.attr("equation").replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(xs):
        raise c.error(f"the equation {equation!r} has {len(terms)} terms for {len(xs)} operands")
    spare = [ch for ch in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if ch not in equation]
    wide = max((x.rank - len(t.replace("...", "")) for t, x in zip(terms, xs) if "..." in t), default=0)
    dots = "".join(spare[:wide])
    terms = [
        t.replace("...", dots[wide - (x.rank - len(t) + 3) :] if x.rank - len(t) + 3 else "") for t, x in zip(terms, xs)
    ]
    if "->" not in equation:
        letters = "".join(terms)
        right = dots + "".join(sorted(ch for ch in set(letters) - set(dots) if letters.count(ch) == 1))
    right = right.replace("...", dots)
    for t, x in zip(terms, xs):
        if len(t) != x.rank:
            raise c.error(f"term {t!r} does not fit {x.type}")
        if len(set(t)) != len(t):
            raise Fallback("it takes a diagonal")
    current, names = xs[0], terms[0]
    for k in range(1, len(xs)):
        later = set("".join(terms[k + 1 :]) + right)
        current, names = _contract(c, current, names, xs[k], terms[k], later)
    current, names = _sum_out(c, current, names, set(right))
    return c.transposed(current, [names.index(ch) for ch in right])


def _sum_out(c: Call, x: Value, names: str, keep: set[str]) -> tuple[Value, str]:
    axes = tuple(i for i, ch in enumerate(names) if ch not in keep)
    return (c.reduce_sum(x, axes=axes, keepdims=False) if axes else x), "".join(ch for ch in names if ch in keep)


def _contract(c: Call, a: Value, an: str, b: Value, bn: str, later: set[str]) -> tuple[Value, str]:
    a, an = _sum_out(c, a, an, later | set(bn))
    b, bn = _sum_out(c, b, bn, later | set(an))
    batch = [ch for ch in an if ch in bn and ch in later]
    shared = [ch for ch in an if ch in bn and ch not in later]
    for ch in shared:
        same(a.shape[an.index(ch)], b.shape[bn.index(ch)], "Einsum")
    rows, columns = [ch for ch in an if ch not in bn], [ch for ch in bn if ch not in an]
    sizes = dict(zip(bn, b.shape)) | {ch: d for ch, d in zip(an, a.shape) if d != 1 or ch not in bn}
    x = c.transposed(a, [an.index(ch) for ch in batch + rows + shared])
    y = c.transposed(b, [bn.index(ch) for ch in batch + shared + columns])
    n, (m, k, p) = len(batch), (prod(tuple(sizes[ch] for ch in part)) for part in (rows, shared, columns))
    z = c.matmul(c.reshaped(x, (*x.shape[:n], m, k)), c.reshaped(y, (*y.shape[:n], k, p)))
    names = "".join(batch + rows + columns)
    return c.reshaped(z, tuple(sizes[ch] for ch in names)), names
