"""Generated loop kernels against the reference interpreter: every function, type and instruction set; tails; access
patterns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from vivace.base.dims import Dim, floordiv, maximum, minimum, mod, symbol
from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.loops import reference
from vivace.loops.kernel import (
    BINARY,
    OF_F32,
    UNARY,
    Alloc,
    Binary,
    Buffer,
    Cast,
    Const,
    Expr,
    For,
    Guard,
    Index,
    Inside,
    Kernel,
    Let,
    Load,
    Read,
    Reduce,
    Select,
    Stmt,
    Store,
    Unary,
    dense_strides,
    dtype_of,
)

f32, f64, i64, i32, i8, u8, flag = (DType.f32, DType.f64, DType.i64, DType.i32, DType.i8, DType.u8, DType.bool)
INTEGERS = (DType.i8, DType.u8, DType.i16, DType.u16, DType.i32, DType.u32, DType.i64, DType.u64)
SOME_INTEGERS = (DType.i8, DType.u16, DType.i32, DType.u32, DType.i64)
FLOATS = (DType.f32, DType.f64, DType.f16, DType.bf16)
N, i, j, k = symbol("N"), symbol("i"), symbol("j"), symbol("k")
SIZES = (0, 1, 4, 7, 16, 17, 33, 130)


def buffer(
    name: str, dtype: DType, shape: Sequence[Dim], strides: Sequence[Dim] | None = None, out: bool = False
) -> Buffer:
    return Buffer(
        name, dtype, tuple(shape), tuple(strides) if strides is not None else dense_strides(tuple(shape)), out
    )


def vector(var: str, extent: Dim, *body: Stmt) -> For:
    return For(var, extent, tuple(body), "vector")


def parallel(var: str, extent: Dim, *body: Stmt) -> For:
    return For(var, extent, tuple(body), "parallel")


def samples(dtype: DType, n: int, seed: int = 0) -> np.ndarray:
    """Numbers of every size, with the special ones of the type in between."""
    rng = np.random.default_rng(seed)
    if dtype is flag:
        return rng.random(n) < 0.5
    if dtype.is_int:
        info = np.iinfo(dtype.numpy)
        values = rng.integers(-20, 20, n).clip(info.min, info.max).astype(dtype.numpy)
        special = np.array([info.min, info.max, 0, 1, info.max // 3], dtype.numpy)
    else:
        values = (rng.normal(size=n) * 10.0 ** rng.integers(-3, 3, n)).astype(dtype.numpy)
        special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e-40]).astype(dtype.numpy)
    places = rng.random(n) < 0.2
    values[places] = rng.choice(special, int(places.sum()))
    return values


def assert_close(actual: np.ndarray, expected: np.ndarray, ulps: float, what: object = "") -> None:
    """Equal, both NaN, or within so many units in the last place of the element type."""
    assert actual.dtype == expected.dtype
    if actual.dtype.kind not in "fV" and actual.dtype != DType.bf16.numpy:
        np.testing.assert_array_equal(actual, expected, err_msg=str(what))
        return
    precision = {DType.bf16.numpy: 8, DType.f16.numpy: 11, DType.f32.numpy: 24, DType.f64.numpy: 53}[expected.dtype]
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    least = {
        DType.bf16.numpy: 2.0**-133,
        DType.f16.numpy: 2.0**-24,
        DType.f32.numpy: 2.0**-149,
        DType.f64.numpy: 5e-324,
    }
    with np.errstate(all="ignore"):
        unit = np.maximum(2.0 ** (np.floor(np.log2(np.abs(e))) + 1 - precision), least[expected.dtype])
        good = (a == e) | (np.isnan(a) & np.isnan(e)) | (np.abs(a - e) <= ulps * unit)
    bad = np.flatnonzero(~good)
    assert not len(bad), f"{what}: at {bad[:5]}: {actual[bad[:5]]}, expected {expected[bad[:5]]}"


def check(compile_kernel, isa, kernel, inputs, outputs, dims=None, ulps=0.0, n_parts=1) -> list[np.ndarray]:
    """Run a kernel on both; `outputs` are the initial contents of the written buffers."""
    expected, actual = [o.copy() for o in outputs], [o.copy() for o in outputs]
    reference.run(kernel, [*inputs, *expected], dims)
    compile_kernel(kernel, isa).run([*inputs, *actual], dims, n_parts)
    for a, e in zip(actual, expected):
        assert_close(a, e, ulps, dims)
    return actual


def elementwise(e_of, sources: Sequence[DType], target: DType) -> Kernel:
    """out[i] = e(x0[i], x1[i], ...)"""
    ins = [buffer(f"x{n}", t, (N,)) for n, t in enumerate(sources)]
    out = buffer("out", target, (N,), out=True)
    return Kernel("elementwise", (*ins, out), (vector("i", N, Store(out, (i,), e_of(*(Load(b, (i,)) for b in ins)))),))


def check_elementwise(compile_kernel, isa, e_of, sources, target, ulps=0.0) -> None:
    kernel = elementwise(e_of, sources, target)
    loaded = compile_kernel(kernel, isa)
    for n in SIZES:
        ins = [samples(t, n, seed) for seed, t in enumerate(sources)]
        expected = np.full(n + 3, 1).astype(target.numpy)
        actual = expected.copy()
        reference.run(kernel, [*ins, expected], {"N": n})
        loaded.run([*ins, actual], {"N": n})
        assert_close(actual, expected, ulps, n)


# --- functions ----------------------------------------------------------------------------------------------------

EXACT_UNARY = ("neg", "abs", "sqrt", "floor", "ceil", "round", "recip", "sign")
NOT_ROUNDED = ("not", "isnan", "isinf", "bitnot", *OF_F32)


@pytest.mark.parametrize("fn", EXACT_UNARY)
@pytest.mark.parametrize("dtype", FLOATS)
def test_exact_functions_of_floats(compile_kernel, each_isa, fn: str, dtype: DType) -> None:
    check_elementwise(compile_kernel, each_isa, lambda x: Unary(fn, x), [dtype], dtype)


@pytest.mark.parametrize("fn", ["not", "isnan", "isinf"])
def test_tests_of_floats(compile_kernel, each_isa, fn: str) -> None:
    check_elementwise(compile_kernel, each_isa, lambda x: Unary(fn, x), [f32], flag)


@pytest.mark.parametrize("fn", [f for f in UNARY if f not in (*EXACT_UNARY, *NOT_ROUNDED)])
@pytest.mark.parametrize("dtype", [f32, f64])
def test_rounded_functions(compile_kernel, each_isa, fn: str, dtype: DType) -> None:
    """Loosely; `test_vmath` measures the errors."""
    check_elementwise(compile_kernel, each_isa, lambda x: Unary(fn, x), [dtype], dtype, ulps=5 if dtype is f32 else 50)


@pytest.mark.parametrize("fn", ["neg", "abs", "sign", "bitnot", "not", "floor", "isnan"])
@pytest.mark.parametrize("dtype", SOME_INTEGERS)
def test_functions_of_integers(compile_kernel, each_isa, fn: str, dtype: DType) -> None:
    target = flag if fn in ("not", "isnan") else dtype
    check_elementwise(compile_kernel, each_isa, lambda x: Unary(fn, x), [dtype], target)


FLOAT_BINARY = [f for f in BINARY if f not in ("and", "or", "xor", "bitand", "bitor", "bitxor", "shl", "shr", "pow")]
INTEGER_BINARY = [f for f in BINARY if f not in ("and", "or", "xor", "pow")]
COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")


@pytest.mark.parametrize("fn", FLOAT_BINARY)
@pytest.mark.parametrize("dtype", [f32, f64, DType.f16])
def test_two_floats(compile_kernel, each_isa, fn: str, dtype: DType) -> None:
    target = flag if fn in COMPARE else dtype
    check_elementwise(compile_kernel, each_isa, lambda a, b: Binary(fn, a, b), [dtype, dtype], target)


@pytest.mark.parametrize("fn", INTEGER_BINARY)
@pytest.mark.parametrize("dtype", SOME_INTEGERS)
def test_two_integers(compile_kernel, each_isa, fn: str, dtype: DType) -> None:
    target = flag if fn in COMPARE else dtype
    check_elementwise(compile_kernel, each_isa, lambda a, b: Binary(fn, a, b), [dtype, dtype], target)


@pytest.mark.parametrize("fn", ["and", "or", "xor", "eq", "ne", "max", "min"])
def test_two_bools(compile_kernel, each_isa, fn: str) -> None:
    check_elementwise(compile_kernel, each_isa, lambda a, b: Binary(fn, a, b), [flag, flag], flag)


@pytest.mark.parametrize("fn", ["div", "mod", "fmod", "shl", "shr", "max", "add"])
@pytest.mark.parametrize("dtype", [DType.i32, DType.u8, DType.i64])
@pytest.mark.parametrize("constant", [0, 1, 3, 8])
def test_integer_and_constant(compile_kernel, each_isa, fn: str, dtype: DType, constant: int) -> None:
    c = Const(constant, dtype)
    check_elementwise(compile_kernel, each_isa, lambda a: Binary(fn, a, c), [dtype], dtype)


@pytest.mark.parametrize("fn", ["max", "min"])
@pytest.mark.parametrize("constant", [0.0, 6.0, float("nan"), float("-inf")])
def test_nan_survives_limits(compile_kernel, each_isa, fn: str, constant: float) -> None:
    check_elementwise(compile_kernel, each_isa, lambda a: Binary(fn, a, Const(constant, f32)), [f32], f32)
    check_elementwise(compile_kernel, each_isa, lambda a: Binary(fn, Const(constant, f32), a), [f32], f32)


@pytest.mark.parametrize("dtype", [f32, f64])
def test_power(compile_kernel, each_isa, dtype: DType) -> None:
    ulps = 1 if dtype is f32 else 1500
    check_elementwise(compile_kernel, each_isa, lambda a, b: Binary("pow", a, b), [dtype, dtype], dtype, ulps)


@pytest.mark.parametrize("source", [*INTEGERS, *FLOATS, flag])
@pytest.mark.parametrize("target", [*INTEGERS, *FLOATS, flag])
def test_casts(compile_kernel, each_isa, source: DType, target: DType) -> None:
    kernel = elementwise(lambda x: Cast(target, x), [source], target)
    loaded = compile_kernel(kernel, each_isa)
    for n in (5, 33):
        x = samples(source, n)
        if source.is_float and target.is_int:  # out of range is undefined
            info = np.iinfo(target.numpy)
            limit = min(float(info.max) / 2, 1e9 if source.size_bytes > 2 else 6e4)
            with np.errstate(all="ignore"):
                x = np.nan_to_num(x.astype(np.float64)).clip(max(float(info.min), -limit), limit).astype(source.numpy)
        expected, actual = np.zeros(n, target.numpy), np.zeros(n, target.numpy)
        reference.run(kernel, [x, expected], {"N": n})
        loaded.run([x, actual], {"N": n})
        assert_close(actual, expected, 0, (source, target))


def test_select_and_index(compile_kernel, each_isa) -> None:
    def expression(x: Expr) -> Expr:
        even = Binary("eq", Index(mod(i, 2)), Const(0, i64))
        return Select(even, Cast(f32, Index(3 * i + 1)), Binary("add", x, Index(i, f32)))

    check_elementwise(compile_kernel, each_isa, expression, [f32], f32)


# --- reductions ---------------------------------------------------------------------------------------------------


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


# --- access -------------------------------------------------------------------------------------------------------

INDICES = {
    "contiguous": i,
    "shifted": i + 2,
    "reversed": N - 1 - i,
    "every second": 2 * i,
    "every third backwards": 3 * (N - i),
    "constant": 5 + 0 * i,
    "halved": floordiv(i, 2),
    "divided by three": floordiv(i + 4, 3),
    "modulo five": mod(i, 5),
    "modulo of a run-time dim": mod(i, N + 2),
    "divided by a run-time dim": floordiv(3 * i, N + 1),
    "clamped": minimum(maximum(i - 3, 0), N - 2),
    "triangle": i * i,
}


@pytest.mark.parametrize("pattern", INDICES)
@pytest.mark.parametrize("dtype", [f32, u8, i64, DType.f16])
def test_load_patterns(compile_kernel, each_isa, pattern: str, dtype: DType) -> None:
    x, out = buffer("x", dtype, (N * N + 9,)), buffer("out", dtype, (N,), out=True)
    kernel = Kernel("pattern", (x, out), (vector("i", N, Store(out, (i,), Load(x, (INDICES[pattern],)))),))
    loaded = compile_kernel(kernel, each_isa)
    for n in (2, 5, 16, 37):
        values = np.arange(n * n + 9).astype(dtype.numpy)
        expected, actual = np.zeros(n, dtype.numpy), np.zeros(n, dtype.numpy)
        reference.run(kernel, [values, expected], {"N": n})
        loaded.run([values, actual], {"N": n})
        assert_close(actual, expected, 0, (pattern, n))


@pytest.mark.parametrize(
    "pattern", ["contiguous", "shifted", "reversed", "every second", "every third backwards", "triangle"]
)
@pytest.mark.parametrize("dtype", [f32, u8, i64, DType.f16])
def test_store_patterns(compile_kernel, each_isa, pattern: str, dtype: DType) -> None:
    x, out = buffer("x", dtype, (N,)), buffer("out", dtype, (N * N + 9,), out=True)
    kernel = Kernel("pattern", (x, out), (vector("i", N, Store(out, (INDICES[pattern],), Load(x, (i,)))),))
    loaded = compile_kernel(kernel, each_isa)
    for n in (2, 5, 16, 37):
        values = np.arange(1, n + 1).astype(dtype.numpy)
        expected, actual = np.zeros(n * n + 9, dtype.numpy), np.zeros(n * n + 9, dtype.numpy)
        reference.run(kernel, [values, expected], {"N": n})
        loaded.run([values, actual], {"N": n})
        assert_close(actual, expected, 0, (pattern, n))


CONDITIONS = {
    "shift by a lane": (i - 1, Inside(i - 1, 0, N)),
    "shift to the right": (i + 3, Inside(i + 3, 0, N)),
    "window": (i, Inside(i, 3, N - 4)),
    "strided": (2 * i - 3, Inside(2 * i - 3, 0, N)),
    "reversed": (N - i, Inside(N - i, 0, N)),
    "equal in all lanes, one element": (N - 3, Inside(N - 3, 0, N)),
    "equal in all lanes": (i, Inside(N, 16, 40)),
    "always": (i, Inside(i, 0, 1 << 40)),
    "never": (i, Inside(i, 5, 2)),
    "nonlinear": (floordiv(i, 2) - 2, Inside(floordiv(i, 2) - 2, 0, N)),
    "one element, some lanes": (0 * i, Inside(i, 2, 9)),
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(
    ("dtype", "fill"), [(f32, 0), (f32, float("-inf")), (u8, 7), (DType.f16, 1.5), (i64, -1), (flag, 1)]
)
def test_loads_inside_only(compile_kernel, each_isa, condition: str, dtype: DType, fill: float) -> None:
    index, inside = CONDITIONS[condition]
    x, out = buffer("x", dtype, (N,)), buffer("out", dtype, (N,), out=True)
    kernel = Kernel("inside", (x, out), (vector("i", N, Store(out, (i,), Load(x, (index,), (inside,), fill))),))
    loaded = compile_kernel(kernel, each_isa)
    for n in (0, 2, 16, 37):
        values = (np.arange(n) % 100 + 1).astype(dtype.numpy)
        expected, actual = np.zeros(n, dtype.numpy), np.zeros(n, dtype.numpy)
        reference.run(kernel, [values, expected], {"N": n})
        loaded.run([values, actual], {"N": n})
        assert_close(actual, expected, 0, (condition, n))


def test_broadcast_rows_and_columns(compile_kernel, each_isa) -> None:
    a, b, c = buffer("a", f32, (7, N), (1, 0)), buffer("b", f32, (7, N), (0, 1)), buffer("c", f32, (7, N), (0, 0))
    out = buffer("out", f32, (7, N), out=True)
    total = Binary("add", Binary("mul", Load(a, (i, j)), Load(b, (i, j))), Load(c, (i, j)))
    kernel = Kernel("broadcast", (a, b, c, out), (parallel("i", 7, vector("j", N, Store(out, (i, j), total))),))
    for n in (0, 1, 16, 45):
        ins = [samples(f32, size) for size in (7, n, 1)]
        check(compile_kernel, each_isa, kernel, ins, [np.zeros(7 * n, np.float32)], {"N": n}, n_parts=3)


@pytest.mark.parametrize("dtype", [f32, u8, i64])
def test_transpose(compile_kernel, each_isa, dtype: DType) -> None:
    x, out = buffer("x", dtype, (N, 19)), buffer("out", dtype, (19, N), out=True)
    kernel = Kernel("transpose", (x, out), (parallel("i", 19, vector("j", N, Store(out, (i, j), Load(x, (j, i))))),))
    for n in (1, 16, 37):
        values = np.arange(19 * n).astype(dtype.numpy)
        check(compile_kernel, each_isa, kernel, [values], [np.zeros(19 * n, dtype.numpy)], {"N": n})


@pytest.mark.parametrize("index_type", [i64, DType.i32])
def test_gather(compile_kernel, each_isa, index_type: DType) -> None:
    """Rows chosen by an index (equal in all lanes), and elements chosen by an index in each lane."""
    table, ids = buffer("table", f32, (50, N)), buffer("ids", index_type, (6,))
    out = buffer("out", f32, (6, N), out=True)
    row = symbol("row", None)
    chosen = Select(Binary("lt", Load(ids, (i,)), Const(0, index_type)), Const(50, index_type), Const(0, index_type))
    body = (
        Let("row", Binary("add", Load(ids, (i,)), chosen)),
        vector("j", N, Store(out, (i, j), Load(table, (row, j)))),
    )
    kernel = Kernel("rows", (table, ids, out), (parallel("i", 6, *body),))
    rows = np.array([3, -1, 0, 49, -50, 7]).astype(index_type.numpy)
    for n in (1, 16, 35):
        values = np.arange(50 * n).astype(np.float32)
        check(compile_kernel, each_isa, kernel, [values, rows], [np.zeros(6 * n, np.float32)], {"N": n}, n_parts=2)

    line, ids, out = buffer("line", f32, (50,)), buffer("ids", index_type, (N,)), buffer("out", f32, (N,), out=True)
    body = (Let("row", Load(ids, (i,))), Store(out, (i,), Load(line, (row,))))
    kernel = Kernel("elements", (line, ids, out), (vector("i", N, *body),))
    for n in (0, 1, 16, 35):
        ids_of = np.random.default_rng(n).integers(0, 50, n).astype(index_type.numpy)
        ins = [np.arange(50).astype(np.float32), ids_of]
        check(compile_kernel, each_isa, kernel, ins, [np.zeros(n, np.float32)], {"N": n})


def test_scatter_by_index(compile_kernel, each_isa) -> None:
    x, ids, out = buffer("x", f32, (N,)), buffer("ids", i64, (N,)), buffer("out", f32, (N + 5,), out=True)
    body = (Let("place", Load(ids, (i,))), Store(out, (symbol("place"),), Load(x, (i,))))
    kernel = Kernel("scatter", (x, ids, out), (vector("i", N, *body),))
    for n in (1, 16, 35):
        ins = [samples(f32, n), np.random.default_rng(n).permutation(n + 5)[:n].astype(np.int64)]
        check(compile_kernel, each_isa, kernel, ins, [np.zeros(n + 5, np.float32)], {"N": n})


# --- statements ---------------------------------------------------------------------------------------------------


def test_guards(compile_kernel, each_isa) -> None:
    """Conditions that are equal in all lanes, that vary, and both; a nested loop and a single element inside."""
    x, out = buffer("x", f32, (N,)), buffer("out", f32, (5, N), out=True)
    positive = Binary("gt", Load(x, (j,)), Const(0.0, f32))
    odd = Binary("eq", Index(mod(i, 2)), Const(1, i64))
    first = Load(x, (N - 1,))
    writes = For("k", 2, (Store(out, (i, j), Binary("add", Load(x, (j,)), Binary("add", first, Index(k, f32)))),))
    body = Guard(odd, (vector("j", N, Guard(positive, (writes,))),))
    kernel = Kernel("guards", (x, out), (parallel("i", 5, body),))
    for n in (0, 1, 16, 35):
        check(compile_kernel, each_isa, kernel, [samples(f32, n)], [np.full(5 * n, 9, np.float32)], {"N": n}, n_parts=2)


def test_local_buffers(compile_kernel, each_isa) -> None:
    x, out = buffer("x", f32, (4, 20)), buffer("out", f32, (4, 20), out=True)
    one, two = buffer("one", f32, (20,)), buffer("two", DType.f64, (3, 20))
    doubled = Binary("mul", Load(one, (19 - j,)), Const(2.0, f32))
    body = (
        Alloc(one),
        vector("j", 20, Store(one, (j,), Load(x, (i, j)))),
        Alloc(two),
        For("k", 3, (vector("j", 20, Store(two, (k, j), Cast(f64, doubled))),)),
        vector("j", 20, Store(out, (i, j), Cast(f32, Reduce("add", "k", 3, Load(two, (k, j)))))),
    )
    kernel = Kernel("local", (x, out), (parallel("i", 4, *body),))
    values = np.arange(80).astype(np.float32)
    check(compile_kernel, each_isa, kernel, [values], [np.zeros(80, np.float32)], n_parts=3)


def test_running_sum(compile_kernel, each_isa) -> None:
    """A serial loop that reads what it wrote before, and an unrolled one."""
    x, out = buffer("x", f32, (N, 7)), buffer("out", f32, (N, 7), out=True)
    before = Load(out, (i - 1, j), (Inside(i - 1, 0, N),))
    step = Store(out, (i, j), Binary("add", before, Load(x, (i, j))))
    for kind in ("serial", "unroll"):
        kernel = Kernel("running", (x, out), (For("i", N, (For("j", 7, (step,), kind),)),))
        check(compile_kernel, each_isa, kernel, [np.ones(70, np.float32)], [np.zeros(70, np.float32)], {"N": 10})
    kernel = Kernel("running", (x, out), (For("i", N, (vector("j", 7, step),)),))
    check(compile_kernel, each_isa, kernel, [np.ones(70, np.float32)], [np.zeros(70, np.float32)], {"N": 10})


def test_in_place(compile_kernel, each_isa) -> None:
    """Input and output are one memory: `alias` keeps loads where they stand."""
    x, out = buffer("x", f32, (N,)), buffer("out", f32, (N,), out=True)
    body = For("k", 3, (vector("i", N, Store(out, (i,), Binary("add", Load(x, (i,)), Load(x, (i,))))),))
    kernel = Kernel("doubled", (x, out), (body,), {"alias": (("x", "out"),)})
    loaded = compile_kernel(kernel, each_isa)
    import ctypes

    from vivace.targets.cpu import jit

    library = jit.load(jit.compile_objects([loaded.code], each_isa))
    for n in (1, 40):
        values = np.ones(n, np.float32)
        words = np.array([values.ctypes.data] * 2 + [n], np.int64)
        entry = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(library.address("doubled"))
        entry(words.ctypes.data, 0, 1, 0)
        np.testing.assert_array_equal(values, 8)


def test_a_lone_vector_loop_is_split_into_units(compile_kernel, each_isa) -> None:
    kernel = elementwise(lambda x: Unary("neg", x), [f32], f32)
    loaded = compile_kernel(kernel, each_isa)
    values = np.arange(20001).astype(np.float32)
    out = np.zeros_like(values)
    loaded.run([values, out], {"N": len(values)}, n_parts=3)
    np.testing.assert_array_equal(out, -values)


def test_parallel_loops_form_one_space(compile_kernel, each_isa) -> None:
    x, out = buffer("x", f32, (3, N, 5)), buffer("out", f32, (3, N, 5), out=True)
    store = Store(out, (i, j, k), Binary("add", Load(x, (i, j, k)), Index(i * 100 + j * 10 + k, f32)))
    kernel = Kernel("space", (x, out), (parallel("i", 3, parallel("j", N, parallel("k", 5, store))),))
    for n in (0, 1, 4):
        values = np.zeros(15 * n, np.float32)
        check(compile_kernel, each_isa, kernel, [values], [values.copy()], {"N": n}, n_parts=4)


def test_types_without_code_are_refused(compile_kernel, each_isa) -> None:
    x, out = buffer("x", DType.i4, (N,)), buffer("out", DType.i4, (N,), out=True)
    kernel = Kernel("eighth", (x, out), (vector("i", N, Store(out, (i,), Load(x, (i,)))),))
    with pytest.raises(UnsupportedError, match="i4"):
        compile_kernel(kernel, each_isa)


def test_dtype_of_what_is_stored() -> None:
    assert dtype_of(Binary("lt", Const(1.0, f32), Const(2.0, f32))) is flag
