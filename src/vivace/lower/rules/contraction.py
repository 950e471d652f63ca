"""Matrix products: `Contraction` steps with their epilogues."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    if "gathered_rows" not in ctx.without and pays_to_gather(c, ctx.isa):
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
    target = ctx.target(g.output)
    p = _arranged(ctx, g, _two_d(a, column=False), _two_d(b, column=True), target)
    if is_pair:
        c, places = pair_contraction(ctx, g, p.wide, p.batch, p.rows, p.n, p.a, p.out, p.epilogue)
    elif half and not p.batch:
        c, places = half_contraction(
            ctx, b_value, "matmul", lambda: np.asarray(_matrix(p.b, b_value))[None],
            (), p.rows, (Axis("k", p.k, 1),), p.n, p.a, p.out, p.epilogue
        )  # fmt: skip
    else:
        c, places = _float_contraction(ctx, b_value, p)
    emit_contraction(ctx, "matmul", c, places, g, tail_flops(g))
    if p.out.storage is not target.storage:
        ctx.copy(_required(p.out.reshape(target.shape)), target)


@dataclass(frozen=True, slots=True)
class _Product:
    """A matmul as rows against panels. `wide` is `b` with all the batch axes of the result; of the axes before `n`,
    those along which `b` differs are `batch`, the others `rows`. `out` lies dense along `n`.

    Shapes: a [lead.., m, k], wide [lead.., k, n], out [lead.., m, n].
    """

    a: View
    b: View
    wide: View
    out: View
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    epilogue: Epilogue

    @property
    def k(self) -> Dim:
        return self.a.shape[-1]

    @property
    def n(self) -> Dim:
        return self.b.shape[-1]


def _arranged(ctx: Lowering, g: Group, a: View, b: View, target: View) -> _Product:
    """The axes of the product of two operands that have a row and a column axis."""
    a_value, b_value = g.anchor.inputs[0], g.anchor.inputs[1]
    assert a_value is not None and b_value is not None
    y = g.anchor.outputs[0]
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    lead = y.shape[: len(y.shape) - (a_value.rank > 1) - (b_value.rank > 1)]
    full = (*lead, m, n)
    if a.strides[-1] != 1 and k != 1:
        a = ctx.contiguous(a, f"{a_value.name}_rows")
    a = a.expand((*lead, m, k))
    out = _required(target.reshape(full)) if target.shape != full else target
    if out.strides[-1] != 1 and n != 1:
        out = ctx.temporary(f"{y.name}_dense", g.output.dtype, full)
    wide = b.expand((*lead, k, n))
    names = [f"m{i}" for i in range(len(lead) + 1)]
    is_batch = [not (s == 0 or d == 1) for d, s in zip(lead, wide.strides, strict=False)] + [False]
    axes = [
        Axis(names[i], full[i], a.strides[i], wide.strides[i] if i < len(lead) else 0, out.strides[i])
        for i in range(len(lead) + 1)
    ]
    index = [symbol(x, 0) for x in names] + [symbol("n", 0)]
    return _Product(
        a, b, wide, out,
        tuple(x for x, apart in zip(axes, is_batch, strict=True) if apart),
        tuple(x for x, apart in zip(axes, is_batch, strict=True) if not apart),
        Epilogue(ctx, g, None, _index_for(y.shape, full, index)),
    )  # fmt: skip


def _float_contraction(ctx: Lowering, b_value: Value, p: _Product) -> tuple[Contraction, dict[Buffer, View]]:
    """The product in f32, and what lies in its buffers: a constant `b` in panels, another one as it lies."""
    a_buf, out_buf = p.a.buffer("a"), p.out.buffer("out", writable=True)
    stride = p.a.strides[-1] if p.k != 1 else 1
    epilogue, batch = p.epilogue, p.batch
    if b_value.data is not None and not batch:
        tap = Axis("k", p.k, stride)
        wanted = unpacked(
            Contraction("k", (), p.rows, (tap,), p.n, a_buf, a_buf, out_buf, Packing(""), epilogue.expr, epilogue.extra)
        )
        lanes = product_lanes(wanted, ctx.isa, ctx.choices.of(wanted).lanes)
        b = packed_panels(ctx, b_value, lanes, "matmul", lambda: np.asarray(_matrix(p.b, b_value))[None])
        packing = Packing("panels", lanes)
    else:
        b, packing = _as_it_lies(ctx, b_value, p)
        strides = dict(zip((f"m{i}" for i in range(len(b.shape) - 2)), b.strides))
        batch = tuple(replace(x, b=strides[x.name]) for x in batch)
        tap = Axis("k", p.k, stride, b.strides[-2])
        if packing.kind == "transposed":
            lead, (across, along) = b.strides[:-2], b.strides[-2:]
            b = replace(b, shape=(*b.shape[:-2], p.n, p.k), strides=(*lead, along, across))
    b_buf = b.buffer("b")
    c = Contraction("k", batch, p.rows, (tap,), p.n, a_buf, b_buf, out_buf, packing, epilogue.expr, epilogue.extra)
    return c, {a_buf: p.a, b_buf: b, out_buf: p.out, **dict(zip(epilogue.extra, epilogue.views, strict=True))}


def _as_it_lies(ctx: Lowering, b_value: Value, p: _Product) -> tuple[View, Packing]:
    """The right operand where kernels can read it: along its rows, along its columns, or copied."""
    if p.wide.strides[-1] == 1 or p.n == 1:
        return p.wide, Packing("plain")
    if p.wide.strides[-2] == 1:
        return p.wide, Packing("transposed", n_stride=p.wide.strides[-1])
    return ctx.contiguous(p.b, f"{b_value.name}_dense").expand(p.wide.shape), Packing("plain")


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
