"""QLinear operators: what they compute on the numbers behind their bytes, between `dequantize` and `quantize`."""

from __future__ import annotations

from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.onnx.call import Call, onnx_op
from vivace.onnx.ops.activation import softmax_of
from vivace.onnx.ops.pooling import averages
from vivace.onnx.ops.quant import dequantize, quantize
from vivace.onnx.ops.quant_integer import convolved, product
from vivace.onnx.scope import Fallback


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
    total = c.cast_to(product(c, a, b, a_zero, b_zero), DType.f32)
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
    total = c.cast_to(convolved(c, x, w, x_zero, w_zero, bias), DType.f32)
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
    total = product(c, a, b, c.reshaped(a_zero, ()), b_zero)
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


@onnx_op("QLinearSoftmax", domain="com.microsoft")
def qlinear_softmax(
    c: Call, x: Value, x_scale: Value, x_zero: Value | None, y_scale: Value, y_zero: Value | None = None
) -> Value:
    y = softmax_of(c, dequantize(c, x, x_scale, x_zero), c.attr("opset", 13))
    return quantize(c, y, y_scale, y_zero, x.dtype)


@onnx_op("QLinearWhere", domain="com.microsoft")
def qlinear_where(
    c: Call,
    condition: Value,
    x: Value,
    x_scale: Value,
    x_zero: Value,
    y: Value,
    y_scale: Value,
    y_zero: Value,
    z_scale: Value,
    z_zero: Value,
) -> Value:
    chosen = c.where(condition, dequantize(c, x, x_scale, x_zero), dequantize(c, y, y_scale, y_zero))
    return quantize(c, chosen, z_scale, z_zero, z_zero.dtype)


@onnx_op("QLinearAveragePool", domain="com.microsoft")
def qlinear_average_pool(
    c: Call, x: Value, x_scale: Value, x_zero: Value | None, y_scale: Value, y_zero: Value | None = None
) -> Value:
    if c.attr("channels_last", 0):
        raise Fallback("its channels are last")
    return quantize(c, averages(c, dequantize(c, x, x_scale, x_zero)), y_scale, y_zero, x.dtype)


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
