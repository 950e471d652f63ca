"""Moving weights onto huge pages changes nothing but their pages."""

from __future__ import annotations

import numpy as np

from vivace.runtime.pages import HUGE_PAGE_BYTES, LEAST_BYTES, collapse


def test_contents_and_addresses_stay() -> None:
    n = LEAST_BYTES // 4 // 40
    arrays = [np.arange(k, k + n, dtype=np.float32) for k in range(41)]
    places = [a.ctypes.data for a in arrays]
    moved = collapse(arrays)
    assert moved % HUGE_PAGE_BYTES == 0 and moved <= sum(a.nbytes for a in arrays) + 8192 * len(arrays)
    assert [a.ctypes.data for a in arrays] == places
    for k, a in enumerate(arrays):
        np.testing.assert_array_equal(a, np.arange(k, k + n, dtype=np.float32))


def test_few_weights_and_none_are_left_alone() -> None:
    assert collapse([]) == 0
    assert collapse([np.zeros(1000, np.float32), np.zeros((0, 4), np.float32)]) == 0
