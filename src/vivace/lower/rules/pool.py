"""Pooling over channels-last views: a vector of channels per result, the window as a reduction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

from vivace.base.dims import Dim, ceildiv, maximum, minimum, prod, symbol
from vivace.base.dtypes import DType
from vivace.graph.ops.shapes import window_out
from vivace.loops.kernel import Binary, Cast, Const, Expr, For, Index, Inside, Kernel, Load, Reduce, Select, Store
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.channels_last import to_last
from vivace.lower.rules.elementwise import Params, Tree
from vivace.lower.rules.epilogue import tail_flops


@dataclass(frozen=True, slots=True)
class _Window:
    """The window of a pool on one spatial axis, at the result `o`, and its tap `k`."""

    o: Dim
    k: Dim
    size: Dim  # of the input
    n_results: Dim
    kernel: int
    stride: int
    dilation: int
    before: Dim
    after: Dim

    @property
    def position(self) -> Dim:
        """The cell that the tap reads."""
        return self.o * self.stride + self.k * self.dilation - self.before

    @property
    def may_leave(self) -> bool:
        """Whether a tap may lie outside the input: in padding, or beyond it where the last window overhangs."""
        if self.before != 0 or self.after != 0:
            return True
        spare = self.size - ((self.n_results - 1) * self.stride + (self.kernel - 1) * self.dilation + 1)
        if isinstance(spare, int) and spare >= 0:
            return False
        return window_out(self.size, self.kernel, self.stride, self.dilation, 0, 0) != self.n_results

    def n_cells(self, include_pad: bool) -> Dim:
        """How many taps count in the average."""
        if self.before == 0 and self.after == 0:
            return self.kernel
        start = self.o * self.stride - (0 if include_pad else self.before)
        end = self.size + self.before + self.after if include_pad else self.size
        if self.dilation == 1:
            return minimum(start + self.kernel, end) - maximum(start, 0)
        first = maximum(ceildiv(-start, self.dilation), 0)
        past = minimum(ceildiv(end - start, self.dilation), self.kernel)
        return past - first


def lower_pool(ctx: Lowering, g: Group) -> None:
    """max_pool and avg_pool. Cells outside the input are never read: they are -inf for the maximum and 0 for the
    sum."""
    node = g.anchor
    x_value, y, order = node.inputs[0], node.outputs[0], to_last(node)
    assert x_value is not None
    x = ctx.operand(x_value).transpose(order)
    rest = [n for n in g.nodes if n is not node]
    tree = Tree(ctx, rest, g.output, given=[y]) if rest else None
    out = ctx.target(g.output).transpose(order)
    params = Params()
    image, channel = symbol("i0", 0), symbol("c", 0)
    windows = [
        _Window(symbol(f"o{i}", 0), symbol(f"k{i}", 0), x.shape[i + 1], out.shape[i + 1], *sizes)
        for i, sizes in enumerate(
            zip(*(node.attrs[k] for k in ("kernel", "strides", "dilations", "before", "after")), strict=True)
        )
    ]
    load = params.load(x, (image, *(w.position for w in windows), channel))
    assert isinstance(load, Load)
    inside = tuple(Inside(w.position, 0, w.size) for w in windows if w.may_leave)
    cell: Expr = replace(load, inside=inside)
    if x.dtype is not x_value.dtype:
        cell = Cast(x_value.dtype, cell)
    if node.op.name == "max_pool":
        value = _reduced("max", windows, _or_lowest(cell, inside, y.dtype))
    else:
        count = prod([w.n_cells(node.attrs["count_include_pad"]) for w in windows])
        share = Binary("div", Const(1.0, y.dtype), Cast(y.dtype, Index(count, DType.i64)))
        value = Binary("mul", _reduced("add", windows, cell), share)
    index = (image, *(w.o for w in windows), channel)
    if tree is not None:
        moved = {v: leaf.transpose(order) for v, leaf in tree.leaves.items()}
        value = tree.expr(lambda v: params.load(moved[v], index), {y: value})
    store = Store(params.buffer(out, writable=True), index, value)
    body = For("c", out.shape[-1], (store,), "vector")
    for i in reversed(range(len(windows))):
        body = For(f"o{i}", out.shape[i + 1], (body,), "parallel")
    kernel = Kernel("k", tuple(params.buffers), (For("i0", out.shape[0], (body,), "parallel"),))
    ctx.emit(node.op.name, kernel, params.views, len(params.views) - 1, g.nodes, tail_flops(g))


def _reduced(fn: str, windows: Sequence[_Window], cell: Expr) -> Expr:
    """A reduction over the taps of all axes, those of the last axis innermost."""
    for i, w in reversed(list(enumerate(windows))):
        cell = Reduce(fn, f"k{i}", w.kernel, cell)
    return cell


def _or_lowest(cell: Expr, inside: Sequence[Inside], dtype: DType) -> Expr:
    """A cell, or what no maximum takes where it lies outside."""
    if not inside:
        return cell
    least = float("-inf") if dtype.is_float else -(1 << (8 * dtype.size_bytes - 1)) if dtype.is_signed else 0
    tests = [
        Binary("and", Binary("ge", Index(c.dim), Index(c.lo)), Binary("lt", Index(c.dim), Index(c.hi))) for c in inside
    ]
    return Select(reduce(lambda a, b: Binary("and", a, b), tests), cell, Const(least, dtype))
