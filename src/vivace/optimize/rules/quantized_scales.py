"""Requantizing: one scale and one rounding instead of several, and what a `quantize` says of what stands before it."""

from __future__ import annotations

import numpy as np

from vivace.graph.graph import Node, Value
from vivace.graph.ops.quantized import RANGES
from vivace.graph.rewrite import At, Example, Outcome, rule
from vivace.optimize.rules.quantized_operands import F32, example_bytes, parameters


def _example_requantized(e: Example, middle: str = "") -> Value:
    y = e.mul(e.x("f32[2,4]"), e.const(F32(4)))
    if middle == "add":
        other = e.dequantize(e.x("u8[2,4]"), e.const(F32(8)), e.const(np.uint8(1)))
        y = e.relu(e.add(y, other))
    if middle == "gate":
        y = e.mul(example_bytes(e, "u8[2,4]"), e.sigmoid(e.x("f32[2,1]")))
    if middle == "softmax":
        y = e.softmax(e.x("f32[2,4]"), axis=1)
    if middle == "clip":
        y = e.add(e.clip(y, min=-8.0, max=6.0), e.const(F32(2)))
    return e.quantize(y, e.const(F32(2)), e.const(np.uint8(3)))


@rule(
    "quantize",
    examples=(
        lambda e: _example_requantized(e),
        lambda e: _example_requantized(e, "add"),
        lambda e: _example_requantized(e, "gate"),
        lambda e: _example_requantized(e, "clip"),
        lambda e: _example_requantized(e, "softmax"),
    ),
)
def scale_once(n: Node, at: At) -> Outcome:
    """quantize(x * s, t) = quantize(x * (s / t), 1): through relu, clip, products of one factor, and sums, whose
    operands are scaled instead; what is rounded in any case, such as a norm, is multiplied by 1 / t instead of
    divided"""
    known = parameters(n)
    if known is None or known[0] == 1 or not known[0] > 0:
        return None
    scaled = _divided(n.inputs[0], F32(known[0]), at)
    if scaled is None:
        return "what it rounds is no product with a constant"
    return at.op.quantize(scaled, at.const(np.asarray(1, F32)), n.inputs[2])


def _divided(v: Value | None, t: np.float32, at: At) -> Value | None:
    """v / t for the cost of a constant, or None. Constants that are there already take the factor."""
    if v is None:
        return None
    if v.data is not None:
        return at.const(np.asarray(v.data / t, F32)) if v.data.size <= 1 << 16 else None
    n = at.by(v, "mul", "add", "relu", "clip", "dequantize")
    if n is None:
        return _multiplied(v, t, at)
    x = n.inputs[0]
    if n.op.name == "dequantize":
        s = n.inputs[1]
        if s is None or s.data is None:
            return None
        return at.op.dequantize(x, at.const(np.asarray(s.data / t, F32)), n.inputs[2])
    if not at.only_use(v):
        return None
    match n.op.name:
        case "mul":
            c = n.inputs[1]
            if c is not None and c.data is not None:
                return at.op.mul(x, at.const(np.asarray(c.data / t, F32)))
            for a, b in ((x, c), (c, x)):
                if b is not None and (scaled := _divided(a, t, at)) is not None:
                    return at.op.mul(scaled, b)
            return None
        case "add":
            a, b = (_divided(u, t, at) for u in n.inputs)
            return None if a is None or b is None else at.op.add(a, b)
    inner = _divided(x, t, at)
    if inner is None:
        return None
    if n.op.name == "relu":
        return at.op.relu(inner)
    low, high = n.attrs.get("min"), n.attrs.get("max")
    return at.op.clip(inner, min=None if low is None else float(low / t), max=None if high is None else float(high / t))


def _multiplied(v: Value, t: np.float32, at: At) -> Value | None:
    """v * (1 / t) where correct implementations of what makes v differ by more than that does from v / t: a division of
    16 numbers takes the CPU 16 cycles, a product half of one."""
    made = at.by(v)
    factor = F32(1) / t
    if made is None or made.op.exact or not np.isfinite(factor):
        return None
    return at.op.mul(v, at.const(np.asarray(factor, F32)))


def _example_saturated(e: Example, op: str) -> Value:
    x = e.x("f32[2,4]")
    y = e.relu(x) if op == "relu" else e.clip(x, min=0.0, max=6.0)
    return e.quantize(y, e.const(F32(6 / 255)), e.const(np.uint8(0)))


@rule("quantize", examples=(lambda e: _example_saturated(e, "relu"), lambda e: _example_saturated(e, "clip")))
def saturate_for_clip(n: Node, at: At) -> Outcome:
    """quantize(relu(x), s, 0: u8) = quantize(x, s, 0): what saturation cuts off needs no clip"""
    known, m = parameters(n), at.by(n.inputs[0], "relu", "clip")
    if known is None or not known[0] > 0 or m is None:
        return None
    least, most = RANGES[n.output.dtype]
    low, high = (0.0, None) if m.op.name == "relu" else (m.attrs.get("min"), m.attrs.get("max"))
    scale, zero = known
    keep_low = low is not None and np.rint(F32(low) / F32(scale)) + zero > least
    keep_high = high is not None and np.rint(F32(high) / F32(scale)) + zero < most
    if (keep_low or low is None) and (keep_high or high is None):
        return "the range of the integers is wider than the clip's"
    x = m.inputs[0]
    if keep_low or keep_high:
        x = at.op.clip(x, min=low if keep_low else None, max=high if keep_high else None)
    return at.op.quantize(x, n.inputs[1], n.inputs[2])


def _example_again(e: Example) -> Value:
    return e.bitnot(e.quantize(example_bytes(e, "u8[2,4]", 0.3, 7), e.const(F32(0.3)), e.const(np.uint8(7))))


@rule("quantize", examples=(_example_again,))
def quantized_already(n: Node, at: At) -> Outcome:
    """quantize(dequantize(q, s, z), s, z) = q"""
    m = at.by(n.inputs[0], "dequantize")
    known = parameters(n)
    if m is None or known is None or m.inputs[0] is None:
        return None
    if parameters(m) != known or m.inputs[0].type != n.output.type:
        return "scale, zero point or type are others"
    return m.inputs[0]
