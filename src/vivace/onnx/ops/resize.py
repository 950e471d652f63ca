"""Resize and Upsample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from vivace.base.dims import Dim, floordiv, substitute, symbols
from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.graph.ops.resampling import COORDINATES
from vivace.onnx.call import Call, onnx_op
from vivace.onnx.scope import Fallback
from vivace.onnx.symbolic import Ratio, value_of

_MODES = {"nearest": "nearest", "linear": "linear", "bilinear": "linear", "cubic": "cubic"}
_MIXED = frozenset(map(DType, ("f32", "f64", "f16", "bf16", "i8", "u8", "i16", "u16", "i32", "u32", "i64")))


@onnx_op("Upsample")
def upsample_attribute(c: Call, x: Value) -> Value:
    return _scaled(c, x, c.attr("scales"), coordinate="asymmetric", nearest_mode="floor")


@onnx_op("Upsample", since=9)
@onnx_op("Resize", since=10)
def upsample(c: Call, x: Value, scales: Value) -> Value:
    return _scaled(c, x, _ratios(c, scales), coordinate="asymmetric", nearest_mode="floor")


@onnx_op("Resize", since=11)
def resize(
    c: Call, x: Value, roi: Value | None = None, scales: Value | None = None, sizes: Value | None = None
) -> Value:
    if c.attr("antialias", 0):
        raise Fallback("it resamples with antialiasing")
    axes = c.attr("axes", tuple(range(x.rank)))
    along = [c.axis(a, x.rank) for a in axes]
    style = {
        "coordinate": c.attr("coordinate_transformation_mode", "half_pixel"),
        "nearest_mode": c.attr("nearest_mode", "round_prefer_floor"),
        "cubic_coeff": c.attr("cubic_coeff_a", -0.75),
        "exclude_outside": bool(c.attr("exclude_outside", 0)),
    }
    if sizes is not None:
        wanted = c.ints(sizes, "the output size")
        if wanted:
            return _sized(c, x, wanted, along, **style)
    if scales is None:
        raise c.error("it has neither scales nor sizes")
    by: list[Any] = [1.0] * x.rank
    for axis, s in zip(along, _ratios(c, scales), strict=True):
        by[axis] = s
    return _scaled(c, x, by, **style)


def _ratios(c: Call, scales: Value) -> list[Any]:
    """Scales as numbers or ratios of dims."""
    if scales.data is not None:
        return [float(s) for s in scales.data.reshape(-1)]
    contents = c.known(scales)
    if contents is None:
        raise Fallback("the scales depend on data")
    return list(contents.reshape(-1))


def _sized(c: Call, x: Value, wanted: Sequence[Dim], axes: Sequence[int], **style: Any) -> Value:
    policy = c.attr("keep_aspect_ratio_policy", "stretch")
    if policy != "stretch":
        wanted = _keep_aspect(x, wanted, axes, policy)
    sizes = list(x.shape)
    for axis, size in zip(axes, wanted, strict=True):
        sizes[axis] = size
    return _emit(c, x, sizes, [None] * x.rank, **style)


def _keep_aspect(x: Value, wanted: Sequence[Dim], axes: Sequence[int], policy: str) -> list[Dim]:
    old = [x.shape[a] for a in axes]
    if not all(isinstance(d, int) for d in (*old, *wanted)):
        raise Fallback("the aspect ratio that it keeps depends on the sizes of inputs")
    pick = min if policy == "not_larger" else max
    scale = pick(Fraction(w, o) for w, o in zip(wanted, old))  # type: ignore[arg-type]
    return [math.floor(scale * o + Fraction(1, 2)) for o in old]  # type: ignore[operator]


def _scaled(c: Call, x: Value, scales: Sequence[Any], **style: Any) -> Value:
    if len(scales) != x.rank:
        raise c.error(f"{len(scales)} scales for {x.type}")
    sizes: list[Dim] = []
    kept: list[float | None] = []
    for d, s in zip(x.shape, scales):
        if isinstance(s, Ratio) and not isinstance(
            s.num, int
        ):  # the size is wanted / d, so the scale follows from the sizes
            sizes.append(floordiv(d * s.num, s.den))
            kept.append(None)
            continue
        value = value_of(s) if isinstance(s, Ratio) else s
        if value is None or not value > 0 or not math.isfinite(value):
            raise c.error(f"a scale is {value}", "positive numbers")
        exact = Fraction(value)
        sizes.append(floordiv(d * exact.numerator, exact.denominator))
        kept.append(None if exact.denominator == 1 else value)
    return _emit(c, x, sizes, kept, **style)


def _emit(c: Call, x: Value, sizes: list[Dim], scales: list[float | None], **style: Any) -> Value:
    if style["coordinate"] not in COORDINATES:
        raise Fallback(f"it maps coordinates by {style['coordinate']}")
    if tuple(sizes) == x.shape and all(s in (None, 1.0) for s in scales):
        return x
    for d, size in zip(x.shape, sizes):
        if substitute(size, {s.name: 0 for s in symbols(d)}) != 0:  # a scale makes nothing of nothing
            c.demand(d - 1, f"{x.type} has nothing to make {size} of")
    options = {"cubic_coeff": -0.75, "exclude_outside": False} | style
    given = c.attr("mode", "nearest")
    mode = _MODES.get(given, given)
    if mode != "nearest" and x.dtype not in _MIXED:
        raise Fallback(f"it interpolates between elements of {x.dtype}")
    return c.resize(x, mode=mode, sizes=tuple(sizes), scales=tuple(scales), **options)
