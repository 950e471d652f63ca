"""Attention as one step: every shape, mask and layout against the definition, on each instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from tests.lower.harness import BEST, HERE, build, check, check_engine

from vivace.base.dims import Dim, substitute, symbol
from vivace.base.dtypes import DType
from vivace.base.machine import ISAS
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.loops.blocked import Blocked
from vivace.loops.contraction import Contraction
from vivace.loops.kernel import Fetch, Kernel, Load, walk
from vivace.loops.verify import verify_kernel
from vivace.lower.lowering import lower
from vivace.lower.plan import Plan, steps_of
from vivace.lower.tile import choose_tile

RNG = np.random.default_rng(5)
F32 = DType.f32
TOLERANCE = 1e-4
ATTRS = {"scale": 0.3, "causal": False, "softcap": 0.0}


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def attention(q: tuple[Dim, ...], k: tuple[Dim, ...], width: Dim, mask: Type | None = None, **attrs: object) -> Graph:
    """q [B,H,S,D], k [B,G,T,D], v [B,G,T,width]."""

    def make(b: Builder, *xs: Value) -> Value:
        return b.attention(*xs, **{**ATTRS, **attrs})

    types = [Type(F32, q), Type(F32, k), Type(F32, (*k[:3], width))]
    return build(make, *types, *([mask] if mask else []))


def one_step(plan: Plan) -> None:
    blocked = [s.spec for s in steps_of(plan.body) if isinstance(s.spec, Blocked)]
    assert len(blocked) == 1
    for stage in blocked[0].stages:
        if isinstance(stage.spec, Kernel):
            verify_kernel(stage.spec)


def run(graph: Graph, *xs: np.ndarray, isas: tuple[str, ...] = (BEST,)) -> None:
    one_step(check(graph, *xs, isas=isas, tol=TOLERANCE))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("s", "t"),
    [(1, 1), (1, 5), (1, 700), (2, 3), (16, 16), (17, 17), (64, 64), (70, 130), (130, 257), (65, 600), (3, 900)],
)
def test_static_sizes(isa: str, s: int, t: int, causal: bool) -> None:
    graph = attention((2, 3, s, 20), (2, 3, t, 20), 33, causal=causal)
    run(graph, random(2, 3, s, 20), random(2, 3, t, 20), random(2, 3, t, 33), isas=(isa,))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("causal", [False, True])
def test_symbolic_sizes(isa: str, causal: bool) -> None:
    b, s, t = symbol("batch", 0), symbol("part", 0), symbol("past", 0) + symbol("part", 0)
    graph = attention((b, 6, s, 16), (b, 2, t, 16), 16, Type(DType.bool, (b, 1, s, t)), causal=causal)
    for n, n_queries, n_keys in [
        (1, 1, 1),
        (2, 1, 9),
        (1, 1, 600),
        (3, 5, 5),
        (1, 64, 64),
        (2, 66, 300),
        (1, 130, 777),
    ]:
        mask = RNG.random((n, 1, n_queries, n_keys)) < 0.7
        mask[..., 0] = True
        run(graph, random(n, 6, n_queries, 16), random(n, 2, n_keys, 16), random(n, 2, n_keys, 16), mask, isas=(isa,))


def test_no_queries() -> None:
    b, s = symbol("batch", 0), symbol("sequence", 0)
    graph = attention((b, 2, s, 8), (b, 2, 5, 8), 8)
    for n, n_queries in [(0, 3), (2, 0), (0, 0)]:
        run(graph, random(n, 2, n_queries, 8), random(n, 2, 5, 8), random(n, 2, 5, 8))


@pytest.mark.parametrize("size", [(4, 4), (4, 700), (80, 80), (1, 40)])
@pytest.mark.parametrize("axes", ["bhst", "11st", "b11t", "bh1t", "b1s1", "st", "t", "1hs1", "1"])
@pytest.mark.parametrize("dtype", [DType.bool, F32])
def test_masks_of_any_shape(size: tuple[int, int], axes: str, dtype: DType) -> None:
    sizes = {"b": 2, "h": 4, "s": size[0], "t": size[1], "1": 1}
    shape = tuple(sizes[a] for a in axes)
    graph = attention((2, 4, size[0], 8), (2, 2, size[1], 8), 12, Type(dtype, shape))
    mask = (RNG.random(shape) < 0.8) if dtype is DType.bool else random(*shape)
    run(graph, random(2, 4, size[0], 8), random(2, 2, size[1], 8), random(2, 2, size[1], 12), mask)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("t", [1, 9, 600])
@pytest.mark.parametrize("s", [1, 3])
def test_rows_without_visible_keys_are_nan(isa: str, s: int, t: int) -> None:
    mask = RNG.random((1, 1, s, t)) < 0.5
    mask[..., s - 1, :] = False
    mask[:, :, : s - 1, t - 1] = True
    graph = attention((1, 2, s, 8), (1, 2, t, 8), 8, Type(DType.bool, (1, 1, s, t)))
    with np.errstate(all="ignore"):
        run(graph, random(1, 2, s, 8), random(1, 2, t, 8), random(1, 2, t, 8), mask, isas=(isa,))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(
    ("s", "t", "depth"), [(16, 64, 64), (64, 64, 64), (70, 300, 64), (130, 1030, 128), (1, 300, 64)]
)
def test_heads_of_models(isa: str, s: int, t: int, depth: int) -> None:
    """Heads side by side, as projections leave them: rows of keys are powers of two apart."""

    def make(b: Builder, *xs: Value) -> Value:
        return b.transpose(b.attention(*(b.transpose(x, perm=(0, 2, 1, 3)) for x in xs), **ATTRS), perm=(0, 2, 1, 3))

    shapes = [(1, s, 4, depth), (1, t, 2, depth), (1, t, 2, depth)]
    run(build(make, *(Type(F32, shape) for shape in shapes)), *(random(*shape) for shape in shapes), isas=(isa,))


def test_blocks_of_known_sizes_with_queries_turned_once() -> None:
    """600 queries and keys: nine blocks of 64 and one of 24, five chunks of 120, and no size known only at run time."""
    (step,) = steps_of(lower(attention((1, 2, 600, 32), (1, 2, 600, 32), 32), ISAS[BEST]).body)
    assert isinstance(step.spec, Blocked) and step.spec.steps == 5
    products = [s.spec for s in step.spec.each if isinstance(s.spec, Contraction)]
    sizes = [(c.rows[0].extent, c.taps[0].extent, c.n) for c in products]
    assert sizes == [(120, 32, 64), (64, 120, 32), (120, 32, 24), (24, 120, 32)]
    turns = [
        s for s in step.spec.each if isinstance(s.spec, Kernel) and [p.name for p in s.params] == ["q", "turned_q"]
    ]
    assert [substitute(s.when, {"part": 9, "step": n}) for s in turns for n in range(2)] == [0, 0, 1, 0]


def test_blocks_of_open_sizes_are_cut_as_whole_ones() -> None:
    """Scores of 64 queries by 128 keys: not one tile by one panel, as for blocks beyond the last."""
    n = symbol("N", 1)
    (step,) = steps_of(lower(attention((1, 2, n, 64), (1, 2, n, 64), 64), ISAS["avx512"]).body)
    assert isinstance(step.spec, Blocked)
    products = [s.spec for s in step.spec.each if isinstance(s.spec, Contraction)]
    tiles = [choose_tile(c, ISAS["avx512"]) for c in products]
    assert len(tiles) == 2 and min(t.tiles_per_unit for t in tiles) > 1


def test_more_queries_than_keys_when_causal() -> None:
    graph = attention((1, 2, 90, 8), (1, 2, 20, 8), 8, causal=True)
    run(graph, random(1, 2, 90, 8), random(1, 2, 20, 8), random(1, 2, 20, 8))


@pytest.mark.parametrize("t", [40, 700])
def test_the_least_number_as_a_mask(t: int) -> None:
    """What exporters use in the place of minus infinity: where it hides all keys, they weigh the same."""
    mask = np.where(RNG.random((1, 1, 5, t)) < 0.5, 0, np.finfo(np.float32).min).astype(np.float32)
    mask[:, :, 2] = np.finfo(np.float32).min
    graph = attention((1, 2, 5, 8), (1, 2, t, 8), 8, Type(F32, (1, 1, 5, t)))
    run(graph, random(1, 2, 5, 8), random(1, 2, t, 8), random(1, 2, t, 8), mask)


@pytest.mark.parametrize("sizes", [(1, 30), (20, 30), (20, 600)])
def test_softcap_and_large_scores(sizes: tuple[int, int]) -> None:
    s, t = sizes
    graph = attention((1, 2, s, 8), (1, 2, t, 8), 8, softcap=5.0, scale=4.0)
    run(graph, random(1, 2, s, 8), random(1, 2, t, 8), random(1, 2, t, 8))
    graph = attention((1, 2, s, 8), (1, 2, t, 8), 8, scale=100.0)
    run(graph, random(1, 2, s, 8), random(1, 2, t, 8), random(1, 2, t, 8))


@pytest.mark.parametrize("perm", [(0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0), (2, 3, 0, 1)])
@pytest.mark.parametrize("s", [1, 21, None])
def test_operands_and_result_of_any_layout(perm: tuple[int, ...], s: int | None) -> None:
    back = tuple(perm.index(i) for i in range(4))
    n_queries = s or 21
    shapes = [(2, 3, n_queries, 16), (2, 3, 40, 16), (2, 3, 40, 24)]

    def make(b: Builder, *xs: Value) -> Value:
        return b.transpose(b.attention(*(b.transpose(x, perm=back) for x in xs), **ATTRS), perm=(0, 2, 1, 3))

    first = (2, 3, s or symbol("sequence", 0), 16)
    types = [Type(F32, tuple(shape[p] for p in perm)) for shape in (first, *shapes[1:])]
    graph = build(make, *types)
    run(graph, *(np.ascontiguousarray(random(*shape).transpose(perm)) for shape in shapes))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("n_queries", [1, None])
@pytest.mark.parametrize("per_head", [False, True])
def test_one_query_of_many_heads(isa: str, n_queries: int | None, per_head: bool) -> None:
    """More heads share keys than have their sums in registers at once."""
    s, t = n_queries or symbol("S", 0), symbol("T", 1)
    mask = Type(F32, (2, 14 if per_head else 1, s, t))
    graph = attention((2, 14, s, 20), (2, 2, t, 20), 33, mask, softcap=4.0, causal=True)
    for n, m in [(1, 1), (1, 37), (1, 150), *([] if n_queries else [(0, 5), (2, 37)])]:
        bias = np.where(RNG.random((2, mask.shape[1], n, m)) < 0.8, random(2, mask.shape[1], n, m), -np.inf)
        bias[..., :1] = 0
        bias[1, ..., :70] = -np.inf if m == 150 else 0  # no key of the first chunk is seen
        run(graph, random(2, 14, n, 20), random(2, 2, m, 20), random(2, 2, m, 33), bias.astype(np.float32), isas=(isa,))


@pytest.mark.parametrize("n_queries", [1, symbol("S", 0)])
def test_keys_and_values_are_read_once_for_the_heads_that_share_them(n_queries: Dim) -> None:
    t = symbol("T", 1)
    step, join = steps_of(lower(attention((2, 9, n_queries, 64), (2, 3, t, 64), 64), ISAS["avx512"]).body)
    assert isinstance(step.spec, Blocked)
    assert isinstance(join.spec, Kernel)
    assert step.spec.blocks == 6
    parts = {n: substitute(step.spec.parts, {"S": 1, "T": n}) for n in (1, 64, 65, 700)}
    assert parts == {1: 1, 64: 1, 65: 2, 700: 10}  # chunks of keys, so that threads share them evenly
    kernel = step.spec.last[-1].spec
    assert isinstance(kernel, Kernel)
    loops = {
        name: [s for s in kernel.body if any(isinstance(e, Load) and e.buffer.name == name for e in walk(s))]
        for name in ("k", "v")
    }
    assert all(len(found) == 1 for found in loops.values())
    asked = [(e.buffer.name, e.level) for e in walk(loops["k"][0]) if isinstance(e, Fetch)]
    assert asked == [("k", 1)] * 4 + [("v", 2)] * 4


def test_random_cases() -> None:
    rng = np.random.default_rng(8)
    for _ in range(25):
        b, groups, share = (int(x) for x in rng.integers(1, 4, 3))
        s, t = (int(x) for x in np.exp(rng.uniform(0, 6, 2)))
        d, e = (int(x) for x in rng.integers(1, 40, 2))
        causal, masked = bool(rng.integers(2)), bool(rng.integers(2))
        shape = tuple(n if rng.integers(2) else 1 for n in (b, groups * share, s, t))
        graph = attention(
            (b, groups * share, s, d), (b, groups, t, d), e, Type(F32, shape) if masked else None,
            causal=causal, scale=float(rng.uniform(0.1, 1)), softcap=float(rng.choice([0.0, 3.0])),
        )  # fmt: skip
        xs = [random(b, groups * share, s, d), random(b, groups, t, d), random(b, groups, t, e)]
        run(graph, *xs, *([random(*shape)] if masked else []), isas=(HERE[int(rng.integers(len(HERE)))],))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_engine(threads: int) -> None:
    graph = attention((2, 5, 150, 16), (2, 5, 300, 16), 16, causal=True)
    check_engine(
        graph, random(2, 5, 150, 16), random(2, 5, 300, 16), random(2, 5, 300, 16), threads=threads, tol=TOLERANCE
    )


@pytest.mark.parametrize("sizes", [(2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty_heads(sizes: tuple[int, int, int, int]) -> None:
    s, t, d, e = sizes
    graph = attention((1, 2, s, d), (1, 2, t, d), e)
    check(graph, random(1, 2, s, d), random(1, 2, t, d), random(1, 2, t, e), isas=(BEST,), tol=TOLERANCE)


def test_doubles_keep_their_precision() -> None:
    def make(b: Builder, *xs: Value) -> Value:
        return b.attention(*xs, **ATTRS)

    graph = build(make, *(Type(DType.f64, (1, 2, 7, 8)) for _ in range(3)))
    check(graph, *(RNG.standard_normal((1, 2, 7, 8)) for _ in range(3)), isas=(BEST,), tol=1e-12)
