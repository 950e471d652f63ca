"""Matrix products: `Contraction` steps with their epilogues."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.base.mapped import forget
from vivace.graph.graph import Value
from vivace.loops.contraction import Axis, Contraction, Packing, contraction_params
from vivace.loops.kernel import Binary, Buffer, For, Kernel, Reduce, Store
from vivace.lower.choices import Site
from vivace.lower.group import Group
from vivace.lower.halves import reads_half
from vivace.lower.lanes import product_lanes
from vivace.lower.lowering import Lowering
from vivace.lower.pack import pack_panels
from vivace.lower.rules.elementwise import Params, Tree, emit_pointwise
from vivace.lower.rules.epilogue import Epilogue, tail_flops
from vivace.lower.rules.half_products import (
    half_contraction,
    is_half_product,
    pair_contraction,
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


def deliver(ctx: Lowering, g: Group, result: View) -> None:
    """Bring a computed view to where the group's output belongs, through the epilogue if there is one."""
    if g.output is g.anchor.outputs[0]:
        ctx.copy(result, ctx.target(g.output), (g.anchor,))
    else:
        finish(ctx, g, result)


def _required(view: View | None) -> View:
    assert view is not None
    return view
