"""`if`, `loop` and `onnx`: branches write the same results, loops keep their state apart, both inside each other."""

from __future__ import annotations

import gc

import numpy as np
import onnx.parser
import pytest
from tests.lower.harness import HERE, build, check, check_engine

import vivace
from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.machine import isa
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.lower.lowering import lower
from vivace.lower.packed import Packed
from vivace.lower.plan import Branch, Loop, steps_of
from vivace.lower.prepare import prepare

f32, i64, boolean = DType.f32, DType.i64, DType.bool
SCALAR = Type(boolean, ())


def body(make, *types: Type) -> Graph:  # type: ignore[no-untyped-def]
    return build(make, *types)


@pytest.mark.parametrize("taken", [True, False])
def test_if_writes_one_result_from_either_branch(taken: bool) -> None:
    t = Type(f32, (3, 5))
    then = body(lambda b, x, y: [b.add(x, y), x], t, t)
    other = body(lambda b, x, y: [b.relu(b.sub(x, y)), b.const(np.ones((3, 5), np.float32))], t, t)
    graph = build(
        lambda b, c, x, y: [b.neg(v) for v in b.if_(c, x, b.exp(y), then=then, **{"else": other})], SCALAR, t, t
    )
    rng = np.random.default_rng(0)
    plan = check(graph, np.asarray(taken), *rng.standard_normal((2, 3, 5)).astype(np.float32))
    assert any(isinstance(i, Branch) for i in plan.body)


def test_if_with_symbolic_dims_and_views_as_captures() -> None:
    n = symbol("N", 1)
    t, turned = Type(f32, (n, 4)), Type(f32, (4, n))
    then = body(lambda b, x: b.reshape(x, shape=(4 * n,)), turned)
    other = body(lambda b, x: b.reshape(b.mul(x, x), shape=(4 * n,)), turned)
    graph = build(lambda b, c, x: b.if_(c, b.transpose(x, perm=(1, 0)), then=then, **{"else": other}), SCALAR, t)
    for taken in (True, False):
        check(graph, np.asarray(taken), np.arange(28, dtype=np.float32).reshape(7, 4))


def test_if_that_returns_its_capture_and_one_value_twice() -> None:
    t = Type(f32, (6,))
    then = body(lambda b, x: [x, x], t)
    other = body(lambda b, x: [s := b.sin(x), s], t)
    graph = build(lambda b, c, x: list(b.if_(c, x, then=then, **{"else": other})), SCALAR, t)
    for taken in (True, False):
        check(graph, np.asarray(taken), np.linspace(0, 1, 6).astype(np.float32))


def _fibonacci(b: Builder, i, go, x, y):  # type: ignore[no-untyped-def]
    return [b.const(True), y, b.add(x, y), b.mul(x, b.cast(i, to=f32))]


@pytest.mark.parametrize("turns", [0, 1, 5, 40])
def test_loop_with_constant_trip_count(turns: int) -> None:
    t = Type(f32, (3,))
    inner = body(_fibonacci, Type(i64, ()), SCALAR, t, t)
    graph = build(
        lambda b, x, y: list(
            b.loop(b.const(np.int64(turns)), None, x, y, body=inner, n_state=2, n_scan=1, length=turns)
        ),
        t,
        t,
    )
    plan = check(graph, np.ones(3, np.float32), np.ones(3, np.float32))
    assert any(isinstance(i, Loop) for i in plan.body) == (turns == 40)


@pytest.mark.parametrize("trip", [0, 3, 100])
def test_loop_until_the_body_says_stop(trip: int) -> None:
    t = Type(f32, (2, 2))
    inner = body(
        lambda b, i, go, x, step: [
            b.lt(b.reduce_max(x, axes=(0, 1), keepdims=False), b.const(np.float32(50))),
            b.add(x, step),
        ],
        Type(i64, ()),
        SCALAR,
        t,
        t,
    )
    graph = build(
        lambda b, n, c, x, s: b.loop(n, c, x, b.exp(s), body=inner, n_state=1, n_scan=0, length=0),
        Type(i64, ()),
        SCALAR,
        t,
        t,
    )
    for go in (True, False):
        plan = check(graph, np.asarray(trip), np.asarray(go), np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32))
    assert len([i for i in plan.body if isinstance(i, Loop)]) == 1 and steps_of(plan.body)


def test_loop_over_a_branch_with_states_that_change_places() -> None:
    t = Type(f32, (4,))
    then = body(lambda b, x, y: [y, x], t, t)
    other = body(lambda b, x, y: [b.add(x, y), y], t, t)

    def turn(b: Builder, i, go, x, y):  # type: ignore[no-untyped-def]
        odd = b.eq(b.mod(i, b.const(np.int64(2)), fmod=False), b.const(np.int64(1)))
        return [go, *b.if_(odd, x, y, then=then, **{"else": other})]

    inner = body(turn, Type(i64, ()), SCALAR, t, t)
    graph = build(
        lambda b, n, x, y: list(b.loop(n, None, x, y, body=inner, n_state=2, n_scan=0, length=0)), Type(i64, ()), t, t
    )
    check(graph, np.asarray(9), np.arange(4, dtype=np.float32), np.ones(4, np.float32))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_loops_and_branches_in_an_engine(threads: int) -> None:
    """Memory is shared over time: what a loop carries must not lie where its temporaries do."""
    t = Type(f32, (40, 300))
    then = body(lambda b, x, y: [b.sin(b.add(x, y)), b.softmax(x, axis=1)], t, t)
    other = body(
        lambda b, x, y: [
            b.mul(b.exp(b.neg(b.mul(x, x))), y),
            b.transpose(b.relu(b.transpose(x, perm=(1, 0))), perm=(1, 0)),
        ],
        t,
        t,
    )

    def turn(b: Builder, i, go, x, y, fixed):  # type: ignore[no-untyped-def]
        odd = b.eq(b.mod(i, b.const(np.int64(2)), fmod=False), b.const(np.int64(1)))
        p, q = b.if_(odd, x, y, then=then, **{"else": other})
        done = b.lt(i, b.const(np.int64(8)))
        return [
            done,
            b.mul(b.add(p, b.reduce_mean(q, axes=(1,), keepdims=True)), fixed),
            q,
            b.reduce_sum(p, axes=(1,), keepdims=False),
        ]

    inner = body(turn, Type(i64, ()), SCALAR, t, t, t)

    def make(b: Builder, n, x, y, z):  # type: ignore[no-untyped-def]
        return list(b.loop(n, None, b.cos(x), y, b.sigmoid(z), body=inner, n_state=2, n_scan=1, length=9))

    graph = build(make, Type(i64, ()), t, t, t)
    rng = np.random.default_rng(1)
    arrays = rng.standard_normal((3, 40, 300)).astype(np.float32)
    check(graph, np.asarray(100), *arrays, isas=(HERE[-1],), tol=1e-4)
    check_engine(graph, np.asarray(100), *arrays, threads=threads, tol=1e-4)


def test_constants_kept_between_lowerings_are_those_of_a_fresh_one() -> None:
    """What branches convert anew each time has ids that earlier conversions had: packed weights are not mixed up."""
    half, t = DType.f16, Type(DType.f16, (1, 6, 6, 8))
    rng = np.random.default_rng(0)

    def convolutions(b: Builder, x: Value) -> list[Value]:
        for _ in range(4):
            w = b.const(rng.standard_normal((8, 8, 3, 3)).astype(half.numpy))
            ones = (1, 1)
            x = b.conv(x, w, strides=ones, dilations=ones, before=ones, after=ones, group=1, layout="NHWC")
        return [x]

    then, other = body(convolutions, t), body(convolutions, t)
    graph = prepare(build(lambda b, c, x: b.if_(c, x, then=then, **{"else": other}), SCALAR, t))

    def constants(packed: Packed | None) -> list[np.ndarray]:
        plan = lower(graph, isa("avx2"), packed=packed)
        return [s.data.copy() for s in plan.storages if s.data is not None]

    shared = Packed()
    expected = constants(None)
    for _ in range(6):
        for a, b in zip(constants(shared), expected, strict=True):
            np.testing.assert_array_equal(a, b)
        gc.collect()  # plans and their graphs refer to each other


def test_a_loop_of_unknown_length_compiles_and_runs() -> None:
    """No result has its length as a size, so no array tells it."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 18]>
        m (float[N] x, int64 n) => (float[N] y) <bool t = {1}, float most = {20.0}>
        { y = Loop(n, t, x) <body = b (int64 i, bool go, float[N] s) => (bool on, float[N] z) {
            z = Add(s, s)  top = ReduceMax<keepdims = 0>(z)  on = Less(top, most) }> }""")
    engine = vivace.compile(model, providers=("native",), threads=2)
    for n, want in ((0, 1), (2, 4), (99, 32)):
        assert engine.run({"x": np.ones(3, np.float32), "n": np.asarray(n)})["y"].tolist() == [want] * 3
