"""How far a correct kernel may be from the exact result: bounds that follow from the operator and the number format.

docs/tolerances.md derives them. `U` is the unit roundoff of f32: a rounded operation returns `exact * (1 + d)` with
|d| <= U. A sum of n terms in any order, with or without fused multiply-add, is off by at most `n U / (1 - n U)` of the
sum of the magnitudes of its terms (Higham, Accuracy and Stability of Numerical Algorithms, chapter 3). Below the least
normal number an operation is off by at most half of the least denormal instead.
"""

from __future__ import annotations

import numpy as np

from vivace.base.dtypes import DType
from vivace.loops.digits import DigitRows

U = 2.0**-24
U_BF16 = 2.0**-8  # of rounding to 8 bits of significand, to nearest: 2**-9 of the value's power of two
DENORMAL = 2.0**-149
NORMAL = 2.0**-126
Array = np.ndarray


def of_sum(magnitude: Array, n: int) -> Array:
    """Of a sum of `n` products whose magnitudes add up to `magnitude`, bias and mean included."""
    return magnitude * ((n + 2) * U / (1 - (n + 2) * U)) + (n + 2) * DENORMAL


def of_bf16_sum(magnitude: Array, n: int) -> Array:
    """The same of bf16 products summed in f32. The instructions take and leave denormals as zero."""
    return of_sum(magnitude, n) + (n + 2) * NORMAL * (1 + magnitude.max(initial=0.0))


def of_bf16_result(want: Array, before: Array) -> Array:
    """Of a result that is rounded to bf16 once more, when what is rounded may be off by `before`."""
    return before + U_BF16 * (np.abs(want) + before) + NORMAL


def of_block_product(a: Array, weights: Array, layout: DigitRows) -> Array:
    """Of a product of rows with weights in blocks, where the rows become signed digits of 8 bits: beside the sum, what
    elements lose that are too small to have their share of its bound (rule EVEN of `loops/digits.py`), and where A may
    be rounded, that.
    """
    size, k = np.abs(a).astype(np.float64), layout.k
    blocks = np.zeros((len(a), layout.n_blocks * layout.block))
    blocks[:, :k] = size
    blocks = blocks.reshape(len(a), layout.n_blocks, layout.block)
    largest, n = blocks.max(-1, keepdims=True), layout.few
    small = (blocks > 0) & (blocks <= largest * 2.0 ** -layout.small_bits(n))
    digits = np.where(small.sum(-1) * 8 > (blocks > 0).sum(-1), layout.n_digits, n)[..., None]
    many = (blocks > 0) & (blocks <= largest * 2.0 ** -layout.small_bits(layout.n_digits))
    lost = largest / 254 if n == 1 else 1.02 * largest * 2.0 ** (1 - 8 * digits) * np.where(digits == n, small, many)
    lost = np.broadcast_to(lost, blocks.shape).reshape(len(a), -1)[:, :k]
    if layout.rounded in (DType.f16, DType.bf16):
        lost = lost + size * (2.0**-8 if layout.rounded is DType.bf16 else 2.0**-10)
    return of_sum(size @ np.abs(weights), k) + lost @ np.abs(weights)


def of_softmax(x: Array, axis: int) -> Array:
    """Of `softmax(x)`, relative to a result of at most 1: x - max is off by U of itself, so that much of its exp; exp
    by 2 ulp; the sum by its length; the quotient by U.
    """
    n = x.shape[axis]
    spread = np.nan_to_num(np.abs(x.max(axis=axis, keepdims=True) - x), posinf=200.0)
    return (np.minimum(spread, 200.0) + n + 8) * 2 * U


def agree(got: Array, want: Array, bound: Array | float) -> str:
    """Why two arrays of floats disagree; empty where they do not.

    NaN stands for NaN, an infinity for the same; a finite number is within the bound.
    """
    if got.shape != want.shape:
        return f"shapes {got.shape} and {want.shape}"
    g, w = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(invalid="ignore"):
        fine = (np.isnan(g) & np.isnan(w)) | (g == w) | (np.isfinite(g) & np.isfinite(w) & (np.abs(g - w) <= bound))
    if fine.all():
        return ""
    at = tuple(int(i[0]) for i in np.nonzero(~fine))
    limit = np.broadcast_to(bound, w.shape)[at]
    return f"{int((~fine).sum())} of {fine.size}, first at {at}: {g[at]!r} instead of {w[at]!r}, bound {limit:.3g}"
