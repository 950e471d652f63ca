"""Control flow, sizes that only show at run time, rotated queries and caches of a decoder.

Each takes a value and gives another, or None where it does not fit.
"""

from __future__ import annotations

import numpy as np
from tests.networks.maker import Maker, Value, activate
from tests.networks.steps import linear
from tests.onnx import making


def _inner(m: Maker, x: Value) -> str:
    """A few nodes of the same shape."""
    y = x.name
    if not x.is_image and m.flip():
        y = linear(m, x, x.width)
    if m.flip():
        y = m.op("Add", y, x.name)
    return m.op("Tanh", activate(m, y, x.width if x.is_image else 0))


def branch(m: Maker, x: Value) -> Value:
    """What is computed depends on the numbers."""
    mean = m.op("ReduceMax", m.op("Sub", m.values[0].name, m.const(1.7)), keepdims=0)
    cond = m.op("Greater", mean, m.const(0))
    graphs = []
    for _ in range(2):
        since = len(m.nodes)
        y = _inner(m, x) if m.flip(0.9) else m.op("Identity", x.name)
        graphs.append(making.graph(m.taken(since), [], [making.value(y, None)]))
    return Value(m.op("If", cond, then_branch=graphs[0], else_branch=graphs[1]), x.shape)


def loop(m: Maker, x: Value) -> Value | None:
    """A value goes through a body several times, as often as a constant, a size or numbers say."""
    turns = m.const(m.random.choice((0, 1, 2, 3, 12)), np.int64)
    if m.flip(0.4):
        turns = m.op("Squeeze", m.op("Slice", m.op("Shape", x.name), m.ints(1), m.ints(2), m.ints(0)))
        turns = m.op("Min", turns, m.const(9, np.int64))
    since = len(m.nodes)
    name, i, go = (f"{k}{m.n_made}" for k in ("state", "turn", "go"))
    dims = [None] * (len(x.shape) + 1)
    y = _inner(m, Value(name, x.shape))
    if m.flip():
        y = m.op("Mul", y, m.op("Cos", m.op("Cast", i, to=1)))
    flag = m.op("Identity", go)
    if m.flip(0.3):
        flag = m.op("Less", m.op("ReduceMax", y, keepdims=0), m.const(0.9))
    scanned = []
    if m.flip(0.4) and m.constants.get(turns, 1):  # of no turns nobody knows the sizes
        scanned = [m.op("ReduceMean", y, m.ints(len(x.shape)), keepdims=1)]
    ins = [making.value(i, (), making.I64), making.value(go, (), making.BOOL), making.value(name, dims)]
    ends = [making.value(flag, (), making.BOOL), *(making.value(v, None) for v in (y, *scanned))]
    body = making.graph(m.taken(since), ins, ends)
    out = m.op("Loop", turns, m.const(True, np.bool_), x.name, n=1 + len(scanned), body=body).split()
    if scanned:
        return Value(m.op("Add", out[0], m.op("ReduceSum", out[1], m.ints(0), keepdims=0)), x.shape)
    return Value(out[0], x.shape)


def scan(m: Maker, x: Value) -> Value | None:
    """A recurrence over the steps."""
    if x.is_image:
        return None
    since = len(m.nodes)
    h, row = f"h{m.n_made}", f"row{m.n_made}"
    mixed = m.op("MatMul", h, m.weights(x.width, x.width, fan=x.width))
    y = m.op("Tanh", m.op("Add", mixed, row))
    other = m.op("Mul", y, m.const(0.5))
    ins = [making.value(h, (None, x.width)), making.value(row, (None, x.width))]
    body = making.graph(m.taken(since), ins, [making.value(v, None) for v in (y, other)])
    first = m.op("ReduceMean", x.name, m.ints(1), keepdims=0) if m.fits(x.shape[0]) else ""
    back = int(m.flip())
    way = {"scan_input_axes": [1], "scan_output_axes": [1], "scan_input_directions": [back]}
    _, out = m.op(
        "Scan", first, x.name, n=2, body=body, num_scan_inputs=1, scan_output_directions=[back], **way
    ).split()
    return Value(out, x.shape)


def late(m: Maker, x: Value) -> Value | None:
    """Rows that numbers choose go through a layer, and back to their places."""
    if x.is_image or m.values[0].is_image or m.values[0].shape[0] != x.shape[0]:
        return None
    rows = m.op("Reshape", x.name, m.ints(-1, x.width))
    score = m.op("ReduceMax", m.op("Reshape", m.values[0].name, m.ints(-1, m.values[0].width)), m.ints(1), keepdims=0)
    chosen = m.op("Greater", score, m.const(m.random.choice((0, 1, 2, 100))))
    if m.flip(0.3):
        y = m.op("Compress", rows, chosen, axis=0)
        y = linear(m, Value(y, (1, x.width)), x.width)
        total = m.op("ReduceSum", y, m.ints(0), keepdims=1)
        return Value(m.op("Add", x.name, m.op("Tanh", total)), x.shape)
    at = m.op("Transpose", m.op("NonZero", chosen), perm=[1, 0])
    y = linear(m, Value(m.op("GatherND", rows, at), (1, x.width)), x.width)
    y = m.op("ScatterND", rows, at, activate(m, y))
    return Value(m.op("Reshape", y, m.op("Shape", x.name)), x.shape)


def rotary(m: Maker, x: Value) -> Value | None:
    """Attention of grouped queries with rotated places and a cache that goes on, as decoders are exported."""
    if x.is_image or "key" in m.feeds:
        return None
    groups, times, size = (m.random.choice(n) for n in ((1, 2, 3), (1, 2, 3, 4), (4, 8, 16, 32, 64)))
    heads = groups * times
    if not m.fits(heads, x.shape[0], x.shape[0], 2) or not m.fits(x.shape[0], heads * size):
        return None

    def split(n: int) -> str:
        z = m.op("Reshape", linear(m, x, n * size, m.flip(0.3)), m.ints(0, 0, n, size))
        return m.op("Transpose", z, perm=[0, 2, 1, 3])

    key, value = (m.input(name, "x", m.batch, groups, "p", size) for name in ("key", "value"))

    def extent(name: str) -> str:
        return m.op("Squeeze", m.op("Slice", m.op("Shape", name), m.ints(2), m.ints(3), m.ints(0)), m.ints(0))

    q, k, v = split(heads), split(groups), split(groups)
    past, new = extent(key), extent(k)
    total = m.op("Add", past, new)
    places = m.op("Range", past, total, m.const(1, np.int64))
    angles = m.op("Mul", m.op("Unsqueeze", m.op("Cast", places, to=1), m.ints(1)),
                  m.const(100.0 ** -(np.arange(size // 2)[None] / (size // 2))))  # fmt: skip
    angles = m.op("Concat", angles, angles, axis=-1)
    cos, sin = m.op("Cos", angles), m.op("Sin", angles)

    def rotated(z: str) -> str:
        left, right = m.op("Split", z, m.ints(size // 2, size // 2), n=2, axis=-1).split()
        turned = m.op("Concat", m.op("Neg", right), left, axis=-1)
        return m.op("Add", m.op("Mul", z, cos), m.op("Mul", turned, sin))

    q, k = rotated(q), rotated(k)
    k, v = m.op("Concat", key, k, axis=2), m.op("Concat", value, v, axis=2)
    m.ends += [k, v]
    wide = []
    for z in (k, v):
        y = z
        if times > 1:
            y = m.op("Expand", m.op("Unsqueeze", z, m.ints(2)), m.ints(1, 1, times, 1, 1))
            y = m.op("Reshape", y, m.ints(0, heads, -1, size))
        wide.append(y)
    scores = m.op("Mul", m.op("MatMul", q, m.op("Transpose", wide[0], perm=[0, 1, 3, 2])), m.const(size**-0.5))
    if m.flip(0.8):
        columns = m.op("Range", m.const(0, np.int64), total, m.const(1, np.int64))
        seen = m.op("LessOrEqual", columns, m.op("Unsqueeze", places, m.ints(1)))
        if m.flip(0.3):  # a window
            seen = m.op("And", seen, m.op("Greater", m.op("Add", columns, m.const(5, np.int64)),
                                          m.op("Unsqueeze", places, m.ints(1))))  # fmt: skip
        scores = m.op("Add", scores, m.op("Where", seen, m.const(0), m.const(m.random.choice((-1e9, -np.inf, -3e38)))))
    z = m.op("Transpose", m.op("MatMul", m.op("Softmax", scores, axis=-1), wide[1]), perm=[0, 2, 1, 3])
    z = linear(m, Value(m.op("Reshape", z, m.ints(0, 0, heads * size)), (x.shape[0], heads * size)), x.width)
    return Value(m.op("Add", x.name, z), x.shape)
