"""Depthwise convolutions and their neighbours in strips: when it is done, what it saves, and that the bits stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from tests.lower.harness import BEST, HERE, Array, build, run_plan

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.machine import ISAS, CacheLevel, Machine, host
from vivace.compiler import choose_isa, make_plan
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.loops.blocked import Blocked
from vivace.loops.contraction import Depthwise
from vivace.lower.in_place import write_in_place
from vivace.lower.lowering import lower
from vivace.lower.plan import Plan
from vivace.lower.precision import narrow
from vivace.lower.strips import in_strips

Make = Callable[[Builder, Value], object]


def with_l2(n_bytes: int) -> Machine:
    return replace(host(), caches=(CacheLevel(2, "unified", n_bytes, 8, 64, 1),))


SIZES = [1 << k for k in range(20, 11, -1)]


@pytest.fixture(autouse=True)
def no_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images here are low enough for bands, and would stay in the cache of a real machine."""
    monkeypatch.setattr("vivace.lower.bands.MOST_MET", 0)


def block(
    c: int, wide: int, k: int = 3, stride: int = 1, dilation: int = 1, residual: bool = False, ends: str = "ej",
    pads: tuple[tuple[int, int], tuple[int, int]] | None = None,
) -> Make:  # fmt: skip
    """A pixel-wise convolution, a depthwise one and another pixel-wise one (as `ends` says), and what they are added
    to."""
    rng = np.random.default_rng(k)
    inner = wide if "e" in ends else c
    into, out = ((rng.standard_normal(s) / 4).astype(np.float32) for s in ((wide, c, 1, 1), (c, inner, 1, 1)))
    deep, bias = (rng.standard_normal(s).astype(np.float32) / 3 for s in ((inner, 1, k, k), (inner,)))
    around = (k - 1) * dilation // 2
    before, after = pads or ((around, around), (around, around))
    same = {"strides": (1, 1), "dilations": (1, 1), "before": (0, 0), "after": (0, 0), "group": 1, "layout": "NHWC"}
    own = {**same, "strides": (stride,) * 2, "dilations": (dilation,) * 2, "before": before, "after": after}

    def make(b: Builder, x: Value) -> Value:
        x = b.relu(x)
        y = b.relu(b.conv(x, b.const(into), b.const(np.zeros(wide, np.float32)), **same)) if "e" in ends else x
        y = b.relu(b.conv(y, b.const(deep), b.const(bias), **{**own, "group": inner}))
        y = b.conv(y, b.const(out), **same) if "j" in ends else y
        return b.add(y, x) if residual else b.tanh(y) if "j" not in ends else y

    return make


def joined(graph: Graph, isa: str = BEST) -> tuple[Plan, Plan]:
    """The plan as it is lowered, and in strips for the largest cache in which it does not fit."""
    apart = lower(graph, ISAS[isa])
    plans = [in_strips(apart, with_l2(n)) for n in SIZES]
    return apart, next((p for p in plans if n_joined(p) > n_joined(apart)), apart)


def n_joined(plan: Plan) -> int:
    return sum(isinstance(getattr(s, "spec", None), Blocked) for s in plan.body)


def check_bits(graph: Graph, *inputs: Array, isa: str = BEST, n: int = 1) -> tuple[Plan, Plan]:
    """Both ways give the same bits: each sum has its terms in one order, wherever its row is computed."""
    apart, plan = joined(graph, isa)
    assert n_joined(plan) - n_joined(apart) == n
    want = run_plan(apart, inputs, {}, isa)
    for ready in (plan, write_in_place(plan)):
        for parts in (1, 3):
            for g, w in zip(run_plan(ready, inputs, {}, isa, parts), want, strict=True):
                assert g.tobytes() == w.tobytes()
    return apart, plan


def image(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(
    ("shape", "k", "stride", "dilation"),
    [
        ((1, 16, 14, 8), 3, 1, 1),
        ((2, 13, 9, 19), 3, 1, 1),
        ((2, 23, 17, 5), 3, 2, 1),
        ((1, 21, 10, 16), 5, 1, 1),
        ((1, 26, 11, 7), 5, 2, 1),
        ((1, 24, 12, 6), 3, 1, 2),
        ((1, 29, 8, 6), 3, 2, 2),
        ((3, 17, 6, 33), 1, 1, 1),
    ],
)
def test_the_same_bits(shape: tuple[int, ...], k: int, stride: int, dilation: int, isa: str) -> None:
    graph = build(block(shape[3], 3 * shape[3], k, stride, dilation), Type(DType.f32, shape))
    check_bits(graph, image(*shape), isa=isa)


@pytest.mark.parametrize("pads", [((0, 0), (0, 0)), ((2, 0), (0, 1)), ((0, 1), (2, 2)), ((12, 0), (12, 1))])
def test_any_pads(pads: tuple[tuple[int, int], tuple[int, int]]) -> None:
    check_bits(build(block(8, 24, pads=pads), Type(DType.f32, (2, 15, 12, 8))), image(2, 15, 12, 8))


@pytest.mark.parametrize("ends", ["e", "j"])
def test_one_neighbour_alone(ends: str) -> None:
    check_bits(build(block(16, 40, ends=ends), Type(DType.f32, (1, 30, 15, 16))), image(1, 30, 15, 16))


def test_any_number_of_images() -> None:
    x = image(3, 23, 17, 8)
    graph = build(block(8, 24, stride=2), Type(DType.f32, (symbol("N"), *x.shape[1:])))
    apart, plan = joined(graph)
    assert n_joined(plan) == 1
    for n in (0, 1, 3):
        want, got = (run_plan(p, [x[:n]], {"N": n}, BEST) for p in (apart, plan))
        assert got[0].shape[0] == n and got[0].tobytes() == want[0].tobytes()


def test_a_residual_that_the_first_one_reads_is_not_written_over() -> None:
    graph = build(block(16, 48, residual=True), Type(DType.f32, (1, 20, 12, 16)))
    _, plan = check_bits(graph, image(1, 20, 12, 16))
    assert not any(set(s.reads) & set(s.writes) for s in write_in_place(plan).body)  # type: ignore[union-attr]


@pytest.mark.parametrize("stride", [1, 2])
def test_halves(stride: int) -> None:
    wide = build(lambda b, x: b.tanh(block(16, 48, stride=stride)(b, x)), Type(DType.f32, (1, 22, 20, 16)))
    graph = narrow(wide).graph
    check_bits(graph, image(1, 22, 20, 16), isa=HERE[-1])


def test_nan_stays_where_it_belongs() -> None:
    x = image(1, 18, 9, 8)
    x[0, 7, 4, 3] = np.nan
    graph = build(block(8, 24), Type(DType.f32, x.shape))
    _, plan = joined(graph)
    (y,) = run_plan(plan, [x], {}, BEST)
    assert np.isnan(y[0, 6:9, 3:6]).all() and np.isnan(y).sum() == 9 * 8


def test_what_passes_through_memory_is_counted() -> None:
    shape, wide = (1, 32, 16, 8), 48
    apart, plan = check_bits(build(block(8, wide), Type(DType.f32, shape)), image(*shape))
    inner, padded = 32 * 16 * wide * 4, 34 * 18 * wide * 4
    before, after = (sum(s.bytes for s in p.body) for p in (apart, plan))  # type: ignore[union-attr,misc]
    assert before - after == (padded + padded) + 2 * inner  # p with its pads written and read, q written and read
    assert len(apart.body) - len(plan.body) == 6  # four sides of pads and two convolutions
    held = {s.name for s in apart.storages if s.kind == "arena"} - {s.name for s in plan.storages}
    assert len(held) == 2


def test_only_what_does_not_fit_the_cache() -> None:
    graph = build(block(8, 48), Type(DType.f32, (1, 32, 16, 8)))
    fits = 32 * 16 * 48 * 4 + 34 * 18 * 48 * 4
    assert [n_joined(in_strips(lower(graph, ISAS[BEST]), with_l2(n))) for n in (fits - 1, fits)] == [1, 0]


@pytest.mark.parametrize(
    "make",
    [
        # read by another as well: what the first one makes, and what the depthwise one makes
        lambda b, p, d, j: [j(q := d(p)), b.tanh(p), b.exp(q)],
        # read by the depthwise one twice: as in ConvMixer, which adds what it convolves
        lambda b, p, d, j: b.tanh(b.add(d(p), p)),
        # not pixel by pixel
        lambda b, p, d, j: b.tanh(b.add(d(p), d(p))),
    ],
    ids=["read again", "read twice", "no product"],
)
def test_what_others_read_stays_in_memory(make) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    w, deep = (rng.standard_normal(s).astype(np.float32) for s in ((24, 24, 1, 1), (24, 1, 3, 3)))
    same = {"strides": (1, 1), "dilations": (1, 1), "before": (0, 0), "after": (0, 0), "group": 1, "layout": "NHWC"}
    padded = {**same, "before": (1, 1), "after": (1, 1), "group": 24}

    def graph(b: Builder, x: Value) -> object:
        def product(v: Value) -> Value:
            return b.conv(v, b.const(w), **same)

        return make(b, product(b.relu(x)), lambda v: b.conv(v, b.const(deep), **padded), product)

    made, x = build(graph, Type(DType.f32, (1, 20, 12, 24))), image(1, 20, 12, 24)
    check_bits(made, x, n=0)


def test_it_can_be_left_out() -> None:
    graph = build(block(32, 192), Type(DType.f32, (1, 112, 112, 32)))
    plans = [make_plan(graph, choose_isa("host"), ("native",), frozenset(names)) for names in ((), ("strips",))]
    large = host().cache_bytes(2) < 2 * 112 * 112 * 192 * 4
    assert [sum(isinstance(getattr(s, "spec", None), Depthwise) for s in p.body) for p in plans] == [int(not large), 1]
