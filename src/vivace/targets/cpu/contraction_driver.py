"""The exported function of a contraction: decodes units into blocks of row tiles and column panels, stages what pays,
calls micro-kernels.

A thread that gets a range of units walks panels outside and tiles inside, so that a panel of B stays in the first-
level cache and a block of A in the second. Staged blocks stay in scratch
from unit to unit of one step; where they came from stands in the notes (see `code`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from vivace.base.dims import ceildiv, prod
from vivace.loops.contraction import Axis
from vivace.lower.tile import Segment, pieces
from vivace.targets.cpu.contraction_amx import release
from vivace.targets.cpu.contraction_plan import Plan, base_of, load_dims, symbol_of, variants
from vivace.targets.cpu.contraction_stage import clear, copy_panel, copy_row, transpose_panel
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import F32_BYTES, LINE_BYTES
from vivace.targets.cpu.contraction_waiting import begin, finish


def _find_piece(
    t: Text, split: tuple[Segment, ...], piece: Int, dims: Mapping[str, Int]
) -> tuple[Int, list[tuple[str, int]]]:
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


@dataclass(frozen=True, slots=True)
class _Unit:
    """What is known of a unit: addresses of its batch element, its ranges of panels and tiles, where staged blocks
    begin.
    """

    at: dict[str, Int]
    a: str
    b: str
    out: str
    first_panel: Int
    panel_end: Int
    first_tile: Int
    tile_end: Int
    staged_b: str
    waiting: str


def driver(p: Plan) -> tuple[str, dict[str, str]]:
    """The text of the exported function, and what it declares."""
    t = Text()
    dims = load_dims(t, p)
    bases = (base_of(t, p, p.c.a), base_of(t, p, p.c.b), base_of(t, p, p.c.out))
    if p.ar.is_tile:
        begin(t, p)
    with t.loop("%begin", "%end") as number:
        unit = _decode(t, p, dims, number, bases)
        if p.tile.stage_a:
            _stage_a(t, p, dims, unit)
        if p.tile.stage_b:
            _stage_b(t, p, dims, unit)
        if p.tile.k_block:
            n_waiting = t.mul(t.sub(unit.panel_end, unit.first_panel), t.sub(unit.tile_end, unit.first_tile))
            clear(t, p.isa, unit.waiting, t.mul(n_waiting, p.waiting_bytes))
        panels, tiles = (unit.first_panel, unit.panel_end), (unit.first_tile, unit.tile_end)
        with t.times(p.n_passes) as passed:
            if p.tile.tiles_outside:
                with t.loop(*tiles) as tile, t.loop(*panels) as panel:
                    _tile(t, p, dims, unit, passed, panel, tile)
            else:
                with t.loop(*panels) as panel, t.loop(*tiles) as tile:
                    _tile(t, p, dims, unit, passed, panel, tile)
    if p.ar.is_tile:
        finish(t, p)
        release(t)
    t.put("ret void")
    head = f"define void @{p.name}(ptr %args, i64 %begin, i64 %end, ptr %scratch) #0 {{"
    return "\n".join([head, "entry:", *t.lines, "}"]), t.declares


def _panel_bytes(t: Text, p: Plan, dims: Mapping[str, Int]) -> Int:
    """From one panel of B to the next, as micro-kernels read it."""
    if p.tile.stage_b:
        return t.dim(p.staged_panel_bytes, dims)
    return t.dim(p.rows_of_b(p.c.taps) * p.row_bytes if p.in_panels else p.tile.lanes * F32_BYTES, dims)


def _decode(t: Text, p: Plan, dims: Mapping[str, Int], number: Int, bases: tuple[str, str, str]) -> _Unit:
    n_tiles, n_panels = t.dim(p.n_tiles, dims), t.dim(p.n_panels, dims)
    tile_blocks = t.dim(ceildiv(p.n_tiles, p.tile.tiles_per_unit), dims)
    panel_blocks = t.dim(ceildiv(p.n_panels, p.tile.panels_per_unit), dims)
    image: Int = 0
    if p.tile.keeps_rows:
        tile_block, panel_block = _shared_or_whole(t, number, tile_blocks, panel_blocks)
    elif p.tile.rows_outer:
        rest, panel_block = t.divmod(number, panel_blocks)
        image, tile_block = t.divmod(rest, tile_blocks)
    else:
        rest, tile_block = t.divmod(number, tile_blocks)
        image, panel_block = t.divmod(rest, panel_blocks)
    at: dict[str, Int] = {}
    a, b, out = bases
    packed: Int = 0
    scale: Int = 1
    for axis in reversed(p.c.batch):
        image, i = t.divmod(image, t.dim(axis.extent, dims)) if axis is not p.c.batch[0] else (0, image)
        at[axis.name] = i
        steps = ((a, axis.a * p.ar.a_bytes), (out, axis.out * p.out_bytes))
        a, out = (t.at(x, t.mul(i, t.dim(step, dims))) for x, step in steps)
        if p.c.packing.kind != "panels":
            b = t.at(b, t.mul(i, t.dim(axis.b * F32_BYTES, dims)))
        elif axis.b != 0:
            packed = t.add(packed, t.mul(i, scale))
            scale = t.mul(scale, t.dim(axis.extent, dims))
    if p.c.packing.kind == "panels":
        b = t.at(b, t.mul(packed, t.mul(n_panels, _panel_bytes(t, p, dims))))
    first_panel, first_tile = t.mul(panel_block, p.tile.panels_per_unit), t.mul(tile_block, p.tile.tiles_per_unit)
    panel_end = t.minimum(t.add(first_panel, p.tile.panels_per_unit), n_panels)
    tile_end = t.minimum(t.add(first_tile, p.tile.tiles_per_unit), n_tiles)
    staged_b = t.at("%scratch", t.dim(p.notes_bytes + p.staged_a_bytes, dims)) if p.tile.stage_b else b
    waiting = (
        t.at("%scratch", t.dim(p.notes_bytes + p.staged_a_bytes + p.staged_b_bytes, dims)) if p.tile.k_block else ""
    )
    return _Unit(at, a, b, out, first_panel, panel_end, first_tile, tile_end, staged_b, waiting)


def _shared_or_whole(t: Text, number: Int, tile_blocks: Int, panel_blocks: Int) -> tuple[Int, Int]:
    """Which block of tiles and of panels a unit has, where threads keep rows, but not the one that gets all units."""
    first, last = (
        t.op(f"icmp eq i64 {x}, {y}") for x, y in (("%begin", 0), ("%end", t.mul(tile_blocks, panel_blocks)))
    )
    is_whole = t.op(f"and i1 {first}, {last}")
    of_shared, of_whole = t.divmod(number, panel_blocks), t.divmod(number, tile_blocks)[::-1]
    tile_block, panel_block = (
        t.op(f"select i1 {is_whole}, i64 {whole}, i64 {shared}") for shared, whole in zip(of_shared, of_whole)
    )
    return tile_block, panel_block


def _stage_a(t: Text, p: Plan, dims: Mapping[str, Int], unit: _Unit) -> None:
    stride = t.dim(p.staged_row_bytes, dims)
    corner = _corner(t, p, dims, _locate(t, p, dims, unit.first_tile), unit.a)
    with _unless_staged(t, 0, corner), t.loop(unit.first_tile, unit.tile_end) as tile:
        spot = _locate(t, p, dims, tile)
        _stage_tile(t, p, dims, spot, _corner(t, p, dims, spot, unit.a), _staged_tile(t, p, dims, unit, tile), stride)


def _staged_tile(t: Text, p: Plan, dims: Mapping[str, Int], unit: _Unit, tile: Int) -> str:
    at = t.add(p.notes_bytes, t.mul(t.sub(tile, unit.first_tile), t.dim(p.staged_row_bytes * p.tile_rows, dims)))
    return t.at("%scratch", at)


def _stage_b(t: Text, p: Plan, dims: Mapping[str, Int], unit: _Unit) -> None:
    column = t.dim(p.c.packing.n_stride * p.tile.lanes * F32_BYTES, dims)
    first = t.at(unit.b, t.mul(unit.first_panel, column))
    with _unless_staged(t, 1, first), t.loop(unit.first_panel, unit.panel_end) as panel:
        to = t.at(unit.staged_b, t.mul(t.sub(panel, unit.first_panel), _panel_bytes(t, p, dims)))
        _stage_panel(t, p, dims, panel, t.at(unit.b, t.mul(panel, column)), to)


def _tile(t: Text, p: Plan, dims: Mapping[str, Int], unit: _Unit, passed: Int, panel: Int, tile: Int) -> None:
    """One pass over one tile and one panel."""
    spot = _locate(t, p, dims, tile)
    n = t.mul(panel, p.tile.lanes)
    nth_panel, nth_tile = t.sub(panel, unit.first_panel), t.sub(tile, unit.first_tile)
    panel_bytes = _panel_bytes(t, p, dims)
    b = t.at(unit.staged_b, t.mul(nth_panel if p.tile.stage_b else panel, panel_bytes))
    a = _staged_tile(t, p, dims, unit, tile) if p.tile.stage_a else _corner(t, p, dims, spot, unit.a)
    pass_bytes = t.dim(p.pass_rows * p.row_bytes, dims)
    if p.tile.k_block:
        first = p.c.taps[0]
        a = t.at(a, t.mul(passed, t.dim(first.a * p.tile.k_block * p.ar.a_bytes, dims)))
        in_place = t.dim(first.b * p.tile.k_block * F32_BYTES, dims)
        b = t.at(b, t.mul(passed, pass_bytes if p.in_panels else in_place))
    out = t.at(unit.out, t.mul(n, p.out_bytes))
    for axis in p.above if p.tile.pitch else p.c.rows:
        out = t.at(out, t.mul(spot.at[axis.name], t.dim(axis.out * p.out_bytes, dims)))
    more = ", ptr %tiles" if p.ar.is_tile else ""
    if p.tile.k_block:
        slot = t.add(t.mul(nth_panel, t.sub(unit.tile_end, unit.first_tile)), nth_tile)
        last = t.op(f"icmp eq i64 {passed}, {p.n_passes - 1}")
        more = f", ptr {t.at(unit.waiting, t.mul(slot, p.waiting_bytes))}, i1 {last}"
    if p.fetches_ahead:
        following = pass_bytes if p.n_passes > 1 and p.tile.panels_per_unit == 1 else panel_bytes
        rounds = t.divmod(t.dim(p.pass_rows, dims), p.round_rows)[0]
        share = t.mul(tile if p.takes_turns else nth_tile, t.mul(rounds, p.ahead_lines * LINE_BYTES))
        more += f", ptr {t.at(t.at(b, following), share)}"
    elif p.fetches_rows:
        n_chunks = t.divmod(t.dim(p.pass_rows, dims), p.round_rows)[0]
        share = t.mul(nth_panel, t.mul(n_chunks, p.ahead_lines * LINE_BYTES))
        more += f", ptr {t.at(t.at(a, t.mul(t.dim(p.inner.a, dims), p.tile_rows * p.ar.a_bytes)), share)}"
    _call_tile(t, p, dims, spot, n, unit.at | spot.at, (a, b, out), more)


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
        a = t.at(a, t.mul(spot.at[axis.name], t.mul(t.dim(axis.a, dims), p.ar.a_bytes)))
    return a


def _stage_tile(t: Text, p: Plan, dims: Mapping[str, Int], spot: _Spot, a: str, to: str, staged: Int) -> None:
    """Copies the rows of a tile from A to scratch."""
    n_bytes = t.dim(p.k * p.ar.a_bytes, dims)
    step_outer, step_inner = (t.mul(t.dim(x.a, dims), p.ar.a_bytes) for x in (p.outer, p.inner))

    def copy(outer: int, inner: int) -> None:
        with t.loop(0, outer) as o, t.loop(0, inner) as i:
            row = t.at(t.at(a, t.mul(o, step_outer)), t.mul(i, step_inner))
            copy_row(t, p.isa, row, t.at(to, t.mul(t.add(t.mul(o, inner), i), staged)), n_bytes)

    _by_size(t, p, spot, copy)


@contextmanager
def _unless_staged(t: Text, note: int, source: str) -> Iterator[None]:
    """Runs the body where the block staged last did not come from `source`, as the nth note tells."""
    stale, ready = t.label(), t.label()
    at = t.at("%scratch", 8 * note)
    before = t.op(f"load ptr, ptr {at}, align 8")
    t.branch(t.op(f"icmp eq ptr {before}, {source}"), ready, stale)
    t.start(stale)
    t.put(f"store ptr {source}, ptr {at}, align 8")
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
