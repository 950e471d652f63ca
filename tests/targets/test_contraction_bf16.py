"""Products and convolutions of bf16 with f32 sums, with every instruction set and extra that this CPU has.

Tolerance: products of bf16 are exact in f32; a sum of k terms in any order is off by at most k * 2**-24 of the sum of
magnitudes, and by as much again for the instructions that truncate between the two terms of a pair.
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.targets.low_precision import Case, buffer, convolution, depthwise, isas, product

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.machine import ISAS, Isa, isa
from vivace.loops.kernel import Binary, Cast, Const, Load, Read
from vivace.lower.arithmetic import choose_arithmetic
from vivace.lower.tile import choose_tile

each_isa = pytest.mark.parametrize("target", isas("sse", "avx2", "avx512", "avx512+avx512_bf16"))
bf16 = ml_dtypes.bfloat16
ACC = Read("acc", DType.f32)


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(bf16)


def check(case: Case, target: Isa, k: int) -> None:
    np.testing.assert_allclose(case.run(target), case.expected, rtol=1e-5, atol=k * 2.0**-21)


@each_isa
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (1, 64, 96), (3, 17, 33), (14, 16, 32), (29, 42, 48), (61, 129, 16)])
def test_product(target: Isa, symbolic: bool, m: int, k: int, n: int) -> None:
    check(product(numbers(1, 2, m, k), numbers(2, 2, k, n), np.float32, target, symbolic=symbolic), target, k)


@each_isa
@pytest.mark.parametrize(
    "size, ci, co, k, stride", [(9, 8, 32, 3, 1), (7, 16, 48, 1, 1), (15, 3, 33, 7, 2), (9, 5, 1, 3, 1)]
)
def test_convolution(target: Isa, size: int, ci: int, co: int, k: int, stride: int) -> None:
    check(
        convolution(numbers(3, 2, size, size, ci), numbers(4, k, k, ci, co), stride, np.float32, target),
        target,
        k * k * ci,
    )


@each_isa
def test_passes_and_staged_rows(target: Isa) -> None:
    case = product(numbers(1, 1, 45, 96), numbers(2, 1, 96, 70), np.float32, target)
    plan = choose_tile(case.c, target)  # type: ignore[arg-type]
    for tile in (
        replace(plan, k_block=32, tiles_per_unit=2, panels_per_unit=1),
        replace(plan, stage_a=True, rows_outer=True),
    ):
        case.tile = tile
        check(case, target, 96)


@each_isa
def test_results_are_rounded_to_bf16_in_the_epilogue(target: Isa) -> None:
    """Small integers: sums are exact, and so is every rounding. The residual lies in the out buffer."""
    random = np.random.default_rng(0)
    a, b = (random.integers(-8, 9, shape).astype(bf16) for shape in ((1, 33, 50), (1, 50, 45)))
    case = product(a, b, bf16, target)
    bias = random.integers(-8, 9, 45).astype(np.float32)
    bias_buffer, at = buffer("bias", bias), symbol("n")
    total = Binary("add", ACC, Load(bias_buffer, (at,)))
    total = Binary("add", total, Cast(DType.f32, Load(case.c.out, (symbol("h"), symbol("m"), at))))
    case.c = replace(case.c, epilogue=Binary("max", total, Const(0.0, DType.f32)), extra=(bias_buffer, case.c.out))
    case.arrays[bias_buffer] = bias
    plain = product(a, b, bf16, target)
    np.testing.assert_array_equal(plain.run(target), plain.expected.astype(np.float32).astype(bf16))
    expected = np.maximum(case.expected + bias + 77, 0).astype(np.float32).astype(bf16)
    np.testing.assert_array_equal(case.run(target), expected)


@each_isa
def test_nan_and_infinity_propagate(target: Isa) -> None:
    a, b = numbers(1, 1, 20, 13), numbers(2, 1, 13, 40)
    a[0, 3, 5], a[0, 4, 12], a[0, 5] = np.nan, np.inf, 0
    b[0, :, 7] = np.inf
    out = product(a, b, np.float32, target).run(target)[0]
    assert np.isnan(out[3]).all() and not np.isfinite(out[4]).any() and np.isnan(out[5, 7])
    assert (np.delete(out[5], 7) == 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 80), st.data())
def test_random_shapes(m: int, k: int, n: int, data: st.DataObject) -> None:
    runnable = [p.values[0] for p in isas(*ISAS, "avx512+avx512_bf16") if not p.marks[0].args[0]]  # type: ignore[attr-defined]
    target = data.draw(st.sampled_from(runnable))
    check(product(numbers(m, 1, m, k), numbers(n, 1, k, n), np.float32, target), target, k)


def test_the_arithmetic_follows_the_instruction_set() -> None:
    names = ("avx2", "avx512", "avx512+avx512_bf16", "avx512+amx_bf16+amx_tile+avx512_bf16")
    kinds = [choose_arithmetic(DType.bf16, DType.bf16, isa(name)).kind for name in names]
    assert kinds == ["split16", "split16", "dot16", "tile16"]


@each_isa
@pytest.mark.parametrize("size, channels, k, stride", [(9, 32, 3, 1), (10, 33, 3, 2), (14, 20, 9, 1)])
def test_depthwise(target: Isa, size: int, channels: int, k: int, stride: int) -> None:
    x, w = numbers(3, 2, size, size, channels), numbers(4, k, k, channels).astype(np.float32) * 1.001
    case = depthwise(x, w, stride, np.float32)
    check(case, target, k * k)
