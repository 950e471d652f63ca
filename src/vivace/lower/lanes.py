"""How wide the panels of constant B are for products of f32, by the instructions that a step of a tile takes.

A step of `rows x vectors` accumulators loads the vectors of B, broadcasts an element of A for each row, and multiplies
and adds each with each: 6 rows of 4 vectors take 34 instructions for 24 multiply-adds, 14 rows of 2 take 44 for 28. A
core alone hides them behind the multiply-adds, within 1 %. One that runs at two thirds of its speed, as if its other
hardware thread worked for a neighbour, takes 4 to 12 % less time with 4 vectors, 2 to 8 % with 3 (Emerald Rapids, the
products of ResNet-50 and of transformers).

Rules:
* FAR: a vector of a panel that does not stay in the first-level cache counts twice, of one that takes more than a
  quarter of the second-level cache thrice: lower tiles read B more often. In MiniLM 128x1536 @ 1536x384 takes 1.04 of
  the time with 4 vectors, 1.01 with 3; in BERT-base 128x3072 @ 3072x768 1.05 with 3.
* FEW: few rows wait for B, and are left to `panel_lanes`: 13x384 @ 384x1536 takes 1.22 of the time with 4 vectors.

Not handled: fewer than 32 registers, narrow formats, products whose number of columns only shows at run time.
"""

from __future__ import annotations

import itertools
from collections import Counter

from vivace.base.dims import prod
from vivace.base.machine import Isa, host
from vivace.loops.contraction import Axis, Contraction, merge_axes
from vivace.lower.tile import MOST_VECTORS, max_rows, panel_lanes, split_rows

_LEAST_ROWS = 24
_LEAST_ACCUMULATORS = 8  # keep two multiply-add units busy: 4 cycles each


def product_lanes(c: Contraction, isa: Isa, chosen: int | None = None) -> int:
    """Columns per panel of constant B, those that were chosen if there are any. `c` need not be packed."""
    rows, l1, l2 = merge_axes(c).rows, host().cache_bytes(1), host().cache_bytes(2)
    n_rows, k = prod([r.extent for r in rows]), prod([t.extent for t in c.taps])
    is_few = isinstance(n_rows, int) and n_rows < _LEAST_ROWS  # rule FEW
    if chosen or is_few or isa.n_vector_registers < 32 or not isinstance(c.n, int) or c.n <= isa.n_f32_lanes:
        return panel_lanes(c.n, isa, chosen=chosen)
    vectors = -(-c.n // isa.n_f32_lanes)

    def cost(nv: int) -> float:
        panel_bytes = k * nv * isa.vector_bits // 8 if isinstance(k, int) else l2 // 4
        per_load = 1 if panel_bytes <= l1 * 3 // 4 else 2 if panel_bytes <= l2 // 4 else 3  # rule FAR
        return _instructions(rows, vectors, nv, isa, per_load)

    return min(range(2, MOST_VECTORS + 1), key=cost) * isa.n_f32_lanes


def _instructions(rows: tuple[Axis, ...], vectors: int, nv: int, isa: Isa, per_load: int) -> float:
    """Of one step over all rows and columns, per row, where a load of a panel counts so often; a tile of few
    accumulators waits for their sums instead.
    """
    splits = split_rows(rows, max_rows(nv, isa))
    outer, inner = ([(n, size) for n, size in split if isinstance(n, int)] or [(1, split[0][1])] for split in splits)
    heights = Counter[int]()
    for (n, o), (m, i) in itertools.product(outer, inner):
        heights[o * i] += n * m
    widths = Counter({nv: vectors // nv, vectors % nv: 1}) if vectors % nv else Counter({nv: vectors // nv})
    total = sum(
        n * m * (max(height * width, _LEAST_ACCUMULATORS) + height + per_load * width)
        for (height, n), (width, m) in itertools.product(heights.items(), widths.items())
    )
    return total / max(1, sum(height * n for height, n in heights.items()))
