"""Pooling over channels-last views: a vector of channels per result, the window as a reduction."""

from __future__ import annotations

from dataclasses import replace

from vivace.base.dims import Dim, ceildiv, maximum, minimum, symbol
from vivace.base.dtypes import DType
from vivace.loops.kernel import Binary, Cast, Const, Expr, For, Index, Inside, Kernel, Load, Reduce, Select, Stmt, Store
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.elementwise import Params, Tree
from vivace.lower.rules.epilogue import tail_flops


def lower_pool(ctx: Lowering, g: Group) -> None:
    """max_pool and avg_pool. Cells outside the input are never read: they are -inf for the maximum and 0 for the
    sum."""
    node = g.anchor
    attrs = node.attrs
    x_value, y = node.inputs[0], node.outputs[0]
    assert x_value is not None
    rank = y.rank
    last = attrs["layout"] == "NHWC"
    to_last = tuple(range(rank)) if last else (0, *range(2, rank), 1)
    x = ctx.operand(x_value).transpose(to_last)
    rest = [n for n in g.nodes if n is not node]
    tree = Tree(ctx, rest, g.output, given=[y]) if rest else None
    out = ctx.target(g.output).transpose(to_last)
    n_spatial = rank - 2
    kernel, strides, dilations, before, after = (
        attrs[k] for k in ("kernel", "strides", "dilations", "before", "after")
    )
    params = Params()
    img, channel = symbol("i0", 0), symbol("c", 0)
    outs = tuple(symbol(f"o{i}", 0) for i in range(n_spatial))
    taps = tuple(symbol(f"k{i}", 0) for i in range(n_spatial))
    at: list[Dim] = []
    inside: list[Inside] = []
    for i in range(n_spatial):
        position = outs[i] * strides[i] + taps[i] * dilations[i] - before[i]
        at.append(position)
        if (
            before[i] != 0
            or after[i] != 0
            or _overhangs(x.shape[i + 1], out.shape[i + 1], kernel[i], strides[i], dilations[i])
        ):
            inside.append(Inside(position, 0, x.shape[i + 1]))
    load = params.load(x, (img, *at, channel))
    assert isinstance(load, Load)
    is_max = node.op.name == "max_pool"
    value: Expr = replace(load, inside=tuple(inside))
    if x.dtype is not x_value.dtype:
        value = Cast(x_value.dtype, value)
    if is_max and inside:
        lowest = Const(
            float("-inf") if y.dtype.is_float else 0 if not y.dtype.is_signed else -(1 << (8 * y.dtype.size_bytes - 1)),
            y.dtype,
        )
        ok: Expr | None = None
        for c in inside:
            both = Binary("and", Binary("ge", Index(c.dim), Index(c.lo)), Binary("lt", Index(c.dim), Index(c.hi)))
            ok = both if ok is None else Binary("and", ok, both)
        assert ok is not None
        value = Select(ok, value, lowest)
    for i in reversed(range(n_spatial)):
        value = Reduce("max" if is_max else "add", f"k{i}", kernel[i], value)
    if not is_max:
        count: Dim = 1
        for i in range(n_spatial):
            count = count * _cells(
                outs[i],
                x.shape[i + 1],
                kernel[i],
                strides[i],
                dilations[i],
                before[i],
                after[i],
                attrs["count_include_pad"],
            )
        value = Binary("mul", value, Binary("div", Const(1.0, y.dtype), Cast(y.dtype, Index(count, DType.i64))))
    if tree is not None:
        moved = {v: w.transpose(to_last) for v, w in tree.leaves.items()}
        value = tree.expr(lambda v: params.load(moved[v], (img, *outs, channel)), {y: value})
    store = Store(params.buffer(out, writable=True), (img, *outs, channel), value)
    loops: tuple[Stmt, ...] = (For("c", out.shape[-1], (store,), "vector"),)
    for i in reversed(range(n_spatial)):
        loops = (For(f"o{i}", out.shape[i + 1], loops, "parallel"),)
    loops = (For("i0", out.shape[0], loops, "parallel"),)
    ctx.emit(
        node.op.name,
        Kernel("k", tuple(params.buffers), loops),
        params.views,
        len(params.views) - 1,
        g.nodes,
        tail_flops(g),
    )


def _overhangs(size: Dim, out: Dim, kernel: int, stride: int, dilation: int) -> bool:
    """Whether the last window may reach beyond the input."""
    spare = size - ((out - 1) * stride + (kernel - 1) * dilation + 1)
    return not (isinstance(spare, int) and spare >= 0) and not _is_window(size, out, kernel, stride, dilation)


def _is_window(size: Dim, out: Dim, kernel: int, stride: int, dilation: int) -> bool:
    from vivace.graph.ops.shapes import window_out

    return window_out(size, kernel, stride, dilation, 0, 0) == out


def _cells(
    o: Dim, size: Dim, kernel: int, stride: int, dilation: int, before: Dim, after: Dim, include_pad: bool
) -> Dim:
    """How many taps of the window at `o` count in the average."""
    if before == 0 and after == 0:
        return kernel
    if include_pad:
        lo, hi = 0, size + before + after
        start = o * stride
    else:
        lo, hi = 0, size
        start = o * stride - before
    if dilation == 1:
        return minimum(start + kernel, hi) - maximum(start, lo)
    first = maximum(ceildiv(-start, dilation), 0)
    past = minimum(ceildiv(hi - start, dilation), kernel)
    return past - first
