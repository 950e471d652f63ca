"""Element-wise groups and copies: one loop nest over the result, operands read through aligned views."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vivace.base.dims import Dim, ceildiv, minimum, prod, symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.loops.kernel import Buffer, Const, Expr, For, Index, Kernel, Load, Stmt, Store
from vivace.lower.group import Group
from vivace.lower.halves import HALVES
from vivace.lower.lowering import Lowering
from vivace.lower.magnitude import BOUNDED, magnitude
from vivace.lower.requantize import quantize, summed
from vivace.lower.scalar import literal, scalar
from vivace.lower.views import View, collapse

# Elements of a flat loop that one unit of parallel work computes: 16 KiB of f32, half of the smallest L1 in use.
BLOCK = 4096
# Below this an innermost axis is copied element by element: a masked vector costs more (measured on 3-channel images).
NARROW = 6
SIDE = 32  # rows of a block that is transposed on the way: a few squares, and whole cache lines
Build = Callable[[list[Expr]], Expr]


def loop_var(i: int, extent: Dim) -> Dim:
    """The index of loop `i`, bounded by its extent where that is known."""
    return symbol(f"i{i}", 0, extent - 1 if isinstance(extent, int) and extent > 1 else None)


class Params:
    """Parameter buffers of a kernel under construction: one per distinct view, in order of first use."""

    def __init__(self) -> None:
        self.views: list[View] = []
        self.buffers: list[Buffer] = []

    def buffer(self, view: View, writable: bool = False) -> Buffer:
        for v, b in zip(self.views, self.buffers, strict=True):
            if v == view and b.writable == writable:
                return b
        b = view.buffer(f"p{len(self.buffers)}", writable)
        self.views.append(view)
        self.buffers.append(b)
        return b

    def load(self, view: View, index: tuple[Dim, ...]) -> Expr:
        """The element of a view; an iota's element is an index expression."""
        if view.storage is None:
            at: Dim = view.offset
            for i, s in zip(index, view.strides, strict=True):
                at = at + i * s
            return Index(at, view.dtype)
        return Load(self.buffer(view), index)


class Tree:
    """The expression of a group of element-wise nodes over leaves (values computed elsewhere)."""

    def __init__(self, ctx: Lowering, nodes: Sequence[Node], root: Value, given: Sequence[Value] = ()) -> None:
        self.ctx, self.root = ctx, root
        self.inside = {n.outputs[0]: n for n in nodes}
        self.given = set(given)
        self.leaves: dict[Value, View] = {}
        self._visit(root)

    def _visit(self, v: Value) -> None:
        seen: set[Value] = set()
        stack = [v]
        while stack:
            v = stack.pop()
            if v in seen or v in self.given:
                continue
            seen.add(v)
            if v in self.inside:
                stack += [u for u in reversed(self.inside[v].inputs) if u is not None]
            elif not is_scalar_constant(v):
                self.leaves[v] = self.ctx.view(v).expand(self.root.shape)

    def _element(self, n: Node, args: list[Expr]) -> Expr:
        """What a node does to one element; bytes that are stored are clipped as integers where they are known to fit
        i32."""
        x, zero = args[0], args[-1]
        is_last = n.op.name == "quantize" and n.outputs[0] is self.root and isinstance(zero, Const)
        if is_last and args[1] == Const(1.0, DType.f32) and magnitude(n.inputs[0], self.ctx.producer) < BOUNDED:
            return quantize(summed(x), int(zero.value), n.outputs[0].dtype, is_bounded=True)  # type: ignore[union-attr]
        return scalar(n, args)

    def expr(self, leaf: Callable[[Value], Expr], given: dict[Value, Expr] | None = None) -> Expr:
        """The root as an expression. Shared nodes share one object, which the code generator computes once."""
        made: dict[Value, Expr] = dict(given or {})

        def visit(v: Value) -> Expr:
            if v not in made:
                if v in self.inside:
                    made[v] = self._element(self.inside[v], [visit(u) for u in self.inside[v].inputs if u is not None])
                elif is_scalar_constant(v):
                    assert v.data is not None
                    made[v] = literal(v.data.reshape(-1)[0], v.dtype)
                else:
                    made[v] = leaf(v)
            return made[v]

        return visit(self.root)


def is_scalar_constant(v: Value) -> bool:
    return v.data is not None and v.data.size == 1


def lower_elementwise(ctx: Lowering, g: Group) -> None:
    """A tree of element-wise nodes."""
    tree = Tree(ctx, g.nodes, g.output)
    values = list(tree.leaves)
    out = ctx.target(g.output)

    def build(xs: list[Expr]) -> Expr:
        at = dict(zip(values, xs, strict=True))
        return tree.expr(at.__getitem__)

    label = "+".join(dict.fromkeys(n.op.name for n in g.nodes))
    emit_pointwise(ctx, label, list(tree.leaves.values()), out, build, g.nodes)


def emit_pointwise(
    ctx: Lowering, label: str, leaves: Sequence[View], out: View, build: Build, nodes: Sequence[Node]
) -> None:
    """A kernel that stores `build(leaves' elements)` over the whole of `out`. All leaves have out's shape."""
    flops: Dim = 0
    for n in nodes:
        flops = flops + n.cost.flops
    shape, merged, _ = collapse(out.shape, [out, *leaves])
    out_view, leaf_views = merged[0], merged[1:]
    if not shape:  # a single element
        shape = (1,)
        out_view, *leaf_views = [View(v.storage, v.dtype, (1,), (1,), v.offset) for v in merged]
    order = loop_order(shape, out_view, leaf_views)
    params = Params()
    index = [loop_var(i, n) for i, n in enumerate(shape)]
    inner = order[-1]
    flat = len(shape) == 1
    if flat:
        index[0] = symbol("b", 0) * BLOCK + symbol("i0", 0, BLOCK - 1)
    turned = None if flat else _turned_axis(shape, inner, out_view, leaf_views)
    narrow = None if flat else _narrow_axis(shape, inner, out_view, leaf_views)
    if turned is not None:
        index[turned] = symbol("b", 0) * SIDE + index[turned]
    elif narrow is not None:
        if not _fits(shape[inner]):
            index[inner] = symbol("b", 0) * BLOCK + index[inner]
    at = tuple(index)
    value = build([params.load(v, at) for v in leaf_views])
    store = Store(params.buffer(out_view, writable=True), at, value)
    loops: Stmt
    if flat:
        length = shape[0]
        if _fits(length):
            loops = For("b", 1, (For("i0", length, (store,), "vector"),), "parallel")
        else:
            loops = For(
                "b",
                ceildiv(length, BLOCK),
                (For("i0", minimum(BLOCK, length - symbol("b", 0) * BLOCK), (store,), "vector"),),
                "parallel",
            )
    else:
        loops = _nest(shape, order, store, turned, narrow)
    moved: Dim = prod(out.shape) * out.dtype.size_bytes
    for v in leaves:
        if v.storage is not None:
            part: Dim = v.dtype.size_bytes
            for d, s in zip(v.shape, v.strides, strict=True):
                part = part * (1 if s == 0 else d)
            moved = moved + part
    spec = Kernel("k", tuple(params.buffers), (loops,))
    ctx.emit(label, spec, params.views, len(params.views) - 1, nodes, flops, moved)


def _nest(shape: tuple[Dim, ...], order: list[int], store: Stmt, turned: int | None, narrow: int | None) -> Stmt:
    """The loops around a store: parallel ones, the innermost axis as a vector.

    `turned`: an axis along which operands lie, next to the vector, in blocks (the code generator transposes squares).
    `narrow`: an axis of a few elements, contiguous in the result, written out inside the vector.
    """
    inner = order[-1]
    n_inner = shape[inner]
    outer = [a for a in order[:-1] if a not in (turned, narrow)]
    loops: Stmt
    if turned is not None:
        n = shape[turned]
        loops = For(f"i{inner}", n_inner, (store,), "vector")
        loops = For(f"i{turned}", minimum(SIDE, n - symbol("b", 0) * SIDE), (loops,), "serial")
        loops = For("b", ceildiv(n, SIDE), (loops,), "parallel")
    elif narrow is not None:
        loops = For(f"i{narrow}", shape[narrow], (store,), "unroll")
        if _fits(n_inner):
            loops = For(f"i{inner}", n_inner, (loops,), "vector")
        else:
            loops = For(f"i{inner}", minimum(BLOCK, n_inner - symbol("b", 0) * BLOCK), (loops,), "vector")
            loops = For("b", ceildiv(n_inner, BLOCK), (loops,), "parallel")
        if not outer and _fits(n_inner):
            loops = For("b", 1, (loops,), "parallel")
    else:
        small = isinstance(n_inner, int) and n_inner < NARROW and len(shape) > 2
        loops = For(f"i{inner}", n_inner, (store,), "unroll" if small else "vector")
        if small:
            loops = For(f"i{outer[-1]}", shape[outer[-1]], (loops,), "serial")
            outer = outer[:-1]
    for axis in reversed(outer):
        loops = For(f"i{axis}", shape[axis], (loops,), "parallel")
    return loops


def _turned_axis(shape: tuple[Dim, ...], inner: int, out: View, leaves: Sequence[View]) -> int | None:
    """An axis other than the result's contiguous one along which an operand is contiguous."""
    if out.strides[inner] != 1 or not _at_least(shape[inner], NARROW):
        return None
    for v in leaves:
        if v.storage is None or v.strides[inner] in (0, 1) or v.dtype.size_bytes != 4:
            continue
        for axis, stride in enumerate(v.strides):
            if stride == 1 and axis != inner and _at_least(shape[axis], NARROW):
                return axis
    return None


def _narrow_axis(shape: tuple[Dim, ...], inner: int, out: View, leaves: Sequence[View]) -> int | None:
    """An axis of a few elements that is contiguous in the result, of which the innermost loop steps over whole runs."""
    if any(v.strides[inner] not in (0, 1) for v in leaves) or (out.dtype.size_bytes != 4 and out.dtype not in HALVES):
        return None
    width = out.strides[inner]
    for axis, n in enumerate(shape):
        if axis == inner or out.strides[axis] != 1 or not isinstance(n, int) or not isinstance(width, int):
            continue
        if 2 <= n <= width <= 8:
            return axis
    return None


def _fits(n: Dim) -> bool:
    """Whether one unit of parallel work may walk the whole axis."""
    return isinstance(n, int) and n <= BLOCK


def _at_least(n: Dim, least: int) -> bool:
    return not isinstance(n, int) or n >= least


def loop_order(shape: tuple[Dim, ...], out: View, leaves: Sequence[View]) -> list[int]:
    """Loop axes, outermost first. The innermost is the one along which most operands are contiguous or constant."""
    last = len(shape) - 1
    if last == 0:
        return [0]

    def score(axis: int) -> float:
        total = 0.0
        for v, weight in [(out, 4.0)] + [(x, 1.0) for x in leaves if x.storage is not None]:
            total += weight * (1.0 if v.strides[axis] == 1 else 0.75 if v.strides[axis] == 0 else 0.0)
        n = shape[axis]
        return total * (min(n, 16) / 16 if isinstance(n, int) else 1.0)

    inner = max(range(len(shape)), key=lambda a: (score(a), a))
    return [a for a in range(len(shape)) if a != inner] + [inner]


def dims_values(ctx: Lowering, g: Group) -> None:
    """`dims`: store each value."""
    out = ctx.target(g.output)
    params = Params()
    buffer = params.buffer(out, writable=True)
    stores = tuple(Store(buffer, (i,), Index(d, DType.i64)) for i, d in enumerate(g.anchor.attrs["values"]))
    spec = Kernel("k", tuple(params.buffers), (For("b", 1, stores, "parallel"),))
    ctx.emit("dims", spec, params.views, 0, g.nodes, 0)
