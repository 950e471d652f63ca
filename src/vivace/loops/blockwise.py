"""Products with weights of 4 or 8 bits that share a scale per block of k: MatMulNBits and blocked DequantizeLinear.

    out[m, n] = epilogue(sum over k  A[m, k] * scale[k / block, n] * (q[k, n] - zero_point[k / block, n]))

A is f32, or bf16. Weights are packed by `lower/pack_blockwise.py` in panels of `lanes` columns, in words of 32 bits
that hold neighbouring steps of k of one column:

    b        [panel][k / steps][lanes] words. 8 bits: 4 steps, step j in byte j. 4 bits: 8 steps, step j in the low half
             of byte j, step j + 4 in the upper half, so that both halves are 4 neighbouring steps as bytes
    scales   [panel][k / block][lanes], f32 or f16
    shifts   [panel][k / block][lanes]: the weight is (q - center + shift) * scale for i8, where center is 8 (or 128),
             and q * scale + shift for f32 and f16; (q - center) * scale where there are none

`parts` and `sums`, where there, hold the rows of an A of f32 once more, as a `Split` leaves them (with sums where
`has_sums`): many rows are then multiplied on matrix units. `digits`, where there, holds few rows as `Digits` leaves
them: they are then multiplied as integers. `rounded` is what A may be rounded to: f32, f16, bf16 or i8.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.dtypes import DType
from vivace.loops.contraction import Axis, Contraction, Packing, contraction_dims
from vivace.loops.digits import DigitRows
from vivace.loops.kernel import Buffer, Expr

MOST_DIRECT_ROWS = 4
"""Beyond, making whole panels once is cheaper than unpacking the weights for every two rows."""


@dataclass(frozen=True, slots=True)
class BlockwiseProduct:
    """One such product. `m` is the row axis, its name a symbol of the epilogue, as `n` is; `acc` is f32."""

    name: str
    m: Axis
    k: int
    n: int
    bits: int
    block: int
    lanes: int
    a: Buffer
    b: Buffer
    scales: Buffer
    shifts: Buffer | None
    out: Buffer
    epilogue: Expr | None = None
    extra: tuple[Buffer, ...] = ()
    parts: Buffer | None = None
    sums: Buffer | None = None
    digits: Buffer | None = None
    rounded: DType = DType.f32

    @property
    def params(self) -> tuple[Buffer, ...]:
        """The buffers in calling order."""
        optional = [x for x in (self.shifts, self.parts, self.sums, self.digits) if x is not None]
        return tuple(dict.fromkeys((self.a, self.b, self.scales, *optional, *self.extra, self.out)))

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the run-time dims, sorted."""
        return contraction_dims(self.product)

    @property
    def product(self) -> Contraction:
        """The same product with B in panels, of A's type."""
        taps, packing = (Axis("k", self.k, 1),), Packing("panels", self.lanes)
        return Contraction(
            self.name, (), (self.m,), taps, self.n, self.a, self.b, self.out, packing, self.epilogue, self.extra
        )

    @property
    def has_sums(self) -> bool:
        """Whether what is added to weights is no whole number, so that sums of A are multiplied with it."""
        return self.shifts is not None and self.shifts.dtype.is_float

    @property
    def n_blocks(self) -> int:
        return -(-self.k // self.block)

    @property
    def digit_rows(self) -> DigitRows:
        """How `digits` lie."""
        is_narrow = self.a.dtype is DType.bf16 and self.rounded is not DType.i8
        return DigitRows(DType.bf16 if is_narrow else self.rounded, self.k, self.block)

    @property
    def n_panels(self) -> int:
        return -(-self.n // self.lanes)

    @property
    def steps(self) -> int:
        """Steps of k in a word."""
        return 32 // self.bits

    @property
    def center(self) -> int:
        """What is subtracted from q before anything else."""
        return 0 if self.shifts is not None and self.shifts.dtype.is_float else 1 << (self.bits - 1)

    @property
    def block_bytes(self) -> int:
        """Weights of one block of a panel."""
        return self.block * self.lanes * self.bits // 8
