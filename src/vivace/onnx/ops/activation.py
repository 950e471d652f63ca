"""Activations: Clip, LeakyRelu, PRelu, Elu, Selu, Celu, Gelu, Mish, HardSwish, Softmax and their kin."""

from __future__ import annotations

from vivace.base.dims import prod
from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.onnx.call import Call, onnx_op


def _number(v: Value, like: DType) -> float | int:
    assert v.data is not None
    e = v.data.reshape(-1)[0].item()
    return float(e) if like.is_float else int(e)


@onnx_op("Clip")
def clip_attributes(c: Call, x: Value) -> Value:
    low, high = c.attr("min"), c.attr("max")
    return x if low is None and high is None else c.clip(x, min=low, max=high)


@onnx_op("Clip", since=11)
def clip(c: Call, x: Value, low: Value | None = None, high: Value | None = None) -> Value:
    if c.scope.known(x) is None and all(b is None or b.data is not None for b in (low, high)):
        bounds = [None if b is None else _number(b, x.dtype) for b in (low, high)]
        return x if bounds == [None, None] else c.clip(x, min=bounds[0], max=bounds[1])
    x = x if low is None else c.max(x, low)
    return x if high is None else c.min(x, high)


@onnx_op("LeakyRelu")
def leaky_relu(c: Call, x: Value) -> Value:
    return c.leaky_relu(x, alpha=c.attr("alpha", 0.01))


@onnx_op("PRelu")
def prelu(c: Call, x: Value, slope: Value) -> Value:
    if slope.data is not None and slope.data.size == 1 and slope.rank <= x.rank:
        return c.leaky_relu(x, alpha=float(slope.data.reshape(-1)[0]))
    return c.where(c.lt(x, c.like(x, 0)), c.mul(x, slope), x)


@onnx_op("ThresholdedRelu", since=10)
def thresholded_relu(c: Call, x: Value) -> Value:
    return c.where(c.gt(x, c.like(x, c.attr("alpha", 1.0))), x, c.like(x, 0))


def _elu(c: Call, x: Value, positive: Value, alpha: float, scale: float = 1.0) -> Value:
    """`positive` where x > 0, else alpha * (exp(x / scale) - 1)."""
    inner = x if scale == 1 else c.div(x, c.like(x, scale))
    return c.where(c.gt(x, c.like(x, 0)), positive, c.mul(c.expm1(inner), c.like(x, alpha)))


@onnx_op("Elu")
def elu(c: Call, x: Value) -> Value:
    return _elu(c, x, x, c.attr("alpha", 1.0))


@onnx_op("Celu", since=12)
def celu(c: Call, x: Value) -> Value:
    alpha = c.attr("alpha", 1.0)
    return _elu(c, x, x, alpha, alpha)


@onnx_op("Selu")
def selu(c: Call, x: Value) -> Value:
    alpha, gamma = c.attr("alpha", 1.67326319217681884765625), c.attr("gamma", 1.05070102214813232421875)
    return _elu(c, x, c.mul(x, c.like(x, gamma)), alpha * gamma)


@onnx_op("HardSigmoid")
def hard_sigmoid(c: Call, x: Value) -> Value:
    return c.hard_sigmoid(x, alpha=c.attr("alpha", 0.2), beta=c.attr("beta", 0.5))


@onnx_op("HardSwish", since=14)
def hard_swish(c: Call, x: Value) -> Value:
    return c.hard_swish(x)


def softplus_of(c: Call, x: Value) -> Value:
    """log(1 + exp(x)) without overflow: max(x, 0) + log1p(exp(-|x|))."""
    return c.add(c.relu(x), c.log1p(c.exp(c.neg(c.abs(x)))))


@onnx_op("Softplus")
def softplus(c: Call, x: Value) -> Value:
    return softplus_of(c, x)


@onnx_op("Softsign")
def softsign(c: Call, x: Value) -> Value:
    return c.div(x, c.add(c.abs(x), c.like(x, 1)))


@onnx_op("Mish", since=18)
def mish(c: Call, x: Value) -> Value:
    return c.mul(x, c.tanh(softplus_of(c, x)))


@onnx_op("Swish", since=24)
def swish(c: Call, x: Value) -> Value:
    alpha = c.attr("alpha", 1.0)
    return c.silu(x) if alpha == 1 else c.mul(x, c.sigmoid(c.mul(x, c.like(x, alpha))))


@onnx_op("Gelu", since=20)
@onnx_op("Gelu", domain="com.microsoft")
def gelu(c: Call, x: Value) -> Value:
    return c.gelu(x, approximate=c.attr("approximate", "none"))


@onnx_op("FastGelu", "BiasGelu", domain="com.microsoft")
def bias_gelu(c: Call, x: Value, bias: Value | None = None) -> Value:
    x = x if bias is None else c.add(x, bias)
    return c.gelu(x, approximate="tanh" if c.op_type == "FastGelu" else "none")


@onnx_op("QuickGelu", domain="com.microsoft")
def quick_gelu(c: Call, x: Value) -> Value:
    return c.mul(x, c.sigmoid(c.mul(x, c.like(x, c.attr("alpha", 1.702)))))


@onnx_op("Shrink", since=9)
def shrink(c: Call, x: Value) -> Value:
    bias, bound = c.like(x, c.attr("bias", 0.0)), c.attr("lambd", 0.5)
    low = c.where(c.lt(x, c.like(x, -bound)), c.add(x, bias), c.like(x, 0))
    return c.where(c.gt(x, c.like(x, bound)), c.sub(x, bias), low)


def _flattened(c: Call, x: Value, core: str) -> Value:
    """Before opset 13, axis..rank-1 are one axis together."""
    axis = c.axis(c.attr("axis", 1), x.rank)
    flat = c.reshaped(x, (prod(x.shape[:axis]), prod(x.shape[axis:]))) if axis < x.rank - 1 else x
    return c.reshaped(getattr(c, core)(flat, axis=flat.rank - 1), x.shape)


def softmax_of(c: Call, x: Value, opset: int) -> Value:
    """Softmax as an opset has it: until 13 over all axes from the one named."""
    return c.softmax(x, axis=c.axis(c.attr("axis", -1), x.rank)) if opset >= 13 else _flattened(c, x, "softmax")


@onnx_op("Softmax")
def softmax_flat(c: Call, x: Value) -> Value:
    return softmax_of(c, x, 1)


@onnx_op("Softmax", since=13)
def softmax(c: Call, x: Value) -> Value:
    return softmax_of(c, x, 13)


@onnx_op("LogSoftmax")
def log_softmax_flat(c: Call, x: Value) -> Value:
    return _flattened(c, x, "log_softmax")


@onnx_op("LogSoftmax", since=13)
def log_softmax(c: Call, x: Value) -> Value:
    return c.log_softmax(x, axis=c.axis(c.attr("axis", -1), x.rank))


def _hardmax(c: Call, x: Value, axis: int) -> Value:
    best = c.argmax(x, axis=axis, keepdims=True, select_last=False)
    line = c.iota(shape=tuple(x.shape[axis] if i == axis else 1 for i in range(x.rank)), axis=axis, dtype=DType.i64)
    return c.cast_to(c.eq(line, best), x.dtype)


@onnx_op("Hardmax")
def hardmax_flat(c: Call, x: Value) -> Value:
    axis = c.axis(c.attr("axis", 1), x.rank)
    return c.reshaped(_hardmax(c, c.reshaped(x, (prod(x.shape[:axis]), prod(x.shape[axis:]))), 1), x.shape)


@onnx_op("Hardmax", since=13)
def hardmax(c: Call, x: Value) -> Value:
    return _hardmax(c, x, c.axis(c.attr("axis", -1), x.rank))
