"""Blocks of transformers and of recurrent networks, over [batch, steps, features]."""

from __future__ import annotations

import numpy as np
from tests.networks.images import activated
from tests.networks.maker import CHANNELS, Maker, Value, activate

from vivace.base.dims import as_symbol


def linear(m: Maker, x: Value, n: int, bias: bool = True) -> str:
    y = m.op("MatMul", x.name, m.weights(x.width, n, fan=x.width))
    return m.op("Add", *m.random.sample((y, m.weights(n)), 2)) if bias else y


def project(m: Maker, x: Value) -> Value | None:
    n = m.random.choice(CHANNELS)
    return activated(m, Value(linear(m, x, n, m.flip()), (x.shape[0], n))) if m.fits(x.shape[0], n) else None


def mlp(m: Maker, x: Value) -> Value | None:
    wide = m.random.choice((64, 128, 64, 2 * x.width, 37))
    if not m.fits(x.shape[0], wide):
        return None
    h = activate(m, linear(m, x, wide, m.flip(0.7)))
    if m.flip(0.4):
        h = m.op("Mul", *m.random.sample((h, linear(m, x, wide, m.flip(0.3))), 2))
    n = x.width if m.flip(0.8) else m.random.choice(CHANNELS)
    y = Value(linear(m, Value(h, (x.shape[0], wide)), n, m.flip(0.7)), (x.shape[0], n))
    return Value(m.op("Add", *m.random.sample((x.name, y.name), 2)), x.shape) if n == x.width and m.flip(0.8) else y


def norm(m: Maker, x: Value) -> Value:
    n = x.width
    if m.flip():
        return Value(m.op("LayerNormalization", x.name, m.weights(n), m.weights(n), axis=-1, epsilon=1e-2), x.shape)
    square = m.op("ReduceMean", m.op("Mul", x.name, x.name), m.ints(-1), keepdims=1)
    root = m.op("Sqrt", m.op("Add", square, m.const(1e-2)))
    return Value(m.op("Mul", m.op("Div", x.name, root), m.weights(n)), x.shape)


def attention(m: Maker, x: Value) -> Value | None:
    """Heads, of which some may share keys; a mask, a causal one, or none; keys of another sequence, or past ones."""
    kv_heads, times, size = (m.random.choice(n) for n in ((1, 2, 3), (1, 1, 2, 4), (4, 8, 16, 17, 32, 64)))
    heads = kv_heads * times
    y = x
    if m.flip(0.3):
        y = m.random.choice([v for v in m.values if not v.is_image])
    if not m.fits(heads, x.shape[0], y.shape[0]) or not m.fits(x.shape[0], heads * size):
        return None

    def split(source: Value, n: int) -> str:
        z = m.op("Reshape", linear(m, source, n * size, m.flip()), m.ints(0, 0, n, size))
        return m.op("Transpose", z, perm=[0, 2, 1, 3])

    q, k, v = split(x, heads), split(y, kv_heads), split(y, kv_heads)
    is_past = "past" in m.feeds or (y is x and m.flip(0.15))
    if is_past:
        if "past" not in m.feeds:
            m.input("past", "x", m.batch, kv_heads, "p", size)
        if y is not x or m.feeds["past"][1][1::2] != (kv_heads, size):
            return None
        k, v = (m.op("Concat", "past", z, axis=2) for z in (k, v))
    if times > 1:
        for z in (0, 1):
            wide = m.op("Expand", m.op("Unsqueeze", (k, v)[z], m.ints(2)), m.ints(1, 1, times, 1, 1))
            made = m.op("Reshape", wide, m.ints(0, heads, -1, size))
            k, v = (made, v) if z == 0 else (k, made)
    scores = m.op("MatMul", q, m.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = m.op(*m.random.choice((("Mul", scores, m.const(size**-0.5)), ("Div", scores, m.const(size**0.5)))))
    if y is x and m.flip(0.4):
        sizes = [m.op("Squeeze", m.op("Slice", m.op("Shape", z), m.ints(2), m.ints(3), m.ints(0))) for z in (q, k)]
        rows, columns = (m.op("Range", m.const(0, np.int64), n, m.const(1, np.int64)) for n in sizes)
        rows = m.op("Unsqueeze", m.op("Add", rows, m.op("Sub", sizes[1], sizes[0])), m.ints(1))
        seen = m.op("LessOrEqual", columns, rows)
        scores = m.op(
            "Add", scores, m.op("Where", seen, m.const(0), m.const(m.random.choice((-1e9, -np.inf, -30, -30))))
        )
    elif y is x and not is_past and x.shape == m.values[0].shape and not m.values[0].is_image and m.flip():
        if not any(i.name == "mask" for i in m.inputs):
            m.input("mask", "mask", *m.feeds["x"][1][:2])
        hidden = m.op("Mul", m.op("Sub", m.const(1), m.op("Cast", "mask", to=1)), m.const(-1e4))
        scores = m.op("Add", scores, m.op("Unsqueeze", hidden, m.ints(1, 2)))
    z = m.op("Transpose", m.op("MatMul", m.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    z = m.op("Reshape", z, m.ints(0, 0, heads * size))
    z = linear(m, Value(z, (x.shape[0], heads * size)), x.width)
    return Value(m.op("Add", x.name, z) if m.flip(0.8) else z, x.shape)


def attention_op(m: Maker, x: Value) -> Value | None:
    """The operator of opset 23, also where queries and keys are not equally many."""
    y = m.random.choice([v for v in m.values if not v.is_image])
    groups, times, size, wide = (m.random.choice(n) for n in ((1, 2, 3), (1, 1, 2), (4, 8, 16, 33, 64), (1, 8, 16, 20)))
    heads = groups * times
    if not m.fits(heads, x.shape[0], y.shape[0]) or not m.fits(x.shape[0], heads * max(size, wide)):
        return None
    q, k, v = linear(m, x, heads * size), linear(m, y, groups * size), linear(m, y, groups * wide)
    extra: list[str] = []
    causal = int(m.flip())
    if isinstance(x.shape[0], int) and isinstance(y.shape[0], int) and m.flip(0.4):
        shape = (m.random.choice((1, heads)), x.shape[0], y.shape[0])
        if m.flip():
            extra = [m.const(m.numbers.random(shape) < 0.7, np.bool_)]
        else:
            extra = [m.weights(*shape)]
    cap = {"softcap": 5.0} if not causal and not extra and m.flip(0.2) else {}
    z = m.op("Attention", q, k, v, *extra, q_num_heads=heads, kv_num_heads=groups, is_causal=causal, **cap)
    return Value(z, (x.shape[0], heads * wide))


def recurrent(m: Maker, x: Value) -> Value | None:
    size, ways = m.random.choice((3, 8, 16, 20)), m.random.choice((1, 1, 2))
    kind, gates = m.random.choice((("LSTM", 4), ("GRU", 3)))
    if not m.fits(x.shape[0], size * ways, 4):
        return None
    w, r = m.weights(ways, gates * size, x.width, fan=x.width), m.weights(ways, gates * size, size, fan=size)
    extra = {"linear_before_reset": int(m.flip())} if kind == "GRU" else {}
    direction = "bidirectional" if ways == 2 else m.random.choice(("forward", "reverse"))
    turned = m.op("Transpose", x.name, perm=[1, 0, 2])
    y = m.op(kind, turned, w, r, m.weights(ways, 2 * gates * size), hidden_size=size, direction=direction, **extra)
    if ways == 1:
        y = m.op("Transpose", m.op("Squeeze", y, m.ints(1)), perm=[1, 0, 2])
    else:
        y = m.op("Reshape", m.op("Transpose", y, perm=[2, 0, 1, 3]), m.ints(0, 0, 2 * size))
    return Value(y, (x.shape[0], size * ways))


def conv1d(m: Maker, x: Value) -> Value | None:
    k, s = m.random.choice((1, 3, 3, 5, 8)), m.random.choice((1, 1, 2))
    group = m.random.choice((1, 1, x.width))
    n = x.width if group > 1 else m.random.choice(CHANNELS)
    before, after = (k - 1) // 2, k // 2
    w = m.weights(n, x.width // group, k, fan=x.width // group * k)
    y = m.op("Transpose", x.name, perm=[0, 2, 1])
    y = m.op("Conv", y, w, m.weights(n), pads=[before, after], strides=[s], group=group)
    steps = (x.shape[0] - 1) // s + 1
    return Value(m.op("Transpose", activate(m, y), perm=[0, 2, 1]), (steps, n)) if m.fits(steps, n) else None


def placed(m: Maker, x: Value) -> Value | None:
    """A row for each place is added, or one stands before all others."""
    if not m.fits(200 - x.shape[0]):
        return None
    if m.flip() and (isinstance(x.shape[0], int) or as_symbol(x.shape[0])):
        n = m.op("Slice", m.op("Shape", x.name), m.ints(1), m.ints(2), m.ints(0))
        table = m.op("Slice", m.weights(1, 200, x.width), m.ints(0), n, m.ints(1))
        return Value(m.op("Add", x.name, table), x.shape)
    n = m.op("Slice", m.op("Shape", x.name), m.ints(0), m.ints(1), m.ints(0))
    row = m.op("Expand", m.weights(1, 1, x.width), m.op("Concat", n, m.ints(1, x.width), axis=0))
    return Value(m.op("Concat", row, x.name, axis=1), (x.shape[0] + 1, x.width))


def cut(m: Maker, x: Value) -> Value | None:
    """Some of the features or of the steps."""
    if m.flip() and x.width > 2:
        a, b = sorted(m.random.sample(range(x.width + 1), 2))
        return Value(m.op("Slice", x.name, m.ints(a), m.ints(b), m.ints(2)), (x.shape[0], b - a))
    if not m.fits(x.shape[0] - 1):
        return None
    return Value(m.op("Slice", x.name, m.ints(1), m.ints(1 << 40), m.ints(1)), (x.shape[0] - 1, x.width))
