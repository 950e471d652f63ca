"""Generated loop kernels against the reference interpreter: sums and extremes, along and across vectors."""

from __future__ import annotations

import numpy as np
import pytest
from tests.targets.kernel_checks import (
    SIZES,
    N,
    assert_close,
    buffer,
    check,
    f32,
    f64,
    i,
    i64,
    j,
    k,
    parallel,
    samples,
    vector,
)

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.loops import reference
from vivace.loops.kernel import (
    Binary,
    Const,
    For,
    Index,
    Inside,
    Kernel,
    Let,
    Load,
    Read,
    Reduce,
    Select,
    Store,
    Unary,
)


@pytest.mark.parametrize("fn", ["add", "mul", "max", "min", "maxnum"])
@pytest.mark.parametrize("dtype", [f32, f64, DType.bf16, DType.i32, i64, DType.u8])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_reduce_one_axis(compile_kernel, each_isa, fn: str, dtype: DType, layout: str) -> None:
    """Each unit reduces a contiguous row, or a strided column."""
    x = buffer("x", dtype, (3, N), (N, 1) if layout == "rows" else (1, 3))
    out = buffer("out", dtype, (3,), out=True)
    kernel = Kernel("reduce", (x, out), (parallel("i", 3, Store(out, (i,), Reduce(fn, "k", N, Load(x, (i, k))))),))
    loaded = compile_kernel(kernel, each_isa)
    for n in SIZES:
        a = samples(dtype, 3 * n, seed=n)
        if dtype.is_float and fn in ("add", "mul"):
            a = np.random.default_rng(n).uniform(0.9, 1.1, 3 * n).astype(dtype.numpy)
        expected, actual = np.zeros(3, dtype.numpy), np.zeros(3, dtype.numpy)
        reference.run(kernel, [a, expected], {"N": n})
        loaded.run([a, actual], {"N": n})
        assert_close(actual, expected, 0 if fn in ("max", "min", "maxnum") else 16, n)


@pytest.mark.parametrize("fn", ["add", "max"])
@pytest.mark.parametrize("channels", [3, 16, 24, 64, 70])
@pytest.mark.parametrize("is_static", [True, False])
def test_pooling(compile_kernel, each_isa, fn: str, channels: int, is_static: bool) -> None:
    """Windows with padding: reductions inside a vector loop, conditions that are equal in all lanes."""
    h, w, c = symbol("h"), symbol("w"), symbol("c")
    C: Dim = channels if is_static else N
    x, out = buffer("x", f32, (5, 6, C)), buffer("out", f32, (3, 3, C), out=True)
    y, z = 2 * h + symbol("a") - 1, 2 * w + symbol("b") - 1
    item = Load(x, (y, z, c), (Inside(y, 0, 5), Inside(z, 0, 6)), 0 if fn == "add" else float("-inf"))
    store = Store(out, (h, w, c), Reduce(fn, "a", 3, Reduce(fn, "b", 3, item)))
    kernel = Kernel("pool", (x, out), (parallel("h", 3, parallel("w", 3, vector("c", C, store))),))
    values = np.random.default_rng(0).uniform(1, 2, 30 * channels).astype(np.float32)
    result = np.zeros(9 * channels, np.float32)
    check(compile_kernel, each_isa, kernel, [values], [result], {"N": channels}, 8 if fn == "add" else 0, n_parts=4)


def test_reduce_two_axes_in_one_unit(compile_kernel, each_isa) -> None:
    x, out = buffer("x", f32, (4, 5, N)), buffer("out", f32, (4,), out=True)
    total = Reduce("add", "j", 5, Reduce("add", "k", N, Load(x, (i, j, k))))
    kernel = Kernel("total", (x, out), (parallel("i", 4, Store(out, (i,), total)),))
    for n in (1, 16, 37):
        values = np.random.default_rng(0).uniform(1, 2, 20 * n).astype(np.float32)
        check(compile_kernel, each_isa, kernel, [values], [np.zeros(4, np.float32)], {"N": n}, 4)


def test_sum_of_products(compile_kernel, each_isa) -> None:
    """A matrix product in both contexts: over contiguous rows, and with the vector along columns."""
    for along_columns in (False, True):
        a, b = buffer("a", f32, (4, N)), buffer("b", f32, (N, 5), (5, 1) if along_columns else (1, N))
        out = buffer("out", f32, (4, 5), out=True)
        dot = Store(out, (i, j), Reduce("add", "k", N, Binary("mul", Load(a, (i, k)), Load(b, (k, j)))))
        inner = vector("j", 5, dot) if along_columns else For("j", 5, (dot,))
        kernel = Kernel("product", (a, b, out), (parallel("i", 4, inner),))
        for n in (0, 1, 17, 70):
            rng = np.random.default_rng(n)
            ins = [rng.uniform(0.5, 1, 4 * n).astype(np.float32), rng.uniform(0.5, 1, 5 * n).astype(np.float32)]
            check(compile_kernel, each_isa, kernel, ins, [np.zeros(20, np.float32)], {"N": n}, 8)


@pytest.mark.parametrize("n", [1, 5, 16, 40, 100])
@pytest.mark.parametrize("is_static", [True, False])
def test_softmax(compile_kernel, each_isa, n: int, is_static: bool) -> None:
    size: Dim = n if is_static else N
    x, out = buffer("x", f32, (3, size)), buffer("out", f32, (3, size), out=True)
    shifted = Unary("exp", Binary("sub", Load(x, (i, j)), Read("top", f32)))
    body = (
        Let("top", Reduce("max", "k", size, Load(x, (i, k)))),
        vector("j", size, Store(out, (i, j), shifted)),
        Let("scale", Unary("recip", Reduce("add", "k", size, Load(out, (i, k))))),
        vector("j", size, Store(out, (i, j), Binary("mul", Load(out, (i, j)), Read("scale", f32)))),
    )
    kernel = Kernel("softmax", (x, out), (parallel("i", 3, *body),))
    values = np.random.default_rng(0).normal(size=3 * n).astype(np.float32) * 4
    (result,) = check(compile_kernel, each_isa, kernel, [values], [np.zeros(3 * n, np.float32)], {"N": n}, 8, n_parts=2)
    np.testing.assert_allclose(result.reshape(3, n).sum(1), 1, rtol=1e-6)


def test_position_of_the_largest(compile_kernel, each_isa) -> None:
    """ArgMax as two reductions, of f32 and of i64."""
    x, out = buffer("x", f32, (3, N)), buffer("out", i64, (3,), out=True)
    is_top = Binary("eq", Load(x, (i, k)), Read("top", f32))
    where = Reduce("min", "k", N, Select(is_top, Index(k), Const(1 << 40, i64)))
    body = (Let("top", Reduce("max", "k", N, Load(x, (i, k)))), Store(out, (i,), where))
    kernel = Kernel("argmax", (x, out), (parallel("i", 3, *body),))
    for n in (1, 16, 45):
        values = np.random.default_rng(n).integers(0, 9, 3 * n).astype(np.float32)
        (result,) = check(compile_kernel, each_isa, kernel, [values], [np.zeros(3, np.int64)], {"N": n})
        np.testing.assert_array_equal(result, values.reshape(3, n).argmax(1))
