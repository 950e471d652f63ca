"""resize: every mode and coordinate transformation, static and symbolic, with what follows it in the same kernel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tests.lower.harness import HERE, build, check

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.graph.build import Builder
from vivace.graph.graph import Type, Value
from vivace.graph.ops.resampling import COORDINATES, NEAREST
from vivace.loops.kernel import Load, walk
from vivace.lower.plan import steps_of

f32 = DType.f32
RNG = np.random.default_rng(11)


def resized(b: Builder, x: Value, sizes: tuple[Dim, ...], mode: str, **over: object) -> Value:
    attrs: dict[str, object] = {
        "mode": mode,
        "coordinate": "half_pixel",
        "nearest_mode": "round_prefer_floor",
        "cubic_coeff": -0.75,
        "exclude_outside": False,
        "extrapolation": 0.0,
        "sizes": sizes,
        "scales": (None,) * x.rank,
    }
    result: Value = b.resize(x, **{**attrs, **over})
    return result


def run(
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    mode: str,
    isas: tuple = (None, HERE[-1]),
    dtype: DType = f32,
    **over: object,
) -> object:  # type: ignore[type-arg]
    graph = build(lambda b, x: resized(b, x, sizes, mode, **over), Type(dtype, shape))
    x = RNG.standard_normal(shape) * (40 if dtype.is_int else 1) + (60 if dtype.is_int else 0)
    # A weighted sum next to an integer may fall on either side of it before it is cut.
    tol = 1 if dtype.is_int and mode != "nearest" else 1e-2 if dtype is DType.f16 else 1e-5
    return check(graph, x.astype(dtype.numpy), isas=isas, tol=tol)


@pytest.mark.parametrize("coordinate", COORDINATES)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_weighted_modes(coordinate: str, mode: str, layout: str) -> None:
    for (h, w), (oh, ow) in [((4, 5), (7, 5)), ((5, 3), (2, 11)), ((1, 6), (4, 1))]:
        shape, sizes = ((2, 3, h, w), (2, 3, oh, ow)) if layout == "NCHW" else ((2, h, w, 19), (2, oh, ow, 19))
        run(shape, sizes, mode, coordinate=coordinate)
        run(shape, sizes, mode, coordinate=coordinate, exclude_outside=True, isas=(HERE[-1],))


@pytest.mark.parametrize("coordinate", COORDINATES)
@pytest.mark.parametrize("nearest", NEAREST)
def test_nearest(coordinate: str, nearest: str) -> None:
    for layout, factor in itertools.product(("NCHW", "NHWC"), (None, 2, 3)):
        h, w = 4, 5
        oh, ow = (7, 3) if factor is None else (h * factor, w * factor)
        shape, sizes = ((2, 3, h, w), (2, 3, oh, ow)) if layout == "NCHW" else ((2, h, w, 19), (2, oh, ow, 19))
        run(shape, sizes, "nearest", coordinate=coordinate, nearest_mode=nearest)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("coordinate", COORDINATES)
def test_symbolic_sizes(mode: str, coordinate: str) -> None:
    n, h, w = symbol("N", 1), symbol("H", 1), symbol("W", 1)
    for scales in ((None, None), (1.5, 0.5)):
        sizes = (n, 2 * h + 1, w, 8) if scales[0] is None else (n, (3 * h) // 2, w // 2, 8)
        graph = build(
            lambda b, x, s=scales, z=sizes: resized(b, x, z, mode, coordinate=coordinate, scales=(None, *s, None)),
            Type(f32, (n, h, w, 8)),
        )
        for shape in ((1, 4, 6, 8), (2, 7, 5, 8)):
            check(graph, RNG.standard_normal(shape).astype(np.float32))
        check(graph, RNG.standard_normal((1, 1, 2, 8)).astype(np.float32), isas=(None,))  # results of one pixel
    for exclude_outside in (False, True):
        graph = build(
            lambda b, x, e=exclude_outside: resized(
                b, x, (n, 3, 2 * h, 3 * w), mode, coordinate=coordinate, exclude_outside=e
            ),
            Type(f32, (n, 3, h, w)),
        )
        x = RNG.standard_normal((2, 3, 5, 7)).astype(np.float32)
        check(graph, x, isas=(None,) if exclude_outside else (None, HERE[-1]))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("channels", [1, 7, 16, 33])
def test_doubling_takes_in_the_addition_that_follows(isa: str, channels: int) -> None:
    h, w = symbol("H", 1), symbol("W", 1)

    def make(b: Builder, x: Value, y: Value) -> Value:
        up = resized(
            b,
            x,
            (1, 2 * h, 2 * w, channels),
            "nearest",
            coordinate="asymmetric",
            nearest_mode="floor",
            scales=(None, 2.0, 2.0, None),
        )
        result: Value = b.relu(b.add(up, y))
        return result

    graph = build(make, Type(f32, (1, h, w, channels)), Type(f32, (1, 2 * h, 2 * w, channels)))
    x, y = RNG.standard_normal((1, 3, 5, channels)), RNG.standard_normal((1, 6, 10, channels))
    plan = check(graph, x.astype(np.float32), y.astype(np.float32), isas=(None, isa))
    steps = steps_of(plan.body)
    assert len(steps) == 1
    loads = [e for e in walk(steps[0].spec) if isinstance(e, Load)]  # type: ignore[arg-type]
    assert len({e.buffer for e in loads}) == 2, "positions are loops, not data"


def test_result_in_a_concatenation_and_transposed_operand() -> None:
    def make(b: Builder, x: Value, y: Value) -> Value:
        up = resized(
            b, b.transpose(x, perm=(0, 2, 3, 1)), (2, 6, 8, 3), "nearest", coordinate="asymmetric", nearest_mode="floor"
        )
        fine = resized(b, b.transpose(x, perm=(0, 2, 3, 1)), (2, 6, 8, 3), "linear")
        result: Value = b.concat(up, b.mul(fine, b.const(np.float32(2))), y, axis=3)
        return result

    graph = build(make, Type(f32, (2, 3, 3, 4)), Type(f32, (2, 6, 8, 5)))
    check(
        graph,
        RNG.standard_normal((2, 3, 3, 4)).astype(np.float32),
        RNG.standard_normal((2, 6, 8, 5)).astype(np.float32),
    )


def test_one_and_three_spatial_axes() -> None:
    run((2, 3, 5), (2, 3, 9), "linear")
    run((3, 5), (3, 10), "nearest")
    run((5,), (15,), "nearest")
    run((5,), (8,), "cubic")
    run((1, 2, 3, 4, 5), (1, 2, 5, 3, 10), "linear", coordinate="align_corners")
    run((1, 3, 4, 5, 2), (1, 6, 8, 10, 2), "nearest", coordinate="asymmetric", nearest_mode="floor")


@pytest.mark.parametrize("dtype", [DType.u8, DType.i32, DType.f64, DType.f16])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_other_types(dtype: DType, mode: str) -> None:
    run((1, 4, 5, 6), (1, 7, 9, 6), mode, dtype=dtype, isas=(None, HERE[-1]))


def test_empty_and_identity() -> None:
    run((0, 3, 4, 4), (0, 3, 8, 8), "nearest")
    run((0, 3, 4, 4), (0, 3, 7, 8), "linear")
    run((1, 3, 4, 4), (1, 3, 4, 4), "linear")


@pytest.mark.parametrize("dtype", [DType.f32, DType.f16, DType.u8, DType.i64, DType.bool])
@pytest.mark.parametrize("factors", [(2, 2), (1, 2), (4, 4), (3, 2), (2, 3), (1, 8), (2, 1)])
def test_repeated_rows(dtype: DType, factors: tuple[int, int]) -> None:
    n, w = symbol("N", 0), symbol("W", 1)
    fh, fw = factors
    over = {"coordinate": "asymmetric", "nearest_mode": "floor"}
    graph = build(lambda b, x: resized(b, x, (n, 3, 5 * fh, w * fw), "nearest", **over), Type(dtype, (n, 3, 5, w)))
    for size in ((2, 3, 5, 19), (1, 3, 5, 1), (0, 3, 5, 7)):
        check(graph, (RNG.standard_normal(size) * 9).astype(dtype.numpy))
    if not dtype.is_float:
        return

    def with_tail(b: Builder, x: Value, y: Value) -> Value:
        result: Value = b.concat(y, b.add(resized(b, x, (n, 3, 5 * fh, w * fw), "nearest", **over), y), axis=3)
        return result

    types = Type(dtype, (n, 3, 5, w)), Type(dtype, (n, 3, 5 * fh, w * fw))
    x, y = RNG.standard_normal((2, 3, 5, 9)), RNG.standard_normal((2, 3, 5 * fh, 9 * fw))
    check(build(with_tail, *types), x.astype(dtype.numpy), y.astype(dtype.numpy))


@pytest.mark.parametrize("isa", HERE)
def test_rows_of_images(isa: str) -> None:
    for mode in ("linear", "cubic"):
        for (h, w), (oh, ow) in [((9, 40), (5, 33)), ((4, 100), (9, 7)), ((6, 3), (11, 64))]:
            run((2, 3, h, w), (2, 3, oh, ow), mode, isas=(isa,))
