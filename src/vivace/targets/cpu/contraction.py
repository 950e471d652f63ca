"""Kernels of matrix products and convolutions: the loops over units, panels and tiles around a micro-kernel.

A kernel is one exported function that decodes its units into blocks of row tiles and blocks of column panels, and internal functions,
one per shape of tile (most row counts split into tiles of one or two sizes; the last panel may be narrower). A thread that gets a range
of units walks panels outside and tiles inside, so that a panel of B stays in the first-level cache and a block of A in the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vivace.base.dims import Dim, bounds, ceildiv, prod
from vivace.base.machine import Isa
from vivace.loops.contraction import Axis, Contraction, contraction_dims, contraction_params, merge_axes
from vivace.loops.kernel import Buffer
from vivace.lower.tile import Segment, Tile, choose_tile, pieces
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.contraction_body import F32_BYTES, Operands, Shape, accumulate, extent_product, mask_text, store
from vivace.targets.cpu.contraction_epilogue import Place, finish
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.isa import kernel_attributes

_NONE = Axis("", 1)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A merged contraction with all that its code is made from."""

    name: str
    c: Contraction
    isa: Isa
    tile: Tile
    params: tuple[Buffer, ...]
    dims: tuple[str, ...]

    @property
    def outer(self) -> Axis:
        return self.c.rows[-2] if len(self.c.rows) > 1 else _NONE

    @property
    def inner(self) -> Axis:
        return self.c.rows[-1] if self.c.rows else _NONE

    @property
    def above(self) -> tuple[Axis, ...]:
        """Row axes that tiles do not span."""
        return self.c.rows[:-2]

    @property
    def n_tiles(self) -> Dim:
        return prod([x.extent for x in self.above]) * pieces(self.tile.outer) * pieces(self.tile.inner)

    @property
    def n_panels(self) -> Dim:
        return ceildiv(self.c.n, self.tile.lanes)

    @property
    def tail_vectors(self) -> int:
        """Vectors of the last panel where it is narrower than the others or needs a mask, else 0. Unknown width: all of them."""
        if not isinstance(self.c.n, int):
            return self.tile.nv
        return -(-(self.c.n % self.tile.lanes) // self.isa.n_f32_lanes)

    @property
    def has_full_panel(self) -> bool:
        return not isinstance(self.c.n, int) or self.c.n >= self.tile.lanes

    def axes(self) -> tuple[Axis, ...]:
        return (*self.c.batch, *self.c.rows)


def emit_contraction(c: Contraction, isa: Isa, tile: Tile | None = None) -> KernelCode:
    """The kernel of a contraction."""
    merged = merge_axes(c)
    tile = tile or choose_tile(merged, isa)
    plan = _Plan(c.name, merged, isa, tile, contraction_params(c), contraction_dims(c))
    functions, declares = [], {}
    for text, declared in (_driver(plan), *(_micro_kernel(plan, *v) for v in _variants(plan))):
        functions.append(text)
        declares |= declared
    units = (
        prod([x.extent for x in merged.batch])
        * ceildiv(plan.n_tiles, tile.tiles_per_unit)
        * ceildiv(plan.n_panels, tile.panels_per_unit)
    )
    llvm_text = "\n".join([*functions, *declares.values(), f"attributes #0 = {{ {kernel_attributes(isa)} }}", ""])
    return KernelCode(c.name, llvm_text, plan.params, plan.dims, units, 1, 0)


def _variants(p: _Plan) -> list[tuple[int, int, bool]]:
    """(outer rows, inner rows, tail panel) of every micro-kernel that can run."""
    sizes = [(o, i) for no, o in p.tile.outer for ni, i in p.tile.inner if bounds(no)[1] != 0 and bounds(ni)[1] != 0]
    panels = [tail for tail, there in ((False, p.has_full_panel), (True, p.tail_vectors > 0)) if there]
    return [(o, i, tail) for o, i in dict.fromkeys(sizes) for tail in panels]


def _symbol(p: _Plan, outer: int, inner: int, tail: bool) -> str:
    return f"{p.name}.tile{outer}x{inner}{'.tail' if tail else ''}"


def _load_dims(t: Text, p: _Plan) -> dict[str, Int]:
    first = len(p.params)
    return {d: t.op(f"load i64, ptr {t.at('%args', 8 * (first + i))}, align 8") for i, d in enumerate(p.dims)}


def _base(t: Text, p: _Plan, buffer: Buffer) -> str:
    return t.op(f"load ptr, ptr {t.at('%args', 8 * p.params.index(buffer))}, align 8")


def _micro_kernel(p: _Plan, outer: int, inner: int, tail: bool) -> tuple[str, dict[str, str]]:
    t = Text()
    isa, width = p.isa, p.isa.n_f32_lanes
    dims = _load_dims(t, p)
    rows = tuple((o, i) for o in range(outer) for i in range(inner))
    vectors = p.tail_vectors if tail else p.tile.nv

    def offsets(per_outer: Dim, per_inner: Dim) -> list[Int]:
        step_o, step_i = t.mul(t.dim(per_outer, dims), F32_BYTES), t.mul(t.dim(per_inner, dims), F32_BYTES)
        return [t.add(t.mul(step_o, o), t.mul(step_i, i)) for o, i in rows]

    operands = Operands(p.c.taps, p.c.packing.kind != "plain", p.tile.lanes)
    acc = accumulate(
        t, isa, Shape(rows, vectors, p.tile.unroll), operands, "%a", "%b", offsets(p.outer.a, p.inner.a), dims
    )
    env: dict[str, Int] = {x.name: f"%x{i}" for i, x in enumerate(p.axes())} | dims
    masks: list[str | None] = [None] * vectors
    if tail:
        n = t.dim(p.c.n, dims)
        left: Int = n % p.tile.lanes if isinstance(n, int) else t.sub(n, "%n")
        masks = [mask_text(t, isa, t.sub(left, j * width)) for j in range(vectors)]
    bases = {b: _base(t, p, b) for b in dict.fromkeys(p.c.extra)}
    for (o, i), offset, row in zip(rows, offsets(p.outer.out, p.inner.out), acc):
        here = dict(env)
        if p.outer.name:
            here[p.outer.name] = t.add(env[p.outer.name], o)
        if p.inner.name:
            here[p.inner.name] = t.add(env[p.inner.name], i)
        for j, value in enumerate(row):
            here["n"] = t.add("%n", j * width)
            place = Place(here, bases, masks[j])
            result = value if p.c.epilogue is None else finish(t, isa, p.c.epilogue, value, place)
            store(t, isa, result, t.at(t.at("%out", offset), j * isa.vector_bits // 8), masks[j])
    t.put("ret void")
    axes = "".join(f", i64 %x{i}" for i in range(len(p.axes())))
    head = f"define internal void @{_symbol(p, outer, inner, tail)}(ptr %args, ptr %a, ptr %b, ptr %out, i64 %n{axes}) noinline #0 {{"
    return "\n".join([head, "entry:", *t.lines, "}"]), t.declares


def _find_piece(t: Text, split: tuple[Segment, ...], piece: Int, dims: Mapping[str, Int]) -> tuple[Int, list[tuple[str, int]]]:
    """Where a piece starts on its axis, and for each size but the last the condition under which the piece has it."""
    start: Int = 0
    conditions: list[tuple[str, int]] = []
    before: Int = 0
    for depth, (count, size) in enumerate(split):
        n = t.dim(count, dims)
        if len(split) == 1:
            return t.mul(piece, size), []
        inside = piece if depth == 0 else t.maximum(t.sub(piece, before), 0)
        if depth < len(split) - 1:
            inside = t.minimum(inside, n)
            before = t.add(before, n)
            conditions.append((t.less(piece, before), size))
        start = t.add(start, t.mul(inside, size))
    return start, conditions


def _driver(p: _Plan) -> tuple[str, dict[str, str]]:
    t = Text()
    dims = _load_dims(t, p)
    a, b, out = (_base(t, p, x) for x in (p.c.a, p.c.b, p.c.out))
    n_tiles, n_panels = t.dim(p.n_tiles, dims), t.dim(p.n_panels, dims)
    tile_blocks = t.dim(ceildiv(p.n_tiles, p.tile.tiles_per_unit), dims)
    panel_blocks = t.dim(ceildiv(p.n_panels, p.tile.panels_per_unit), dims)
    panel_bytes = t.mul(t.dim(extent_product(p.c.taps), dims), p.tile.lanes * F32_BYTES)
    with t.loop("%begin", "%end") as unit:
        if p.tile.rows_outer:
            rest, panel_block = t.divmod(unit, panel_blocks)
            image, tile_block = t.divmod(rest, tile_blocks)
        else:
            rest, tile_block = t.divmod(unit, tile_blocks)
            image, panel_block = t.divmod(rest, panel_blocks)
        at: dict[str, Int] = {}
        offset_a: Int = 0
        offset_b: Int = 0
        offset_out: Int = 0
        packed: Int = 0
        scale: Int = 1
        for axis in reversed(p.c.batch):
            image, at[axis.name] = t.divmod(image, t.dim(axis.extent, dims)) if axis is not p.c.batch[0] else (0, image)
            offset_a = t.add(offset_a, t.mul(at[axis.name], t.mul(t.dim(axis.a, dims), F32_BYTES)))
            offset_out = t.add(offset_out, t.mul(at[axis.name], t.mul(t.dim(axis.out, dims), F32_BYTES)))
            offset_b = t.add(offset_b, t.mul(at[axis.name], t.mul(t.dim(axis.b, dims), F32_BYTES)))
            if axis.b != 0:
                packed = t.add(packed, t.mul(at[axis.name], scale))
                scale = t.mul(scale, t.dim(axis.extent, dims))
        if p.c.packing.kind == "panels":
            offset_b = t.mul(packed, t.mul(n_panels, panel_bytes))
        a_image, b_image, out_image = t.at(a, offset_a), t.at(b, offset_b), t.at(out, offset_out)
        first_panel, first_tile = t.mul(panel_block, p.tile.panels_per_unit), t.mul(tile_block, p.tile.tiles_per_unit)
        panel_end = t.minimum(t.add(first_panel, p.tile.panels_per_unit), n_panels)
        tile_end = t.minimum(t.add(first_tile, p.tile.tiles_per_unit), n_tiles)
        with t.loop(first_panel, panel_end) as panel:
            n = t.mul(panel, p.tile.lanes)
            b_panel = t.at(b_image, t.mul(panel, panel_bytes if p.c.packing.kind != "plain" else p.tile.lanes * F32_BYTES))
            with t.loop(first_tile, tile_end) as tile:
                _one_tile(t, p, dims, tile, n, at, a_image, b_panel, t.at(out_image, t.mul(n, F32_BYTES)))
    t.put("ret void")
    head = f"define void @{p.name}(ptr %args, i64 %begin, i64 %end, ptr %scratch) #0 {{"
    return "\n".join([head, "entry:", *t.lines, "}"]), t.declares


def _one_tile(
    t: Text, p: _Plan, dims: Mapping[str, Int], tile: Int, n: Int, at: dict[str, Int], a: str, b: str, out: str
) -> None:
    """Finds a tile by its number and calls the micro-kernel of its shape."""
    n_inner = t.dim(pieces(p.tile.inner), dims)
    rest, inner_piece = t.divmod(tile, n_inner)
    rest, outer_piece = t.divmod(rest, t.dim(pieces(p.tile.outer), dims)) if p.above else (0, rest)
    at = dict(at)
    for axis in reversed(p.above):
        rest, at[axis.name] = t.divmod(rest, t.dim(axis.extent, dims)) if axis is not p.above[0] else (0, rest)
    inner_start, inner_sizes = _find_piece(t, p.tile.inner, inner_piece, dims)
    outer_start, outer_sizes = _find_piece(t, p.tile.outer, outer_piece, dims)
    at[p.inner.name], at[p.outer.name] = inner_start, outer_start
    for axis in p.c.rows:
        a = t.at(a, t.mul(at[axis.name], t.mul(t.dim(axis.a, dims), F32_BYTES)))
        out = t.at(out, t.mul(at[axis.name], t.mul(t.dim(axis.out, dims), F32_BYTES)))
    done = t.label()
    arguments = f"ptr %args, ptr {a}, ptr {b}, ptr {out}, i64 {n}" + "".join(f", i64 {at[x.name]}" for x in p.axes())

    def choose(sizes: list[tuple[str, int]], last: int, then) -> None:  # type: ignore[no-untyped-def]
        for condition, size in sizes:
            yes, no = t.label(), t.label()
            t.branch(condition, yes, no)
            t.start(yes)
            then(size)
            t.start(no)
        then(last)

    def call(outer: int, inner: int) -> None:
        there = {tail for o, i, tail in _variants(p) if (o, i) == (outer, inner)}
        if not there:
            t.put("unreachable")
            return
        if len(there) == 1:
            t.put(f"call void @{_symbol(p, outer, inner, *there)}({arguments})")
            t.jump(done)
            return
        full, tail = t.label(), t.label()
        t.branch(t.op(f"icmp sle i64 {t.add(n, p.tile.lanes)}, {t.dim(p.c.n, dims)}"), full, tail)
        for label, is_tail in ((full, False), (tail, True)):
            t.start(label)
            t.put(f"call void @{_symbol(p, outer, inner, is_tail)}({arguments})")
            t.jump(done)

    choose(outer_sizes, p.tile.outer[-1][1], lambda o: choose(inner_sizes, p.tile.inner[-1][1], lambda i: call(o, i)))
    t.start(done)
