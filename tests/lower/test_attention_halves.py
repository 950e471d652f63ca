"""Attention whose products are products of bf16: every shape, mask and layout, on each instruction set, tiles included.

Tolerance: queries, keys and values are rounded before both sides read them; a weight is off by at most 2**-9 of itself
once it is rounded, and by 2**-13 before, as is the sum that divides: a result is off by at most 2**-9 + 2**-12 of the
largest value, and by the noise of f32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from tests import races
from tests.images import build_image
from tests.lower.harness import build

import vivace
from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.base.knobs import knobs
from vivace.base.machine import isa
from vivace.graph import reference
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.loops.blocked import Blocked
from vivace.loops.kernel import Kernel
from vivace.loops.pack import Pack
from vivace.loops.verify import verify_kernel
from vivace.lower.lowering import lower
from vivace.lower.plan import steps_of
from vivace.lower.precision import Narrowed, narrow
from vivace.lower.rules import attention_halves
from vivace.runtime.engine import Engine
from vivace.shadow import ShadowedEngine
from vivace.targets.cpu.amx import missing_here

F32 = DType.f32
NAMES = ("sse", "avx2", "avx512+avx512_bf16", "avx512+amx_bf16+amx_tile+avx512_bf16")
HERE = [name for name in NAMES if not missing_here(isa(name).flags)]
each_isa = pytest.mark.parametrize("name", HERE)
RNG = np.random.default_rng(11)


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of 64 queries and 256 keys fill them, so that more keys are several chunks."""
    monkeypatch.setattr(attention_halves, "room", lambda: 64 * 256)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def attention(
    q: tuple[Dim, ...], k: tuple[Dim, ...], width: Dim, mask: Type | None = None,
    perm: tuple[int, ...] = (0, 1, 2, 3), **attrs: object,
) -> Graph:  # fmt: skip
    """q [B,H,S,D], k [B,G,T,D], v [B,G,T,width], which element-wise nodes make and round."""

    def make(b: Builder, *xs: Value) -> Value:
        halves = [b.transpose(b.mul(x, b.const(np.float32(1))), perm=perm) for x in xs[:3]]
        y = b.attention(*halves, *xs[3:], **{"scale": 0.3, "causal": False, "softcap": 0.0, **attrs})
        return b.transpose(y, perm=(0, 2, 1, 3))

    back = tuple(perm.index(i) for i in range(4))
    types = [Type(F32, tuple(shape[back[i]] for i in range(4))) for shape in (q, k, (*k[:3], width))]
    return build(make, *types, *([mask] if mask else []))


def run(graph: Graph, *xs: np.ndarray, name: str, threads: int = 2) -> None:
    run_several(graph, [xs], name, threads)


def run_several(graph: Graph, cases: Iterable[Sequence[np.ndarray]], name: str, threads: int = 2) -> None:
    """One engine for all cases."""
    narrowed = narrow(graph)
    engine = Engine(build_image(narrowed.graph, isa(name), False), threads, [])
    for xs in cases:
        check(graph, narrowed, engine, xs)


def check(graph: Graph, narrowed: Narrowed, engine: Engine, xs: Sequence[np.ndarray]) -> None:
    got = engine.run({v.name: x for v, x in zip(graph.inputs, xs, strict=True)})[graph.outputs[0].name]
    with np.errstate(all="ignore"):
        (want,) = reference.evaluate(narrowed.graph, list(xs))
    assert narrowed.n_products == 2 and got.shape == want.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    largest = np.abs(xs[2], where=np.isfinite(xs[2]), out=np.zeros_like(xs[2])).max(initial=0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=largest * (2.0**-9 + 2.0**-12 + 1e-5))


def qkv(b: int, heads: int, groups: int, s: int, t: int, d: int, e: int) -> list[np.ndarray]:
    return [random(b, heads, s, d), random(b, groups, t, d), random(b, groups, t, e)]


def test_the_products_are_of_packed_halves() -> None:
    graph = attention((1, 2, 64, 64), (1, 2, 128, 64), 64)
    (spec,) = [s.spec for s in steps_of(lower(narrow(graph).graph, isa(NAMES[-1])).body) if isinstance(s.spec, Blocked)]
    assert [type(s.spec) for s in spec.once] == [Pack, Pack]
    assert {b.name for b in spec.params} == {"q", "k", "v", "o"}
    assert all(b.dtype is DType.bf16 for b in spec.params if b.name != "o")
    for stage in spec.stages:
        if isinstance(stage.spec, Kernel):
            verify_kernel(stage.spec)


@each_isa
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("s", "t", "d", "e"),
    [(1, 1, 16, 16), (1, 300, 64, 64), (2, 3, 20, 33), (16, 16, 32, 32), (70, 130, 33, 20), (64, 256, 64, 64),
     (197, 197, 64, 48), (65, 600, 80, 16), (3, 900, 16, 1), (128, 512, 1, 64)],
)  # fmt: skip
def test_static_sizes(name: str, s: int, t: int, d: int, e: int, causal: bool) -> None:
    graph = attention((2, 3, s, d), (2, 3, t, d), e, causal=causal)
    run(graph, *qkv(2, 3, 3, s, t, d, e), name=name)


@each_isa
@pytest.mark.parametrize(("s", "t", "n_chunks"), [(70, 256, 1), (70, 500, 1), (45, 700, 2), (129, 1000, 2)])
def test_few_chunks(name: str, s: int, t: int, n_chunks: int) -> None:
    """More than 256 keys leave room for 32 queries."""
    graph = attention((1, 2, s, 32), (1, 2, t, 32), 32)
    (spec,) = [x.spec for x in steps_of(lower(narrow(graph).graph, isa(name)).body) if isinstance(x.spec, Blocked)]
    assert (spec.steps, spec.parts) == (n_chunks, -(-s // (64 if t == 256 else 32)))
    run(graph, *qkv(1, 2, 2, s, t, 32, 32), name=name)


@each_isa
@pytest.mark.parametrize("scale", [0.3, 1.0, -0.3, 0.0])
@pytest.mark.parametrize("t", [50, 600])
def test_scale(name: str, scale: float, t: int) -> None:
    """A factor above 0 goes into the exponent, others into the scores."""
    graph = attention((1, 2, 40, 32), (1, 2, t, 32), 32, scale=scale)
    run(graph, *qkv(1, 2, 2, 40, t, 32, 32), name=name)


@each_isa
@pytest.mark.parametrize("causal", [False, True])
def test_symbolic_sizes_and_shared_keys(name: str, causal: bool) -> None:
    b, s, t = symbol("batch", 0), symbol("part", 0), symbol("past", 0) + symbol("part", 0)
    graph = attention((b, 6, s, 16), (b, 2, t, 16), 24, Type(DType.bool, (b, 1, s, t)), causal=causal)
    cases = []
    for n, n_queries, n_keys in [(1, 1, 1), (2, 1, 9), (3, 5, 5), (1, 64, 64), (2, 66, 300), (1, 130, 777), (0, 3, 3)]:
        mask = RNG.random((n, 1, n_queries, n_keys)) < 0.7
        mask[..., 0] = True
        cases.append([*qkv(n, 6, 2, n_queries, n_keys, 16, 24), mask])
    run_several(graph, cases, name)


@pytest.mark.parametrize("size", [(80, 80), (20, 700), (4, 40)])
@pytest.mark.parametrize("axes", ["bhst", "11st", "b11t", "bh1t", "b1s1", "t", "1"])
@pytest.mark.parametrize("dtype", [DType.bool, F32])
def test_masks_of_any_shape(size: tuple[int, int], axes: str, dtype: DType) -> None:
    sizes = {"b": 2, "h": 4, "s": size[0], "t": size[1], "1": 1}
    shape = tuple(sizes[a] for a in axes)
    graph = attention((2, 4, size[0], 8), (2, 2, size[1], 8), 12, Type(dtype, shape))
    mask = (RNG.random(shape) < 0.8) if dtype is DType.bool else random(*shape)
    run(graph, *qkv(2, 4, 2, *size, 8, 12), mask, name=HERE[-1])


@each_isa
@pytest.mark.parametrize("t", [9, 600])
def test_rows_without_visible_keys_are_nan(name: str, t: int) -> None:
    mask = RNG.random((1, 1, 3, t)) < 0.5
    mask[..., 2, :] = False
    mask[:, :, :2, t - 1] = True
    graph = attention((1, 2, 3, 8), (1, 2, t, 8), 8, Type(DType.bool, (1, 1, 3, t)))
    run(graph, *qkv(1, 2, 2, 3, t, 8, 8), mask, name=name)


@each_isa
@pytest.mark.parametrize("perm", [(0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)])
def test_operands_of_any_layout(name: str, perm: tuple[int, ...]) -> None:
    graph = attention((2, 3, 21, 16), (2, 3, 40, 16), 24, perm=perm)
    back = tuple(perm.index(i) for i in range(4))
    run(graph, *(np.ascontiguousarray(x.transpose(back)) for x in qkv(2, 3, 3, 21, 40, 16, 24)), name=name)


@each_isa
def test_nan_and_infinity_pass(name: str) -> None:
    q, k, v = qkv(1, 2, 2, 40, 70, 16, 16)
    q[0, 0, 3], v[0, 1, 5, 2] = np.nan, np.inf
    graph = attention((1, 2, 40, 16), (1, 2, 70, 16), 16)
    narrowed = narrow(graph).graph
    engine = Engine(build_image(narrowed, isa(name), False), 1, [])
    got = engine.run({v.name: x for v, x in zip(graph.inputs, (q, k, v), strict=True)})[graph.outputs[0].name]
    assert np.isnan(got[0, 3, 0]).all() and (got[0, :, 1, 2] == np.inf).all()
    assert np.isfinite(got[0, :3]).sum() == got[0, :3].size - 3


def test_keys_of_a_cache_in_f32_are_rounded_as_they_are_packed() -> None:
    """Keys and values that are inputs of the model stay f32 in memory."""

    def make(b: Builder, q: Value, k: Value, v: Value) -> Value:
        return b.attention(b.mul(q, b.const(np.float32(1))), k, v, scale=0.3, causal=True, softcap=0.0)

    shapes = [(1, 4, 20, 32), (1, 2, 90, 32), (1, 2, 90, 32)]
    graph = build(make, *(Type(F32, shape) for shape in shapes))
    xs = [random(*shape) for shape in shapes]
    (want,) = reference.evaluate(graph, xs)
    engine = Engine(build_image(narrow(graph).graph, isa(HERE[-1]), False), 2, [])
    got = engine.run({v.name: x for v, x in zip(graph.inputs, xs, strict=True)})[graph.outputs[0].name]
    assert 0 < np.abs(got - want).max() <= 2**-6 * np.abs(xs[2]).max()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads(threads: int) -> None:
    graph = attention((2, 6, 150, 16), (2, 3, 300, 16), 16, causal=True)
    run(graph, *qkv(2, 6, 3, 150, 300, 16, 16), name=HERE[-1], threads=threads)


@each_isa
def test_pieces_do_not_race(name: str) -> None:
    graph = attention((1, 4, 70, 32), (1, 2, 90, 32), 40)
    xs = [random(1, 4, 70, 32), random(1, 2, 90, 32), random(1, 2, 90, 40)]
    with races.sharing_all():
        image = build_image(narrow(graph).graph, isa(name), False)
    races.check(image, {v.name: x for v, x in zip(graph.inputs, xs, strict=True)}, threads=(1, 2, 5), repeats=2)


def test_checked_by_the_shadow() -> None:
    graph = attention((1, 2, 40, 32), (1, 2, 130, 32), 32)
    with knobs.scope(check=True, emulate=True):
        engine = vivace.compile(graph, precision="bf16", threads=1)
    engine.run({v.name: x for v, x in zip(graph.inputs, qkv(1, 2, 2, 40, 130, 32, 32), strict=True)})
    assert isinstance(engine, ShadowedEngine) and engine.n_compared > 0
