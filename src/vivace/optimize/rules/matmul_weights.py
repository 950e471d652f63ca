"""Scales and transposes that disappear into the constant matrix of a product."""

from __future__ import annotations

import numpy as np

from vivace.graph.graph import Node, Value
from vivace.graph.rewrite import At, Example, Outcome, rule
from vivace.optimize.rules.conv_weights import Array, is_finite, is_shared, per_channel


def _constant_matrix(n: Node | None, at: At) -> Array | None:
    w = n.inputs[1] if n is not None else None
    if w is None or not w.dtype.is_float or w.rank < 2 or is_shared(w, at):
        return None
    return w.data


@rule(
    "mul", "div",
    examples=(
        lambda e: e.mul(e.matmul(e.x("f32[2,5,4]"), e.w("f32[4,3]")), e.w("f32[3]")),
        lambda e: e.div(e.matmul(e.x("f32[5,4]"), e.w("f32[4,3]")), e.const(np.float32(3))),
    ),
)  # fmt: skip
def scale_into_matmul(n: Node, at: At) -> Outcome:
    """(x @ w) * s = x @ (w * s) for a constant per column"""
    m = at.by(n.inputs[0], "matmul")
    w, c = _constant_matrix(m, at), n.inputs[1]
    if m is None or w is None or c is None or c.data is None:
        return None
    if not at.only_use(m.output):
        return f"%{m.output.name} is used elsewhere too"
    s = per_channel(c, w.shape[-1], m.output.rank - 1, m.output.rank)
    if s is None or n.output.type != m.output.type or m.inputs[0] is None or m.inputs[0].rank < 2:
        return "the factor is not one per column"
    s = 1 / s if n.op.name == "div" else s
    weight = (w * s).astype(w.dtype)
    if not is_finite(s, weight):
        return "a factor, or what it makes of a weight, is not finite"
    return at.op.matmul(m.inputs[0], at.const(weight, "weight"))


@rule(
    "mul", examples=(lambda e: e.mul(e.add(e.matmul(e.x("f32[2,4]"), e.w("f32[4,3]")), e.w("f32[3]")), e.w("f32[3]")),)
)
def scale_past_bias(n: Node, at: At) -> Outcome:
    """(x @ w + b) * s = (x @ w) * s + b * s, so that the factor reaches the weights"""
    m = at.by(n.inputs[0], "add")
    if m is None or m.inputs[1] is None or m.inputs[1].data is None or n.inputs[1] is None or n.inputs[1].data is None:
        return None
    inner = at.by(m.inputs[0], "matmul")
    w, s = _constant_matrix(inner, at), n.inputs[1]
    if inner is None or w is None or not at.only_use(m.output) or not at.only_use(inner.output):
        return None
    if (
        per_channel(s, w.shape[-1], inner.output.rank - 1, inner.output.rank) is None
        or n.output.type != inner.output.type
    ):
        return "the factor is not one per column"
    assert s.data is not None
    product = (m.inputs[1].data * s.data).astype(w.dtype)
    if not is_finite(s.data, product):
        return "a factor, or what it makes of the bias, is not finite"
    return at.op.add(at.op.mul(inner.output, s), at.const(product, "bias"))


@rule("matmul", examples=(lambda e: e.matmul(e.mul(e.x("f32[2,5,4]"), e.w("f32[4]")), e.w("f32[4,3]")),))
def scale_before_matmul(n: Node, at: At) -> Outcome:
    """(x * s) @ w = x @ (s * w) for a constant per row of w"""
    m = at.by(n.inputs[0], "mul")
    w = _constant_matrix(n, at)
    if m is None or w is None or m.inputs[0] is None or m.inputs[1] is None or m.inputs[1].data is None:
        return None
    if not at.only_use(m.output):
        return f"%{m.output.name} is used elsewhere too"
    s = per_channel(m.inputs[1], w.shape[-2], m.output.rank - 1, m.output.rank)
    if s is None or m.inputs[0].type != m.output.type:
        return "the factor is not one per row"
    weight = (w * s[:, None]).astype(w.dtype)
    if not is_finite(s, weight):
        return "a factor, or what it makes of a weight, is not finite"
    return at.op.matmul(m.inputs[0], at.const(weight, "weight"))


def _flattened(e: Example) -> Value:
    x = e.transpose(e.x("f32[2,3,4,5]"), perm=(0, 3, 1, 2))
    return e.matmul(e.reshape(x, shape=(2, 60)), e.w("f32[60,7]"))


@rule("matmul", examples=(_flattened,))
def transpose_into_matmul(n: Node, at: At) -> Outcome:
    """flatten(transpose(x)) @ w = flatten(x) @ (rows of w in x's order)"""
    w = _constant_matrix(n, at)
    flat = at.by(n.inputs[0], "reshape")
    t = at.by(flat.inputs[0], "transpose") if flat is not None else None
    if w is None or flat is None or t is None or w.ndim != 2 or t.inputs[0] is None:
        return None
    if not at.only_use(flat.output) or not at.only_use(t.output):
        return "the flattened tensor is used elsewhere too"
    perm, x, lead = t.attrs["perm"], t.inputs[0], flat.output.rank - 1
    if perm[:lead] != tuple(range(lead)) or t.output.shape[:lead] != flat.output.shape[:lead]:
        return "the transpose moves more than the flattened axes"
    tail = [d for d in t.output.shape[lead:] if isinstance(d, int)]
    if len(tail) != t.output.rank - lead:
        return "the flattened axes are symbolic"
    back = np.argsort([p - lead for p in perm[lead:]])
    rows = w.reshape(*tail, w.shape[1]).transpose(*back, len(tail)).reshape(w.shape)
    weight = at.const(np.ascontiguousarray(rows), "weight")
    return at.op.matmul(at.op.reshape(x, shape=flat.output.shape), weight)
