"""Convolutions: Conv, ConvTranspose, and the padding rules that pooling shares."""

from __future__ import annotations

from collections.abc import Sequence

from vivace.base.dims import Dim, ceildiv, floordiv, maximum
from vivace.graph.graph import Value
from vivace.onnx.call import Call, onnx_op
from vivace.onnx.scope import Fallback


def window_padding(
    c: Call, spatial: Sequence[Dim], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """`(before, after)` from pads or auto_pad. Source: ONNX operator Conv, attribute auto_pad."""
    n, auto = len(spatial), c.attr("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = c.attr("pads", (0,) * (2 * n))
        if len(pads) != 2 * n:
            raise c.error(f"{len(pads)} pads", f"{2 * n}")
        return tuple(pads[:n]), tuple(pads[n:])
    if auto == "VALID":
        return (0,) * n, (0,) * n
    before: list[Dim] = []
    after: list[Dim] = []
    for size, k, s, d in zip(spatial, kernel, strides, dilations):
        reach = (k - 1) * d + 1
        total = (ceildiv(size, s) - 1) * s + reach - size
        total = total if reach >= s else maximum(total, 0)  # it is not negative then, whatever the size
        less = floordiv(total, 2)
        before.append(less if auto == "SAME_UPPER" else total - less)
        after.append(total - less if auto == "SAME_UPPER" else less)
    return tuple(before), tuple(after)


def per_axis(c: Call, name: str, n: int, default: int) -> tuple[int, ...]:
    values: tuple[int, ...] = c.attr(name, (default,) * n)
    if len(values) != n:
        raise c.error(f"{name} is {values}", f"{n} entries")
    return values


@onnx_op("Conv")
def conv(c: Call, x: Value, w: Value, bias: Value | None = None) -> Value:
    return convolve(c, x, w, bias)


def convolve(c: Call, x: Value, w: Value, bias: Value | None, zero: Value | None = None) -> Value:
    """A convolution with the window of the node's attributes; of bytes when `zero` gives the zero point of x."""
    n = x.rank - 2
    if n < 1 or w.rank != x.rank:
        raise c.error(f"operands are {x.type} and {w.type}", "one rank of at least 3")
    kernel = w.shape[2:]
    if not all(isinstance(k, int) for k in kernel):
        raise Fallback("the size of its filter depends on the sizes of inputs")
    if "kernel_shape" in c.attrs and tuple(c.attr("kernel_shape")) != kernel:
        raise c.error(f"kernel_shape is {c.attr('kernel_shape')}", f"{kernel}, as in the filter {w.type}")
    strides, dilations = per_axis(c, "strides", n, 1), per_axis(c, "dilations", n, 1)
    before, after = window_padding(c, x.shape[2:], kernel, strides, dilations)  # type: ignore[arg-type]
    x, before, after = _crop(c, x, before, after)
    window = {
        "strides": strides,
        "dilations": dilations,
        "before": before,
        "after": after,
        "group": c.attr("group", 1),
        "layout": "NCHW",
    }
    return c.conv(x, w, bias, **window) if zero is None else c.conv_integer(x, w, zero, bias, **window)


def _crop(
    c: Call, x: Value, before: tuple[Dim, ...], after: tuple[Dim, ...]
) -> tuple[Value, tuple[Dim, ...], tuple[Dim, ...]]:
    """Negative padding crops the input."""
    for i, (b, a) in enumerate(zip(before, after)):
        cut = [max(-p, 0) if isinstance(p, int) else 0 for p in (b, a)]
        if any(cut):
            x = c.sliced(x, i + 2, cut[0], x.shape[i + 2] - cut[0] - cut[1])
    return x, _not_negative(before), _not_negative(after)


def _not_negative(pads: tuple[Dim, ...]) -> tuple[Dim, ...]:
    return tuple(max(p, 0) if isinstance(p, int) else p for p in pads)


@onnx_op("ConvTranspose")
def conv_transpose(c: Call, x: Value, w: Value, bias: Value | None = None) -> Value:
    n = x.rank - 2
    if n < 1 or w.rank != x.rank:
        raise c.error(f"operands are {x.type} and {w.type}", "one rank of at least 3")
    kernel, spatial = w.shape[2:], x.shape[2:]
    if not all(isinstance(k, int) for k in kernel):
        raise Fallback("the size of its filter depends on the sizes of inputs")
    strides, dilations = per_axis(c, "strides", n, 1), per_axis(c, "dilations", n, 1)
    extra, auto = per_axis(c, "output_padding", n, 0), c.attr("auto_pad", "NOTSET")
    wanted = c.attr("output_shape")
    if wanted is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = tuple(d * s for d, s in zip(spatial, strides))
    if wanted is None:
        before, after = window_padding(c, spatial, kernel, strides, dilations)  # type: ignore[arg-type]
    else:
        wanted = wanted[-n:]
        totals = [
            s * (d - 1) + p + (k - 1) * e + 1 - o
            for d, k, s, e, p, o in zip(spatial, kernel, strides, dilations, extra, wanted)
        ]
        less = [floordiv(t, 2) for t in totals]
        rest = [t - h for t, h in zip(totals, less)]
        # Source: ONNX operator ConvTranspose: SAME_UPPER leaves the larger half at the end, any other mode at the
        # beginning.
        before, after = (tuple(less), tuple(rest)) if auto == "SAME_UPPER" else (tuple(rest), tuple(less))
    return c.conv_transpose(
        x,
        w,
        bias,
        strides=strides,
        dilations=dilations,
        before=before,
        after=after,
        output_padding=extra,
        group=c.attr("group", 1),
        layout="NCHW",
    )
