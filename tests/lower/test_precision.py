"""bf16 between kernels: what is stored narrow, what that costs in accuracy, and that no cast stands alone.

Tolerance: generated code and the reference round the same values, but sums in another order may round to the
neighbouring bf16, 2**-8 away; a few products deep such differences stay below 2**-6 of the largest result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from tests.images import build_image
from tests.lower.harness import build

import vivace
from vivace.base import events
from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.base.knobs import knobs
from vivace.base.machine import best_isa, host, isa, missing_flags
from vivace.graph import reference
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.graph.verify import verify
from vivace.loops.contraction import Contraction, Depthwise
from vivace.loops.kernel import Binary, Unary, walk
from vivace.loops.pack import Pack
from vivace.lower.halves import holds, rounded
from vivace.lower.lowering import lower
from vivace.lower.plan import steps_of
from vivace.lower.precision import Narrowed, narrow
from vivace.runtime.engine import Engine

ISAS = ("sse", "avx2", "avx512", "avx512+avx512_bf16")
each_isa = pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.skipif(bool(missing_flags(host(), isa(n))), reason="not on this CPU"))
        for n in ISAS
    ],
)
F32 = DType.f32
HERE = [n for n in ISAS if not missing_flags(host(), isa(n))]


def weights(*shape: Any, seed: int = 0) -> np.ndarray:
    fan_in = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)


def conv(b: Builder, x: Value, n: int, k: int = 1, group: int = 1, seed: int = 0, stride: int = 1) -> Value:
    pad = (k // 2, k // 2)
    w = b.const(weights(n, x.shape[-1] // group, k, k, seed=seed))
    bias = b.const(weights(n, 1, seed=seed + 1)[:, 0])
    return b.conv(
        x, w, bias, strides=(stride, stride), dilations=(1, 1), before=pad, after=pad, group=group, layout="NHWC"
    )


def residual_net(b: Builder, x: Value) -> Value:
    """A stem, a residual block, a depthwise block with a gate of its own (squeeze and excite), pools, a classifier."""
    y = b.relu(conv(b, b.transpose(x, perm=(0, 2, 3, 1)), 32, 3, stride=2))
    y = b.max_pool(y, kernel=(3, 3), strides=(2, 2), dilations=(1, 1), before=(1, 1), after=(1, 1), layout="NHWC")
    y = b.relu(b.add(conv(b, b.relu(conv(b, y, 48, 3, seed=2)), 32, seed=3), y))
    z = b.clip(conv(b, y, 64, seed=4), min=0.0, max=6.0)
    z = b.clip(conv(b, z, 64, 3, group=64, seed=5), min=0.0, max=6.0)
    gate = b.reduce_mean(z, axes=(1, 2), keepdims=True)
    z = b.mul(z, b.sigmoid(conv(b, b.relu(conv(b, gate, 16, seed=6)), 64, seed=7)))
    y = b.concat(conv(b, z, 32, seed=8), y, axis=3)
    y = b.avg_pool(
        conv(b, y, 64, 3, seed=9), kernel=(2, 2), strides=(2, 2), dilations=(1, 1), before=(0, 0), after=(0, 0),
        count_include_pad=False, layout="NHWC",
    )  # fmt: skip
    y = b.reduce_mean(y, axes=(1, 2), keepdims=False)
    return b.softmax(b.matmul(y, b.const(weights(64, 10))), axis=1)


def encoder(b: Builder, x: Value) -> Value:
    """One layer of a transformer over x [B, S, 48], 3 heads."""
    d, heads = 48, 3

    def linear(v: Value, n: int, seed: int) -> Value:
        w = b.const(weights(v.shape[-1], n, seed=seed))  # type: ignore[arg-type]
        return b.add(b.matmul(v, w), b.const(weights(n, 1, seed=seed)[:, 0]))

    def norm(v: Value) -> Value:
        return b.layer_norm(v, b.const(weights(d, 1)[:, 0] + 1), b.const(weights(d, 1)[:, 0]), axis=2, epsilon=1e-5)

    def split(v: Value) -> Value:
        return b.transpose(b.reshape(v, shape=(*v.shape[:2], heads, d // heads)), perm=(0, 2, 1, 3))

    q, k, v = (split(linear(x, d, seed)) for seed in (1, 2, 3))
    y = b.attention(q, k, v, scale=0.25, causal=False, softcap=0.0)
    y = b.reshape(b.transpose(y, perm=(0, 2, 1, 3)), shape=x.shape)
    x = norm(b.add(linear(y, d, 4), x))
    return norm(b.add(linear(b.gelu(linear(x, 96, 5), approximate="none"), d, 6), x))


IMAGE = Type(F32, (1, 3, 32, 40))
NETS: dict[str, tuple[Callable[..., Value], Type]] = {
    "image": (residual_net, IMAGE),
    "tokens": (encoder, Type(F32, (2, 7, 48))),
}


def numbers(t: Type, seed: int = 0) -> np.ndarray:
    shape = [d if isinstance(d, int) else 5 for d in t.shape]
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def made(name: str) -> tuple[Graph, Narrowed, np.ndarray]:
    net, t = NETS[name]
    graph = build(net, t)
    return graph, narrow(graph), numbers(t)


def off(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def engine(graph: Graph, name: str, threads: int = 2) -> Engine:
    return Engine(build_image(graph, isa(name), False), threads, [])


@pytest.mark.parametrize("net", NETS)
@each_isa
def test_generated_code_means_the_narrowed_graph(net: str, name: str) -> None:
    graph, found, x = made(net)
    verify(found.graph)
    (want,) = reference.evaluate(found.graph, [x])
    for threads in (1, 2):
        got = engine(found.graph, name, threads).run({graph.inputs[0].name: x})[graph.outputs[0].name]
        assert got.dtype == np.float32 and np.isfinite(got).all()
        assert off(got, want) <= 2**-6


@pytest.mark.parametrize("net", NETS)
def test_error_against_f32(net: str) -> None:
    """Each product adds two roundings of at most 2**-9, and so does each of the few other values on the way."""
    graph, found, x = made(net)
    (want,), (got,) = reference.evaluate(graph, [x]), reference.evaluate(found.graph, [x])
    assert 0 < off(got, want) <= 4 * found.n_products * 2**-9
    assert found.n_products == {"image": 10, "tokens": 8}[net]


@pytest.mark.parametrize("net", NETS)
def test_no_cast_stands_alone(net: str) -> None:
    """But for the model's input, where the step that orders it rounds it, and what a norm leaves in f32 for an addition
    and a product reads.
    """
    _, found, _ = made(net)
    plan = lower(found.graph, best_isa(host()))
    casts = [s for s in steps_of(plan.body) if set(s.label.split("+")) == {"cast"}]
    norms = {v.name for n in found.graph.nodes if n.op.name == "layer_norm" for v in n.outputs}
    assert all(r.kind == "input" or r.name in norms for s in casts for r in s.reads)
    assert len(casts) <= {"image": 1, "tokens": 2}[net]
    stored = [s.dtype for s in plan.storages if s.kind == "arena" and isinstance(s.size, int) and s.size > 4096]
    assert net == "tokens" or set(stored) == {DType.bf16}


def test_sizes_that_show_when_it_runs() -> None:
    t = Type(F32, (symbol("batch", 0), symbol("tokens", 0), 48))
    graph = build(encoder, t)
    made = engine(narrow(graph).graph, best_isa(host()).level)
    for shape in ((1, 1, 48), (2, 9, 48), (1, 70, 48)):
        x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        (want,) = reference.evaluate(graph, [x])
        assert off(made.run({graph.inputs[0].name: x})[graph.outputs[0].name], want) <= 24 * 2**-9


@each_isa
def test_nan_and_infinity_pass(name: str) -> None:
    def net(b: Builder, x: Value) -> Value:
        return b.matmul(b.relu(b.matmul(x, b.const(weights(8, 16)))), b.const(weights(16, 5)))

    graph = build(net, Type(F32, (4, 8)))
    x = numbers(Type(F32, (4, 8)))
    x[1, 3], x[2, 0] = np.nan, np.inf
    got = engine(narrow(graph).graph, name).run({graph.inputs[0].name: x})[graph.outputs[0].name]
    assert np.isnan(got[1]).all() and not np.isfinite(got[2]).any() and np.isfinite(got[[0, 3]]).all()


@each_isa
def test_half_input_with_one_pad_for_two_readers(name: str) -> None:
    """Both convolutions read one padded buffer of halves; results of one or two channels are computed in f32."""

    def net(b: Builder, x: Value) -> list[Value]:
        y = b.relu(conv(b, x, 24))
        return [conv(b, y, 16, 3, seed=1), conv(b, y, 2, 3, seed=2)]

    graph = build(net, Type(F32, (1, 9, 11, 8)))
    found = narrow(graph).graph
    x = numbers(graph.inputs[0].type)
    got = engine(found, name).run({graph.inputs[0].name: x})
    for v, want in zip(graph.outputs, reference.evaluate(found, [x]), strict=True):
        assert off(got[v.name], want) <= 2**-6


GATES: dict[str, tuple[str, Callable[[Builder, Value], Value]]] = {
    "gelu": ("gelu_bf16", lambda b, x: b.gelu(x, approximate="none")),
    "gelu by tanh": ("sigmoid_bf16", lambda b, x: b.gelu(x, approximate="tanh")),
    "silu": ("sigmoid_bf16", lambda b, x: b.silu(x)),
    "gated": ("sigmoid_bf16", lambda b, x: b.mul(b.silu(x), b.relu(x))),
    "exp": ("exp2_bf16", lambda b, x: b.mul(b.exp(x), x)),
    "a sum": ("exp", lambda b, x: b.sub(b.exp(x), x)),
}


@each_isa
@pytest.mark.parametrize("gate", GATES)
def test_factors_of_what_is_rounded_are_as_exact_as_that_asks_for(name: str, gate: str) -> None:
    """Within 2**-8 of the exact result (one unit of bf16) or 2**-22; in sums, errors could grow beyond that."""
    wanted, make = GATES[gate]

    def net(b: Builder, x: Value) -> Value:
        y = make(b, b.matmul(x, b.const(np.eye(64, dtype=np.float32))))
        return b.matmul(y, b.const(np.eye(64, dtype=np.float32)))

    graph = build(net, Type(F32, (65, 64)))
    found = narrow(graph).graph
    first = next(s.spec for s in steps_of(lower(found, isa(name)).body) if isinstance(s.spec, Contraction))
    assert first.epilogue is not None
    assert {e.fn for e in walk(first.epilogue) if isinstance(e, Unary)} == {wanted}
    x = np.linspace(-9, 9, 65 * 64, dtype=np.float32).astype(DType.bf16.numpy).astype(np.float32).reshape(65, 64)
    (want,) = reference.evaluate(graph, [x])
    got = engine(found, name).run({graph.inputs[0].name: x})[graph.outputs[0].name]
    np.testing.assert_allclose(got, want, rtol=2.0**-8, atol=2.0**-22)


@each_isa
@pytest.mark.parametrize("gate", list(GATES)[:4])
def test_gates_that_are_rounded_to_bytes(name: str, gate: str) -> None:
    """One result of a hundred may be the neighbouring byte."""
    wanted, make = GATES[gate]

    def net(b: Builder, x: Value) -> Value:
        y = make(b, b.matmul(x, b.const(np.eye(64, dtype=np.float32))))
        return b.quantize(y, b.const(np.float32(0.04)), b.const(np.uint8(15)))

    graph = build(net, Type(F32, (65, 64)))
    first = next(s.spec for s in steps_of(lower(graph, isa(name)).body) if isinstance(s.spec, Contraction))
    assert first.epilogue is not None
    assert wanted in {e.fn for e in walk(first.epilogue) if isinstance(e, Unary)}
    assert not any(isinstance(e, Binary) and e.fn == "div" for e in walk(first.epilogue))
    x = np.linspace(-9, 9, 65 * 64, dtype=np.float32).reshape(65, 64)
    (want,) = reference.evaluate(graph, [x])
    got = engine(graph, name).run({graph.inputs[0].name: x})[graph.outputs[0].name]
    off_by = np.abs(got.astype(int) - want.astype(int))
    assert off_by.max() <= 1 and off_by.mean() <= 0.01


def test_what_is_read_in_f32_only_stays_f32() -> None:
    def net(b: Builder, x: Value) -> Value:
        return b.cumsum(b.relu(b.matmul(x, b.const(weights(64, 256)))), axis=1, exclusive=False, reverse=False)

    assert narrow(build(net, Type(F32, (64, 64)))).n_values == 0


def test_statistics_stay_f32() -> None:
    """A variance written out as E[x^2] - E[x]^2: rounded means would leave nothing of it."""

    def net(b: Builder, x: Value) -> Value:
        h = b.relu(b.matmul(x, b.const(weights(64, 256))))
        mean, square = (b.reduce_mean(v, axes=(0,), keepdims=False) for v in (h, b.mul(h, h)))
        variance = b.relu(b.sub(square, b.mul(mean, mean)))
        scale = b.div(b.const(np.float32(1)), b.sqrt(b.add(variance, b.const(np.float32(1e-6)))))
        return b.matmul(b.mul(b.sub(h, mean), scale), b.const(weights(256, 64, seed=1)))

    graph = build(net, Type(F32, (symbol("n", lo=64), 256, 64)))
    found = narrow(graph).graph
    narrowed = [n for n in found.nodes if n.op.name == "cast" and n.attrs["to"] is DType.bf16]
    assert narrowed and all(n.outputs[0].rank == 3 for n in narrowed)
    x = np.random.default_rng(0).standard_normal((64, 256, 64)).astype(np.float32)
    (want,), (got,) = reference.evaluate(graph, [x]), reference.evaluate(found, [x])
    assert off(got, want) < 2**-6


@each_isa
@pytest.mark.parametrize("perm", [(0, 1, 2), (0, 2, 1)])
@pytest.mark.parametrize("shared", [False, True])
def test_products_of_two_values_are_of_packed_halves(name: str, perm: tuple[int, ...], shared: bool) -> None:
    def net(b: Builder, x: Value, y: Value) -> Value:
        factor = b.transpose(b.relu(y), perm=perm)
        return b.relu(b.matmul(b.relu(x), b.reshape(factor, shape=(48, 33)) if shared else factor))

    n = 1 if shared else 3
    shape = (n, 48, 33) if perm[1] == 1 else (n, 33, 48)
    graph = build(net, Type(F32, (3, 20, 48)), Type(F32, shape))
    found = narrow(graph)
    assert found.n_products == 1 and found.n_values == 2
    steps = steps_of(lower(found.graph, isa(name)).body)
    assert [type(s.spec) for s in steps if s.label in ("pack", "matmul")] == [Pack, Contraction]
    xs = [numbers(v.type, seed) for seed, v in enumerate(graph.inputs)]
    (want,) = reference.evaluate(found.graph, xs)
    got = engine(found.graph, name).run({v.name: x for v, x in zip(graph.inputs, xs, strict=True)})
    np.testing.assert_allclose(got[graph.outputs[0].name], want, rtol=1e-5, atol=1e-4)


def test_weights_of_depthwise_convolutions_stay_f32() -> None:
    graph = build(
        lambda b, x: b.relu(conv(b, b.relu(conv(b, x, 64)), 64, 3, group=64, seed=5)), Type(F32, (1, 9, 9, 32))
    )
    found = narrow(graph)
    weights = [n.inputs[1].data for n in found.graph.nodes if n.op.name == "conv"]
    assert found.n_products == 2 and [holds(DType.bf16, w) for w in weights] == [True, False]
    specs = [s.spec for s in steps_of(lower(found.graph, best_isa(host())).body) if isinstance(s.spec, Depthwise)]
    assert specs and {(d.a.dtype, d.b.dtype) for d in specs} == {(DType.bf16, F32)}


@pytest.mark.parametrize(("channels", "k"), [(1, 7), (33, 1), (1, 1)])
def test_runs_that_fill_no_tile_register_are_multiplied_in_f32(channels: int, k: int) -> None:
    """Where the CPU has such registers; 7 bf16 of a row are no whole number of pairs."""
    t = Type(F32, (1, 9, 17, channels))
    graph = build(lambda b, x: b.relu(conv(b, b.relu(x), 20, k, stride=2)), t)
    found = narrow(graph)

    def factors(of: str) -> DType:
        (step,) = [s for s in steps_of(lower(found.graph, isa(of)).body) if isinstance(s.spec, Contraction)]
        return step.spec.a.dtype

    assert factors("avx512+avx512_bf16") is DType.bf16
    assert factors("avx512+amx_bf16+amx_tile+avx512_bf16") is F32
    x = numbers(t)
    (want,) = reference.evaluate(found.graph, [x])
    got = Engine(build_image(found.graph, best_isa(host()), False), 1, []).run({graph.inputs[0].name: x})[
        graph.outputs[0].name
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [2, symbol("N", 1)])
@pytest.mark.parametrize(("size", "n", "gathers"), [(14, 512, True), (14, 64, False), (28, 512, False)])
def test_rows_that_leave_tile_registers_half_empty_are_gathered(images: Any, size: int, n: int, gathers: bool) -> None:
    """7 pixels of every other one fill half of a register of 16 rows; with few columns copying them takes longer."""
    graph = build(lambda b, x: b.relu(conv(b, b.relu(x), n, stride=2)), Type(F32, (images, size, size, 32)))
    found = narrow(graph)

    def labels(of: str) -> list[str]:
        return [s.label for s in steps_of(lower(found.graph, isa(of)).body)]

    assert ("copy" in labels("avx512+amx_bf16+amx_tile+avx512_bf16")) is gathers
    assert "copy" not in labels("avx512+avx512_bf16")
    left = lower(found.graph, isa("avx512+amx_bf16+amx_tile+avx512_bf16"), frozenset({"gathered_rows"}))
    assert "copy" not in {s.label for s in steps_of(left.body)}
    x = numbers(Type(F32, (2, size, size, 32)))
    (want,) = reference.evaluate(found.graph, [x])
    got = Engine(build_image(found.graph, best_isa(host()), False), 2, []).run({graph.inputs[0].name: x})
    np.testing.assert_allclose(got[graph.outputs[0].name], want, rtol=1e-5, atol=1e-4)


def test_sums_that_a_product_reads_through_movers_are_stored_narrow() -> None:
    def net(b: Builder, x: Value) -> Value:
        power = b.reduce_sum(b.mul(x, x), axes=(4,), keepdims=False)
        wide = b.pad(power, before=(0, 0, 2, 0), after=(0, 0, 0, 0), mode="constant", value=0.0)
        return b.relu(conv(b, b.concat(wide, wide, axis=3), 20, 3))

    found = narrow(build(net, Type(F32, (1, 32, 30, 8, 2))))
    assert found.n_products == 1


def test_rounding() -> None:
    x = np.array([1.0, 1 + 2**-9, 1 + 3 * 2**-9, -np.inf, 3.4e38], np.float32)
    y = rounded(x)
    assert not holds(DType.bf16, x) and holds(DType.bf16, y)
    np.testing.assert_array_equal(y, np.array([1, 1, 1 + 2**-7, -np.inf, np.inf], np.float32))


def test_falls_back_to_f32_and_says_so() -> None:
    graph = build(encoder, NETS["tokens"][1])
    with events.collecting() as heard:
        engine = vivace.compile(graph, precision="bf16", target="sse", threads=1)
    assert engine.stats["precision"] == "f32" and "sse" in str(engine.stats["precision_note"])
    assert any(isinstance(r, events.Notice) and r.source == "precision" for r in heard)


def test_emulated_when_forced_and_measured_on_inputs() -> None:
    graph = build(encoder, NETS["tokens"][1])
    sample = {graph.inputs[0].name: numbers(NETS["tokens"][1])}
    with knobs.scope(emulate=True):
        engine = vivace.compile(graph, precision="bf16", target="sse", threads=1, calibration=sample)
    assert engine.stats["precision"] == "bf16" and engine.stats["n_narrow_products"] == 8
    error = cast(Any, engine.stats["precision_error"])[0]
    assert 30 < error["snr_db"] < 60 and error["n_special"] == 0


@pytest.mark.parametrize("net", NETS)
@each_isa
def test_f16_means_the_narrowed_graph_and_is_nearer(net: str, name: str) -> None:
    """Three bits more than bf16: an eighth of its errors."""
    t = NETS[net][1]
    graph, x = build(*NETS[net]), numbers(t)
    f16, bf16 = narrow(graph, DType.f16), narrow(graph)
    verify(f16.graph)
    (exact,), (want,), (other,) = (reference.evaluate(g, [x]) for g in (graph, f16.graph, bf16.graph))
    got = engine(f16.graph, name).run({graph.inputs[0].name: x})[graph.outputs[0].name]
    assert off(got, want) <= 2**-9
    assert 0 < off(want, exact) <= off(other, exact) / 2


def test_f16_overflows_to_infinity_and_keeps_denormals() -> None:
    def net(b: Builder, x: Value) -> Value:
        return b.matmul(b.relu(b.matmul(x, b.const(np.eye(8, dtype=np.float32)))), b.const(np.eye(8, dtype=np.float32)))

    graph = build(net, Type(F32, (4, 8)))
    x = np.full((4, 8), 2.0**-20, np.float32)
    x[1], x[2] = 2.0**-24, 65520
    got = engine(narrow(graph, DType.f16).graph, best_isa(host()).level).run({graph.inputs[0].name: x})
    y = got[graph.outputs[0].name]
    assert (y[0] == 2.0**-20).all() and (y[1] == 2.0**-24).all() and not np.isfinite(y[2]).any()


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_what_does_not_pay_is_said(precision: str) -> None:
    graph = build(encoder, NETS["tokens"][1])
    engine = vivace.compile(graph, precision=precision, target="avx2" if "avx2" in HERE else "sse", threads=1)
    assert engine.stats["precision"] == "f32" and f"no {precision} products" in str(engine.stats["precision_note"])


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="f7"):
        vivace.compile(build(encoder, NETS["tokens"][1]), precision="f7")


def test_sums_of_integers_are_not_stored_in_f16() -> None:
    """They may be larger than its largest number; what a scale made of them is not."""

    def head(b: Builder, x: Value) -> Value:
        y, w = b.cast(x, to=F32), b.const(weights(64, 64))
        one, other = (b.matmul(b.mul(y, b.const(np.float32(s))), w) for s in (1e-4, 1e-5))
        return b.add(one, other)

    graph = build(head, Type(DType.i32, (100, 64)))
    found = narrow(graph, DType.f16)
    assert found.n_products == 2
    (want,), (got,) = (reference.evaluate(g, [np.full((100, 64), 70_000, np.int32)]) for g in (graph, found.graph))
    assert off(got, want) < 2**-9
