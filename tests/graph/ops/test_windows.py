"""Convolutions and pools against plain loops, in both layouts; sizes by symbols."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from vivace.base.dims import evaluate as value_of
from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.errors import GraphError
from vivace.graph.graph import Type
from vivace.graph.ops import OPS
from vivace.graph.ops.shapes import DimMismatch

RNG = np.random.default_rng(5)
Array = np.ndarray


def f32(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def loops(x: Array, w: Array, strides, dilations, before, after, group) -> Array:  # type: ignore[no-untyped-def]
    """Convolution by its definition, channels first."""
    x = np.pad(x, [(0, 0), (0, 0), *zip(before, after)])
    kernel, per = w.shape[2:], w.shape[0] // group
    sizes = [(d - e * (k - 1) - 1) // s + 1 for d, k, s, e in zip(x.shape[2:], kernel, strides, dilations)]
    out = np.zeros((x.shape[0], w.shape[0], *sizes))
    for at in product(*map(range, sizes)):
        for tap in product(*map(range, kernel)):
            p = tuple(a * s + t * e for a, s, t, e in zip(at, strides, tap, dilations))
            for o in range(w.shape[0]):
                c = slice(o // per * w.shape[1], (o // per + 1) * w.shape[1])
                out[(slice(None), o, *at)] += x[(slice(None), c, *p)] @ w[(o, slice(None), *tap)].astype(np.float64)
    return out


CASES = [
    ((2, 4, 7), (6, 4, 3), (1,), (1,), (1,), (1,), 1),
    ((2, 4, 7), (6, 2, 3), (2,), (2,), (2,), (1,), 2),
    ((1, 3, 6, 5), (4, 3, 3, 2), (2, 1), (1, 2), (1, 0), (0, 2), 1),
    ((2, 4, 5, 5), (4, 1, 3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 4),
    ((1, 4, 5, 5), (8, 1, 3, 3), (2, 2), (1, 1), (0, 1), (1, 0), 4),
    ((1, 2, 4, 4, 4), (3, 2, 2, 2, 2), (1, 2, 1), (1, 1, 1), (0, 0, 1), (1, 0, 0), 1),
]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("x", "w", "strides", "dilations", "before", "after", "group"), CASES)
def test_convolution(x, w, strides, dilations, before, after, group, layout) -> None:  # type: ignore[no-untyped-def]
    data, weight, bias = f32(*x), f32(*w), f32(w[0])
    attrs = {
        "strides": strides,
        "dilations": dilations,
        "before": before,
        "after": after,
        "group": group,
        "layout": layout,
    }
    given = data if layout == "NCHW" else np.moveaxis(data, 1, -1)
    (got,) = OPS["conv"].evaluate([given, weight, bias], attrs)
    (kind,) = OPS["conv"].infer([Type(DType.f32, a.shape) for a in (given, weight, bias)], attrs)
    assert kind == Type(DType.f32, got.shape)
    want = loops(data, weight, strides, dilations, before, after, group) + bias.reshape(-1, *[1] * len(strides))
    np.testing.assert_allclose(got if layout == "NCHW" else np.moveaxis(got, -1, 1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("strides", "padding", "group"), [((1, 1), (0, 0), 1), ((2, 3), (1, 0), 1), ((2, 2), (0, 1), 2)]
)
def test_transposed_convolution_is_the_adjoint(strides, padding, group, layout) -> None:  # type: ignore[no-untyped-def]
    """<conv(u), v> == <u, conv_transpose(v)> for all u and v."""
    common = {"strides": strides, "dilations": (1, 1), "before": padding, "after": padding, "group": group}
    weight, u = f32(4, 6 // group, 3, 3), f32(2, 6, 8, 9)
    (forward,) = OPS["conv"].evaluate([u, weight], common | {"layout": "NCHW"})
    v = f32(*forward.shape)
    extra = tuple((d + 2 * p - 3) % s for d, p, s in zip(u.shape[2:], padding, strides))
    attrs = common | {"output_padding": extra, "layout": layout}
    given = v if layout == "NCHW" else np.moveaxis(v, 1, -1)
    (back,) = OPS["conv_transpose"].evaluate([given, weight], attrs)
    (kind,) = OPS["conv_transpose"].infer([Type(DType.f32, given.shape), Type(DType.f32, weight.shape)], attrs)
    assert kind.shape == back.shape
    back = back if layout == "NCHW" else np.moveaxis(back, -1, 1)
    assert back.shape == u.shape
    np.testing.assert_allclose(
        (forward * v).sum(dtype=np.float64), (u * back).sum(dtype=np.float64), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_pools(layout: str) -> None:
    x = f32(1, 2, 5, 6)
    attrs = {
        "kernel": (2, 3),
        "strides": (2, 1),
        "dilations": (1, 2),
        "before": (1, 0),
        "after": (0, 2),
        "layout": layout,
    }
    given = x if layout == "NCHW" else np.moveaxis(x, 1, -1)
    padded = np.pad(x, [(0, 0), (0, 0), (1, 0), (0, 2)], constant_values=np.nan)
    cells = [padded[:, :, i : i + 5 : 2, j : j + 4] for i in range(2) for j in (0, 2, 4)]
    for name, extra, want in (
        ("max_pool", {}, np.nanmax(cells, axis=0)),
        ("avg_pool", {"count_include_pad": False}, np.nanmean(cells, axis=0)),
        ("avg_pool", {"count_include_pad": True}, np.nansum(cells, axis=0) / 6),
    ):
        (got,) = OPS[name].evaluate([given], attrs | extra)
        (kind,) = OPS[name].infer([Type(DType.f32, given.shape)], attrs | extra)
        assert kind.shape == got.shape
        np.testing.assert_allclose(got if layout == "NCHW" else np.moveaxis(got, -1, 1), want, rtol=1e-6)


def test_a_maximum_propagates_nan_and_ignores_padding() -> None:
    attrs = {"kernel": (2,), "strides": (1,), "dilations": (1,), "before": (1,), "after": (0,), "layout": "NCHW"}
    (got,) = OPS["max_pool"].evaluate([np.float32([[[-5, np.nan, -1, -2]]])], attrs)
    np.testing.assert_array_equal(got, [[[-5, np.nan, np.nan, -1]]])


def test_integers_are_exact() -> None:
    x = np.full((1, 300, 1), 127, np.int32)
    w = np.full((1, 300, 1), -(1 << 20), np.int32)
    attrs = {"strides": (1,), "dilations": (1,), "before": (0,), "after": (0,), "group": 1, "layout": "NCHW"}
    want = np.array(300 * 127 * -(1 << 20)).astype(np.int32)  # wraps as i32 does
    assert OPS["conv"].evaluate([x, w], attrs)[0].item() == want
    assert OPS["matmul"].evaluate([x[0].T, w[0]], {})[0].item() == want


def test_sizes_by_symbols_evaluate_to_the_real_ones() -> None:
    n, h = symbol("n"), symbol("h")
    attrs = {"strides": (2, 2), "dilations": (1, 1), "before": (1, 1), "after": (1, 1), "group": 1, "layout": "NHWC"}
    (kind,) = OPS["conv"].infer([Type(DType.f32, (n, h, 8, 3)), Type(DType.f32, (5, 3, 3, 3))], attrs)
    for size in range(3, 12):
        (got,) = OPS["conv"].evaluate([f32(2, size, 8, 3), f32(5, 3, 3, 3)], attrs)
        assert tuple(value_of(d, {"n": 2, "h": size}) for d in kind.shape) == got.shape


def test_operands_that_do_not_fit() -> None:
    attrs = {"strides": (1,), "dilations": (1,), "before": (0,), "after": (0,), "group": 1, "layout": "NCHW"}

    def infer(x: tuple[int, ...], w: tuple[int, ...], **more: object) -> None:
        OPS["conv"].infer([Type(DType.f32, x), Type(DType.f32, w)], attrs | more)

    with pytest.raises(DimMismatch):
        infer((1, 4, 8), (6, 3, 3))
    with pytest.raises(GraphError, match="larger than the padded input"):
        infer((1, 4, 2), (6, 4, 4))
    with pytest.raises(GraphError, match="groups"):
        infer((1, 4, 8), (5, 2, 3), group=2)
    with pytest.raises(GraphError, match="below 1"):
        infer((1, 4, 8), (6, 4, 3), strides=(0,))
    with pytest.raises(GraphError, match="entries"):
        infer((1, 4, 8), (6, 4, 3), before=(0, 0))
