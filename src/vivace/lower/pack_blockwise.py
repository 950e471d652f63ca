"""Weights of 4 and 8 bits with scales per block, laid out as `loops/blockwise.py` describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vivace.base.errors import UnsupportedError
from vivace.base.machine import Isa
from vivace.lower.pack import aligned_zeros

_ONE_ROUNDING = 2.0**-22
"""How far, relative to itself, f16 may be from a shift: that is a product of rounded numbers, so as far off anyway."""


@dataclass(frozen=True, slots=True)
class PackedBlocks:
    """Weights, scales and shifts, each padded to whole panels and blocks."""

    b: NDArray[Any]
    scales: NDArray[Any]
    shifts: NDArray[Any] | None


def blockwise_lanes(isa: Isa) -> int:
    """Columns per panel: as many vectors as hide the latency of multiply-add when there is one row of A."""
    return (4 if isa.n_vector_registers > 16 else 2) * isa.n_f32_lanes


def fits_blockwise(bits: int, block: int) -> bool:
    """Whether there are kernels for such weights."""
    return bits in (4, 8) and block % 8 == 0


def has_shifts(zero_points: NDArray[Any], bits: int) -> bool:
    """Whether weights need more than their scales: a zero point is not the middle of their range."""
    return bool((np.asarray(zero_points, np.float32) != 1 << (bits - 1)).any())


def pack_blockwise(
    q: NDArray[np.uint8], scales: NDArray[Any], zero_points: NDArray[Any] | None, bits: int, block: int, isa: Isa
) -> PackedBlocks:
    """Packs unsigned weights. Without zero points, that is 8 for 4 bits and 128 for 8 bits, as ONNX says. Scales and
    shifts take the least room that holds them.

    Shapes: `q: u8[k, n]`, `scales: f32[ceil(k / block), n]`, `zero_points: f32[ceil(k / block), n]`
    Raises: UnsupportedError for other widths, and for blocks that are no multiple of 8.
    """
    if not fits_blockwise(bits, block):
        raise UnsupportedError(
            f"weights of {bits} bits in blocks of {block}", expected="4 or 8 bits, blocks a multiple of 8"
        )
    k, n = q.shape
    lanes, steps, center = blockwise_lanes(isa), 32 // bits, 1 << (bits - 1)
    n_blocks, n_panels = -(-k // block), -(-n // lanes)
    filled = np.full((n_blocks * block, n_panels * lanes), center, np.uint8)
    filled[:k, :n] = q
    panels = filled.reshape(-1, steps, n_panels, lanes).transpose(2, 0, 1, 3)
    b = aligned_zeros((n_panels, n_blocks * block // steps, lanes, 4), np.uint8)
    for j in range(4):
        b[..., j] = panels[:, :, j] if bits == 8 else panels[:, :, j] | panels[:, :, j + 4] << np.uint8(4)
    scales = np.asarray(scales, np.float32)
    narrow = np.float16 if "+f16c" in isa.features else np.float32
    shifts = None
    if zero_points is not None and has_shifts(zero_points, bits):
        moved = center - np.asarray(zero_points, np.float32)
        if (moved == np.clip(np.rint(moved), -128, 127)).all():
            shifts = _in_panels(moved.astype(np.int8), lanes)
        else:
            summand = (moved - np.float32(center)) * scales
            shifts = _in_panels(_narrowed(summand, narrow, _ONE_ROUNDING), lanes)
    return PackedBlocks(b, _in_panels(_narrowed(scales, narrow, 0.0), lanes), shifts)


def _narrowed(x: NDArray[np.float32], to: type, tolerance: float) -> NDArray[Any]:
    """`x` in a narrower type if that holds all of it, up to a relative tolerance."""
    with np.errstate(over="ignore"):
        narrow: NDArray[Any] = x.astype(to)
    return narrow if (np.abs(narrow.astype(np.float32) - x) <= np.abs(x) * tolerance).all() else x


def _in_panels(x: NDArray[Any], lanes: int) -> NDArray[Any]:
    rows, n = x.shape
    n_panels = -(-n // lanes)
    filled = np.zeros((rows, n_panels * lanes), x.dtype)
    filled[:, :n] = x
    packed = aligned_zeros((n_panels, rows, lanes), x.dtype)
    packed[...] = filled.reshape(rows, n_panels, lanes).transpose(1, 0, 2)
    return packed
