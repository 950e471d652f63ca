"""Constant B of a contraction, laid out as the micro-kernels read it: `[batch][panel][k][lanes]`, zero-filled,
64-byte aligned.

A panel is `lanes` neighbouring columns; the last one is padded with zeros, so a micro-kernel never loads beyond the
array.

Rule DENORMALS: constant weights of f32 below 2**-126 count as 0. Training leaves such weights where it lets channels
die, and a product with one takes an Intel core 150 cycles: a depthwise convolution of PP-OCR's detector with 24 of them
in 9600 took 5 times as long as its neighbour. A result is off by at most 2**-126 of the sum of the magnitudes that they
meet; an infinity that meets one gives NaN, as it does with 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vivace.base.errors import UnsupportedError
from vivace.loops.contraction import Contraction, merge_axes

ALIGNMENT_BYTES = 64
_AT_ONCE = 1 << 20  # elements


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
    return without_denormals(packed)


def without_denormals(w: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same array, changed by rule DENORMALS. It must be contiguous."""
    flat = w.reshape(-1)
    for first in range(0, flat.size, _AT_ONCE):  # all of it would need as much memory again
        part = flat[first : first + _AT_ONCE]
        part[np.abs(part) < np.finfo(np.float32).tiny] = 0
    return w


def pack_groups(b: NDArray[Any], lanes: int, group: int, run: int) -> NDArray[Any]:
    """Columns grouped into panels, steps grouped into lanes: what low-precision kernels read.

    `run` is how many steps of k are one contiguous run of A (`contiguous_run`); each run is filled up to whole groups.

    Shapes: `b: T[batch.., k, n]` -> `T[prod(batch), ceil(n / lanes), k / run * ceil(run / group), lanes, group]`
    """
    *batch, k, n = b.shape
    n_batch, n_runs = int(np.prod(batch, dtype=np.int64)), k // max(run, 1)
    n_panels, n_groups = -(-n // lanes), -(-run // group)
    filled = np.zeros((n_batch, n_runs, n_groups * group, n_panels * lanes), b.dtype)
    filled[:, :, :run, :n] = b.reshape(n_batch, n_runs, run, n)
    packed = aligned_zeros((n_batch, n_panels, n_runs * n_groups, lanes, group), b.dtype)
    parts = filled.reshape(n_batch, n_runs, n_groups, group, n_panels, lanes)
    packed.reshape(n_batch, n_panels, n_runs, n_groups, lanes, group)[...] = parts.transpose(0, 4, 1, 2, 5, 3)
    return packed


def contiguous_run(c: Contraction) -> int:
    """Steps of k that lie side by side in A: the innermost tap, joined with those outside it that continue it.

    Raises: UnsupportedError where low precision cannot group them: a run of unknown length, or with gaps.
    """
    taps = merge_axes(c).taps
    if not taps:
        return 1
    extent = taps[-1].extent
    if not isinstance(extent, int) or taps[-1].a != 1:
        raise UnsupportedError(
            f"the innermost tap has extent {extent} and stride {taps[-1].a}", where=c.name,
            expected="low-precision A contiguous along it, its extent known", hint="making A contiguous",
        )  # fmt: skip
    return extent


def aligned_zeros(shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """A zeroed array that starts at a cache line."""
    size = np.dtype(dtype).itemsize
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.zeros(count * size + ALIGNMENT_BYTES, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[skip : skip + count * size].view(dtype).reshape(shape)
