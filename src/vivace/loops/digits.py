"""Few rows as signed bytes: what products with block-wise weights read where the CPU has the dot product of bytes.

A block of a row becomes v * unit, where unit is a power of two and v has signed digits of 8 bits: four for f32, so that
|v| < 2**30, and three for bf16, |v| < 2**22:

    v = (d0 * 256 + d1) * 256 + ..

Error: an element is off by at most 2**-30 of the largest in its block and row (2**-22 where it is bf16, which is itself
off by 2**-9).

Rules:
* FINITE: infinities and NaN have no digits, nor has a block whose unit would be no normal number.
* EVEN: of the elements of a block that are not 0, at most one in eight is 2**-14 of the largest or smaller. With
  elements 10**6 times as large as the others of their blocks, and weights of 0 for them, the error would be 7e-5 of
  sum(|a * w|); f32 sums lose 1e-6.

Layout: for each of the `most` rows, planes of digits [digit][k], k filled up to whole blocks with zeros; then for each
row and block a record of 32 bytes: what the sums of each digit start from (i32: -center * the sum of the digits), unit,
the sums of v and of v * unit (f32), and in the first record of a row (i32) whether every block keeps the rules.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.dims import Dim, minimum, symbols
from vivace.base.dtypes import DType
from vivace.loops.kernel import Buffer

RECORD_BYTES = 32
UNIT_AT, SUM_AT, TOTAL_AT, GOOD_AT = 16, 20, 24, 28  # in a record, behind the starts
LARGEST_BLOCK = 256  # sums of digits times bytes are exact in f32
_LINE = 64


@dataclass(frozen=True, slots=True)
class DigitRows:
    """Where the digits of rows lie. Bytes."""

    n_digits: int
    n_blocks: int
    block: int

    @property
    def plane_bytes(self) -> int:
        """From a digit of an element to its next."""
        return self.n_blocks * self.block

    @property
    def row_bytes(self) -> int:
        return self.n_digits * self.plane_bytes

    @property
    def record_row_bytes(self) -> int:
        return self.n_blocks * RECORD_BYTES

    def records_at(self, most: int) -> int:
        """Where the records of `most` rows begin."""
        return -(-most * self.row_bytes // _LINE) * _LINE

    def n_bytes(self, most: int) -> int:
        return self.records_at(most) + most * self.record_row_bytes


def digit_rows(a: DType, k: int, block: int) -> DigitRows:
    """The layout for rows of `k` elements."""
    return DigitRows(4 if a is DType.f32 else 3, -(-k // block), block)


@dataclass(frozen=True, slots=True)
class Digits:
    """One such change of form: `rows` rows of `k` elements, `step` apart. More than `most` rows are left alone: nobody
    reads their digits."""

    name: str
    rows: Dim
    step: Dim
    k: int
    block: int
    center: int
    most: int
    a: Buffer
    digits: Buffer

    @property
    def params(self) -> tuple[Buffer, ...]:
        return self.a, self.digits

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the run-time dims, sorted."""
        return tuple(sorted({s.name for d in (self.rows, self.step) for s in symbols(d)}))

    @property
    def units(self) -> Dim:
        """Rows that get digits."""
        return self.rows * (1 - minimum(self.rows // (self.most + 1), 1))

    @property
    def layout(self) -> DigitRows:
        return digit_rows(self.a.dtype, self.k, self.block)
