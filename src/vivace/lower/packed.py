"""The constants that a lowering makes of others, such as packed weights: what they are known by, and where they lie.

A product with one row reads every weight once, and with pages of 4 KiB much of its time goes into finding them: what
fetches ahead stops at the end of a page. With weights wherever the heap had room as 1, SmolLM2-135M took for one token
after 128 in turns 0.84 (int4) and 0.90 (int8) with all of them on huge pages, and 0.89 (both) with two threads (Emerald
Rapids).

Rules:
* SIDE BY SIDE: constants lie in chunks on huge pages, one after the other in the order in which they were made, which
  is nearly that in which they are read. NumPy asks the system for huge pages for whatever is so large; only pages that
  are written to take memory.
* FEW: the first 2 MiB stay where they were made: a small model would grow by a page, and its weights stay in caches.

Not handled: weights of saved engines, which are mapped from a file. Linux maps it by huge pages where its cache holds
the file so, as after `engine.save`, or after a file is read from disk (ext4, 6.18): a token takes 1.01 of the time.
After a copy in small writes it takes 1.04 to 1.09.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vivace.base.dtypes import DType
from vivace.lower.pack import ALIGNMENT_BYTES
from vivace.lower.views import Storage

HUGE_PAGE_BYTES = 2 << 20
CHUNK_BYTES = 64 << 20  # more than the largest allocation that glibc may serve from its heap, which is 32 MiB


class Packed:
    """Constants by key. Lowerings of one graph may share them."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[Storage, tuple[NDArray[Any], ...]]] = {}
        self._n_bytes = 0
        self._free: NDArray[np.uint8] = np.empty(0, np.uint8)

    def storage(
        self, key: object, sources: tuple[NDArray[Any], ...], name: str, make: Callable[[], NDArray[Any]]
    ) -> Storage:
        """The constant of a key, which may hold ids of its sources: they are kept, so that no other array gets their
        ids. It is made once. What was made of sources, and is none of them, is put beside the others."""
        if key not in self._known:
            data = make()
            if sources and data is not sources[0]:
                data = self._placed(data)
            self._known[key] = Storage(name, DType.of(data.dtype), int(data.size), "constant", data), sources
        return self._known[key][0]

    def _placed(self, data: NDArray[Any]) -> NDArray[Any]:
        size = -(-data.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._n_bytes += size
        if self._n_bytes <= HUGE_PAGE_BYTES:  # rule FEW
            return data
        if size > self._free.size:
            raw = np.empty(max(CHUNK_BYTES, size) + HUGE_PAGE_BYTES, np.uint8)
            self._free = raw[-raw.ctypes.data % HUGE_PAGE_BYTES :]
        place = self._free[: data.nbytes].view(data.dtype).reshape(data.shape)
        self._free = self._free[size:]
        place[...] = data
        return place
