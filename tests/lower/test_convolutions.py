"""Convolutions with groups, of every element type, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from tests.lower.harness import BEST, HERE, build, check

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.graph.build import Builder
from vivace.graph.graph import Type, Value
from vivace.loops.contraction import Contraction
from vivace.loops.kernel import Kernel
from vivace.lower.plan import steps_of

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


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("filters, kernel", [(1, (2, 2)), (3, (2, 2)), (24, (2, 2)), (5, (1, 3)), (2, (4, 1))])
@pytest.mark.parametrize("tail", ["", "relu", "residual", "by channel"])
def test_transposed_by_whole_kernels(isa: str, layout: str, filters: int, kernel: tuple[int, int], tail: str) -> None:
    """Kernel and stride agree: the columns of the last axis' taps are one product."""
    rng = np.random.default_rng(filters)
    w, bias = rng.standard_normal((6, filters, *kernel), np.float32), rng.standard_normal(filters, np.float32)
    size, large = (5, 7), (5 * kernel[0], 7 * kernel[1])
    x = rng.standard_normal((2, *size, 6) if layout == "NHWC" else (2, 6, *size), np.float32)
    other = rng.standard_normal((2, *large, filters) if layout == "NHWC" else (2, filters, *large), np.float32)
    attrs = {"strides": kernel, "dilations": (1, 1), "before": (0, 0), "after": (0, 0), "output_padding": (0, 0),
             "group": 1, "layout": layout}  # fmt: skip

    def make(b, x, other):  # type: ignore[no-untyped-def]
        y = b.conv_transpose(x, b.const(w), b.const(bias), **attrs)
        if tail == "by channel":
            column = bias[:, None, None] if layout == "NCHW" else bias
            return b.concat(b.mul(b.relu(b.add(y, b.const(column))), b.const(column + 1)), other, axis=0)
        return b.relu(y) if tail == "relu" else b.add(y, other) if tail else b.concat(y, other, axis=3)

    graph = build(make, Type(DType.f32, x.shape), Type(DType.f32, other.shape))
    plan = check(graph, x, other, isas=(isa,), tol=1e-5)
    if tail in ("relu", "by channel") and layout == "NHWC" and filters == 24:  # both columns of a row in one product
        (product,) = (s.spec for s in steps_of(plan.body) if isinstance(s.spec, Contraction))
        assert product.n == 48


def test_constants_by_pixel_follow_transposed_convolutions() -> None:
    """They are not repeated for taps side by side, as constants by channel are."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((6, 8, 2, 2), np.float32), rng.standard_normal((1, 3, 4, 6), np.float32)
    image, none = rng.standard_normal((6, 8, 8), np.float32), (0, 0)
    attrs = {"strides": (2, 2), "dilations": (1, 1), "before": none, "after": none, "output_padding": none, "group": 1,
             "layout": "NHWC"}  # fmt: skip
    graph = build(
        lambda b, v: b.add(b.conv_transpose(v, b.const(w), **attrs), b.const(image)), Type(DType.f32, x.shape)
    )
    check(graph, x, isas=(None,), tol=1e-5)


@pytest.mark.parametrize("name, value", [
    ("dilations", (2, 1)), ("before", (1, 0)), ("after", (0, 1)), ("output_padding", (1, 0)), ("group", 2),
])  # fmt: skip
def test_whole_kernels_that_meet_or_are_cut_are_gathered(name: str, value: object) -> None:
    """Kernel and stride agree, but one tap is not all that a result has, or some results have none."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((6, 3, 2, 2), np.float32), rng.standard_normal((1, 6, 3, 4), np.float32)
    none, ones = (0, 0), (1, 1)
    attrs = {"strides": (2, 2), "dilations": ones, "before": none, "after": none, "output_padding": none, "group": 1}
    attrs |= {"layout": "NCHW", name: value}
    graph = build(lambda b, v: b.conv_transpose(v, b.const(w), **attrs), Type(DType.f32, x.shape))
    plan = check(graph, x, isas=(None,), tol=1e-5)
    assert not any(isinstance(s.spec, Contraction) for s in steps_of(plan.body))


@pytest.mark.parametrize("kernel", [(2, 2), (1, 3), (6,)])
@pytest.mark.parametrize("symbolic", [False, True])
def test_few_results_of_a_transposed_convolution_are_planes(kernel: tuple[int, ...], symbolic: bool) -> None:
    """Vectors run along pixels, so that none is nearly empty; the bias is added there, the rest where planes meet."""
    rng = np.random.default_rng(0)
    size = (9, 21)[-len(kernel) :]
    w, bias = rng.standard_normal((24, 1, *kernel), np.float32), rng.standard_normal(1, np.float32)
    x = rng.standard_normal((2, *size, 24), np.float32)
    n, zeros = len(kernel), (0,) * len(kernel)
    attrs = {"strides": kernel, "dilations": (1,) * n, "before": zeros, "after": zeros, "output_padding": zeros,
             "group": 1, "layout": "NHWC"}  # fmt: skip
    shape = (symbol("N"), *(symbol(f"D{i}", 1) for i in range(n)), 24) if symbolic else x.shape
    graph = build(
        lambda b, v: b.sigmoid(b.conv_transpose(v, b.const(w), b.const(bias), **attrs)), Type(DType.f32, shape)
    )
    plan = check(graph, x, tol=1e-5)
    product, together = (s.spec for s in steps_of(plan.body))
    assert isinstance(product, Contraction) and product.packing.kind == "transposed" and not product.batch
    assert [r.extent for r in product.rows] == [np.prod(kernel)] and isinstance(together, Kernel)


@pytest.mark.parametrize("kind", ["product", "conv", "winograd", "depthwise", "narrow"])
def test_weights_that_are_denormal_count_as_zero(kind: str) -> None:
    """Otherwise a product with one costs what a hundred cost."""
    rng = np.random.default_rng(0)
    same = {"strides": (1, 1), "dilations": (1, 1), "before": (1, 1), "after": (1, 1), "group": 1, "layout": "NHWC"}
    shape = {"product": (40, 24), "depthwise": (40, 1, 3, 3), "narrow": (1, 40, 3, 3), "conv": (24, 40, 2, 2)}
    w = rng.standard_normal(shape.get(kind, (24, 40, 3, 3))).astype(np.float32)
    w.reshape(-1)[::3] = 1e-40
    before = w.copy()
    x = rng.standard_normal((9, 40) if kind == "product" else (1, 13, 12, 40)).astype(np.float32)

    def make(b: Builder, v: Value) -> Value:
        if kind == "product":
            return b.matmul(v, b.const(w))
        return b.conv(v, b.const(w), **{**same, "group": 40 if kind == "depthwise" else 1})

    plan = check(build(make, Type(DType.f32, x.shape)), x, tol=1e-4)
    constants = [o.storage.data for s in steps_of(plan.body) for o in s.operands if o.storage.data is not None]
    assert constants and all(np.abs(a[a != 0]).min() > 1e-20 for a in constants)
    assert (w == before).all()  # the user's own
