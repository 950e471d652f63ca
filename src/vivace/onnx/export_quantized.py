"""Writing quantized tensors: QuantizeLinear and DequantizeLinear, ConvInteger and MatMulInteger.

The operators take scales for the whole tensor or along one axis, from opset 21 on also per block of an axis;
what varies otherwise, or is of a type that the opset's operators lack, is written in its parts.
"""

from __future__ import annotations

import numpy as np

from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.graph.graph import Node, Value
from vivace.graph.ops.quantized import BYTES, RANGES
from vivace.onnx.tensors import data_type_of
from vivace.onnx.writer import Writer

NARROW_SINCE = 21  # numbers of 4 and 16 bits in QuantizeLinear and DequantizeLinear


def _axis(n: Node) -> int | None:
    """The axis along which scale and zero point vary; -1 where they do not, None where one axis cannot say it."""
    x, *others = n.inputs
    assert x is not None
    axes = set()
    for v in others:
        assert v is not None
        lead = x.rank - v.rank
        axes |= {lead + i for i, d in enumerate(v.shape) if d != 1}
    if len(axes) > 1:
        return None
    return axes.pop() if axes else -1


def _flat(w: Writer, v: Value, size: int) -> str:
    """A scale or zero point as the operators take it: a scalar, or `size` numbers."""
    if v.data is not None:
        data = v.data.reshape(-1)
        return w.const(data.reshape(()) if size == 1 else np.broadcast_to(data, (size,)), v.name)
    if v.rank == (0 if size == 1 else 1):
        return w.ref(v)
    return w.emit("Reshape", [w.ref(v), w.const([] if size == 1 else [-1], "shape")])


def _linear(w: Writer, n: Node, outs: list[str], op: str, narrow: DType) -> bool:
    axis = _axis(n)
    x, scale, zero = n.inputs
    assert x is not None and scale is not None and zero is not None
    if axis is None or (narrow not in (*BYTES, DType.i32) and w.opset < NARROW_SINCE):
        return False
    size = 1 if axis == -1 else x.shape[axis]
    if not isinstance(size, int) or (size != 1 and scale.data is None and scale.type.size == 1):
        return False
    ins = [w.ref(x), _flat(w, scale, size)]
    if not (narrow is DType.i32 and zero.data is not None and not zero.data.any()):
        ins.append(_flat(w, zero, size))
    w.emit(op, ins, outs, axis=axis if axis != -1 else None)
    return True


def _check(w: Writer, t: DType) -> None:
    if t in (DType.i4, DType.u4) and w.opset < NARROW_SINCE:
        raise UnsupportedError(f"{t} is not in opset {w.opset}", where="export", hint=f"opset {NARROW_SINCE}")


def write_quantize(w: Writer, n: Node, outs: list[str]) -> None:
    t = n.output.dtype
    _check(w, t)
    if _linear(w, n, outs, "QuantizeLinear", t):
        return
    x, scale, zero = (w.ref(v) for v in n.inputs)
    low, high = (w.const(np.float32(limit)) for limit in RANGES[t])
    whole = w.emit("Round", [w.emit("Div", [x, scale])])
    moved = w.emit("Add", [whole, w.emit("Cast", [zero], to=data_type_of(DType.f32))])
    w.emit("Cast", [w.emit("Clip", [moved, low, high])], outs, to=data_type_of(t))


def write_dequantize(w: Writer, n: Node, outs: list[str]) -> None:
    q = n.inputs[0]
    assert q is not None
    _check(w, q.dtype)
    if _linear(w, n, outs, "DequantizeLinear", q.dtype):
        return
    wide, zero = (w.emit("Cast", [w.ref(v)], to=data_type_of(DType.i32)) for v in (q, n.inputs[2]))
    number = w.emit("Cast", [w.emit("Sub", [wide, zero])], to=data_type_of(DType.f32))
    w.emit("Mul", [number, w.ref(n.inputs[1])], outs)


def write_lookup(w: Writer, n: Node, outs: list[str]) -> None:
    q = n.inputs[0]
    assert q is not None
    table = np.frombuffer(bytes.fromhex(n.attrs["table"]), n.attrs["to"].numpy)
    data = table if q.dtype is DType.u8 else np.roll(table, 128)
    at = w.emit("Cast", [w.ref(q)], to=data_type_of(DType.i32))
    if q.dtype is DType.i8:
        at = w.emit("Add", [at, w.const(np.int32(128), "offset")])
    w.emit("Gather", [w.const(data, "table"), at], outs, axis=0)


def write_conv_integer(w: Writer, n: Node, outs: list[str]) -> None:
    a, n_bias = n.attrs, len(n.inputs) > 3
    pads = [d for side in (a["before"], a["after"]) for d in side]
    if a["layout"] != "NCHW" or not all(isinstance(d, int) for d in pads):
        raise UnsupportedError("a channels-last layout has no ONNX form", where="export", hint="a level below LAYOUT")
    window = {"strides": list(a["strides"]), "dilations": list(a["dilations"]), "group": a["group"], "pads": pads}
    total = w.emit("ConvInteger", [w.ref(v) for v in n.inputs[:3]], "" if n_bias else outs, **window)
    if n_bias:
        column = w.emit("Reshape", [w.ref(n.inputs[3]), w.const([1, -1, *[1] * (n.output.rank - 2)], "shape")])
        w.emit("Add", [total, column], outs)


def write_matmul_integer(w: Writer, n: Node, outs: list[str]) -> None:
    n_bias = len(n.inputs) > 3
    total = w.emit("MatMulInteger", [w.ref(v) for v in n.inputs[:3]], "" if n_bias else outs)
    if n_bias:
        w.emit("Add", [total, w.ref(n.inputs[3])], outs)


def write_matmul_blocks(w: Writer, n: Node, outs: list[str]) -> None:
    """Blocks of DequantizeLinear where they can say it; else the weights in their parts. What rows may be rounded to
    has no standard form: the exported model asks for f32.
    """
    a, q, scale, zero = n.inputs
    assert q is not None and scale is not None and zero is not None
    if q.data is None or scale.data is None or zero.data is None:
        raise UnsupportedError("weights in blocks that change at run time", where="export", expected="constants")
    block, (k, width) = n.attrs["block"], q.data.shape
    low, high = RANGES[q.dtype]
    is_whole = bool(np.all(zero.data == np.clip(np.rint(zero.data), low, high)))
    if w.opset >= NARROW_SINCE and is_whole and k % block == 0:
        ins = [w.ref(q), w.ref(scale), w.const(zero.data.astype(q.dtype.numpy), zero.name)]
        b = w.emit("DequantizeLinear", ins, axis=0, block_size=block)
    else:
        blocks = scale.data.shape[0]
        filled = np.zeros((blocks * block, width), np.uint8)
        filled[:k] = q.data.astype(np.uint8)
        wide = w.emit("Cast", [w.const(filled.reshape(blocks, block, width), q.name)], to=data_type_of(DType.f32))
        moved = w.emit("Sub", [wide, w.const(zero.data[:, None], zero.name)])
        scaled = w.emit("Mul", [moved, w.const(scale.data[:, None], scale.name)])
        b = w.emit("Reshape", [scaled, w.const([-1, width], "shape")])
        if k % block:
            b = w.emit("Slice", [b, w.const([0]), w.const([k]), w.const([0])])
    w.emit("MatMul", [w.ref(a), b], outs)


WRITERS = {
    "quantize": write_quantize,
    "dequantize": write_dequantize,
    "lookup": write_lookup,
    "conv_integer": write_conv_integer,
    "matmul_integer": write_matmul_integer,
    "matmul_blocks": write_matmul_blocks,
}
