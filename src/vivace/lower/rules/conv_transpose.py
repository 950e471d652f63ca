"""Transposed convolutions: products whose taps fill cells of their own, planes of few results, or gathers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vivace.base.dims import Dim, maximum, minimum, prod, symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.loops.contraction import Axis, Contraction, Packing
from vivace.loops.kernel import Binary, Buffer, Const, Expr, For, Index, Kernel, Load, Reduce, Select, Store
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.pack import without_denormals
from vivace.lower.rules.channels_last import by_channel, dense_results, from_last, own_index, to_last
from vivace.lower.rules.contraction import deliver, emit_contraction, finish, packed_panels
from vivace.lower.rules.elementwise import Params, Tree, emit_pointwise
from vivace.lower.rules.epilogue import ACC, COLUMN, Epilogue, tail_flops
from vivace.lower.tile import panel_lanes
from vivace.lower.views import View

FEW_RESULTS = 8  # of a pixel


def lower_conv_transpose(ctx: Lowering, g: Group) -> None:
    """Transposed convolution. Where kernel and stride agree, each tap is a product of its own that fills its own cells;
    otherwise every result gathers the inputs that reach it.

    What follows so few columns that vectors would be nearly empty is a step of its own (and see `_few_planes`).
    """
    node, y = g.anchor, g.anchor.outputs[0]
    x_value, w = node.inputs[0], node.inputs[1]
    assert x_value is not None and w is not None
    x = ctx.contiguous(ctx.view(x_value).transpose(to_last(node)), f"{x_value.name}_nhwc")
    if y.dtype is not DType.f32 or not _fills_cells(node):
        _gather_transpose(ctx, g, x)
        return
    oc, strides = w.shape[1], node.attrs["strides"]
    assert isinstance(oc, int)
    if oc * int(np.prod(strides)) < FEW_RESULTS and _few_planes(ctx, g, x):
        return
    if len(g.nodes) > 1 and oc * strides[-1] < FEW_RESULTS:
        sums = ctx.temporary(f"{y.name}_sums", y.dtype, tuple(y.shape[i] for i in to_last(node)))
        sums = sums.transpose(from_last(node))
        _fill_cells(ctx, Group(node, g.position, (node,), y), x, sums)
        finish(ctx, g, sums)
    else:
        _fill_cells(ctx, g, x, ctx.target(g.output))


def _fills_cells(node: Node) -> bool:
    """Whether every result has one tap: kernel and stride agree, and nothing is cut off or left out."""
    w, attrs = node.inputs[1], node.attrs
    assert w is not None
    return (
        w.data is not None and tuple(w.shape[2:]) == tuple(attrs["strides"]) and attrs["group"] == 1
        and not any((*attrs["before"], *attrs["after"], *attrs["output_padding"]))
        and all(d == 1 for d in attrs["dilations"])
    )  # fmt: skip


def _fill_cells(ctx: Lowering, g: Group, x: View, target: View) -> None:
    """A product for each tap. The taps of the last axis fill cells that are neighbours: where nothing lies between
    them, and what follows is known per column, their columns stand side by side in one product."""
    node = g.anchor
    w, bias = node.inputs[1], _bias_of(node)
    assert w is not None and w.data is not None
    oc, kernel, strides, data = w.shape[1], w.shape[2:], node.attrs["strides"], w.data
    assert isinstance(oc, int)
    target = target.transpose(to_last(node))
    out = dense_results(ctx, g, target)
    columns = _tiled_leaves(ctx, g, strides[-1])
    is_joined = columns is not None and out.strides[-2] == oc and (bias is None or bias.data is not None)
    n = oc * strides[-1] if is_joined else oc
    lanes = panel_lanes(n, ctx.isa)

    def matrices() -> np.ndarray:
        by_tap = np.moveaxis(data, (0, 1), (-2, -1))  # [c, oc, k..] -> [k.., c, oc]
        if not is_joined:
            return by_tap
        joined = np.moveaxis(by_tap, -3, -2)
        return joined.reshape(*joined.shape[:-2], n)

    panels = packed_panels(ctx, w, lanes, f"transpose {is_joined}", matrices)
    steps = (1, *strides)
    rows = tuple(Axis(f"o{i}", x.shape[i], x.strides[i], 0, out.strides[i] * s) for i, s in enumerate(steps))
    apart = kernel[:-1] if is_joined else kernel
    batch = tuple(
        Axis(f"t{i}", k, 0, prod(panels.shape[-3:]) * prod(apart[i + 1 :]), out.strides[i + 1])
        for i, k in enumerate(apart)
    )
    added: View | Callable[[Params], Expr] | None = None
    if bias is not None:
        added = _repeated(ctx, bias, strides[-1]) if is_joined else by_channel(node, ctx.view(bias))
    cell = [symbol("o0", 0), *(symbol(f"o{i + 1}", 0) * s + symbol(f"t{i}", 0) for i, s in enumerate(strides)), COLUMN]
    epilogue = Epilogue(ctx, g, added, own_index(node, cell), (columns or {}) if is_joined else {})
    a_buf, b_buf, out_buf = x.buffer("a"), panels.buffer("b"), out.buffer("out", writable=True)
    spec = Contraction(
        "k", batch, rows, (Axis("kc", x.shape[-1], 1),), n, a_buf, b_buf, out_buf, Packing("panels", lanes),
        epilogue.expr, epilogue.extra,
    )  # fmt: skip
    views = {a_buf: x, b_buf: panels, out_buf: out, **dict(zip(epilogue.extra, epilogue.views, strict=True))}
    emit_contraction(ctx, "conv_transpose", spec, views, g, tail_flops(g))
    if out is not target:
        ctx.copy(out, target)


def _bias_of(node: Node) -> Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _repeated(ctx: Lowering, bias: Value, times: int) -> Callable[[Params], Expr]:
    """A bias per channel, added to columns of several taps side by side."""
    view = _tiled(ctx, bias, times)
    return lambda params: Binary("add", ACC, params.load(view, (COLUMN,)))


def _tiled(ctx: Lowering, v: Value, times: int) -> View:
    """A constant per channel, repeated."""
    assert v.data is not None
    source = v.data
    return ctx.made_of((source,), ("tiled", times), f"{v.name}_tiled", lambda: np.tile(source.reshape(-1), times))


def _tiled_leaves(ctx: Lowering, g: Group, times: int) -> dict[Value, View] | None:
    """What the tail of a group reads besides the sums, for columns of several taps side by side; None unless all of it
    are constants per channel."""
    y, axis = g.anchor.outputs[0], to_last(g.anchor)[-1]
    tail = [n for n in g.nodes if n is not g.anchor]
    leaves = Tree(ctx, tail, g.output, given=[y]).leaves if tail else {}
    if any(v.data is None or v.data.size != y.shape[axis] or view.strides[axis] != 1 for v, view in leaves.items()):
        return None
    return {v: _tiled(ctx, v, times) for v in leaves}


def _few_planes(ctx: Lowering, g: Group, x: View) -> bool:
    """A transposed convolution of so few results per pixel that vectors of them would be nearly empty: a product with
    pixels side by side makes a plane of each, and what follows brings the planes together.

        sums[tap, pixel] = w[tap] . x[pixel] + bias         y[2 i + t, 2 j + u] = f(sums[(t, u), (i, j)])

    False where what follows reads more than its results: nothing is done then.
    """
    node, y = g.anchor, g.anchor.outputs[0]
    w, bias = node.inputs[1], _bias_of(node)
    tail = [n for n in g.nodes if n is not node]
    tree = Tree(ctx, tail, g.output, given=[y]) if tail else None
    assert w is not None and w.data is not None
    if (tree is not None and tree.leaves) or (bias is not None and bias.data is None):
        return False
    data, strides, channels = w.data, node.attrs["strides"], x.shape[-1]
    n_results, size = w.shape[1], x.shape[:-1]
    n_planes, n_pixels = n_results * prod(strides), prod(size)
    rows = ctx.made_of(
        (data,), ("transpose rows",), f"{w.name}_rows",
        lambda: without_denormals(np.array(np.moveaxis(np.moveaxis(data, 0, -1), 0, -2), np.float32, order="C")),
    )  # fmt: skip
    a = View(rows.storage, rows.dtype, (n_planes, channels), (channels, 1), rows.offset)
    b = View(x.storage, x.dtype, (n_pixels, channels), (channels, 1), x.offset)
    sums = ctx.temporary(f"{y.name}_planes", DType.f32, (n_planes, n_pixels))
    views = {a.buffer("a"): a, b.buffer("b"): b, sums.buffer("out", writable=True): sums}
    a_buf, b_buf, out_buf = views
    e: Expr | None = None
    extra: tuple[Buffer, ...] = ()
    if bias is not None and bias.data is not None:
        per_plane = _tiled(ctx, bias, int(np.prod(strides)))
        extra = (per_plane.buffer("bias"),)
        views[extra[0]] = per_plane
        e = Binary("add", ACC, Load(extra[0], (symbol("m", 0),)))
    spec = Contraction(
        "k", (), (Axis("m", n_planes, channels, 0, n_pixels),), (Axis("kc", channels, 1, 1),), n_pixels, a_buf, b_buf,
        out_buf, Packing("transposed", n_stride=channels), e, extra,
    )  # fmt: skip
    emit_contraction(ctx, "conv_transpose", spec, views, Group(node, g.position, (node,), y), node.cost.flops)
    out = ctx.target(g.output).transpose(to_last(node))
    shape: list[Dim] = [out.shape[0]]
    to, source = [out.strides[0]], [prod(size[1:])]
    for i, s in enumerate(strides):
        shape += [size[i + 1], s]
        to += [out.strides[i + 1] * s, out.strides[i + 1]]
        source += [prod(size[i + 2 :]), prod(strides[i + 1 :]) * n_results * n_pixels]
    shape.append(n_results)
    whole = View(out.storage, out.dtype, tuple(shape), (*to, out.strides[-1]), out.offset)
    planes = View(sums.storage, sums.dtype, tuple(shape), (*source, n_pixels), sums.offset)
    build = (lambda xs: xs[0]) if tree is None else (lambda xs: tree.expr(lambda v: xs[0], {y: xs[0]}))
    emit_pointwise(ctx, "epilogue" if tail else "copy", [planes], whole, build, tail or [node])
    return True


def _gather_transpose(ctx: Lowering, g: Group, x: View) -> None:
    """out[o] = sum over taps k and channels with (o + before - k * dilation) divisible by the stride."""
    node = g.anchor
    w_value = node.inputs[1]
    assert w_value is not None
    attrs, y = node.attrs, node.outputs[0]
    n_spatial = len(x.shape) - 2
    groups = attrs["group"]
    kernel = w_value.shape[2:]
    order = (*range(2, n_spatial + 2), 0, 1)  # [c, oc/g, k..] -> [k.., c, oc/g]
    w = ctx.contiguous(ctx.view(w_value).transpose(order), f"{w_value.name}_kn")
    n = w_value.shape[1]
    result = ctx.temporary(f"{y.name}_nhwc", y.dtype, tuple(y.shape[i] for i in to_last(node)))
    params = Params()
    img, grp, col, tap_c = symbol("i0", 0), symbol("g", 0), symbol("n", 0), symbol("kc", 0)
    outs = [symbol(f"o{i}", 0) for i in range(n_spatial)]
    taps = [symbol(f"k{i}", 0) for i in range(n_spatial)]
    cg = x.shape[-1] // groups
    at: list[Dim] = []
    valid: Expr | None = None
    for i in range(n_spatial):
        reach = outs[i] + attrs["before"][i] - taps[i] * attrs["dilations"][i]
        s = attrs["strides"][i]
        source = reach // s
        inside = Binary(
            "and", Binary("ge", Index(reach), Const(0, DType.i64)), Binary("lt", Index(source), Index(x.shape[i + 1]))
        )
        hit = Binary("and", Binary("eq", Index(reach % s), Const(0, DType.i64)), inside)
        valid = hit if valid is None else Binary("and", valid, hit)
        at.append(minimum(maximum(source, 0), x.shape[i + 1] - 1))
    channel = grp * cg + tap_c
    product = Binary("mul", params.load(x, (img, *at, channel)), params.load(w, (*taps, channel, col)))
    assert valid is not None
    term: Expr = Select(valid, product, Const(y.dtype.numpy.type(0).item(), y.dtype))
    term = Reduce("add", "kc", cg, term)
    for i in reversed(range(n_spatial)):
        term = Reduce("add", f"k{i}", kernel[i], term)
    bias = _bias_of(node)
    if bias is not None:
        term = Binary("add", term, params.load(ctx.view(bias), (grp * n + col,)))
    store = Store(params.buffer(result, writable=True), (img, *outs, grp * n + col), term)
    body: For = For("n", n, (store,), "vector")
    body = For("g", groups, (body,), "parallel")
    for i in reversed(range(n_spatial)):
        body = For(f"o{i}", result.shape[i + 1], (body,), "parallel")
    body = For("i0", x.shape[0], (body,), "parallel")
    ctx.emit(
        "conv_transpose",
        Kernel("k", tuple(params.buffers), (body,)),
        params.views,
        len(params.views) - 1,
        (node,),
        node.cost.flops,
    )
    deliver(ctx, g, result.transpose(from_last(node)))
