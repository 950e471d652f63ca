"""Contractions: matrix products and convolutions as one affine form, the input of the micro-kernel generators.

    out[b.., m.., n] = epilogue(sum over r..  A[b.., m.., r..] * B[b.., r.., n])

`batch` axes stand in A, B and out; `rows` in A and out; `taps` (the reduction) in A and B; `n` in B and out.
A matrix product has one row axis and one tap. A convolution over channels-last data, its input already padded, has row axes
(image, oh, ow) and taps (kh, kw, channel): A's stride for `oh` is `stride_h * row`, for `kh` it is `dilation_h * row`.
A grouped convolution has the group as a batch axis. A depthwise convolution is `Depthwise`, which vectorizes over channels instead.

Every extent and stride is a Dim in elements; those of taps other than the channel and of `n` are usually ints.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.dims import Dim
from vivace.base.dtypes import DType
from vivace.loops.kernel import Buffer, Expr


@dataclass(frozen=True, slots=True)
class Axis:
    """One loop of a contraction: its extent and what a step of it adds to the address in A, B and out (0: it does not move)."""

    name: str
    extent: Dim
    a: Dim = 0
    b: Dim = 0
    out: Dim = 0


@dataclass(frozen=True, slots=True)
class Packing:
    """How B lies in memory.

    `panels`: constant, packed at compile time as [batch][panel][r..][lanes] with `lanes` columns per panel, zero-filled.
    `plain`: as its axes' strides say, `n` contiguous (n stride 1): read in place or packed on the fly.
    `transposed`: as its axes' strides say, the innermost tap contiguous (B stored as [n][k]): packed on the fly.
    """

    kind: str
    lanes: int = 0


@dataclass(frozen=True, slots=True)
class Contraction:
    """A matrix product or convolution, with what happens to each result before it is stored.

    `epilogue` is an expression over `Read("acc", f32)` and loads whose index uses the symbols named by the batch and row axes and `n`
    (each axis's name is the loop variable). None stores the accumulator itself. The out address comes from the axes' `out` strides,
    `n`'s out stride is 1.
    """

    name: str
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    taps: tuple[Axis, ...]
    n: Dim
    a: Buffer
    b: Buffer
    out: Buffer
    packing: Packing
    epilogue: Expr | None = None
    extra: tuple[Buffer, ...] = ()
    acc_dtype: DType = DType.f32


@dataclass(frozen=True, slots=True)
class Depthwise:
    """out[rows.., c] = epilogue(sum over taps  A[rows.., taps.., c] * B[taps.., c]); `c` is contiguous in A, B and out."""

    name: str
    rows: tuple[Axis, ...]
    taps: tuple[Axis, ...]
    channels: Dim
    a: Buffer
    b: Buffer
    out: Buffer
    epilogue: Expr | None = None
    extra: tuple[Buffer, ...] = ()
