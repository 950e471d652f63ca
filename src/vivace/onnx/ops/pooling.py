"""Pooling: MaxPool, AveragePool, LpPool. Ceil mode becomes a larger padding at the end."""

from __future__ import annotations

from collections.abc import Sequence

from vivace.base.dims import Dim, ceildiv
from vivace.graph.graph import Value
from vivace.onnx.call import Call, Result, onnx_op
from vivace.onnx.ops.nn import per_axis, window_padding
from vivace.onnx.scope import Fallback

Window = dict[str, tuple[Dim, ...]]


def _window(c: Call, x: Value) -> tuple[Window, tuple[Dim, ...]]:
    """The attributes of a pool and the cells by which ceil mode grows each axis."""
    n = x.rank - 2
    kernel = per_axis(c, "kernel_shape", n, 1)
    strides, dilations = per_axis(c, "strides", n, 1), per_axis(c, "dilations", n, 1)
    before, after = window_padding(c, x.shape[2:], kernel, strides, dilations)
    grown: tuple[Dim, ...] = (0,) * n
    if c.attr("ceil_mode", 0) and c.attr("auto_pad", "NOTSET") in ("NOTSET", "", "VALID"):
        grown = tuple(_growth(*t) for t in zip(x.shape[2:], kernel, strides, dilations, before, after))
    return {"kernel": kernel, "strides": strides, "dilations": dilations, "before": before, "after": after}, grown


def _growth(size: Dim, k: int, stride: int, dilation: int, before: Dim, after: Dim) -> Dim:
    """Cells after the axis that give ceil mode its last window, unless that window would begin in the padding at the
    end.
    """
    extent = (k - 1) * dilation + 1
    rest = size + before + after - extent
    growth = ceildiv(rest, stride) * stride - rest
    if isinstance(growth, int):
        return 0 if growth and isinstance(after, int) and after + growth >= extent else growth
    if isinstance(after, int) and after + stride - 1 < extent:
        return growth
    raise Fallback("its ceil mode depends on the sizes of inputs")


def _plus(a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, ...]:
    return tuple(x + y for x, y in zip(a, b))


@onnx_op("MaxPool")
def max_pool(c: Call, x: Value) -> Result:
    if c.n_outputs > 1:
        raise Fallback("it also gives the positions of the maxima")
    window, grown = _window(c, x)
    return c.max_pool(x, **(window | {"after": _plus(window["after"], grown)}), layout="NCHW")


def average(c: Call, x: Value, window: Window, grown: Sequence[Dim], include: bool) -> Value:
    """The average over windows; cells that ceil mode adds never count."""
    if include and any(g != 0 for g in grown):
        x = c.pad(x, before=(0, 0, *window["before"]), after=(0, 0, *window["after"]), mode="constant", value=0.0)
        window = window | {"before": (0,) * len(grown), "after": (0,) * len(grown)}
        include = False
    window = window | {"after": _plus(window["after"], grown)}
    return c.avg_pool(x, **window, count_include_pad=include, layout="NCHW")


def averages(c: Call, x: Value) -> Value:
    """The averages over the windows that the attributes describe."""
    window, grown = _window(c, x)
    return average(c, x, window, grown, bool(c.attr("count_include_pad", 0)))


@onnx_op("AveragePool")
def average_pool(c: Call, x: Value) -> Value:
    return averages(c, x)


@onnx_op("LpPool")
def lp_pool(c: Call, x: Value) -> Value:
    window, grown = _window(c, x)
    p, cells = c.attr("p", 2), 1
    for k in window["kernel"]:
        cells = cells * k  # type: ignore[assignment]
    window = window | {"after": _plus(window["after"], grown)}
    powered = c.mul(x, x) if p == 2 else c.abs(x) if p == 1 else c.pow(c.abs(x), c.like(x, p))
    total = c.mul(average(c, powered, window, (0,) * len(grown), True), c.like(x, cells))
    return c.sqrt(total) if p == 2 else total if p == 1 else c.pow(total, c.like(x, 1 / p))
