"""Transposed convolutions: products whose taps fill cells of their own, planes of few results, or gathers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from vivace.base.dims import Dim, maximum, minimum, prod, symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.loops.contraction import Axis, Contraction, Packing
from vivace.loops.kernel import Binary, Buffer, Const, Expr, For, Index, Kernel, Load, Reduce, Select, Store
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.pack import without_denormals
from vivace.lower.rules.contraction import deliver, emit_contraction, finish, packed_panels
from vivace.lower.rules.elementwise import Params, Tree, emit_pointwise
from vivace.lower.rules.epilogue import ACC, COLUMN, Epilogue, tail_flops
from vivace.lower.tile import panel_lanes
from vivace.lower.views import View

FEW_RESULTS = 8  # of a pixel


def lower_conv_transpose(ctx: Lowering, g: Group) -> None:
    """Transposed convolution. Where kernel and stride agree, each tap is a product of its own that fills its own cells;
    otherwise every result gathers the inputs that reach it.

    The taps of the last axis fill cells that are neighbours: their columns stand side by side in one product. What
    follows so few columns that vectors would be nearly empty is a step of its own (and see `_few_planes`).
    """
    node = g.anchor
    x_value, w_value = node.inputs[0], node.inputs[1]
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    assert x_value is not None and w_value is not None
    attrs, y = node.attrs, node.outputs[0]
    rank = x_value.rank
    n_spatial = rank - 2
    last = attrs["layout"] == "NHWC"
    to_last = tuple(range(rank)) if last else (0, *range(2, rank), 1)
    x = ctx.contiguous(ctx.view(x_value).transpose(to_last), f"{x_value.name}_nhwc")
    kernel, strides = w_value.shape[2:], attrs["strides"]
    plain = (
        tuple(kernel) == tuple(strides) and attrs["group"] == 1 and w_value.data is not None
        and not any((*attrs["before"], *attrs["after"], *attrs["output_padding"]))
        and all(d == 1 for d in attrs["dilations"])
    )  # fmt: skip
    if not plain or y.dtype is not DType.f32:
        _gather_transpose(ctx, g, x, to_last)
        return
    oc, c, data = w_value.shape[1], x.shape[-1], w_value.data
    assert isinstance(oc, int) and data is not None
    tail = [n for n in g.nodes if n is not node]
    if oc * int(np.prod(strides)) < FEW_RESULTS and _few_planes(ctx, g, x, bias_value, to_last):
        return
    if tail and oc * strides[-1] < FEW_RESULTS:
        whole, g = g, Group(node, g.position, (node,), y)
        from_last = tuple(to_last.index(i) for i in range(rank))
        target = ctx.temporary(f"{y.name}_sums", y.dtype, tuple(y.shape[i] for i in to_last)).transpose(from_last)
    else:
        whole, target = g, ctx.target(g.output)
    out = target.transpose(to_last)
    if out.strides[-1] != 1 and out.shape[-1] != 1:
        out = ctx.temporary(f"{y.name}_nhwc", g.output.dtype, out.shape)
    columns = _tiled_leaves(ctx, tail, g.output, y, to_last, strides[-1]) if whole is g else {}
    is_joined = out.strides[-2] == oc and (bias_value is None or bias_value.data is not None) and columns is not None
    rows = tuple(
        Axis(f"o{i}", x.shape[i], x.strides[i], 0, out.strides[i] * (1 if i == 0 else strides[i - 1]))
        for i in range(rank - 1)
    )
    n = oc * strides[-1] if is_joined else oc
    lanes = panel_lanes(n, ctx.isa)

    def matrices() -> np.ndarray:
        by_tap = np.moveaxis(data, (0, 1), (-2, -1))  # [c, oc, k..] -> [k.., c, oc]
        if not is_joined:
            return by_tap
        joined = np.moveaxis(by_tap, -3, -2)
        return joined.reshape(*joined.shape[:-2], n)

    w = packed_panels(ctx, w_value, lanes, f"transpose {is_joined}", matrices)
    panel = prod(w.shape[-3:])
    batch = []
    step: Dim = panel
    for i in reversed(range(n_spatial - is_joined)):
        batch.append(Axis(f"t{i}", kernel[i], 0, step, out.strides[i + 1]))
        step = step * kernel[i]
    batch.reverse()
    bias: View | Callable[[Params], Expr] | None = None if bias_value is None else ctx.view(bias_value)
    if is_joined and bias_value is not None and bias_value.data is not None:
        repeated = _tiled(ctx, bias_value, strides[-1])
        bias = lambda params: Binary("add", ACC, params.load(repeated, (COLUMN,)))  # noqa: E731
    elif isinstance(bias, View) and not last:
        bias = replace(bias, shape=(*bias.shape, *(1,) * n_spatial), strides=(*bias.strides, *(0,) * n_spatial))
    by_last = [
        symbol("o0", 0),
        *(symbol(f"o{i + 1}", 0) * strides[i] + symbol(f"t{i}", 0) for i in range(n_spatial)),
        COLUMN,
    ]
    index = by_last if last else [by_last[0], by_last[-1], *by_last[1:-1]]
    epilogue = Epilogue(ctx, g, bias, index, (columns or {}) if is_joined else {})
    a_buf, b_buf, out_buf = x.buffer("a"), w.buffer("b"), out.buffer("out", writable=True)
    spec = Contraction(
        "k",
        tuple(batch),
        rows,
        (Axis("kc", c, 1),),
        n,
        a_buf,
        b_buf,
        out_buf,
        Packing("panels", lanes),
        epilogue.expr,
        epilogue.extra,
    )
    views = {a_buf: x, b_buf: w, out_buf: out, **dict(zip(epilogue.extra, epilogue.views, strict=True))}
    emit_contraction(ctx, "conv_transpose", spec, views, g, tail_flops(g))
    if out.storage is not target.storage:
        ctx.copy(out, target.transpose(to_last))
    if whole is not g:
        finish(ctx, whole, target)


def _tiled(ctx: Lowering, v: Value, times: int) -> View:
    """A constant per channel, repeated."""
    assert v.data is not None
    source = v.data
    return ctx.made_of((source,), ("tiled", times), f"{v.name}_tiled", lambda: np.tile(source.reshape(-1), times))


def _tiled_leaves(
    ctx: Lowering, tail: Sequence[Node], root: Value, y: Value, to_last: tuple[int, ...], times: int
) -> dict[Value, View] | None:
    """What the tail reads besides the sums, for columns of several taps side by side; None unless all of it are
    constants per channel."""
    leaves = Tree(ctx, tail, root, given=[y]).leaves if tail else {}
    n_columns = y.shape[to_last[-1]]
    if any(v.data is None or v.data.size != n_columns or view.strides[to_last[-1]] != 1 for v, view in leaves.items()):
        return None
    return {v: _tiled(ctx, v, times) for v in leaves}


def _few_planes(ctx: Lowering, g: Group, x: View, bias: Value | None, to_last: tuple[int, ...]) -> bool:
    """A transposed convolution of so few results per pixel that vectors of them would be nearly empty: a product with
    pixels side by side makes a plane of each, and what follows brings the planes together.

        sums[tap, pixel] = w[tap] . x[pixel] + bias         y[2 i + t, 2 j + u] = f(sums[(t, u), (i, j)])

    False where what follows reads more than its results: nothing is done then.
    """
    node, y = g.anchor, g.anchor.outputs[0]
    w = node.inputs[1]
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
    out = ctx.target(g.output).transpose(to_last)
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


def _gather_transpose(ctx: Lowering, g: Group, x: View, to_last: tuple[int, ...]) -> None:
    """out[o] = sum over taps k and channels with (o + before - k * dilation) divisible by the stride."""
    node = g.anchor
    w_value = node.inputs[1]
    assert w_value is not None
    attrs, y = node.attrs, node.outputs[0]
    n_spatial = len(x.shape) - 2
    groups = attrs["group"]
    kernel = w_value.shape[2:]
    w = ctx.contiguous(
        ctx.view(w_value).transpose((*range(2, n_spatial + 2), 0, 1)), f"{w_value.name}_kn"
    )  # [k.., c, oc/g]
    n = w_value.shape[1]
    result = ctx.temporary(f"{y.name}_nhwc", y.dtype, tuple(y.shape[i] for i in to_last))
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
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        term = Binary("add", term, params.load(ctx.view(node.inputs[2]), (grp * n + col,)))
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
    deliver(ctx, g, result.transpose(tuple(to_last.index(i) for i in range(len(to_last)))))
