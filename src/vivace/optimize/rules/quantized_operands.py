"""What rules for quantized graphs ask of their operands: the integers behind a value, with scale and zero point."""

from __future__ import annotations

import numpy as np

from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.graph.ops.quantized import BYTES
from vivace.graph.rewrite import At, Example, scalar

Array = np.ndarray
F32 = np.float32
CLOSE = 1e-5
"""How far the scale of a bias may be from the product of the operands' scales, which it is by definition: roundings of
whoever wrote the model."""


def parameters(n: Node | None) -> tuple[float, int] | None:
    """Scale and zero point of a quantize or dequantize node where both are single constants."""
    if n is None:
        return None
    scale, zero = scalar(n.inputs[1]), scalar(n.inputs[2])
    return None if scale is None or zero is None else (float(scale), int(zero))


def bytes_behind(v: Value | None, at: At) -> tuple[Value, float, Value] | str | None:
    """The bytes behind a dequantized activation, their scale, and their zero point as a scalar."""
    n = at.by(v, "dequantize")
    if n is None or n.inputs[0] is None:
        return None
    known = parameters(n)
    if n.inputs[0].dtype not in BYTES:
        return f"%{n.inputs[0].name} is {n.inputs[0].dtype}"
    if known is None:
        return f"%{n.inputs[0].name} has no single constant scale"
    return n.inputs[0], known[0], at.const(np.asarray(known[1], n.inputs[0].dtype.numpy), "zero")


def constant_weights(v: Value | None, at: At, axis: int) -> tuple[Array, Array] | str | None:
    """A dequantized constant as i8 without a zero point, and its scales: one, or one along `axis`."""
    n = at.by(v, "dequantize")
    if n is None:
        return None
    q, scale, zero = (x.data if x is not None else None for x in n.inputs)
    if q is None or scale is None or zero is None:
        return "its second operand changes at run time"
    shape = [1] * q.ndim
    shape[axis] = q.shape[axis]
    if scale.size != 1 and (scale.shape != tuple(shape)[-scale.ndim :] or scale.size != shape[axis]):
        return "the scales vary along another axis than that of the results"
    if n.inputs[0] is not None and n.inputs[0].dtype not in (*BYTES, DType.i4, DType.u4):
        return f"the weights are {n.inputs[0].dtype}"
    wide = q.astype(np.int32) - zero.astype(np.int32)
    if wide.size and (wide.min() < -128 or wide.max() > 127):
        return "the weights less their zero point do not fit i8"
    return wide.astype(np.int8), scale.reshape(-1).astype(F32)


def integer_bias(v: Value | None, at: At, scale: Array) -> Array | None:
    """The i32 bias behind `v` when its scale is that of the sums."""
    n = at.by(v, "dequantize")
    if n is None:
        return None
    q, s, zero = (x.data if x is not None else None for x in n.inputs)
    if q is None or s is None or zero is None or q.dtype != np.int32 or zero.any():
        return None
    try:
        gap = np.abs(s.reshape(-1).astype(np.float64) - scale) > CLOSE * np.abs(scale)
    except ValueError:
        return None
    return None if np.any(gap) else q.reshape(-1)


def fits(depth: int, bias: Array | None) -> bool:
    """Whether no sum can leave 32 bits."""
    most = 0 if bias is None or not bias.size else int(np.abs(bias.astype(np.int64)).max())
    return depth * 255 * 128 + most < 2**31


def column(values: Array, rank: int, axis: int) -> Array:
    """Numbers along one axis, in a shape that broadcasts; one number stands for all."""
    return (
        values.reshape(()) if values.size == 1 else values.reshape([-1 if i == axis else 1 for i in range(axis, rank)])
    )


def example_bytes(e: Example, kind: str, scale: float = 0.5, zero: int = 1) -> Value:
    x = e.x(kind)
    return e.dequantize(x, e.const(F32(scale)), e.const(np.asarray(zero, x.dtype.numpy)))


def example_weights(e: Example, *shape: int, axis: int = 0, dtype: type = np.int8) -> Value:
    low, high = (-100, 100) if dtype is np.int8 else (30, 230)
    q = e.const(e.random.integers(low, high, shape).astype(dtype))
    wide = [1] * len(shape)
    wide[axis] = shape[axis]
    return e.dequantize(
        q,
        e.const(e.random.uniform(0.01, 0.02, wide).astype(F32)),
        e.const(np.full(wide, 0 if dtype is np.int8 else 128, dtype)),
    )
