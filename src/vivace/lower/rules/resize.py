"""resize: nearest, linear and cubic, along any axes, with the element-wise nodes that follow.

* nearest by a whole factor repeats elements (`repeat.py`);
* otherwise each result is a weighted sum over the taps of each resampled axis (`taps.py`). Where the vector runs along
  a resampled axis, the other axes are summed first, into a local row, so that the positions along the vector are
  gathered once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.loops.expressions import add, mul
from vivace.loops.kernel import (
    Alloc,
    Binary,
    Buffer,
    Cast,
    Const,
    Expr,
    For,
    Kernel,
    Load,
    Stmt,
    Store,
    dtype_of,
)
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.elementwise import Params, loop_order, loop_var
from vivace.lower.rules.epilogue import tail_flops
from vivace.lower.rules.repeat import Tail, repeat, repeats
from vivace.lower.rules.taps import Taps, taps_of
from vivace.lower.views import View

MAX_ROW = 8192  # elements of a local row: more would leave the first-level cache
SHRINKS = 8  # beyond this factor, summing whole rows costs more than gathering every tap


def lower_resize(ctx: Lowering, g: Group) -> None:
    """Repeat where that is all there is to do, sample otherwise."""
    node = g.anchor
    x_value = node.inputs[0]
    assert x_value is not None
    attrs, y = node.attrs, node.outputs[0]
    pairs = list(zip(attrs["sizes"], x_value.shape, attrs["scales"], strict=True))
    axes = [a for a, (size, n, scale) in enumerate(pairs) if not (size == n and scale in (None, 1.0))]
    x, out = ctx.view(x_value), ctx.target(g.output)
    factors = {a: repeats(x_value.shape[a], y.shape[a], attrs["scales"][a], attrs) for a in axes}
    written = repeat(ctx, g, x, out, factors) if all(factors.values()) else None
    params, body = written or _sample(ctx, g, x, out, axes)
    spec = Kernel("k", tuple(params.buffers), body)
    ctx.emit("resize", spec, params.views, len(params.views) - 1, g.nodes, tail_flops(g))


def _sample(ctx: Lowering, g: Group, x: View, out: View, axes: Sequence[int]) -> tuple[Params, tuple[Stmt, ...]]:
    attrs, shape, tail = g.anchor.attrs, out.shape, Tail(ctx, g)
    params = Params()
    index = tuple(loop_var(i, n) for i, n in enumerate(shape))
    kind = DType.f32 if x.dtype in (DType.f32, DType.f16, DType.bf16) else DType.f64
    taps = {a: taps_of(ctx, params, a, x.shape[a], shape[a], index[a], attrs, kind) for a in axes}
    order = loop_order(shape, out, [x, *tail.leaves.values()]) if shape else []
    lets = {a: taps[a].lets if a in taps else () for a in order}
    *around, last = order or [-1]
    by_rows = attrs["mode"] != "nearest" and last in taps and len(axes) > 1 and _has_row(x.shape[last], shape[last])
    first: list[Stmt] = []
    if by_rows:
        q: Dim = symbol("q", 0)
        row = Buffer("row", kind, (x.shape[last],), (1,), writable=True)
        others = [a for a in axes if a != last]
        along = _weighted(params, x, [q if i == last else d for i, d in enumerate(index)], taps, others, kind)
        first = [Alloc(row), For("q", x.shape[last], (Store(row, (q,), along),), "vector")]
        value = _sum([(weight, Load(row, (source,))) for source, weight in taps[last].taps])
    else:
        value = _weighted(params, x, list(index), taps, list(axes), kind)
    if x.dtype is not dtype_of(value):
        value = _narrowed(value, x.dtype)
    value = tail.value(params, index, value)
    store = Store(params.buffer(out, writable=True), index, value)
    # Each resampled axis names its taps where its position is known: in its own loop, or inside all the parallel ones.
    body: tuple[Stmt, ...] = (store,)
    if order:
        body = (*first, For(f"i{last}", shape[last], (*lets[last], store), "vector"))
    if len(around) > 1 and not by_rows:
        serial = around.pop()
        body = (For(f"i{serial}", shape[serial], (*lets[serial], *body)),)
    body = (*itertools.chain.from_iterable(lets[a] for a in around), *body)
    for a in reversed(around):
        body = (For(f"i{a}", shape[a], body, "parallel"),)
    return params, body if around else (For("only", 1, body, "parallel"),)


def _has_row(size: Dim, out: Dim) -> bool:
    return isinstance(size, int) and 0 < size <= MAX_ROW and not (isinstance(out, int) and out * SHRINKS < size)


def _weighted(params: Params, x: View, index: list[Dim], taps: dict[int, Taps], axes: list[int], kind: DType) -> Expr:
    """The sum over the taps of `axes`, the first axis outermost."""
    if not axes:
        loaded = params.load(x, tuple(index))
        plain = x.dtype is kind or all(w is None for t in taps.values() for _, w in t.taps)
        return loaded if plain else Cast(kind, loaded)
    a, *rest = axes
    terms = []
    for source, weight in taps[a].taps:
        at = [source if i == a else d for i, d in enumerate(index)]
        terms.append((weight, _weighted(params, x, at, taps, rest, kind)))
    return _sum(terms)


def _sum(terms: Sequence[tuple[Expr | None, Expr]]) -> Expr:
    """The sum of weighted terms; a weight of None is 1."""
    total: Expr | None = None
    for weight, x in terms:
        term = x if weight is None else mul(weight, x)
        total = term if total is None else add(total, term)
    assert total is not None
    return total


def _narrowed(value: Expr, to: DType) -> Expr:
    """The value in the operand's type; integers are cut towards zero and bounded, as the reference does."""
    if to.is_int and to.size_bytes <= 4:
        limits = np.iinfo(to.numpy)
        low, high = Const(float(limits.min), DType.f64), Const(float(limits.max), DType.f64)
        value = Binary("min", Binary("max", value, low), high)
    return Cast(to, value)
