"""gather, scatter and topk: every axis, negative indices, ties, epilogues, empty operands, symbolic dims."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tests.lower.harness import BEST, HERE, build, check, run_plan

from vivace.base.dims import substitute, symbol
from vivace.base.dtypes import DType
from vivace.base.errors import GraphError
from vivace.base.machine import ISAS
from vivace.graph.build import Builder
from vivace.graph.graph import Type, Value
from vivace.lower.lowering import lower
from vivace.lower.plan import steps_of

f32, i64, i32 = DType.f32, DType.i64, DType.i32
RNG = np.random.default_rng(7)


def data(shape: tuple[int, ...], dtype: DType = f32) -> np.ndarray:
    return (RNG.standard_normal(shape) * 8).astype(dtype.numpy)


def positions(size: int, shape: tuple[int, ...], dtype: DType = i64) -> np.ndarray:
    return RNG.integers(-size, size, shape).astype(dtype.numpy)


# ---- gather ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("index_shape", [(), (1,), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [i64, i32])
def test_gather(axis: int, index_shape: tuple[int, ...], dtype: DType) -> None:
    for shape in ((4, 5, 6), (3, 1, 33)):
        graph = build(lambda b, x, i: b.gather(x, i, axis=axis), Type(f32, shape), Type(dtype, index_shape))
        check(graph, data(shape), positions(shape[axis], index_shape, dtype))


@pytest.mark.parametrize("isa", HERE)
def test_gather_of_embeddings_with_what_follows(isa: str) -> None:
    n, t = symbol("N", 0), symbol("T", 0)

    def make(b: Builder, table: Value, ids: Value, other: Value) -> Value:
        result: Value = b.add(b.mul(b.gather(table, ids, axis=0), b.const(np.float32(3))), other)
        return result

    graph = build(make, Type(f32, (50, 37)), Type(i64, (n, t)), Type(f32, (n, t, 37)))
    for shape in ((2, 9), (1, 1), (0, 4)):
        plan = check(graph, data((50, 37)), positions(50, shape), data((*shape, 37)), isas=(None, isa))
        assert len(steps_of(plan.body)) == 1


def test_of_a_table_the_rows_that_are_read_count() -> None:
    n = symbol("N", 0)
    graph = build(lambda b, x, i: b.gather(x, i, axis=0), Type(f32, (1000, 16)), Type(i64, (n,)))
    (step,) = steps_of(lower(graph, ISAS[BEST]).body)
    for rows, read in ((0, 0), (3, 3), (5000, 1000)):
        assert substitute(step.bytes, {"N": rows}) == rows * 8 + read * 16 * 4 + rows * 16 * 4
    elements = build(lambda b, x, i: b.gather_elements(x, i, axis=0), Type(f32, (1000, 16)), Type(i64, (2, 16)))
    (step,) = steps_of(lower(elements, ISAS[BEST]).body)
    assert step.bytes == 2 * 16 * (8 + 4 + 4)


@pytest.mark.parametrize("indices", [2, -1, [0], [1, 2, 3], [3, 2, 1], [0, 2, 4], [-3, -2], [[0, 1], [2, 3]], [1, 1]])
def test_gather_at_even_constants_is_a_view(indices: object) -> None:
    n = symbol("N", 1)
    at = np.asarray(indices, np.int64)
    graph = build(lambda b, x: b.neg(b.gather(x, b.const(at), axis=1)), Type(f32, (n, 5, 3)))
    plan = check(graph, data((4, 5, 3)))
    assert len(steps_of(plan.body)) == 1
    check(build(lambda b, x: b.gather(x, b.const(at), axis=1), Type(f32, (n, 5, 3))), data((4, 5, 3)))


def test_gather_from_a_symbolic_axis_and_from_constants() -> None:
    n = symbol("N", 1)
    for index in (-1, 0):
        graph = build(lambda b, x: b.gather(x, b.const(np.int64(index)), axis=0), Type(f32, (n, 3)))  # noqa: B023
        check(graph, data((4, 3)))
    table = data((6, 20))
    check(build(lambda b, i: b.gather(b.const(table), i, axis=1), Type(i64, (3, 4))), positions(20, (3, 4)))
    check(
        build(lambda b, i: b.gather(b.iota(shape=(9, 2), axis=0, dtype=i64), i, axis=0), Type(i64, (4,))),
        positions(9, (4,)),
    )


@pytest.mark.parametrize("isa", [None, BEST])
@pytest.mark.parametrize("length", [0, symbol("N")], ids=["known", "symbolic"])
@pytest.mark.parametrize("name", ["gather", "narrow", "gather_elements", "gather_nd", "scatter_elements", "scatter_nd"])
def test_positions_in_an_empty_axis_touch_nothing(name: str, length: object, isa: str | None) -> None:
    """No end is near to such positions: the result stays as it was, and so does what lies around the operand."""
    width = 3 if name == "narrow" else 40
    operand, index = Type(f32, (length, width)), Type(i64, (2, width if "elements" in name else 1))  # type: ignore[arg-type]

    def make(b: Builder, x: Value, i: Value, *updates: Value) -> object:
        match name:
            case "gather_elements":
                return b.gather_elements(x, i, axis=0)
            case "gather_nd":
                return b.gather_nd(x, i, batch_dims=0)
            case "scatter_elements":
                return b.scatter_elements(x, i, *updates, axis=0, reduction="none")
            case "scatter_nd":
                return b.scatter_nd(x, i, *updates, reduction="none")
        return b.gather(x, i, axis=0)

    more = [np.ones((2, width), np.float32)] if "scatter" in name else []
    graph = build(make, operand, index, *(Type(f32, (2, width)) for _ in more))
    at = np.resize(np.array([0, 7, -1, -7], np.int64), [int(d) for d in index.shape])  # type: ignore[call-overload]
    (result,) = run_plan(lower(graph, ISAS[BEST]), [data((0, width)), at, *more], {"N": 0}, isa)
    assert np.all(result.view(np.uint8) == 0xC5)


def test_gather_of_views_into_a_concatenation() -> None:
    def make(b: Builder, x: Value, i: Value) -> Value:
        turned = b.transpose(x, perm=(1, 0))
        result: Value = b.concat(
            b.gather(turned, i, axis=0), turned, b.gather(turned, b.const(np.int64([1, 3])), axis=0), axis=0
        )
        return result

    check(build(make, Type(f32, (7, 5)), Type(i64, (4,))), data((7, 5)), positions(5, (4,)))


@pytest.mark.parametrize("dtype", [DType.i64, DType.bool, DType.u8, DType.f16, DType.f64])
def test_gather_of_other_types(dtype: DType) -> None:
    for shape in ((5, 40), (5, 3), (30,)):
        graph = build(lambda b, x, i: b.gather(x, i, axis=0), Type(dtype, shape), Type(i64, (6,)))
        check(graph, data(shape, dtype), positions(shape[0], (6,)))


def test_indices_outside_touch_no_memory_outside() -> None:
    graph = build(lambda b, x, i: [b.gather(x, i, axis=0), b.gather(x, i, axis=1)], Type(f32, (4, 6)), Type(i64, (5,)))
    wild = np.array([1 << 40, -(1 << 40), 9, -9, 2])
    x = data((4, 6))
    first, second = run_plan(lower(graph, ISAS[BEST]), (x, wild), {}, BEST)
    assert np.array_equal(first, x[[3, 0, 3, 0, 2]]) and np.array_equal(second, x[:, [5, 0, 5, 0, 2]])


@pytest.mark.parametrize("axis", [0, 1, 2, -2])
def test_gather_elements(axis: int) -> None:
    graph = build(lambda b, x, i: b.gather_elements(x, i, axis=axis), Type(f32, (4, 5, 19)), Type(i64, (4, 5, 19)))
    check(graph, data((4, 5, 19)), positions((4, 5, 19)[axis], (4, 5, 19)))
    small = [3, 4, 17]
    small[axis] = 6
    graph = build(lambda b, x, i: b.gather_elements(x, i, axis=axis), Type(f32, (4, 5, 19)), Type(i32, tuple(small)))
    check(graph, data((4, 5, 19)), positions((4, 5, 19)[axis], tuple(small), i32))


@pytest.mark.parametrize(
    "depth, n_batch, lead",
    [
        (1, 0, (3,)),
        (2, 0, (3, 2)),
        (3, 0, (7,)),
        (1, 1, (4, 3)),
        (2, 1, (4,)),
        (0, 0, (2,)),
        (1, 2, (4, 5, 2)),
        (3, 0, ()),
    ],
)
def test_gather_nd(depth: int, n_batch: int, lead: tuple[int, ...]) -> None:
    shape = (4, 5, 18)
    graph = build(lambda b, x, i: b.gather_nd(x, i, batch_dims=n_batch), Type(f32, shape), Type(i64, (*lead, depth)))
    at = (
        np.stack([positions(n, lead) for n in shape[n_batch : n_batch + depth]], -1)
        if depth
        else np.zeros((*lead, 0), np.int64)
    )
    check(graph, data(shape), at.reshape(*lead, depth))


# ---- scatter ---------------------------------------------------------------------------------------------------------

REDUCTIONS = ("none", "add", "mul", "max", "min")


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scatter_elements_with_repeated_positions(axis: int, reduction: str) -> None:
    for shape, part in (((4, 5, 19), (4, 5, 19)), ((3, 4, 70), (2, 4, 67)), ((2, 3, 4), (0, 3, 4))):
        graph = build(
            lambda b, x, i, u: b.scatter_elements(x, i, u, axis=axis, reduction=reduction),
            Type(f32, shape), Type(i64, part), Type(f32, part),
        )  # fmt: skip
        check(graph, data(shape), positions(shape[axis], part), data(part), tol=1e-5)


@pytest.mark.parametrize("depth, lead", [(1, (6,)), (2, (3, 4)), (3, (5,)), (1, ()), (2, (0,)), (1, (2, 3))])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scatter_nd_with_repeated_positions(depth: int, lead: tuple[int, ...], reduction: str) -> None:
    shape = (3, 4, 70)
    rest = shape[depth:]
    graph = build(
        lambda b, x, i, u: b.scatter_nd(x, i, u, reduction=reduction),
        Type(f32, shape),
        Type(i64, (*lead, depth)),
        Type(f32, (*lead, *rest)),
    )
    at = np.stack([positions(n, lead) for n in shape[:depth]], -1).reshape(*lead, depth)
    check(graph, data(shape), at, data((*lead, *rest)), tol=1e-5)


def test_scatter_into_a_part_of_a_result_and_other_types() -> None:
    def make(b: Builder, x: Value, i: Value, u: Value) -> Value:
        result: Value = b.concat(b.scatter_nd(x, i, u, reduction="none"), x, axis=0)
        return result

    n = symbol("N", 0)
    for dtype in (DType.i64, DType.bool, DType.u8):
        graph = build(make, Type(dtype, (n, 6)), Type(i64, (2, 1)), Type(dtype, (2, 6)))
        check(graph, data((5, 6), dtype), positions(5, (2, 1)), data((2, 6), dtype))
    graph = build(
        lambda b, x, i, u: b.scatter_elements(x, i, u, axis=0, reduction="max"),
        Type(DType.bool, (9,)),
        Type(i64, (5,)),
        Type(DType.bool, (5,)),
    )
    check(graph, data((9,), DType.bool) > 4, positions(9, (5,)), data((5,), DType.bool))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("axis", [0, 1])
def test_lines_beyond_the_data_touch_no_memory_outside(axis: int, isa: str) -> None:
    """Only the run knows how many lines there are."""
    m, n = symbol("M", 0), symbol("N", 0)
    shape, more = ((m, 4), (n, 4)) if axis else ((4, m), (4, n))
    types = Type(f32, shape), Type(i64, more)
    gathers = lower(build(lambda b, x, i: b.gather_elements(x, i, axis=axis), *types), ISAS[isa])
    scatters = lower(
        build(lambda b, x, i, u: b.scatter_elements(x, i, u, axis=axis, reduction="none"), *types, Type(f32, more)),
        ISAS[isa],
    )
    for sizes in ({"M": 2, "N": 70}, {"M": 70, "N": 2}, {"M": 0, "N": 2}):
        x, i = (
            np.ones([sizes.get(str(d), d) for d in shape], np.float32),
            np.zeros([sizes.get(str(d), d) for d in more], np.int64),
        )
        (y,) = run_plan(gathers, [x, i], sizes, isa)
        assert y.shape == i.shape and (not x.size or (y == 1).all())
        (y,) = run_plan(scatters, [x, i, np.full(i.shape, 2, np.float32)], sizes, isa)
        few = min(sizes.values())
        want = x.copy()
        (want[:few, 0] if axis else want[0, :few])[...] = 2
        np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("gather_elements", [(3, 4), (5, 4)]), ("scatter_elements", [(3, 4), (5, 4), (5, 4)]),
        ("scatter_elements", [(3, 4), (3, 2), (3, 1)]), ("scatter_elements", [(3, 4), (3,), (3,)]),
        ("scatter_nd", [(3, 4), (2, 1), (1, 4)]), ("scatter_nd", [(3, 4), (2, 1), (2,)]),
        ("scatter_nd", [(3, 4), (2, 3), (2,)]),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit_are_refused(name: str, shapes: list[tuple[int, ...]]) -> None:
    types = [Type(i64 if i == 1 else f32, shape) for i, shape in enumerate(shapes)]
    attrs = {"axis": 1} if "elements" in name else {}
    attrs |= {"reduction": "none"} if "scatter" in name else {}
    with pytest.raises(GraphError, match=name.partition("_")[0]):
        build(lambda b, *xs: getattr(b, name)(*xs, **attrs), *types)


# ---- topk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_topk_orders_equal_elements_by_index(largest: bool, axis: int) -> None:
    for shape, k in itertools.product([(40, 5, 33), (30, 50, 64)], [1, 3, 30]):
        if k > shape[axis]:
            continue
        graph = build(lambda b, x: list(b.topk(x, axis=axis, k=k, largest=largest, sorted=True)), Type(f32, shape))  # noqa: B023
        x = RNG.integers(-6, 6, shape).astype(np.float32)
        check(graph, x, isas=(HERE[-1],))
        check(graph, np.where(RNG.random(shape) < 0.1, np.float32(-0.0), x), isas=(HERE[-1],))


@pytest.mark.parametrize(
    "dtype", [DType.f32, DType.f64, DType.f16, DType.i64, DType.i32, DType.u8, DType.i8, DType.u64]
)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [0, 2, 40])
def test_topk_of_all_types(dtype: DType, largest: bool, k: int) -> None:
    graph = build(lambda b, x: list(b.topk(x, axis=1, k=k, largest=largest, sorted=True)), Type(dtype, (2, 45)))
    x = data((2, 45), dtype) if dtype.is_signed else RNG.integers(0, 255, (2, 45)).astype(dtype.numpy)
    if dtype.is_float:
        x[0, 3], x[0, 7], x[1, 5], x[1, 6], x[1, 7] = np.inf, -np.inf, np.nan, np.nan, -np.inf
    elif dtype in (DType.i64, DType.u64):
        x[0, 3], x[1, 2] = np.iinfo(dtype.numpy).max, np.iinfo(dtype.numpy).min
    check(graph, x)


@pytest.mark.parametrize("k", [3, 30])
@pytest.mark.parametrize("largest", [True, False])
def test_topk_takes_every_nan_for_the_greatest(largest: bool, k: int) -> None:
    """Whatever its sign and payload, so that NaNs stand in the order of their indices; few results and many."""
    x = np.linspace(-3, 3, 40, dtype=np.float32)
    x[[3, 11, 20]] = np.array([0xFFC00000, 0x7FC00001, 0x7FC00000], np.uint32).view(np.float32)
    graph = build(lambda b, v: b.topk(v, k=k, axis=0, largest=largest), Type(f32, x.shape))
    check(graph, x, isas=(None,))


def test_topk_with_symbolic_dims() -> None:
    n, m, k = symbol("N", 0), symbol("M", 1), symbol("K", 0)
    graph = build(
        lambda b, x, y: list(b.topk(x, axis=1, k=k, largest=True, sorted=True)), Type(f32, (n, m)), Type(f32, (k,))
    )
    for shape, size in (((3, 70), 9), ((0, 5), 2), ((1, 1000), 1000)):
        check(
            graph, RNG.standard_normal(shape).astype(np.float32).round(1), np.zeros(size, np.float32), isas=(HERE[-1],)
        )
