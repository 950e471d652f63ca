"""Products of integers: MatMulInteger, ConvInteger, MatMulNBits, and com.microsoft's that scale the sum to f32.

Those with constant i8 weights become `matmul_integer` and `conv_integer`; others are widened to i32 and summed there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vivace.base.dims import Dim
from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.graph.ops.quantized import BYTES
from vivace.onnx.call import Call, onnx_op
from vivace.onnx.ops.nn import convolve
from vivace.onnx.ops.quant import quantize_by_range
from vivace.onnx.scope import Fallback


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


def product(c: Call, a: Value, b: Value, a_zero: Value | None, b_zero: Value | None) -> Value:
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
    return product(c, a, b, a_zero, b_zero)


def _scaled(c: Call, total: Value, a_scale: Value, b_scale: Value, bias: Value | None) -> Value:
    """total * a_scale * b_scale + bias, b_scale for all or per column."""
    scale = c.mul(c.reshaped(a_scale, ()), c.reshaped(b_scale, () if b_scale.type.size == 1 else b_scale.shape))
    y = c.mul(c.cast_to(total, scale.dtype), scale)
    return y if bias is None else c.add(y, bias)


@onnx_op("MatMulIntegerToFloat", domain="com.microsoft")
def matmul_integer_to_float(
    c: Call,
    a: Value,
    b: Value,
    a_scale: Value,
    b_scale: Value,
    a_zero: Value | None = None,
    b_zero: Value | None = None,
    bias: Value | None = None,
) -> Value:
    return _scaled(c, product(c, a, b, a_zero, b_zero), a_scale, b_scale, bias)


@onnx_op("DynamicQuantizeMatMul", domain="com.microsoft")
def dynamic_quantize_matmul(
    c: Call, a: Value, b: Value, b_scale: Value, b_zero: Value | None = None, bias: Value | None = None
) -> Value:
    q, scale, zero = quantize_by_range(c, a)
    return _scaled(c, product(c, q, b, zero, b_zero), scale, b_scale, bias)


def convolved(
    c: Call, x: Value, w: Value, x_zero: Value | None, w_zero: Value | None, bias: Value | None = None
) -> Value:
    narrow, zero = _narrow_weights(c, w, w_zero), _zero_of(c, x, x_zero)
    if narrow is not None and zero is not None and zero.data is not None:  # it pads with the zero point
        return convolve(c, x, narrow, bias, zero)
    filters = (w.shape[0], *[1] * (w.rank - 1))
    return convolve(c, _shifted(c, x, x_zero, ()), _shifted(c, w, w_zero, filters), bias)


@onnx_op("ConvInteger", since=10)
def conv_integer(c: Call, x: Value, w: Value, x_zero: Value | None = None, w_zero: Value | None = None) -> Value:
    return convolved(c, x, w, x_zero, w_zero)


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` numbers of the last axis of a u8 array that holds 8 // bits of them in each byte, low bits
    first.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    wide = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return wide.reshape(*packed.shape[:-1], -1)[..., :count]


_ROUNDED = {2: DType.f16, 3: DType.bf16, 4: DType.i8}  # by `accuracy_level`


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
    """B is packed [N, blocks, bytes]. Weights of 2 bits become weights of 4. `accuracy_level` is what A may be rounded
    to: nothing (0, 1), f16, bf16, or bytes.
    """
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
    may_round = _ROUNDED.get(c.attr("accuracy_level", 0))
    attrs = {"block": block} | ({"rounded": may_round} if may_round is not None else {})
    y = c.cast_to(c.matmul_blocks(c.cast_to(a, DType.f32), *named, **attrs), a.dtype)
    return y if bias is None else c.add(y, bias)
