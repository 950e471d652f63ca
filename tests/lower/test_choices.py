"""Choices: what they are called, that every rule obeys them, and that results stay what they mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from tests.lower.harness import BEST, build

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.machine import ISAS, host, missing_flags, with_extras
from vivace.building import apply_precision, link_image
from vivace.graph import reference
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.loops.blocked import Blocked
from vivace.loops.contraction import Contraction, Depthwise
from vivace.lower.candidates import Rates, neighbours
from vivace.lower.choices import DEFAULT, FLOATS, Choice, Choices, Site
from vivace.lower.lowering import lower
from vivace.lower.packed import Packed
from vivace.lower.plan import Plan, steps_of
from vivace.lower.tune import what
from vivace.runtime.engine import Engine

ISA = ISAS[BEST]
WIDTH = ISA.n_f32_lanes


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def conv(b: Builder, x: Value, n_out: int, kernel: int = 3, group: int = 1) -> Value:
    w = b.const(random(n_out, x.shape[-1] // group, kernel, kernel) / kernel)  # type: ignore[operator]
    ones, pads = (1, 1), (kernel // 2,) * 2
    return b.conv(
        x, w, b.const(random(n_out)), strides=ones, dilations=ones, before=pads, after=pads, group=group, layout="NHWC"
    )


GRAPHS: dict[str, tuple[Callable[..., Value], tuple[int, ...]]] = {
    "matmul": (lambda b, x: b.relu(b.matmul(x, b.const(random(96, 70)))), (45, 96)),
    "conv": (lambda b, x: b.relu(conv(b, x, 40, 1)), (1, 9, 11, 24)),
    "winograd": (lambda b, x: conv(b, x, 48), (1, 12, 13, 32)),
    "grouped": (lambda b, x: conv(b, x, 40, 3, 2), (1, 9, 9, 32)),
    "depthwise": (lambda b, x: b.relu(conv(b, x, 40, 3, 40)), (1, 15, 17, 40)),
    "attention": (lambda b, x: b.attention(x, x, x, scale=0.5, causal=False, softcap=0.0), (1, 2, 70, 16)),
}
CHOICES = [
    Choice(lanes=WIDTH),
    Choice(lanes=3 * WIDTH, rows=5),
    Choice(lanes=4 * WIDTH, rows=3, tiles=2, panels=1),
    Choice(rows=2, tiles=3, panels=2, rows_outer=True),
    Choice(rows_outer=False, tiles=1),
    Choice(stage_a=True),
    Choice(k_block=16, tiles=2),
    Choice(k_block=1, panels=3),
    Choice(tiles_outside=True, tiles=3, panels=2),
    Choice(way="direct", lanes=3 * WIDTH),
    Choice(way="2x2", tiles=3),
    Choice(way="2x4", lanes=WIDTH),
    Choice(way="4x4", tiles=5),
    Choice(rows=99, tiles=10**6, panels=10**6, lanes=7, way="9x9", k_block=7),  # nothing of it is possible
]


def graph_of(name: str) -> tuple[Graph, np.ndarray]:
    make, shape = GRAPHS[name]
    return build(make, Type(DType.f32, shape)), random(*shape)


def sites_of(plan: Plan) -> list[Site]:
    return [s.site for s in steps_of(plan.body) if s.site is not None]


def run(plan: Plan, choices: Choices, x: np.ndarray) -> np.ndarray:
    engine = Engine(link_image(plan, ISA, False, None, choices), 2)
    found = engine(x)
    assert isinstance(found, np.ndarray)
    return found


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_choice_computes_the_same(name: str, choice: Choice) -> None:
    graph, x = graph_of(name)
    (site,) = sites_of(lower(graph, ISA))
    choices = Choices({site.key: choice})
    plan = lower(graph, ISA, choices=choices)
    assert [s.key for s in sites_of(plan)] == [site.key]  # a choice does not change what a site is
    want = reference.evaluate(graph, [x])[0]
    np.testing.assert_allclose(run(plan, choices, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["matmul", "conv", "grouped"])
def test_chosen_panels_are_packed(name: str) -> None:
    graph, _ = graph_of(name)
    (site,) = sites_of(lower(graph, ISA))
    plan = lower(graph, ISA, choices=Choices({site.key: Choice(lanes=WIDTH)}))
    (spec,) = (s.spec for s in steps_of(plan.body) if s.site is not None)
    assert isinstance(spec, Contraction) and spec.packing.lanes == WIDTH


def test_chosen_ways_are_taken_unless_winograd_is_off() -> None:
    graph, _ = graph_of("winograd")
    (site,) = sites_of(lower(graph, ISA))
    assert site.ways and {"direct", "2x2", "4x4"} <= set(site.ways)
    for way in site.ways:
        choices = Choices({site.key: Choice(way=way)})
        (spec,) = (s.spec for s in steps_of(lower(graph, ISA, choices=choices).body) if s.site is not None)
        assert isinstance(spec, Blocked) is (way != "direct")
        (spec,) = (
            s.spec for s in steps_of(lower(graph, ISA, frozenset({"winograd"}), choices).body) if s.site is not None
        )
        assert isinstance(spec, Contraction)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_chosen_blocks_of_attention(precision: str) -> None:
    isa = with_extras(ISAS["avx512"], {"avx512_bf16"})
    wide = build(lambda b, x: b.attention(y := b.tanh(x), y, y, scale=0.5, causal=False, softcap=0.0),
                 Type(DType.f32, (1, 2, 260, 16)))  # fmt: skip
    graph, _ = apply_precision(wide, precision, isa)
    (site,) = sites_of(lower(graph, isa))
    choices = Choices({site.key: Choice(rows=96, tiles=64)})
    (spec,) = (s.spec for s in steps_of(lower(graph, isa, choices=choices).body) if s.site is not None)
    assert isinstance(spec, Blocked) and (spec.parts, spec.steps) == (3, 5)
    assert what(site) == f"attention {precision} 1x2x260x16x260"


@pytest.mark.skipif(bool(missing_flags(host(), ISAS["avx512"])), reason="needs AVX-512")
def test_chosen_panels_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    isa = with_extras(ISAS["avx512"], {"avx512_bf16"})
    x = Type(DType.f32, (45, 96))
    wide = build(
        lambda b, x: b.relu(b.matmul(b.relu(b.matmul(x, b.const(random(96, 96)))), b.const(random(96, 70)))), x
    )
    graph, _ = apply_precision(wide, "bf16", isa)
    plan = lower(graph, isa)
    chosen = {s.key: Choice(lanes=3 * WIDTH) for s in sites_of(plan)}
    specs = [s.spec for s in steps_of(lower(graph, isa, choices=Choices(chosen)).body) if s.site is not None]
    assert any(isinstance(s, Contraction) and s.a.dtype is DType.bf16 for s in specs)
    assert all(isinstance(s, Contraction) and s.packing.lanes == 3 * WIDTH for s in specs)


def test_keys_tell_sites_apart() -> None:
    a, b = (sites_of(lower(graph_of(n)[0], ISA))[0] for n in ("conv", "matmul"))
    assert a.key != b.key
    assert isinstance(a.spec, Contraction)
    assert Choices().key(a.spec) == a.key == Choices(at="N=3").key(replace(a.spec, name="other"))


def test_symbolic_sites_belong_to_sizes() -> None:
    graph = build(lambda b, x: b.matmul(x, b.const(random(24, 40))), Type(DType.f32, (symbol("N", 0), 24)))
    (site,) = sites_of(lower(graph, ISA))
    assert Choices(at="N=3").key(site.spec) != Choices(at="N=4").key(site.spec)


def test_settings_go_to_text_and_back() -> None:
    for choice in (*CHOICES, DEFAULT):
        assert Choice.of(choice.settings()) == choice
    for unknown in ({"speed": 3}, {"rows": "3"}, {"rows": True}, {"stage_a": 1}, {"tiles": -1}, {"tiles": 1 << 40}):
        assert Choice.of(unknown) is None


def test_weights_are_packed_once_for_several_plans() -> None:
    graph, _ = graph_of("conv")
    packed = Packed()
    first, second = (lower(graph, ISA, packed=packed) for _ in range(2))
    constants = [[s for s in p.storages if s.kind == "constant"] for p in (first, second)]
    assert constants[0] == constants[1] and len(constants[0]) == 2


def bytes_of(b: Builder, q: Value, kind: str) -> Value:
    """A product of bytes with its scale, as quantized models have it."""
    random = np.random.default_rng(3)
    scale, zero = b.const(np.float32(0.01)), b.const(np.uint8(7))
    shape = {"matmul": (24, 40), "depthwise": (24, 1, 3, 3)}.get(kind, (40, 24, 3, 3))
    w = b.const(random.integers(-128, 128, shape).astype(np.int8))
    bias = b.const(random.integers(-999, 999, 24 if kind == "depthwise" else 40).astype(np.int32))
    if kind == "matmul":
        total = b.matmul_integer(q, w, zero, bias)
    else:
        total = b.conv_integer(q, w, zero, bias, strides=(1, 1), dilations=(1, 1), before=(1, 1), after=(1, 1),
                               group=24 if kind == "depthwise" else 1, layout="NHWC")  # fmt: skip
    return b.quantize(b.mul(b.cast(total, to=DType.f32), scale), b.const(np.float32(1)), zero)


@pytest.mark.parametrize("kind", ["matmul", "conv", "depthwise"])
def test_products_of_bytes_may_be_chosen_to_run_in_f32(kind: str) -> None:
    """The same bytes, from a product of f32 and a step that widens; both belong to the site that was chosen."""
    graph = build(lambda b, q: bytes_of(b, q, kind), Type(DType.u8, (1, 9, 11, 24)))
    (site,) = sites_of(lower(graph, ISA))
    assert site.ways == ("direct", FLOATS)
    choices = Choices({site.key: Choice(way=FLOATS)})
    plan = lower(graph, ISA, choices=choices)
    assert [s.key for s in sites_of(plan)] == [site.key] * 2
    product = steps_of(plan.body)[-1].spec
    assert isinstance(product, (Contraction, Depthwise)) and product.a.dtype is product.b.dtype is DType.f32
    q = np.random.default_rng(0).integers(0, 256, (1, 9, 11, 24)).astype(np.uint8)
    np.testing.assert_array_equal(run(plan, choices, q), reference.evaluate(graph, [q])[0])
    choices_near = neighbours(site, Choice(), ISA, Rates({"f32": 100.0, "i8": 3000.0}, 100.0, 20.0, 1))
    assert Choice(way=FLOATS) in choices_near
    assert not any(c.way == FLOATS and c != Choice(way=FLOATS) for c in choices_near)


def test_what_a_product_of_bytes_reads_is_put_in_order_once() -> None:
    """The copy that turns the image is what is widened, and every lowering takes the same weights."""

    def make(b: Builder, q: Value) -> Value:
        return bytes_of(b, b.transpose(q, perm=(0, 2, 3, 1)), "conv")

    graph, packed = build(make, Type(DType.u8, (1, 24, 9, 11))), dict[object, object]()
    (site,) = sites_of(lower(graph, ISA))
    choices = Choices({site.key: Choice(way=FLOATS)})
    plan = lower(graph, ISA, choices=choices, packed=packed)  # type: ignore[arg-type]
    n_packed, steps = len(packed), steps_of(plan.body)
    assert all(any(s.writes[0] in r.reads for r in steps) for s in steps[:-1])  # nobody makes what nobody reads
    lower(graph, ISA, choices=choices, packed=packed)  # type: ignore[arg-type]
    assert len(packed) == n_packed
    q = np.random.default_rng(0).integers(0, 256, (1, 24, 9, 11)).astype(np.uint8)
    np.testing.assert_array_equal(run(plan, choices, q), reference.evaluate(graph, [q])[0])


def test_open_sizes_leave_bytes_their_candidates() -> None:
    graph = build(lambda b, q: bytes_of(b, q, "matmul"), Type(DType.u8, (symbol("N", 0), 24)))
    (site,) = sites_of(lower(graph, ISA))
    found = neighbours(site, Choice(), ISA, Rates({"f32": 100.0, "i8": 3000.0}, 100.0, 20.0, 1))
    assert len([c for c in found if c.way != FLOATS]) > 3
