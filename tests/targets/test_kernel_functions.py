"""Generated loop kernels against the reference interpreter: every function, type and instruction set, with tails."""

from __future__ import annotations

import numpy as np
import pytest
from tests.targets.kernel_checks import (
    FLOATS,
    INTEGERS,
    SOME_INTEGERS,
    assert_close,
    check_elementwise,
    elementwise,
    f32,
    f64,
    flag,
    i,
    i64,
    samples,
)

from vivace.base.dims import mod
from vivace.base.dtypes import DType
from vivace.loops import reference
from vivace.loops.kernel import (
    BINARY,
    OF_F32,
    UNARY,
    Binary,
    Cast,
    Const,
    Expr,
    Fma,
    Index,
    Select,
    Unary,
)

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


def test_multiply_add(compile_kernel, each_isa) -> None:
    """Rounded once where the CPU can, else twice: products of these are exact."""
    e = lambda x: Fma(x, Const(0.5, f32), Const(3.0, f32))  # noqa: E731
    check_elementwise(compile_kernel, each_isa, e, [f32], f32)


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
