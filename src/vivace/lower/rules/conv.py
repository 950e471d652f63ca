"""Convolutions without pads (see `prepare`): over channels-last views as one contraction per group, or as vectors over
channels where each has a filter of its own.

Where they pay, Winograd's products (`winograd`) and those of narrow filters (`narrow`) take their place; products of
halves are `half_products`, rows of a depthwise convolution with taps of their own `bands`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vivace.base.dims import Dim, prod, symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.loops.contraction import Axis, Contraction, Depthwise, Packing, contraction_params
from vivace.loops.kernel import Binary, Buffer, Expr, For, Kernel, Reduce, Store
from vivace.lower.bands import bands
from vivace.lower.choices import DIRECT, Site
from vivace.lower.group import Group
from vivace.lower.halves import is_depthwise, reads_half
from vivace.lower.lanes import product_lanes
from vivace.lower.lowering import Lowering
from vivace.lower.pack import without_denormals
from vivace.lower.rules import narrow, winograd
from vivace.lower.rules.channels_last import by_channel, dense_channels, dense_results, from_last, own_index, to_last
from vivace.lower.rules.contraction import deliver, emit_contraction, packed_panels
from vivace.lower.rules.elementwise import Params
from vivace.lower.rules.epilogue import Epilogue, tail_flops
from vivace.lower.rules.half_products import (
    half_contraction,
    is_fast_half,
    is_half_product,
    pays_in_halves,
    unpacked,
)
from vivace.lower.views import View


@dataclass(frozen=True, slots=True)
class _Conv:
    """A convolution of f32 or halves, all but how its weights lie: the views of its image and results, and the axes
    of the contraction (`loops.contraction`)."""

    g: Group
    w: Value
    x: View
    target: View
    out: View  # the target, or what is copied there
    x_buffer: Buffer
    out_buffer: Buffer
    bias: View | None
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    taps: tuple[Axis, ...]
    n: Dim
    epilogue: Epilogue
    is_half: bool
    is_narrow: bool
    is_depthwise: bool

    @property
    def groups(self) -> int:
        return int(self.g.anchor.attrs["group"])

    def operands(self, b: Buffer, w: View) -> dict[Buffer, View]:
        """The views of a step's buffers; `w` is that of the weights."""
        extra = dict(zip(self.epilogue.extra, self.epilogue.views, strict=True))
        return {self.x_buffer: self.x, b: w, self.out_buffer: self.out, **extra}

    def product(self, b: Buffer, packing: Packing) -> Contraction:
        """The step, but for what a step of its axes adds to the address in the weights."""
        a, out, e = self.x_buffer, self.out_buffer, self.epilogue
        return Contraction("k", self.batch, self.rows, self.taps, self.n, a, b, out, packing, e.expr, e.extra)


def lower_conv(ctx: Lowering, g: Group, is_exact: bool = False) -> None:
    """Append the steps of a convolution. An exact one is never Winograd's."""
    node = g.anchor
    if node.outputs[0].dtype is not DType.f32:
        _plain_conv(ctx, g)
        return
    conv = _conv_of(ctx, g)
    wanted = unpacked(conv.product(conv.x_buffer, Packing("")), conv.x.dtype if conv.is_half else DType.f32)
    choice = ctx.choices.of(wanted)
    is_fast = conv.is_half and is_fast_half(conv.x.dtype, ctx.isa)
    ways = () if is_exact or "winograd" in ctx.without else winograd.ways(node, ctx.isa, is_fast)
    if m := winograd.size_of(choice.way if choice.way in ways else next(iter(ways), DIRECT)):
        last, site = node.attrs["layout"] == "NHWC", Site(ctx.choices.key(wanted), wanted, ways)
        winograd.lower_winograd(ctx, g, m, conv.x, conv.out, conv.bias, last, site, choice)
    elif conv.is_narrow:
        narrow.lower_narrow(ctx, g, conv.x, conv.out, conv.rows, conv.taps, conv.epilogue)
    elif conv.is_depthwise:
        _lower_depthwise(ctx, conv)
    else:
        c, views = _half_product(ctx, conv) if conv.is_half else _product(ctx, conv, wanted, choice.lanes)
        emit_contraction(ctx, "conv", c, views, g, tail_flops(g), ways)
    if conv.out is not conv.target:
        ctx.copy(conv.out, conv.target)


def _conv_of(ctx: Lowering, g: Group) -> _Conv:
    """Reads a node: an image whose channels are not side by side is copied, the epilogue is made."""
    node = g.anchor
    x_value, w = node.inputs[0], node.inputs[1]
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    assert x_value is not None and w is not None
    attrs, order, groups = node.attrs, to_last(node), node.attrs["group"]
    half = reads_half(node, 0) and is_half_product(ctx, x_value, None if is_depthwise(node) else w)
    if half and not is_depthwise(node):
        half = pays_in_halves(ctx.operand(x_value).transpose(order), node, ctx.isa)
    x = (ctx.operand(x_value) if half else ctx.view(x_value)).transpose(order)
    x = dense_channels(ctx, x, x_value.name)
    target = ctx.target(g.output).transpose(order)
    out = dense_results(ctx, g, target)
    bias = None if bias_value is None else by_channel(node, ctx.view(bias_value))
    oc, cg, kernel = w.shape[0], w.shape[1], w.shape[2:]
    names = ("img", *(f"o{i}" for i in range(len(kernel))))
    steps = (1, *attrs["strides"])
    rows = tuple(Axis(names[i], out.shape[i], x.strides[i] * s, 0, out.strides[i]) for i, s in enumerate(steps))
    pixels = (Axis(f"k{i}", k, x.strides[i + 1] * attrs["dilations"][i]) for i, k in enumerate(kernel))
    taps, n = (*pixels, Axis("kc", cg, 1)), oc // groups
    is_narrow = narrow.pays(w, groups, taps)
    depthwise = is_depthwise(node) and not is_narrow
    lane: Dim = symbol("c" if depthwise else "n", 0)
    channel = lane if groups == 1 or depthwise else symbol("g", 0) * n + lane
    epilogue = Epilogue(ctx, g, bias, own_index(node, [*(symbol(s, 0) for s in names), channel]))
    batch: tuple[Axis, ...] = () if groups == 1 else (Axis("g", groups, cg, 0, n),)
    return _Conv(
        g, w, x, target, out, x.buffer("a"), out.buffer("out", writable=True), bias, batch, rows, taps, n, epilogue,
        half, is_narrow, depthwise,
    )  # fmt: skip


def _lower_depthwise(ctx: Lowering, conv: _Conv) -> None:
    """Vectors over channels, each with a filter of its own."""
    node, data, oc = conv.g.anchor, conv.w.data, conv.w.shape[0]
    assert data is not None
    w = ctx.made_of((data,), ("depthwise",), f"{conv.w.name}_taps", lambda: _depthwise_weights(conv.w))
    b = w.buffer("b")
    *pixels, _ = conv.taps
    taps = tuple(replace(t, b=oc * prod([u.extent for u in pixels[i + 1 :]])) for i, t in enumerate(pixels))
    e = conv.epilogue
    whole = Depthwise("k", conv.rows, taps, oc, conv.x_buffer, b, conv.out_buffer, e.expr, e.extra)
    for d, places, flops in bands(node, whole, conv.operands(b, w), tail_flops(conv.g)):
        ordered = [places[p] for p in contraction_params(d)]
        site = Site(ctx.choices.key(d), d)
        ctx.emit("depthwise", d, ordered, len(ordered) - 1, conv.g.nodes, flops, site=site)


def _half_product(ctx: Lowering, conv: _Conv) -> tuple[Contraction, dict[Buffer, View]]:
    return half_contraction(
        ctx, conv.w, f"conv{conv.groups}", lambda: _conv_weights(conv.w, conv.groups), conv.batch, conv.rows, conv.taps,
        conv.n, conv.x, conv.out, conv.epilogue,
    )  # fmt: skip


def _product(
    ctx: Lowering, conv: _Conv, wanted: Contraction, lanes: int | None
) -> tuple[Contraction, dict[Buffer, View]]:
    """The product of f32 with constant weights, in panels of so many lanes where a number was chosen, or with weights
    that come at run time."""
    if conv.w.data is not None:
        lanes = product_lanes(wanted, ctx.isa, lanes)
        w = packed_panels(ctx, conv.w, lanes, f"conv{conv.groups}", lambda: _conv_weights(conv.w, conv.groups))
        packing, taps, step = Packing("panels", lanes), conv.taps, prod(w.shape[1:])
    else:
        order = (*range(2, conv.w.rank), 1, 0)  # [oc, c, k..] -> [k.., c, oc]: groups lie side by side in oc
        w = ctx.contiguous(ctx.view(conv.w).transpose(order), f"{conv.w.name}_kn")
        packing, step = Packing("plain"), conv.n
        taps = tuple(replace(t, b=s) for t, s in zip(conv.taps, w.strides[:-1], strict=True))
    b = w.buffer("b")
    c = replace(conv.product(b, packing), batch=tuple(replace(x, b=step) for x in conv.batch), taps=taps)
    return c, conv.operands(b, w)


def _plain_conv(ctx: Lowering, g: Group) -> None:
    """A convolution of f64 or integers as a plain reduction over its taps."""
    node = g.anchor
    x_value, w_value = node.inputs[0], node.inputs[1]
    assert x_value is not None and w_value is not None
    attrs, y = node.attrs, node.outputs[0]
    n_spatial = x_value.rank - 2
    groups: int = attrs["group"]
    order = to_last(node)
    x = ctx.view(x_value).transpose(order)
    result = ctx.temporary(f"{y.name}_last", y.dtype, tuple(y.shape[i] for i in order))
    w = ctx.contiguous(ctx.view(w_value).transpose((*range(2, n_spatial + 2), 1, 0)), f"{w_value.name}_kn")
    cg, n = w_value.shape[1], w_value.shape[0] // groups
    params = Params()
    img, grp, col, tap_c = symbol("i0", 0), symbol("g", 0), symbol("n", 0), symbol("kc", 0)
    outs = [symbol(f"o{i}", 0) for i in range(n_spatial)]
    taps = [symbol(f"k{i}", 0) for i in range(n_spatial)]
    at = [o * s + t * d for o, s, t, d in zip(outs, attrs["strides"], taps, attrs["dilations"], strict=True)]
    value: Expr = Binary(
        "mul", params.load(x, (img, *at, grp * cg + tap_c)), params.load(w, (*taps, tap_c, grp * n + col))
    )
    value = Reduce("add", "kc", cg, value)
    for i in reversed(range(n_spatial)):
        value = Reduce("add", f"k{i}", w_value.shape[2 + i], value)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        value = Binary("add", value, params.load(ctx.view(node.inputs[2]), (grp * n + col,)))
    body: For = For(
        "n", n, (Store(params.buffer(result, writable=True), (img, *outs, grp * n + col), value),), "vector"
    )
    body = For("g", groups, (body,), "parallel")
    for i in reversed(range(n_spatial)):
        body = For(f"o{i}", result.shape[i + 1], (body,), "parallel")
    spec = Kernel("k", tuple(params.buffers), (For("i0", x.shape[0], (body,), "parallel"),))
    ctx.emit("conv", spec, params.views, len(params.views) - 1, (node,), node.cost.flops)
    deliver(ctx, g, result.transpose(from_last(node)))


def _conv_weights(w: Value, groups: int) -> np.ndarray:
    """[oc, c, k..] -> [group, taps.. and channels, oc per group]."""
    assert w.data is not None
    oc = w.data.shape[0]
    by_group = np.asarray(w.data, np.float32).reshape(groups, oc // groups, *w.data.shape[1:])
    moved = np.moveaxis(np.moveaxis(by_group, 1, -1), 1, -2)  # [group, k.., c, oc]
    return moved.reshape(groups, -1, oc // groups)


def _depthwise_weights(w: Value) -> np.ndarray:
    """[c, 1, k..] -> [k.., c]."""
    assert w.data is not None
    return without_denormals(np.array(np.moveaxis(np.asarray(w.data, np.float32)[:, 0], 0, -1), order="C"))
