"""gather and scatter families: data read or written at computed positions.

Negative positions count from the end. Positions outside the operand would be an error of the caller; they are moved
to the nearest end, so that memory outside is never touched; where an axis is empty, so that it has no end, nothing is
read or written.

A scatter copies its data into the result, then changes it in place. Updates are applied in order, so that the last of
equal positions wins; what cannot meet (other axes, the rest of a slice) runs in parallel or in vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vivace.base.dims import Dim, bounds, ceildiv, minimum, symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.loops.kernel import Binary, Cast, Const, Expr, For, Index, Kernel, Let, Load, Select, Stmt, Store, dtype_of
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.contraction import finish
from vivace.lower.rules.elementwise import Params, Tree
from vivace.lower.rules.epilogue import tail_flops
from vivace.lower.views import View, collapse

I64 = DType.i64
LANES = 64  # neighbouring elements of a slice that one unit of a scatter owns
NARROW = 8  # below this, the elements behind one position are too few to be the vector


def position(given: Expr, size: Dim) -> Expr:
    """A position within `size` elements from an index that may be negative; what lies outside becomes the nearest
    end."""
    at = given if dtype_of(given) is I64 else Cast(I64, given)
    zero = Const(0, I64)
    at = Select(Binary("lt", at, zero), Binary("add", at, Index(size)), at)
    return Binary("max", Binary("min", at, Index(size - 1)), zero)


def place(name: str, size: Dim) -> Dim:
    """The symbol of a position."""
    return symbol(name, 0, size - 1 if isinstance(size, int) and size > 1 else None)


# ---- gather ----------------------------------------------------------------------------------------------------------


def lower_gather(ctx: Lowering, g: Group) -> None:
    """data[.., indices, ..] with its epilogue; constant indices that advance evenly are a view."""
    node = g.anchor
    data_value, index_value = node.inputs
    assert data_value is not None and index_value is not None
    axis = node.attrs["axis"] % data_value.rank
    y, data = node.outputs[0], ctx.view(data_value)
    even = _even(index_value, data_value.shape[axis])
    if even is not None:
        start, step = even
        stride = data.strides[axis]
        strides = _spread(index_value, stride * step)
        moved = View(
            data.storage,
            data.dtype,
            y.shape,
            (*data.strides[:axis], *strides, *data.strides[axis + 1 :]),
            data.offset + start * stride,
        )
        ctx.views[y] = moved
        finish(ctx, g, moved)
        return
    indices = ctx.view(index_value)
    if data.storage is None:
        data = ctx.contiguous(data, data_value.name)
    k = index_value.rank
    rest = [n for n in g.nodes if n is not node]
    tree = Tree(ctx, rest, g.output, given=[y]) if rest else None
    leaves = dict(tree.leaves) if tree else {}
    over = [ctx.target(g.output), *leaves.values()]
    # The three parts of the result's axes: before the axis, those of the indices, and behind it; each merged on its
    # own.
    parts = [slice(0, axis), slice(axis, axis + k), slice(axis + k, y.rank)]
    data_parts = [_section(data, slice(0, axis)), None, _section(data, slice(axis + 1, data_value.rank))]
    index_parts = [None, indices, None]
    shapes: list[tuple[Dim, ...]] = []
    merged: list[list[View]] = []
    extra: list[View | None] = []
    for part, of_data, of_index in zip(parts, data_parts, index_parts, strict=True):
        views = [_section(v, part) for v in over]
        views += [v for v in (of_data, of_index) if v is not None]
        shape, found, _ = collapse(y.shape[part], views)
        shapes.append(shape)
        merged.append(found[: len(over)])
        extra.append(found[-1])
    params = Params()
    outer, middle, inner = ([symbol(f"{c}{i}", 0) for i in range(len(s))] for c, s in zip("omi", shapes, strict=True))
    before, lines, behind = extra
    assert before is not None and lines is not None and behind is not None
    joined = [
        View(v.storage, v.dtype, sum(shapes, ()), sum((m[i].strides for m in merged), ()), v.offset)
        for i, v in enumerate(over)
    ]
    source = View(
        data.storage, data.dtype, (*shapes[0], data_value.shape[axis], *shapes[2]),
        (*before.strides, data.strides[axis], *behind.strides), data.offset,
    )  # fmt: skip
    at = (*outer, *middle, *inner)
    let = Let("at", position(params.load(lines, tuple(middle)), data_value.shape[axis]))
    value = params.load(source, (*outer, place("at", data_value.shape[axis]), *inner))
    if tree is not None:
        by_leaf = dict(zip(leaves, joined[1:], strict=True))
        value = tree.expr(lambda v: params.load(by_leaf[v], at), {y: value})
    store = Store(params.buffer(joined[0], writable=True), at, value)
    _gather_loops(ctx, g, params, let, store, shapes, source)


def _even(indices: Value, size: Dim) -> tuple[Dim, int] | None:
    """Start and step of constant indices that advance evenly."""
    if indices.data is None or indices.data.size == 0:
        return None
    flat = indices.data.reshape(-1).astype(np.int64)
    if flat[0] < 0:
        if np.any(flat >= 0) or np.any(flat < -size if isinstance(size, int) else False):
            return None
    elif np.any(flat < 0) or not isinstance(size, int) or np.any(flat >= size):
        return None
    step = int(flat[1] - flat[0]) if flat.size > 1 else 0
    if np.any(np.diff(flat) != step):
        return None
    return (size + int(flat[0]) if flat[0] < 0 else int(flat[0])), step


def _spread(indices: Value, stride: Dim) -> tuple[Dim, ...]:
    """Strides of the axes of evenly advancing indices."""
    strides: list[Dim] = []
    for d in reversed(indices.shape):
        strides.append(stride)
        stride = stride * d
    return tuple(reversed(strides))


def _section(v: View, part: slice) -> View:
    return replace(v, shape=v.shape[part], strides=v.strides[part])


def _gather_loops(
    ctx: Lowering, g: Group, params: Params, let: Let, store: Store, shapes: list[tuple[Dim, ...]], source: View
) -> None:
    """Positions are loaded per slice where slices are wide, per element of a vector of positions otherwise."""
    outer, middle, inner = shapes
    narrow = not inner or (len(inner) == 1 and isinstance(inner[0], int) and inner[0] < NARROW)
    body: tuple[Stmt, ...] = (store,)
    loops = [(f"o{i}", n) for i, n in enumerate(outer)] + [(f"m{i}", n) for i, n in enumerate(middle)]
    if narrow and middle:
        for i in reversed(range(len(inner))):
            body = (For(f"i{i}", inner[i], body, "unroll"),)
        name, n = loops.pop()
        body = (For(name, n, (let, *body), "vector"),)
    else:
        for i in reversed(range(len(inner))):
            body = (For(f"i{i}", inner[i], body, "vector" if i == len(inner) - 1 else "serial"),)
        body = (let, *body)
    size = source.shape[len(outer)]
    _emit(ctx, g.anchor.op.name, params, loops, body, g.nodes, tail_flops(g), (size,), chosen=source)


def _emit(
    ctx: Lowering,
    label: str,
    params: Params,
    loops: Sequence[tuple[str, Dim]],
    body: tuple[Stmt, ...],
    nodes: Sequence[Node],
    flops: Dim,
    within: Sequence[Dim],
    updates: bool = False,
    chosen: View | None = None,
) -> None:
    """Parallel loops around a body, and the step. `within` are the sizes that positions are taken from: where one is 0
    the loops do not turn. Elements of `chosen` are read where positions say."""
    (first, n_first), *others = loops or [("only", 1)]
    for size in within:
        n_first = n_first * minimum(1, size)
    for name, n in reversed([(first, n_first), *others]):
        body = (For(name, n, body, "parallel"),)
    spec = Kernel("k", tuple(params.buffers), body)
    written = [i for i, b in enumerate(params.buffers) if b.writable]
    ctx.emit(label, spec, params.views, written, nodes, flops, updates=updates, chosen=chosen)


def lower_gather_elements(ctx: Lowering, g: Group) -> None:
    """Every element of the result has a position of its own along the axis."""
    node = g.anchor
    data_value, index_value = node.inputs
    assert data_value is not None and index_value is not None
    y = node.outputs[0]
    axis = node.attrs["axis"] % y.rank
    data, indices, out = _stored(ctx, data_value), ctx.view(index_value), ctx.target(y)
    params = Params()
    index = tuple(symbol(f"i{i}", 0) for i in range(y.rank))
    sizes = [n for i, n in enumerate(data_value.shape) if i == axis or not _reaches(y.shape[i], n)]
    at, lets = list(index), list[Stmt]()
    for i, n in enumerate(data_value.shape):
        if i == axis or not _reaches(y.shape[i], n):
            given = params.load(indices, index) if i == axis else Index(index[i])
            lets.append(Let(f"at{i}", position(given, n)))
            at[i] = place(f"at{i}", n)
    store = Store(params.buffer(out, writable=True), index, params.load(data, tuple(at)))
    inner: tuple[Stmt, ...] = (*lets, store)
    if y.rank:
        inner = (For(f"i{y.rank - 1}", y.shape[-1], inner, "vector"),)
    loops = [(f"i{i}", n) for i, n in enumerate(y.shape[:-1])]
    _emit(ctx, node.op.name, params, loops, inner, (node,), 0, sizes, chosen=data)


def _reaches(n: Dim, size: Dim) -> bool:
    """Whether `n` places lie within `size` for certain."""
    most = bounds(n - size)[1]
    return most is not None and most <= 0


def _stored(ctx: Lowering, value: Value) -> View:
    view = ctx.view(value)
    return ctx.contiguous(view, value.name) if view.storage is None else view


def _coordinates(
    params: Params, indices: View, lead: Sequence[Dim], shape: Sequence[Dim]
) -> tuple[list[Stmt], list[Dim]]:
    """Lets for the coordinates that `indices[lead..]` hold, for axes of the given sizes."""
    lets: list[Stmt] = []
    at: list[Dim] = []
    for k, n in enumerate(shape):
        lets.append(Let(f"at{k}", position(params.load(indices, (*lead, k)), n)))
        at.append(place(f"at{k}", n))
    return lets, at


def lower_gather_nd(ctx: Lowering, g: Group) -> None:
    """Each row of `indices` names a slice of the data."""
    node = g.anchor
    data_value, index_value = node.inputs
    assert data_value is not None and index_value is not None
    y, n_batch = node.outputs[0], node.attrs["batch_dims"]
    depth = index_value.shape[-1]
    assert isinstance(depth, int)
    data, indices, out = _stored(ctx, data_value), ctx.view(index_value), ctx.target(y)
    n_lead = index_value.rank - 1
    params = Params()
    index = tuple(symbol(f"i{i}", 0) for i in range(y.rank))
    lead, rest = index[:n_lead], index[n_lead:]
    lets, at = _coordinates(params, indices, lead, data_value.shape[n_batch : n_batch + depth])
    value = params.load(data, (*lead[:n_batch], *at, *rest))
    store = Store(params.buffer(out, writable=True), index, value)
    body: tuple[Stmt, ...] = (store,)
    loops = [(f"i{i}", n) for i, n in enumerate(y.shape[:n_lead])]
    if rest:
        for i in reversed(range(n_lead, y.rank)):
            body = (For(f"i{i}", y.shape[i], body, "vector" if i == y.rank - 1 else "serial"),)
        body = (*lets, *body)
    elif loops:
        name, n = loops.pop()
        body = (For(name, n, (*lets, *body), "vector"),)
    else:
        body = (*lets, *body)
    sizes = data_value.shape[n_batch : n_batch + depth]
    _emit(ctx, node.op.name, params, loops, body, (node,), 0, sizes, chosen=data)


# ---- scatter ---------------------------------------------------------------------------------------------------------


def _combined(old: Expr, new: Expr, reduction: str) -> Expr:
    if reduction == "none":
        return new
    if dtype_of(old) is DType.bool:
        return Binary("or" if reduction in ("add", "max") else "and", old, new)
    return Binary(reduction, old, new)


def _copied(ctx: Lowering, node: Node) -> View:
    """The result, holding the data already."""
    data_value = node.inputs[0]
    assert data_value is not None
    out = ctx.target(node.outputs[0])
    ctx.copy(ctx.view(data_value), out, (node,))
    return out


def lower_scatter_elements(ctx: Lowering, g: Group) -> None:
    """Lines along the axis are independent; within a line updates are applied in order."""
    node = g.anchor
    _, index_value, update_value = node.inputs[:3]
    assert index_value is not None and update_value is not None
    out = _copied(ctx, node)
    rank = len(out.shape)
    axis = node.attrs["axis"] % rank
    shape = [
        n if i == axis or _reaches(n, size) else minimum(n, size)
        for i, (n, size) in enumerate(zip(index_value.shape, out.shape, strict=True))
    ]
    indices, updates = ctx.view(index_value), ctx.view(update_value)
    params = Params()
    index = [symbol(f"i{i}", 0) for i in range(rank)]
    last = rank - 1
    across = axis != last
    if across:
        index[last] = symbol("b", 0) * LANES + symbol(f"i{last}", 0, LANES - 1)
    at = tuple(index)
    let = Let("at", position(params.load(indices, at), out.shape[axis]))
    update = params.load(updates, at)
    buffer = params.buffer(out, writable=True)
    target = tuple(place("at", out.shape[axis]) if i == axis else s for i, s in enumerate(at))
    store = Store(buffer, target, _combined(Load(buffer, target), update, node.attrs["reduction"]))
    body: tuple[Stmt, ...] = (let, store)
    loops = [(f"i{i}", n) for i, n in enumerate(shape) if i != axis and not (across and i == last)]
    if across:
        body = (For(f"i{last}", minimum(LANES, shape[last] - symbol("b", 0) * LANES), body, "vector"),)
        loops.append(("b", ceildiv(shape[last], LANES)))
    body = (For(f"i{axis}", shape[axis], body),)
    _emit(ctx, node.op.name, params, loops, body, (node,), node.cost.flops, (out.shape[axis],), updates=True)


def lower_scatter_nd(ctx: Lowering, g: Group) -> None:
    """Slices are updated in order, each by vectors; units own parts of the slices."""
    node = g.anchor
    _, index_value, update_value = node.inputs[:3]
    assert index_value is not None and update_value is not None
    out = _copied(ctx, node)
    depth, n_lead = index_value.shape[-1], index_value.rank - 1
    assert isinstance(depth, int)
    indices, updates = ctx.view(index_value), ctx.view(update_value)
    rank = len(update_value.shape)
    params = Params()
    index: list[Dim] = [symbol(f"i{i}", 0) for i in range(rank)]
    sliced = rank > n_lead
    if sliced:
        index[-1] = symbol("b", 0) * LANES + symbol(f"i{rank - 1}", 0, LANES - 1)
    lets, at = _coordinates(params, indices, index[:n_lead], out.shape[:depth])
    update = params.load(updates, tuple(index))
    buffer = params.buffer(out, writable=True)
    target = (*at, *index[n_lead:])
    body: tuple[Stmt, ...] = (Store(buffer, target, _combined(Load(buffer, target), update, node.attrs["reduction"])),)
    loops = [(f"i{i}", update_value.shape[i]) for i in range(n_lead, rank - 1)]
    if sliced:
        body = (For(f"i{rank - 1}", minimum(LANES, update_value.shape[-1] - symbol("b", 0) * LANES), body, "vector"),)
        loops.append(("b", ceildiv(update_value.shape[-1], LANES)))
    body = (*lets, *body)
    for i in reversed(range(n_lead)):
        body = (For(f"i{i}", update_value.shape[i], body),)
    _emit(ctx, node.op.name, params, loops, body, (node,), node.cost.flops, out.shape[:depth], updates=True)
