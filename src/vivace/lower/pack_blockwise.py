"""Weights of 4 and 8 bits with scales per block, laid out as `loops/blockwise.py` describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vivace.base.errors import UnsupportedError
from vivace.base.machine import Isa
from vivace.lower.pack import aligned_zeros


@dataclass(frozen=True, slots=True)
class PackedBlocks:
    """Weights, scales and shifts, each padded to whole panels and blocks."""

    b: NDArray[Any]
    scales: NDArray[Any]
    shifts: NDArray[np.int16] | None


def blockwise_lanes(isa: Isa) -> int:
    """Columns per panel: as many vectors as hide the latency of multiply-add when there is one row of A."""
    return (4 if isa.n_vector_registers > 16 else 2) * isa.n_f32_lanes


def pack_blockwise(
    q: NDArray[np.uint8],
    scales: NDArray[Any],
    zero_points: NDArray[np.uint8] | None,
    bits: int,
    block: int,
    lanes: int,
) -> PackedBlocks:
    """Packs unsigned weights. Without zero points, that is 8 for 4 bits and 128 for 8 bits, as ONNX says.

    Shapes: `q: u8[k, n]`, `scales: f32|f16[ceil(k / block), n]`, `zero_points: u8[ceil(k / block), n]`
    Raises: UnsupportedError for other widths, and for blocks that are no multiple of 8.
    """
    if bits not in (4, 8) or block % 8:
        raise UnsupportedError(
            f"weights of {bits} bits in blocks of {block}", expected="4 or 8 bits, blocks a multiple of 8"
        )
    k, n = q.shape
    center = 1 << (bits - 1)
    n_blocks, n_panels = -(-k // block), -(-n // lanes)
    filled = np.full((n_blocks * block, n_panels * lanes), center, np.uint8)
    filled[:k, :n] = q
    panels = filled.reshape(n_blocks * block, n_panels, lanes).transpose(1, 0, 2)
    if bits == 8:
        b = aligned_zeros(panels.shape, np.int8)
        b[...] = (panels ^ 0x80).view(np.int8)
    else:
        words = np.zeros((n_panels, n_blocks * block // 8, lanes), np.uint32)
        groups = panels.reshape(n_panels, -1, 8, lanes)
        for step in range(8):
            words |= groups[:, :, step].astype(np.uint32) << np.uint32(4 * step)
        b = aligned_zeros((*words.shape, 4), np.uint8)
        b[...] = words.view(np.uint8).reshape(b.shape)
    shifts = None
    if zero_points is not None and (zero_points != center).any():
        shifts = _in_panels(center - zero_points.astype(np.int16), lanes)
    return PackedBlocks(b, _in_panels(scales, lanes), shifts)


def _in_panels(x: NDArray[Any], lanes: int) -> NDArray[Any]:
    rows, n = x.shape
    n_panels = -(-n // lanes)
    filled = np.zeros((rows, n_panels * lanes), x.dtype)
    filled[:, :n] = x
    packed = aligned_zeros((n_panels, rows, lanes), x.dtype)
    packed[...] = filled.reshape(rows, n_panels, lanes).transpose(1, 0, 2)
    return packed
