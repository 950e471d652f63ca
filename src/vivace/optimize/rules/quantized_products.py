"""Products of dequantized operands in integers.

QuantizeLinear and DequantizeLinear around an operator say which integers it would compute; these rules make it compute
them. The integers of a product are summed exactly, zero points and bias included; a result is scaled once and rounded
once, which is the arithmetic of QLinearConv and QLinearMatMul:

    q = saturate(round_half_even(f32(sum) * (x_scale * w_scale / y_scale)) + y_zero)

The unfused graph rounds more often (the scale is applied to every operand, and divided by at the end), so that its
result may be a neighbour of ours where the exact result lies halfway between: one quantum at most.

What the rules leave in f32, and why: see `optimize.islands`.
"""

from __future__ import annotations

import numpy as np

from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.graph.rewrite import At, Example, Outcome, rule
from vivace.optimize.rules.quantized_operands import (
    F32,
    bytes_behind,
    column,
    constant_weights,
    example_bytes,
    example_weights,
    fits,
    integer_bias,
)


def _example_conv(e: Example, kind: str = "u8[1,4,5,5]", bias: str = "", dtype: type = np.int8) -> Value:
    window = {"strides": (1, 1), "dilations": (1, 1), "before": (1, 1), "after": (1, 1), "group": 2, "layout": "NCHW"}
    w = example_weights(e, 6, 2, 3, 3, dtype=dtype)
    b = None
    if bias == "i32":
        made = e.nodes[-1].inputs[1]
        assert made is not None and made.data is not None
        scale = e.const((F32(0.5) * made.data.reshape(-1)).astype(F32))
        b = e.dequantize(e.const(e.random.integers(-1000, 1000, 6).astype(np.int32)), scale, e.const(np.int32(0)))
    elif bias:
        b = e.w("f32[6]")
    return e.conv(example_bytes(e, kind), w, b, **window)


@rule(
    "conv",
    examples=(
        lambda e: _example_conv(e),
        lambda e: _example_conv(e, "i8[1,4,5,5]", "i32"),
        lambda e: _example_conv(e, "u8[1,4,5,5]", "f32", np.uint8),
    ),
)
def conv_in_integers(n: Node, at: At) -> Outcome:
    """conv(dequantize(x), dequantize(w), b) = f32(conv_integer(x, w, b in i32)) * (x_scale * w_scale), b in f32 where
    it is no i32 of that scale"""
    x, w = bytes_behind(n.inputs[0], at), constant_weights(n.inputs[1], at, 0)
    if x is None or w is None or isinstance(x, str) or isinstance(w, str):
        return next((r for r in (x, w) if isinstance(r, str)), None)
    (q, x_scale, zero), (filters, w_scale) = x, w
    scale = F32(x_scale) * w_scale
    bias = n.inputs[2] if len(n.inputs) > 2 else None
    whole = integer_bias(bias, at, scale)
    depth = int(np.prod(filters.shape[1:]))
    if not fits(depth, None):
        return "its sums may not fit 32 bits"
    if whole is not None and (not fits(depth, whole) or whole.size != filters.shape[0]):
        whole = None  # a filter of next to nothing has a scale so small that its bias fills 32 bits: added in f32
    ints = None if whole is None else at.const(whole, "bias")
    rank = n.output.rank
    axis = 1 if n.attrs["layout"] == "NCHW" else rank - 1
    total = at.op.conv_integer(q, at.const(filters, "weight"), zero, ints, **n.attrs)
    y = at.op.mul(at.op.cast(total, to=DType.f32), at.const(column(scale, rank, axis), "scale"))
    if bias is None or whole is not None:
        return y
    return at.op.add(
        y, at.op.reshape(bias, shape=tuple(filters.shape[0] if i == axis else 1 for i in range(axis, rank)))
    )


@rule(
    "matmul",
    examples=(
        lambda e: e.matmul(example_bytes(e, "u8[2,5,4]"), example_weights(e, 4, 3, axis=1)),
        lambda e: e.matmul(example_bytes(e, "i8[5,4]"), example_weights(e, 4, 3, axis=1, dtype=np.uint8)),
    ),
)
def matmul_in_integers(n: Node, at: At) -> Outcome:
    """dequantize(x) @ dequantize(w) = f32(matmul_integer(x, w)) * (x_scale * w_scale)"""
    x, w = bytes_behind(n.inputs[0], at), constant_weights(n.inputs[1], at, -1)
    if x is None or w is None or isinstance(x, str) or isinstance(w, str):
        return next((r for r in (x, w) if isinstance(r, str)), None)
    (q, x_scale, zero), (matrix, w_scale) = x, w
    if matrix.ndim != 2 or q.rank < 2:
        return "the weights are no matrix"
    if not fits(matrix.shape[0], None):
        return "its sums may not fit 32 bits"
    scale = F32(x_scale) * w_scale
    total = at.op.matmul_integer(q, at.const(matrix, "weight"), zero)
    return at.op.mul(at.op.cast(total, to=DType.f32), at.const(column(scale, 1, 0), "scale"))


def _example_biased(e: Example) -> Value:
    total = e.matmul_integer(e.x("u8[5,4]"), e.const(np.ones((4, 3), np.int8)), e.const(np.uint8(3)))
    scale = e.const(np.array([0.5, 0.25, 1], F32))
    bias = e.dequantize(e.const(np.array([5, -6, 7], np.int32)), scale, e.const(np.int32(0)))
    return e.add(e.mul(e.cast(total, to=DType.f32), scale), bias)


@rule("add", examples=(_example_biased,))
def bias_in_integers(n: Node, at: At) -> Outcome:
    """f32(matmul_integer(x, w)) * s + dequantize(b, s) = f32(matmul_integer(x, w, b)) * s for i32 b"""
    for a, b in (n.inputs, n.inputs[::-1]):
        m = at.by(a, "mul")
        cast = at.by(m.inputs[0], "cast") if m is not None else None
        product = at.by(cast.inputs[0], "matmul_integer") if cast is not None else None
        if m is None or cast is None or product is None or len(product.inputs) > 3:
            continue
        if not all(at.only_use(x) for x in (a, m.inputs[0], cast.inputs[0])):
            return f"%{product.output.name} is used elsewhere too"
        scale = m.inputs[1]
        if scale is None or scale.data is None or n.output.type != m.output.type:
            return "its scale is not constant"
        bias = integer_bias(b, at, scale.data.reshape(-1))
        w = product.inputs[1]
        if bias is None or w is None or bias.size != w.shape[-1]:
            return "the bias is not i32 with the scale of the sums"
        if not fits(int(w.shape[0]), bias):  # type: ignore[arg-type]
            return "its sums may not fit 32 bits"
        total = at.op.matmul_integer(*product.inputs, at.const(bias, "bias"))
        return at.op.mul(at.op.cast(total, to=DType.f32), scale)
    return None
