"""Quantized tensors: integers q that stand for the numbers (q - zero) * scale, and products of them.

quantize(x, scale, zero)        saturate(round_half_even(x / scale) + zero), in zero's dtype; f32 arithmetic
dequantize(q, scale, zero)      (q - zero) * scale, one rounding; q and zero have one dtype, the result is f32
        operands broadcast as in NumPy, and the result has x's or q's shape: scale and zero are scalars, or vary along
        axes of it
lookup{table, to}(q)            the byte `table[q]` as `to`, u8 or i8; an i8 q stands for the u8 of its bits
        table: 256 bytes in hexadecimal digits
pixels(x, scale, zero)          quantize(x, scale, zero) of f32[N,C,H,W], C up to 4, as [N,H,W,4]
        scale and zero are scalars; channels that x lacks are `zero`
conv_integer{as conv}(x, w, zero, bias?)    the convolution of x - zero with w, in i32; padding is x = zero
matmul_integer(a, b, zero, bias?)           (a - zero) @ b, in i32; bias is one per column
        x, a: u8 or i8; w, b: i8, constant; zero: a scalar of x's dtype; bias: i32
matmul_blocks{block, rounded?}(a, q, scale, zero)   a @ ((q - zero) * scale); `block` steps of k share scale and zero
        a: f32[..,k]; q: u4 or u8 [k,n]; scale, zero: f32[ceil(k/block),n]; sums in f32
        rounded: what kernels may round a to, f16, bf16, or i8: 127ths of the largest of a block; f32 where absent
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vivace.base.dims import Dim, ceildiv
from vivace.base.dtypes import DType
from vivace.base.errors import GraphError
from vivace.graph.graph import Attrs, Op, Type
from vivace.graph.ops.contraction import FAMILY as _CONTRACTIONS
from vivace.graph.ops.shapes import broadcast, need, same

Array = np.ndarray
RANGES = {
    DType.i4: (-8, 7),
    DType.u4: (0, 15),
    DType.i8: (-128, 127),
    DType.u8: (0, 255),
    DType.i16: (-32768, 32767),
    DType.u16: (0, 65535),
}
BYTES = (DType.u8, DType.i8)
PIXEL_BYTES = 4
LEVELS = (DType.u4, DType.u8)
ROUNDED = (DType.f32, DType.f16, DType.bf16, DType.i8)
_PRODUCTS = {op.name: op for op in _CONTRACTIONS}


def _shaped_as(x: Type, others: Sequence[Type], where: str) -> None:
    if broadcast((x.shape, *(t.shape for t in others)), where) != x.shape:
        raise GraphError(f"operands are {x}, {', '.join(map(str, others))}", where=where, expected=f"the shape of {x}")


def _quantize(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x, scale, zero = (need(types, i, "quantize") for i in range(3))
    if x.dtype is not DType.f32 or scale.dtype is not DType.f32 or zero.dtype not in RANGES:
        raise GraphError(
            f"operands are {x}, {scale} and {zero}", where="quantize", expected="f32, f32 and integers of 4 to 16 bits"
        )
    _shaped_as(x, (scale, zero), "quantize")
    return (Type(zero.dtype, x.shape),)


def _quantize_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x, scale, zero = xs
    assert x is not None and scale is not None and zero is not None
    low, high = RANGES[DType.of(zero.dtype)]
    with np.errstate(all="ignore"):
        q = np.rint(x / scale) + zero.astype(np.float32)
        whole = np.clip(np.where(np.isnan(q), 0, q), low, high).astype(np.int32)
    return (np.asarray(whole.astype(zero.dtype)),)


def _dequantize(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    q, scale, zero = (need(types, i, "dequantize") for i in range(3))
    if not q.dtype.is_int or q.dtype is not zero.dtype or scale.dtype is not DType.f32:
        raise GraphError(
            f"operands are {q}, {scale} and {zero}", where="dequantize", expected="integers, f32 and the same integers"
        )
    _shaped_as(q, (scale, zero), "dequantize")
    return (Type(DType.f32, q.shape),)


def _dequantize_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    q, scale, zero = xs
    assert q is not None and scale is not None and zero is not None
    # Not in i64: the difference of 32-bit numbers wraps, as it does in a register.
    with np.errstate(all="ignore"):
        return (np.asarray((q.astype(np.int32) - zero.astype(np.int32)).astype(np.float32) * scale),)


def _lookup(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    q = need(types, 0, "lookup")
    if q.dtype not in BYTES or attrs["to"] not in BYTES or len(attrs["table"]) != 512:
        raise GraphError(f"{len(attrs['table']) // 2} entries for {q}", where="lookup", expected="256 bytes for bytes")
    return (Type(attrs["to"], q.shape),)


def _lookup_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    (q,) = xs
    assert q is not None
    return (np.frombuffer(bytes.fromhex(attrs["table"]), attrs["to"].numpy)[q.astype(np.uint8)],)


def _pixels(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x, scale, zero = (need(types, i, "pixels") for i in range(3))
    channels = x.shape[1] if x.rank == 4 else None
    fits = isinstance(channels, int) and 0 < channels <= PIXEL_BYTES and zero.dtype in BYTES
    if not fits or scale.size != 1 or zero.size != 1:
        raise GraphError(
            f"operands are {x}, {scale} and {zero}", where="pixels", expected="an image, and single numbers"
        )
    return (Type(zero.dtype, (x.shape[0], *x.shape[2:], PIXEL_BYTES)),)


def _pixels_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x, scale, zero = xs
    assert x is not None and scale is not None and zero is not None
    (q,) = _quantize_run((x, scale.reshape(()), zero.reshape(())), attrs)
    missing = ((0, 0), (0, 0), (0, 0), (0, PIXEL_BYTES - x.shape[1]))
    return (np.pad(q.transpose(0, 2, 3, 1), missing, constant_values=zero.reshape(())),)


def _two_flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    return 2 * outs[0].size


def _wide(types: Sequence[Type | None], where: str) -> list[Type | None]:
    """The operands of the product as i32. Raises: GraphError for others than bytes."""
    x, w, zero = (need(types, i, where) for i in range(3))
    bias = types[3] if len(types) > 3 else None
    if x.dtype not in BYTES or w.dtype not in BYTES or zero.dtype is not x.dtype or zero.rank:
        raise GraphError(f"operands are {x}, {w} and {zero}", where=where, expected="bytes, bytes and a scalar")
    if bias is not None and bias.dtype is not DType.i32:
        raise GraphError(f"bias is {bias}", where=where, expected="i32")
    return [Type(DType.i32, x.shape), Type(DType.i32, w.shape), bias]


def _wide_arrays(xs: Sequence[Array | None]) -> list[Array | None]:
    x, w, zero = xs[:3]
    assert x is not None and w is not None and zero is not None
    wide: list[Array | None] = [x.astype(np.int32) - zero.astype(np.int32), w.astype(np.int32)]
    return wide + ([xs[3]] if len(xs) > 3 and xs[3] is not None else [])


def _conv(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    return _PRODUCTS["conv"].infer(_wide(types, "conv_integer"), attrs)


def _conv_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    return _PRODUCTS["conv"].evaluate(_wide_arrays(xs), attrs)


def _matmul(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    a, b, bias = _wide(types, "matmul_integer")
    outs = _PRODUCTS["matmul"].infer([a, b], attrs)
    if bias is not None:
        same(bias.shape[0] if bias.rank == 1 else 0, outs[0].shape[-1], "matmul_integer")
    return outs


def _matmul_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    a, b, *bias = _wide_arrays(xs)
    (out,) = _PRODUCTS["matmul"].evaluate([a, b], attrs)
    return (out if not bias else out + bias[0],)


def _matmul_blocks(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    a, q, scale, zero = (need(types, i, "matmul_blocks") for i in range(4))
    block = attrs["block"]
    if a.dtype is not DType.f32 or q.dtype not in LEVELS or scale.dtype is not DType.f32 or zero.dtype is not DType.f32:
        raise GraphError(
            f"operands are {a}, {q}, {scale} and {zero}", where="matmul_blocks", expected="f32, u4 or u8, f32 and f32"
        )
    if not a.rank or q.rank != 2 or not isinstance(block, int) or block < 1:
        raise GraphError(f"operands are {a} and {q} in blocks of {block}", where="matmul_blocks", expected="matrices")
    if rounded_to(attrs) not in ROUNDED:
        raise GraphError(f"rows rounded to {rounded_to(attrs)}", where="matmul_blocks", expected="f32, f16, bf16 or i8")
    same(a.shape[-1], q.shape[0], "matmul_blocks")
    for v in (scale, zero):
        if v.shape != (ceildiv(q.shape[0], block), q.shape[1]):
            raise GraphError(f"{v} for blocks of {block} of {q}", where="matmul_blocks", expected="one per block")
    return (Type(DType.f32, (*a.shape[:-1], q.shape[1])),)


def rounded_to(attrs: Attrs) -> DType:
    """What the rows of matmul_blocks may be rounded to."""
    return attrs.get("rounded", DType.f32)


def dequantized_blocks(q: Array, scale: Array, zero: Array, block: int) -> Array:
    """The weights of matmul_blocks as f32."""
    k = q.shape[0]
    spread = (np.repeat(v, block, axis=0)[:k] for v in (zero, scale))
    with np.errstate(all="ignore"):
        return np.asarray((q.astype(np.float32) - next(spread)) * next(spread), np.float32)


def _matmul_blocks_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    a, q, scale, zero = xs
    assert a is not None and q is not None and scale is not None and zero is not None
    return _PRODUCTS["matmul"].evaluate([a, dequantized_blocks(q, scale, zero, attrs["block"])], {})


def _matmul_blocks_flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    return _PRODUCTS["matmul"].flops(ins, outs, attrs)


FAMILY = (
    Op("quantize", _quantize, _quantize_run, _two_flops, kind="elementwise"),
    Op("dequantize", _dequantize, _dequantize_run, _two_flops, kind="elementwise"),
    Op("lookup", _lookup, _lookup_run, lambda i, o, a: o[0].size, kind="elementwise"),
    Op("pixels", _pixels, _pixels_run, _two_flops),
    Op("conv_integer", _conv, _conv_run, lambda i, o, a: _PRODUCTS["conv"].flops(i, o, a), kind="contraction"),
    Op("matmul_integer", _matmul, _matmul_run, lambda i, o, a: _PRODUCTS["matmul"].flops(i, o, a), kind="contraction"),
    Op("matmul_blocks", _matmul_blocks, _matmul_blocks_run, _matmul_blocks_flops, False, 3e-7, "contraction"),
)
