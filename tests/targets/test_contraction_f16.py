"""Products and convolutions of f16 with f32 sums: both sides are converted, so that sums are those of f32 code.

Tolerance: products of f16 are exact in f32; a sum of k terms in any order is off by at most k * 2**-24 of the sum of
magnitudes.
"""

from __future__ import annotations

import numpy as np
import pytest
from tests.targets.low_precision import Case, convolution, depthwise, isas, product

from vivace.base.machine import Isa

each_isa = pytest.mark.parametrize("target", isas("sse", "avx2", "avx512"))


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(np.float16)


def check(case: Case, target: Isa, k: int) -> None:
    np.testing.assert_allclose(case.run(target), case.expected, rtol=1e-5, atol=k * 2.0**-21)


@each_isa
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (1, 64, 96), (3, 17, 33), (29, 42, 48), (61, 129, 16)])
def test_product(target: Isa, symbolic: bool, m: int, k: int, n: int) -> None:
    check(product(numbers(1, 2, m, k), numbers(2, 2, k, n), np.float32, target, symbolic=symbolic), target, k)


@each_isa
@pytest.mark.parametrize("size, ci, co, k, stride", [(9, 8, 32, 3, 1), (15, 3, 33, 7, 2), (9, 5, 1, 3, 1)])
def test_convolution(target: Isa, size: int, ci: int, co: int, k: int, stride: int) -> None:
    x, w = numbers(3, 2, size, size, ci), numbers(4, k, k, ci, co)
    check(convolution(x, w, stride, np.float32, target), target, k * k * ci)


@each_isa
@pytest.mark.parametrize("size, channels, k, stride", [(9, 32, 3, 1), (10, 33, 3, 2)])
def test_depthwise(target: Isa, size: int, channels: int, k: int, stride: int) -> None:
    x, w = numbers(3, 2, size, size, channels), numbers(4, k, k, channels).astype(np.float32) * 1.001
    check(depthwise(x, w, stride, np.float32), target, k * k)


@each_isa
def test_every_f16_as_either_factor(target: Isa) -> None:
    """Denormals, infinities, NaN and both zeros: times one, each number is itself."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    one = np.ones((1, 1, 1), np.float16)
    want = every.astype(np.float32)
    got = product(every.reshape(1, -1, 1), one, np.float32, target).run(target).reshape(-1)
    np.testing.assert_array_equal(got, want)
    got = product(one, every.reshape(1, 1, -1), np.float32, target).run(target).reshape(-1)
    np.testing.assert_array_equal(got, want)


@each_isa
def test_results_are_rounded_to_f16(target: Isa) -> None:
    """65519 is the largest number below infinity, and 2**-25 a tie with zero."""
    a = np.array([[[32760.0], [32744.0], [2.0**-12]]], np.float16)
    case = product(a, np.array([[[2.0, 2.0**-13]]], np.float16), np.float16, target)
    with np.errstate(over="ignore"):
        want = case.expected.astype(np.float32).astype(np.float16)
    assert np.isinf(want[0, 0, 0]) and np.isfinite(want[0, 1, 0]) and want[0, 2, 1] == 0
    np.testing.assert_array_equal(case.run(target), want)
