"""Taps of a convolution that meet nothing but padding, wherever the filter stands: an image of 2 rows meets 3 of the 5
rows of a padded filter."""

from __future__ import annotations

import numpy as np

from vivace.graph.graph import Node, Value
from vivace.graph.rewrite import At, Example, Outcome, rule


def met(size: int, out: int, taps: int, stride: int, dilation: int, before: int) -> range:
    """The taps from the first to the last that meet an element for some output."""
    found = []
    for tap in range(taps):
        first = tap * dilation - before  # where it stands for output 0
        o = max(-(first // stride), 0)  # the first output for which it does not stand before the image
        if o < out and first + o * stride < size:
            found.append(tap)
    return range(found[0], found[-1] + 1) if found else range(0)


def _thin(e: Example) -> Value:
    two = (2, 2)
    return e.conv(
        e.x("f32[1,4,2,9]"), e.w("f32[4,1,5,5]"), strides=(1, 1), dilations=(1, 1), before=two, after=two, group=4,
        layout="NCHW",
    )  # fmt: skip


@rule("conv", "conv_integer", examples=(_thin,))
def crop_taps(n: Node, at: At) -> Outcome:
    """conv(x, w) = conv(x, w without its outer taps), where they meet only padding, for finite constants w"""
    x, w, attrs = n.inputs[0], n.inputs[1], n.attrs
    if x is None or w is None or w.data is None:
        return None
    inner = slice(2, None) if attrs["layout"] == "NCHW" else slice(1, -1)
    sizes, outs = x.shape[inner], n.output.shape[inner]
    lists = (sizes, outs, w.shape[2:], attrs["strides"], attrs["dilations"], attrs["before"])
    axes = list(zip(*lists, strict=True))
    if not all(isinstance(d, int) for axis in axes for d in axis) or not all(
        isinstance(d, int) for d in attrs["after"]
    ):
        return None
    kept = [met(*axis) for axis in axes]
    if [len(k) for k in kept] == list(w.shape[2:]) or not all(kept):
        return None
    steps = attrs["dilations"]
    before = tuple(b - k.start * d for b, k, d in zip(attrs["before"], kept, steps))
    after = tuple(a - (size - k.stop) * d for a, size, k, d in zip(attrs["after"], w.data.shape[2:], kept, steps))
    if min(*before, *after) < 0:
        return "the taps that are left would begin inside the image"
    if w.dtype.is_float and not np.all(np.isfinite(w.data)):
        return "a weight is not finite"
    cropped = w.data[(slice(None), slice(None), *(slice(k.start, k.stop) for k in kept))]
    weight = at.const(np.ascontiguousarray(cropped), "weight")
    return at.op.emit(n.op, (x, weight, *n.inputs[2:]), {**attrs, "before": before, "after": after})
