"""Gates of squeeze-and-excitation: a number from 0 to 1 per image and channel, on what a convolution of single pixels
reads.

The pass over the image that applies it reads and writes `pixels * channels` numbers, the filters have `channels *
filters`. So where there are many more pixels than filters, each image's filters take the gate: a product with a matrix
that only shows when the model runs.

Rule BOUNDED: a gate is at most 1 in magnitude, and filters are finite. So filters with their gate overflow no more than
without, and NaN and infinities of image and gate reach the same sums. What falls below the least f32 is lost in one
order where it is not in the other: at most 2**-149 times what it meets.

Not handled: sizes that only show at run time; gates of bytes, whose results are bytes again before they are convolved.
"""

from __future__ import annotations

import numpy as np

from vivace.base.dims import prod
from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.graph.rewrite import At, Example, Outcome, Rule, rule

_GATES = ("sigmoid", "hard_sigmoid", "tanh", "softmax")
_SAME = ("reshape", "transpose", "expand")
_LINE = 16  # filters are padded to whole vectors
# Blocks as in MobileNetV3 on one core (Emerald Rapids), time without the rule over with it, f32, bf16: 56x56x96 -> 24
# 1.11 and 1.08, 28x28x240 -> 40 1.07 and 1.07, 14x14x480 -> 80 1.04 and 0.99. With 480 filters over 6x80x480 theirs is
# the longer pass, 111 us instead of 41.
_PIXELS_PER_FILTER = 2


def _example(e: Example) -> Value:
    x = e.relu(e.x("f32[2,6,6,3]"))
    gate = e.sigmoid(e.reduce_mean(x, axes=(1, 2), keepdims=True))
    one, none = (1, 1), (0, 0)
    return e.conv(
        e.mul(x, gate), e.w("f32[4,3,1,1]"), e.w("f32[4]"), strides=one, dilations=one, before=none, after=none,
        group=1, layout="NHWC",
    )  # fmt: skip


@rule("conv", examples=(_example,))
def gate_into_weights(n: Node, at: At) -> Outcome:
    """conv(x * s, w, b) = x @ (s * w) + b for a gate s per image and channel, w of single pixels and smaller than x"""
    x, w, *rest = n.inputs
    m = at.by(x, "mul")
    if m is None or x is None or w is None or w.data is None or x.dtype is not DType.f32:
        return None
    image, gate = m.inputs
    if image is not None and image.type != x.type:
        image, gate = gate, image
    assert image is not None and gate is not None
    if gate.data is not None or image.type != x.type or n.attrs["layout"] != "NHWC":
        return None
    images, *sizes, channels = x.shape
    if gate.rank != x.rank or gate.shape[0] not in (1, images) or gate.shape[1:] != (*(1,) * len(sizes), channels):
        return "the factor is not one per image and channel"
    if n.attrs["group"] != 1 or any(s != 1 for s in (*w.shape[2:], *n.attrs["strides"])):
        return "the filters take more than one pixel, or leave some out"
    if any(p != 0 for p in (*n.attrs["before"], *n.attrs["after"])):
        return "the conv pads with zeros"
    if not at.only_use(x):
        return f"%{x.name} is used elsewhere too"
    if at.only_use(image):
        return "the gate is applied where the image is made"
    if not _is_bounded(gate, at) or not np.isfinite(w.data).all():
        return "the factor may be larger than 1, or a filter is not finite"
    filters, pixels = w.data.shape[0], prod(sizes)
    if not isinstance(pixels, int) or pixels < _PIXELS_PER_FILTER * -(-filters // _LINE) * _LINE:
        return "an image has too few pixels for so many filters, or their number only shows at run time"
    matrix = at.const(np.ascontiguousarray(w.data.reshape(filters, -1).T), "weight")
    column = at.op.reshape(gate, shape=(*gate.shape[:-2], channels, 1))
    y = at.op.matmul(image, at.op.mul(column, matrix))
    return y if not rest or rest[0] is None else at.op.add(y, rest[0])


def _is_bounded(v: Value, at: At) -> bool:
    """Rule BOUNDED."""
    while (m := at.by(v, *_SAME)) is not None and m.inputs[0] is not None:
        v = m.inputs[0]
    return at.by(v, *_GATES) is not None


RULES: tuple[Rule, ...] = (gate_into_weights,)
