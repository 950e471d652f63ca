"""Rows of f32 as sums of bf16, in the layout of tile registers: what a product on matrix units reads in place of f32.

    parts[row / 16][k / 32][part][row % 16][32]     bf16; row[k] = part 0 + part 1 + part 2
    sums[row / 16][k / 32][row % 16]                f32: the sum of 32 neighbours, where `has_sums`
    sums[row / 16][-1][row % 16]                    not 0: the row has NaN, infinity or numbers of LIMIT and more

A part holds the upper 8 significant bits of what the parts before it left, so that three hold all 24 of a number that
is at least 2**-110. What part of a smaller number lies below 2**-126 the products take as 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.dims import Dim, ceildiv, minimum, symbols
from vivace.loops.kernel import Buffer

N_PARTS = 3
TILE_ROWS, TILE_STEPS = 16, 32
TILE_BYTES = TILE_ROWS * TILE_STEPS * 2
LIMIT_BITS = (127 + 96) << 23
"""2**96 as f32: sums of some thousand products with bytes are far from infinity."""


@dataclass(frozen=True, slots=True)
class Split:
    """One such change of layout: `rows` rows of `k` elements, `step` apart; whole tiles fit `parts` and `sums`.

    Elements from `k` up to `filled`, a multiple of 32, become 0; rows beyond the last hold anything. Fewer than `least`
    rows are left alone: nobody reads them in parts.
    """

    name: str
    rows: Dim
    step: Dim
    k: int
    filled: int
    least: int
    has_sums: bool
    a: Buffer
    parts: Buffer
    sums: Buffer

    @property
    def params(self) -> tuple[Buffer, ...]:
        return self.a, self.parts, self.sums

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the run-time dims, sorted."""
        return tuple(sorted({s.name for d in (self.rows, self.step) for s in symbols(d)}))

    @property
    def units(self) -> Dim:
        """Groups of rows that become tiles."""
        return minimum(self.rows // self.least, 1) * ceildiv(self.rows, TILE_ROWS)


def n_sums(filled: int, has_sums: bool) -> int:
    """Of a row, its mark among them."""
    return filled // TILE_STEPS * has_sums + 1


def split_sizes(rows: Dim, filled: int, has_sums: bool) -> tuple[Dim, Dim]:
    """Elements of `parts` and `sums`."""
    groups = ceildiv(rows, TILE_ROWS)
    return groups * (TILE_ROWS * N_PARTS * filled), groups * (TILE_ROWS * n_sums(filled, has_sums))
