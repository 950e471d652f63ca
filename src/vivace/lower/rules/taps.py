"""Where a resampled element comes from: per axis, source positions and weights.

Those of a static axis are constant tables; those of a symbolic one are expressions in f64, rounded where they are used.

Source: `graph.ops.resampling`, which defines the coordinates and the tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Attrs
from vivace.graph.ops.resampling import nearest_index, source_coordinates, tap_table
from vivace.loops.expressions import add, div, mul, sub
from vivace.loops.kernel import Binary, Cast, Const, Expr, Index, Let, Read, Select, Unary
from vivace.lower.lowering import Lowering
from vivace.lower.rules.elementwise import Params

F64, I64 = DType.f64, DType.i64


@dataclass(frozen=True, slots=True)
class Taps:
    """One axis at one position of the result: lets that name what follows, then `(source index, weight)` per tap."""

    lets: tuple[Let, ...]
    taps: tuple[tuple[Dim, Expr | None], ...]


def taps_of(ctx: Lowering, params: Params, axis: int, size: Dim, out: Dim, at: Dim, attrs: Attrs, kind: DType) -> Taps:
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
    how = (attrs[k] for k in ("mode", "coordinate", "nearest_mode", "cubic_coeff", "exclude_outside"))
    settings = (size, out, scale, *how)
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


def _f64(value: float) -> Const:
    return Const(float(value), F64)


def _num(d: Dim) -> Expr:
    return Cast(F64, Index(d, I64))


def coordinate(at: Dim, size: Dim, out: Dim, scale: float | None, how: str) -> Expr:
    """The source coordinate of a position as an f64 expression."""
    ratio = div(_num(out), _num(size)) if scale is None else _f64(scale)
    i = _num(at)
    middle = sub(div(add(i, _f64(0.5)), ratio), _f64(0.5))
    match how:
        case "asymmetric":
            return div(i, ratio)
        case "align_corners":
            length = _num(out) if scale is None else mul(ratio, _num(size))
            stretched = div(mul(i, _num(size - 1)), sub(length, _f64(1)))
            return Select(Binary("eq", length, _f64(1)), _f64(0), stretched)
        case "pytorch_half_pixel":
            return Select(Binary("eq", _num(out), _f64(1)), _f64(0), middle)
        case "half_pixel_symmetric":
            adjustment = div(_num(out), mul(ratio, _num(size)))
            shift = mul(div(_num(size), _f64(2)), sub(_f64(1), adjustment))
            return add(shift, middle)
        case _:
            return middle


def _computed(axis: int, size: Dim, out: Dim, at: Dim, attrs: Attrs, kind: DType) -> Taps:
    """Positions and weights from the coordinate, for axes of symbolic size."""
    x = Read(f"x{axis}", F64)
    lets = [Let(f"x{axis}", coordinate(at, size, out, attrs["scales"][axis], attrs["coordinate"]))]
    last = Index(size - 1, I64)

    def clamped(name: str, position: Expr) -> Dim:
        bounded = Binary("max", Binary("min", position, last), Const(0, I64))
        lets.append(Let(name, bounded))
        return symbol(name, 0)

    if attrs["mode"] == "nearest":
        half = _f64(0.5)
        rounded = {
            "floor": Unary("floor", x),
            "ceil": Unary("ceil", x),
            "round_prefer_floor": Unary("ceil", sub(x, half)),
            "round_prefer_ceil": Unary("floor", add(x, half)),
        }[attrs["nearest_mode"]]
        return Taps(
            (*lets, Let(f"at{axis}", Binary("max", Binary("min", Cast(I64, rounded), last), Const(0, I64)))),
            ((symbol(f"at{axis}", 0), None),),
        )
    lets += [Let(f"base{axis}", Cast(I64, Unary("floor", x))), Let(f"t{axis}", sub(x, Unary("floor", x)))]
    base, t = Read(f"base{axis}", I64), Read(f"t{axis}", F64)
    weights = _weights(t, attrs)
    offsets = (0, 1) if attrs["mode"] == "linear" else (-1, 0, 1, 2)
    positions = [add(base, Const(o, I64)) for o in offsets]
    if attrs["exclude_outside"]:
        inside = [Binary("and", Binary("ge", p, Const(0, I64)), Binary("le", p, last)) for p in positions]
        weights = [Select(c, w, _f64(0)) for c, w in zip(inside, weights, strict=True)]
        total = weights[0]
        for w in weights[1:]:
            total = add(total, w)
        lets.append(Let(f"total{axis}", total))
        weights = [div(w, Read(f"total{axis}", F64)) for w in weights]
    taps = []
    for k, (position, weight) in enumerate(zip(positions, weights, strict=True)):
        lets.append(Let(f"w{axis}_{k}", weight if kind is F64 else Cast(kind, weight)))
        taps.append((clamped(f"at{axis}_{k}", position), Read(f"w{axis}_{k}", kind)))
    return Taps(tuple(lets), tuple(taps))


def _weights(t: Expr, attrs: Attrs) -> list[Expr]:
    """Weights of the taps for a fraction `t`, in f64."""
    rest = sub(_f64(1), t)
    if attrs["mode"] == "linear":
        return [rest, t]
    a = attrs["cubic_coeff"]

    def near(d: Expr) -> Expr:
        return add(mul(mul(sub(mul(_f64(a + 2), d), _f64(a + 3)), d), d), _f64(1))

    def far(d: Expr) -> Expr:
        inner = add(mul(sub(mul(_f64(a), d), _f64(5 * a)), d), _f64(8 * a))
        return sub(mul(inner, d), _f64(4 * a))

    return [far(add(_f64(1), t)), near(t), near(rest), far(sub(_f64(2), t))]
