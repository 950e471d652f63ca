"""Moving data: Transpose, Concat, Slice, Split, Pad, Gather*, Scatter*, TopK, OneHot, DepthToSpace, SpaceToDepth,
Compress, ReverseSequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vivace.base.dims import Dim, bounds, ceildiv, floordiv, maximum, minimum, symbols
from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.graph.ops.shapes import DimMismatch
from vivace.onnx.call import Call, Result, onnx_op
from vivace.onnx.scope import Fallback


@onnx_op("Transpose")
def transpose(c: Call, x: Value) -> Value:
    return c.transposed(x, c.attr("perm", tuple(reversed(range(x.rank)))))


@onnx_op("Concat")
def concat(c: Call, *xs: Value) -> Value:
    axis = c.axis(c.attr("axis", 1), xs[0].rank)
    return xs[0] if len(xs) == 1 else c.concat(*xs, axis=axis)


def sign_of(d: Dim) -> int:
    """1 where d >= 0, -1 where d < 0; a single symbol is assumed large enough for d to be a position.

    Raises: DimMismatch, from which the importer learns a lower bound; Fallback.
    """
    lo, hi = bounds(d)
    if lo is not None and lo >= 0:
        return 1
    if hi is not None and hi < 0:
        return -1
    if len({s.name for s in symbols(d)}) == 1:
        raise DimMismatch(maximum(d, 0), d, "a position")
    raise Fallback(f"the sign of {d} is not known")


_TO_THE_END = (1 << 31) - 1


def _position(d: Dim, size: Dim, least: Dim, most: Dim) -> Dim:
    """A slice bound: negative counts from the end, then clamped; exporters write the largest integer for `to the
    end`.
    """
    if isinstance(d, int) and d >= _TO_THE_END:
        return most
    if sign_of(d) < 0:
        d = size + d
    return minimum(maximum(d, least), most) if least != 0 or not isinstance(d, int) or d < 0 else minimum(d, most)


def slice_axis(size: Dim, start: Dim, end: Dim, step: int) -> tuple[Dim, Dim]:
    """`(first position, count)` of start:end:step on an axis. Source: ONNX operator Slice."""
    if step > 0:
        a, b = _position(start, size, 0, size), _position(end, size, 0, size)
        return a, maximum(ceildiv(b - a, step), 0)
    a = _position(start, size, 0, size - 1)
    huge = isinstance(end, int) and isinstance(size, int) and end < -size
    b = -1 if huge or (isinstance(end, int) and end < -(1 << 31)) else _position(end, size, -1, size - 1)
    return a, maximum(ceildiv(a - b, -step), 0)


@onnx_op("Slice")
def slice_attributes(c: Call, x: Value) -> Value:
    starts, ends = c.attr("starts"), c.attr("ends")
    return _slice(c, x, starts, ends, c.attr("axes", tuple(range(len(starts)))), (1,) * len(starts))


@onnx_op("Slice", since=10)
def slice_inputs(
    c: Call, x: Value, starts: Value, ends: Value, axes: Value | None = None, steps: Value | None = None
) -> Value:
    first, last = c.ints(starts, "a start"), c.ints(ends, "an end")
    along = tuple(range(len(first))) if axes is None else c.static_ints(axes, "axes")
    return _slice(c, x, first, last, along, (1,) * len(first) if steps is None else c.static_ints(steps, "a step"))


def _slice(
    c: Call, x: Value, starts: Sequence[Dim], ends: Sequence[Dim], axes: Sequence[int], steps: Sequence[int]
) -> Value:
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise c.error("starts, ends, axes and steps do not match, or a step is 0")
    first: list[Dim] = [0] * x.rank
    count, by = list(x.shape), [1] * x.rank
    for start, end, axis, step in zip(starts, ends, axes, steps):
        i = c.axis(axis, x.rank)
        first[i], count[i] = slice_axis(x.shape[i], start, end, step)
        by[i] = step
    if tuple(count) == x.shape and all(s == 1 for s in by):
        return x
    return c.slice(x, starts=tuple(first), sizes=tuple(count), steps=tuple(by))


@onnx_op("Split")
def split_attributes(c: Call, x: Value) -> Result:
    return _split(c, x, c.attr("split"))


@onnx_op("Split", since=13)
def split(c: Call, x: Value, sizes: Value | None = None) -> Result:
    return _split(c, x, None if sizes is None else c.ints(sizes, "a size"))


def _split(c: Call, x: Value, sizes: Sequence[Dim] | None) -> Result:
    axis, n = c.axis(c.attr("axis", 0), x.rank), c.attr("num_outputs", c.n_outputs)
    whole = x.shape[axis]
    if sizes is None:
        part = ceildiv(whole, n)
        if isinstance(whole, int) and c.opset < 18 and whole % n:
            raise c.error(f"axis {axis} of {x.type} does not divide into {n} parts")
        equal = not isinstance(whole, int) and c.opset < 18  # the operator demands equal parts
        sizes = [floordiv(whole, n)] * n if equal else [maximum(minimum(part, whole - part * i), 0) for i in range(n)]
    total: Dim = 0
    for s in sizes:
        total = total + s
    if total != whole:
        raise DimMismatch(whole, total, "Split")
    outs: list[Value] = []
    at: Dim = 0
    for s in sizes:
        outs.append(c.sliced(x, axis, at, s))
        at = at + s
    return tuple(outs)


@onnx_op("Pad")
def pad_attributes(c: Call, x: Value) -> Value:
    return _pad(c, x, c.attr("pads"), tuple(range(x.rank)), c.attr("value", 0.0))


@onnx_op("Pad", since=11)
def pad(c: Call, x: Value, pads: Value, value: Value | None = None, axes: Value | None = None) -> Value:
    along = tuple(range(x.rank)) if axes is None else [c.axis(a, x.rank) for a in c.static_ints(axes, "axes")]
    fill = 0 if value is None else c.scalar(value, "the padding value")
    return _pad(c, x, c.ints(pads, "the padding"), along, fill)


def _pad(c: Call, x: Value, pads: Sequence[Dim], axes: Sequence[int], value: Any) -> Value:
    if len(pads) != 2 * len(axes):
        raise c.error(f"{len(pads)} paddings for {len(axes)} axes")
    before: list[Dim] = [0] * x.rank
    after: list[Dim] = [0] * x.rank
    for k, axis in enumerate(axes):
        before[axis], after[axis] = pads[k], pads[k + len(axes)]
    for axis in range(x.rank):
        cut = [0 if sign_of(p) > 0 else -p for p in (before[axis], after[axis])]
        if cut != [0, 0]:
            c.demand(x.shape[axis] - cut[0] - cut[1], f"more than all of {x.type} is cut away")
            x = c.sliced(x, axis, cut[0], x.shape[axis] - cut[0] - cut[1])
            before[axis], after[axis] = (p if k == 0 else 0 for p, k in zip((before[axis], after[axis]), cut))
    if all(p == 0 for p in before + after):
        return x
    mode = c.attr("mode", "constant")
    for size, *sides in zip(x.shape, before, after) if mode != "constant" else ():
        for side in sides:
            if side != 0:  # a mirror image has no second reflection, and of nothing there is no image
                c.demand(size - 1 - (side if mode == "reflect" else 0), f"{x.type} has too little to repeat")
    fill = bool(value) if x.dtype is DType.bool else float(value) if x.dtype.is_float else int(value)
    return c.pad(x, before=tuple(before), after=tuple(after), mode=mode, value=fill)


@onnx_op("Gather")
def gather(c: Call, x: Value, indices: Value) -> Value:
    axis = c.axis(c.attr("axis", 0), x.rank)
    size = x.shape[axis]
    if indices.data is not None and indices.data.size:
        for i in {int(indices.data.min()), int(indices.data.max())}:
            c.demand(size - 1 - i if i >= 0 else size + i, f"index {i} is out of range")
    if indices.rank == 0 and indices.data is not None:  # one position: a view
        i = int(indices.data)
        part = c.sliced(x, axis, i if i >= 0 else size + i, 1)
        return c.reshaped(part, (*x.shape[:axis], *x.shape[axis + 1 :]))
    return c.gather(x, indices, axis=axis)


@onnx_op("GatherElements", since=11)
def gather_elements(c: Call, x: Value, indices: Value) -> Value:
    return c.gather_elements(x, indices, axis=c.axis(c.attr("axis", 0), x.rank))


def _known_depth(indices: Value) -> None:
    if indices.rank and not isinstance(indices.shape[-1], int):
        raise Fallback("how many coordinates a position has depends on the sizes of inputs")


@onnx_op("GatherND", since=11)
def gather_nd(c: Call, x: Value, indices: Value) -> Value:
    _known_depth(indices)
    return c.gather_nd(x, indices, batch_dims=c.attr("batch_dims", 0))


@onnx_op("Scatter", "ScatterElements")
def scatter_elements(c: Call, x: Value, indices: Value, updates: Value) -> Value:
    return c.scatter_elements(
        x, indices, updates, axis=c.axis(c.attr("axis", 0), x.rank), reduction=c.attr("reduction", "none")
    )


@onnx_op("ScatterND", since=11)
def scatter_nd(c: Call, x: Value, indices: Value, updates: Value) -> Value:
    _known_depth(indices)
    return c.scatter_nd(x, c.cast_to(indices, DType.i64), updates, reduction=c.attr("reduction", "none"))


@onnx_op("TopK")
def topk_attribute(c: Call, x: Value) -> Result:
    return _topk(c, x, c.attr("k"), is_largest=True, is_sorted=True)


@onnx_op("TopK", since=10)
def topk(c: Call, x: Value, k: Value) -> Result:
    return _topk(c, x, c.scalar(k, "k"), bool(c.attr("largest", 1)), bool(c.attr("sorted", 1)))


def _topk(c: Call, x: Value, k: Any, is_largest: bool, is_sorted: bool) -> Result:
    axis = c.axis(c.attr("axis", -1), x.rank)
    if isinstance(k, int) and k < 0:
        raise c.error(f"k is {k}", f"0 to {x.shape[axis]}")
    c.demand(x.shape[axis] - k, f"k is {k}, of {x.shape[axis]}")
    return c.topk(x, axis=axis, k=k, largest=is_largest, sorted=is_sorted)


@onnx_op("OneHot", since=9)
def one_hot(c: Call, indices: Value, depth: Value, values: Value) -> Value:
    n = c.scalar(depth, "the depth")
    n = int(n) if isinstance(n, float) else n
    axis = c.axis(c.attr("axis", -1), indices.rank + 1)
    idx = c.cast_to(indices, DType.i64)
    idx = c.where(c.lt(idx, c.like(idx, 0)), c.add(idx, c.dims([n], ())), idx)
    shape = (*indices.shape[:axis], 1, *indices.shape[axis:])
    line = c.reshape(
        c.iota(shape=(n,), axis=0, dtype=DType.i64), shape=tuple(n if i == axis else 1 for i in range(len(shape)))
    )
    off, on = (c.reshaped(c.sliced(values, 0, i, 1), ()) for i in (0, 1))
    return c.where(c.eq(c.reshaped(idx, shape), line), on, off)


@onnx_op("DepthToSpace")
def depth_to_space(c: Call, x: Value) -> Value:
    b, (n, ch, h, w) = c.attr("blocksize"), x.shape
    if c.attr("mode", "DCR") == "DCR":
        x = c.transpose(c.reshape(x, shape=(n, b, b, floordiv(ch, b * b), h, w)), perm=(0, 3, 4, 1, 5, 2))
    else:
        x = c.transpose(c.reshape(x, shape=(n, floordiv(ch, b * b), b, b, h, w)), perm=(0, 1, 4, 2, 5, 3))
    return c.reshape(x, shape=(n, floordiv(ch, b * b), h * b, w * b))


@onnx_op("SpaceToDepth")
def space_to_depth(c: Call, x: Value) -> Value:
    b, (n, ch, h, w) = c.attr("blocksize"), x.shape
    split = c.reshape(x, shape=(n, ch, floordiv(h, b), b, floordiv(w, b), b))
    perm = (0, 3, 5, 1, 2, 4) if c.attr("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return c.reshape(c.transpose(split, perm=perm), shape=(n, ch * b * b, floordiv(h, b), floordiv(w, b)))


@onnx_op("Compress", since=9)
def compress(c: Call, x: Value, condition: Value) -> Value:
    kept = np.flatnonzero(c.array(condition, "the condition"))
    if "axis" not in c.attrs:
        return c.gather(c.reshaped(x, (x.type.size,)), c.const(kept), axis=0)
    return c.gather(x, c.const(kept), axis=c.axis(c.attr("axis"), x.rank))


@onnx_op("ReverseSequence", since=10)
def reverse_sequence(c: Call, x: Value, lens: Value) -> Value:
    batch, time = c.axis(c.attr("batch_axis", 1), x.rank), c.axis(c.attr("time_axis", 0), x.rank)
    along = [x.shape[time] if i == time else 1 for i in range(x.rank)]
    step = c.iota(shape=tuple(along), axis=time, dtype=DType.i64)
    n = c.reshape(c.cast_to(lens, DType.i64), shape=tuple(x.shape[batch] if i == batch else 1 for i in range(x.rank)))
    back = c.where(c.lt(step, n), c.sub(c.sub(n, step), c.like(n, 1)), step)
    return c.gather_elements(x, c.expand(back, shape=x.shape), axis=time)
