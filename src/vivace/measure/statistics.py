"""What can be said about times from a sample: percentiles and ratios, each with its confidence interval.

Rules:
* ORDER: an interval of a percentile comes from order statistics and the binomial law, so it assumes nothing about the
  distribution; where the sample is too small for it, the answer is None and never a guess.
* ROUND: times of one round of an interleaved run share their disturbances, so a ratio is resampled by whole rounds.
* SEED: resampling is seeded: the same sample gives the same interval.

Source: H. A. David and H. N. Nagaraja, Order Statistics, 7.1 (percentiles); B. Efron, 1979 (bootstrap); MLPerf
Inference rules, "early stopping" (sample counts for tails).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
_TAIL_CONFIDENCE = 0.99


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and the interval that holds the true one with the stated confidence; None where none can be given."""

    value: float
    low: float | None
    high: float | None
    confidence: float = CONFIDENCE

    @property
    def half_width(self) -> float | None:
        """Half of the interval, relative to the value."""
        if self.low is None or self.high is None or self.value == 0:
            return None
        return (self.high - self.low) / 2 / self.value


def percentile(times: Sequence[float] | np.ndarray, fraction: float, confidence: float = CONFIDENCE) -> Estimate:
    """The percentile with its distribution-free interval (ORDER). `fraction` is 0.5 for the median."""
    ordered = np.sort(np.asarray(times, float))
    n = len(ordered)
    if n == 0:
        raise ValueError("no times")
    value = float(np.quantile(ordered, fraction))
    ranks = _interval_ranks(n, fraction, confidence)
    if ranks is None:
        return Estimate(value, None, None, confidence)
    return Estimate(value, float(ordered[ranks[0]]), float(ordered[ranks[1]]), confidence)


def _interval_ranks(n: int, fraction: float, confidence: float) -> tuple[int, int] | None:
    """0-based ranks l < u with P(x[l] <= quantile <= x[u]) >= confidence, or None where the sample is too small.

    The number of samples below the quantile is Binomial(n, fraction). x[l] lies above it when at most l samples are
    below, and x[u] lies below it when more than u are; each may happen with half of what confidence leaves.
    """
    below = _binomial_cumulative(n, fraction)
    tail = (1 - confidence) / 2
    low = int(np.searchsorted(below, tail, side="right")) - 1
    high = int(np.searchsorted(below, 1 - tail, side="left"))
    if low < 0 or high >= n:
        return None
    return low, high


def _binomial_cumulative(n: int, p: float) -> np.ndarray:
    """P(X <= k) for k = 0..n."""
    k = np.arange(n + 1)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_choose = log_factorials[n] - log_factorials[k] - log_factorials[n - k]
    return np.minimum(np.cumsum(np.exp(log_choose + k * math.log(p) + (n - k) * math.log1p(-p))), 1.0)


def minimum_samples(fraction: float, n_over: int = 0, confidence: float = _TAIL_CONFIDENCE) -> int:
    """Least number of times that proves a percentile bound when `n_over` of them may lie above it.

    459 for the 99th percentile with none above, 662 with one, 4603 for the 99.9th with none.
    """
    n = n_over + 1
    while _at_most(n, n_over, 1 - fraction) > 1 - confidence:
        n = n + max(1, n // 64)
    while n > n_over + 1 and _at_most(n - 1, n_over, 1 - fraction) <= 1 - confidence:
        n -= 1
    return n


def _at_most(n: int, k: int, p: float) -> float:
    """P(Binomial(n, p) <= k)."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def ratio_of_medians(
    times: np.ndarray, others: np.ndarray, confidence: float = CONFIDENCE, n_resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Median of one engine over the median of another, measured in the same rounds (ROUND, SEED).

    Shapes: both are [rounds, calls]; the number of calls per round may differ. The interval needs six rounds.
    """
    value = float(np.median(times) / np.median(others))
    n_rounds = min(len(times), len(others))
    if n_rounds < 6:  # the interval of a median needs six samples at 95 %
        return Estimate(value, None, None, confidence)
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, n_rounds, (n_resamples, n_rounds))
    ratios = np.array([np.median(times[rounds]) / np.median(others[rounds]) for rounds in chosen])
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high), confidence)


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios. Raises: ValueError for none, or for one that is not positive."""
    if not values or min(values) <= 0:
        raise ValueError(f"no geometric mean of {values!r}")
    return math.exp(sum(map(math.log, values)) / len(values))


def variation(times: Sequence[float] | np.ndarray) -> float:
    """Coefficient of variation: standard deviation over mean."""
    array = np.asarray(times, float)
    mean = float(array.mean())
    return float(array.std() / mean) if mean else 0.0
