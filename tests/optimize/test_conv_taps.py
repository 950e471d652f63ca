"""Which taps of a filter can meet an element, against trying all of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vivace.optimize.rules.conv_taps import met


@given(
    size=st.integers(0, 9), out=st.integers(0, 9), taps=st.integers(1, 7), stride=st.integers(1, 4),
    dilation=st.integers(1, 3), before=st.integers(0, 9),
)  # fmt: skip
def test_met(size: int, out: int, taps: int, stride: int, dilation: int, before: int) -> None:
    at = np.arange(out)[:, None] * stride + np.arange(taps) * dilation - before
    want = np.flatnonzero(((at >= 0) & (at < size)).any(axis=0))
    got = met(size, out, taps, stride, dilation, before)
    assert (got.start, got.stop) == ((want[0], want[-1] + 1) if want.size else (0, 0))


def test_long_signals_cost_nothing() -> None:
    """Trying all taps of all outputs would ask for 2**59 numbers."""
    assert met(2**50, 2**50, 512, 1, 1, 256) == range(512)
