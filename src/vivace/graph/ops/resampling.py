"""resize: sample a tensor at other coordinates, axis by axis.

resize{mode, coordinate, nearest_mode, cubic_coeff, exclude_outside, sizes, scales}(x)
        mode nearest|linear|cubic; sizes: the whole output shape; scales: one float or None per axis: the scale that
        maps output to input coordinates, None where it is size_out / size_in.
        coordinate half_pixel|half_pixel_symmetric|pytorch_half_pixel|align_corners|asymmetric
        nearest_mode round_prefer_floor|round_prefer_ceil|floor|ceil

An axis is resampled when its size or scale differs from the identity; every mode is separable, so the result is one
matrix per axis. Antialiasing and regions of interest are not core.
Source: ONNX operator Resize.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vivace.base.dims import Dim
from vivace.base.errors import GraphError
from vivace.graph.graph import Attrs, Op, Type
from vivace.graph.ops.reduction import accumulator
from vivace.graph.ops.shapes import need

Array = np.ndarray
COORDINATES = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")
NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def _infer(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    x = need(types, 0, "resize")
    if len(attrs["sizes"]) != x.rank or len(attrs["scales"]) != x.rank:
        raise GraphError(f"sizes and scales need {x.rank} entries", where="resize")
    if attrs["mode"] not in ("nearest", "linear", "cubic") or attrs["coordinate"] not in COORDINATES:
        raise GraphError(f"mode {attrs['mode']!r} with {attrs['coordinate']!r} is unknown", where="resize")
    if attrs["mode"] == "nearest" and attrs["nearest_mode"] not in NEAREST:
        raise GraphError(f"nearest_mode {attrs['nearest_mode']!r} is unknown", where="resize")
    return (Type(x.dtype, tuple(attrs["sizes"])),)


def source_coordinates(size_in: int, size_out: int, scale: float | None, coordinate: str) -> Array:
    """Where each output element lies in the input, in f64."""
    ratio = size_out / size_in if scale is None else scale
    i = np.arange(size_out, dtype=np.float64)
    if coordinate == "asymmetric":
        return i / ratio
    if coordinate == "align_corners":
        # With a given scale the length is a fraction, and so is its last position.
        length = size_out if scale is None else ratio * size_in
        return i * (size_in - 1) / (length - 1) if length != 1 else i * 0.0
    if coordinate == "pytorch_half_pixel" and size_out == 1:
        return i * 0.0
    if coordinate == "half_pixel_symmetric":
        adjustment = size_out / (ratio * size_in)
        centre = size_in / 2
        return centre * (1 - adjustment) + (i + 0.5) / ratio - 0.5
    return (i + 0.5) / ratio - 0.5


def nearest_index(x: Array, size_in: int, nearest_mode: str) -> Array:
    rounders: dict[str, Callable[[Array], Array]] = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda v: np.ceil(v - 0.5),
        "round_prefer_ceil": lambda v: np.floor(v + 0.5),
    }
    return np.clip(rounders[nearest_mode](x), 0, size_in - 1).astype(np.int64)


def _near(d: Array, a: float) -> Array:
    """Keys' cubic kernel for distances up to 1."""
    return ((a + 2) * d - (a + 3)) * d * d + 1


def _far(d: Array, a: float) -> Array:
    """Keys' cubic kernel for distances from 1 to 2."""
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a


def tap_table(x: Array, size: int, attrs: Attrs) -> tuple[Array, Array]:
    """Source positions, within the operand, and weights [tap, coordinate] for coordinates `x` (linear and cubic)."""
    base = np.floor(x)
    t = x - base
    if attrs["mode"] == "linear":
        offsets, weights = [0, 1], [1 - t, t]
    else:
        a = attrs["cubic_coeff"]
        offsets, weights = [-1, 0, 1, 2], [_far(1 + t, a), _near(t, a), _near(1 - t, a), _far(2 - t, a)]
    positions = np.stack([base + o for o in offsets]).astype(np.int64)
    table = np.stack(weights)
    if attrs["exclude_outside"]:
        table = np.where((positions >= 0) & (positions < size), table, 0.0)
        table = table / table.sum(axis=0)
    return np.clip(positions, 0, size - 1), table


def weights(size_in: int, size_out: int, scale: float | None, attrs: Attrs) -> Array:
    """The matrix [size_out, size_in] that resamples one axis (linear and cubic)."""
    positions, table = tap_table(source_coordinates(size_in, size_out, scale, attrs["coordinate"]), size_in, attrs)
    out = np.zeros((size_out, size_in))
    for at, weight in zip(positions, table, strict=True):
        np.add.at(out, (np.arange(size_out), at), weight)
    return out


def _run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    x = xs[0]
    assert x is not None
    dtype = x.dtype
    for axis, (size, scale) in enumerate(zip(attrs["sizes"], attrs["scales"], strict=True)):
        n = x.shape[axis]
        if size == n and scale in (None, 1.0):
            continue
        if not size or not n:
            x = np.zeros((*x.shape[:axis], size, *x.shape[axis + 1 :]), dtype)
        elif attrs["mode"] == "nearest":
            at = source_coordinates(n, size, scale, attrs["coordinate"])
            x = np.take(x, nearest_index(at, n, attrs["nearest_mode"]), axis=axis)
        else:
            x = x.astype(accumulator(dtype) if dtype.kind not in "iu" else np.float64, copy=False)
            matrix = weights(n, size, scale, attrs).astype(x.dtype)
            x = np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)
    if dtype.kind in "iu" and x.dtype != dtype:
        x = np.clip(np.trunc(x), np.iinfo(dtype).min, np.iinfo(dtype).max)
    return (np.ascontiguousarray(x).astype(dtype, copy=False),)


def _flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    changed = sum(a != b for a, b in zip(attrs["sizes"], ins[0].shape if ins[0] is not None else (), strict=True))
    taps = {"nearest": 0, "linear": 2, "cubic": 4}[attrs["mode"]]
    return outs[0].size * (2 * taps**changed if taps else 0)


FAMILY = (Op("resize", _infer, _run, _flops, False, 1e-5, "movement"),)
