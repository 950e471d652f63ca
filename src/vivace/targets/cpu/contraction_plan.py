"""What the parts of a contraction's code share: the merged contraction, its tile, its parameters, the shapes of its
micro-kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vivace.base.dims import Dim, bounds, ceildiv, prod
from vivace.base.machine import Isa, without_amx
from vivace.loops.contraction import Axis, Contraction
from vivace.loops.kernel import Buffer
from vivace.lower.arithmetic import LEAST_TILE_ROWS, Arithmetic, choose_arithmetic, chunk_bytes
from vivace.lower.tile import Tile, pieces, staged_rows, staged_stride
from vivace.targets.cpu.code import NOTES_BYTES
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import F32_BYTES, LINE_BYTES

_NONE = Axis("", 1)
_LEAST_ROWS_TO_FETCH = 4
_ROOM_BESIDE_TILE = 32 << 10  # of the first-level cache: for panels beside a tile, or for tiles beside a panel


@dataclass(frozen=True, slots=True)
class Plan:
    """A merged contraction with all that its code is made from."""

    name: str
    c: Contraction
    isa: Isa
    ar: Arithmetic
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

    def rows_of_b(self, taps: tuple[Axis, ...]) -> Dim:
        """Rows of a panel for some of the innermost taps: a row holds one group of steps."""
        return prod([x.extent for x in taps[:-1]]) * ceildiv(taps[-1].extent, self.ar.group) if taps else 1

    @property
    def run_bytes(self) -> Dim:
        """A contiguous run of A: the innermost tap. Low precision only."""
        return (self.c.taps[-1].extent if self.c.taps else 1) * self.ar.a_bytes

    @property
    def row_bytes(self) -> int:
        """One row of a panel."""
        return self.tile.lanes * self.ar.lane_bytes

    @property
    def staged_row_bytes(self) -> Dim:
        """From one staged row of A to the next."""
        return staged_stride(self.k, self.ar.a_bytes) * self.ar.a_bytes

    @property
    def tile_rows(self) -> int:
        """Rows of the largest tile."""
        return max(size for _, size in self.tile.outer) * max(size for _, size in self.tile.inner)

    @property
    def n_panels(self) -> Dim:
        return ceildiv(self.c.n, self.tile.lanes)

    @property
    def tail_vectors(self) -> int:
        """Vectors of the last panel where it is narrower than the others or needs a mask, else 0. Unknown width:
        all of them.
        """
        if not isinstance(self.c.n, int):
            return self.tile.nv
        return -(-(self.c.n % self.tile.lanes) // self.isa.n_f32_lanes)

    @property
    def has_full_panel(self) -> bool:
        return not isinstance(self.c.n, int) or self.c.n >= self.tile.lanes

    @property
    def notes_bytes(self) -> int:
        """Scratch for the addresses of what was staged last; staged rows of A follow it."""
        return NOTES_BYTES if self.tile.stage_a or self.tile.stage_b else 0

    @property
    def staged_a_bytes(self) -> Dim:
        """Scratch for staged rows of A; staged panels of B follow it."""
        if not self.tile.stage_a:
            return 0
        return self.tile.tiles_per_unit * self.tile_rows * self.staged_row_bytes

    @property
    def staged_panel_bytes(self) -> Dim:
        return staged_rows(self.k, self.isa) * self.tile.lanes * F32_BYTES

    @property
    def staged_b_bytes(self) -> Dim:
        return self.tile.panels_per_unit * self.staged_panel_bytes if self.tile.stage_b else 0

    @property
    def waiting_bytes(self) -> int:
        """Scratch for the accumulators of one tile between passes; those of a unit follow what is staged."""
        return self.tile_rows * self.tile.lanes * F32_BYTES if self.tile.k_block else 0

    @property
    def scratch_bytes(self) -> Dim:
        n_waiting = self.tile.tiles_per_unit * self.tile.panels_per_unit
        return self.notes_bytes + self.staged_a_bytes + self.staged_b_bytes + n_waiting * self.waiting_bytes

    @property
    def n_passes(self) -> int:
        """Passes go over the outermost tap axis."""
        extent = self.c.taps[0].extent if self.c.taps else 1
        return extent // self.tile.k_block if self.tile.k_block and isinstance(extent, int) else 1

    @property
    def pass_rows(self) -> Dim:
        """Rows of a panel that one pass reads."""
        if not self.tile.k_block:
            return self.rows_of_b(self.c.taps)
        return self.rows_of_b((Axis("", self.tile.k_block), *self.c.taps[1:]))

    @property
    def fetches_ahead(self) -> bool:
        """Whether micro-kernels fetch what comes next in B while they work: constant panels, which may lie in
        memory.

        A unit of one tile with few rows does nothing but wait for B: with it 4x768 @ 768x768 takes 10 % less time, but
        1x2048 @ 2048x1000 11 % more (Sapphire Rapids, B in the third-level cache).
        """
        works = self.ar.is_tile or self.tile.tiles_per_unit > 1 or self.tile_rows >= _LEAST_ROWS_TO_FETCH
        is_near = self.tile.tiles_outside or (self.meets_again and (self.ar.is_tile or self._would_fetch_in_vain))
        has_next = self.ar.is_tile or bool(self.c.batch) or self.n_panels != 1 or self.n_passes > 1
        return self.c.packing.kind == "panels" and works and has_next and not is_near

    @property
    def keeps_tile(self) -> bool:
        """Whether one tile meets the panels of its unit one after the other."""
        return self.tile.tiles_outside or (self.tile.tiles_per_unit == 1 and self.tile.panels_per_unit > 1)

    @property
    def passes_by(self) -> str:
        """Which operand tile registers are told not to keep in the first-level cache, since it is larger and what
        meets it should stay there: "b" where a tile is kept, "a" where a panel is, or "".

        1024x512 @ 512x1024 takes 0.96 of the time in bf16 and int8, as does 1024x1024 @ 1024x1024 in int8 (Emerald
        Rapids). Rows that several taps read stay.
        """
        k = self.k
        if not (self.ar.is_tile and isinstance(k, int)):
            return ""
        panel, tile = k * self.tile.lanes * self.ar.b_bytes, self.tile_rows * k * self.ar.a_bytes
        if self.keeps_tile:
            return "b" if panel * self.tile.panels_per_unit > _ROOM_BESIDE_TILE else ""
        return "a" if len(self.c.taps) == 1 and self.tile.tiles_per_unit * tile > _ROOM_BESIDE_TILE < 2 * panel else ""

    @property
    def fetches_rows(self) -> bool:
        """Whether micro-kernels with tile registers fetch the rows of A that the next tile reads: all panels of a unit
        are near and meet one tile, while A passes by, often from beyond the second-level cache.

        ResNet-50 in batches takes 0.975 of the time in int8 and bf16, 12544x256 @ 256x64 in int8 0.71 (Emerald Rapids).
        Where results are more than A, and with them mostly what they are added to, some kernels take 1.05.
        """
        if not (self.ar.is_tile and self.tile.tiles_outside and len(self.c.taps) == 1 and self.c.taps[0].a == 1):
            return False
        k, n = self.k, self.c.n
        if not isinstance(k, int) or not isinstance(n, int) or self.inner.a != k:
            return False
        return k * self.ar.a_bytes >= n * self.out_bytes

    @property
    def ahead_level(self) -> int:
        """The cache into which is fetched what comes next: rows into the first, where panels leave them room."""
        return 1 if self.fetches_rows and self.passes_by != "b" else 2

    @property
    def meets_again(self) -> bool:
        """Whether all panels pass for one block of tiles after the other: B is read again and again, from near.

        The tile kernels of ResNet-50 take 0.8 to 1.0 of the time when they do not fetch it then.
        """
        n = self.n_tiles
        return self.tile.rows_outer and isinstance(n, int) and n > self.tile.tiles_per_unit

    @property
    def _would_fetch_in_vain(self) -> bool:
        """Whether each tile in vector registers would ask for a whole panel that came with an earlier tile: 196x672 @
        672x112 takes 0.77 to 0.9 of the time without. Where several tiles share it, it costs them nothing, and the
        first of them find a panel that comes from memory.
        """
        return self.tile.keeps_b and self.tile.tiles_per_unit == 1

    @property
    def round_rows(self) -> int:
        """Rows of a panel that a micro-kernel reads per round: of the unrolled channel, or with one tile register."""
        if not self.ar.is_tile:
            return self.tile.unroll
        return chunk_bytes(self.run_bytes) // self.ar.lane_bytes

    @property
    def takes_turns(self) -> bool:
        """Whether all tiles meet a panel before any meets the next, be they in several units."""
        return self.tile.panels_per_unit == 1 and not self.tile.rows_outer and isinstance(self.n_tiles, int)

    @property
    def ahead_lines(self) -> int:
        """Cache lines to fetch per round, so that the tiles that meet a panel together fetch the next, or the panels
        that meet a tile together its neighbour's rows.
        """
        if self.fetches_rows:
            return -(-self.tile_rows * chunk_bytes(self.run_bytes) // LINE_BYTES // self.tile.panels_per_unit)
        n = self.n_tiles if self.takes_turns else self.tile.tiles_per_unit
        assert isinstance(n, int)
        return -(-self.round_rows * self.row_bytes // LINE_BYTES // max(1, n))

    @property
    def out_bytes(self) -> int:
        return self.c.out.dtype.size_bytes

    @property
    def in_panels(self) -> bool:
        """Whether micro-kernels read B as panels: constant ones or staged ones."""
        return self.c.packing.kind == "panels" or self.tile.stage_b

    def axes(self) -> tuple[Axis, ...]:
        return (*self.c.batch, *self.c.rows)


def plan_of_rows(p: Plan, n_rows: int) -> Plan:
    """The plan by which a tile of so many rows is multiplied: few rows in vector registers, where an arithmetic reads
    panels of the same layout and they may be all there are, which only shows at run time. They wait for B only, which
    vectors load as fast as memory gives it: the products of a decoder in bf16 take 9 % less time. What is left of many
    rows meets B in the caches: 7 of the 49 rows of ResNet-50's 7 x 7 x 1024 -> 512 took as long in vectors as the rest.
    """
    if not p.ar.is_tile or n_rows >= LEAST_TILE_ROWS or p.tile.pitch or isinstance(p.n_tiles, int):
        return p
    other = choose_arithmetic(p.c.a.dtype, p.c.b.dtype, without_amx(p.isa), p.c.a_offset)
    return replace(p, ar=other) if other.group == p.ar.group and not other.n_spare else p


def variants(p: Plan) -> list[tuple[int, int, bool]]:
    """(outer rows, inner rows, tail panel) of every micro-kernel that can run."""
    sizes = [(o, i) for no, o in p.tile.outer for ni, i in p.tile.inner if bounds(no)[1] != 0 and bounds(ni)[1] != 0]
    panels = [tail for tail, there in ((False, p.has_full_panel), (True, p.tail_vectors > 0)) if there]
    return [(o, i, tail) for o, i in dict.fromkeys(sizes) for tail in panels]


def symbol_of(p: Plan, outer: int, inner: int, tail: bool) -> str:
    return f"{p.name}.tile{outer}x{inner}{'.tail' if tail else ''}"


def load_dims(t: Text, p: Plan) -> dict[str, Int]:
    first = len(p.params)
    return {d: t.op(f"load i64, ptr {t.at('%args', 8 * (first + i))}, align 8") for i, d in enumerate(p.dims)}


def base_of(t: Text, p: Plan, buffer: Buffer) -> str:
    return t.op(f"load ptr, ptr {t.at('%args', 8 * p.params.index(buffer))}, align 8")
