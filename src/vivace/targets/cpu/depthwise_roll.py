"""Tiles of depthwise sums that roll down the rows of an image.

Halves are converted as they are loaded. Where the sums of all output rows that an input row serves fit the registers,
each input row is loaded and converted once, and a row of sums is stored as the next one begins. 14x14x384 by 3x3 takes
0.8 of the time so; f32, which has nothing to convert, as long as before, since lines that pass between the first two
caches bound it (Emerald Rapids).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vivace.base.dims import exact_div
from vivace.base.machine import Isa
from vivace.loops.contraction import Depthwise
from vivace.loops.kernel import Buffer, Expr
from vivace.lower.halves import HALVES
from vivace.targets.cpu.builder import Value
from vivace.targets.cpu.contraction_epilogue import Epilogue
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.depthwise_pairs import PairTile
from vivace.targets.cpu.depthwise_plan import Plan, at_tile, columns_read, move

_MOST_IN_FLIGHT = 3  # 5x5 at stride 1 has 5: too few columns each to gain
MOST_TAPS = 49


def rows_in_flight(d: Depthwise, isa: Isa) -> int:
    """Output rows that one input row serves, where tiles of that many rows roll down the image; else 0."""
    if len(d.rows) < 2 or len(d.taps) != 2 or d.a.dtype not in HALVES:
        return 0
    (down, across), step = d.taps, exact_div(d.rows[-2].a, d.taps[0].a)
    if not isinstance(down.extent, int) or not isinstance(across.extent, int) or not isinstance(step, int):
        return 0
    if not 0 < step < down.extent or not 0 < down.extent * across.extent <= MOST_TAPS:
        return 0
    n = (down.extent - 1) // step + 1
    return n if n <= _MOST_IN_FLIGHT else 0


def pairs_in_flight(d: Depthwise, isa: Isa) -> int:
    """The same for tiles of 32 channels. 28x28x240 by 5x5 at stride 2 takes 0.85 of the time when each row is summed by
    itself, in 7 columns instead of 4.
    """
    rows = rows_in_flight(d, isa)
    return rows if rows and d.taps[0].extent == 3 else 1


def room(isa: Isa) -> int:
    """Registers for sums, besides an element of A and one of B; without FMA a product too."""
    return isa.n_vector_registers - (2 if isa.has_fma else 3)


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of one vector of channels."""

    t: Text
    p: Plan
    dims: Mapping[str, Int]
    size: int
    mask: str | None
    finish: Expr | None
    buffers: Mapping[Buffer, str]

    def values(self, pointer: str) -> list[str]:
        return [self.p.step.values(self.t, pointer, self.mask)]

    def weights(self, pointer: str) -> list[str]:
        return [self.p.step.weights(self.t, pointer, self.mask)]

    def store(self, acc: list[list[str]], row: Int, piece: Int) -> None:
        t, p, d = self.t, self.p, self.p.d
        symbols: dict[str, Int] = {x.name: f"%x{i}" for i, x in enumerate(d.rows)} | dict(self.dims) | {"c": "%c"}
        at = at_tile(t, p, row, piece, self.size)
        symbols |= {name: t.add(symbols[name], n) for name, n in at.items() if name}
        _, out = move(t, p, (p.outer, p.inner), at, self.dims, "%a", "%out")
        step = t.mul(t.dim(p.inner.out, self.dims), p.out_bytes)
        offsets = [t.mul(step, j) for j in range(self.size)]
        epilogue = Epilogue(t, p.isa, "c", symbols, self.buffers)
        for j, ((value,), offset) in enumerate(zip(acc, offsets, strict=True)):
            total = Value(value, p.step.acc_element, p.isa.n_f32_lanes)
            moved = {p.inner.name: j} if p.inner.name else {}
            epilogue.store(self.finish, total, moved, d.out, out, offset, self.mask)
        epilogue.close()


def roll(tile: Tile | PairTile, start: list[str], in_flight: int) -> None:
    """`%count` tiles that go down `%rows` rows, with sums of `in_flight` rows on the way; 1 takes each row by itself.

    Before a row is finished, `in_flight - 1` rows of sums have seen all input rows above those that it alone waits for.
    `start` is what sums begin with, by parts of a tile's vector.
    """
    t, p, dims, size = tile.t, tile.p, tile.dims, tile.size
    down, across = p.d.taps
    n_down, n_parts = down.extent, len(start)
    step = exact_div(p.outer.a, down.a) if in_flight > 1 else n_down
    assert isinstance(n_down, int) and isinstance(across.extent, int) and isinstance(step, int)
    first = n_down - step
    weights = [
        [tile.weights(t.at("%b", t.mul(t.dim(down.b * k + across.b * m, dims), p.b_bytes)))
         for m in range(across.extent)]
        for k in range(n_down)
    ]  # fmt: skip
    columns = columns_read(p, across, size)

    def add(sums: list[list[list[str]]], row: int, a: str) -> None:
        """Adds what an input row gives to each of the rows in flight."""
        taps = [row - q * step for q in range(len(sums))]
        for where, pairs in columns:
            x = tile.values(t.at(a, t.mul(t.dim(where, dims), p.a_bytes)))
            for acc, k in zip(sums, taps, strict=True):
                for j, m in pairs if 0 <= k < n_down else ():
                    acc[j] = [p.step.multiply_add(t, *each) for each in zip(x, weights[k][m], acc[j], strict=True)]

    def row_of(a: str, row: int) -> str:
        return t.at(a, t.mul(t.dim(down.a * row, dims), p.a_bytes))

    with t.loop(0, "%count") as piece:
        a = t.at("%a", t.mul(piece, t.mul(t.dim(p.inner.a, dims), size * p.a_bytes)))
        above = [[[*start] for _ in range(size)] for _ in range(in_flight - 1)]
        for row in range(first):
            add(above, row, row_of(a, row))

        def finish(i: str, carried: list[str]) -> list[str]:
            columns_of = [carried[k : k + n_parts] for k in range(0, len(carried), n_parts)]
            sums = [columns_of[k : k + size] for k in range(0, len(columns_of), size)]
            sums.append([[*start] for _ in range(size)])
            here = t.at(a, t.mul(i, t.mul(t.dim(p.outer.a, dims), p.a_bytes)))
            for row in range(first, n_down):
                add(sums, row, row_of(here, row))
            tile.store(sums[0], i, piece)
            return [x for row in sums[1:] for column in row for x in column]

        t.reduce_loop("%rows", [(p.step.acc_type, x) for row in above for column in row for x in column], finish)
