"""Matrix products and convolutions: `Contraction` and `Depthwise` steps with their epilogues."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vivace.base.dims import Dim, prod, symbol
from vivace.base.dtypes import DType
from vivace.base.mapped import forget
from vivace.graph.graph import Value
from vivace.loops.contraction import Axis, Contraction, Depthwise, Packing, contraction_params
from vivace.loops.kernel import Binary, Buffer, Expr, For, Kernel, Reduce, Store
from vivace.lower.bands import bands
from vivace.lower.choices import DIRECT, Site
from vivace.lower.group import Group
from vivace.lower.halves import is_depthwise, reads_half
from vivace.lower.lanes import product_lanes
from vivace.lower.lowering import Lowering
from vivace.lower.pack import pack_panels, without_denormals
from vivace.lower.rules import narrow, winograd
from vivace.lower.rules.elementwise import Params, Tree, emit_pointwise
from vivace.lower.rules.epilogue import Epilogue, tail_flops
from vivace.lower.rules.half_products import (
    half_contraction,
    is_fast_half,
    is_half_product,
    pair_contraction,
    pays_in_halves,
    unpacked,
)
from vivace.lower.tile import pays_to_gather
from vivace.lower.views import View


def emit_contraction(
    ctx: Lowering, label: str, c: Contraction, views: dict[Buffer, View], g: Group, flops: Dim,
    ways: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Append the step, its operands in the order of the kernel's params. `ways` are what else could compute it."""
    if pays_to_gather(c, ctx.isa):
        c, views = _gathered(ctx, c, views, g)
    params = contraction_params(c)
    ordered = [views[p] for p in params]
    moved: Dim = 0
    for v in ordered:
        part: Dim = v.dtype.size_bytes
        for d, s in zip(v.shape, v.strides, strict=True):
            part = part * (1 if s == 0 else d)
        moved = moved + part
    site = Site(ctx.choices.key(c), c, ways)
    ctx.emit(label, c, ordered, len(ordered) - 1, g.nodes, flops, moved, site=site)


def _gathered(
    ctx: Lowering, c: Contraction, views: dict[Buffer, View], g: Group
) -> tuple[Contraction, dict[Buffer, View]]:
    """The same product of rows that were copied next to each other before."""
    a, run = views[c.a], c.taps[-1]
    apart = replace(a, shape=(*(r.extent for r in c.rows), run.extent), strides=(*(r.a for r in c.rows), run.a))
    dense = ctx.contiguous(apart, f"{g.output.name}_rows")
    rows = tuple(replace(r, a=step) for r, step in zip(c.rows, dense.strides[:-1], strict=True))
    a_buf = dense.buffer(c.a.name)
    return replace(c, rows=rows, a=a_buf), views | {a_buf: dense}


# ---- matrix products
# ----------------------------------------------------------------------------------------------------


def lower_matmul(ctx: Lowering, g: Group) -> None:
    """NumPy's matmul: rows of the left operand (its batch axes too, where the right one has none) against panels of
    the right."""
    a_value, b_value = g.anchor.inputs[0], g.anchor.inputs[1]
    assert a_value is not None and b_value is not None
    y = g.anchor.outputs[0]
    if y.dtype is not DType.f32:
        _integer_matmul(ctx, g)
        return
    is_pair = reads_half(g.anchor, 1) and all(is_half_product(ctx, x, None) for x in (a_value, b_value))
    half = is_pair or is_half_product(ctx, a_value, b_value)
    a = ctx.operand(a_value) if half else ctx.view(a_value)
    b = ctx.operand(b_value) if is_pair else ctx.view(b_value)
    a = _two_d(a, column=False)
    b = _two_d(b, column=True)
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    lead = y.shape[: len(y.shape) - (a_value.rank > 1) - (b_value.rank > 1)]
    full = (*lead, m, n)
    if a.strides[-1] != 1 and k != 1:
        a = ctx.contiguous(a, f"{a_value.name}_rows")
    a = a.expand((*lead, m, k))
    target = ctx.target(g.output)
    out = _required(target.reshape(full)) if target.shape != full else target
    if out.strides[-1] != 1 and n != 1:
        out = ctx.temporary(f"{y.name}_dense", g.output.dtype, full)
    b_full = b.expand((*lead, k, n))
    batched = [not (s == 0 or d == 1) for d, s in zip(lead, b_full.strides, strict=False)]
    names = [f"m{i}" for i in range(len(lead) + 1)]
    axes = [
        Axis(names[i], full[i], a.strides[i], b_full.strides[i] if i < len(lead) else 0, out.strides[i])
        for i in range(len(lead) + 1)
    ]
    batch = tuple(x for x, is_b in zip(axes, [*batched, False], strict=True) if is_b)
    rows = tuple(x for x, is_b in zip(axes, [*batched, False], strict=True) if not is_b)
    index = [symbol(x, 0) for x in names] + [symbol("n", 0)]
    epilogue = Epilogue(ctx, g, None, _index_for(y.shape, full, index))
    if is_pair or (half and not batch):
        if is_pair:
            c, places = pair_contraction(ctx, g, b_full, batch, rows, n, a, out, epilogue)
        else:
            c, places = half_contraction(
                ctx, b_value, "matmul", lambda: np.asarray(_matrix(b, b_value))[None],
                (), rows, (Axis("k", k, 1),), n, a, out, epilogue
            )  # fmt: skip
        emit_contraction(ctx, "matmul", c, places, g, tail_flops(g))
        if out.storage is not target.storage:
            ctx.copy(_required(out.reshape(target.shape)), target)
        return
    a_buf, out_buf = a.buffer("a"), out.buffer("out", writable=True)
    if b_value.data is not None and not batch:
        tap = Axis("k", k, a.strides[-1] if k != 1 else 1)
        wanted = unpacked(
            Contraction("k", (), rows, (tap,), n, a_buf, a_buf, out_buf, Packing(""), epilogue.expr, epilogue.extra)
        )
        lanes = product_lanes(wanted, ctx.isa, ctx.choices.of(wanted).lanes)
        b_view = packed_panels(ctx, b_value, lanes, "matmul", lambda: np.asarray(_matrix(b, b_value))[None])
        packing = Packing("panels", lanes)
    elif b_full.strides[-1] == 1 or n == 1:
        b_view, packing = b_full, Packing("plain")
    elif b_full.strides[-2] == 1:
        b_view, packing = b_full, Packing("transposed", n_stride=b_full.strides[-1])
    else:
        b_view, packing = ctx.contiguous(b, f"{b_value.name}_dense").expand((*lead, k, n)), Packing("plain")
    b_strides = b_view.strides
    if packing.kind != "panels":
        axes_b = {names[i]: b_strides[i] for i in range(len(lead))}
        batch = tuple(replace(x, b=axes_b[x.name]) for x in batch)
    tap = Axis("k", k, a.strides[-1] if k != 1 else 1, b_strides[-2] if packing.kind != "panels" else 0)
    if packing.kind == "transposed":
        b_view = replace(
            b_view, shape=(*b_view.shape[:-2], n, k), strides=(*b_strides[:-2], b_strides[-1], b_strides[-2])
        )
    b_buf = b_view.buffer("b")
    c = Contraction("k", batch, rows, (tap,), n, a_buf, b_buf, out_buf, packing, epilogue.expr, epilogue.extra)
    views = {a_buf: a, b_buf: b_view, out_buf: out, **dict(zip(epilogue.extra, epilogue.views, strict=True))}
    emit_contraction(ctx, "matmul", c, views, g, tail_flops(g))
    if out.storage is not target.storage:
        ctx.copy(_required(out.reshape(target.shape)), target)


def _two_d(v: View, column: bool) -> View:
    if len(v.shape) > 1:
        return v
    shape = (*v.shape, 1) if column else (1, *v.shape)
    strides = (*v.strides, 0) if column else (0, *v.strides)
    return replace(v, shape=shape, strides=strides)


def _index_for(shape: tuple[Dim, ...], full: tuple[Dim, ...], index: list[Dim]) -> list[Dim]:
    """The loop symbols for the axes of `shape`, which is `full` less the axes that 1-D operands do not have."""
    if len(shape) == len(full):
        return index
    kept = list(index)
    if len(shape) == len(full) - 1:  # one operand is a vector: its axis has extent 1
        return [*kept[:-2], kept[-1] if full[-2] == 1 and (not shape or shape[-1] == full[-1]) else kept[-2]]
    return kept[: len(shape)]


def _matrix(view: View, value: Value) -> np.ndarray:
    """The constant behind a view of it as a matrix (leading axes of extent 1 dropped)."""
    assert value.data is not None
    data = np.asarray(value.data, np.float32)
    return data.reshape(data.shape[-2:]) if data.ndim > 1 else data.reshape(-1, 1)


def packed_panels(ctx: Lowering, value: Value, lanes: int, how: str, make: object) -> View:
    """The matrix that `make` gives of a constant, in panels; `how` names what it makes."""
    source = value.data
    assert source is not None

    def panels() -> np.ndarray:
        data = pack_panels(np.ascontiguousarray(make(), np.float32), lanes)  # type: ignore[operator]
        forget(source)
        return data

    return ctx.made_of((source,), ("panels", how, lanes), f"{value.name}_panels", panels)


def _integer_matmul(ctx: Lowering, g: Group) -> None:
    """Products of other dtypes as a plain reduction."""
    a_value, b_value = g.anchor.inputs[0], g.anchor.inputs[1]
    assert a_value is not None and b_value is not None
    y = g.anchor.outputs[0]
    a, b = _two_d(ctx.view(a_value), False), _two_d(ctx.view(b_value), True)
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    lead = y.shape[: len(y.shape) - (a_value.rank > 1) - (b_value.rank > 1)]
    full = (*lead, m, n)
    a, b = a.expand((*lead, m, k)), b.expand((*lead, k, n))
    plain = g.output is y
    out = ctx.target(y) if plain else ctx.temporary(y.name, y.dtype, y.shape)
    over = _required(out.reshape(full))
    params = Params()
    names = [symbol(f"m{i}", 0) for i in range(len(lead) + 1)]
    tap, col = symbol("k", 0), symbol("n", 0)
    product = Binary("mul", params.load(a, (*names, tap)), params.load(b, (*names[:-1], tap, col)))
    store = Store(params.buffer(over, writable=True), (*names, col), Reduce("add", "k", k, product))
    body: For = For("n", n, (store,), "vector")
    for i in reversed(range(len(lead) + 1)):
        body = For(f"m{i}", full[i], (body,), "parallel")
    ctx.emit(
        "matmul",
        Kernel("k", tuple(params.buffers), (body,)),
        params.views,
        len(params.views) - 1,
        (g.anchor,),
        tail_flops(g),
    )
    finish(ctx, g, out)


def finish(ctx: Lowering, g: Group, result: View) -> None:
    """Apply the epilogue of a group as a step of its own, for anchors that could not take it in."""
    y = g.anchor.outputs[0]
    if g.output is y:
        return
    ctx.views[y] = result
    tree = Tree(ctx, [n for n in g.nodes if n is not g.anchor], g.output)
    values = list(tree.leaves)
    out = ctx.target(g.output)
    emit_pointwise(
        ctx,
        "epilogue",
        list(tree.leaves.values()),
        out,
        lambda xs: tree.expr(dict(zip(values, xs, strict=True)).__getitem__),
        [n for n in g.nodes if n is not g.anchor],
    )


# ---- convolutions ---------------------------------------------------------------------------------------------------


def lower_conv(ctx: Lowering, g: Group, is_exact: bool = False) -> None:
    """A convolution without pads (see `prepare`), rows of a depthwise one aside (`bands`): over channels-last views as
    one contraction per group. An exact one is never Winograd's."""
    node = g.anchor
    x_value, w_value = node.inputs[0], node.inputs[1]
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    assert x_value is not None and w_value is not None
    attrs, y = node.attrs, node.outputs[0]
    rank = x_value.rank
    if y.dtype is not DType.f32:
        _plain_conv(ctx, g)
        return
    groups: int = attrs["group"]
    last = attrs["layout"] == "NHWC"
    to_last = tuple(range(rank)) if last else (0, *range(2, rank), 1)
    half = reads_half(node, 0) and is_half_product(ctx, x_value, None if is_depthwise(node) else w_value)
    if half and not is_depthwise(node):
        half = pays_in_halves(ctx.operand(x_value).transpose(to_last), node, ctx.isa)
    x = (ctx.operand(x_value) if half else ctx.view(x_value)).transpose(to_last)
    if x.strides[-1] != 1 and x.shape[-1] != 1:
        x = ctx.contiguous(x, f"{x_value.name}_nhwc")
    elif x.strides[-1] != 1:
        x = replace(x, strides=(*x.strides[:-1], 1))
    target = ctx.target(g.output)
    out = target.transpose(to_last)
    if out.strides[-1] != 1 and out.shape[-1] != 1:
        out = ctx.temporary(f"{y.name}_nhwc", g.output.dtype, out.shape)
    oc, cg = w_value.shape[0], w_value.shape[1]
    n_spatial = rank - 2
    strides, dilations = attrs["strides"], attrs["dilations"]
    names = ["img", *(f"o{i}" for i in range(n_spatial))]
    rows = tuple(
        Axis(names[i], out.shape[i], x.strides[i] * (1 if i == 0 else strides[i - 1]), 0, out.strides[i])
        for i in range(rank - 1)
    )
    kernel = w_value.shape[2:]
    spatial_taps = tuple(Axis(f"k{i}", kernel[i], x.strides[i + 1] * dilations[i]) for i in range(n_spatial))
    bias = None if bias_value is None else ctx.view(bias_value)
    if bias is not None and not last:
        bias = replace(bias, shape=(*bias.shape, *(1,) * n_spatial), strides=(*bias.strides, *(0,) * n_spatial))
    taps = (*spatial_taps, Axis("kc", cg, 1))
    is_narrow = narrow.pays(w_value, groups, taps)
    depthwise = is_depthwise(node) and not is_narrow
    lane: Dim = symbol("c" if depthwise else "n", 0)
    channel = lane if groups == 1 or depthwise else symbol("g", 0) * (oc // groups) + lane
    by_last = [*(symbol(s, 0) for s in names), channel]
    index = by_last if last else [by_last[0], by_last[-1], *by_last[1:-1]]
    epilogue = Epilogue(ctx, g, bias, index)
    out_buf, a_buf = out.buffer("out", writable=True), x.buffer("a")
    views = {a_buf: x, out_buf: out, **dict(zip(epilogue.extra, epilogue.views, strict=True))}
    n = oc // groups
    batch: tuple[Axis, ...] = () if groups == 1 else (Axis("g", groups, cg, 0, n),)
    wanted = unpacked(
        Contraction("k", batch, rows, taps, n, a_buf, a_buf, out_buf, Packing(""), epilogue.expr, epilogue.extra),
        x.dtype if half else DType.f32,
    )
    choice = ctx.choices.of(wanted)
    is_fast = half and is_fast_half(x.dtype, ctx.isa)
    ways = () if is_exact or "winograd" in ctx.without else winograd.ways(node, ctx.isa, is_fast)
    if m := winograd.size_of(choice.way if choice.way in ways else next(iter(ways), DIRECT)):
        winograd.lower_winograd(ctx, g, m, x, out, bias, last, Site(ctx.choices.key(wanted), wanted, ways), choice)
    elif is_narrow:
        narrow.lower_narrow(ctx, g, x, out, rows, taps, epilogue)
    elif depthwise:
        assert w_value.data is not None
        w = ctx.made_of((w_value.data,), ("depthwise",), f"{w_value.name}_taps", lambda: _depthwise_weights(w_value))
        b_buf = w.buffer("b")
        step: Dim = oc
        with_b = []
        for t in reversed(spatial_taps):
            with_b.append(replace(t, b=step))
            step = step * t.extent
        whole = Depthwise("k", rows, tuple(reversed(with_b)), oc, a_buf, b_buf, out_buf, epilogue.expr, epilogue.extra)
        for d, places, flops in bands(node, whole, {**views, b_buf: w}, tail_flops(g)):
            ordered = [places[p] for p in contraction_params(d)]
            site = Site(ctx.choices.key(d), d)
            ctx.emit("depthwise", d, ordered, len(ordered) - 1, g.nodes, flops, site=site)
    else:
        if half:
            c, places = half_contraction(
                ctx, w_value, f"conv{groups}", lambda: _conv_weights(w_value, groups), batch, rows,
                taps, n, x, out, epilogue,
            )  # fmt: skip
            emit_contraction(ctx, "conv", c, places, g, tail_flops(g), ways)
            if out.storage is not target.storage:
                ctx.copy(out, target.transpose(to_last))
            return
        if w_value.data is not None:
            lanes = product_lanes(wanted, ctx.isa, choice.lanes)
            w = packed_panels(ctx, w_value, lanes, f"conv{groups}", lambda: _conv_weights(w_value, groups))
            packing, taps_b = Packing("panels", lanes), taps
            batch = tuple(replace(b, b=prod(w.shape[1:])) for b in batch)
        else:
            perm = (*range(2, rank), 1, 0)  # [oc, c, k..] -> [k.., c, oc]: groups lie side by side in oc
            w = ctx.contiguous(ctx.view(w_value).transpose(perm), f"{w_value.name}_kn")
            packing = Packing("plain")
            taps_b = tuple(replace(t, b=s) for t, s in zip(taps, w.strides[:-1], strict=True))
            batch = tuple(replace(b, b=n) for b in batch)
        b_buf = w.buffer("b")
        c = Contraction("k", batch, rows, taps_b, n, a_buf, b_buf, out_buf, packing, epilogue.expr, epilogue.extra)
        emit_contraction(ctx, "conv", c, {**views, b_buf: w}, g, tail_flops(g), ways)
    if out.storage is not target.storage:
        ctx.copy(out, target.transpose(to_last))


def _plain_conv(ctx: Lowering, g: Group) -> None:
    """A convolution of f64 or integers as a plain reduction over its taps."""
    node = g.anchor
    x_value, w_value = node.inputs[0], node.inputs[1]
    assert x_value is not None and w_value is not None
    attrs, y = node.attrs, node.outputs[0]
    n_spatial = x_value.rank - 2
    groups: int = attrs["group"]
    to_last = tuple(range(x_value.rank)) if attrs["layout"] == "NHWC" else (0, *range(2, x_value.rank), 1)
    x = ctx.view(x_value).transpose(to_last)
    result = ctx.temporary(f"{y.name}_last", y.dtype, tuple(y.shape[i] for i in to_last))
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
    deliver(ctx, g, result.transpose(tuple(to_last.index(i) for i in range(len(to_last)))))


def deliver(ctx: Lowering, g: Group, result: View) -> None:
    """Bring a computed view to where the group's output belongs, through the epilogue if there is one."""
    if g.output is g.anchor.outputs[0]:
        ctx.copy(result, ctx.target(g.output), (g.anchor,))
    else:
        finish(ctx, g, result)


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


def _required(view: View | None) -> View:
    assert view is not None
    return view
