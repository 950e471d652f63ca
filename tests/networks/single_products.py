"""Sums of products: matrices, recurrences, attention, integers. Each function draws one operator and gives its
results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tests.networks.draw import LENGTHS, Draw

F32 = np.float32
EQUATIONS = (
    "ab,bc->ac", "abc,acd->abd", "abc,dc->abd", "ab,ab->a", "ab->ba", "abc->b", "ab,cd->acbd", "abcd,abed->abce",
    "abc,abd->acd", "a,b->ab", "abcd,cde->abe", "ab,b->a", "aa->a", "...ab,...bc->...ac", "ab,bc,cd->ad", "abc,abc->",
    "abcd,aecd->abe",
)  # fmt: skip


def matmul(d: Draw) -> Sequence[str]:
    m, k, n = (d.random.choice(LENGTHS) for _ in range(3))
    a, b = d.random.choice((
        ((m, k), (k, n)), ((k,), (k, n)), ((m, k), (k,)), ((k,), (k,)), ((2, m, k), (1, k, n)), ((1, 3, m, k), (k, n)),
        ((2, 1, m, k), (1, 1, k, n)), ((3, m, k), (3, k, n)),
    ))  # fmt: skip
    return [d.op("MatMul", d.x(*a), d.either(d.normal(*b)))]


def gemm(d: Draw) -> Sequence[str]:
    m, k, n = (d.random.choice(LENGTHS) for _ in range(3))
    turns = d.pick(0, 1), d.pick(0, 1)
    added = d.random.choice((None, (n,), (1, n), (m, 1), (m, n), (1,), ()))
    b = d.either(d.normal(*((n, k) if turns[1] else (k, n))))
    c = "" if added is None else d.either(np.asarray(d.normal(*added), F32))
    return [
        d.op("Gemm", d.x(*((k, m) if turns[0] else (m, k))), b, c, transA=turns[0], transB=turns[1],
             alpha=d.pick(1.0, 0.5, -2.0, None), beta=d.pick(1.0, 0.25, 0.0, None))
    ]  # fmt: skip


def einsum(d: Draw) -> Sequence[str]:
    sizes, equation = {c: d.size(1, 5) for c in "abcde"}, d.random.choice(EQUATIONS)
    xs = []
    for term in equation.split("->")[0].split(","):
        lead = (2,) if "..." in term else ()
        xs.append(d.x(*lead, *(sizes[c] for c in term.replace("...", ""))))
    return [d.op("Einsum", *xs, equation=equation)]


def recurrence(d: Draw) -> Sequence[str]:
    op, gates = d.random.choice((("LSTM", 4), ("GRU", 3), ("RNN", 1)))
    steps, batch, width, hidden = d.size(1, 6), d.size(1, 4), d.size(1, 6), d.pick(1, 3, 4, 8, 9)
    direction = d.pick("forward", "reverse", "bidirectional")
    n = 2 if direction == "bidirectional" else 1
    x, w = d.x(steps, batch, width), d.weight(n, gates * hidden, width)
    r = d.const(d.normal(n, gates * hidden, hidden) / 2)
    bias = d.weight(n, 2 * gates * hidden) if d.flip(0.6) else ""
    lengths = d.either(d.numbers.integers(1, steps + 1, batch).astype(np.int32)) if d.flip(0.4) else ""
    h = d.x(n, batch, hidden) if d.flip() else ""
    more: dict[str, Any] = {"clip": 0.7} if d.flip(0.2) else {}
    c = peepholes = ""
    if op == "LSTM":
        c = d.x(n, batch, hidden) if d.flip() else ""
        peepholes = d.weight(n, 3 * hidden) if d.flip(0.3) else ""
        more |= {"input_forget": 1} if d.flip(0.2) else {}
    if op == "GRU":
        more["linear_before_reset"] = d.pick(0, 1)
    if d.flip(0.3):
        own = {"LSTM": ["HardSigmoid", "Tanh", "Relu"], "GRU": ["Sigmoid", "Softsign"], "RNN": ["Relu"]}
        more["activations"] = own[op] * n
    more |= {"hidden_size": hidden, "direction": direction}
    if op == "LSTM":
        return d.results(op, x, w, r, bias, lengths, h, c, peepholes, n=3, **more)
    return d.results(op, x, w, r, bias, lengths, h, n=2, **more)


def attention(d: Draw) -> Sequence[str]:
    d.opset, batch, groups, share = 23, d.size(1, 2), d.size(1, 3), d.size(1, 2)
    s, t, depth, width, heads = d.size(), d.size(), d.pick(2, 4, 8, 16), d.pick(2, 4, 8), groups * share
    q, k, v = d.x(batch, heads, s, depth), d.x(batch, groups, t, depth), d.x(batch, groups, t, width)
    mask, causal = "", d.pick(0, 1)
    if d.flip():
        shape, causal = d.random.choice(((s, t), (1, 1, s, t), (batch, 1, s, t), (batch, heads, s, t))), 0
        mask = d.input(d.numbers.random(shape) < 0.8) if d.flip(0.4) else d.x(*shape)
        if d.inputs[mask].dtype == bool:
            d.inputs[mask][..., 0] = True
    more = {"scale": d.pick(None, 0.3), "softcap": d.pick(None, None, 2.0)}
    return [d.op("Attention", q, k, v, mask, is_causal=causal, **more)]


def rotary(d: Draw) -> Sequence[str]:
    d.opset, batch, s, heads, depth = 23, d.size(1, 2), d.size(1, 5), d.size(1, 2), d.pick(4, 8)
    turned = d.pick(0, 0, depth // 2 if depth > 4 else 0)
    half, has_ids = (turned or depth) // 2, d.flip()
    table = (s + 3, half) if has_ids else (batch, s, half)
    ids = d.input(d.numbers.integers(0, s + 3, (batch, s))) if has_ids else ""
    x = d.x(batch, heads, s, depth)
    more = {"interleaved": d.pick(0, 1), "rotary_embedding_dim": turned or None}
    return [d.op("RotaryEmbedding", x, d.x(*table), d.x(*table), ids, **more)]


def _byte(d: Draw) -> str:
    return d.const(np.uint8(d.size(0, 255)))


def scales(d: Draw) -> Sequence[str]:
    """QuantizeLinear and its inverse, of all or along an axis."""
    dtype = d.random.choice((np.int8, np.uint8))
    limits = np.iinfo(dtype)
    shape, axis, is_along = d.shape(3, 1, 6), d.axis(3), d.flip()
    own = (shape[axis],) if is_along else ()
    scale = d.either(np.asarray(d.numbers.random(own) * 0.1 + 0.01).astype(F32))
    zero = d.either(np.asarray(d.numbers.integers(limits.min, limits.max + 1, own)).astype(dtype))
    if d.flip(0.3):
        q = d.input(d.numbers.integers(limits.min, limits.max + 1, shape).astype(dtype))
        return [d.op("DequantizeLinear", q, scale, zero, axis=axis)]
    q = d.op("QuantizeLinear", d.x(*shape, scale=3), scale, zero, axis=axis)
    return [q, d.op("DequantizeLinear", q, scale, zero, axis=axis)]


def dynamic(d: Draw) -> Sequence[str]:
    return d.results("DynamicQuantizeLinear", d.x(*d.shape(2, 1, 9), scale=d.pick(1, 100, 0.001)), n=3)


def integer_matmul(d: Draw) -> Sequence[str]:
    k, n = d.random.choice(LENGTHS), d.random.choice(LENGTHS)
    a = d.input(d.numbers.integers(0, 256, (d.size(), k)).astype(np.uint8))
    b = d.either(d.numbers.integers(-128, 128, (k, n)).astype(np.int8))
    if d.flip():
        return [d.op("MatMulInteger", a, b, d.either(np.uint8(d.size(0, 255))), d.either(np.int8(d.size(-9, 9))))]
    small = [d.const(F32(s)) for s in (0.02, 0.01, d.pick(0.1, 0.5, 0.02))]
    return [d.op("QLinearMatMul", a, small[0], _byte(d), b, small[1], d.const(np.int8(0)), small[2], _byte(d))]


def integer_conv(d: Draw) -> Sequence[str]:
    c, n, kernel, size, pads = d.size(1, 6), d.size(1, 6), [d.size(1, 3)] * 2, [d.size(3, 8)] * 2, [d.pick(0, 1)] * 4
    x = d.input(d.numbers.integers(0, 256, (1, c, *size)).astype(np.uint8))
    if d.flip():
        w = d.const(d.numbers.integers(0, 256, (n, c, *kernel)).astype(np.uint8))
        return [d.op("ConvInteger", x, w, _byte(d), _byte(d), pads=pads)]
    w = d.const(d.numbers.integers(-127, 128, (n, c, *kernel)).astype(np.int8))
    scale, zeros = d.const((d.numbers.random(n) * 0.02 + 0.001).astype(F32)), d.const(np.zeros(n, np.int8))
    bias = d.const(d.numbers.integers(-999, 999, n).astype(np.int32)) if d.flip() else ""
    given = (x, d.const(F32(0.02)), _byte(d), w, scale, zeros, d.const(F32(0.1)), _byte(d), bias)
    return [d.op("QLinearConv", *given, pads=pads, strides=[d.pick(1, 2)] * 2)]


FAMILIES = (
    matmul, gemm, einsum, recurrence, attention, rotary, scales, dynamic, integer_matmul, integer_conv
)  # fmt: skip
