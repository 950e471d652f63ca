"""The exported function of a contraction: decodes units into blocks of row tiles and column panels, stages what pays, calls micro-kernels.

A thread that gets a range of units walks panels outside and tiles inside, so that a panel of B stays in the first-level cache and a block
of A in the second. Staged blocks stay in scratch from unit to unit of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from vivace.base.dims import ceildiv, prod
from vivace.loops.contraction import Axis
from vivace.lower.tile import Segment, pieces, staged_stride
from vivace.targets.cpu.contraction_body import F32_BYTES, LINE_BYTES
from vivace.targets.cpu.contraction_plan import Plan, base_of, load_dims, symbol_of, variants
from vivace.targets.cpu.contraction_stage import clear, copy_panel, copy_row, transpose_panel
from vivace.targets.cpu.contraction_text import Int, Text


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


def driver(p: Plan) -> tuple[str, dict[str, str]]:
    t = Text()
    dims = load_dims(t, p)
    a, b, out = (base_of(t, p, x) for x in (p.c.a, p.c.b, p.c.out))
    n_tiles, n_panels = t.dim(p.n_tiles, dims), t.dim(p.n_panels, dims)
    tile_blocks = t.dim(ceildiv(p.n_tiles, p.tile.tiles_per_unit), dims)
    panel_blocks = t.dim(ceildiv(p.n_panels, p.tile.panels_per_unit), dims)
    panel_bytes = t.mul(t.dim(p.k, dims), p.tile.lanes * F32_BYTES)
    for staged, name in ((p.tile.stage_a, "a"), (p.tile.stage_b, "b")):
        if staged:
            t.put(f"%staged_{name} = alloca ptr, align 8")
            t.put(f"store ptr null, ptr %staged_{name}, align 8")
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
        staged: Int = 0
        if p.tile.stage_a:
            staged = t.mul(t.dim(staged_stride(p.k), dims), F32_BYTES)
            corner = _corner(t, p, dims, _locate(t, p, dims, first_tile), a_image)
            with _unless_staged(t, "a", corner), t.loop(first_tile, tile_end) as tile:
                spot = _locate(t, p, dims, tile)
                to = t.at("%scratch", t.mul(t.sub(tile, first_tile), t.mul(staged, p.tile_rows)))
                _stage_tile(t, p, dims, spot, _corner(t, p, dims, spot, a_image), to, staged)
        if p.tile.stage_b:
            column = t.mul(p.tile.lanes * F32_BYTES, t.dim(p.c.packing.n_stride, dims))
            panel_bytes = t.dim(p.staged_panel_bytes, dims)
            b_staged = t.at("%scratch", t.dim(p.staged_a_bytes, dims))
            with _unless_staged(t, "b", t.at(b_image, t.mul(first_panel, column))), t.loop(first_panel, panel_end) as panel:
                to = t.at(b_staged, t.mul(t.sub(panel, first_panel), panel_bytes))
                _stage_panel(t, p, dims, panel, t.at(b_image, t.mul(panel, column)), to)
        waiting = t.at("%scratch", t.dim(p.staged_a_bytes + p.staged_b_bytes, dims))
        if p.tile.k_block:
            n_waiting = t.mul(t.sub(panel_end, first_panel), t.sub(tile_end, first_tile))
            clear(t, p.isa, waiting, t.mul(n_waiting, p.waiting_bytes))
        channel = p.c.taps[0] if p.c.taps else Axis("k", 1)
        pass_a = t.mul(t.dim(channel.a, dims), p.tile.k_block * F32_BYTES)
        pass_b = t.mul(t.dim(p.pass_rows, dims), p.tile.lanes * F32_BYTES)
        if not p.in_panels:
            pass_b = t.mul(t.dim(channel.b, dims), p.tile.k_block * F32_BYTES)
        with t.times(p.n_passes) as passed, t.loop(first_panel, panel_end) as panel:
            n = t.mul(panel, p.tile.lanes)
            if p.tile.stage_b:
                b_panel = t.at(b_staged, t.mul(t.sub(panel, first_panel), panel_bytes))
            else:
                b_panel = t.at(b_image, t.mul(panel, panel_bytes if p.in_panels else p.tile.lanes * F32_BYTES))
            b_panel = t.at(b_panel, t.mul(passed, pass_b))
            with t.loop(first_tile, tile_end) as tile:
                spot = _locate(t, p, dims, tile)
                if p.tile.stage_a:
                    from_a = t.at("%scratch", t.mul(t.sub(tile, first_tile), t.mul(staged, p.tile_rows)))
                else:
                    from_a = _corner(t, p, dims, spot, a_image)
                from_a = t.at(from_a, t.mul(passed, pass_a))
                to = t.at(out_image, t.mul(n, F32_BYTES))
                for axis in p.c.rows:
                    to = t.at(to, t.mul(spot.at[axis.name], t.mul(t.dim(axis.out, dims), F32_BYTES)))
                between = ""
                if p.tile.k_block:
                    number = t.add(t.mul(t.sub(panel, first_panel), t.sub(tile_end, first_tile)), t.sub(tile, first_tile))
                    last = t.op(f"icmp eq i64 {passed}, {p.n_passes - 1}")
                    between = f", ptr {t.at(waiting, t.mul(number, p.waiting_bytes))}, i1 {last}"
                if p.fetches_ahead:
                    following = pass_b if p.n_passes > 1 and p.tile.panels_per_unit == 1 else panel_bytes
                    rounds = t.divmod(t.dim(p.pass_rows, dims), p.tile.unroll)[0]
                    share = t.mul(t.sub(tile, first_tile), t.mul(rounds, p.ahead_lines * LINE_BYTES))
                    between += f", ptr {t.at(t.at(b_panel, following), share)}"
                _call_tile(t, p, dims, spot, n, at | spot.at, (from_a, b_panel, to), between)
    t.put("ret void")
    head = f"define void @{p.name}(ptr %args, i64 %begin, i64 %end, ptr %scratch) #0 {{"
    return "\n".join([head, "entry:", *t.lines, "}"]), t.declares


@dataclass(frozen=True, slots=True)
class _Spot:
    """A tile found by its number: where it starts on each row axis, and the conditions that tell its size."""

    at: dict[str, Int]
    outer_sizes: list[tuple[str, int]]
    inner_sizes: list[tuple[str, int]]


def _locate(t: Text, p: Plan, dims: Mapping[str, Int], tile: Int) -> _Spot:
    rest, inner_piece = t.divmod(tile, t.dim(pieces(p.tile.inner), dims))
    rest, outer_piece = t.divmod(rest, t.dim(pieces(p.tile.outer), dims)) if p.above else (0, rest)
    at: dict[str, Int] = {}
    for axis in reversed(p.above):
        rest, at[axis.name] = t.divmod(rest, t.dim(axis.extent, dims)) if axis is not p.above[0] else (0, rest)
    inner_start, inner_sizes = _find_piece(t, p.tile.inner, inner_piece, dims)
    outer_start, outer_sizes = _find_piece(t, p.tile.outer, outer_piece, dims)
    at[p.inner.name], at[p.outer.name] = inner_start, outer_start
    return _Spot(at, outer_sizes, inner_sizes)


def _corner(t: Text, p: Plan, dims: Mapping[str, Int], spot: _Spot, a: str) -> str:
    """The address of a tile's first row in A."""
    for axis in p.c.rows:
        a = t.at(a, t.mul(spot.at[axis.name], t.mul(t.dim(axis.a, dims), F32_BYTES)))
    return a


def _stage_tile(t: Text, p: Plan, dims: Mapping[str, Int], spot: _Spot, a: str, to: str, staged: Int) -> None:
    """Copies the rows of a tile from A to scratch."""
    k = t.dim(p.k, dims)
    step_outer, step_inner = (t.mul(t.dim(x.a, dims), F32_BYTES) for x in (p.outer, p.inner))

    def copy(outer: int, inner: int) -> None:
        with t.loop(0, outer) as o, t.loop(0, inner) as i:
            row = t.at(t.at(a, t.mul(o, step_outer)), t.mul(i, step_inner))
            copy_row(t, p.isa, row, t.at(to, t.mul(t.add(t.mul(o, inner), i), staged)), k)

    _by_size(t, p, spot, copy)


@contextmanager
def _unless_staged(t: Text, name: str, source: str) -> Iterator[None]:
    """Runs the body where the block staged last did not come from `source`."""
    stale, ready = t.label(), t.label()
    before = t.op(f"load ptr, ptr %staged_{name}, align 8")
    t.branch(t.op(f"icmp eq ptr {before}, {source}"), ready, stale)
    t.start(stale)
    t.put(f"store ptr {source}, ptr %staged_{name}, align 8")
    yield
    t.jump(ready)
    t.start(ready)


def _stage_panel(t: Text, p: Plan, dims: Mapping[str, Int], panel: Int, b: str, to: str) -> None:
    """Makes one panel of B in scratch."""
    n = t.dim(p.c.n, dims)
    ragged = not isinstance(n, int) or n % p.tile.lanes != 0
    columns = t.minimum(t.sub(n, t.mul(panel, p.tile.lanes)), p.tile.lanes) if ragged else None
    *outer, channel = p.c.taps or (Axis("k", 1),)
    transposed = p.c.packing.kind == "transposed"
    step = t.mul(t.dim(p.c.packing.n_stride if transposed else channel.b, dims), F32_BYTES)
    count = t.dim(channel.extent, dims)
    make = transpose_panel if transposed else copy_panel

    def taps(rest: list[Axis], source: str, row: Int) -> None:
        if not rest:
            make(t, p.isa, source, step, t.at(to, t.mul(row, p.tile.lanes * F32_BYTES)), p.tile.lanes, count, columns)
            return
        axis, *inner = rest
        with t.loop(0, t.dim(axis.extent, dims)) as i:
            there = t.at(source, t.mul(i, t.mul(t.dim(axis.b, dims), F32_BYTES)))
            below = prod([x.extent for x in (*inner, channel)])
            taps(inner, there, t.add(row, t.mul(i, t.dim(below, dims))))

    taps(outer, b, 0)


def _call_tile(
    t: Text,
    p: Plan,
    dims: Mapping[str, Int],
    spot: _Spot,
    n: Int,
    at: Mapping[str, Int],
    corners: tuple[str, str, str],
    between: str,
) -> None:
    """Calls the micro-kernel of the tile's shape. `between` are the arguments that passes need."""
    a, b, out = corners
    axes = "".join(f", i64 {at[x.name]}" for x in p.axes())
    arguments = f"ptr %args, ptr {a}, ptr {b}, ptr {out}, i64 {n}{axes}{between}"

    def call(outer: int, inner: int) -> None:
        there = [tail for o, i, tail in variants(p) if (o, i) == (outer, inner)]
        if len(there) == 1:
            t.put(f"call void @{symbol_of(p, outer, inner, *there)}({arguments})")
            return
        full, tail, done = t.label(), t.label(), t.label()
        t.branch(t.op(f"icmp sle i64 {t.add(n, p.tile.lanes)}, {t.dim(p.c.n, dims)}"), full, tail)
        for label, is_tail in ((full, False), (tail, True)):
            t.start(label)
            t.put(f"call void @{symbol_of(p, outer, inner, is_tail)}({arguments})")
            t.jump(done)
        t.start(done)

    _by_size(t, p, spot, call)


def _by_size(t: Text, p: Plan, spot: _Spot, then: Callable[[int, int], None]) -> None:
    """Code for each size that a tile can have, behind the conditions that tell it."""
    there = {(o, i) for o, i, _ in variants(p)}
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
