"""Elements in other places, chosen and counted. Each function draws one operator and gives its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import numpy_helper
from tests.networks.draw import Draw

F32 = np.float32
FAR = 1 << 40


def slices(d: Draw) -> Sequence[str]:
    shape = d.shape(d.size(1, 4), 1, 9)
    axes = d.axes(len(shape), 1)
    starts, ends = ([d.pick(d.random.randint(-12, 12), far, -far) for _ in axes] for far in (12, FAR))
    steps = [d.pick(1, 1, 2, -1, -2, 3) for _ in axes]
    y = d.op("Slice", d.x(*shape), d.ints(*starts), d.ints(*ends), d.ints(*axes), d.ints(*steps))
    return [d.op("Neg", y) if d.flip() else y]


def gather(d: Draw) -> Sequence[str]:
    shape = d.shape(d.size(1, 4), 1, 6)
    axis = d.axis(len(shape))
    at = d.numbers.integers(-shape[axis], shape[axis], d.shape(d.size(0, 3), 1, 4))
    return [d.op("Gather", d.x(*shape), d.either(at.astype(d.pick(np.int64, np.int32))), axis=axis)]


def elements(d: Draw) -> Sequence[str]:
    shape = d.shape(d.size(1, 4), 1, 6)
    axis = d.axis(len(shape))
    taken = [d.size(1, n) for n in shape]
    taken[axis] = d.size(1, 9)
    at = d.numbers.integers(-shape[axis], shape[axis], taken)
    if d.flip():
        return [d.op("GatherElements", d.x(*shape), d.either(at), axis=axis)]
    reduction = d.pick("none", "add", "mul", "max", "min") if d.opset >= 18 else "none"
    if reduction == "none":  # no equal positions: the order of writes is nobody's promise
        taken = [min(pair) for pair in zip(taken, shape, strict=True)]
        at = np.argsort(d.numbers.random(shape), axis=axis)[tuple(slice(0, n) for n in taken)]
    more = {"reduction": reduction} if d.opset >= 16 else {}
    return [d.op("ScatterElements", d.x(*shape), d.either(at), d.x(*taken), axis=axis, **more)]


def positions(d: Draw) -> Sequence[str]:
    shape = d.shape(d.size(1, 4), 1, 5)
    n_batch = d.size(0, len(shape) - 1)
    depth = d.size(1, len(shape) - n_batch)
    lead = d.shape(d.size(0 if n_batch else 1, 2), 1, 4)
    if d.flip():
        sizes = shape[n_batch : n_batch + depth]
        at = np.stack([d.numbers.integers(-n, n, (*shape[:n_batch], *lead)) for n in sizes], -1)
        return [d.op("GatherND", d.x(*shape), d.either(at), batch_dims=n_batch)]
    at = np.stack([d.numbers.integers(-n, n, lead or (1,)) for n in shape[:depth]], -1)
    reduction = d.pick("add", "mul", "max", "min") if d.opset >= 18 else "none"
    if reduction == "none":
        at = at.reshape(-1, depth)[:1]
    more = {"reduction": reduction} if d.opset >= 16 else {}
    return [d.op("ScatterND", d.x(*shape), d.either(at), d.x(*at.shape[:-1], *shape[depth:]), **more)]


def topk(d: Draw) -> Sequence[str]:
    shape = d.shape(d.size(1, 3), 1, 20)
    axis = d.axis(len(shape))
    x = d.input(d.numbers.integers(-4, 5, shape).astype(F32))
    return d.results("TopK", x, d.ints(d.size(1, shape[axis])), n=2, axis=axis, largest=d.pick(0, 1), sorted=1)


def _transpose(d: Draw, shape: tuple[int, ...], x: str) -> Sequence[str]:
    rank = len(shape)
    y = d.op("Transpose", x, perm=d.random.sample(range(rank), rank) if d.flip(0.8) else None)
    return [d.op("Relu", d.op("Transpose", y, perm=d.random.sample(range(rank), rank))) if d.flip() else y]


def _reshape(d: Draw, shape: tuple[int, ...], x: str) -> Sequence[str]:
    zeros = [0] * (len(shape) - 1)
    return [d.op("Reshape", x, d.ints(-1, shape[-1])), d.op("Reshape", x, d.ints(*zeros, -1, 1))]


def _tile(d: Draw, shape: tuple[int, ...], x: str) -> Sequence[str]:
    return [d.op("Tile", x, d.either(np.array([d.size(1, 3) for _ in shape], np.int64)))]


def _expand(d: Draw, shape: tuple[int, ...], x: str) -> Sequence[str]:
    small = d.x(*(n if d.flip() else 1 for n in shape))
    return [d.op("Expand", small, d.either(np.array([d.size(1, 2), *shape], np.int64)))]


def _squeeze(d: Draw, shape: tuple[int, ...], x: str) -> Sequence[str]:
    if d.flip():
        return [d.op("Squeeze", d.x(1, *shape, 1), d.ints(d.pick(0, -1)))]
    return [d.op("Unsqueeze", x, d.ints(*d.random.sample(range(-len(shape) - 2, 0), 2)))]


def _concat(d: Draw, shape: tuple[int, ...], x: str) -> Sequence[str]:
    axis, parts = d.axis(len(shape)), [x]
    for _ in range(d.size(0, 3)):
        one = list(shape)
        one[axis] = d.size(1, 5)
        parts.append(d.either(d.normal(*one)))
    return [d.op("Concat", *parts, axis=axis)]


def _split(d: Draw, shape: tuple[int, ...], x: str) -> Sequence[str]:
    axis = d.axis(len(shape))
    n = shape[axis]
    if d.opset < 18 or d.flip():
        at = d.size(0, n)
        return d.results("Split", x, d.ints(at, n - at), n=2, axis=axis)
    parts = d.size(1, n)
    parts = 1 if -(-n // parts) * (parts - 1) > n else parts
    return d.results("Split", x, n=parts, axis=axis, num_outputs=parts)


def _blocks(d: Draw, shape: tuple[int, ...], x: str) -> Sequence[str]:
    if d.flip():
        return [d.op("DepthToSpace", d.x(2, 8, 3, 2), blocksize=2, mode=d.pick("DCR", "CRD"))]
    return [d.op("SpaceToDepth", d.x(2, 3, 4, 6), blocksize=2)]


def _flatten(d: Draw, shape: tuple[int, ...], x: str) -> Sequence[str]:
    return [d.op("Flatten", x, axis=d.random.randint(-len(shape), len(shape)))]


def _reversed(d: Draw, shape: tuple[int, ...], x: str) -> Sequence[str]:
    batch = d.pick(0, 1)
    lengths = d.either(d.numbers.integers(1, (4, 5)[batch], (4, 3)[batch]))
    return [d.op("ReverseSequence", d.x(4, 3, 2), lengths, batch_axis=batch, time_axis=1 - batch)]


def _triangle(d: Draw, shape: tuple[int, ...], x: str) -> Sequence[str]:
    d.opset = max(d.opset, 14)
    at = d.either(np.int64(d.random.randint(-7, 7)))
    return [d.op("Trilu", d.x(*d.shape(d.size(2, 4), 1, 6)), at, upper=d.pick(0, 1))]


def _sums(d: Draw, shape: tuple[int, ...], x: str) -> Sequence[str]:
    axis = d.const(np.int32(d.axis(len(shape))))
    return [d.op("CumSum", x, axis, exclusive=d.pick(0, 1), reverse=d.pick(0, 1))]


def _one_hot(d: Draw, shape: tuple[int, ...], x: str) -> Sequence[str]:
    at = d.input(d.numbers.integers(-6, 7, d.shape(d.size(1, 2), 1, 4)))
    return [d.op("OneHot", at, d.const(np.int64(5)), d.const(np.array([-1, 2], F32)), axis=d.pick(-1, 0, 1))]


def _made(d: Draw, shape: tuple[int, ...], x: str) -> Sequence[str]:
    match d.pick("eye", "range", "full", "size", "shape"):
        case "eye":
            return [d.op("EyeLike", d.x(*d.shape(2, 1, 6)), k=d.random.randint(-3, 3))]
        case "range":
            dtype, step = d.pick(np.int64, F32, np.int32), d.pick(1, 2, -1, -3)
            first, last = (d.random.randint(-9, 9) for _ in range(2))
            return [d.op("Range", d.const(first, dtype), d.either(dtype(last)), d.const(step, dtype))]
        case "full":
            value = numpy_helper.from_array(np.array([3], d.pick(F32, np.int64, np.bool_)))
            return [d.op("ConstantOfShape", d.either(np.array(shape, np.int64)), value=value)]
        case "size":
            return [d.op("Size", x)]
    d.opset = max(d.opset, 15)
    return [d.op("Shape", x, start=d.random.randint(-5, 5), end=d.random.randint(-5, 5))]


def _compress(d: Draw, shape: tuple[int, ...], x: str) -> Sequence[str]:
    along, all_of = (d.const(d.numbers.random(n) < 0.5) for n in (d.size(1, shape[0]), int(np.prod(shape))))
    return [d.op("Compress", x, along, axis=0), d.op("Compress", x, all_of)]


MOVES: tuple[Callable[[Draw, tuple[int, ...], str], Sequence[str]], ...] = (
    _transpose, _reshape, _tile, _expand, _squeeze, _concat, _split, _blocks, _flatten, _reversed, _triangle, _sums,
    _one_hot, _made, _compress,
)  # fmt: skip


def moves(d: Draw) -> Sequence[str]:
    shape = d.shape(d.size(1, 4), 1, 6)
    return d.random.choice(MOVES)(d, shape, d.x(*shape))


FAMILIES = (slices, gather, elements, positions, topk, moves)
