"""Intervals hold what they promise, and say nothing where the sample is too small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vivace.measure.statistics import (
    geometric_mean,
    minimum_samples,
    percentile,
    ratio_of_medians,
    variation,
)


def test_sample_counts_of_mlperf() -> None:
    assert minimum_samples(0.99) == 459
    assert minimum_samples(0.99, n_over=1) == 662
    assert minimum_samples(0.999) == 4603


def test_median_of_six_is_bounded_by_its_ends() -> None:
    # P(all six on one side) * 2 = 2 / 64 < 5 %, and five samples cannot do it.
    found = percentile([5.0, 1.0, 4.0, 2.0, 6.0, 3.0], 0.5)
    assert (found.value, found.low, found.high) == (3.5, 1.0, 6.0)
    assert percentile([5.0, 1.0, 4.0, 2.0, 3.0], 0.5).low is None


def test_tails_need_large_samples() -> None:
    assert percentile(np.arange(300.0), 0.99).high is None
    assert percentile(np.arange(1000.0), 0.99).high is not None
    assert percentile(np.arange(20.0), 0.9).high is None
    assert percentile(np.arange(100.0), 0.9).high is not None


@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.99])
def test_coverage(fraction: float) -> None:
    """The interval holds the true percentile at least as often as it says (lognormal times)."""
    generator = np.random.default_rng(1)
    true = float(np.exp(np.sqrt(2) * _inverse_error(2 * fraction - 1)))
    n_inside = 0
    for _ in range(400):
        found = percentile(np.exp(generator.standard_normal(600)), fraction)
        assert found.low is not None and found.high is not None
        n_inside += found.low <= true <= found.high
    assert n_inside >= 0.93 * 400


def _inverse_error(y: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf((y + 1) / 2) / 2**0.5


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=200), st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_interval_holds_the_value(times: list[float], fraction: float) -> None:
    found = percentile(times, fraction)
    if found.low is not None and found.high is not None:
        assert found.low <= found.value <= found.high


def test_ratio() -> None:
    generator = np.random.default_rng(0)
    disturbance = 1 + 0.2 * generator.random((40, 1))  # shared by the engines of a round
    times = 2.0 * disturbance + 0.01 * generator.random((40, 5))
    others = 4.0 * disturbance + 0.01 * generator.random((40, 3))
    found = ratio_of_medians(times, others)
    assert found.low is not None and found.high is not None
    assert found.low <= 0.5 <= found.high + 0.005
    assert found.half_width is not None and found.half_width < 0.05
    assert found == ratio_of_medians(times, others)
    assert ratio_of_medians(times[:5], others[:5]).low is None


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="geometric"):
        geometric_mean([])


def test_variation() -> None:
    assert variation([2.0, 2.0, 2.0]) == 0.0
    assert variation([1.0, 3.0]) == pytest.approx(0.5)
