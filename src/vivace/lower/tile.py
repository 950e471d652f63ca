"""How a contraction is cut for one instruction set: registers, row tiles, blocks. Data only; the code is made in
`targets`.

A *tile* is `rows x nv` vector accumulators held in registers while the taps run. Rows come from the last row axis,
or, where that is short and of known extent (7x7 images), from the last two. A *split* cuts an axis exactly into
segments, so that no result is computed twice: a kernel may then add to what it overwrites. A *unit* of parallel work
is a block of tiles times a block of panels.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace

from vivace.base.dims import Dim, Symbol, evaluate, prod, symbols
from vivace.base.machine import Isa, Machine, host
from vivace.loops.blocked import PLACES
from vivace.loops.contraction import Axis, Contraction, merge_axes
from vivace.lower.arithmetic import F32, Arithmetic, arithmetic_of
from vivace.lower.choices import DEFAULT, Choice

Segment = tuple[Dim, int]  # count, size

# One unit should cost a thread some microseconds more than claiming it does, and a step should offer each of a few
# threads several units, to even out. Rates are those of one core today, to the nearest half order of magnitude.
_UNIT_NS = 8_000
# Eight for each of 64 threads would, by `measure.scaling`, bring ResNet-50 from 23 to 26 times the speed of one thread,
# and MiniLM from 36 down to 35: no reason to cut by the number of threads.
_UNITS_WANTED = 32
_FLOPS_PER_NS = 100
_BYTES_PER_NS = 30
_LEAST_TILES_TO_STAGE = 20  # of 14 rows: between 197 and 1500 rows
MOST_VECTORS = 4  # per panel: 6 rows of 4 reach the peak with 32 registers
_FEWEST_ROWS = 64  # that a product is cut for, where their number only shows at run time
_MANY_TILES = 64  # all rows that come, up to 2048
_FEW_UNITS = 8
_FEW_ROWS, _ROWS_TO_MEET = 24, 64  # of a unit, where B is large
_LEAST_GAIN_OF_ROWS = 1.5  # over what copying them costs
# A panel that comes from the second-level cache for 64 rows is still waited for: MiniLM, of 128, takes 1.01 to 1.02 of
# the time on one thread, and no less on two.
_LEAST_ROWS_TO_KEEP = 192
_LEAST_K_BLOCK = 512  # below it, reading and writing the accumulators once more per pass begins to show


@dataclass(frozen=True, slots=True)
class Tile:
    """The plan of one contraction kernel.

    `outer` and `inner` split the last two row axes (a missing axis is `((1, 1),)`); a tile takes one piece of each.
    `tiles_per_unit` and `panels_per_unit` make the unit; `rows_outer` tells which of the two block numbers varies
    slowest over the units.

    `stage_a` copies a block's rows of A to scratch, an odd number of cache lines apart; `stage_b` makes panels in
    scratch from a run-time B. `k_block` steps of the outermost tap are summed in one pass over a unit (0: all);
    accumulators wait in scratch between passes. `tiles_outside` walks all panels of a unit for each tile, which
    touches A and out in order, where the panels are small and A is larger than B: 40x120 @ 120x6625 is 8 % faster with
    panels outside, 56x56x64 -> 256 3 % slower.

    With a `pitch` the last two row axes are one of so many rows per step of the outer one: rows between the end of one
    step and the start of the next are computed, since A goes on there, and not stored. `inner` splits that axis.

    `keeps_b` tells that all of B fits into half of the second-level cache.

    With `keeps_rows` units go through all panels for one block of rows after the other, so that threads keep to rows of
    their own, though B is the larger one; a thread that gets all units still takes all rows for one panel after the
    other.
    """

    nv: int
    lanes: int
    outer: tuple[Segment, ...]
    inner: tuple[Segment, ...]
    unroll: int
    tiles_per_unit: int
    panels_per_unit: int
    rows_outer: bool
    stage_a: bool
    stage_b: bool = False
    k_block: int = 0
    tiles_outside: bool = False
    pitch: int = 0
    keeps_b: bool = False
    keeps_rows: bool = False


def max_rows(nv: int, isa: Isa, n_spare: int = 0) -> int:
    """Rows of accumulators that leave registers for `nv` vectors of B, one broadcast, without FMA a product, and
    `n_spare` more.
    """
    spare = isa.n_vector_registers - nv - (1 if isa.has_fma else 2) - n_spare
    return max(1, min(spare // nv, 14))


def panel_lanes(n: Dim, isa: Isa, ar: Arithmetic = F32, chosen: int | None = None) -> int:
    """Columns per panel of packed B; those that were chosen, where they are whole vectors and few enough."""
    if ar.is_tile:
        return 16 if isinstance(n, int) and n <= 16 else 32
    width = isa.n_f32_lanes
    if chosen and chosen % width == 0 and chosen <= MOST_VECTORS * width:
        return chosen
    if not isinstance(n, int):
        return 2 * width
    vectors = -(-n // width)
    if vectors <= 1:
        return width
    if vectors % 2 and vectors % 3 == 0:
        return 3 * width
    return 2 * width


def split_axis(extent: Dim, most: int, is_fewest: bool = False) -> tuple[Segment, ...]:
    """Segments of at most `most` that cover `extent` exactly; where it is known evenly, or as few as there can be."""
    if not isinstance(extent, int):
        segments: list[Segment] = [(extent // most, most)]
        rest, size = extent % most, 1 << (most.bit_length() - 1)
        while size:
            if size < most:
                segments.append((rest // size, size))
                rest = rest % size
            size >>= 1
        return tuple(segments)
    if extent == 0:
        return ((0, 1),)
    fewest = -(-extent // most)
    for pieces in range(fewest, fewest + (1 if is_fewest else max(2, fewest // 3))):
        if extent % pieces == 0 and extent // pieces * 4 >= most * 3:
            return ((pieces, extent // pieces),)
    size = -(-extent // fewest)
    n_small = size * fewest - extent
    return ((fewest - n_small, size), (n_small, size - 1)) if n_small else ((fewest, size),)


def pieces(split: tuple[Segment, ...]) -> Dim:
    """How many pieces a split has."""
    total: Dim = 0
    for count, _ in split:
        total = total + count
    return total


def choose_tile(c: Contraction, isa: Isa, machine: Machine | None = None, choice: Choice = DEFAULT) -> Tile:
    """The plan of a contraction (merged or not) for an instruction set and the caches of a machine.

    What `choice` sets is taken over, unless it does not fit: a choice may come from a file.
    """
    machine = machine or host()
    c = merge_axes(c)
    ar = arithmetic_of(c, isa)
    lanes = c.packing.lanes or panel_lanes(c.n, isa, ar)
    nv = lanes // isa.n_f32_lanes
    most = max_rows(nv, isa, ar.n_spare)
    most = min(most, choice.rows or most)
    pitch = _pitch(c.rows) if ar.is_tile else 0
    if ar.is_tile:
        outer, inner = _split_for_tiles(_at_pitch(c.rows, pitch) if pitch else c.rows)
    else:
        outer, inner = split_rows(c.rows, most)
    sizes = _sizes(c)
    n_panels = max(1, -(-_known([c.n], sizes) // lanes))
    colliding = not ar.is_tile and collides(c.rows, outer, inner, machine, ar.a_bytes)
    can_stage = not ar.is_tile and len(c.taps) == 1 and c.taps[0].a == 1
    stage_a = can_stage and (colliding and n_panels > 1 if choice.stage_a is None else choice.stage_a)
    if colliding and len(c.taps) > 1 and not choice.rows:
        outer, inner = split_rows(c.rows, max(1, most // 2))
    n_tiles = max(1, _known([*(r.extent for r in c.rows[:-2]), pieces(outer), pieces(inner)], sizes))
    stage_b = c.packing.kind == "transposed" or (c.packing.kind == "plain" and _pays_to_stage_b(c, isa, n_tiles, lanes))
    if c.packing.kind == "plain" and choice.stage_b is not None:
        stage_b = choice.stage_b
    k_block = _k_block(c, ar, machine, sizes)
    if choice.k_block is not None and _is_k_block(choice.k_block, c, ar):
        k_block = choice.k_block
    steps = k // ar.group if isinstance(k := _channel(c), int) else None
    unroll = next((u for u in (4, 3, 2, 5) if steps is not None and steps % u == 0), 4)
    tiles, panels, rows_outer = _unit(c, ar, n_tiles, n_panels, k_block, machine, sizes)
    tiles = min(choice.tiles, n_tiles) if choice.tiles else tiles
    panels = min(choice.panels or panels, n_panels)
    rows_outer = rows_outer if choice.rows_outer is None else choice.rows_outer
    if stage_b:
        rows_outer = False
        panels = max(1, min(panels, _half_l2(machine) // max(1, _known([_k(c)], sizes) * lanes * 4)))
    keeps_rows = (
        choice == DEFAULT and not (rows_outer or stage_a or stage_b or k_block) and _pays_to_keep_rows(c, ar, machine)
    )
    if keeps_rows:
        blocks = max(2, -(-_UNITS_WANTED // n_panels))
        tiles, panels, rows_outer = -(-n_tiles // blocks), -(-n_panels * blocks // _UNITS_WANTED), True
    panel_bytes = lanes * _known([_k(c)], sizes) * ar.b_bytes
    b_block, keeps_b = panels * panel_bytes, n_panels * panel_bytes <= _half_l2(machine)
    fits = rows_outer and not keeps_rows and b_block <= machine.cache_bytes(2) // 16
    fits = fits if choice.tiles_outside is None else choice.tiles_outside
    tiles_outside = panels > 1 and not k_block and fits
    return Tile(
        nv, lanes, outer, inner, unroll, tiles, panels, rows_outer or stage_a, stage_a, stage_b, k_block, tiles_outside,
        pitch, keeps_b, keeps_rows,
    )  # fmt: skip


def pays_to_gather(c: Contraction, isa: Isa) -> bool:
    """Whether the rows of A are worth copying next to each other, since they fill few tile registers where they lie: a
    convolution of 1x1 that skips pixels, 7 of a row, leaves half of each register empty.

    A register less saves 16 cycles for each 16 columns and line of A, and a line of each row is copied in 16 (4 bytes
    in a cycle). ResNet-50 takes 0.96 of the time in bf16, 0.99 in int8, for one image or four (Emerald
    Rapids).
    """
    c = merge_axes(c)
    if not arithmetic_of(c, isa).is_tile or c.batch or len(c.rows) < 2 or len(c.taps) != 1 or c.taps[0].a != 1:
        return False
    above, last = c.rows[-2:]
    if not isinstance(above.extent, int):  # no step of it is different
        above = replace(above, extent=1)
    if not (isinstance(above.extent, int) and isinstance(last.extent, int) and isinstance(c.n, int)):
        return False
    rows = (above, last)
    pitch = _pitch(rows)
    registers = _registers(_split_for_tiles(_at_pitch(rows, pitch) if pitch else rows))
    n_rows = above.extent * last.extent
    return (registers - n_rows / 16) * c.n > 16 * n_rows * _LEAST_GAIN_OF_ROWS


def _unit(
    c: Contraction, ar: Arithmetic, n_tiles: int, n_panels: int, k_block: int, machine: Machine, sizes: dict[str, int]
) -> tuple[int, int, bool]:
    """Tiles and panels per unit, and whether blocks of tiles vary slowest.

    A block of A stays in half of the second-level cache while panels of B pass. What is larger, A or B, is cut first,
    so that the smaller one is read again, until there are enough units for the threads. A B that does not stay near
    is cut in any case, so that many rows meet a panel when it comes: 2048 x 2048 x 2048 in bf16 takes 0.75 of the time
    of single tiles of rows, 1024 x 1024 x 1024 0.65 (Emerald Rapids).

    Units of few rows would each read all of a B that takes a quarter of that cache or more: they get more rows, of
    fewer panels. 392x1024 @ 1024x256 in f32 takes 0.91 to 0.96 of the time with 66 rows instead of 12, 512x384 @
    384x384 0.94 to 0.97 with 64 instead of 16 (one thread, Emerald Rapids); with 40 rows and more it is no matter.

    Where panels alone make a few units, and more rows may come than are known of, those that come meet a panel at once:
    384 columns of a 1024 x 1536 A took a twentieth more of MiniLM in bf16 with a unit for each tile.
    """
    rows, k, n = _known([r.extent for r in c.rows], sizes), _known([_k(c)], sizes), _known([c.n], sizes)
    n_batch = max(1, _known([b.extent for b in c.batch], sizes))
    channels = k_block if len(c.taps) == 1 and k_block else _known([_channel(c)], sizes)
    a_bytes, b_bytes = rows * channels * ar.a_bytes, n * k * ar.b_bytes
    work_ns = max(2 * rows * n * k / (_FLOPS_PER_NS * ar.group), (b_bytes + a_bytes) / _BYTES_PER_NS)
    wanted = max(1, math.ceil(min(_UNITS_WANTED, n_batch * work_ns / _UNIT_NS) / n_batch))
    tiles = n_tiles if a_bytes <= _half_l2(machine) else max(1, n_tiles * _half_l2(machine) // a_bytes)
    panels = n_panels
    if (k_block and len(c.taps) == 1) or b_bytes > min(a_bytes, _half_l2(machine)):
        panels = max(1, n_panels // max(1, -(-wanted // -(-n_tiles // tiles))))
    have = -(-n_tiles // tiles) * -(-n_panels // panels)
    is_open = any(symbols(prod([r.extent for r in c.rows])))
    if is_open and b_bytes > a_bytes and tiles == n_tiles and have >= min(wanted, _FEW_UNITS):
        return _MANY_TILES, -(-n_panels // have), False
    if have < wanted:
        fewer = max(1, tiles // -(-wanted // have))
        is_far = not ar.is_tile and _half_l2(machine) // 2 < b_bytes <= a_bytes
        if is_far and fewer * rows < _FEW_ROWS * n_tiles:
            fewer = min(tiles, -(-_ROWS_TO_MEET * n_tiles // rows))
            panels = max(1, panels // -(-wanted // -(-n_tiles // fewer)))
        tiles = fewer
    tiles, panels = (-(-total // -(-total // size)) for total, size in ((n_tiles, tiles), (n_panels, panels)))
    return tiles, panels, b_bytes <= a_bytes


def _pays_to_keep_rows(c: Contraction, ar: Arithmetic, machine: Machine) -> bool:
    """Whether threads had better keep to rows of their own though B is larger than A: what each of them reads of A is
    then what it wrote itself, not what lies in the cache of the other, and a B that stays near costs little to read
    twice. On 2 threads a unit of ResNet-50's 196 x 256 -> 1024 takes 0.93 of the time (Emerald Rapids).
    """
    rows, k, n = prod([r.extent for r in c.rows]), _k(c), c.n
    if ar.is_tile or c.batch or not (isinstance(rows, int) and isinstance(k, int) and isinstance(n, int)):
        return False
    return rows >= _LEAST_ROWS_TO_KEEP and n * k * ar.b_bytes <= _half_l2(machine)


def _k_block(c: Contraction, ar: Arithmetic, machine: Machine, sizes: dict[str, int]) -> int:
    """Steps of the outermost tap per pass where A and B are too large to stay in the second-level cache over all; 0
    for all at once.
    """
    first = c.taps[0].extent if c.taps else 1
    rows, k, n = _known([r.extent for r in c.rows], sizes), _k(c), _known([c.n], sizes)
    room, least = _half_l2(machine), _LEAST_K_BLOCK * ar.group
    if ar.is_tile or not isinstance(first, int) or not isinstance(k, int):
        return 0
    if k < 2 * least or n * k * ar.b_bytes <= room:
        return 0
    if len(c.taps) > 1:  # whole kernel rows, where a panel leaves little room for A and the panel that comes next
        return 1 if first > 1 and k * c.packing.lanes * ar.b_bytes > room // 2 else 0
    if rows * k * ar.a_bytes <= room:
        return 0
    divisors = [k // passes for passes in range(2, k // least + 1) if k % (passes * 16) == 0]
    return next((size for size in divisors if rows * size * ar.a_bytes <= room), divisors[-1] if divisors else 0)


def _is_k_block(size: int, c: Contraction, ar: Arithmetic) -> bool:
    """Whether passes of so many steps of the outermost tap are possible."""
    first = c.taps[0].extent if c.taps else 1
    if size == 0:
        return True
    whole = len(c.taps) > 1 or size % 16 == 0
    return not ar.is_tile and isinstance(first, int) and size < first and first % size == 0 and whole


def _half_l2(machine: Machine) -> int:
    return machine.cache_bytes(2) // 2


def _channel(c: Contraction) -> Dim:
    return c.taps[-1].extent if c.taps else 1


def _k(c: Contraction) -> Dim:
    return prod([t.extent for t in c.taps])


def _pays_to_stage_b(c: Contraction, isa: Isa, n_tiles: int, lanes: int) -> bool:
    """Whether panels of a run-time B are worth making: enough tiles read them, or reading in place needs masks that
    are dear.

    Rows of 64 columns, 1.5 to 3 KiB apart: with AVX-512 in place is 2 to 6 % faster for 64 to 197 rows of A, 1 % slower
    for 1500; with AVX2 panels are up to 6 % faster from 64 rows on, 25 % for 128 columns (Zen 4).
    """
    if isa.vector_bits == 512:
        return n_tiles >= _LEAST_TILES_TO_STAGE
    return n_tiles >= 3 or not isinstance(c.n, int) or c.n % isa.n_f32_lanes != 0


def collides(
    rows: tuple[Axis, ...],
    outer: tuple[Segment, ...],
    inner: tuple[Segment, ...],
    machine: Machine,
    a_bytes: int = F32.a_bytes,
) -> bool:
    """Whether the rows of one tile fall into so few sets of the first-level cache that they evict each other, step
    after step.
    """
    steps = [(r.a, split[0][1]) for r, split in zip(reversed(rows), (inner, outer))]
    offsets = [0]
    for a, count in steps:
        if not isinstance(a, int):
            return False
        offsets = [o + i * a * a_bytes for o in offsets for i in range(count)]
    level = machine.data_cache(1)
    ways = level.n_ways if level and level.n_ways else 8
    n_sets = max(1, machine.cache_bytes(1) // machine.line_bytes // ways)
    sets = Counter(line % n_sets for line in {o // machine.line_bytes for o in offsets})
    return max(sets.values()) >= ways  # one way is B's, which streams through every set


def staged_rows(k: Dim, isa: Isa) -> Dim:
    """Rows of a staged panel of B: whole vectors, since blocks are transposed whole."""
    return (k + isa.n_f32_lanes - 1) // isa.n_f32_lanes * isa.n_f32_lanes


def staged_stride(k: Dim, a_bytes: int = F32.a_bytes) -> Dim:
    """Elements between staged rows of A: an odd number of cache lines, so that neighbours fall into different sets."""
    per_line = 64 // a_bytes
    lines = (k + per_line - 1) // per_line
    return (lines + 1 - lines % 2) * per_line


def _sizes(c: Contraction) -> dict[str, int]:
    """What the sizes that only show at run time are taken to be: those of rows alike, and as small as makes some rows.

    More rows make more units of the same size, fewer leave threads without work: cut for 64 images, most convolutions
    of ResNet-50 are one or two units when one image comes.
    """
    rows = prod([r.extent for r in c.rows])
    free = {s for d in (*(x.extent for x in (*c.batch, *c.rows, *c.taps)), c.n) for s in symbols(d)}
    places = dict.fromkeys(PLACES, 0)  # the first block is a whole one
    of_rows, size = set(symbols(rows)), 1
    while True:
        sizes = {s.name: _within(s, size if s in of_rows else _FEWEST_ROWS) for s in free} | places
        if size >= _FEWEST_ROWS or evaluate(rows, sizes) >= _FEWEST_ROWS:
            return sizes
        size *= 2


def _within(s: Symbol, size: int) -> int:
    return max(1, s.lo or 0, size if s.hi is None else min(size, s.hi))


def _known(dims: list[Dim], sizes: dict[str, int]) -> int:
    return evaluate(prod(dims), sizes)


def split_rows(rows: tuple[Axis, ...], most: int) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """The last two row axes in pieces, for tiles of at most so many rows in vector registers."""
    if not rows:
        return ((1, 1),), ((1, 1),)
    last = rows[-1]
    if len(rows) == 1:
        return ((1, 1),), split_axis(last.extent, most)
    above = rows[-2]
    static = all(isinstance(d, int) for d in (last.extent, last.a, last.out, above.a, above.out))
    if not static or not isinstance(last.extent, int) or last.extent * 2 > most or last.extent == 0:
        return ((above.extent, 1),), split_axis(last.extent, most)
    height = most // last.extent
    if isinstance(above.extent, int):
        return split_axis(above.extent, height), ((1, last.extent),)
    return ((above.extent // height, height), (above.extent % height, 1)), ((1, last.extent),)


def _pitch(rows: tuple[Axis, ...]) -> int:
    """Rows of the last axis from one step of the axis above to the next, where that fills tile registers better: the
    7 x 7 rows of an image 9 wide take 4 registers as 61 rows, and 7 as they are. 0 for no.
    """
    if len(rows) < 2:
        return 0
    last, above = rows[-1], rows[-2]
    if not all(isinstance(d, int) and d > 0 for d in (last.extent, last.a, above.extent, above.a)):
        return 0
    pitch, rest = divmod(int(above.a), int(last.a))  # type: ignore[arg-type]
    if rest or pitch < int(last.extent) or above.extent == 1:  # type: ignore[arg-type]
        return 0
    as_they_are = _registers(_split_for_tiles(rows))
    return pitch if _registers(_split_for_tiles(_at_pitch(rows, pitch))) < as_they_are else 0


def _at_pitch(rows: tuple[Axis, ...], pitch: int) -> tuple[Axis, ...]:
    """The last two axes as the one that a pitch makes of them."""
    *others, above, last = rows
    assert isinstance(above.extent, int) and isinstance(last.extent, int)
    return (*others, Axis("", 1), replace(last, extent=(above.extent - 1) * pitch + last.extent))


def _registers(split: tuple[tuple[Segment, ...], tuple[Segment, ...]]) -> int:
    """Tile registers of A that the pieces of both axes fill or begin."""
    total = 0
    for (n_outer, outer), (n_inner, inner) in itertools.product(*split):
        assert isinstance(n_outer, int) and isinstance(n_inner, int)
        total += n_outer * n_inner * (outer if outer > 1 else -(-inner // 16))
    return total


def _split_for_tiles(rows: tuple[Axis, ...]) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Two tile registers of at most 16 rows: halves of a piece of the last axis, or two steps of the one before. A
    product of registers takes as long with fewer rows.
    """
    if not rows:
        return ((1, 1),), ((1, 1),)
    last = rows[-1].extent
    if len(rows) == 1:
        return ((1, 1),), split_axis(last, 32, is_fewest=True)
    if isinstance(last, int) and 0 < last <= 16 and rows[-2].extent != 1:
        return split_axis(rows[-2].extent, 2), ((1, last),)
    return ((rows[-2].extent, 1),), split_axis(last, 32, is_fewest=True)
