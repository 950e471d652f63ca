"""Quantization: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear.

Numbers of 4 to 16 bits become the core ops `quantize` and `dequantize`; the rest is composed.
Source: `y = saturate(round_half_even(x / scale) + zero_point)`, `x = (q - zero_point) * scale`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vivace.base.dims import exact_div
from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.graph.ops.quantized import RANGES
from vivace.onnx.call import Call, Result, onnx_op
from vivace.onnx.ops.math import cast_value
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


def quantize_by_range(c: Call, x: Value) -> tuple[Value, Value, Value]:
    """x as u8 over the range that it has together with 0, and the scale and zero point."""
    axes, zero = tuple(range(x.rank)), c.like(x, 0)
    low = c.min(c.reduce_min(x, axes=axes, keepdims=False), zero)
    high = c.max(c.reduce_max(x, axes=axes, keepdims=False), zero)
    scale = c.div(c.sub(high, low), c.like(x, 255))
    point = c.clip(c.round(c.div(c.neg(low), scale)), min=0.0, max=255.0)
    # Nothing but zeros: any scale is right, and 0/0 must not reach the integer.
    point = c.where(c.eq(scale, zero), zero, point)
    quantized = quantize(c, x, c.where(c.eq(scale, zero), c.like(x, 1), scale), c.cast_to(point, DType.u8), DType.u8)
    return quantized, scale, c.cast_to(point, DType.u8)


@onnx_op("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(c: Call, x: Value) -> Result:
    return quantize_by_range(c, x)
