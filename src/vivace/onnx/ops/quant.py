"""Quantization: QuantizeLinear, DequantizeLinear, the integer products, QLinear*, MatMulNBits.

Numbers of 4 to 16 bits become the core ops `quantize` and `dequantize`, products with constant i8 weights
`conv_integer`
and `matmul_integer`; the rest is composed: integers widened to i32, products summed in i32, the scale applied in f32.
Source: `y = saturate(round_half_even(x / scale) + zero_point)`, `x = (q - zero_point) * scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from vivace.base.dims import Dim, exact_div
from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.graph.ops.quantized import BYTES, RANGES
from vivace.onnx.call import Call, Result, onnx_op
from vivace.onnx.ops.math import cast_value
from vivace.onnx.ops.nn import convolve
from vivace.onnx.scope import Fallback
from vivace.onnx.tensors import dtype_of

_RANGES = {**RANGES, DType.i32: (-(1 << 31), (1 << 31) - 1)}


def along_axis(c: Call, v: Value, x: Value, axis: int) -> Value:
    """A scale or zero point in a shape that broadcasts with x: per tensor or per axis."""
    if v.type.size == 1:
        return c.reshaped(v, ())
    return c.reshaped(v, tuple(x.shape[i] if i == axis else 1 for i in range(x.rank)))


def in_blocks(
    c: Call, x: Value, axis: int, block: int, scale: Value, zero: Value | None, apply: Callable[..., Value]
) -> Value:
    """`apply(x, scale, zero)` where they are given per tensor, per axis, or per block of an axis: then x has an axis
    more meanwhile."""
    if not block:
        return apply(x, along_axis(c, scale, x, axis), None if zero is None else along_axis(c, zero, x, axis))
    blocks = scale.shape[axis]
    if exact_div(x.shape[axis], blocks) != block:
        raise Fallback("its blocks do not divide the axis")
    split = (*x.shape[:axis], blocks, block, *x.shape[axis + 1 :])
    one = (*split[: axis + 1], 1, *split[axis + 2 :])
    y = apply(
        c.reshape(x, shape=split), c.reshape(scale, shape=one), None if zero is None else c.reshape(zero, shape=one)
    )
    return c.reshape(y, shape=x.shape)


def dequantize(c: Call, x: Value, scale: Value, zero: Value | None) -> Value:
    """(x - zero) * scale in f32, of operands that broadcast."""
    if x.dtype in _RANGES:
        zero = c.like(x, 0) if zero is None else c.cast_to(zero, x.dtype)
        return c.dequantize(x, c.cast_to(scale, DType.f32), zero)
    wide = c.cast_to(x, DType.i32) if x.dtype.is_int else c.cast_to(x, DType.f32)
    if zero is not None and not (zero.data is not None and not zero.data.any()):
        wide = c.sub(wide, c.cast_to(zero, wide.dtype))
    return c.mul(c.cast_to(wide, DType.f32), c.cast_to(scale, DType.f32))


def quantize(c: Call, x: Value, scale: Value, zero: Value | None, to: DType) -> Value:
    """saturate(round(x / scale) + zero), of operands that broadcast."""
    if to in RANGES:
        zero = c.const(0, to) if zero is None else c.cast_to(zero, to)
        return c.quantize(c.cast_to(x, DType.f32), c.cast_to(scale, DType.f32), zero)
    y = c.div(c.cast_to(x, DType.f32), c.cast_to(scale, DType.f32))
    if to.is_float:
        y = y if zero is None else c.add(y, c.cast_to(zero, DType.f32))
        return cast_value(c, y, to)
    low, high = _RANGES[to]
    y = c.round(y)
    y = y if zero is None else c.add(y, c.cast_to(zero, DType.f32))
    return c.cast_to(c.clip(y, min=float(low), max=float(high)), to)


@onnx_op("DequantizeLinear", since=10)
@onnx_op("DequantizeLinear", domain="com.microsoft")
def dequantize_linear(c: Call, x: Value, scale: Value, zero: Value | None = None) -> Value:
    axis, block = c.axis(c.attr("axis", 1), max(x.rank, 2)), c.attr("block_size", 0)
    to = dtype_of(c.attr("output_dtype"), c.site) if c.attr("output_dtype", 0) else scale.dtype
    return c.cast_to(in_blocks(c, x, axis, block, scale, zero, partial(dequantize, c)), to)


@onnx_op("QuantizeLinear", since=10)
@onnx_op("QuantizeLinear", domain="com.microsoft")
def quantize_linear(c: Call, x: Value, scale: Value, zero: Value | None = None) -> Value:
    axis, block = c.axis(c.attr("axis", 1), max(x.rank, 2)), c.attr("block_size", 0)
    to = (
        zero.dtype
        if zero is not None
        else dtype_of(c.attr("output_dtype"), c.site)
        if c.attr("output_dtype", 0)
        else DType.u8
    )
    if to not in _RANGES and not to.is_float:
        raise Fallback(f"it quantizes to {to}")
    if to.is_float and not c.attr("saturate", 1):
        raise Fallback("it does not saturate")
    return in_blocks(c, x, axis, block, scale, zero, partial(quantize, c, to=to))


@onnx_op("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(c: Call, x: Value) -> Result:
    axes, zero = tuple(range(x.rank)), c.like(x, 0)
    low = c.min(c.reduce_min(x, axes=axes, keepdims=False), zero)
    high = c.max(c.reduce_max(x, axes=axes, keepdims=False), zero)
    scale = c.div(c.sub(high, low), c.like(x, 255))
    point = c.clip(c.round(c.div(c.neg(low), scale)), min=0.0, max=255.0)
    # Nothing but zeros: any scale is right, and 0/0 must not reach the integer.
    point = c.where(c.eq(scale, zero), zero, point)
    quantized = quantize(c, x, c.where(c.eq(scale, zero), c.like(x, 1), scale), c.cast_to(point, DType.u8), DType.u8)
    return quantized, scale, c.cast_to(point, DType.u8)


def _shifted(c: Call, x: Value, zero: Value | None, shape: Sequence[Dim]) -> Value:
    """x - zero in i32; a zero point with several elements takes the given shape."""
    wide = c.cast_to(x, DType.i32)
    if zero is None or (zero.data is not None and not zero.data.any()):
        return wide
    zero = c.cast_to(zero, DType.i32)
    return c.sub(wide, c.reshaped(zero, () if zero.type.size == 1 else tuple(shape)))


def _narrow_weights(c: Call, w: Value, zero: Value | None) -> Value | None:
    """Constant w - zero where it fits i8: what integer products take. `zero` varies along the columns or filters."""
    if w.data is None or w.dtype not in BYTES or (zero is not None and zero.data is None):
        return None
    wide = w.data.astype(np.int32)
    if zero is not None and zero.data is not None:
        columns = zero.data.reshape(-1).astype(np.int32)
        filters = columns.reshape(-1, *[1] * (w.rank - 1)) if w.rank > 2 and columns.size > 1 else columns
        if zero.rank > 1 or (columns.size > 1 and columns.size != w.shape[0 if w.rank > 2 else -1]):
            return None
        wide = wide - filters
    fits = not wide.size or (wide.min() >= -128 and wide.max() <= 127)
    return c.const(wide.astype(np.int8)) if fits else None


def _zero_of(c: Call, x: Value, zero: Value | None) -> Value | None:
    """The zero point of bytes as a scalar, or None where there is not just one."""
    if x.dtype not in BYTES:
        return None
    if zero is None:
        return c.like(x, 0)
    return c.reshaped(zero, ()) if zero.type.size == 1 else None


def _product(c: Call, a: Value, b: Value, a_zero: Value | None, b_zero: Value | None) -> Value:
    narrow, zero = _narrow_weights(c, b, b_zero) if b.rank == 2 and a.rank > 1 else None, _zero_of(c, a, a_zero)
    if narrow is not None and zero is not None:
        return c.matmul_integer(a, narrow, zero)
    rows = a_zero is not None and a_zero.rank == 1
    left = _shifted(
        c, a, a_zero, (a.shape[-2], 1) if rows and a.rank > 1 else a_zero.shape if a_zero is not None else ()
    )
    columns = b_zero is not None and b_zero.rank == 1
    right = _shifted(c, b, b_zero, (b.shape[-1],) if columns else b_zero.shape if b_zero is not None else ())
    return c.matmul(left, right)


@onnx_op("MatMulInteger", since=10)
def matmul_integer(c: Call, a: Value, b: Value, a_zero: Value | None = None, b_zero: Value | None = None) -> Value:
    return _product(c, a, b, a_zero, b_zero)


def _convolved(
    c: Call, x: Value, w: Value, x_zero: Value | None, w_zero: Value | None, bias: Value | None = None
) -> Value:
    narrow, zero = _narrow_weights(c, w, w_zero), _zero_of(c, x, x_zero)
    if narrow is not None and zero is not None and zero.data is not None:  # it pads with the zero point
        return convolve(c, x, narrow, bias, zero)
    filters = (w.shape[0], *[1] * (w.rank - 1))
    return convolve(c, _shifted(c, x, x_zero, ()), _shifted(c, w, w_zero, filters), bias)


@onnx_op("ConvInteger", since=10)
def conv_integer(c: Call, x: Value, w: Value, x_zero: Value | None = None, w_zero: Value | None = None) -> Value:
    return _convolved(c, x, w, x_zero, w_zero)


@onnx_op("QLinearMatMul", since=10)
def qlinear_matmul(
    c: Call,
    a: Value,
    a_scale: Value,
    a_zero: Value,
    b: Value,
    b_scale: Value,
    b_zero: Value,
    y_scale: Value,
    y_zero: Value,
) -> Value:
    total = c.cast_to(_product(c, a, b, a_zero, b_zero), DType.f32)
    left = c.cast_to(a_scale, DType.f32)
    left = c.reshaped(left, () if left.type.size == 1 else (left.type.size, 1) if left.rank == 1 else left.shape)
    right = c.cast_to(b_scale, DType.f32)
    right = c.reshaped(right, () if right.type.size == 1 else right.shape)
    return quantize(c, c.mul(total, c.mul(left, right)), y_scale, y_zero, y_zero.dtype)


@onnx_op("QLinearConv", since=10)
def qlinear_conv(
    c: Call,
    x: Value,
    x_scale: Value,
    x_zero: Value,
    w: Value,
    w_scale: Value,
    w_zero: Value,
    y_scale: Value,
    y_zero: Value,
    bias: Value | None = None,
) -> Value:
    total = c.cast_to(_convolved(c, x, w, x_zero, w_zero, bias), DType.f32)
    scale = c.mul(c.reshaped(x_scale, ()), w_scale)
    scale = c.reshaped(scale, () if scale.type.size == 1 else (scale.type.size, *[1] * (x.rank - 2)))
    return quantize(c, c.mul(total, scale), y_scale, y_zero, y_zero.dtype)


@onnx_op("QLinearAdd", "QLinearMul", domain="com.microsoft")
def qlinear_binary(
    c: Call,
    a: Value,
    a_scale: Value,
    a_zero: Value,
    b: Value,
    b_scale: Value,
    b_zero: Value,
    y_scale: Value,
    y_zero: Value,
) -> Value:
    left, right = dequantize(c, a, a_scale, a_zero), dequantize(c, b, b_scale, b_zero)
    return quantize(
        c, c.add(left, right) if c.op_type == "QLinearAdd" else c.mul(left, right), y_scale, y_zero, y_zero.dtype
    )


@onnx_op("QGemm", domain="com.microsoft")
def qgemm(
    c: Call,
    a: Value,
    a_scale: Value,
    a_zero: Value,
    b: Value,
    b_scale: Value,
    b_zero: Value,
    bias: Value | None = None,
    y_scale: Value | None = None,
    y_zero: Value | None = None,
) -> Value:
    """Unless y_scale is given the result is f32. The bias is i32 with the scale a_scale * b_scale."""
    if c.attr("transA", 0):
        a = c.transposed(a, (1, 0))
    if c.attr("transB", 0):
        b = c.transposed(b, (1, 0))
    total = _product(c, a, b, c.reshaped(a_zero, ()), b_zero)
    if bias is not None:
        total = c.add(total, bias)
    scale = c.mul(c.reshaped(c.cast_to(a_scale, DType.f32), ()), c.cast_to(b_scale, DType.f32))
    scale = c.reshaped(scale, () if scale.type.size == 1 else scale.shape)
    alpha = c.attr("alpha", 1.0)
    y = c.mul(c.cast_to(total, DType.f32), scale if alpha == 1 else c.mul(scale, c.like(scale, alpha)))
    return y if y_scale is None or y_zero is None else quantize(c, y, y_scale, y_zero, y_zero.dtype)


@onnx_op("QLinearSigmoid", "QLinearLeakyRelu", domain="com.microsoft")
def qlinear_unary(
    c: Call, x: Value, x_scale: Value, x_zero: Value | None, y_scale: Value, y_zero: Value | None = None
) -> Value:
    wide = dequantize(c, x, x_scale, x_zero)
    y = c.sigmoid(wide) if c.op_type == "QLinearSigmoid" else c.leaky_relu(wide, alpha=c.attr("alpha", 0.01))
    return quantize(c, y, y_scale, y_zero, x.dtype)


@onnx_op("QLinearConcat", domain="com.microsoft")
def qlinear_concat(c: Call, y_scale: Value, y_zero: Value, *parts: Value) -> Value:
    """Operands come as (tensor, scale, zero point), each brought to the scale of the result."""
    wide = [dequantize(c, *parts[i : i + 3]) for i in range(0, len(parts), 3)]
    return c.concat(
        *(quantize(c, x, y_scale, y_zero, y_zero.dtype) for x in wide), axis=c.axis(c.attr("axis"), wide[0].rank)
    )


@onnx_op("QLinearGlobalAveragePool", domain="com.microsoft")
def qlinear_global_average_pool(
    c: Call, x: Value, x_scale: Value, x_zero: Value, y_scale: Value, y_zero: Value
) -> Value:
    axes = tuple(range(1, x.rank - 1)) if c.attr("channels_last", 0) else tuple(range(2, x.rank))
    mean = c.reduce_mean(dequantize(c, x, x_scale, x_zero), axes=axes, keepdims=True)
    return quantize(c, mean, y_scale, y_zero, y_zero.dtype)


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` numbers of the last axis of a u8 array that holds 8 // bits of them in each byte, low bits
    first.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    wide = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return wide.reshape(*packed.shape[:-1], -1)[..., :count]


@onnx_op("MatMulNBits", domain="com.microsoft")
def matmul_n_bits(
    c: Call,
    a: Value,
    packed: Value,
    scales: Value,
    zeros: Value | None = None,
    groups: Value | None = None,
    bias: Value | None = None,
) -> Value:
    """B is packed [N, blocks, bytes]. Weights of 2 bits become weights of 4."""
    bits, depth, width, block = c.attr("bits", 4), c.attr("K"), c.attr("N"), c.attr("block_size")
    if groups is not None or bits not in (2, 4, 8):
        raise Fallback("its blocks are reordered" if groups is not None else f"its weights have {bits} bits")
    blocks = -(-depth // block)
    levels = unpack_bits(c.array(packed, "the packed matrix").reshape(width, blocks, -1), bits, block)
    q = np.ascontiguousarray(levels.reshape(width, -1)[:, :depth].T)
    scale = c.array(scales, "the scales").astype(np.float32).reshape(width, blocks)
    if zeros is None:
        zero = np.full((width, blocks), 1 << (bits - 1), np.float32)
    else:
        given = c.array(zeros, "the zero points")
        is_packed = given.dtype == np.uint8
        zero = unpack_bits(given.reshape(width, -1), bits, blocks) if is_packed else given.reshape(width, blocks)
    named = [
        c.const(q.astype((DType.u8 if bits == 8 else DType.u4).numpy)),
        c.const(np.ascontiguousarray(scale.T)),
        c.const(np.ascontiguousarray(zero.astype(np.float32).T)),
    ]
    y = c.cast_to(c.matmul_blocks(c.cast_to(a, DType.f32), *named, block=block), a.dtype)
    return y if bias is None else c.add(y, bias)
