"""Softmax, layer norm and RMS norm from their parts, and the scales and biases that belong to them.

Each of the fused ops normalizes the last axes; a norm over other axes keeps its parts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vivace.base.errors import GraphError
from vivace.graph.graph import Node, Value
from vivace.graph.ops.shapes import broadcast
from vivace.graph.pattern import pattern
from vivace.graph.rewrite import At, Outcome, Rule, rule


def _trailing(x: Value, axes: tuple[int, ...]) -> str | None:
    return None if axes == tuple(range(x.rank - len(axes), x.rank)) else f"it normalizes axes {axes} of {x.type}"


def _same_trailing(x: Value, axes: tuple[int, ...], axes2: tuple[int, ...]) -> str | None:
    if axes != axes2:
        return f"mean and variance have axes {axes} and {axes2}"
    return _trailing(x, axes)


def _softmax(op: Any, x: Any) -> Any:
    axes = op.attr("axes", (1,))
    shifted = op.exp(op.sub(x, op.reduce_max(x, axes=axes, keepdims=True)))
    plain = op.exp(x)
    return op.either(*(op.div(e, op.reduce_sum(e, axes=axes, keepdims=True)) for e in (shifted, plain)))


fuse_softmax = pattern(
    "fuse_softmax",
    before=_softmax,
    after=lambda op, x, axes: op.softmax(x, axis=axes[0]),
    when=lambda axes: None if len(axes) == 1 else f"it sums over axes {axes}",
    doc="exp(x - max(x)) / sum(exp(x - max(x))) = softmax(x); also without the maximum, which then cannot overflow",
    choices=2,
)

fuse_log_softmax = pattern(
    "fuse_log_softmax",
    before=lambda op, x: op.log(op.softmax(x, axis=op.attr("axis", 1))),
    after=lambda op, x, axis: op.log_softmax(x, axis=axis),
    doc="log(softmax(x)) = log_softmax(x), which does not underflow",
)


def _deviation(op: Any, x: Any) -> Any:
    return op.sub(x, op.reduce_mean(x, axes=op.attr("axes", (1,)), keepdims=True))


def _spread(op: Any, square: Any) -> Any:
    """sqrt(mean(square) + eps)"""
    return op.sqrt(op.add(op.reduce_mean(square, axes=op.attr("axes2", (1,)), keepdims=True), op.scalar("eps", 1e-5)))


def _layer_norm(op: Any, x: Any) -> Any:
    d = _deviation(op, x)
    spread = _spread(op, op.either(op.mul(d, d), op.pow(d, 2.0)))
    return op.either(op.div(d, spread), op.mul(d, op.div(1.0, spread)))


fuse_layer_norm = pattern(
    "fuse_layer_norm",
    before=_layer_norm,
    after=lambda op, x, axes, eps: op.layer_norm(x, axis=x.rank - len(axes), epsilon=float(eps)),
    when=_same_trailing,
    doc="(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) = layer_norm(x)",
    choices=2,
)


def _rms_norm(op: Any, x: Any) -> Any:
    spread = _spread(op, op.either(op.mul(x, x), op.pow(x, 2.0)))
    return op.either(op.div(x, spread), op.mul(x, op.div(1.0, spread)))


fuse_rms_norm = pattern(
    "fuse_rms_norm",
    before=_rms_norm,
    after=lambda op, x, axes2, eps: op.rms_norm(x, axis=x.rank - len(axes2), epsilon=float(eps)),
    when=lambda x, axes2: _trailing(x, axes2),
    doc="x / sqrt(mean(x^2) + eps) = rms_norm(x)",
    choices=2,
)


def _fits(norm: Node, c: Value | None) -> bool:
    """True when `c` broadcasts against the normalized axes alone."""
    if c is None:
        return False
    x = norm.inputs[0]
    assert x is not None
    tail = x.shape[norm.attrs["axis"] :]
    shape = c.shape
    while len(shape) > len(tail) and shape[0] == 1:
        shape = shape[1:]
    try:
        return broadcast((tail, shape), "norm") == tail
    except GraphError:
        return False


def _trimmed(norm: Node, c: Value, at: At) -> Value:
    """`c` without leading ones beyond the normalized axes."""
    x = norm.inputs[0]
    assert x is not None
    n = x.rank - norm.attrs["axis"]
    if c.rank <= n:
        return c
    return at.const(c.data.reshape(c.data.shape[-n:])) if c.data is not None else at.op.reshape(c, shape=c.shape[-n:])


def _operand(n: Node, at: At, *ops: str) -> tuple[Node, Value] | None:
    """The norm among the two operands of `n`, and the other operand."""
    for a, b in ((0, 1), (1, 0)):
        m, other = at.by(n.inputs[a], *ops), n.inputs[b]
        if m is not None and other is not None and n.inputs[0] is not n.inputs[1]:
            return m, other
    return None


@rule(
    "mul",
    examples=(
        lambda e: e.mul(e.rms_norm(e.x("f32[2,5,8]"), axis=2, epsilon=1e-5), e.w("f32[8]")),
        lambda e: e.mul(e.layer_norm(e.x("f32[2,5,8]"), e.w("f32[8]"), axis=2, epsilon=1e-5), e.w("f32[1,1,8]")),
    ),
)
def scale_into_norm(n: Node, at: At) -> Outcome:
    """norm(x, s) * c = norm(x, s * c), without a bias, where c varies along the normalized axes only"""
    found = _operand(n, at, "layer_norm", "rms_norm")
    if found is None:
        return None
    m, c = found
    if len(m.inputs) > 2 or not _fits(m, c) or n.output.type != m.output.type:
        return "the factor varies along other axes, or follows a bias"
    if not at.only_use(m.output):
        return f"%{m.output.name} is used elsewhere too"
    old = m.inputs[1] if len(m.inputs) > 1 else None
    scale = _trimmed(m, c, at)
    if old is not None:
        if old.data is None or scale.data is None:
            return "the scales are not constant"
        scale = at.const(np.asarray(old.data * scale.data))
    return at.op.emit(m.op, (m.inputs[0], scale), dict(m.attrs))


@rule(
    "add",
    examples=(
        lambda e: e.add(e.layer_norm(e.x("f32[2,5,8]"), e.w("f32[8]"), axis=2, epsilon=1e-5), e.w("f32[8]")),
        lambda e: e.add(e.layer_norm(e.x("f32[2,5,8]"), axis=1, epsilon=1e-5), e.w("f32[5,1]")),
    ),
)
def bias_into_norm(n: Node, at: At) -> Outcome:
    """layer_norm(x, s) + c = layer_norm(x, s, c) where the constant c varies along the normalized axes only"""
    found = _operand(n, at, "layer_norm")
    if found is None:
        return None
    m, c = found
    if c.data is None or not _fits(m, c) or n.output.type != m.output.type:
        return "the summand is no constant along the normalized axes"
    if not at.only_use(m.output):
        return f"%{m.output.name} is used elsewhere too"
    bias = _trimmed(m, c, at)
    if len(m.inputs) > 2 and m.inputs[2] is not None:
        if m.inputs[2].data is None or bias.data is None:
            return "the biases are not constant"
        bias = at.const(np.asarray(m.inputs[2].data + bias.data))
    scale = m.inputs[1] if len(m.inputs) > 1 else None
    return at.op.emit(m.op, (m.inputs[0], scale, bias), dict(m.attrs))


RULES: tuple[Rule, ...] = (
    fuse_softmax,
    fuse_log_softmax,
    fuse_layer_norm,
    fuse_rms_norm,
    scale_into_norm,
    bias_into_norm,
)
