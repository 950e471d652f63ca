"""pixels: the bytes of an image, four to a pixel.

Planes are read along the vector and each pixel is written as one word of 32 bits, instead of single bytes three apart.
"""

from __future__ import annotations

from vivace.base.dims import Dim, exact_div
from vivace.base.dtypes import DType
from vivace.graph.ops.quantized import PIXEL_BYTES
from vivace.loops.kernel import Binary, Cast, Const, Expr
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.requantize import quantize
from vivace.lower.rules.elementwise import emit_pointwise
from vivace.lower.views import View


def lower_pixels(ctx: Lowering, g: Group) -> None:
    """One pass over the planes."""
    x_value, scale, zero = g.anchor.inputs
    assert x_value is not None and scale is not None and scale.data is not None
    assert zero is not None and zero.data is not None
    x, out = ctx.view(x_value), ctx.target(g.output)
    channels = x.shape[1]
    assert isinstance(channels, int)
    shape, strides = (x.shape[0], *x.shape[2:]), (x.strides[0], *x.strides[2:])
    planes = [View(x.storage, x.dtype, shape, strides, x.offset + c * x.strides[1]) for c in range(channels)]
    # Where a view begins is counted in elements of its storage: bytes, also for words.
    words = View(out.storage, DType.i32, shape, tuple(_words(s) for s in out.strides[:3]), out.offset)
    step, point, dtype = Const(float(scale.data.reshape(())), DType.f32), int(zero.data.reshape(())), out.dtype

    def build(loaded: list[Expr]) -> Expr:
        rest = sum((point & 0xFF) << 8 * c for c in range(channels, PIXEL_BYTES))
        word: Expr = Const(rest - (rest >> 31 << 32), DType.i32)
        for c, value in enumerate(loaded):
            byte = Cast(DType.i32, quantize(Binary("div", value, step), point, dtype))
            low = Binary("bitand", byte, Const(0xFF, DType.i32))
            word = Binary("bitor", word, Binary("shl", low, Const(8 * c, DType.i32)))
        return word

    emit_pointwise(ctx, "pixels", planes, words, build, g.nodes)


def _words(n_bytes: Dim) -> Dim:
    n = exact_div(n_bytes, PIXEL_BYTES)
    assert n is not None
    return n
