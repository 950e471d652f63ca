"""Loops that read along one axis and write along another: done in square tiles that are transposed in registers.

    for u in U:  vector v in V:  y[u, v] = f(x[v, u], ..)       x contiguous along u, y along v

becomes, for each square of W x W elements: load W rows of x (vectors along u), transpose them into the thread's
scratch, then run the body for W values of u with vectors along v, reading the scratch instead of x.

Where the instruction set has masks they cover the edges of the space; elsewhere the edges are left to ordinary loops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vivace.base.dims import Dim, linear
from vivace.loops.analysis import varies
from vivace.loops.kernel import Expr, For, Let, Load, Reduce, Store, walk
from vivace.targets.cpu.builder import Builder, Value, literal, type_bits
from vivace.targets.cpu.env import Env, scalar
from vivace.targets.cpu.isa import has_masks
from vivace.targets.cpu.lanes import tail_mask
from vivace.targets.cpu.memory import flat_index, load, register_type
from vivace.targets.cpu.shuffles import transpose

Block = Callable[[Env], object]


def transposed_loads(outer: For, inner: For) -> list[Load]:
    """The loads of `for outer: vector inner` that are contiguous along the outer axis, stores being along the inner.

    Empty where tiles do not apply.
    """
    found: dict[Load, None] = {}
    names = {s.name for s in inner.body if isinstance(s, Let)}
    for s in inner.body:
        if isinstance(s, Store):
            if (
                type_bits(register_type(s.buffer.dtype)) != 32
                or linear_in(flat_index(s.buffer, s.index), inner.var) != 1
            ):
                return []
        elif not isinstance(s, Let):
            return []
        for node in walk(s):
            if isinstance(node, Reduce):
                return []
            if not isinstance(node, Load) or node.inside or varies(node, names):
                continue
            flat = flat_index(node.buffer, node.index)
            along, across = linear_in(flat, outer.var), linear_in(flat, inner.var)
            if along == 1 and across is not None and across not in (-1, 0, 1):
                if type_bits(register_type(node.buffer.dtype)) == 32:
                    found[node] = None
    return list(found)


def linear_in(d: Dim, name: str) -> Dim | None:
    """What one step of a symbol adds to a dim; None where it is not linear."""
    parts = linear(d, name)
    return None if parts is None else parts[0]


class Tiles:
    """Emits the tiles of one pair of loops; `stage` is scratch for one square per load, `block` emits the inner body,
    `ordinary(env, outer, inner start, inner stop)` the inner loop without tiles."""

    def __init__(
        self, b: Builder, outer: For, inner: For, loads: list[Load], stage: dict[Load, Value], block: Block,
        ordinary: Callable[[Env, Value, Value], None],
    ) -> None:  # fmt: skip
        self.b, self.outer, self.inner, self.loads = b, outer, inner, loads
        self.stage, self.block, self.ordinary = stage, block, ordinary
        self.width = b.isa.vector_bits // 32
        self.masks = has_masks(b.isa)

    def emit(self, env: Env) -> None:
        b, w = self.b, self.width
        n = scalar(env, self.outer.extent)
        zero, full = literal(0, "i64"), self._whole(n)
        self.n_inner = scalar(env, self.inner.extent)
        if self.masks:
            exact = isinstance(n.const, int) and n.const % w == 0

            def rows(u: Value, _: list[Value]) -> list[Value]:
                left = literal(w, "i64") if exact else b.call("llvm.smin", b.op("sub nsw", n, u), literal(w, "i64"))
                self._rows(env, u, left, None if exact else tail_mask(b, u, n, w))
                return []

            b.loop(zero, n, w, rows)
            return

        def whole_rows(u: Value, _: list[Value]) -> list[Value]:
            self._rows(env, u, literal(w, "i64"), None)
            return []

        def single_row(u: Value, _: list[Value]) -> list[Value]:
            self.ordinary(env.at({self.outer.var: u}), zero, self.n_inner)
            return []

        b.loop(zero, full, w, whole_rows)
        b.loop(full, n, 1, single_row)

    def _whole(self, n: Value) -> Value:
        if isinstance(n.const, int):
            return literal(n.const // self.width * self.width, "i64")
        return self.b.op("and", self.b.call("llvm.smax", n, literal(0, "i64")), literal(-self.width, "i64"))

    def _rows(self, env: Env, u: Value, n_rows: Value, mask: Value | None) -> None:
        """One row of tiles: `n_rows` values of the outer variable from `u`; `mask` covers them."""
        b, w, n = self.b, self.width, self.n_inner
        full = self._whole(n)

        def whole(v: Value, _: list[Value]) -> list[Value]:
            self._tile(env, u, v, n_rows, mask, None)
            return []

        def edge(v: Value, _: list[Value]) -> list[Value]:
            self._tile(env, u, v, n_rows, mask, tail_mask(b, v, n, w))
            return []

        def ordinary(k: Value, _: list[Value]) -> list[Value]:
            self.ordinary(env.at({self.outer.var: b.iadd(u, k)}), full, n)
            return []

        b.loop(literal(0, "i64"), full, w, whole)
        if isinstance(n.const, int) and n.const % w == 0:
            return
        if self.masks:
            b.loop(full, n, w, edge)
        else:
            b.loop(literal(0, "i64"), n_rows, 1, ordinary)

    def _tile(self, env: Env, u: Value, v: Value, n_rows: Value, rows: Value | None, columns: Value | None) -> None:
        b, w, outer, inner = self.b, self.width, self.outer.var, self.inner.var
        last = b.op("sub nsw", self.n_inner, literal(1, "i64"))
        for e in self.loads:
            vectors = []
            for k in range(w):
                at = b.iadd(v, literal(k, "i64"))
                if columns is not None:  # beyond the edge: the last column again, which is in the buffer
                    at = b.call("llvm.smin", at, last)
                vectors.append(b.widen(load(env.at({outer: u, inner: at}, lane=outer, lanes=w, mask=rows), e), w))
            for k, row in enumerate(transpose(b, vectors)):
                b.effect(f"store {row}, {self._slot(e, literal(k, 'i64'))}, align {4 * w}")

        def one(k: Value, _: list[Value]) -> list[Value]:
            given: dict[Expr, Value] = {}
            for e in self.loads:
                t = register_type(e.buffer.dtype)
                given[e] = b.effect(f"load <{w} x {t}>, {self._slot(e, k)}, align {4 * w}", t, w)
            at = env.at({outer: b.iadd(u, k), inner: v}, lane=inner, lanes=w, mask=columns)
            self.block(replace(at, given=given))
            return []

        b.loop(literal(0, "i64"), n_rows, 1, one)

    def _slot(self, e: Load, k: Value) -> Value:
        base, b = self.stage[e], self.b
        offset = b.imul(k, literal(4 * self.width, "i64"))
        return b.inst(f"getelementptr i8, {base}, {offset}", "ptr", 0, base, offset)
