"""Nearest resize by whole factors: every element is repeated, no position is computed.

Before: out[.., y, x] = in[.., y // 2, x // 2]     After: out[.., y, r, x, s] = in[.., y, x], with r and s from 0 to 1

Where the repeated axis is the contiguous one, `s` would be too short a vector. Then the copies of an element are stored
as one wider integer, or, where other nodes follow, read by a gather; and an element is read once for all rows that it
goes to.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vivace.base.dims import Dim, exact_div, prod
from vivace.base.dtypes import DType
from vivace.graph.graph import Attrs, Value
from vivace.graph.ops.resampling import nearest_index, source_coordinates
from vivace.loops.kernel import Binary, Cast, Const, Expr, For, Let, LoopKind, Read, Stmt, Store, dtype_of
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.elementwise import Params, Tree, loop_order, loop_var
from vivace.lower.views import View

MAX_ROWS = 8  # copies of a row that are written side by side: as many streams as the hardware prefetches
_UNSIGNED = {1: DType.u8, 2: DType.u16, 4: DType.u32, 8: DType.u64}


class Tail:
    """The element-wise nodes after a resize. `leaves` lie over the result; `value` applies the nodes to one element."""

    def __init__(self, ctx: Lowering, g: Group) -> None:
        self.y = g.anchor.outputs[0]
        rest = [n for n in g.nodes if n is not g.anchor]
        self.tree = Tree(ctx, rest, g.output, given=[self.y]) if rest else None
        self.leaves: dict[Value, View] = dict(self.tree.leaves) if self.tree else {}

    def value(self, params: Params, index: tuple[Dim, ...], x: Expr) -> Expr:
        if self.tree is None:
            return x
        return self.tree.expr(lambda v: params.load(self.leaves[v], index), {self.y: x})

    def reshape(self, shape: tuple[Dim, ...]) -> bool:
        """Bring the leaves to another shape of the result; False where one cannot be."""
        leaves = {v: view.reshape(shape) for v, view in self.leaves.items()}
        self.leaves = {v: view for v, view in leaves.items() if view is not None}
        return len(self.leaves) == len(leaves)


def repeats(size: Dim, out: Dim, scale: float | None, attrs: Attrs) -> int:
    """The whole factor by which a nearest resize repeats every element of an axis in place, 0 where it does not."""
    if attrs["mode"] != "nearest":
        return 0
    factor = exact_div(out, size) if size != 0 else None
    if not isinstance(factor, int) or factor < 1 or scale not in (None, float(factor)):
        return 0
    # What happens to the copies of one element is the same at every element, since only align_corners depends on the
    # length.
    probe = 4
    at = source_coordinates(probe, probe * factor, float(factor), attrs["coordinate"])
    if not np.array_equal(nearest_index(at, probe, attrs["nearest_mode"]), np.arange(probe * factor) // factor):
        return 0
    return factor if attrs["coordinate"] != "align_corners" or factor == 1 else 0


Written = tuple[Params, tuple[Stmt, ...]]


def repeat(ctx: Lowering, g: Group, x: View, out: View, factors: dict[int, int]) -> Written | None:
    """The kernel's parameters and loops; None where a view cannot be split into (position, copy)."""
    factors = {a: f for a, f in factors.items() if f > 1}
    near = next((a for a in factors if out.strides[a] == 1), None)
    tail = Tail(ctx, g)
    if near is None:
        return _split(x, out, factors, tail)
    others = {a: f for a, f in factors.items() if a != near}
    if not tail.leaves and tail.tree is None:
        wide = _widened(x, out, near, factors[near])
        if wide is not None:
            return _rows(*wide, near, 1, others, tail)
    return _rows(x, out, near, factors[near], others, tail)


def _split(x: View, out: View, factors: dict[int, int], tail: Tail) -> Written | None:
    shape: list[Dim] = []
    strides: list[Dim] = []
    for a, n in enumerate(x.shape):
        shape += [n, factors[a]] if a in factors else [n]
        strides += [x.strides[a], 0] if a in factors else [x.strides[a]]
    source, target = replace(x, shape=tuple(shape), strides=tuple(strides)), out.reshape(tuple(shape))
    if target is None or not tail.reshape(tuple(shape)):
        return None
    params = Params()
    index = tuple(0 if n == 1 else loop_var(i, n) for i, n in enumerate(shape))
    value = tail.value(params, index, params.load(source, index))
    order = [a for a in loop_order(tuple(shape), target, [source, *tail.leaves.values()]) if shape[a] != 1]
    body: tuple[Stmt, ...] = (Store(params.buffer(target, writable=True), index, value),)
    return params, _nest(body, order, shape)


def _nest(body: tuple[Stmt, ...], order: Sequence[int], shape: Sequence[Dim]) -> tuple[Stmt, ...]:
    """The last axis as the vector, up to two around it serial (a row is enough for a unit), the others parallel."""
    serial = min(2, len(order) - 2)
    for depth, a in enumerate(reversed(order)):
        kind: LoopKind = "vector" if depth == 0 else "serial" if depth <= serial else "parallel"
        body = (For(f"i{a}", shape[a], body, kind),)
    return body if len(order) > 1 else (For("only", 1, body, "parallel"),)


# ---- rows ------------------------------------------------------------------------------------------------------------


def _widened(x: View, out: View, near: int, factor: int) -> tuple[View, View] | None:
    """Both views as unsigned integers, those of the result as wide as all copies of an element together."""
    size = x.dtype.size_bytes
    strides = [s if a == near else exact_div(s, factor) for a, s in enumerate(out.strides)]
    if size * factor not in _UNSIGNED or any(s is None for s in strides):
        return None
    shape = tuple(n if a != near else x.shape[near] for a, n in enumerate(out.shape))
    target = replace(
        out, dtype=_UNSIGNED[size * factor], shape=shape, strides=tuple(s for s in strides if s is not None)
    )
    return replace(x, dtype=_UNSIGNED[size]), target


def _copies(x: Expr, to: DType) -> Expr:
    """An unsigned integer that holds `x` side by side as often as it fits."""
    bits = dtype_of(x).size_bytes * 8
    if dtype_of(x) is to:
        return x
    x = Cast(to, x)
    while bits < to.size_bytes * 8:
        x = Binary("bitor", x, Binary("shl", x, Const(bits, to)))
        bits *= 2
    return x


def _rows(x: View, out: View, near: int, factor: int, others: dict[int, int], tail: Tail) -> Written | None:
    """The contiguous axis as the vector; rows that are copies of each other are written together."""
    shape: list[Dim] = []
    source: list[Dim] = []
    copies: list[int] = []  # axes over the copies
    for a, n in enumerate(x.shape):
        at = len(shape)
        i = loop_var(at, out.shape[a] if a == near else n)
        source.append(i // factor if a == near else i)
        shape.append(out.shape[a] if a == near else n)
        if a in others:
            copies.append(len(shape))
            shape.append(others[a])
    target = out.reshape(tuple(shape))
    if target is None or not tail.reshape(tuple(shape)):
        return None
    params = Params()
    loaded = params.load(x, tuple(source))
    if tail.tree is None:
        loaded = _copies(loaded, out.dtype)
    read = Read("x", dtype_of(loaded))
    together = prod([shape[a] for a in copies])
    assert isinstance(together, int)
    if together > MAX_ROWS:
        picks: list[tuple[Dim, ...]] = [tuple(loop_var(a, shape[a]) for a in copies)]
    else:
        picks = list(itertools.product(*(range(others[a]) for a in sorted(others))))
    values = []
    indices = []
    for pick in picks:
        chosen = dict(zip(copies, pick, strict=True))
        indices.append(tuple(chosen[a] if a in chosen else loop_var(a, n) for a, n in enumerate(shape)))
        values.append(tail.value(params, indices[-1], read))
    buffer = params.buffer(target, writable=True)
    body: tuple[Stmt, ...] = (Let("x", loaded), *(Store(buffer, i, v) for i, v in zip(indices, values, strict=True)))
    looped = copies if together > MAX_ROWS else []
    row = next(a for a, n in enumerate(_origin(x.shape, others)) if n == near)
    order = [a for a in range(len(shape)) if a != row and (a not in copies or a in looped)] + [row]
    for depth, a in enumerate(reversed(order)):
        body = (For(f"i{a}", shape[a], body, "parallel" if depth else "vector"),)
    return params, body if len(order) > 1 else (For("only", 1, body, "parallel"),)


def _origin(shape: Sequence[Dim], others: dict[int, int]) -> list[int]:
    """For each axis of the split shape, the axis it comes from; -1 for those over copies."""
    found: list[int] = []
    for a in range(len(shape)):
        found += [a, -1] if a in others else [a]
    return found
