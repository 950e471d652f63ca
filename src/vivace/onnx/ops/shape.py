"""Shapes and contents by shape: Constant, Shape, Size, Reshape, Flatten, Squeeze, Unsqueeze, Expand, Tile,
ConstantOfShape, Range, EyeLike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vivace.base.dims import Dim, ceildiv, exact_div, floordiv, maximum, prod
from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.graph.ops.shapes import DimMismatch
from vivace.onnx.call import Call, Result, onnx_op
from vivace.onnx.scope import Fallback
from vivace.onnx.symbolic import Ratio
from vivace.onnx.tensors import checked_shape, dtype_of


@onnx_op("Constant")
def constant(c: Call) -> Value:
    for name in ("value", "sparse_value"):
        if name in c.attrs:
            return c.const(c.attr(name))
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if name in c.attrs:
            return c.const(np.asarray(c.attr(name), dtype))
    for name in ("value_string", "value_strings"):
        if name in c.attrs:
            return c.const(np.asarray(c.attr(name), object))
    raise c.error("a Constant without a value")


@onnx_op("Identity")
def identity(c: Call, x: Value) -> Value:
    return x


@onnx_op("Dropout")
def dropout(c: Call, x: Value, ratio: Value | None = None, training: Value | None = None) -> Result:
    if training is not None and (training.data is None or training.data.any()):
        raise Fallback("it drops at random (training mode)")
    return x if c.n_outputs == 1 else (x, c.full(x.shape, True, DType.bool))


@onnx_op("Shape")
def shape(c: Call, x: Value) -> Value:
    start, end = c.attr("start", 0), c.attr("end", None)
    return c.dims(x.shape[slice(start, end)])


@onnx_op("Size")
def size(c: Call, x: Value) -> Value:
    return c.dims([x.type.size], ())


@onnx_op("Reshape")
def reshape(c: Call, x: Value, target: Value) -> Value:
    wanted = c.ints(target, "the target shape")
    out: list[Dim] = []
    for i, d in enumerate(wanted):
        if isinstance(d, int) and d == 0 and not c.attr("allowzero", 0):
            if i >= x.rank:
                raise c.error(f"the target shape {wanted} copies axis {i} of {x.type}")
            d = x.shape[i]
        out.append(d)
    holes = [i for i, d in enumerate(out) if isinstance(d, int) and d < 0]
    if len(holes) > 1 or any(out[i] != -1 for i in holes):
        raise c.error(f"the target shape is {wanted}", "sizes and at most one -1")
    if holes:
        out[holes[0]] = 1
        out[holes[0]] = quotient(c, x, out, holes[0])
    if isinstance(x.type.size, int) and isinstance(prod(out), int) and x.type.size != prod(out):
        raise c.error(f"{x.type} cannot take the shape {tuple(out)}", f"{x.type.size} elements")
    return c.reshaped(x, out)


def quotient(c: Call, x: Value, shape: Sequence[Dim], hole: int) -> Dim:
    """The size that -1 stands for. A symbol that divides only if it equals another dim of x is taken for that dim, and
    a dim of 0 that stays where it is leaves the others as they are.
    """
    size, rest = x.type.size, prod(tuple(shape))
    if rest == 0:
        stays = [i != hole and i < x.rank and d == x.shape[i] for i, d in enumerate(shape)]
        size = prod([d for i, d in enumerate(x.shape) if i >= len(stays) or not stays[i]])
        rest = prod([d for i, d in enumerate(shape) if not stays[i]])
    if rest == 0:
        return 0
    exact = exact_div(size, rest)
    if exact is not None:
        return exact
    if isinstance(size, int) and isinstance(rest, int):
        raise c.error(f"{x.type} cannot be divided into {rest} parts")
    for i, d in enumerate(shape):
        if i != hole and i < x.rank and d != x.shape[i] and not (isinstance(d, int) and isinstance(x.shape[i], int)):
            trial = [x.shape[i] if j == i else e for j, e in enumerate(shape)]
            if exact_div(x.type.size, prod(tuple(trial))) is not None:
                raise DimMismatch(x.shape[i], d, "Reshape")
    return floordiv(size, rest)


@onnx_op("Flatten")
def flatten(c: Call, x: Value) -> Value:
    axis = c.attr("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    if not 0 <= axis <= x.rank:
        raise c.error(f"axis {axis} is out of range for {x.type}")
    return c.reshaped(x, (prod(x.shape[:axis]), prod(x.shape[axis:])))


@onnx_op("Squeeze")
def squeeze_attribute(c: Call, x: Value) -> Value:
    return _squeeze(c, x, c.attr("axes"))


@onnx_op("Squeeze", since=13)
def squeeze(c: Call, x: Value, axes: Value | None = None) -> Value:
    return _squeeze(c, x, None if axes is None else c.static_ints(axes, "axes"))


def _squeeze(c: Call, x: Value, axes: Sequence[int] | None) -> Value:
    dropped = tuple(i for i, d in enumerate(x.shape) if d == 1) if axes is None else c.axes(axes, x.rank)
    for i in dropped:
        if x.shape[i] != 1:
            raise DimMismatch(x.shape[i], 1, "Squeeze")
    return c.reshaped(x, [d for i, d in enumerate(x.shape) if i not in dropped])


@onnx_op("Unsqueeze")
def unsqueeze_attribute(c: Call, x: Value) -> Value:
    return _unsqueeze(c, x, c.attr("axes", ()))


@onnx_op("Unsqueeze", since=13)
def unsqueeze(c: Call, x: Value, axes: Value) -> Value:
    return _unsqueeze(c, x, c.static_ints(axes, "axes"))


def _unsqueeze(c: Call, x: Value, axes: Sequence[int]) -> Value:
    added = c.axes(axes, x.rank + len(axes))
    rest = iter(x.shape)
    return c.reshaped(x, [1 if i in added else next(rest) for i in range(x.rank + len(added))])


@onnx_op("Expand")
def expand(c: Call, x: Value, target: Value) -> Value:
    return broadcast_to(c, x, c.ints(target, "the target shape"))


def broadcast_to(c: Call, x: Value, target: Sequence[Dim]) -> Value:
    """Broadcast both ways: an axis of the target that is 1 keeps the size of x."""
    rank = max(x.rank, len(target))
    mine, wanted = (1,) * (rank - x.rank) + x.shape, (1,) * (rank - len(target)) + tuple(target)
    out: list[Dim] = []
    for a, b in zip(mine, wanted):
        if a != b and a != 1 and b != 1:
            raise DimMismatch(a, b, "Expand")
        out.append(b if a == 1 else a)
    return x if tuple(out) == x.shape else c.expand(x, shape=tuple(out))


@onnx_op("Tile")
def tile(c: Call, x: Value, repeats: Value) -> Value:
    times = c.ints(repeats, "the number of repeats")
    if len(times) != x.rank:
        raise c.error(f"{len(times)} repeats for {x.type}")
    if all(t == 1 for t in times):
        return x
    spread = [e for d in x.shape for e in (1, d)]
    full = [e for t, d in zip(times, x.shape) for e in (t, d)]
    return c.reshape(
        c.expand(c.reshape(x, shape=tuple(spread)), shape=tuple(full)),
        shape=tuple(t * d for t, d in zip(times, x.shape)),
    )


@onnx_op("ConstantOfShape")
def constant_of_shape(c: Call, target: Value) -> Value:
    value = c.attr("value", np.zeros(1, np.float32))
    dims = c.ints(target, "the shape")
    checked_shape([d for d in dims if isinstance(d, int)], DType.of(value.dtype), c.site)
    return c.full(dims, value.reshape(-1)[0], DType.of(value.dtype))


@onnx_op("Range")
def arange(c: Call, start: Value, limit: Value, delta: Value) -> Value:
    if all(v.data is not None for v in (start, limit, delta)) and not start.dtype.is_int:
        a, b, d = (v.data.reshape(-1)[0] for v in (start, limit, delta))  # type: ignore[union-attr]
        n = max(int(np.ceil((float(b) - float(a)) / float(d))), 0)
        return c.const((np.float64(a) + np.arange(n) * np.float64(d)).astype(start.dtype.numpy))
    a, b, d = (c.scalar(v, "a bound") for v in (start, limit, delta))
    if any(isinstance(e, (float, Ratio)) for e in (a, b, d)) or not isinstance(d, int) or d == 0:
        raise Fallback("its step or a fractional bound depends on sizes")
    count = maximum(ceildiv(b - a, d) if d > 0 else ceildiv(a - b, -d), 0)
    if isinstance(count, int) and isinstance(a, int):
        checked_shape([count], start.dtype, c.site)
        if count <= 4096:
            return c.const((a + d * np.arange(count)).astype(start.dtype.numpy))
    line = c.iota(shape=(count,), axis=0, dtype=start.dtype)
    line = line if d == 1 else c.mul(line, c.like(line, d))
    return line if isinstance(a, int) and a == 0 else c.add(line, start)


@onnx_op("EyeLike")
def eye_like(c: Call, x: Value) -> Value:
    dtype = dtype_of(c.attr("dtype"), c.site) if "dtype" in c.attrs else x.dtype
    rows = c.iota(shape=(x.shape[0], 1), axis=0, dtype=DType.i64)
    columns = c.iota(shape=(1, x.shape[1]), axis=1, dtype=DType.i64)
    return c.cast_to(c.eq(columns, c.add(rows, c.like(rows, c.attr("k", 0)))), dtype)


@onnx_op("Trilu", since=14)
def trilu(c: Call, x: Value, k: Value | None = None) -> Value:
    rows = c.iota(shape=(x.shape[-2], 1), axis=0, dtype=DType.i64)
    columns = c.iota(shape=(1, x.shape[-1]), axis=1, dtype=DType.i64)
    diagonal = rows if k is None else c.add(rows, c.reshaped(k, ()))
    keep = c.ge(columns, diagonal) if c.attr("upper", 1) else c.le(columns, diagonal)
    return c.where(keep, x, c.like(x, 0))
