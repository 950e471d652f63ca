"""Single operators between the blocks: element-wise functions, movement, reductions, norms, and narrow weights.

Each takes a value and gives another, or None where it does not fit.
"""

from __future__ import annotations

import numpy as np
from tests.networks.maker import CHANNELS, Maker, Value

from vivace.base.dims import Dim

SAFE = (
    "Sin", "Cos", "Atan", "Tanh", "Erf", "Sigmoid", "Softplus", "Softsign", "Mish", "Selu", "Celu", "Softsign",
    "Abs", "Neg", "HardSigmoid", "HardSwish", "Elu", "Selu", "Relu", "Asinh",
)  # fmt: skip
STEPPED = ("Floor", "Ceil", "Round", "Sign")  # where they jump, an error below one ulp is an error of one


def function(m: Maker, x: Value) -> Value:
    """A chain of functions of each element."""
    y = x.name
    for _ in range(m.random.randint(1, 4)):
        match m.random.randrange(12):
            case 0:
                y = m.op("Exp", m.op("Min", y, m.const(3)))
            case 1:
                y = m.op("Log", m.op("Add", m.op("Abs", y), m.const(0.5)))
            case 2:
                y = m.op("Sqrt", m.op("Abs", y))
            case 3:
                y = m.op("Reciprocal", m.op("Add", m.op("Mul", y, y), m.const(1)))
            case 4:
                y = m.op("Pow", m.op("Abs", y), m.const(m.random.choice((2, 3, 0.5, 1.7, -0.5 if m.flip(0.1) else 1))))
            case 5 if m.values[0].shape == x.shape:  # an input is exact in every format
                seen = m.op("Greater", m.values[0].name, m.const(0.1))
                y = m.op("Where", seen, *m.random.sample((y, m.const(0.3)), 2))
            case 6:
                y = m.op(m.random.choice(("Max", "Min", "Add", "Mul", "Sub")), y, _like(m, x))
            case 7:
                y = m.op("Div", y, m.op("Add", m.op("Abs", _like(m, x)), m.const(0.5)))
            case _:
                y = m.op(m.random.choice(SAFE), y)
    return Value(y, x.shape)


def _like(m: Maker, x: Value) -> str:
    """Something that broadcasts to a value."""
    if x.is_image:
        return m.weights(*m.random.choice(((x.width, 1, 1), (1, x.width, 1, 1), (1,), (1, 1, 1))))
    return m.weights(*m.random.choice(((x.width,), (1, 1, x.width), (), (1, 1))))


def step(m: Maker, x: Value) -> Value:
    """Functions with jumps, of an input as it is given."""
    x = m.values[0]
    y = m.op(m.random.choice(STEPPED), x.name)
    kind = m.random.choice((6, 7, 10, 3, 16))
    if m.flip():
        y = m.op("Cast", m.op("Cast", x.name, to=kind), to=1)
    if m.flip(0.3):
        seen = m.op(m.random.choice(("And", "Or", "Xor")), m.op("Less", x.name, m.const(0.3)), m.op("Greater", y, y))
        y = m.op("Mul", m.op("Cast", m.op("Not", seen), to=1), y)
    return Value(y, x.shape)


def moved(m: Maker, x: Value) -> Value | None:
    """The elements in other places."""
    axis = m.random.randrange(1, len(x.shape) + 1)
    n = x.shape[axis - 1]
    size = min(s.get(n.name, 1) for s in m.sizes) if not isinstance(n, int) and hasattr(n, "name") else n
    match m.random.randrange(9):
        case 0:
            y = m.op("Slice", x.name, m.ints(-1), m.ints(-(1 << 40)), m.ints(axis), m.ints(-1))
            return Value(y, x.shape)
        case 1 if isinstance(n, int):
            picked = [m.random.randrange(-n, n) for _ in range(m.random.randint(1, 6))]
            return _resized(m, x, axis, len(picked), m.op("Gather", x.name, m.ints(*picked), axis=axis))
        case 2 if isinstance(n, int):
            k = m.random.randint(1, n)
            y, _ = m.op("TopK", x.name, m.ints(k), axis=axis, largest=int(m.flip()), n=2).split()
            return _resized(m, x, axis, k, y)
        case 3:
            reps = [1] * (len(x.shape) + 1)
            reps[axis] = 2
            return _resized(m, x, axis, n * 2, m.op("Tile", x.name, m.ints(*reps)))
        case 4 if isinstance(n, int) and n > 1:
            a = m.random.randint(1, n - 1)
            left, right = m.op("Split", x.name, m.ints(a, n - a), n=2, axis=axis).split()
            return Value(m.op("Concat", right, left, axis=axis), x.shape)
        case 5:
            return Value(
                m.op("CumSum", x.name, m.const(axis, np.int64), reverse=int(m.flip()), exclusive=int(m.flip())), x.shape
            )
        case 6 if isinstance(n, int) and n > 1:
            step = m.random.choice((2, 3))
            y = m.op("Slice", x.name, m.ints(m.random.randint(0, 1)), m.ints(n), m.ints(axis), m.ints(step))
            start = int(m.constants[m.nodes[-1].input[1]][0])
            return _resized(m, x, axis, -((start - n) // step), y)
        case 7 if isinstance(n, int):
            before, after = m.random.randint(0, 3), m.random.randint(0, 3)
            pads = [0] * (2 * len(x.shape) + 2)
            pads[axis], pads[axis + len(x.shape) + 1] = before, after
            mode = m.random.choice(("constant", "edge", "reflect" if size and size > 3 else "edge"))
            return _resized(m, x, axis, n + before + after, m.op("Pad", x.name, m.ints(*pads), mode=mode))
        case 8 if not x.is_image:
            return Value(
                m.op("Trilu", x.name, m.const(m.random.randint(-1, 2), np.int64), upper=int(m.flip())), x.shape
            )
    return None


def _resized(m: Maker, x: Value, axis: int, n: Dim, y: str) -> Value | None:
    shape = (*x.shape[: axis - 1], n, *x.shape[axis:])
    return Value(y, shape) if m.fits(*shape) else None


def reduced(m: Maker, x: Value) -> Value:
    """A reduction over an axis, which meets the value again."""
    axis = m.random.randrange(1, len(x.shape) + 1)
    kind = m.random.choice(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceL1",
                            "ReduceSumSquare", "ReduceLogSumExp"))  # fmt: skip
    axes = [axis] if m.flip(0.8) else [axis, len(x.shape)] if axis != len(x.shape) else [axis - 1 or 1, axis]
    s = m.op(kind, x.name, m.ints(*dict.fromkeys(axes)), keepdims=1)
    if m.flip():
        return Value(m.op("Div", x.name, m.op("Add", m.op("Abs", s), m.const(1))), x.shape)
    return Value(m.op(m.random.choice(("Sub", "Add", "Max")), x.name, m.op("Tanh", s)), x.shape)


def normed(m: Maker, x: Value) -> Value | None:
    """Norms that images.py and steps.py lack."""
    n = x.width
    match m.random.randrange(4):
        case 0 if x.is_image:
            groups = m.random.choice([g for g in (1, 2, 4, n) if n % g == 0])
            return Value(m.op("GroupNormalization", x.name, m.weights(n), m.weights(n), num_groups=groups), x.shape)
        case 1 if x.is_image:
            return Value(m.op("LRN", x.name, size=m.random.choice((1, 3, 5)), alpha=0.01), x.shape)
        case 2:
            # of numbers far from zero: near it the result jumps
            y = m.op("Add", m.op("Abs", x.name), m.const(0.5))
            return Value(m.op("LpNormalization", y, axis=m.random.choice((1, -1)), p=m.random.choice((1, 2))), x.shape)
        case 3:
            return Value(
                m.op(m.random.choice(("LogSoftmax", "Softmax")), x.name, axis=m.random.choice((1, -1))), x.shape
            )
    return None


def spaced(m: Maker, x: Value) -> Value | None:
    """Channels to places of an image, or back."""
    if not x.is_image:
        return None
    c, h, w = x.shape
    assert isinstance(c, int)
    if m.flip() and c % 4 == 0:
        shape: tuple[Dim, ...] = (c // 4, h * 2, w * 2)
        y = m.op("DepthToSpace", x.name, blocksize=2, mode=m.random.choice(("DCR", "CRD")))
        return Value(y, shape) if m.fits(*shape) else None
    if isinstance(h, int) and isinstance(w, int) and h % 2 == 0 and w % 2 == 0:
        return Value(m.op("SpaceToDepth", x.name, blocksize=2), (c * 4, h // 2, w // 2))
    return None


def narrow_linear(m: Maker, x: Value) -> Value | None:
    """A product by weights of few bits with scales per block, or by bytes, in each spelling."""
    if x.is_image:
        return None
    k, n = x.width, m.random.choice(CHANNELS)
    if not m.fits(x.shape[0], n):
        return None
    shape = (x.shape[0], n)
    kind = m.random.choice(("nbits", "nbits", "blocked", "blocked", "columns", "dynamic", "fake"))
    if kind == "nbits":
        bits, block = m.random.choice((2, 4, 4, 8)), m.random.choice((16, 32, 128))
        blocks = -(-k // block)
        packed = m.const(m.numbers.integers(0, 256, (n, blocks, block * bits // 8)), np.uint8)
        scales = m.const(m.numbers.random((n, blocks)) * 2.0 ** (1 - bits) / k**0.5)
        zeros = "_"
        if m.flip():
            zeros = m.const(m.numbers.integers(0, 256, (n, -(-blocks * bits // 8))), np.uint8)
        return Value(
            m.op("MatMulNBits", x.name, packed, scales, *([] if zeros == "_" else [zeros]), K=k, N=n, bits=bits,
                 block_size=block, domain="com.microsoft"), shape,
        )  # fmt: skip
    if kind == "dynamic":
        q, scale, zero = m.op("DynamicQuantizeLinear", x.name, n=3).split()
        w = m.const(m.numbers.integers(-127, 128, (k, n)), np.int8)
        y = m.op("Cast", m.op("MatMulInteger", q, w, zero), to=1)
        return Value(m.op("Mul", y, m.op("Mul", scale, m.const(0.01 / k**0.5))), shape)
    if kind == "fake":
        scale, zero = m.const(0.02), m.const(m.random.randint(0, 255), np.uint8)
        return Value(
            m.op("DequantizeLinear", m.op("QuantizeLinear", m.values[0].name, scale, zero), scale, zero),
            m.values[0].shape,
        )
    import ml_dtypes

    low, high, dtype = m.random.choice(((-8, 8, ml_dtypes.int4), (0, 16, ml_dtypes.uint4), (-128, 128, np.int8)))
    q = m.numbers.integers(low, high, (k, n))
    size = (high - low) / 2 * k**0.5
    if kind == "columns":
        w = m.op("DequantizeLinear", m.const(q, dtype), m.const((m.numbers.random(n) + 0.1) / size), axis=1)
    else:
        block = m.random.choice((8, 16, 32, k))
        if k % block:
            return None
        args = [m.const(q, dtype), m.const((m.numbers.random((k // block, n)) + 0.1) / size)]
        if m.flip():
            args.append(m.const(m.numbers.integers(low, high, (k // block, n)), dtype))
        w = m.op("DequantizeLinear", *args, axis=0, block_size=block)
    return Value(m.op("MatMul", x.name, w), shape)
