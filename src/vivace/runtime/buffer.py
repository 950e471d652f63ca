"""Memory for arenas, weights and tables: aligned, with NumPy views, freed when the last view is gone.

Rules:
* ALIGNED: every buffer starts at a multiple of 64 bytes (a cache line, a 512-bit vector).
* UNTOUCHED: nothing is written here but by who uses the memory, so on machines with several nodes of memory a page lies
  near the thread that used it first. `by_page` makes a buffer of whole pages, none of them huge, for parts that belong
  to different threads.
* HUGE: from 2 MiB on a buffer is its own mapping, aligned to 2 MiB, and asks for huge pages. For 64 MiB, first touch
  took 6 instead of 29 ms, and reading it by random lines 2.0 instead of 2.3 ms per 200,000.
* MEMORY: what the system refuses is a MemoryError, as NumPy's own is.
* VIEWS: a view keeps the memory alive. `release` drops the buffer's own hold, so nothing can be read after it was
  freed.

Not handled: memory on chosen NUMA nodes.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from vivace.base.errors import InternalError

ALIGNMENT = 64
PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20


class Buffer:
    """`n_bytes` bytes of zeroed memory at `address`."""

    __slots__ = ("_bytes", "address", "n_bytes")

    def __init__(self, n_bytes: int, by_page: bool = False) -> None:
        if n_bytes < 0:
            raise InternalError(f"a buffer of {n_bytes} bytes")
        self.n_bytes = n_bytes
        is_large = n_bytes >= HUGE_PAGE_BYTES
        alignment = PAGE_BYTES if by_page else HUGE_PAGE_BYTES if is_large else ALIGNMENT
        whole = _map(n_bytes + alignment, not by_page) if is_large else np.zeros(n_bytes + alignment, np.uint8)
        start = -whole.ctypes.data % alignment
        self._bytes: npt.NDArray[np.uint8] | None = whole[start : start + n_bytes]
        self.address: int = whole.ctypes.data + start

    @property
    def bytes(self) -> npt.NDArray[np.uint8]:
        """All of it, as bytes."""
        if self._bytes is None:
            raise InternalError("the buffer was released")
        return self._bytes

    def view(self, dtype: npt.DTypeLike, shape: tuple[int, ...], offset: int = 0) -> npt.NDArray[Any]:
        """An array on the memory from byte `offset` on."""
        kind = np.dtype(dtype)
        n_bytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        if offset < 0 or offset + n_bytes > self.n_bytes:
            raise InternalError(f"a view of {n_bytes} bytes at {offset} in a buffer of {self.n_bytes}")
        return self.bytes[offset : offset + n_bytes].view(kind).reshape(shape)

    def release(self) -> None:
        """Gives the memory back as soon as no view is left."""
        self._bytes = None


def _map(n_bytes: int, huge_pages: bool) -> npt.NDArray[np.uint8]:
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return np.zeros(n_bytes, np.uint8)
    try:
        mapping = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as e:
        raise MemoryError(f"the system gives no {n_bytes} bytes") from e
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(mapping, np.uint8)


# CPython puts an object's fields after its head, and NumPy's array keeps its data pointer first
# (numpy/ndarraytypes.h, PyArrayObject_fields). Native code reads it there: asking for `array.ctypes.data` takes 1 us,
# which a small model would notice. `data_is_first` is checked once, at import.
DATA_FIELD = object.__basicsize__


def _data_is_the_first_field() -> bool:
    samples: list[npt.NDArray[Any]] = [np.zeros(3), np.zeros((), np.int8), np.zeros((4, 6), np.float32)[1:, 2:]]
    word_at = ctypes.c_size_t.from_address
    return sys.implementation.name == "cpython" and all(
        sys.getsizeof(a) > DATA_FIELD and word_at(id(a) + DATA_FIELD).value == a.ctypes.data for a in samples
    )


data_is_first = _data_is_the_first_field()
