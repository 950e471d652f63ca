"""The second operand of a product of halves, known only when the model runs, brought into the layout of its panels.

    out[batch.., block of k, panel, k / 2, lane, 2] = b[batch.., k, n]        n = panel * lanes + lane

It is the layout of `Packing("panels")` in low precision, one matrix per block of k, so that a product over some of the
k reads its panels from one place. Rows beyond k and, where `n` is contiguous in b, columns beyond n become 0. What b
holds in f32 is rounded to bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.dims import Dim, ceildiv, minimum, symbols
from vivace.loops.contraction import Axis
from vivace.loops.kernel import Buffer

PAIR = 2


@dataclass(frozen=True, slots=True)
class Pack:
    """One packing. `b` is bf16 or f32, and contiguous along k or along n; `out` is bf16 and dense.

    `batch` axes step through b (`Axis.b`). A block holds `block` rows of k, the last one what is left, filled up to a
    multiple of `multiple`; `block` 0 stands for all of k, and is itself such a multiple otherwise.
    """

    name: str
    batch: tuple[Axis, ...]
    k: Dim
    n: Dim
    k_stride: Dim
    n_stride: Dim
    b: Buffer
    out: Buffer
    lanes: int
    multiple: int = PAIR
    block: int = 0

    @property
    def params(self) -> tuple[Buffer, ...]:
        return self.b, self.out

    @property
    def rows(self) -> Dim:
        """Rows of k as they are packed."""
        return ceildiv(self.k, self.multiple) * self.multiple

    @property
    def n_blocks(self) -> Dim:
        return ceildiv(self.k, self.block) if self.block else 1

    @property
    def n_panels(self) -> Dim:
        return ceildiv(self.n, self.lanes)

    @property
    def size(self) -> Dim:
        """Elements of `out` for one matrix."""
        return self.n_panels * self.lanes * self.rows

    def rows_of(self, block: Dim) -> Dim:
        """Packed rows of one block."""
        return minimum(self.block, self.rows - block * self.block) if self.block else self.rows


def pack_dims(p: Pack) -> tuple[str, ...]:
    """Names of the run-time dims, sorted."""
    dims = [p.k, p.n, p.k_stride, p.n_stride, *(d for x in p.batch for d in (x.extent, x.b))]
    return tuple(sorted({s.name for d in dims for s in symbols(d)}))
