"""Normalizations: Batch, Instance, Group, Layer, RMS, Lp, LRN, and Microsoft's skip variants."""

from __future__ import annotations

from vivace.base.dims import prod
from vivace.base.dtypes import DType
from vivace.base.errors import GraphError
from vivace.graph.graph import Value
from vivace.graph.ops.shapes import broadcast, same
from vivace.onnx.call import Call, Result, onnx_op
from vivace.onnx.scope import Fallback


def per_channel(c: Call, v: Value, x: Value) -> Value:
    """A vector over channels (axis 1 of x) in a shape that broadcasts with x."""
    return c.reshaped(v, (*v.shape, *[1] * max(x.rank - 2, 0)))


@onnx_op("BatchNormalization")
def batch_normalization(c: Call, x: Value, scale: Value, bias: Value, mean: Value, variance: Value) -> Value:
    if c.attr("training_mode", 0) or c.n_outputs > 1 or not c.attr("spatial", 1):
        raise Fallback("it trains, or normalizes each position on its own")
    scale, bias = c.cast_to(scale, mean.dtype), c.cast_to(bias, mean.dtype)
    factor = c.div(scale, c.sqrt(c.add(variance, c.like(variance, c.attr("epsilon", 1e-5)))))
    offset = c.sub(bias, c.mul(mean, factor))
    factor, offset = (per_channel(c, c.cast_to(v, x.dtype), x) for v in (factor, offset))
    return c.add(c.mul(x, factor), offset)


@onnx_op("InstanceNormalization")
def instance_normalization(c: Call, x: Value, scale: Value, bias: Value) -> Value:
    y = c.layer_norm(x, axis=2, epsilon=c.attr("epsilon", 1e-5)) if x.rank > 2 else x
    return c.add(c.mul(y, per_channel(c, scale, x)), per_channel(c, bias, x))


@onnx_op("GroupNormalization", since=18)
def group_normalization_18(c: Call, x: Value, scale: Value, bias: Value) -> Value:
    y, groups = _grouped(c, x)
    y = c.reshaped(y, (x.shape[0], groups, prod(x.shape[1:]) // groups))
    y = c.add(c.mul(y, c.reshaped(scale, (groups, 1))), c.reshaped(bias, (groups, 1)))
    return c.reshaped(y, x.shape)


@onnx_op("GroupNormalization", since=21)
def group_normalization(c: Call, x: Value, scale: Value, bias: Value) -> Value:
    if scale.rank == 1:
        same(x.shape[1], scale.shape[0], "GroupNormalization")
    y, _ = _grouped(c, x)
    y = c.reshaped(y, x.shape)
    return c.add(c.mul(y, per_channel(c, scale, x)), per_channel(c, bias, x))


def _grouped(c: Call, x: Value) -> tuple[Value, int]:
    groups = c.attr("num_groups")
    if not isinstance(x.shape[1], int) or not groups or x.shape[1] % groups:
        raise c.error(f"{x.shape[1]} channels do not divide into {groups} groups")
    flat = c.reshaped(x, (x.shape[0], groups, prod(x.shape[1:]) // groups))
    return c.layer_norm(flat, axis=2, epsilon=c.attr("epsilon", 1e-5)), groups


def _fits(x: Value, v: Value | None, axis: int) -> bool:
    try:
        return v is None or broadcast((x.shape[axis:], v.shape), "") == x.shape[axis:]
    except GraphError:
        return False


@onnx_op("LayerNormalization", since=1)
def layer_normalization(c: Call, x: Value, scale: Value, bias: Value | None = None) -> Result:
    axis, epsilon = c.axis(c.attr("axis", -1), x.rank), c.attr("epsilon", 1e-5)
    if _fits(x, scale, axis) and _fits(x, bias, axis):
        y = c.layer_norm(x, scale, bias, axis=axis, epsilon=epsilon)
    else:
        y = c.mul(c.layer_norm(x, axis=axis, epsilon=epsilon), scale)
        y = y if bias is None else c.add(y, bias)
    if c.n_outputs == 1:
        return y
    axes, wide = tuple(range(axis, x.rank)), c.cast_to(x, DType.f32)
    mean = c.reduce_mean(wide, axes=axes, keepdims=True)
    centred = c.sub(wide, mean)
    variance = c.reduce_mean(c.mul(centred, centred), axes=axes, keepdims=True)
    inverse = c.div(c.like(variance, 1), c.sqrt(c.add(variance, c.like(variance, epsilon))))
    return (y, mean, inverse)[: c.n_outputs]


@onnx_op("RMSNormalization", since=23)
@onnx_op("SimplifiedLayerNormalization")
def rms_normalization(c: Call, x: Value, scale: Value) -> Value:
    axis, epsilon = c.axis(c.attr("axis", -1), x.rank), c.attr("epsilon", 1e-5)
    if c.n_outputs > 1:
        raise Fallback("it also gives the inverse deviation")
    scale = c.cast_to(scale, x.dtype)
    if _fits(x, scale, axis):
        return c.rms_norm(x, scale, axis=axis, epsilon=epsilon)
    return c.mul(c.rms_norm(x, axis=axis, epsilon=epsilon), scale)


@onnx_op("SkipLayerNormalization", domain="com.microsoft")
def skip_layer_normalization(
    c: Call, x: Value, skip: Value, gamma: Value, beta: Value | None = None, bias: Value | None = None
) -> Result:
    total = c.add(x, skip)
    total = total if bias is None else c.add(total, bias)
    y = c.layer_norm(total, gamma, beta, axis=x.rank - 1, epsilon=c.attr("epsilon", 1e-12))
    return _skip_outputs(c, y, total)


@onnx_op("SkipSimplifiedLayerNormalization", domain="com.microsoft")
def skip_rms_normalization(c: Call, x: Value, skip: Value, gamma: Value, bias: Value | None = None) -> Result:
    total = c.add(x, skip)
    total = total if bias is None else c.add(total, bias)
    return _skip_outputs(c, c.rms_norm(total, gamma, axis=x.rank - 1, epsilon=c.attr("epsilon", 1e-12)), total)


def _skip_outputs(c: Call, y: Value, total: Value) -> Result:
    names = list(c.node.output)
    if any(names[1:3]):
        raise Fallback("it also gives the mean or the inverse deviation")
    return (y, None, None, total)[: len(names)]  # type: ignore[return-value]


@onnx_op("LpNormalization")
def lp_normalization(c: Call, x: Value) -> Value:
    axes = (c.axis(c.attr("axis", -1), x.rank),)
    if c.attr("p", 2) == 1:
        norm = c.reduce_sum(c.abs(x), axes=axes, keepdims=True)
    else:
        norm = c.sqrt(c.reduce_sum(c.mul(x, x), axes=axes, keepdims=True))
    zero = c.eq(norm, c.like(norm, 0))
    return c.where(zero, c.like(x, 0), c.div(x, c.where(zero, c.like(norm, 1), norm)))


@onnx_op("LRN")
def lrn(c: Call, x: Value) -> Value:
    """x / (bias + alpha * mean of squares over `size` channels)^beta: an average over channels that counts its
    padding.
    """
    size, alpha, beta, bias = c.attr("size"), c.attr("alpha", 1e-4), c.attr("beta", 0.75), c.attr("bias", 1.0)
    planes = c.reshaped(c.mul(x, x), (x.shape[0], 1, x.shape[1], prod(x.shape[2:])))
    mean = c.avg_pool(
        planes,
        kernel=(size, 1),
        strides=(1, 1),
        dilations=(1, 1),
        before=((size - 1) // 2, 0),
        after=(size // 2, 0),
        count_include_pad=True,
        layout="NCHW",
    )
    scale = c.add(c.mul(c.reshaped(mean, x.shape), c.like(x, alpha)), c.like(x, bias))
    return c.div(x, c.pow(scale, c.like(x, beta)))
