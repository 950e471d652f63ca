"""Constant B of a contraction, laid out as the micro-kernels read it: `[batch][panel][k][lanes]`, zero-filled,
64-byte aligned.

A panel is `lanes` neighbouring columns; the last one is padded with zeros, so a micro-kernel never loads beyond the
array.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ALIGNMENT_BYTES = 64


def pack_panels(b: NDArray[np.float32], lanes: int) -> NDArray[np.float32]:
    """Columns grouped into panels.

    Shapes: `b: f32[batch.., k, n]` -> `f32[prod(batch), ceil(n / lanes), k, lanes]`
    """
    *batch, k, n = b.shape
    n_batch = int(np.prod(batch, dtype=np.int64))
    n_panels = -(-n // lanes)
    packed = aligned_zeros((n_batch, n_panels, k, lanes))
    flat = b.reshape(n_batch, k, n)
    n_full = n // lanes
    whole = flat[:, :, : n_full * lanes].reshape(n_batch, k, n_full, lanes)
    packed[:, :n_full] = whole.transpose(0, 2, 1, 3)
    if n_full < n_panels:
        packed[:, n_full, :, : n - n_full * lanes] = flat[:, :, n_full * lanes :]
    return packed


def aligned_zeros(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A zeroed f32 array that starts at a cache line."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.zeros(count * 4 + ALIGNMENT_BYTES, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[skip : skip + count * 4].view(np.float32).reshape(shape)
