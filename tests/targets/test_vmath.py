"""Errors of the elementary functions, in units in the last place, against wider arithmetic; special values; every
instruction set."""

from __future__ import annotations

import ctypes.util
import math

import numpy as np
import pytest

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.loops.kernel import Binary, Buffer, For, Kernel, Load, Store, Unary

N, i = symbol("N"), symbol("i")


def sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


WIDER = {
    "exp": np.exp, "log": np.log, "sin": np.sin, "cos": np.cos, "tan": np.tan, "tanh": np.tanh, "asin": np.arcsin,
    "acos": np.arccos, "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh, "asinh": np.arcsinh, "acosh": np.arccosh,
    "atanh": np.arctanh, "log1p": np.log1p, "expm1": np.expm1, "sigmoid": sigmoid,
    "erf": np.vectorize(math.erf, otypes=[np.float64]), "erfc": np.vectorize(math.erfc, otypes=[np.float64]),
}  # fmt: skip
# Function: domain and bound for f32, domain and bound for f64. Bounds are those that `vmath` and `vmath64` promise.
PROMISES = {
    "exp": ((-110, 90), 1.2, (-750, 710), 1.1),
    "log": ((0, 3e38), 0.8, (0, 1e300), 0.8),
    "erf": ((-6, 6), 1.1, (-6, 6), 2.1),
    "sin": ((-3e38, 3e38), 1.6, (-1e6, 1e6), 2.5),
    "cos": ((-3e38, 3e38), 1.6, (-1e6, 1e6), 2.5),
    "tan": ((-3e38, 3e38), 0.51, (-1e5, 1e5), 4),
    "tanh": ((-12, 12), 2.6, (-25, 25), 2.5),
    "sigmoid": ((-87.33, 110), 2.1, (-750, 750), 2.5),
    "asin": ((-1, 1), 0.51, (-1, 1), 2.5),
    "acos": ((-1, 1), 0.51, (-1, 1), 2),
    "atan": ((-1e30, 1e30), 0.51, (-1e200, 1e200), 1),
    "sinh": ((-90, 90), 0.51, (-711, 711), 3.1),
    "cosh": ((-90, 90), 0.51, (-711, 711), 3.1),
    "asinh": ((-3e38, 3e38), 0.51, (-1e300, 1e300), 2),
    "acosh": ((1, 3e38), 0.51, (1, 1e300), 2),
    "atanh": ((-1, 1), 0.51, (-1, 1), 2.1),
    "log1p": ((-1, 3e38), 0.51, (-1, 1e300), 1.4),
    "expm1": ((-110, 90), 0.51, (-800, 710), 2),
}


def evaluate(compile_kernel, isa, fn: str, dtype: DType, *x: np.ndarray) -> np.ndarray:
    ins = [Buffer(f"x{k}", dtype, (N,), (1,)) for k in range(len(x))]
    out = Buffer("out", dtype, (N,), (1,), True)
    loads = [Load(b, (i,)) for b in ins]
    e = Unary(fn, *loads) if len(x) == 1 else Binary(fn, *loads)
    kernel = Kernel("f", (*ins, out), (For("i", N, (Store(out, (i,), e),), "vector"),))
    result = np.zeros_like(x[0])
    compile_kernel(kernel, isa).run([*x, result], {"N": len(result)})
    return result


def spread(lo: float, hi: float, dtype: np.dtype, n: int) -> np.ndarray:
    """Numbers of a range: evenly by size, evenly by exponent, and around 1."""
    rng = np.random.default_rng(0)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    ends = np.array([np.finfo(dtype).smallest_subnormal, max(abs(lo), abs(hi))], dtype).view(unsigned)
    by_exponent = rng.integers(ends[0], ends[1], n, unsigned, endpoint=True).view(dtype)
    by_exponent = np.where(rng.random(n) < 0.5, -by_exponent, by_exponent)
    by_size = lo + (hi - lo) * rng.random(n)
    values = np.concatenate([by_exponent, by_size.astype(dtype), (3 * rng.normal(size=n)).astype(dtype)])
    return values[(values >= lo) & (values <= hi)]


def errors(actual: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Distances in units in the last place; 0 where both are NaN or where both overflow."""
    info = np.finfo(actual.dtype)
    with np.errstate(all="ignore"):
        unit = np.maximum(2.0 ** (np.floor(np.log2(np.abs(exact))) - info.nmant), info.smallest_subnormal)
        distance = np.abs(actual.astype(np.longdouble) - exact) / unit
        same = (actual == exact) | (np.isnan(actual) & np.isnan(exact))
        same |= np.isinf(actual) & (np.abs(exact) > info.max) & (np.sign(actual) == np.sign(exact))
    return np.where(same, 0, distance)


@pytest.mark.parametrize("fn", PROMISES)
def test_errors_of_f32(compile_kernel, each_isa, fn: str) -> None:
    (lo, hi), bound, *_ = PROMISES[fn]
    x = spread(lo, hi, np.dtype(np.float32), 20_000)
    with np.errstate(all="ignore"):
        exact = WIDER[fn](x.astype(np.float64))
    e = errors(evaluate(compile_kernel, each_isa, fn, DType.f32, x), exact)
    worst = int(np.argmax(np.where(np.isnan(e), np.inf, e)))
    assert e[worst] <= bound, f"{fn}({x[worst]!r}): {e[worst]} ulp"


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="needs an 80-bit long double to compare with")
@pytest.mark.parametrize("fn", PROMISES)
def test_errors_of_f64(compile_kernel, each_isa, fn: str) -> None:
    _, _, (lo, hi), bound = PROMISES[fn]
    x = spread(lo, hi, np.dtype(np.float64), 5_000)
    with np.errstate(all="ignore"):
        exact = WIDER[fn](x if fn == "erf" else x.astype(np.longdouble))
    e = errors(evaluate(compile_kernel, each_isa, fn, DType.f64, x), exact)
    worst = int(np.argmax(np.where(np.isnan(e), np.inf, e)))
    assert e[worst] <= bound, f"{fn}({x[worst]!r}): {e[worst]} ulp"


def test_erf_at_the_ends_of_its_pieces(compile_kernel, each_isa) -> None:
    ends = (np.arange(-70, 71) / 16).astype(np.float32)
    x = np.concatenate([ends, np.nextafter(ends, np.float32(9)), np.nextafter(ends, np.float32(-9))])
    exact = WIDER["erf"](x.astype(np.float64))
    assert errors(evaluate(compile_kernel, each_isa, "erf", DType.f32, x), exact).max() <= PROMISES["erf"][1]


SPECIAL = [
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    1e-45,
    -1e-45,
    1.0,
    -1.0,
    200.0,
    -200.0,
    88.72,
    88.73,
    -103.9,
    -104.1,
]


@pytest.mark.parametrize("fn", PROMISES)
@pytest.mark.parametrize("dtype", [DType.f32, DType.f64])
def test_special_values(compile_kernel, each_isa, fn: str, dtype: DType) -> None:
    x = np.array(SPECIAL, dtype.numpy)
    with np.errstate(all="ignore"):
        expected = WIDER[fn](x.astype(np.float64)).astype(dtype.numpy)
    actual = evaluate(compile_kernel, each_isa, fn, dtype, x)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    below = 2.0**-126 if fn == "sigmoid" else 0  # which are 0
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=below)
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(actual[known]), np.signbit(expected[known]))


def test_limits_of_exp(compile_kernel, each_isa) -> None:
    x = np.array([-200, -104.5, -103.9, -87.5, 88.7, 88.8, 200], np.float32)
    y = evaluate(compile_kernel, each_isa, "exp", DType.f32, x)
    assert y[0] == y[1] == 0 and 0 < y[2] < 3e-45 and 0 < y[3] < 2.0**-126
    assert np.isfinite(y[4]) and np.isposinf(y[5]) and np.isposinf(y[6])


@pytest.mark.parametrize(("fn", "least"), [("exp", -104.1), ("sigmoid", -87.34)])
def test_far_below_nothing_underflows(compile_kernel, each_isa, fn: str, least: float) -> None:
    """An operation that underflows is slow: most of what a mask hides from a softmax would, and the background in a map
    of probabilities."""
    libm, underflow = ctypes.CDLL(ctypes.util.find_library("m")), 16
    for value in (least, -104.1, -1e9, -3.4028235e38, -math.inf, 95.0 if fn == "sigmoid" else 0.0):
        x = np.full(100, value, np.float32)
        evaluate(compile_kernel, each_isa, fn, DType.f32, x)
        libm.feclearexcept(underflow)
        y = evaluate(compile_kernel, each_isa, fn, DType.f32, x)
        assert not libm.fetestexcept(underflow), value
        assert (y == (value >= 0)).all()
    libm.feclearexcept(underflow)
    evaluate(compile_kernel, each_isa, "exp", DType.f32, np.full(100, -95, np.float32))
    assert libm.fetestexcept(underflow), "the flag tells nothing here"


@pytest.mark.parametrize(("fn", "bound"), [("exp2", 2.0**-22.5), ("exp2_bf16", 2.0**-13.6)])
def test_errors_of_powers(compile_kernel, each_isa, fn: str, bound: float) -> None:
    """Every fraction that a number has in f32, above 0 and below, and numbers of every size."""
    fractions = np.arange(1 << 23, dtype=np.uint32) + np.float32(1).view(np.uint32)
    unit = fractions.view(np.float32)
    for x in (unit, -unit, spread(-126, 127.99, np.dtype(np.float32), 100_000), np.arange(-126, 128, dtype=np.float32)):
        y = evaluate(compile_kernel, each_isa, fn, DType.f32, x)
        exact = np.exp2(x.astype(np.float64))
        assert np.abs(y / exact - 1).max() <= bound
        if fn == "exp2_bf16":
            rounded = errors(y.astype(DType.bf16.numpy).astype(np.float32), exact) / 2**16  # in units of bf16
            assert rounded.max() <= 0.52


@pytest.mark.parametrize(
    ("fn", "bound", "least"), [("sigmoid_bf16", 2.0**-12.7, 0), ("gelu_bf16", 2.0**-10.9, 2.0**-22)]
)
def test_errors_of_gates_for_bf16(compile_kernel, each_isa, fn: str, bound: float, least: float) -> None:
    x = np.concatenate([spread(-87, 87, np.dtype(np.float32), 10_000), np.linspace(-12, 12, 40_001, dtype=np.float32)])
    y = evaluate(compile_kernel, each_isa, fn, DType.f32, x)
    wide = x.astype(np.float64)
    exact = sigmoid(wide) if fn == "sigmoid_bf16" else wide * WIDER["erfc"](-wide / math.sqrt(2)) / 2
    assert (np.abs(y - exact) <= bound * np.abs(exact) + least).all()
    ends = np.array([math.inf, 3e38, -3e38, math.nan, 0, -0.0] * 3, np.float32)
    y = evaluate(compile_kernel, each_isa, fn, DType.f32, ends)[:6]
    want = [1, 1, 0, math.nan, 0.5, 0.5] if fn == "sigmoid_bf16" else ends[:6] * [1, 1, 0, 1, 0, 0]
    np.testing.assert_allclose(y, want, rtol=bound)


def test_errors_of_gelu(compile_kernel, each_isa) -> None:
    """The other factor is off by 2**-24 of 1 above a half, half as much below."""
    ends = ((np.arange(-66, 66) + 0.5) * 23 / 128).astype(np.float32)
    x = np.concatenate([spread(-3e38, 3e38, np.dtype(np.float32), 20_000), np.linspace(-7, 7, 40_001, dtype=np.float32),
                        ends, np.nextafter(ends, np.float32(9)), np.nextafter(ends, np.float32(-9))])  # fmt: skip
    y = evaluate(compile_kernel, each_isa, "gelu", DType.f32, x)
    wide = x.astype(np.float64)
    exact = wide * WIDER["erfc"](-wide / math.sqrt(2)) / 2
    assert (np.abs(y - exact) <= np.where(x < 0, 2.0**-24, 2.0**-23) * np.abs(wide) + 2.0**-149).all()
    ends = np.array([math.inf, 3e38, -3e38, math.nan, 0, -0.0, -math.inf] * 3, np.float32)
    y = evaluate(compile_kernel, each_isa, "gelu", DType.f32, ends)[:7]
    np.testing.assert_array_equal(y, [math.inf, ends[1], 0, math.nan, 0, 0, math.nan])
    np.testing.assert_array_equal(np.signbit(y[[2, 4, 5]]), [True, False, True])


@pytest.mark.parametrize("fn", ["exp2", "exp2_bf16"])
def test_limits_of_powers(compile_kernel, each_isa, fn: str) -> None:
    x = np.array([-math.inf, -3e38, -127, -126.01, -126, -0.0, 0.0, -1e-30, 127.9, 129, 3e38, math.inf, math.nan] * 3)
    y = evaluate(compile_kernel, each_isa, fn, DType.f32, x.astype(np.float32))[:13]
    assert not y[:4].any() and y[4] > 0 and np.isposinf(y[9:12]).all() and np.isnan(y[12])
    np.testing.assert_allclose(y[4:9], np.exp2(x[4:9]), rtol=2.0**-13.6)


@pytest.mark.parametrize("dtype", [DType.f32, DType.f64])
def test_power(compile_kernel, each_isa, dtype: DType) -> None:
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(size=4000) * 10.0 ** rng.integers(-5, 5, 4000)).astype(dtype.numpy)
    y = (rng.normal(size=4000) * 10.0 ** rng.integers(-3, 2, 4000)).astype(dtype.numpy)
    with np.errstate(all="ignore"):
        exact = np.power(x.astype(np.longdouble), y.astype(np.longdouble))
        bound = 0.51 if dtype is DType.f32 else 1 + 2 * np.abs(y * np.log(x))
    e = errors(evaluate(compile_kernel, each_isa, "pow", dtype, x, y), exact)
    assert np.all(e <= bound), f"{np.max(e / bound)} times the bound"


@pytest.mark.parametrize("dtype", [DType.f32, DType.f64])
def test_special_powers(compile_kernel, each_isa, dtype: DType) -> None:
    numbers = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 3.0, -3.0, math.inf, -math.inf, math.nan, 2.5, 1e30]
    x, y = (g.reshape(-1).astype(dtype.numpy) for g in np.meshgrid(numbers, numbers))
    with np.errstate(all="ignore"):
        expected = np.power(x.astype(np.float64), y.astype(np.float64)).astype(dtype.numpy)
    actual = evaluate(compile_kernel, each_isa, "pow", dtype, x, y)
    np.testing.assert_allclose(actual, expected, rtol=1e-6 if dtype is DType.f32 else 1e-13)
