"""Ops that look along an axis in order: argmax, argmin and cumsum (topk has a file of its own).

argmax and argmin take two passes over the axis, both vectorized: the extreme value, then the least (or greatest)
position that holds it. A NaN counts as the extreme, the first one if there are several, as in NumPy. A cumsum is a
running total for each line. Lines whose neighbours are contiguous share vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vivace.base.dims import Dim, ceildiv, minimum, prod, symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Node
from vivace.loops.kernel import (
    Alloc,
    Binary,
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
    Select,
    Stmt,
    Store,
    Unary,
    dtype_of,
)  # fmt: skip
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.elementwise import Params
from vivace.lower.views import View, collapse

LANES = 64  # neighbouring lines that one unit scans together: four 512-bit vectors of f32


@dataclass(frozen=True, slots=True)
class Lines:
    """A scan over one axis: views of shape (outer.., axis, inner), where inner is one axis, maybe of extent 1.

    `index(i, at)` is the element of line `i` at position `at`.
    """

    outer: tuple[Dim, ...]
    length: Dim
    inner: Dim
    views: tuple[View, ...]
    lengths: tuple[Dim, ...]

    @property
    def symbols(self) -> tuple[Dim, ...]:
        return tuple(symbol(f"o{i}", 0) for i in range(len(self.outer)))


def lines_of(axis: int, views: Sequence[View]) -> Lines:
    """Bring views that agree but for the extent of `axis` to the form outer, axis, inner."""
    rank = len(views[0].shape)
    rest = [i for i in range(rank) if i != axis]
    shape = tuple(views[0].shape[i] for i in rest)
    flat = [replace(v, shape=shape, strides=tuple(v.strides[i] for i in rest)) for v in views]
    merged_shape, merged, _ = collapse(shape, flat)
    near = _vector_axis(merged_shape, merged[0])
    order = [i for i in range(len(merged_shape)) if i != near]
    outer = tuple(merged_shape[i] for i in order)
    inner: Dim = merged_shape[near] if near is not None else 1
    made = []
    for v, m in zip(views, merged, strict=True):
        last = m.strides[near] if near is not None else 1
        strides = (*(m.strides[i] for i in order), v.strides[axis], last)
        made.append(View(v.storage, v.dtype, (*outer, v.shape[axis], inner), strides, v.offset))
    return Lines(outer, views[0].shape[axis], inner, tuple(made), tuple(v.shape[axis] for v in views))


def _vector_axis(shape: tuple[Dim, ...], x: View) -> int | None:
    """The axis whose neighbours are scanned together: the contiguous one."""
    return next((i for i in reversed(range(len(shape))) if x.strides[i] == 1), None)


def lower_arg(ctx: Lowering, g: Group) -> None:
    """argmax and argmin: along the vector where the axis is contiguous, otherwise neighbouring lines share a vector."""
    node = g.anchor
    x_value, y = node.inputs[0], node.outputs[0]
    assert x_value is not None
    axis = node.attrs["axis"] % x_value.rank
    x, out = ctx.view(x_value), ctx.target(y)
    wide = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    if not node.attrs["keepdims"]:
        out = replace(out, shape=wide, strides=(*out.strides[:axis], 0, *out.strides[axis:]))
    lines = lines_of(axis, (x, out))
    x, out = lines.views
    params = Params()
    outs = lines.symbols
    across = lines.inner != 1 and x.strides[-2] != 1
    block: Dim = symbol("b", 0) * LANES + symbol("i", 0, LANES - 1) if across else symbol("i", 0)
    if lines.inner == 1:
        block = 0
    r = symbol("r", 0)
    at = params.load(x, (*outs, r, block))
    fn = "max" if node.op.name == "argmax" else "min"
    at = Cast(DType.u8, at) if dtype_of(at) is DType.bool else at
    kind = DType.i32 if _fits_i32(lines.length) else DType.i64
    last = node.attrs["select_last"]
    top = Read("top", dtype_of(at))
    hit: Expr = Binary("eq", at, top)
    if dtype_of(at).is_float:
        hit = Binary("or", hit, Unary("isnan", at))
    miss = Const(-1, kind) if last else Index(lines.length, kind)
    where = Reduce("max" if last else "min", "r", lines.length, Select(hit, Index(r, kind), miss))
    body: tuple[Stmt, ...] = (
        Let("top", Reduce(fn, "r", lines.length, at)),
        Store(params.buffer(out, writable=True), (*outs, 0, block), Cast(DType.i64, where)),
    )
    if across:
        body = (For("i", minimum(LANES, lines.inner - symbol("b", 0) * LANES), body, "vector"),)
        body = (For("b", ceildiv(lines.inner, LANES), body, "parallel"),)
    elif lines.inner != 1:
        body = (For("i", lines.inner, body, "parallel"),)
    emit_lines(ctx, node.op.name, lines, params, body, (node,), node.cost.flops)


def _fits_i32(n: Dim) -> bool:
    return isinstance(n, int) and n < 1 << 31


def emit_lines(
    ctx: Lowering, label: str, lines: Lines, params: Params, body: tuple[Stmt, ...], nodes: Sequence[Node], flops: Dim
) -> None:
    """Put the parallel loops over the outer axes around `body` and append the step."""
    for i in reversed(range(len(lines.outer))):
        body = (For(f"o{i}", lines.outer[i], body, "parallel"),)
    if not (len(body) == 1 and isinstance(body[0], For) and body[0].kind == "parallel"):
        body = (For("only", 1, body, "parallel"),)
    order = sorted(range(len(params.buffers)), key=lambda i: params.buffers[i].writable)
    written = [k for k, i in enumerate(order) if params.buffers[i].writable]
    spec = Kernel("k", tuple(params.buffers[i] for i in order), body)
    ctx.emit(label, spec, [params.views[i] for i in order], written, nodes, flops)


def lower_cumsum(ctx: Lowering, g: Group) -> None:
    """A running total per line; neighbouring lines share a vector where the axis is not the contiguous one."""
    node = g.anchor
    x_value, y = node.inputs[0], node.outputs[0]
    assert x_value is not None
    lines = lines_of(node.attrs["axis"] % y.rank, (ctx.view(x_value), ctx.target(y)))
    x, out = lines.views
    params = Params()
    outs = lines.symbols
    across = lines.inner != 1
    lane: Dim = symbol("b", 0) * LANES + symbol("i", 0, LANES - 1) if across else 0
    place: Dim = symbol("i", 0, LANES - 1) if across else 0
    kind = DType.f32 if y.dtype in (DType.f16, DType.bf16) else y.dtype
    total = Buffer("total", kind, (LANES if across else 1,), (1,), writable=True)
    s = symbol("s", 0)
    at = lines.length - 1 - s if node.attrs["reverse"] else s
    given = params.load(x, (*outs, at, lane))
    given = given if dtype_of(given) is kind else Cast(kind, given)
    before, after = Load(total, (place,)), Read("sum", kind)
    result: Expr = Read("before", kind) if node.attrs["exclusive"] else after
    result = result if kind is y.dtype else Cast(y.dtype, result)
    turn: tuple[Stmt, ...] = (
        Let("before", before),
        Let("sum", Binary("add", Read("before", kind), given)),
        Store(total, (place,), after),
        Store(params.buffer(out, writable=True), (*outs, at, lane), result),
    )
    start: tuple[Stmt, ...] = (Store(total, (place,), Const(0.0 if kind.is_float else 0, kind)),)
    if across:
        width = minimum(LANES, lines.inner - symbol("b", 0) * LANES)
        turn = (For("i", width, turn, "vector"),)
        start = (For("i", width, start, "vector"),)
    body: tuple[Stmt, ...] = (Alloc(total), *start, For("s", lines.length, turn))
    if across:
        body = (For("b", ceildiv(lines.inner, LANES), body, "parallel"),)
    emit_lines(ctx, "cumsum", lines, params, body, (node,), prod(y.shape))
