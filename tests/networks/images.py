"""Blocks of image networks, with any kernels, strides, pads, dilations, groups and channels.

Each takes a value and gives another, or None where sizes leave no room for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.networks.maker import CHANNELS, Maker, Value, activate

from vivace.base.dims import Dim


def convolve(
    m: Maker, x: Value, n_out: int, kernel: tuple[int, int], stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1), group: int = 1, same: bool = True,
) -> Value | None:  # fmt: skip
    """A convolution, often with a batch normalization; None where nothing would be left of the image."""
    pads: tuple[list[int], list[int]] = ([], [])
    shape: list[Dim] = []
    for size, k, s, d in zip(x.shape[1:], kernel, stride, dilation, strict=True):
        reach = (k - 1) * d
        before, after = reach // 2, reach - reach // 2
        if not same or m.flip(0.1):
            most = reach if m.flip(0.8) else k + 5  # whole rows of results may see nothing of the image
            before, after = m.random.randint(0, most), m.random.randint(0, most)
        pads[0].append(before)
        pads[1].append(after)
        if not m.fits(size + before + after - reach):
            return None
        shape.append((size + before + after - reach - 1) // s + 1)
    if not m.fits(n_out, *shape):
        return None
    w = m.weights(n_out, x.width // group, *kernel, fan=x.width // group * kernel[0] * kernel[1])
    bias = [m.weights(n_out)] if m.flip(0.6) else []
    y = m.op(
        "Conv", x.name, w, *bias, strides=list(stride), dilations=list(dilation), pads=pads[0] + pads[1], group=group
    )
    if m.flip(0.25):
        y = m.op("BatchNormalization", y, *(m.const(m.numbers.random(n_out) + 0.5) for _ in range(4)))
    return Value(y, (n_out, *shape))


def activated(m: Maker, x: Value | None) -> Value | None:
    return None if x is None else Value(activate(m, x.name, x.width if x.is_image else 0), x.shape)


def conv(m: Maker, x: Value) -> Value | None:
    kernel = m.random.choice(((1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (2, 2), (1, 3), (3, 1), (7, 7), (4, 4), (5, 3)))
    group = m.random.choice([g for g in (1, 1, 1, 2, 4, x.width) if x.width % g == 0])
    n_out = m.random.choice(CHANNELS)
    n_out = max(group, n_out // group * group)
    stride = m.random.choice(((1, 1), (1, 1), (2, 2), (2, 1), (3, 2)))
    dilation = m.random.choice(((1, 1), (1, 1), (1, 1), (2, 2), (1, 2)))
    return activated(m, convolve(m, x, n_out, kernel, stride, dilation, group, m.flip(0.7)))


def mobile(m: Maker, x: Value) -> Value | None:
    """Wider, depthwise, squeeze-and-excite, narrow again, and the residual."""
    wide = min(x.width * m.random.choice((1, 2, 3, 6)), 200)
    k = m.random.choice((3, 3, 5, 7, 1, 2))
    stride = m.random.choice((1, 1, 2))
    y: Value | None = x
    if m.flip(0.8):
        y = activated(m, convolve(m, x, wide, m.random.choice(((1, 1), (1, 1), (1, 1), (3, 3)))))
    if y is not None:
        d = m.random.choice((1, 1, 1, 2))
        times = m.random.choice((1, 1, 1, 1, 2))
        y = activated(m, convolve(m, y, y.width * times, (k, k), (stride, stride), (d, d), y.width, m.flip(0.8)))
    if y is not None and m.flip(0.3):
        y = squeeze(m, y)
    if y is not None and m.flip(0.85):
        y = convolve(m, y, x.width if m.flip() else m.random.choice(CHANNELS), (1, 1))
    if y is not None and y.shape == x.shape:
        y = Value(m.op("Add", x.name, y.name), x.shape)
    return y


def squeeze(m: Maker, x: Value) -> Value:
    n = x.width
    small = max(1, n // 4)
    s = m.op("GlobalAveragePool", x.name) if m.flip() else m.op("ReduceMean", x.name, m.ints(2, 3), keepdims=1)
    s = m.op("Relu", m.op("Conv", s, m.weights(small, n, 1, 1, fan=n), m.weights(small)))
    s = m.op("Conv", s, m.weights(n, small, 1, 1, fan=small), m.weights(n))
    return Value(m.op("Mul", x.name, m.op(m.random.choice(("Sigmoid", "HardSigmoid")), s)), x.shape)


def residual(m: Maker, x: Value) -> Value | None:
    y = activated(m, convolve(m, x, m.random.choice((x.width, 16, 40)), (3, 3)))
    y = None if y is None else convolve(m, y, x.width, (3, 3))
    if y is None or y.shape != x.shape:
        return None
    return Value(activate(m, m.op("Add", *m.random.sample((x.name, y.name), 2)), x.width), x.shape)


def branches(m: Maker, x: Value) -> Value | None:
    """Several ways whose results stand side by side."""
    parts = [x] if m.flip() else []
    for _ in range(m.random.randint(1, 3)):
        k = m.random.choice((1, 3, 5))
        y = activated(m, convolve(m, x, m.random.choice((1, 3, 8, 16, 30)), (k, k)))
        if y is not None and y.shape[1:] == x.shape[1:]:
            parts.append(y)
    if m.flip(0.3) and m.fits(*x.shape):
        parts.append(Value(m.op("MaxPool", x.name, kernel_shape=[5, 5], pads=[2, 2, 2, 2]), x.shape))
    m.random.shuffle(parts)
    width = sum(p.width for p in parts)
    if not parts or not m.fits(width, *x.shape[1:]):
        return None
    return Value(m.op("Concat", *(p.name for p in parts), axis=1), (width, *x.shape[1:]))


def halves(m: Maker, x: Value) -> Value | None:
    """One half of the channels goes through a block; then they are shuffled."""
    if x.width % 2:
        return None
    half = x.width // 2
    left, right = m.op("Split", x.name, m.ints(half, half), n=2, axis=1).split()
    y = mobile(m, Value(right, (half, *x.shape[1:])))
    if y is None or y.shape != (half, *x.shape[1:]):
        return None
    y = Value(m.op("Concat", left, y.name, axis=1), x.shape)
    height, width = x.shape[1:]
    if m.flip() and isinstance(height, int) and isinstance(width, int):
        z = m.op("Reshape", y.name, m.ints(-1, 2, half, height, width))
        z = m.op("Reshape", m.op("Transpose", z, perm=[0, 2, 1, 3, 4]), m.ints(-1, x.width, height, width))
        return Value(z, x.shape)
    return y


def pool(m: Maker, x: Value) -> Value | None:
    kind = m.random.choice(("MaxPool", "AveragePool"))
    k, s = m.random.choice(((2, 2), (3, 2), (3, 1), (2, 1)))
    before, after = (m.random.randint(0, k // 2) for _ in range(2))
    sizes = [d + before + after - k for d in x.shape[1:]]
    if not m.fits(*(d + 1 for d in sizes)):
        return None
    extra = {"count_include_pad": int(m.flip())} if kind == "AveragePool" else {}
    up = s - 1 if m.flip(0.2) and m.fits(*(d - s for d in sizes)) else 0
    y = m.op(
        kind, x.name, kernel_shape=[k, k], strides=[s, s], pads=[before, before, after, after], ceil_mode=int(up > 0),
        **extra,
    )  # fmt: skip
    return Value(y, (x.width, *((d + up) // s + 1 for d in sizes)))


def resize(m: Maker, x: Value) -> Value | None:
    other = m.random.choice([v for v in m.values if v.is_image])
    if m.flip():
        shape = (x.width, *(2 * d for d in x.shape[1:]))
        if not m.fits(*shape):
            return None
        way = m.random.choice((
            {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
            {"mode": "linear"}, {"mode": "linear", "coordinate_transformation_mode": "align_corners"}, {},
        ))  # fmt: skip
        return Value(m.op("Resize", x.name, "_", m.const([1, 1, 2, 2]), **way), shape)
    first = m.op("Slice", m.op("Shape", x.name), m.ints(0), m.ints(2), m.ints(0))
    last = m.op("Slice", m.op("Shape", other.name), m.ints(2), m.ints(4), m.ints(0))
    sizes = m.op("Concat", first, last, axis=0)
    y = m.op("Resize", x.name, "_", "_", sizes, mode=m.random.choice(("nearest", "linear")))
    shape = (x.width, *other.shape[1:])
    return Value(y, shape) if m.fits(*shape) else None


def turned(m: Maker, x: Value) -> Value | None:
    """Channels last, a norm and an MLP over them, and back."""
    y = convolve(m, x, x.width, (7, 7), group=x.width)
    if y is None or y.shape != x.shape:
        return None
    z = m.op("Transpose", y.name, perm=[0, 2, 3, 1])
    z = m.op("LayerNormalization", z, m.weights(x.width), m.weights(x.width), axis=-1)
    wide = m.random.choice((x.width, 4 * x.width, 64))
    z = m.op("Add", m.op("MatMul", z, m.weights(x.width, wide, fan=x.width)), m.weights(wide))
    z = m.op("MatMul", activate(m, z), m.weights(wide, x.width, fan=wide))
    return Value(m.op("Add", x.name, m.op("Transpose", z, perm=[0, 3, 1, 2])), x.shape)


def transposed_conv(m: Maker, x: Value) -> Value | None:
    k, s = m.random.choice(((2, 2), (3, 2), (4, 2), (3, 1)))
    n_out, p = m.random.choice((1, 3, 8, 16)), m.random.randint(0, (k - 1) // 2)
    shape = (n_out, *((d - 1) * s + k - 2 * p for d in x.shape[1:]))
    if not m.fits(*shape):
        return None
    w = m.weights(x.width, n_out, k, k, fan=x.width * k)
    return Value(m.op("ConvTranspose", x.name, w, m.weights(n_out), strides=[s, s], pads=[p] * 4), shape)


def padded(m: Maker, x: Value) -> Value | None:
    mode = m.random.choice(("constant", "reflect", "edge"))
    if mode == "reflect" and not m.fits(*(d - 2 for d in x.shape[1:])):
        return None
    a, b, c, d = (m.random.randint(0, 2) for _ in range(4))
    shape = (x.width, x.shape[1] + a + c, x.shape[2] + b + d)
    return Value(m.op("Pad", x.name, m.ints(0, 0, a, b, 0, 0, c, d), mode=mode), shape)


def normed_image(m: Maker, x: Value) -> Value | None:
    n = x.width
    if m.flip():
        return Value(m.op("InstanceNormalization", x.name, m.weights(n), m.weights(n), epsilon=1e-2), x.shape)
    return Value(m.op("Softmax", x.name, axis=1), x.shape)


def added(m: Maker, x: Value) -> Value | None:
    y = m.like(x)
    return None if y is None else Value(m.op(m.random.choice(("Add", "Mul", "Add", "Sub")), x.name, y.name), x.shape)


def beside(m: Maker, x: Value) -> Value | None:
    found = [v for v in m.values if v.is_image == x.is_image and v.shape[1:] == x.shape[1:]]
    if not x.is_image:
        found = [v for v in m.values if not v.is_image and v.shape[0] == x.shape[0]]
    y = m.random.choice(found)
    width = x.width + y.width
    shape = (width, *x.shape[1:]) if x.is_image else (x.shape[0], width)
    return Value(m.op("Concat", x.name, y.name, axis=1 if x.is_image else 2), shape) if m.fits(*shape) else None


def flat(m: Maker, x: Value) -> Value | None:
    """The places of an image as steps of a sequence."""
    n, height, width = x.shape
    y = m.op("Transpose", m.op("Reshape", x.name, m.ints(0, 0, -1)), perm=[0, 2, 1])
    return Value(y, (height * width, n)) if m.fits(height * width, n, 8) else None
