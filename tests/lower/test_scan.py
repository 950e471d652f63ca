"""argmax, argmin, cumsum and topk against NumPy's rules: ties, NaN, tails, every layout of the axis."""

from __future__ import annotations

import numpy as np
import pytest
from tests.lower.harness import HERE, build, check

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.graph.build import Builder
from vivace.graph.graph import Type, Value

f32 = DType.f32
RNG = np.random.default_rng(3)


def sample(shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    """Few distinct values, so that ties are common."""
    return RNG.integers(0 if not dtype.is_signed else -9, 9, shape).astype(dtype.numpy)


@pytest.mark.parametrize("op", ["argmax", "argmin"])
@pytest.mark.parametrize("select_last", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_arg_over_each_axis(op: str, select_last: bool, axis: int) -> None:
    for shape in ((3, 5, 7), (1, 17, 40), (2, 1, 130)):
        for keepdims in (True, False):
            graph = build(
                lambda b, x, k=keepdims: getattr(b, op)(x, axis=axis, keepdims=k, select_last=select_last),
                Type(f32, shape),
            )
            check(graph, sample(shape, f32))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("n", [1, 7, 15, 16, 17, 64, 97, 1000])
def test_arg_of_contiguous_rows(isa: str, n: int) -> None:
    graph = build(lambda b, x: b.argmax(x, axis=1, keepdims=False, select_last=False), Type(f32, (symbol("T", 0), n)))
    x = RNG.standard_normal((5, n)).astype(np.float32)
    x[1, n // 2 :] = np.nan
    x[2, :] = -np.inf
    x[3, :] = 0.0
    check(graph, x, isas=(None, isa))
    check(graph, x[:0], isas=(isa,))


@pytest.mark.parametrize("select_last", [False, True])
def test_arg_takes_nan_for_the_extreme(select_last: bool) -> None:
    x = RNG.standard_normal((6, 9, 20)).astype(np.float32)
    x[RNG.random(x.shape) < 0.1] = np.nan

    def make(b: Builder, v: Value) -> list[Value]:
        return [
            getattr(b, op)(v, axis=a, keepdims=True, select_last=select_last)
            for op in ("argmax", "argmin")
            for a in range(3)
        ]

    check(build(make, Type(f32, x.shape)), x)


@pytest.mark.parametrize("dtype", [DType.i64, DType.i32, DType.u8, DType.bool, DType.f64, DType.f16])
def test_arg_of_other_types(dtype: DType) -> None:
    for axis in (0, 1):
        graph = build(lambda b, x: b.argmax(x, axis=axis, keepdims=False, select_last=False), Type(dtype, (13, 21)))  # noqa: B023
        check(graph, sample((13, 21), dtype))


def test_arg_of_symbolic_length_and_transposed_operand() -> None:
    n, m = symbol("N", 1), symbol("M", 1)
    graph = build(
        lambda b, x: b.argmax(b.transpose(x, perm=(1, 0)), axis=0, keepdims=True, select_last=False), Type(f32, (n, m))
    )
    graph2 = build(lambda b, x: b.argmin(x, axis=0, keepdims=False, select_last=True), Type(f32, (n, m)))
    for shape in ((1, 1), (4, 33), (70, 3)):
        check(graph, sample(shape, f32))
        check(graph2, sample(shape, f32))


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [DType.f32, DType.i64, DType.i32, DType.f16, DType.f64])
def test_cumsum(exclusive: bool, reverse: bool, dtype: DType) -> None:
    for shape in ((3, 5, 70), (4, 1), (2, 0), (0, 3), (9,)):
        for axis in range(len(shape)):
            graph = build(lambda b, x: b.cumsum(x, axis=axis, exclusive=exclusive, reverse=reverse), Type(dtype, shape))  # noqa: B023
            check(graph, sample(shape, dtype), tol=2e-3 if dtype is DType.f16 else None)


def test_cumsum_of_symbolic_rows() -> None:
    n, t = symbol("N", 0), symbol("T", 0)
    graph = build(lambda b, x: b.cumsum(x, axis=1, exclusive=False, reverse=False), Type(DType.i64, (n, t)))
    for shape in ((1, 128), (3, 0), (0, 4), (5, 9)):
        check(graph, RNG.integers(0, 2, shape))
