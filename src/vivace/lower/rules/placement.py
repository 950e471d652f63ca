"""concat and pad: most operands were written in place by their producers; here the rest is copied and borders are
filled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.loops.kernel import Binary, Const, Expr, For, Index, Kernel, Let, Select, Stmt, Store
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.elementwise import Params, emit_pointwise
from vivace.lower.scalar import literal
from vivace.lower.views import View


def lower_concat(ctx: Lowering, g: Group) -> None:
    """Copy the operands that do not lie in the result already."""
    y = g.anchor.outputs[0]
    out = ctx.target(y)
    axis = g.anchor.attrs["axis"] % y.rank
    start: Dim = 0
    for x in g.anchor.inputs:
        assert x is not None
        at, have = tuple(start if i == axis else 0 for i in range(y.rank)), ctx.view(x)
        start = start + x.shape[axis]
        if x in ctx.kept:
            sizes = tuple(ctx.kept[x] if i == axis else n for i, n in enumerate(x.shape))
            have = replace(have, shape=sizes)
        part = out.slice(at, have.shape, (1,) * y.rank)
        if not same_place(have, part):
            ctx.copy(have, part, (g.anchor,))


def lower_pad(ctx: Lowering, g: Group) -> None:
    """Fill the border of a padded buffer, and copy the interior unless its producer wrote it there."""
    node = g.anchor
    x_value, y = node.inputs[0], node.outputs[0]
    assert x_value is not None
    before = node.attrs["before"]
    if node.attrs["mode"] != "constant":
        _reflect(ctx, g)
        return
    out = ctx.target(y)
    interior = out.slice(before, x_value.shape, (1,) * y.rank)
    if not same_place(ctx.view(x_value), interior):
        ctx.copy(ctx.view(x_value), interior, (node,))
    value = literal(np.asarray(node.attrs["value"]), y.dtype)
    for starts, sizes in _border(node.attrs["before"], x_value.shape, node.attrs["after"], y.shape):
        _fill(ctx, out.slice(starts, sizes, (1,) * y.rank), value, g)


def _border(
    before: Sequence[Dim], inner: Sequence[Dim], after: Sequence[Dim], outer: Sequence[Dim]
) -> Iterator[tuple[tuple[Dim, ...], tuple[Dim, ...]]]:
    """The slabs around an interior, as starts and sizes: for each padded axis what lies before and after it, within the
    interior of the axes already handled."""
    starts: list[Dim] = [0] * len(outer)
    sizes: list[Dim] = list(outer)
    for axis in range(len(outer)):
        for at, width in ((0, before[axis]), (before[axis] + inner[axis], after[axis])):
            if width != 0:
                yield (
                    tuple(at if i == axis else s for i, s in enumerate(starts)),
                    tuple(width if i == axis else s for i, s in enumerate(sizes)),
                )
        starts[axis], sizes[axis] = before[axis], inner[axis]


def _fill(ctx: Lowering, slab: View, value: Expr, g: Group) -> None:
    emit_pointwise(ctx, "fill", [], slab, lambda xs: value, (g.anchor,))


def same_place(a: View, b: View) -> bool:
    """Whether two views of one shape are the same memory."""
    return (
        a.storage is b.storage
        and a.offset == b.offset
        and all(s == t or n == 1 for s, t, n in zip(a.strides, b.strides, a.shape, strict=True))
    )


def _reflect(ctx: Lowering, g: Group) -> None:
    """edge, reflect and wrap: the interior is a copy; in the border each element reads the cell that the mode maps it
    to."""
    node = g.anchor
    x_value, y = node.inputs[0], node.outputs[0]
    assert x_value is not None
    before, after = node.attrs["before"], node.attrs["after"]
    x, out = ctx.view(x_value), ctx.target(y)
    if not all(isinstance(n, int) and n >= 0 for n in (*before, *after)):
        _mapped(ctx, g, x, out, (0,) * y.rank, y.shape)
        return
    ctx.copy(x, out.slice(before, x.shape, (1,) * y.rank), (node,))
    for starts, sizes in _border(before, x.shape, after, y.shape):
        _mapped(ctx, g, x, out, starts, sizes)


def _mapped(ctx: Lowering, g: Group, x: View, out: View, starts: Sequence[Dim], sizes: Sequence[Dim]) -> None:
    """A slab of the result, element by element."""
    node, rank = g.anchor, len(sizes)
    mode = node.attrs["mode"]
    params = Params()
    index = tuple(symbol(f"i{i}", 0) for i in range(rank))
    lets: list[Stmt] = []
    source: list[Dim] = []
    for axis, (i, start, b, n) in enumerate(zip(index, starts, node.attrs["before"], x.shape, strict=True)):
        if b == 0 and node.attrs["after"][axis] == 0:
            source.append(i + start)
            continue
        at: Expr = Index(i + start - b)
        size, last, zero = Index(n), Index(n - 1), Const(0, DType.i64)
        if mode == "edge":
            at = Binary("min", Binary("max", at, zero), last)
        elif mode == "wrap":
            at = Binary("mod", at, size)
        else:
            period = Binary("max", Index(2 * n - 2), Const(1, DType.i64))
            at = Binary("mod", at, period)
            at = Select(Binary("gt", at, last), Binary("sub", period, at), at)
        lets.append(Let(f"s{axis}", at))
        source.append(symbol(f"s{axis}", 0))
    value = params.load(x, tuple(source))
    slab = out.slice(starts, sizes, (1,) * rank)
    store = Store(params.buffer(slab, writable=True), index, value)
    body: tuple[Stmt, ...] = (*lets, store)
    for axis in reversed(range(rank)):
        body = (For(f"i{axis}", sizes[axis], body, "vector" if axis == rank - 1 else "parallel"),)
    if rank == 1:
        body = (For("b", 1, body, "parallel"),)
    ctx.emit("pad", Kernel("k", tuple(params.buffers), body), params.views, len(params.views) - 1, g.nodes, 0)
