"""Bytes through what only moves, joins or picks them: the dequantize comes later, the quantize earlier."""

from __future__ import annotations

import numpy as np

from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.graph.ops.quantized import BYTES
from vivace.graph.rewrite import At, Example, Outcome, rule
from vivace.optimize.rules.quantized_operands import F32, example_bytes, example_weights, parameters

_WINDOW = {
    "kernel": (2, 2),
    "strides": (1, 1),
    "dilations": (1, 1),
    "before": (1, 0),
    "after": (0, 1),
    "layout": "NCHW",
}


_NEAREST = {"mode": "nearest", "coordinate": "asymmetric", "nearest_mode": "floor"}
_RESIZE = {"sizes": (4, 6), "scales": (None, None), "cubic_coeff": -0.75, "exclude_outside": False}


@rule(
    "reshape", "transpose", "slice", "expand", "max_pool", "gather", "resize",
    examples=(
        lambda e: e.reshape(example_bytes(e, "u8[2,6]"), shape=(3, 4)),
        lambda e: e.transpose(example_weights(e, 4, 3), perm=(1, 0)),
        lambda e: e.max_pool(example_bytes(e, "i8[1,3,4,4]"), **_WINDOW),
        lambda e: e.gather(example_bytes(e, "i8[4,3]"), e.x("i64[2]"), axis=0),
        lambda e: e.resize(example_bytes(e, "u8[2,3]"), **_NEAREST, **_RESIZE),
    ),
)  # fmt: skip
def dequantize_later(n: Node, at: At) -> Outcome:
    """transpose(dequantize(q)) = dequantize(transpose(q)): bytes are moved instead of f32; max_pool keeps the order,
    and the nearest neighbour is one of the operand's elements"""
    if n.op.name == "resize" and n.attrs["mode"] != "nearest":
        return "interpolation is computed in f32"
    m = at.by(n.inputs[0], "dequantize")
    if m is None or m.inputs[0] is None or m.inputs[0].dtype not in BYTES:
        return None
    q, scale, zero = m.inputs
    known = parameters(m)
    if known is not None and known[0] > 0:
        if scale is None or zero is None:
            return None
        single = (at.const(np.asarray(known[0], F32)), at.const(np.asarray(known[1], zero.dtype.numpy)))
        return at.op.dequantize(at.op.emit(n.op, (q, *n.inputs[1:]), dict(n.attrs))[0], *single)
    if n.op.name != "transpose" or scale is None or zero is None or scale.data is None or zero.data is None:
        return "its scale is not a single constant"
    perm, lifted = n.attrs["perm"], []
    for c in (scale.data, zero.data):
        wide = c.reshape((1,) * (n.output.rank - c.ndim) + c.shape)
        lifted.append(at.const(wide.transpose(perm).copy()))
    return at.op.dequantize(at.op.transpose(q, perm=perm), *lifted)


def _example_mean(e: Example) -> Value:
    return e.reduce_mean(example_bytes(e, "u8[2,6,3]"), axes=(1,), keepdims=False)


@rule(
    "reduce_mean", "avg_pool",
    examples=(
        _example_mean,
        lambda e: e.avg_pool(example_bytes(e, "i8[1,3,4,4]"), count_include_pad=False, **_WINDOW),
    ),
)  # fmt: skip
def mean_of_bytes(n: Node, at: At) -> Outcome:
    """mean(dequantize(q, s, z)) = (mean(f32(q)) - z) * s, unless padding counts: the kernel reads bytes"""
    m = at.by(n.inputs[0], "dequantize")
    known = parameters(m)
    if m is None or m.inputs[0] is None or m.inputs[0].dtype not in BYTES:
        return None
    if known is None:
        return "its scale is not a single constant"
    if n.op.name == "avg_pool" and n.attrs["count_include_pad"] and any(n.attrs["before"] + n.attrs["after"]):
        return "padding counts, and is 0 and not the zero point"
    mean = at.op.emit(n.op, (at.op.cast(m.inputs[0], to=DType.f32), *n.inputs[1:]), dict(n.attrs))[0]
    return at.op.mul(at.op.sub(mean, at.const(F32(known[1]))), at.const(F32(known[0])))


def _example_joined(e: Example) -> Value:
    return e.concat(example_bytes(e, "u8[2,3]"), example_bytes(e, "u8[2,4]"), axis=1)


@rule("concat", examples=(_example_joined,))
def dequantize_joined(n: Node, at: At) -> Outcome:
    """concat(dequantize(p, s, z), dequantize(q, s, z)) = dequantize(concat(p, q), s, z)"""
    made = [at.by(v, "dequantize") for v in n.inputs]
    if any(m is None for m in made) or not made:
        return None
    first = made[0]
    assert first is not None
    known = parameters(first)
    if known is None or any(parameters(m) != known for m in made):
        return "their scales or zero points differ"
    if any(m is None or m.inputs[0] is None or m.inputs[0].dtype is not first.inputs[0].dtype for m in made):  # type: ignore[union-attr]
        return "their types differ"
    joined = at.op.concat(*(m.inputs[0] for m in made if m is not None), axis=n.attrs["axis"])
    return at.op.dequantize(joined, *first.inputs[1:])


def _example_late(e: Example, op: str) -> Value:
    x = e.relu(e.x("f32[2,6]"))
    if op == "concat":
        y = e.concat(x, e.relu(e.x("f32[2,3]")), axis=1)
    elif op == "max_pool":
        y = e.max_pool(e.relu(e.x("f32[1,3,4,4]")), **_WINDOW)
    else:
        y = e.reshape(x, shape=(3, 4)) if op == "reshape" else e.transpose(x, perm=(1, 0))
    return e.quantize(y, e.const(F32(0.25)), e.const(np.uint8(3)))


@rule(
    "quantize",
    examples=(
        lambda e: _example_late(e, "reshape"),
        lambda e: _example_late(e, "transpose"),
        lambda e: _example_late(e, "concat"),
        lambda e: _example_late(e, "max_pool"),
    ),
)
def quantize_earlier(n: Node, at: At) -> Outcome:
    """quantize(transpose(x)) = transpose(quantize(x)): who computes x stores bytes; reshape, concat and max_pool
    likewise"""
    m, known = at.by(n.inputs[0], "reshape", "transpose", "concat", "max_pool"), parameters(n)
    if m is None or known is None or (m.op.name == "max_pool" and not (known[0] > 0 and n.output.dtype in BYTES)):
        return None
    if not at.only_use(n.inputs[0]):
        return f"%{m.output.name} is used elsewhere too"
    early = [at.op.quantize(v, *n.inputs[1:]) for v in m.inputs if v is not None]
    return at.op.emit(m.op, early, dict(m.attrs))
