"""Products with weights that share a scale per block: `matmul_blocks` as a `BlockwiseProduct` step.

Its rows are one axis. Where an epilogue reads something that does not step evenly over all rows (one number per row of
an inner axis, say), the epilogue is a step of its own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from vivace.base.dims import Dim, bounds, prod, symbol
from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.base.mapped import forget
from vivace.graph.ops.quantized import rounded_to
from vivace.loops.blockwise import MOST_DIRECT_ROWS, BlockwiseProduct
from vivace.loops.contraction import Axis, Contraction, Packing, merge_axes
from vivace.loops.digits import LARGEST_BLOCK, Digits
from vivace.loops.kernel import Buffer, Expr
from vivace.loops.split import TILE_STEPS, Split, split_sizes
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.pack_blockwise import PackedBlocks, blockwise_lanes, has_shifts, pack_blockwise
from vivace.lower.rules.contraction import finish
from vivace.lower.rules.epilogue import Epilogue, tail_flops
from vivace.lower.views import View


def lower_matmul_blocks(ctx: Lowering, g: Group) -> None:
    """Rows of A against packed weights."""
    y = g.anchor.outputs[0]
    a = _rows_of_a(ctx, g)
    axes = [Axis(f"m{i}", d) for i, d in enumerate(y.shape[:-1])]
    epilogue = Epilogue(ctx, g, None, [*(symbol(x.name, 0) for x in axes), symbol("n", 0)])
    merged = _merged(axes, y.shape[-1], epilogue)
    if merged is None:
        out = ctx.temporary(y.name, y.dtype, y.shape)
        _emit(ctx, Group(g.anchor, g.position, (g.anchor,), y), a, out, "m", None)
        finish(ctx, g, out)
        return
    name, expr = merged
    target = ctx.target(g.output)
    n = y.shape[-1]
    placed = target.reshape((a.shape[0], n))
    if placed is not None and (placed.strides[-1] == 1 or n == 1):
        out = placed
    else:
        out = ctx.temporary(f"{y.name}_dense", g.output.dtype, (a.shape[0], n))
    epilogue.expr = expr
    _emit(ctx, g, a, out, name, epilogue)
    if out.storage is not target.storage:
        ctx.copy(_required(out.reshape(target.shape)), target)


def _rows_of_a(ctx: Lowering, g: Group) -> View:
    """A as [rows, k], k contiguous; bf16 where it is stored so."""
    value = g.anchor.inputs[0]
    assert value is not None
    k, shape = value.shape[-1], (prod(value.shape[:-1]), value.shape[-1])
    a = ctx.operand(value)
    if a.dtype is not DType.bf16:
        a = ctx.view(value)
    flat = a.reshape(shape) if a.strides[-1] == 1 or k == 1 else None
    return flat if flat is not None else _required(ctx.contiguous(a, f"{value.name}_rows").reshape(shape))


def _merged(axes: list[Axis], n: Dim, epilogue: Epilogue) -> tuple[str, Expr | None] | None:
    """The name of the one row axis that all become, and the epilogue over it; None where they do not."""
    step: Dim = 1
    dense: list[Axis] = []
    for x in reversed(axes):
        dense.append(replace(x, a=step, out=step))
        step = step * x.extent
    nothing = Buffer("nothing", DType.f32, (0,), (1,))
    whole = Contraction(
        "k", (), tuple(reversed(dense)), (), n, nothing, nothing, nothing, Packing("panels"), epilogue.expr
    )
    c = merge_axes(whole)
    if len(c.rows) > 1:
        return None
    return (c.rows[0].name if c.rows else "m"), c.epilogue


def _emit(ctx: Lowering, g: Group, a: View, out: View, m: str, epilogue: Epilogue | None) -> None:
    q, block = g.anchor.inputs[1], g.anchor.attrs["block"]
    assert q is not None and q.data is not None
    (k, n), rows = q.data.shape, a.shape[0]
    b, scales, shifts = _weights(ctx, g)
    flat = _required(out.reshape((rows, n)))
    axis = Axis(m, rows, a.strides[0] if rows != 1 else 0, 0, flat.strides[0] if rows != 1 else 0)
    extra = epilogue.extra if epilogue is not None else ()
    w = BlockwiseProduct(
        "k", axis, k, n, 4 if q.dtype is DType.u4 else 8, block, blockwise_lanes(ctx.isa), a.buffer("a"),
        b.buffer("b"), scales.buffer("scales"), None if shifts is None else shifts.buffer("shifts"),
        flat.buffer("out", writable=True), epilogue.expr if epilogue is not None else None, extra,
        rounded=rounded_to(g.anchor.attrs),
    )  # fmt: skip
    views: dict[Buffer, View] = {w.a: a, w.b: b, w.scales: scales, w.out: flat}
    if _has_parts(ctx, w):
        split = _parts(ctx, g, w, a)
        w = replace(w, parts=split[0].buffer("parts"), sums=split[1].buffer("sums"))
        views |= dict(zip((w.parts, w.sums), split))  # type: ignore[arg-type]
    if _has_digits(ctx, w):
        view = _digits(ctx, g, w, a)
        w = replace(w, digits=view.buffer("digits"))
        views[w.digits] = view  # type: ignore[index]
    if w.shifts is not None and shifts is not None:
        views[w.shifts] = shifts
    if epilogue is not None:
        views |= dict(zip(extra, epilogue.views, strict=True))
    ordered = [views[x] for x in w.params]
    ctx.emit("matmul_blocks", w, ordered, len(ordered) - 1, g.nodes, tail_flops(g))


def _has_parts(ctx: Lowering, w: BlockwiseProduct) -> bool:
    """Whether many rows go through matrix units."""
    most = bounds(w.m.extent)[1]
    is_many = most is None or most > MOST_DIRECT_ROWS
    return ctx.isa.has("amx_bf16") and w.a.dtype is DType.f32 and w.block % TILE_STEPS == 0 and is_many


def _parts(ctx: Lowering, g: Group, w: BlockwiseProduct, a: View) -> tuple[View, View]:
    """A in parts of bf16 and its sums, once for all products that read them."""
    filled = w.n_blocks * w.block
    if (a, filled, w.has_sums) not in ctx.splits or "shared_rows" in ctx.without:
        n_parts, n_sums = split_sizes(w.m.extent, filled, w.has_sums)
        views = ctx.temporary("parts", DType.bf16, (n_parts,)), ctx.temporary("sums", DType.f32, (n_sums,))
        buffers = a.buffer("a"), views[0].buffer("parts", writable=True), views[1].buffer("sums", writable=True)
        split = Split("k", w.m.extent, w.m.a, w.k, filled, MOST_DIRECT_ROWS + 1, w.has_sums, *buffers)
        ctx.emit("split", split, [a, *views], (1, 2), (g.anchor,), 0)
        ctx.splits[a, filled, w.has_sums] = views
    return ctx.splits[a, filled, w.has_sums]


def _has_digits(ctx: Lowering, w: BlockwiseProduct) -> bool:
    """Whether few rows are multiplied as integers: blocks are whole vectors there, and not too long."""
    has_dot = ctx.isa.has("avx512_vnni") or ctx.isa.has("avx_vnni")
    fits = w.block % ctx.isa.n_f32_lanes == 0 and w.block <= LARGEST_BLOCK
    return has_dot and fits and (bounds(w.m.extent)[0] or 0) <= MOST_DIRECT_ROWS


def _digits(ctx: Lowering, g: Group, w: BlockwiseProduct, a: View) -> View:
    """The digits of A, once for all products that read them."""
    layout = w.digit_rows
    key = a, layout, w.center
    if key not in ctx.digits or "shared_rows" in ctx.without:
        view = ctx.temporary("digits", DType.u8, (layout.n_bytes(MOST_DIRECT_ROWS),))
        buffers = a.buffer("a"), view.buffer("digits", writable=True)
        digits = Digits("k", w.m.extent, w.m.a, w.k, w.block, w.center, MOST_DIRECT_ROWS, layout.rounded, *buffers)
        ctx.emit("digits", digits, [a, view], 1, (g.anchor,), 0)
        ctx.digits[key] = view
    return ctx.digits[key]


def _weights(ctx: Lowering, g: Group) -> tuple[View, View, View | None]:
    """The packed weights; equal ones share their storages."""
    q, scale, zero = g.anchor.inputs[1:4]
    assert q is not None and scale is not None and zero is not None
    if q.data is None or scale.data is None or zero.data is None:
        raise UnsupportedError("weights in blocks that change at run time", where=q.name, expected="constants")
    block = g.anchor.attrs["block"]
    sources, bits, name = (q.data, scale.data, zero.data), 4 if q.dtype is DType.u4 else 8, q.name

    @cache
    def packed() -> PackedBlocks:
        made = pack_blockwise(sources[0].astype(np.uint8), sources[1], sources[2], bits, block, ctx.isa)
        forget(sources[0])
        return made

    def part(of: str) -> View:
        return ctx.made_of(sources, ("blocks", block, of), f"{name}_{of}", lambda: getattr(packed(), of))

    return part("b"), part("scales"), part("shifts") if has_shifts(sources[2], bits) else None


def _required(view: View | None) -> View:
    assert view is not None
    return view
