"""What else a site could be made like, and which of it looks promising: the cost model that tuning starts from.

    predict(c, tile) = max(arithmetic, second-level cache, beyond it) * imbalance + units * claim

    arithmetic   flops, columns filled up to whole vectors, at the measured peak; less where a tile has too few
                 accumulators to hide latency, or loads more per step than it multiplies
    caches       bytes that pass each level with blocks as the tile cuts them, at the measured bandwidths
    imbalance    threads that wait while the last units are computed

The model orders; measuring decides (`lower/tune.py`). Sizes that only a run will tell are typical ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from vivace.base.dims import prod, typical
from vivace.base.machine import Isa, Machine, host
from vivace.loops.contraction import Contraction, Depthwise, merge_axes
from vivace.lower.arithmetic import arithmetic_of
from vivace.lower.choices import BLOCKS, DIRECT, FLOATS, Choice, Site
from vivace.lower.rules import winograd
from vivace.lower.tile import MOST_VECTORS, Tile, choose_tile, max_rows, pieces

HOPELESS = 1.6  # times the best prediction; the model is right within that
CHEAP_NS = 30_000.0  # of another format: what follows a product of bytes may take ten times what the model sees of it
_LATENCY = 8  # accumulators that keep two multiply-add units busy: 4 cycles each
_CLAIM_NS = 60.0  # handing out a unit, and the first misses in it


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine does per nanosecond with all threads: operations by element type, bytes from each level."""

    operations: dict[str, float]
    l2: float
    l3: float
    threads: int


def neighbours(site: Site, now: Choice, isa: Isa, rates: Rates) -> list[Choice]:
    """Choices that differ from `now` in one setting, or in two that belong together; the most promising first."""
    machine = host()
    found: dict[object, Choice] = {}
    for c in _changed(site, now, isa, machine):
        found.setdefault(_made(site, c, isa, machine), c)
    found.pop(_made(site, now, isa, machine), None)
    ns = {c: predict(site, c, isa, machine, rates) for c in found.values()}
    alike = [t for c, t in {now: predict(site, now, isa, machine, rates), **ns}.items() if c.way != FLOATS]
    hopeless = HOPELESS * min(alike, default=0.0)
    tried = [c for c in ns if ns[c] <= hopeless or (c.way == FLOATS and ns[c] <= CHEAP_NS)]
    return sorted(tried, key=lambda c: (c.way != FLOATS, ns[c]))


def predict(site: Site, choice: Choice, isa: Isa, machine: Machine, rates: Rates) -> float:
    """Nanoseconds that a site takes, roughly."""
    c = site.spec
    way = choice.way or (site.ways[0] if site.ways else DIRECT)
    if isinstance(c, Depthwise) or way == BLOCKS:
        return 0.0  # all alike to the model: bound by the caches
    c = merge_axes(c)
    if way == FLOATS:
        batch, rows, k = (typical(prod([x.extent for x in axes])) for axes in (c.batch, c.rows, c.taps))
        return 2.0 * batch * rows * k * typical(c.n) / rates.operations["f32"]
    kind = "f32" if c.a.dtype.is_float and c.a.dtype.size_bytes > 2 else "bf16" if c.a.dtype.is_float else "i8"
    peak = rates.operations.get(kind, rates.operations["f32"])
    if way != DIRECT:
        return _winograd_flops(site.spec, way, isa) / rates.operations["f32"]  # type: ignore[arg-type]
    tile = choose_tile(_packed(c, choice, isa), isa, machine, choice)
    return _tile_ns(c, tile, isa, machine, rates, peak)


def _tile_ns(c: Contraction, tile: Tile, isa: Isa, machine: Machine, rates: Rates, peak: float) -> float:
    ar = arithmetic_of(c, isa)
    rows, k, n = (typical(d) for d in (prod([r.extent for r in c.rows]), prod([t.extent for t in c.taps]), c.n))
    n_batch = typical(prod([b.extent for b in c.batch]))
    height = max(s for _, s in tile.outer) * max(s for _, s in tile.inner)
    n_tiles = max(1, typical(prod([r.extent for r in c.rows[:-2]]) * pieces(tile.outer) * pieces(tile.inner)))
    n_panels = max(1, -(-n // tile.lanes))
    columns = -(-n // isa.n_f32_lanes) * isa.n_f32_lanes
    slow = 1.0
    if not ar.is_tile:
        slow = max(1.0, (height + tile.nv) / (height * tile.nv), _LATENCY / (height * tile.nv))
    arithmetic = 2.0 * n_batch * rows * k * columns * slow / peak
    blocks = (-(-n_tiles // tile.tiles_per_unit), -(-n_panels // tile.panels_per_unit))
    a_bytes, b_bytes, room = rows * k * ar.a_bytes, n_panels * tile.lanes * k * ar.b_bytes, machine.cache_bytes(1) // 2
    a_again, b_again = (1, blocks[0]) if tile.rows_outer else (blocks[1], 1)
    keep = tile.lanes * (tile.k_block or k) * ar.b_bytes <= room  # a panel stays near while tiles pass
    near = n_tiles * b_bytes * (0.3 if keep else 1.0) + n_panels * a_bytes * (0.3 if tile.tiles_outside else 1.0)
    passes = -(-k // tile.k_block) if tile.k_block and len(c.taps) == 1 else 1
    near += 8.0 * (passes - 1) * rows * columns
    far = a_bytes * a_again + b_bytes * b_again + rows * n * c.out.dtype.size_bytes
    if tile.stage_a:
        near += 2.0 * a_bytes
    units = n_batch * blocks[0] * blocks[1]
    imbalance = ceil(units / rates.threads) * rates.threads / units
    return max(arithmetic, n_batch * near / rates.l2, n_batch * far / rates.l3) * imbalance + units * _CLAIM_NS


def _winograd_flops(c: Contraction, way: str, isa: Isa) -> float:
    m = winograd.size_of(way)
    assert m is not None
    channels = winograd.guessed(c.taps[-1].extent)
    images, *size = (winograd.guessed(r.extent) for r in c.rows)
    height, width = (1, *size)[-2:]
    tiles = images * -(-height // m[0]) * -(-width // m[1])
    stride = 1 if c.rows[-1].a == c.taps[-2].a else 2
    return winograd.counted_flops(m, tiles, channels, winograd.guessed(c.n), isa, stride)


def _packed(c: Contraction, choice: Choice, isa: Isa) -> Contraction:
    """The contraction with B in the chosen panels."""
    if c.packing.kind != "panels" or not choice.lanes:
        return c
    return replace(c, packing=replace(c.packing, lanes=choice.lanes))


def _made(site: Site, choice: Choice, isa: Isa, machine: Machine) -> object:
    """What a choice comes to: choices that make the same kernel are one."""
    c = site.spec
    way = choice.way or (site.ways[0] if site.ways else DIRECT)
    if site.sizes is not None:
        return (way, site.sizes(choice))
    if isinstance(c, Depthwise) or way != DIRECT:
        return (way, replace(choice, way=None))
    return (way, choose_tile(_packed(c, choice, isa), isa, machine, choice))


def _changed(site: Site, now: Choice, isa: Isa, machine: Machine) -> Iterator[Choice]:
    c = site.spec
    if isinstance(c, Depthwise):
        yield from (Choice(way=way) for way in site.ways)
        if now.way != FLOATS:
            yield from _changed_depthwise(c, now)
        return
    if site.ways == (BLOCKS,):
        yield from _changed_blocks(c, now)
        return
    for way in site.ways:
        yield Choice(way=way)
    way = now.way or (site.ways[0] if site.ways else DIRECT)
    if way == FLOATS:
        return
    if way != DIRECT:
        yield from _changed_winograd(c, now)
        return
    ar = arithmetic_of(c, isa)
    merged = merge_axes(_packed(c, now, isa))
    tile = choose_tile(merged, isa, machine, now)
    width = isa.n_f32_lanes
    if not ar.is_tile:
        lanes = [v * width for v in range(1, MOST_VECTORS + 1)] if c.packing.kind == "panels" else [tile.lanes]
        n = typical(c.n)
        for columns in lanes:
            if columns == width or columns - width < n:
                most = max_rows(columns // width, isa, ar.n_spare)
                for rows in dict.fromkeys((most, most - 1, most * 3 // 4, most // 2)):
                    if rows >= 1:
                        yield replace(now, lanes=columns if c.packing.kind == "panels" else None, rows=rows,
                                      tiles=None, panels=None)  # fmt: skip
    n_panels = max(1, -(-typical(c.n) // tile.lanes))
    tiles, panels = tile.tiles_per_unit, tile.panels_per_unit
    yield replace(now, rows_outer=not tile.rows_outer)
    yield replace(now, rows_outer=not tile.rows_outer, tiles=tiles, panels=panels)
    for t, p in _units(tiles, panels, n_panels):
        yield replace(now, tiles=t, panels=p)
    if panels > 1:
        yield replace(now, tiles_outside=not tile.tiles_outside)
    if len(c.taps) and not ar.is_tile:
        yield replace(now, stage_a=not tile.stage_a)
        first, steps = merged.taps[0].extent if merged.taps else 1, (0, 256, 384, 512, 768, 1024)
        for size in steps if len(merged.taps) == 1 else (0, 1):
            if size != tile.k_block and isinstance(first, int) and (size == 0 or (first % size == 0 and size < first)):
                yield replace(now, k_block=size, tiles=None, panels=None)
    if c.packing.kind == "plain":
        yield replace(now, stage_b=not tile.stage_b)


def _units(tiles: int, panels: int, n_panels: int) -> Iterator[tuple[int, int]]:
    for t, p in ((2, 1), (0.5, 1), (1, 2), (1, 0.5), (2, 0.5), (0.5, 2), (4, 1), (0.25, 1)):
        yield max(1, int(tiles * t)), max(1, min(n_panels, int(panels * p)))
    yield tiles, n_panels
    yield tiles, 1


def _changed_winograd(c: Contraction, now: Choice) -> Iterator[Choice]:
    for tiles in (7, 8, 10, 12, 14, 16, 20, 24, 28):
        yield replace(now, tiles=tiles)


def _changed_blocks(c: Contraction, now: Choice) -> Iterator[Choice]:
    queries, keys = typical(c.rows[0].extent), typical(c.n)
    for rows in (32, 64, 96, 128):
        if rows - 32 < queries:
            yield replace(now, rows=rows)
    for tiles in (64, 128, 192, 256, 512, 1024, 2048):
        if tiles // 2 < keys:
            yield replace(now, tiles=tiles)


def _changed_depthwise(d: Depthwise, now: Choice) -> Iterator[Choice]:
    height, width = (typical(r.extent) for r in (d.rows[-2:] if len(d.rows) > 1 else (d.rows[-1], d.rows[-1])))
    for rows in (4, 5, 6, 7, 8, 10, 12, 14):
        if rows <= max(4, width):
            yield replace(now, rows=rows)
    for tiles in (1, 2, 4, 7, 8, 14, 28):
        if tiles <= height:
            yield replace(now, tiles=tiles)
    for panels in (1, 2, 4, 8):
        yield replace(now, panels=panels)


def rates_of(operations: dict[str, float], levels: Sequence[float], threads: int) -> Rates:
    """From operations and bytes per second."""
    l2, l3 = levels
    return Rates({k: v * 1e-9 for k, v in operations.items()}, l2 * 1e-9, l3 * 1e-9, threads)
