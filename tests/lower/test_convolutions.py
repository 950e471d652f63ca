"""Convolutions with groups, of every element type, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from tests.lower.harness import BEST, HERE, build, check

from vivace.base.dtypes import DType
from vivace.graph.graph import Type

# Filters per group, channels per group, groups, kernel, size.
GROUPED = (
    (7, 3, 2, (1, 2), (5, 6)),
    (16, 16, 2, (1, 1), (5, 6)),
    (8, 4, 2, (3, 3), (5, 6)),
    (32, 8, 4, (3, 3), (6, 6)),
    (1, 8, 2, (1, 1), (3, 3)),
    (20, 5, 3, (3, 1), (8, 8)),
)


def _conv(
    dtype: DType, case: tuple[int, int, int, tuple[int, int], tuple[int, int]], layout: str, constant: bool = True
):  # type: ignore[no-untyped-def]
    n, c, groups, kernel, size = case
    rng = np.random.default_rng(0)
    w = rng.integers(-3, 4, (n * groups, c, *kernel)).astype(dtype.numpy)
    shape = (2, *size, c * groups) if layout == "NHWC" else (2, c * groups, *size)
    x = rng.integers(-3, 4, shape).astype(dtype.numpy)
    attrs = {
        "strides": (1, 1),
        "dilations": (1, 1),
        "before": (1, 0),
        "after": (1, 0),
        "group": groups,
        "layout": layout,
    }
    types = (Type(dtype, shape), *(() if constant else (Type(dtype, w.shape),)))
    graph = build(lambda b, x, *v: b.conv(x, v[0] if v else b.const(w), **attrs), *types)
    return graph, (x,) if constant else (x, w)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_grouped(case: tuple, isa: str) -> None:  # type: ignore[type-arg]
    graph, inputs = _conv(DType.f32, case, "NHWC")
    check(graph, *inputs, isas=(isa,), tol=1e-5)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [DType.f16, DType.bf16, DType.f64, DType.i32], ids=str)
def test_other_element_types(dtype: DType, layout: str, constant: bool) -> None:
    """Small integers, so that every sum is exact in every type."""
    for case in GROUPED[1:3]:
        graph, inputs = _conv(dtype, case, layout, constant)
        check(graph, *inputs, isas=(None, BEST), tol=0.0 if dtype is DType.i32 else 1e-2)
