"""Kernels of matrix products and convolutions: the loops over units, panels and tiles around a micro-kernel.

A kernel is one exported function that decodes its units into blocks of row tiles and blocks of column panels, and internal functions,
one per shape of tile (most row counts split into tiles of one or two sizes; the last panel may be narrower). A thread that gets a range
of units walks panels outside and tiles inside, so that a panel of B stays in the first-level cache and a block of A in the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vivace.base.dims import Dim, bounds, ceildiv, prod
from vivace.base.machine import Isa
from vivace.loops.contraction import Axis, Contraction, contraction_dims, contraction_params, merge_axes
from vivace.loops.kernel import Buffer
from vivace.lower.tile import Segment, Tile, choose_tile, pieces, staged_stride
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.contraction_body import F32_BYTES, Operands, Shape, accumulate, copy_row, mask_text, store
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
    def k(self) -> Dim:
        return prod([x.extent for x in self.c.taps])

    @property
    def tile_rows(self) -> int:
        """Rows of the largest tile."""
        return max(size for _, size in self.tile.outer) * max(size for _, size in self.tile.inner)

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
    scratch = tile.tiles_per_unit * plan.tile_rows * staged_stride(plan.k) * F32_BYTES if tile.stage_a else 0
    return KernelCode(c.name, llvm_text, plan.params, plan.dims, units, 1, scratch)


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
        """Byte offset of each row of the tile."""
        step_o, step_i = t.mul(t.dim(per_outer, dims), F32_BYTES), t.mul(t.dim(per_inner, dims), F32_BYTES)
        return [t.add(t.mul(step_o, o), t.mul(step_i, i)) for o, i in rows]

    row_offsets = offsets(p.outer.a, p.inner.a)
    if p.tile.stage_a:
        staged = t.mul(t.dim(staged_stride(p.k), dims), F32_BYTES)
        row_offsets = [t.mul(staged, r) for r in range(len(rows))]
    operands = Operands(p.c.taps, p.c.packing.kind != "plain", p.tile.lanes)
    acc = accumulate(
        t, isa, Shape(rows, vectors, p.tile.unroll), operands, "%a", "%b", row_offsets, dims
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
    panel_bytes = t.mul(t.dim(p.k, dims), p.tile.lanes * F32_BYTES)
    if p.tile.stage_a:
        t.put("%staged_block = alloca i64, align 8")
        t.put("store i64 -1, ptr %staged_block, align 8")
    with t.loop("%begin", "%end") as unit:
        if p.tile.rows_outer:
            rest, panel_block = t.divmod(unit, panel_blocks)
            image, tile_block = t.divmod(rest, tile_blocks)
        else:
            rest, tile_block = t.divmod(unit, tile_blocks)
            image, panel_block = t.divmod(rest, panel_blocks)
        block_image = image
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
        staged: Int = 0
        if p.tile.stage_a:
            staged = t.mul(t.dim(staged_stride(p.k), dims), F32_BYTES)
            block = t.add(t.mul(block_image, tile_blocks), tile_block)
            stale, ready = t.label(), t.label()
            before = t.op("load i64, ptr %staged_block, align 8")
            t.branch(t.op(f"icmp eq i64 {before}, {block}"), ready, stale)
            t.start(stale)
            t.put(f"store i64 {block}, ptr %staged_block, align 8")
            with t.loop(first_tile, tile_end) as tile:
                spot = _locate(t, p, dims, tile)
                to = t.at("%scratch", t.mul(t.sub(tile, first_tile), t.mul(staged, p.tile_rows)))
                _stage_tile(t, p, dims, spot, _corner(t, p, dims, spot, a_image), to, staged)
            t.jump(ready)
            t.start(ready)
        with t.loop(first_panel, panel_end) as panel:
            n = t.mul(panel, p.tile.lanes)
            b_panel = t.at(b_image, t.mul(panel, panel_bytes if p.c.packing.kind != "plain" else p.tile.lanes * F32_BYTES))
            with t.loop(first_tile, tile_end) as tile:
                spot = _locate(t, p, dims, tile)
                if p.tile.stage_a:
                    from_a = t.at("%scratch", t.mul(t.sub(tile, first_tile), t.mul(staged, p.tile_rows)))
                else:
                    from_a = _corner(t, p, dims, spot, a_image)
                to = t.at(out_image, t.mul(n, F32_BYTES))
                for axis in p.c.rows:
                    to = t.at(to, t.mul(spot.at[axis.name], t.mul(t.dim(axis.out, dims), F32_BYTES)))
                _call_tile(t, p, dims, spot, n, at | spot.at, from_a, b_panel, to)
    t.put("ret void")
    head = f"define void @{p.name}(ptr %args, i64 %begin, i64 %end, ptr %scratch) #0 {{"
    return "\n".join([head, "entry:", *t.lines, "}"]), t.declares


@dataclass(frozen=True, slots=True)
class _Spot:
    """A tile found by its number: where it starts on each row axis, and the conditions that tell its size."""

    at: dict[str, Int]
    outer_sizes: list[tuple[str, int]]
    inner_sizes: list[tuple[str, int]]


def _locate(t: Text, p: _Plan, dims: Mapping[str, Int], tile: Int) -> _Spot:
    rest, inner_piece = t.divmod(tile, t.dim(pieces(p.tile.inner), dims))
    rest, outer_piece = t.divmod(rest, t.dim(pieces(p.tile.outer), dims)) if p.above else (0, rest)
    at: dict[str, Int] = {}
    for axis in reversed(p.above):
        rest, at[axis.name] = t.divmod(rest, t.dim(axis.extent, dims)) if axis is not p.above[0] else (0, rest)
    inner_start, inner_sizes = _find_piece(t, p.tile.inner, inner_piece, dims)
    outer_start, outer_sizes = _find_piece(t, p.tile.outer, outer_piece, dims)
    at[p.inner.name], at[p.outer.name] = inner_start, outer_start
    return _Spot(at, outer_sizes, inner_sizes)


def _corner(t: Text, p: _Plan, dims: Mapping[str, Int], spot: _Spot, a: str) -> str:
    """The address of a tile's first row in A."""
    for axis in p.c.rows:
        a = t.at(a, t.mul(spot.at[axis.name], t.mul(t.dim(axis.a, dims), F32_BYTES)))
    return a


def _stage_tile(t: Text, p: _Plan, dims: Mapping[str, Int], spot: _Spot, a: str, to: str, staged: Int) -> None:
    """Copies the rows of a tile from A to scratch."""
    k = t.dim(p.k, dims)
    step_outer, step_inner = (t.mul(t.dim(x.a, dims), F32_BYTES) for x in (p.outer, p.inner))

    def copy(outer: int, inner: int) -> None:
        with t.loop(0, outer) as o, t.loop(0, inner) as i:
            row = t.at(t.at(a, t.mul(o, step_outer)), t.mul(i, step_inner))
            copy_row(t, p.isa, row, t.at(to, t.mul(t.add(t.mul(o, inner), i), staged)), k)

    _by_size(t, p, spot, copy)


def _call_tile(
    t: Text, p: _Plan, dims: Mapping[str, Int], spot: _Spot, n: Int, at: Mapping[str, Int], a: str, b: str, out: str
) -> None:
    """Calls the micro-kernel of the tile's shape."""
    arguments = f"ptr %args, ptr {a}, ptr {b}, ptr {out}, i64 {n}" + "".join(f", i64 {at[x.name]}" for x in p.axes())

    def call(outer: int, inner: int) -> None:
        there = [tail for o, i, tail in _variants(p) if (o, i) == (outer, inner)]
        if len(there) == 1:
            t.put(f"call void @{_symbol(p, outer, inner, *there)}({arguments})")
            return
        full, tail, done = t.label(), t.label(), t.label()
        t.branch(t.op(f"icmp sle i64 {t.add(n, p.tile.lanes)}, {t.dim(p.c.n, dims)}"), full, tail)
        for label, is_tail in ((full, False), (tail, True)):
            t.start(label)
            t.put(f"call void @{_symbol(p, outer, inner, is_tail)}({arguments})")
            t.jump(done)
        t.start(done)

    _by_size(t, p, spot, call)


def _by_size(t: Text, p: _Plan, spot: _Spot, then: Callable[[int, int], None]) -> None:
    """Code for each size that a tile can have, behind the conditions that tell it."""
    there = {(o, i) for o, i, _ in _variants(p)}
    done = t.label()

    def choose(sizes: list[tuple[str, int]], last: int, inside: Callable[[int], None]) -> None:
        for condition, size in sizes:
            yes, no = t.label(), t.label()
            t.branch(condition, yes, no)
            t.start(yes)
            inside(size)
            t.start(no)
        inside(last)

    def leaf(outer: int, inner: int) -> None:
        if (outer, inner) not in there:
            t.put("unreachable")
            return
        then(outer, inner)
        t.jump(done)

    choose(
        spot.outer_sizes,
        p.tile.outer[-1][1],
        lambda o: choose(spot.inner_sizes, p.tile.inner[-1][1], lambda i: leaf(o, i)),
    )
    t.start(done)
