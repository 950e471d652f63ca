"""Few rows as signed bytes: what products with block-wise weights read where the CPU has the dot product of bytes.

A block of a row becomes v * unit, where v has signed digits of 8 bits, n of them:

    v = (d0 * 256 + d1) * 256 + ..            |v| <= 127 * 256**(n - 1)

How many, and when a block has one more, depends on what A may be rounded to:

    rounded to     f32     f16, bf16     i8
    n              3, 4    2, 3          1

Error: an element is off by at most 1.02 * 2**(1 - 8n) of the largest in its block and row, as unit is a power of two;
by 1/254 of it where n = 1, where unit is the largest / 127.

Rules:
* FINITE: infinities and NaN have no digits, nor has a block whose unit would be no normal number.
* EVEN: of the elements of a block that are not 0, at most one in eight is so small that the error is more of it than A
  may be rounded by: 2**-8 for bf16, 2**-10 for f16, and for f32 what its sum loses anyway (`small_bits`). A block that
  breaks it with the smaller n has one more digit; one that breaks it with that, none. With i8 nothing is asked.

With elements 10**6 times as large as the others of their blocks, and weights of 0 for them, the error of 31 bits would
be 3e-5 of sum(|a * w|); f32 sums lose 1e-6. Of the blocks that SmolLM2-135M multiplies over a text of 64 tokens, one in
a hundred needs a fourth digit in f32, one in ten a third in bf16.

Layout: for each of the `most` rows, planes of digits [digit][k], k filled up to whole blocks with zeros, as many planes
as blocks have digits at most: the last is 0 where they have fewer. Then for each row and block a record of 32 bytes:
what the sums of each digit start from (i32: -center * the sum of the digits), the unit of the last plane, the sums of v
in it and of v * unit (f32), and (i32) whether the block has the last digit: 0 or 1, in the first record of a row -1
where some block keeps no rule.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.dims import Dim, minimum, symbols
from vivace.base.dtypes import DType
from vivace.loops.kernel import Buffer

RECORD_BYTES = 32
UNIT_AT, SUM_AT, TOTAL_AT, LONG_AT = 16, 20, 24, 28  # in a record, behind the starts
LARGEST_BLOCK = 256  # sums of digits times bytes are exact in f32
_LINE = 64


_FEW = {DType.f32: 3, DType.f16: 2, DType.bf16: 2}
_OFF_BITS = {DType.f16: 10, DType.bf16: 8}  # an element of a sum may be off by 2**-this of itself
_LEAST_OFF_BITS = 14  # in f32, however long the sum


@dataclass(frozen=True, slots=True)
class DigitRows:
    """How the digits of rows of `k` elements lie, which may be rounded to `rounded`. Bytes."""

    rounded: DType
    k: int
    block: int

    @property
    def few(self) -> int:
        """Digits of most blocks."""
        return _FEW.get(self.rounded, 1)

    @property
    def n_digits(self) -> int:
        """Digits that a block has at most."""
        return self.few + (self.rounded in _FEW)

    @property
    def n_blocks(self) -> int:
        return -(-self.k // self.block)

    def small_bits(self, n: int) -> int:
        """With n digits, elements of 2**-this of the largest of their block or less are small (rule EVEN).

        f32: the sum of the blocks takes n_blocks roundings and a block 4, a bias and its own product 2. What is left of
        the k + 2 that a sum of k products may take, in any order, is left to the digits.
        """
        off = _OFF_BITS.get(self.rounded)
        if off is None:
            left = max(1, self.k - self.n_blocks - 4)
            off = max(24 - (left.bit_length() - 1), _LEAST_OFF_BITS)
        return 8 * n - 1 - off

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
    rounded: DType
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
        return DigitRows(self.rounded, self.k, self.block)
