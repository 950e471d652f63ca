"""Errors between outputs: sizes, special values, missing outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vivace.base.errors import InputError
from vivace.measure.compare import Tolerance, compare, compare_arrays

TOLERANCE = Tolerance(1e-3, 1e-3)


def test_equal() -> None:
    x = np.array([1.0, math.nan, math.inf, -math.inf], np.float32)
    found = compare_arrays("x", x, x.copy(), TOLERANCE)
    assert found.agrees
    assert (found.max_absolute, found.snr_db, found.n_special) == (0.0, math.inf, 0)


def test_errors() -> None:
    want = np.array([0.0, 100.0, -1.0], np.float32)
    found = compare_arrays("x", want + np.array([0.0, 0.05, 0.01], np.float32), want, TOLERANCE)
    assert found.max_absolute == pytest.approx(0.05, rel=1e-3)
    assert found.max_relative == pytest.approx(0.005, rel=1e-3)
    assert found.n_over == 1  # 0.05 <= 0.001 + 0.1, and 0.01 > 0.002
    assert not found.agrees
    assert found.snr_db == pytest.approx(10 * math.log10(10001 / (0.05**2 + 0.01**2)), rel=1e-3)


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_special_on_one_side(special: float) -> None:
    got, want = np.array([1.0, special], np.float32), np.array([1.0, 2.0], np.float32)
    assert compare_arrays("x", got, want, TOLERANCE).n_special == 1
    assert compare_arrays("x", want, got, TOLERANCE).n_special == 1
    assert compare_arrays("x", -got, got, TOLERANCE).n_special == (0 if math.isnan(special) else 1)


def test_integers_bools_strings_and_nothing() -> None:
    for array in (np.arange(3), np.array([True, False]), np.array(["a", "b"], object), np.zeros((0, 2), np.float32)):
        assert compare_arrays("x", array, array.copy(), TOLERANCE).agrees
    assert not compare_arrays("x", np.array(["a"], object), np.array(["b"], object), TOLERANCE).agrees


def test_missing_and_misshapen() -> None:
    with pytest.raises(InputError, match="missing"):
        compare({}, {"y": np.zeros(1)})
    with pytest.raises(InputError, match="shapes differ"):
        compare({"y": np.zeros(2)}, {"y": np.zeros(1)})
