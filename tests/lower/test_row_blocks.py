"""Products joined with those that read their rows: when it is done, what it saves, and that the bits stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from tests.lower.harness import BEST, HERE, Array, build, run_plan

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.machine import ISAS, CacheLevel, Machine, host
from vivace.building import make_plan
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.loops.blocked import Blocked
from vivace.lower.in_place import write_in_place
from vivace.lower.lowering import lower
from vivace.lower.plan import Plan
from vivace.lower.precision import narrow
from vivace.lower.row_blocks import in_row_blocks

WIDE = 64  # columns between two products: 256 bytes
Make = Callable[[Builder, Value], object]


def with_l2(n_bytes: int) -> Machine:
    return replace(host(), caches=(CacheLevel(2, "unified", n_bytes, 8, 64, 1),))


def weights(b: Builder, k: int, n: int) -> Value:
    return b.const(np.random.default_rng(k).standard_normal((k, n)).astype(np.float32) / k**0.5)


def halves(b: Builder, x: Value) -> Value:
    bias = b.const(np.linspace(-1, 1, WIDE, dtype=np.float32))
    h = b.tanh(b.add(b.matmul(x, weights(b, 24, WIDE)), bias))
    return b.add(b.matmul(h, weights(b, WIDE, 24)), x)


def gated(b: Builder, x: Value) -> Value:
    g = b.tanh(b.matmul(x, weights(b, 24, WIDE)))
    u = b.matmul(x, b.const(np.random.default_rng(9).standard_normal((24, WIDE)).astype(np.float32) / 5))
    return b.matmul(b.mul(u, g), weights(b, WIDE, 24))


def n_joined(plan: Plan) -> int:
    return sum(isinstance(getattr(s, "spec", None), Blocked) for s in plan.body)


def blocks_of(plan: Plan) -> int:
    (spec,) = [s.spec for s in plan.body if isinstance(getattr(s, "spec", None), Blocked)]  # type: ignore[union-attr]
    return spec.blocks  # type: ignore[union-attr,return-value]


def rows_of(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def check_bits(graph: Graph, x: Array, l2: int, isa: str = BEST, n: int = 1) -> tuple[Plan, Plan]:
    apart = lower(graph, ISAS[isa])
    plan = in_row_blocks(apart, machine=with_l2(l2))
    assert n_joined(plan) == n
    want = run_plan(apart, [x], {}, isa)
    for ready in (plan, write_in_place(plan)):
        for parts in (1, 3):
            for got, w in zip(run_plan(ready, [x], {}, isa, parts), want, strict=True):
                assert got.tobytes() == w.tobytes()
    return apart, plan


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("make", [halves, gated])
@pytest.mark.parametrize("shape", [(261, 24), (3, 115, 24), (1, 320, 24)])
def test_the_same_bits(make: Make, shape: tuple[int, ...], isa: str) -> None:
    check_bits(build(make, Type(DType.f32, shape)), rows_of(*shape), 60_000, isa)


@pytest.mark.parametrize("make", [halves, gated])
def test_halves_of_words(make: Make) -> None:
    graph = narrow(build(lambda b, x: b.exp(make(b, b.tanh(x))), Type(DType.f32, (1, 999, 24)))).graph
    check_bits(graph, rows_of(1, 999, 24), 120_000, HERE[-1])


def test_what_passes_through_memory_is_counted() -> None:
    apart, plan = check_bits(build(gated, Type(DType.f32, (340, 24))), rows_of(340, 24), 60_000)
    before, after = (sum(s.bytes for s in p.body) for p in (apart, plan))  # type: ignore[union-attr,misc]
    assert before - after == 2 * 2 * 340 * WIDE * 4  # g and h, written and read
    assert len(apart.body) - len(plan.body) == 2
    held = {s.name for s in apart.storages if s.kind == "arena"} - {s.name for s in plan.storages}
    assert len(held) == 2


def test_only_where_it_pays() -> None:
    """What does not fit the cache, in blocks of rows enough, and as many for each thread."""
    apart = lower(build(halves, Type(DType.f32, (1200, 24))), ISAS[BEST])
    inner = 1200 * WIDE * 4
    assert [n_joined(in_row_blocks(apart, machine=with_l2(n))) for n in (inner - 1, inner)] == [1, 0]
    assert [n_joined(in_row_blocks(apart, machine=with_l2(n))) for n in (60_000, 40_000)] == [1, 0]
    assert blocks_of(in_row_blocks(apart, machine=with_l2(100_000))) == 9
    assert blocks_of(in_row_blocks(apart, 2, with_l2(100_000))) == 10
    assert n_joined(in_row_blocks(apart, 5, with_l2(100_000))) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda b, x: [halves(b, x), b.exp(b.matmul(b.relu(x), weights(b, 24, WIDE)))],  # not joined with a stranger
        lambda b, x: [h := b.tanh(b.matmul(x, weights(b, 24, WIDE))), b.matmul(h, weights(b, WIDE, 24))],
        lambda b, x: b.matmul(b.tanh(b.matmul(x, weights(b, 24, WIDE + 1))), weights(b, WIDE + 1, 24)),
    ],
    ids=["two", "read again", "columns left over"],
)
def test_what_else_stands_there(make: Make, request: pytest.FixtureRequest) -> None:
    graph = build(make, Type(DType.f32, (340, 24)))
    check_bits(graph, rows_of(340, 24), 60_000, n=int("two" in request.node.name))


def test_unknown_rows_stay_as_they_are() -> None:
    graph = build(halves, Type(DType.f32, (symbol("N"), 24)))
    assert n_joined(in_row_blocks(lower(graph, ISAS[BEST]), machine=with_l2(1000))) == 0


def test_it_can_be_left_out() -> None:
    rows = host().cache_bytes(2) // (WIDE * 4) + 1
    graph = build(halves, Type(DType.f32, (rows, 24)))
    plans = [make_plan(graph, ISAS[BEST], ("native",), frozenset(names)) for names in ((), ("row_blocks",))]
    assert [n_joined(p) for p in plans] == [1, 0]
