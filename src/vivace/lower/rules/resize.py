"""resize: nearest, linear and cubic, along any axes, with the element-wise nodes that follow.

* nearest by a whole factor repeats elements: the result, its resampled axes split into (position, copy), reads the
  operand as it is;
* otherwise each result is a weighted sum over the taps of each resampled axis. Positions and weights of a static axis
  are tables; those of a symbolic one are computed in f64, once per position where another axis is the vector.

Source: `graph.ops.resampling`, which defines the coordinates.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vivace.base.dims import Dim, exact_div, symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Attrs, Value
from vivace.graph.ops.resampling import nearest_index, source_coordinates
from vivace.loops.kernel import (
    Binary,
    Cast,
    Const,
    Expr,
    For,
    Index,
    Kernel,
    Let,
    LoopKind,
    Read,
    Select,
    Stmt,
    Store,
    Unary,
    dtype_of,
)
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.contraction import tail_flops
from vivace.lower.rules.elementwise import Params, Tree, loop_order, loop_var
from vivace.lower.views import View

F64, I64 = DType.f64, DType.i64
TAPS = {"nearest": 1, "linear": 2, "cubic": 4}


class Tail:
    """The element-wise nodes after the resize: `leaves` lie over the result; `store` writes an element through them."""

    def __init__(self, ctx: Lowering, g: Group) -> None:
        self.y = g.anchor.outputs[0]
        rest = [n for n in g.nodes if n is not g.anchor]
        self.tree = Tree(ctx, rest, g.output, given=[self.y]) if rest else None
        self.leaves: dict[Value, View] = dict(self.tree.leaves) if self.tree else {}

    def value(self, params: Params, index: tuple[Dim, ...], x: Expr) -> Expr:
        if self.tree is None:
            return x
        return self.tree.expr(lambda v: params.load(self.leaves[v], index), {self.y: x})


def lower_resize(ctx: Lowering, g: Group) -> None:
    """Repeat where that is all there is to do, sample otherwise."""
    node = g.anchor
    x_value = node.inputs[0]
    assert x_value is not None
    attrs, y = node.attrs, node.outputs[0]
    axes = [
        a for a in range(y.rank)
        if not (attrs["sizes"][a] == x_value.shape[a] and attrs["scales"][a] in (None, 1.0))
    ]  # fmt: skip
    x, out, tail = ctx.view(x_value), ctx.target(g.output), Tail(ctx, g)
    factors = {a: repeats(x_value.shape[a], y.shape[a], attrs["scales"][a], attrs) for a in axes}
    if not all(factors.values()) or not _repeat(ctx, g, x, out, tail, factors):
        _sample(ctx, g, x, out, tail, axes)


# ---- repetition ------------------------------------------------------------------------------------------------------


def repeats(size: Dim, out: Dim, scale: float | None, attrs: Attrs) -> int:
    """The whole factor by which a nearest resize repeats every element of an axis in place, 0 where it does not."""
    if attrs["mode"] != "nearest":
        return 0
    factor = exact_div(out, size) if size != 0 else None
    if not isinstance(factor, int) or factor < 1 or scale not in (None, float(factor)):
        return 0
    # What happens to the copies of one element is the same at every element but the first and the last.
    probe = 4
    at = source_coordinates(probe, probe * factor, float(factor), attrs["coordinate"])
    if not np.array_equal(nearest_index(at, probe, attrs["nearest_mode"]), np.arange(probe * factor) // factor):
        return 0
    # Only where the position does not depend on the length is a probe a proof.
    return factor if attrs["coordinate"] != "align_corners" or factor == 1 else 0


def _repeat(ctx: Lowering, g: Group, x: View, out: View, tail: Tail, factors: dict[int, int]) -> bool:
    """Split resampled axes into (position, copy); False where a view cannot be split."""
    split: list[Dim] = []
    repeated: list[Dim] = []
    strides: list[Dim] = []
    for a, n in enumerate(x.shape):
        split += [n, factors[a]] if a in factors else [n]
        repeated += [n, factors[a]] if a in factors else [n]
        strides += [x.strides[a], 0] if a in factors else [x.strides[a]]
    shape = tuple(split)
    source = replace(x, shape=shape, strides=tuple(strides))
    target = out.reshape(shape)
    leaves = {v: view.reshape(shape) for v, view in tail.leaves.items()}
    if target is None or any(view is None for view in leaves.values()):
        return False
    tail.leaves = leaves  # type: ignore[assignment]
    params = Params()
    index = tuple(0 if n == 1 else loop_var(i, n) for i, n in enumerate(shape))
    value = tail.value(params, index, params.load(source, index))
    order = [a for a in loop_order(shape, target, [source, *tail.leaves.values()]) if shape[a] != 1]
    body: tuple[Stmt, ...] = (Store(params.buffer(target, writable=True), index, value),)
    _nest(ctx, g, params, body, order, shape)
    return True


def _nest(
    ctx: Lowering, g: Group, params: Params, body: tuple[Stmt, ...], order: Sequence[int], shape: Sequence[Dim]
) -> None:
    """The innermost axis as the vector, up to two around it serial (a row is enough for a unit), the others
    parallel."""
    serial = min(2, len(order) - 2)
    for depth, a in enumerate(reversed(order)):
        kind: LoopKind = "vector" if depth == 0 else "serial" if depth <= serial else "parallel"
        body = (For(f"i{a}", shape[a], body, kind),)
    if len(order) < 2:
        body = (For("only", 1, body, "parallel"),)
    _emit(ctx, g, params, body)


def _emit(ctx: Lowering, g: Group, params: Params, body: tuple[Stmt, ...]) -> None:
    spec = Kernel("k", tuple(params.buffers), body)
    ctx.emit("resize", spec, params.views, len(params.views) - 1, g.nodes, tail_flops(g))


# ---- sampling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Taps:
    """One axis at one position of the result: lets that name what follows, then `(source index, weight)` per tap."""

    lets: tuple[Let, ...]
    taps: tuple[tuple[Dim, Expr | None], ...]


def _sample(ctx: Lowering, g: Group, x: View, out: View, tail: Tail, axes: Sequence[int]) -> None:
    node, shape = g.anchor, out.shape
    params = Params()
    index = tuple(loop_var(i, n) for i, n in enumerate(shape))
    kind = DType.f32 if x.dtype in (DType.f32, DType.f16, DType.bf16) else F64
    taps = {a: _taps(ctx, params, a, x.shape[a], shape[a], index[a], node.attrs, kind) for a in axes}
    value = _weighted(params, x, list(index), taps, list(axes), kind)
    if x.dtype is not dtype_of(value):
        value = _narrowed(value, x.dtype)
    value = tail.value(params, index, value)
    store = Store(params.buffer(out, writable=True), index, value)
    order = loop_order(shape, out, [x, *tail.leaves.values()]) if shape else []
    lets = {a: taps[a].lets if a in taps else () for a in order}
    # Each resampled axis names its taps where its position is known: in its own loop, or inside all the parallel ones.
    *around, last = order or [-1]
    body: tuple[Stmt, ...] = (store,)
    if order:
        body = (For(f"i{last}", shape[last], (*lets[last], store), "vector"),)
    if len(around) > 1:
        serial = around.pop()
        body = (For(f"i{serial}", shape[serial], (*lets[serial], *body)),)
    body = (*itertools.chain.from_iterable(lets[a] for a in around), *body)
    for a in reversed(around):
        body = (For(f"i{a}", shape[a], body, "parallel"),)
    if not around:
        body = (For("only", 1, body, "parallel"),)
    _emit(ctx, g, params, body)


def _weighted(params: Params, x: View, index: list[Dim], taps: dict[int, Taps], axes: list[int], kind: DType) -> Expr:
    """The sum over the taps of `axes`, the first axis outermost."""
    if not axes:
        loaded = params.load(x, tuple(index))
        return (
            loaded
            if x.dtype is kind or all(w is None for t in taps.values() for _, w in t.taps)
            else Cast(kind, loaded)
        )
    a, *rest = axes
    total: Expr | None = None
    for source, weight in taps[a].taps:
        term = _weighted(params, x, [source if i == a else d for i, d in enumerate(index)], taps, rest, kind)
        term = term if weight is None else Binary("mul", weight, term)
        total = term if total is None else Binary("add", total, term)
    assert total is not None
    return total


def _narrowed(value: Expr, to: DType) -> Expr:
    """The value in the operand's type; integers are cut towards zero and bounded, as the reference does."""
    if to.is_int and to.size_bytes <= 4:
        limits = np.iinfo(to.numpy)
        value = Binary("min", Binary("max", value, Const(float(limits.min), F64)), Const(float(limits.max), F64))
    return Cast(to, value)


def _taps(ctx: Lowering, params: Params, axis: int, size: Dim, out: Dim, at: Dim, attrs: Attrs, kind: DType) -> Taps:
    if isinstance(size, int) and isinstance(out, int) and size and out:
        return _table(ctx, params, axis, size, out, at, attrs, kind)
    return _computed(axis, size, out, at, attrs, kind)


def _table(ctx: Lowering, params: Params, axis: int, size: int, out: int, at: Dim, attrs: Attrs, kind: DType) -> Taps:
    """Positions and weights from constant tables [tap, position]."""
    scale = attrs["scales"][axis]
    x = source_coordinates(size, out, scale, attrs["coordinate"])
    if attrs["mode"] == "nearest":
        positions, weights = nearest_index(x, size, attrs["nearest_mode"])[None], None
    else:
        positions, weights = tap_table(x, size, attrs)
    settings = (
        size,
        out,
        scale,
        *(attrs[k] for k in ("mode", "coordinate", "nearest_mode", "cubic_coeff", "exclude_outside")),
    )
    where = ctx.constant(positions.astype(np.int32), "resize_positions", ("resize", "at", *settings))
    bound = size - 1 if size > 1 else None
    lets, taps = [], []
    for k in range(len(positions)):
        lets.append(Let(f"at{axis}_{k}", params.load(where, (k, at))))
        weight: Expr | None = None
        if weights is not None:
            table = ctx.constant(weights.astype(kind.numpy), "resize_weights", ("resize", "weight", kind, *settings))
            lets.append(Let(f"w{axis}_{k}", params.load(table, (k, at))))
            weight = Read(f"w{axis}_{k}", kind)
        taps.append((symbol(f"at{axis}_{k}", 0, bound), weight))
    return Taps(tuple(lets), tuple(taps))


def _near(d: np.ndarray, a: float) -> np.ndarray:
    """Weight of a cubic tap at distance `d` up to 1."""
    return ((a + 2) * d - (a + 3)) * d * d + 1


def _far(d: np.ndarray, a: float) -> np.ndarray:
    """The same at distance 1 to 2."""
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a


def tap_table(x: np.ndarray, size: int, attrs: Attrs) -> tuple[np.ndarray, np.ndarray]:
    """Source positions (within the operand) and weights [tap, position] for linear and cubic."""
    base = np.floor(x)
    t = x - base
    if attrs["mode"] == "linear":
        offsets, weights = [0, 1], [1 - t, t]
    else:
        a = attrs["cubic_coeff"]
        offsets, weights = [-1, 0, 1, 2], [_far(1 + t, a), _near(t, a), _near(1 - t, a), _far(2 - t, a)]
    positions = np.stack([base + o for o in offsets]).astype(np.int64)
    table = np.stack(weights)
    if attrs["exclude_outside"]:
        table = np.where((positions >= 0) & (positions < size), table, 0.0)
        table = table / table.sum(axis=0)
    return np.clip(positions, 0, size - 1), table


def _f64(value: float) -> Const:
    return Const(float(value), F64)


def _num(d: Dim) -> Expr:
    return Cast(F64, Index(d, I64))


def _op(fn: str, a: Expr, b: Expr) -> Expr:
    return Binary(fn, a, b)


def coordinate(at: Dim, size: Dim, out: Dim, scale: float | None, how: str) -> Expr:
    """The source coordinate of a position as an f64 expression."""
    ratio = _op("div", _num(out), _num(size)) if scale is None else _f64(scale)
    i = _num(at)
    middle = _op("sub", _op("div", _op("add", i, _f64(0.5)), ratio), _f64(0.5))
    match how:
        case "asymmetric":
            return _op("div", i, ratio)
        case "align_corners":
            length = _num(out) if scale is None else _op("mul", ratio, _num(size))
            stretched = _op("div", _op("mul", i, _num(size - 1)), _op("sub", length, _f64(1)))
            return Select(_op("eq", length, _f64(1)), _f64(0), stretched)
        case "pytorch_half_pixel":
            return Select(_op("eq", _num(out), _f64(1)), _f64(0), middle)
        case "half_pixel_symmetric":
            adjustment = _op("div", _num(out), _op("mul", ratio, _num(size)))
            shift = _op("mul", _op("div", _num(size), _f64(2)), _op("sub", _f64(1), adjustment))
            return _op("add", shift, middle)
        case _:
            return middle


def _computed(axis: int, size: Dim, out: Dim, at: Dim, attrs: Attrs, kind: DType) -> Taps:
    """Positions and weights from the coordinate, for axes of symbolic size."""
    x = Read(f"x{axis}", F64)
    lets = [Let(f"x{axis}", coordinate(at, size, out, attrs["scales"][axis], attrs["coordinate"]))]
    last = Index(size - 1, I64)

    def clamped(name: str, position: Expr) -> Dim:
        bounded = _op("max", _op("min", position, last), Const(0, I64))
        lets.append(Let(name, bounded))
        return symbol(name, 0)

    if attrs["mode"] == "nearest":
        half = _f64(0.5)
        rounded = {
            "floor": Unary("floor", x),
            "ceil": Unary("ceil", x),
            "round_prefer_floor": Unary("ceil", _op("sub", x, half)),
            "round_prefer_ceil": Unary("floor", _op("add", x, half)),
        }[attrs["nearest_mode"]]
        return Taps(
            (*lets, Let(f"at{axis}", _op("max", _op("min", Cast(I64, rounded), last), Const(0, I64)))),
            ((symbol(f"at{axis}", 0), None),),
        )
    lets += [Let(f"base{axis}", Cast(I64, Unary("floor", x))), Let(f"t{axis}", _op("sub", x, Unary("floor", x)))]
    base, t = Read(f"base{axis}", I64), Read(f"t{axis}", F64)
    weights = _weights(t, attrs)
    offsets = (0, 1) if attrs["mode"] == "linear" else (-1, 0, 1, 2)
    positions = [_op("add", base, Const(o, I64)) for o in offsets]
    if attrs["exclude_outside"]:
        inside = [_op("and", _op("ge", p, Const(0, I64)), _op("le", p, last)) for p in positions]
        weights = [Select(c, w, _f64(0)) for c, w in zip(inside, weights, strict=True)]
        total = weights[0]
        for w in weights[1:]:
            total = _op("add", total, w)
        lets.append(Let(f"total{axis}", total))
        weights = [_op("div", w, Read(f"total{axis}", F64)) for w in weights]
    taps = []
    for k, (position, weight) in enumerate(zip(positions, weights, strict=True)):
        lets.append(Let(f"w{axis}_{k}", weight if kind is F64 else Cast(kind, weight)))
        taps.append((clamped(f"at{axis}_{k}", position), Read(f"w{axis}_{k}", kind)))
    return Taps(tuple(lets), tuple(taps))


def _weights(t: Expr, attrs: Attrs) -> list[Expr]:
    """Weights of the taps for a fraction `t`, in f64."""
    rest = _op("sub", _f64(1), t)
    if attrs["mode"] == "linear":
        return [rest, t]
    a = attrs["cubic_coeff"]

    def near(d: Expr) -> Expr:
        return _op("add", _op("mul", _op("mul", _op("sub", _op("mul", _f64(a + 2), d), _f64(a + 3)), d), d), _f64(1))

    def far(d: Expr) -> Expr:
        inner = _op("add", _op("mul", _op("sub", _op("mul", _f64(a), d), _f64(5 * a)), d), _f64(8 * a))
        return _op("sub", _op("mul", inner, d), _f64(4 * a))

    return [far(_op("add", _f64(1), t)), near(t), near(rest), far(_op("sub", _f64(2), t))]
