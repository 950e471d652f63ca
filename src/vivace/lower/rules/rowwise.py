"""Ops that look at a whole row before they write it: softmax, normalizations, reductions.

The normalized axis is made the last and contiguous. Each row passes through the result's own row as staging when the
operand is an expression, so no scratch is needed. Statistics are kept in f32, those of f64 in f64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vivace.base.dims import ceildiv, minimum, prod, symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Type, Value, freeze
from vivace.loops.expressions import add, div, mul, sub
from vivace.loops.kernel import (
    Buffer,
    Cast,
    Const,
    Expr,
    For,
    Index,
    Kernel,
    Let,
    Load,
    Read,
    Reduce,
    Stmt,
    Store,
    Unary,
    dtype_of,
)
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.contraction import deliver
from vivace.lower.rules.elementwise import Params, Tree, loop_var
from vivace.lower.rules.epilogue import tail_flops
from vivace.lower.views import View, collapse

F32 = DType.f32
FEW = 4  # contiguous elements per result, up to which results share a vector
# Rows of a normalization in one turn of its loop: what waits for the sums of one fills the processor's scheduler, and
# the next row is not begun meanwhile. 128 rows of 384 take 0.8 of the time, 512 rows 0.85; four gain no more (1 thread,
# Emerald Rapids).
TOGETHER = 2
LANES = 64  # channels that one unit of a column reduction computes: four 512-bit vectors hide the latency of an add


def number(x: float, dtype: DType) -> Const:
    return Const(float(x), dtype)


class Rows:
    """The loops and views of a row kernel: `index` walks the rows, `col` the elements of a row.

    `extra` views have the shape of the result too (broadcast where they do not vary).
    """

    def __init__(self, ctx: Lowering, g: Group, first: int, extra: Sequence[View] = ()) -> None:
        x_value = g.anchor.inputs[0]
        assert x_value is not None
        y = g.anchor.outputs[0]
        self.rest = [n for n in g.nodes if n is not g.anchor]
        self.y = y
        self.anchor, self.group = g.anchor, g
        self.tree = Tree(ctx, self.rest, g.output, given=[y]) if self.rest else None
        leaves = list(self.tree.leaves.values()) if self.tree else []
        self.x, self.out = ctx.operand(x_value), ctx.target(g.output)
        self.dtype = x_value.dtype
        views = [self.x, self.out, *extra, *leaves]
        rows, cols = y.shape[:first], y.shape[first:]
        _, row_views, row_runs = collapse(rows, [_leading(v, first) for v in views])
        _, col_views, col_runs = collapse(cols, [_trailing(v, first) for v in views])
        self.row_shape = tuple(prod([rows[a] for a in r]) for r in row_runs)
        self.col_shape = tuple(prod([cols[a] for a in r]) for r in col_runs) or (1,)
        joined = []
        for v, r, c in zip(views, row_views, col_views, strict=True):
            strides = (*r.strides, *(c.strides or (0,)))
            joined.append(View(v.storage, v.dtype, (*self.row_shape, *self.col_shape), strides, v.offset))
        self.x, self.out = joined[0], joined[1]
        self.extra = joined[2 : 2 + len(extra)]
        self.leaves = dict(zip(self.tree.leaves, joined[2 + len(extra) :], strict=True)) if self.tree else {}
        self.params = Params()
        self.index = tuple(symbol(f"i{i}", 0) for i in range(len(self.row_shape)))
        self.cols = tuple(loop_var(len(self.row_shape) + i, n) for i, n in enumerate(self.col_shape))
        self.at = (*self.index, *self.cols)
        self.length = prod(self.col_shape)

    def reduce(self, fn: str, x: Expr) -> Expr:
        for i in reversed(range(len(self.col_shape))):
            x = Reduce(fn, f"i{len(self.row_shape) + i}", self.col_shape[i], x)
        return x

    def each(self, *body: Stmt) -> Stmt:
        """A loop over the elements of the row."""
        inner: tuple[Stmt, ...] = body
        for i in reversed(range(len(self.col_shape))):
            kind = "vector" if i == len(self.col_shape) - 1 else "serial"
            inner = (For(f"i{len(self.row_shape) + i}", self.col_shape[i], inner, kind),)  # type: ignore[arg-type]
        return inner[0]

    def load_x(self) -> Expr:
        return _as(self.params.load(self.x, self.at), self.dtype)

    def load(self, view: View) -> Expr:
        return self.params.load(view, self.at)

    def staged(self) -> Expr:
        """What an earlier loop of this kernel stored at this element of the result."""
        return Load(self._out(), self.at)

    def store(self, value: Expr, last: bool = True) -> Stmt:
        """Store an element; the last store applies the epilogue."""
        if last and self.tree is not None:
            value = self.tree.expr(lambda v: self.params.load(self.leaves[v], self.at), {self.y: value})
        return Store(self._out(), self.at, value)

    def _out(self) -> Buffer:
        for b in self.params.buffers:
            if b.writable:
                return b
        return self.params.buffer(self.out, writable=True)

    @property
    def together(self) -> int:
        """Rows that one turn of the loop computes, where their number is known to be a multiple."""
        n = self.row_shape[-1] if self.row_shape else 1
        return TOGETHER if isinstance(n, int) and n % TOGETHER == 0 else 1

    def move_to(self, k: int) -> None:
        """To the kth of the rows that are computed together."""
        if self.together > 1:
            self.index = (*self.index[:-1], symbol(f"i{len(self.index) - 1}", 0) * self.together + k)
            self.at = (*self.index, *self.cols)

    def emit(self, ctx: Lowering, label: str, body: Sequence[Stmt], together: int = 1) -> None:
        loops: tuple[Stmt, ...] = tuple(body)
        for i in reversed(range(len(self.row_shape))):
            n = self.row_shape[i] // together if i == len(self.row_shape) - 1 else self.row_shape[i]
            loops = (For(f"i{i}", n, loops, "parallel"),)
        if not self.row_shape:
            loops = (For("i_only", 1, loops, "parallel"),)
        params = self.params
        written = next(i for i, b in enumerate(params.buffers) if b.writable)
        order = [i for i in range(len(params.buffers)) if i != written] + [written]
        spec = Kernel("k", tuple(params.buffers[i] for i in order), loops)
        ctx.emit(
            label, spec, [params.views[i] for i in order], len(order) - 1, self.group.nodes, tail_flops(self.group)
        )


def _leading(v: View, n: int) -> View:
    return View(v.storage, v.dtype, v.shape[:n], v.strides[:n], v.offset)


def _trailing(v: View, n: int) -> View:
    return View(v.storage, v.dtype, v.shape[n:], v.strides[n:], v.offset)


def _can_stage(rows: Rows) -> bool:
    """The result's row can hold intermediate values: it has their dtype and no epilogue operand lies in the same
    memory."""
    return rows.out.dtype is rows.y.dtype and all(v.storage is not rows.out.storage for v in rows.leaves.values())


def lower_softmax(ctx: Lowering, g: Group) -> None:
    """exp(x - max) / sum, over one axis; log_softmax: x - max - log(sum).

    Source: the usual shift by the maximum, which keeps every exponent at most 0.
    """
    axis = g.anchor.attrs["axis"] % g.anchor.outputs[0].rank
    rank = g.anchor.outputs[0].rank
    if axis != rank - 1:
        _on_last_axis(ctx, g, axis)
        return
    rows = Rows(ctx, g, rank - 1)
    x = rows.load_x()
    t = g.anchor.outputs[0].dtype
    top, one = Read("top", t), number(1, t)
    body: list[Stmt] = [Let("top", rows.reduce("maxnum", x))]
    if g.anchor.op.name == "log_softmax":
        body += [Let("total", Unary("log", rows.reduce("add", Unary("exp", sub(x, top)))))]
        body += [rows.each(rows.store(sub(sub(x, top), Read("total", t))))]
    elif _can_stage(rows):
        body += [rows.each(rows.store(Unary("exp", sub(x, top)), last=False))]
        body += [Let("scale", div(one, rows.reduce("add", rows.staged())))]
        body += [rows.each(rows.store(mul(rows.staged(), Read("scale", t))))]
    else:
        body += [Let("scale", div(one, rows.reduce("add", Unary("exp", sub(x, top)))))]
        body += [rows.each(rows.store(mul(Unary("exp", sub(x, top)), Read("scale", t))))]
    rows.emit(ctx, g.anchor.op.name, body)


def _on_last_axis(ctx: Lowering, g: Group, axis: int) -> None:
    """Run a softmax over an inner axis on transposed copies."""
    x_value, y = g.anchor.inputs[0], g.anchor.outputs[0]
    assert x_value is not None
    perm = (*(i for i in range(y.rank) if i != axis), axis)
    back = tuple(perm.index(i) for i in range(y.rank))
    x = Value(f"{x_value.name}_last", Type(x_value.dtype, tuple(x_value.shape[p] for p in perm)))
    t = Value(f"{y.name}_last", x.type)
    ctx.views[x] = ctx.contiguous(ctx.view(x_value).transpose(perm), x.name)
    ctx.views[t] = ctx.temporary(t.name, t.dtype, t.shape)
    node = replace(g.anchor, inputs=(x,), outputs=(t,), attrs=freeze({**g.anchor.attrs, "axis": y.rank - 1}))
    lower_softmax(ctx, Group(node, g.position, (node,), t))
    deliver(ctx, g, ctx.views[t].transpose(back))


def lower_norm(ctx: Lowering, g: Group) -> None:
    """layer_norm and rms_norm over the trailing axes: two passes for the statistics (the mean first), one to write;
    each for a few rows.

    Source: two-pass variance, so no cancellation between E[x^2] and E[x]^2.
    """
    node = g.anchor
    y = node.outputs[0]
    first = node.attrs["axis"] % y.rank
    x_value = node.inputs[0]
    assert x_value is not None
    affine = [v for v in node.inputs[1:] if v is not None]
    scale = node.inputs[1] if len(node.inputs) > 1 else None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    rows = Rows(ctx, g, first, [ctx.view(v).expand(y.shape) for v in affine])
    at = dict(zip(affine, rows.extra, strict=True))
    t = DType.f64 if x_value.dtype is DType.f64 else F32
    inverse = div(number(1, t), Cast(t, Index(rows.length, DType.i64)))
    eps = number(node.attrs["epsilon"], t)
    means, deviations, results = list[Stmt](), list[Stmt](), list[Stmt]()
    for k in range(rows.together):
        rows.move_to(k)
        centered = x = _as(rows.load_x(), t)
        if node.op.name == "layer_norm":
            means.append(Let(f"mean{k}", mul(rows.reduce("add", x), inverse)))
            centered = sub(x, Read(f"mean{k}", t))
        square = mul(rows.reduce("add", mul(centered, centered)), inverse)
        deviations.append(Let(f"scale{k}", div(number(1, t), Unary("sqrt", add(square, eps)))))
        value: Expr = mul(centered, Read(f"scale{k}", t))
        if scale is not None:
            value = mul(value, _as(rows.load(at[scale]), t))
        if bias is not None:
            value = add(value, _as(rows.load(at[bias]), t))
        results.append(rows.each(rows.store(_as(value, y.dtype))))
    rows.emit(ctx, node.op.name, [*means, *deviations, *results], rows.together)


def _as(x: Expr, dtype: DType) -> Expr:
    return x if dtype_of(x) is dtype else Cast(dtype, x)


_REDUCE = {"reduce_sum": "add", "reduce_mean": "add", "reduce_max": "max", "reduce_min": "min", "reduce_prod": "mul"}


def lower_reduce(ctx: Lowering, g: Group) -> None:
    """Reductions over any axes. Rows are reduced along the vector where the reduced axis is contiguous and long;
    otherwise neighbouring results share a vector."""
    node = g.anchor
    x_value, y = node.inputs[0], node.outputs[0]
    assert x_value is not None
    axes = sorted({a % x_value.rank for a in node.attrs["axes"]})
    keep = [a for a in range(x_value.rank) if a not in axes]
    x = ctx.operand(x_value)
    kept_shape = tuple(x.shape[a] for a in keep)
    rest = [n for n in g.nodes if n is not node]
    tree = Tree(ctx, rest, g.output, given=[y]) if rest else None
    out = ctx.target(g.output)
    full_to_kept = keep if node.attrs["keepdims"] else list(range(len(keep)))

    def kept(v: View) -> View:
        return View(v.storage, v.dtype, kept_shape, tuple(v.strides[a] for a in full_to_kept), v.offset)

    leaves = list(tree.leaves.items()) if tree else []
    x_kept = View(x.storage, x.dtype, kept_shape, tuple(x.strides[a] for a in keep), x.offset)
    shape, merged, _ = collapse(kept_shape, [kept(out), x_kept, *(kept(v) for _, v in leaves)])
    red_shape, red, _ = collapse(
        tuple(x.shape[a] for a in axes),
        [View(x.storage, x.dtype, tuple(x.shape[a] for a in axes), tuple(x.strides[a] for a in axes))],
    )
    params = Params()
    taps = tuple(symbol(f"r{i}", 0) for i in range(len(red_shape)))
    rank = len(shape)
    n_reduced = prod(red_shape)
    few = isinstance(n_reduced, int) and n_reduced <= FEW  # a vector over the results reads every second, third ..
    along_rows = not shape or (bool(red_shape) and red[0].strides[-1] == 1 and not few)
    index = [symbol(f"i{i}", 0) for i in range(rank)]
    block = not along_rows
    if block:
        index[-1] = symbol("b", 0) * LANES + symbol(f"i{rank - 1}", 0)
    x_all = View(x.storage, x.dtype, (*shape, *red_shape), (*merged[1].strides, *red[0].strides), x.offset)
    value: Expr = _as(params.load(x_all, (*index, *taps)), x_value.dtype)
    for i in reversed(range(len(red_shape))):
        value = Reduce(_REDUCE[node.op.name], f"r{i}", red_shape[i], value)
    if node.op.name == "reduce_mean":
        count = prod(red_shape)
        if y.dtype.is_float:
            value = mul(value, div(Const(1.0, y.dtype), Cast(y.dtype, Index(count, DType.i64))))
        else:
            value = div(value, Cast(y.dtype, Index(count, DType.i64)))
    body: list[Stmt] = []
    if along_rows:
        body.append(Let("result", value))
        value = Read("result", y.dtype)
    if tree is not None:
        at = {v: m for (v, _), m in zip(leaves, merged[2:], strict=True)}
        value = tree.expr(lambda v: params.load(at[v], tuple(index)), {y: value})
    store = Store(params.buffer(merged[0], writable=True), tuple(index), value)
    body.append(store)
    loops: tuple[Stmt, ...] = tuple(body)
    if block:
        n = shape[-1]
        loops = (For(f"i{rank - 1}", minimum(LANES, n - symbol("b", 0) * LANES), loops, "vector"),)
        loops = (For("b", ceildiv(n, LANES), loops, "parallel"),)
    outer = shape[:-1] if block else shape
    for i in reversed(range(len(outer))):
        loops = (For(f"i{i}", outer[i], loops, "parallel"),)
    if not shape:
        loops = (For("i_only", 1, loops, "parallel"),)
    ctx.emit(
        node.op.name,
        Kernel("k", tuple(params.buffers), loops),
        params.views,
        len(params.views) - 1,
        g.nodes,
        tail_flops(g),
    )
