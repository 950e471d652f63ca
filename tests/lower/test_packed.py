"""Made constants lie side by side, and are what was made."""

from __future__ import annotations

import numpy as np

from vivace.lower.packed import CHUNK_BYTES, HUGE_PAGE_BYTES, Packed

_SOURCE = np.arange(3)


def _made(packed: Packed, key: int, n_bytes: int) -> np.ndarray:
    data = np.arange(key, key + n_bytes, dtype=np.uint8)
    kept = packed.storage(key, (_SOURCE,), f"w{key}", lambda: data).data
    assert kept is not None and kept is packed.storage(key, (_SOURCE,), f"w{key}", lambda: data[:0]).data
    np.testing.assert_array_equal(kept, data)
    return kept


def test_what_was_made_lies_side_by_side() -> None:
    packed = Packed()
    first = _made(packed, 0, HUGE_PAGE_BYTES)
    sizes = [1000, 3 * HUGE_PAGE_BYTES // 2, 0, 1, CHUNK_BYTES]
    arrays = [_made(packed, key, size) for key, size in enumerate(sizes, 1)]
    places = [a.ctypes.data for a in arrays]
    assert places[0] % HUGE_PAGE_BYTES == 0 and places[-1] % HUGE_PAGE_BYTES == 0
    assert places[1] == places[0] + 1024 and places[3] == places[1] + sizes[1]
    again = packed.storage(0, (_SOURCE,), "w0", lambda: first[:0]).data
    assert again is first  # a small model stays where it was made
    for key, (array, size) in enumerate(zip(arrays, sizes), 1):
        np.testing.assert_array_equal(array, np.arange(key, key + size, dtype=np.uint8))


def test_what_was_given_stays() -> None:
    packed, large = Packed(), np.zeros(2 * HUGE_PAGE_BYTES, np.uint8)
    assert packed.storage("given", (large,), "w", lambda: large).data is large
    assert packed.storage("fresh", (), "w", lambda: large).data is large


def test_types_and_shapes() -> None:
    packed = Packed()
    _made(packed, 0, HUGE_PAGE_BYTES)
    for dtype in (np.float32, np.float16, np.int64):
        data = np.arange(24, dtype=dtype).reshape(2, 3, 4)
        s = packed.storage(dtype, (_SOURCE,), "w", data.copy)
        assert s.data is not None and s.data.dtype == dtype and s.size == 24
        np.testing.assert_array_equal(s.data, data)
