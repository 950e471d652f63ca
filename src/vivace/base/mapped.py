"""Arrays that lie in memory-mapped files."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np


def forget(array: np.ndarray) -> bool:
    """Tell the system that the pages behind a mapped array may leave memory; they are read again if touched.

    Packing weights reads a model file once; without this its pages would stand beside the packed copy in the process's
    peak memory. Returns whether the array was mapped.
    """
    owner: object = array
    while isinstance(owner, (np.ndarray, memoryview)):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return False
    start = np.frombuffer(owner, np.uint8).ctypes.data
    first = (array.ctypes.data - start) // mmap.PAGESIZE * mmap.PAGESIZE
    length = array.ctypes.data - start + array.nbytes - first
    with contextlib.suppress(ValueError, OSError):
        owner.madvise(mmap.MADV_DONTNEED, first, length)
    return True
