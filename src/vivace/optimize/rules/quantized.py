"""Quantized graphs in integers: products of dequantized operands, and everything that bytes may pass through.

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
from vivace.graph.ops.quantized import BYTES, RANGES
from vivace.graph.rewrite import At, Example, Outcome, Rule, rule, scalar

Array = np.ndarray
F32 = np.float32
CLOSE = 1e-5
"""How far the scale of a bias may be from the product of the operands' scales, which it is by definition: roundings of
whoever wrote the model."""


def _parameters(n: Node | None) -> tuple[float, int] | None:
    """Scale and zero point of a quantize or dequantize node where both are single constants."""
    if n is None:
        return None
    scale, zero = scalar(n.inputs[1]), scalar(n.inputs[2])
    return None if scale is None or zero is None else (float(scale), int(zero))


def _bytes(v: Value | None, at: At) -> tuple[Value, float, Value] | str | None:
    """The bytes behind a dequantized activation, their scale, and their zero point as a scalar."""
    n = at.by(v, "dequantize")
    if n is None or n.inputs[0] is None:
        return None
    known = _parameters(n)
    if n.inputs[0].dtype not in BYTES:
        return f"%{n.inputs[0].name} is {n.inputs[0].dtype}"
    if known is None:
        return f"%{n.inputs[0].name} has no single constant scale"
    return n.inputs[0], known[0], at.const(np.asarray(known[1], n.inputs[0].dtype.numpy), "zero")


def _weights(v: Value | None, at: At, axis: int) -> tuple[Array, Array] | str | None:
    """A dequantized constant as i8 without a zero point, and its scales: one, or one along `axis`."""
    n = at.by(v, "dequantize")
    if n is None:
        return None
    q, scale, zero = (x.data if x is not None else None for x in n.inputs)
    if q is None or scale is None or zero is None:
        return "its second operand changes at run time"
    shape = [1] * q.ndim
    shape[axis] = q.shape[axis]
    if scale.size != 1 and (scale.shape != tuple(shape)[-scale.ndim :] or scale.size != shape[axis]):
        return "the scales vary along another axis than that of the results"
    if n.inputs[0] is not None and n.inputs[0].dtype not in (*BYTES, DType.i4, DType.u4):
        return f"the weights are {n.inputs[0].dtype}"
    wide = q.astype(np.int32) - zero.astype(np.int32)
    if wide.size and (wide.min() < -128 or wide.max() > 127):
        return "the weights less their zero point do not fit i8"
    return wide.astype(np.int8), scale.reshape(-1).astype(F32)


def _integer_bias(v: Value | None, at: At, scale: Array) -> Array | None:
    """The i32 bias behind `v` when its scale is that of the sums."""
    n = at.by(v, "dequantize")
    if n is None:
        return None
    q, s, zero = (x.data if x is not None else None for x in n.inputs)
    if q is None or s is None or zero is None or q.dtype != np.int32 or zero.any():
        return None
    try:
        gap = np.abs(s.reshape(-1).astype(np.float64) - scale) > CLOSE * np.abs(scale)
    except ValueError:
        return None
    if q.size != q.reshape(-1).size or np.any(gap):
        return None
    return q.reshape(-1)


def _fits(depth: int, bias: Array | None) -> bool:
    """Whether no sum can leave 32 bits."""
    most = 0 if bias is None or not bias.size else int(np.abs(bias.astype(np.int64)).max())
    return depth * 255 * 128 + most < 2**31


def _column(values: Array, rank: int, axis: int) -> Array:
    """Numbers along one axis, in a shape that broadcasts; one number stands for all."""
    return (
        values.reshape(()) if values.size == 1 else values.reshape([-1 if i == axis else 1 for i in range(axis, rank)])
    )


def _example_bytes(e: Example, kind: str, scale: float = 0.5, zero: int = 1) -> Value:
    x = e.x(kind)
    return e.dequantize(x, e.const(F32(scale)), e.const(np.asarray(zero, x.dtype.numpy)))


def _example_weights(e: Example, *shape: int, axis: int = 0, dtype: type = np.int8) -> Value:
    low, high = (-100, 100) if dtype is np.int8 else (30, 230)
    q = e.const(e.random.integers(low, high, shape).astype(dtype))
    wide = [1] * len(shape)
    wide[axis] = shape[axis]
    return e.dequantize(
        q,
        e.const(e.random.uniform(0.01, 0.02, wide).astype(F32)),
        e.const(np.full(wide, 0 if dtype is np.int8 else 128, dtype)),
    )


def _example_conv(e: Example, kind: str = "u8[1,4,5,5]", bias: str = "", dtype: type = np.int8) -> Value:
    window = {"strides": (1, 1), "dilations": (1, 1), "before": (1, 1), "after": (1, 1), "group": 2, "layout": "NCHW"}
    w = _example_weights(e, 6, 2, 3, 3, dtype=dtype)
    b = None
    if bias == "i32":
        made = e.nodes[-1].inputs[1]
        assert made is not None and made.data is not None
        scale = e.const((F32(0.5) * made.data.reshape(-1)).astype(F32))
        b = e.dequantize(e.const(e.random.integers(-1000, 1000, 6).astype(np.int32)), scale, e.const(np.int32(0)))
    elif bias:
        b = e.w("f32[6]")
    return e.conv(_example_bytes(e, kind), w, b, **window)


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
    x, w = _bytes(n.inputs[0], at), _weights(n.inputs[1], at, 0)
    if x is None or w is None or isinstance(x, str) or isinstance(w, str):
        return next((r for r in (x, w) if isinstance(r, str)), None)
    (q, x_scale, zero), (filters, w_scale) = x, w
    scale = F32(x_scale) * w_scale
    bias = n.inputs[2] if len(n.inputs) > 2 else None
    whole = _integer_bias(bias, at, scale)
    depth = int(np.prod(filters.shape[1:]))
    if not _fits(depth, None):
        return "its sums may not fit 32 bits"
    if whole is not None and (not _fits(depth, whole) or whole.size != filters.shape[0]):
        whole = None  # a filter of next to nothing has a scale so small that its bias fills 32 bits: added in f32
    ints = None if whole is None else at.const(whole, "bias")
    rank = n.output.rank
    axis = 1 if n.attrs["layout"] == "NCHW" else rank - 1
    total = at.op.conv_integer(q, at.const(filters, "weight"), zero, ints, **n.attrs)
    y = at.op.mul(at.op.cast(total, to=DType.f32), at.const(_column(scale, rank, axis), "scale"))
    if bias is None or whole is not None:
        return y
    return at.op.add(
        y, at.op.reshape(bias, shape=tuple(filters.shape[0] if i == axis else 1 for i in range(axis, rank)))
    )


@rule(
    "matmul",
    examples=(
        lambda e: e.matmul(_example_bytes(e, "u8[2,5,4]"), _example_weights(e, 4, 3, axis=1)),
        lambda e: e.matmul(_example_bytes(e, "i8[5,4]"), _example_weights(e, 4, 3, axis=1, dtype=np.uint8)),
    ),
)
def matmul_in_integers(n: Node, at: At) -> Outcome:
    """dequantize(x) @ dequantize(w) = f32(matmul_integer(x, w)) * (x_scale * w_scale)"""
    x, w = _bytes(n.inputs[0], at), _weights(n.inputs[1], at, -1)
    if x is None or w is None or isinstance(x, str) or isinstance(w, str):
        return next((r for r in (x, w) if isinstance(r, str)), None)
    (q, x_scale, zero), (matrix, w_scale) = x, w
    if matrix.ndim != 2 or q.rank < 2:
        return "the weights are no matrix"
    if not _fits(matrix.shape[0], None):
        return "its sums may not fit 32 bits"
    scale = F32(x_scale) * w_scale
    total = at.op.matmul_integer(q, at.const(matrix, "weight"), zero)
    return at.op.mul(at.op.cast(total, to=DType.f32), at.const(_column(scale, 1, 0), "scale"))


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
        bias = _integer_bias(b, at, scale.data.reshape(-1))
        w = product.inputs[1]
        if bias is None or w is None or bias.size != w.shape[-1]:
            return "the bias is not i32 with the scale of the sums"
        if not _fits(int(w.shape[0]), bias):  # type: ignore[arg-type]
            return "its sums may not fit 32 bits"
        total = at.op.matmul_integer(*product.inputs, at.const(bias, "bias"))
        return at.op.mul(at.op.cast(total, to=DType.f32), scale)
    return None


def _example_requantized(e: Example, middle: str = "") -> Value:
    y = e.mul(e.x("f32[2,4]"), e.const(F32(4)))
    if middle == "add":
        other = e.dequantize(e.x("u8[2,4]"), e.const(F32(8)), e.const(np.uint8(1)))
        y = e.relu(e.add(y, other))
    if middle == "gate":
        y = e.mul(_example_bytes(e, "u8[2,4]"), e.sigmoid(e.x("f32[2,1]")))
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
    ),
)
def scale_once(n: Node, at: At) -> Outcome:
    """quantize(x * s, t) = quantize(x * (s / t), 1): through relu, clip, products of one factor, and sums, whose
    operands are scaled instead"""
    known = _parameters(n)
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
        return None
    x = n.inputs[0]
    if n.op.name == "dequantize":
        s = n.inputs[1]
        return (
            None
            if s is None or s.data is None
            else at.op.dequantize(x, at.const(np.asarray(s.data / t, F32)), n.inputs[2])
        )
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


def _example_saturated(e: Example, op: str) -> Value:
    x = e.x("f32[2,4]")
    y = e.relu(x) if op == "relu" else e.clip(x, min=0.0, max=6.0)
    return e.quantize(y, e.const(F32(6 / 255)), e.const(np.uint8(0)))


@rule("quantize", examples=(lambda e: _example_saturated(e, "relu"), lambda e: _example_saturated(e, "clip")))
def saturate_for_clip(n: Node, at: At) -> Outcome:
    """quantize(relu(x), s, 0: u8) = quantize(x, s, 0): what saturation cuts off needs no clip"""
    known, m = _parameters(n), at.by(n.inputs[0], "relu", "clip")
    if known is None or m is None or n.inputs[0] is None:
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
    return e.bitnot(e.quantize(_example_bytes(e, "u8[2,4]", 0.3, 7), e.const(F32(0.3)), e.const(np.uint8(7))))


@rule("quantize", examples=(_example_again,))
def quantized_already(n: Node, at: At) -> Outcome:
    """quantize(dequantize(q, s, z), s, z) = q"""
    m = at.by(n.inputs[0], "dequantize")
    known = _parameters(n)
    if m is None or known is None or m.inputs[0] is None:
        return None
    if _parameters(m) != known or m.inputs[0].type != n.output.type:
        return "scale, zero point or type are others"
    return m.inputs[0]


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
        lambda e: e.reshape(_example_bytes(e, "u8[2,6]"), shape=(3, 4)),
        lambda e: e.transpose(_example_weights(e, 4, 3), perm=(1, 0)),
        lambda e: e.max_pool(_example_bytes(e, "i8[1,3,4,4]"), **_WINDOW),
        lambda e: e.gather(_example_bytes(e, "i8[4,3]"), e.x("i64[2]"), axis=0),
        lambda e: e.resize(_example_bytes(e, "u8[2,3]"), **_NEAREST, **_RESIZE),
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
    known = _parameters(m)
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
    return e.reduce_mean(_example_bytes(e, "u8[2,6,3]"), axes=(1,), keepdims=False)


@rule(
    "reduce_mean", "avg_pool",
    examples=(
        _example_mean,
        lambda e: e.avg_pool(_example_bytes(e, "i8[1,3,4,4]"), count_include_pad=False, **_WINDOW),
    ),
)  # fmt: skip
def mean_of_bytes(n: Node, at: At) -> Outcome:
    """mean(dequantize(q, s, z)) = (mean(f32(q)) - z) * s, unless padding counts: the kernel reads bytes"""
    m = at.by(n.inputs[0], "dequantize")
    known = _parameters(m)
    if m is None or m.inputs[0] is None or m.inputs[0].dtype not in BYTES:
        return None
    if known is None:
        return "its scale is not a single constant"
    if n.op.name == "avg_pool" and n.attrs["count_include_pad"] and any(n.attrs["before"] + n.attrs["after"]):
        return "padding counts, and is 0 and not the zero point"
    mean = at.op.emit(n.op, (at.op.cast(m.inputs[0], to=DType.f32), *n.inputs[1:]), dict(n.attrs))[0]
    return at.op.mul(at.op.sub(mean, at.const(F32(known[1]))), at.const(F32(known[0])))


def _example_joined(e: Example) -> Value:
    return e.concat(_example_bytes(e, "u8[2,3]"), _example_bytes(e, "u8[2,4]"), axis=1)


@rule("concat", examples=(_example_joined,))
def dequantize_joined(n: Node, at: At) -> Outcome:
    """concat(dequantize(p, s, z), dequantize(q, s, z)) = dequantize(concat(p, q), s, z)"""
    made = [at.by(v, "dequantize") for v in n.inputs]
    if any(m is None for m in made) or not made:
        return None
    first = made[0]
    assert first is not None
    known = _parameters(first)
    if known is None or any(_parameters(m) != known for m in made):
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
    m, known = at.by(n.inputs[0], "reshape", "transpose", "concat", "max_pool"), _parameters(n)
    if m is None or known is None or (m.op.name == "max_pool" and not (known[0] > 0 and n.output.dtype in BYTES)):
        return None
    if not at.only_use(n.inputs[0]):
        return f"%{m.output.name} is used elsewhere too"
    early = [at.op.quantize(v, *n.inputs[1:]) for v in m.inputs if v is not None]
    return at.op.emit(m.op, early, dict(m.attrs))


def _example_blocks(e: Example, dtype: DType = DType.u4, turned: bool = False) -> Value:
    low, high = RANGES[dtype]
    q = e.const(e.random.integers(low, high + 1, (3, 2, 16) if turned else (2, 16, 3)).astype(dtype.numpy))
    small = (3, 2, 1) if turned else (2, 1, 3)
    scale = e.const(e.random.uniform(0.01, 0.02, small).astype(F32))
    zero = e.const(e.random.integers(low, high + 1, small).astype(dtype.numpy))
    w = e.reshape(e.dequantize(q, scale, zero), shape=(3, 32) if turned else (32, 3))
    return e.matmul(e.x("f32[2,32]"), e.transpose(w, perm=(1, 0)) if turned else w)


@rule(
    "matmul",
    examples=(
        lambda e: _example_blocks(e),
        lambda e: _example_blocks(e, DType.i4, True),
        lambda e: _example_blocks(e, DType.i8),
    ),
)
def keep_blocks_packed(n: Node, at: At) -> Outcome:
    """a @ dequantize(w) = matmul_blocks(a, w): weights whose scales vary along k stay as small as they are"""
    found = _blocks(n.inputs[1], at)
    if found is None or isinstance(found, str):
        return found
    if at.by(n.inputs[0], "dequantize") is not None:
        return None
    q, scale, zero, block = found
    made = (at.const(np.ascontiguousarray(v), name) for v, name in ((q, "levels"), (scale, "scale"), (zero, "zero")))
    return at.op.matmul_blocks(n.inputs[0], *made, block=block)


def _blocks(v: Value | None, at: At) -> tuple[Array, Array, Array, int] | str | None:
    """Constant weights [k, n] with scales per block of k: unsigned levels, scales, zero points, the size of a block."""
    turn = at.by(v, "transpose")
    shaped = at.by(turn.inputs[0] if turn is not None else v, "reshape")
    m = at.by(shaped.inputs[0], "dequantize") if shaped is not None else None
    if m is None or shaped is None or m.inputs[0] is None or m.inputs[0].dtype not in (*BYTES, DType.i4, DType.u4):
        return None
    if (turn is not None and turn.attrs["perm"] != (1, 0)) or shaped.output.rank != 2:
        return "the weights are no matrix"
    q, scale, zero = (x.data if x is not None else None for x in m.inputs)
    if q is None or scale is None or zero is None:
        return "the weights change at run time"
    matrix = (int(shaped.output.shape[0]), int(shaped.output.shape[1]))  # type: ignore[arg-type]
    parts = [np.broadcast_to(x, q.shape).reshape(matrix) for x in (q, scale, zero)]
    q, scale, zero = (x.T if turn is not None else x for x in parts)
    apart = (scale[1:] != scale[:-1]).any(axis=1) | (zero[1:] != zero[:-1]).any(axis=1)
    block = int(np.gcd.reduce(1 + np.flatnonzero(apart))) if apart.any() else 0
    if not block:
        return "the scales do not vary along k"
    if block % 8:
        return f"blocks of {block} have no kernel"
    low = RANGES[m.inputs[0].dtype][0]  # -8 of i4 is level 0
    kind = DType.u8 if m.inputs[0].dtype in BYTES else DType.u4
    levels = (q.astype(np.int16) - low).astype(kind.numpy)
    return levels, scale[::block].astype(F32), zero[::block].astype(F32) - F32(low), block


@rule("dequantize", examples=(lambda e: e.add(e.x("f32[4,3]"), _example_weights(e, 4, 3)),))
def fold_dequantized(n: Node, at: At) -> Outcome:
    """dequantize(constants) is computed at compile time, once no integer product wants the integers."""
    if any(v is None or v.data is None for v in n.inputs):
        return None
    (made,) = n.op.evaluate([v.data for v in n.inputs if v is not None], n.attrs)
    return at.const(np.ascontiguousarray(made).reshape(made.shape), n.output.name)


RULES: tuple[Rule, ...] = (
    conv_in_integers,
    matmul_in_integers,
    bias_in_integers,
    quantized_already,
    saturate_for_clip,
    dequantize_later,
    mean_of_bytes,
    dequantize_joined,
    quantize_earlier,
)
