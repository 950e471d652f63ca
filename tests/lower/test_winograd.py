"""Convolutions with fewer products: exact matrices, every shape and epilogue against `conv`, errors against f64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from tests.lower.harness import HERE, build, check, run_plan

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.base.machine import ISAS, CacheLevel, Isa, Machine, host, isa
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Node, Type, Value
from vivace.loops.blocked import Blocked
from vivace.lower.cook_toom import PAIRS, amplification, cook_toom
from vivace.lower.lowering import lower
from vivace.lower.plan import Plan, steps_of
from vivace.lower.rules import winograd

RNG = np.random.default_rng(11)
F32 = DType.f32
TOLERANCE = 1e-5


def conv(
    b: Builder, x: Value, n_out: int, pad: int = 1, bias: bool = True, layout: str = "NHWC",
    kernel: tuple[int, ...] = (3, 3), **attrs: object
) -> Value:  # fmt: skip
    rng = np.random.default_rng(3)
    channels = x.shape[-1 if layout == "NHWC" else 1]
    assert isinstance(channels, int)
    w = b.const((rng.standard_normal((n_out, channels, *kernel)) / np.sqrt(9 * channels)).astype(np.float32))
    pads, ones = tuple(pad if k > 1 else 0 for k in kernel), (1,) * len(kernel)
    base: dict[str, object] = {"strides": ones, "dilations": ones, "before": pads, "after": pads, "group": 1}
    ins = (x, w, b.const(rng.standard_normal(n_out).astype(np.float32))) if bias else (x, w)
    return b.conv(*ins, layout=layout, **{**base, **attrs})


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def blocked(plan: Plan) -> int:
    return sum(isinstance(s.spec, Blocked) for s in steps_of(plan.body))


@pytest.fixture(params=[(2, 2), (4, 4), (4, 2)], ids=str)
def m(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Every convolution that can is lowered with this m for rows and columns."""
    size: tuple[int, int] = request.param
    use(monkeypatch, size)
    return size


def use(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int] | None) -> None:
    def choose(node: Node, isa: Isa, half: bool = False) -> tuple[int, int] | None:
        if size is None or not winograd.is_possible(node):
            return None
        return size if size in winograd.sizes(node) else winograd.sizes(node)[-1]

    monkeypatch.setattr(winograd, "choose", choose)


@pytest.mark.parametrize("size", sorted(PAIRS))
def test_matrices_compute_the_convolution_exactly(size: int) -> None:
    t = cook_toom(size)
    for k in range(3):
        for i in range(t.n):
            d = [Fraction(int(j == i)) for j in range(t.n)]
            products = [sum(a * b for a, b in zip(row, d)) * g[k] for row, g in zip(t.bt, t.g)]
            y = [sum(a * p for a, p in zip(row, products)) for row in t.at]
            assert y == [Fraction(int(o + k == i)) for o in range(size)]


@pytest.mark.parametrize("size", sorted(PAIRS))
def test_coefficients_are_exact_in_f32(size: int) -> None:
    t = cook_toom(size)
    for x in (x for row in (*t.at, *t.bt) for x in row):
        assert Fraction(float(np.float32(float(x)))) == x


def test_amplification_is_what_the_rule_states() -> None:
    assert [round(amplification(m), 1) for m in (1, 2, 4)] == [1, 8, 27.4]


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(
    ("shape", "n_out"),
    [
        ((2, 9, 7, 20), 24),
        ((1, 5, 3, 3), 70),
        ((3, 4, 4, 33), 1),
        ((1, 13, 30, 40), 50),
    ],
)
def test_shapes(m: tuple[int, int], isa: str, shape: tuple[int, ...], n_out: int) -> None:
    plan = check(build(lambda b, x: conv(b, x, n_out), Type(F32, shape)), random(*shape), isas=(isa,), tol=TOLERANCE)
    assert blocked(plan) == 1


def test_random_shapes(m: tuple[int, int]) -> None:
    rng = np.random.default_rng(17)
    for _ in range(6):
        n, h, w, c, k = (int(rng.integers(1, most)) for most in (3, 20, 20, 50, 70))
        pad = int(rng.integers(0 if min(h, w) > 2 else 1, 3))
        g = build(lambda b, x, k=k, pad=pad: conv(b, x, k, pad), Type(F32, (n, h, w, c)))
        check(g, random(n, h, w, c), isas=(HERE[-1],), tol=TOLERANCE)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("shape", "n_out"), [((2, 9, 7, 20), 24), ((1, 6, 13, 33), 70)])
def test_stride_2(monkeypatch: pytest.MonkeyPatch, isa: str, shape: tuple[int, ...], n_out: int) -> None:
    use(monkeypatch, (2, 2))
    g = build(lambda b, x: b.relu(conv(b, x, n_out, strides=(2, 2))), Type(F32, shape))
    assert blocked(check(g, random(*shape), isas=(isa,), tol=TOLERANCE)) == 1


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 9, 7), (0, 4, 4), (1, 30, 31)])
def test_stride_2_with_symbolic_dims(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int]) -> None:
    use(monkeypatch, (2, 2))
    shape: tuple[Dim, ...] = (symbol("N", 0), symbol("H", 0), symbol("W", 0), 24)
    g = build(lambda b, x: conv(b, x, 40, strides=(2, 2)), Type(F32, shape))
    check(g, random(*size, 24), isas=(HERE[-1],), tol=TOLERANCE)


def test_errors_at_stride_2_stay_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, (2, 2))
    x = random(1, 16, 16, 256)
    g = build(lambda b, v: conv(b, v, 32, bias=False, strides=(2, 2)), Type(F32, x.shape))
    want = exact_conv(x, g.nodes[0])[:, ::2, ::2]
    error = np.abs(run_plan(lower(g, ISAS[HERE[-1]]), [x], {}, HERE[-1])[0] - want).max()
    w = g.nodes[0].inputs[1]
    assert w is not None and w.data is not None
    assert error < (256 + 20) * 2.0**-24 * 256 * np.abs(w.data).max() * np.abs(x).max() * amplification(2, 2) ** 2
    assert error < 3e-6 * np.abs(want).max()


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 9, 7), (1, 0, 5), (0, 4, 4), (1, 30, 31), (1, 2, 40)])
def test_symbolic_dims(m: tuple[int, int], size: tuple[int, int, int]) -> None:
    shape: tuple[Dim, ...] = (symbol("N", 0), symbol("H", 0), symbol("W", 0), 24)
    check(
        build(lambda b, x: b.relu(conv(b, x, 40)), Type(F32, shape)), random(*size, 24), isas=(HERE[-1],), tol=TOLERANCE
    )


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_bias_residual_and_activation_are_the_epilogue(m: tuple[int, int], isa: str, layout: str) -> None:
    shape, out = ((1, 10, 9, 18), (1, 10, 9, 36)) if layout == "NHWC" else ((1, 18, 10, 9), (1, 36, 10, 9))

    def make(b: Builder, x: Value, r: Value) -> Value:
        return b.relu(b.add(conv(b, x, 36, layout=layout), b.mul(r, b.sigmoid(r))))

    check(build(make, Type(F32, shape), Type(F32, out)), random(*shape), random(*out), isas=(isa,), tol=TOLERANCE)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(
    ("shape", "kernel", "layout"),
    [
        ((1, 37, 24), (3,), "NHWC"),
        ((2, 24, 30), (3,), "NCHW"),
        ((1, 9, 10, 17), (1, 3), "NHWC"),
        ((2, 13, 6, 17), (3, 1), "NHWC"),
    ],
)
def test_lines(
    monkeypatch: pytest.MonkeyPatch, isa: str, shape: tuple[int, ...], kernel: tuple[int, ...], layout: str
) -> None:
    def make(b: Builder, x: Value) -> Value:
        y = conv(b, x, 40, layout=layout, kernel=kernel)
        return b.add(b.relu(y), y)

    for k in PAIRS:
        use(monkeypatch, (k if kernel[0] > 1 and len(kernel) > 1 else 1, k if kernel[-1] > 1 else 1))
        plan = check(build(make, Type(F32, shape)), random(*shape), isas=(isa,), tol=TOLERANCE)
        assert blocked(plan) == 1


@pytest.mark.parametrize("axis", [1, 3])
def test_results_are_written_into_their_part_of_a_concatenation(m: tuple[int, int], axis: int) -> None:
    def make(b: Builder, x: Value) -> Value:
        return b.concat(conv(b, x, 16), b.relu(conv(b, x, 16, bias=False)), x, axis=axis)

    g = build(make, Type(F32, (1, 7, 6, 16)))
    plan = check(g, random(1, 7, 6, 16), isas=(HERE[-1],), tol=TOLERANCE)
    assert blocked(plan) == 2


def test_a_chain_writes_into_padded_buffers(m: tuple[int, int]) -> None:
    g = build(lambda b, x: conv(b, b.relu(conv(b, x, 20)), 12, pad=2), Type(F32, (2, 6, 11, 8)))
    check(g, random(2, 6, 11, 8), isas=(HERE[-1],), tol=TOLERANCE)


def test_memory_outside_the_input_is_not_read(m: tuple[int, int]) -> None:
    """Guard zones around every storage hold huge numbers: one of them in a tile would show."""
    g = build(lambda b, x: conv(b, x, 16, pad=0), Type(F32, (1, 9, 8, 16)))
    plan = lower(g, ISAS[HERE[-1]])
    x = random(1, 9, 8, 16)
    many, one = (run_plan(plan, [x], {}, HERE[-1], parts=p)[0] for p in (5, 1))
    assert np.array_equal(many, one)
    assert np.abs(many).max() < 10


@pytest.mark.parametrize("threads", [1, 2])
def test_engines_with_threads(m: tuple[int, int], threads: int) -> None:
    from tests.images import build_image

    from vivace.runtime.engine import Engine

    def make(b: Builder, x: Value) -> Value:
        return conv(b, b.relu(conv(b, x, 64)), 96)

    g = build(make, Type(F32, (1, 29, 30, 48)))
    x = random(1, 29, 30, 48)
    engine = Engine(build_image(g, ISAS[HERE[-1]], False), threads)
    want = exact_conv(np.maximum(exact_conv(x, g.nodes[0]), 0), g.nodes[-1])
    for _ in range(3):
        got = engine(x)
        assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()


def exact_conv(x: np.ndarray, node: Node) -> np.ndarray:
    """A 3x3 convolution of a channels-last image in f64."""
    before, after = node.attrs["before"], node.attrs["after"]
    wide = np.pad(x.astype(np.float64), ((0, 0), *zip(before, after), (0, 0)))
    w = node.inputs[1]
    assert w is not None and w.data is not None
    h, wd = wide.shape[1] - 2, wide.shape[2] - 2
    total = sum(
        wide[:, i : i + h, j : j + wd] @ w.data[:, :, i, j].T.astype(np.float64) for i in range(3) for j in range(3)
    )
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return total if bias is None or bias.data is None else total + bias.data  # type: ignore[return-value]


@pytest.mark.parametrize("channels", [64, 512])
@pytest.mark.parametrize("positive", [False, True])
def test_errors_stay_within_the_bounds_that_the_rule_states(
    monkeypatch: pytest.MonkeyPatch, channels: int, positive: bool
) -> None:
    """Largest and mean square error over the results' largest magnitude; `positive` inputs are what a ReLU leaves."""
    x = random(1, 16, 16, channels)
    x = np.maximum(x, 0) if positive else x
    g = build(lambda b, v: conv(b, v, 32, bias=False), Type(F32, x.shape))
    want = exact_conv(x, g.nodes[0])
    largest: dict[int, float] = {}
    typical: dict[int, float] = {}
    for size in (0, *PAIRS):
        use(monkeypatch, (size, size) if size else None)
        got = run_plan(lower(g, ISAS[HERE[-1]]), [x], {}, HERE[-1])[0]
        largest[size] = float(np.abs(got - want).max() / np.abs(want).max())
        typical[size] = float(np.sqrt(np.mean((got - want) ** 2)) / np.abs(want).max())
    w = g.nodes[0].inputs[1]
    assert w is not None and w.data is not None
    for size in PAIRS:
        rounded = (channels + 20) * 2.0**-24
        bound = rounded * channels * np.abs(w.data).max() * np.abs(x).max() * amplification(size) ** 2
        assert largest[size] * np.abs(want).max() < bound
        assert largest[size] < winograd.LARGEST_ERROR
        assert typical[size] < 4 * typical[0], (typical, size)


def anchor(x: tuple[Dim, ...], n_out: int, kernel: tuple[int, ...] = (3, 3), **attrs: object) -> Node:
    return build(lambda b, v: conv(b, v, n_out, pad=0, kernel=kernel, **attrs), Type(F32, x)).nodes[-1]  # type: ignore[arg-type]


def with_cache(n_bytes: int) -> Machine:
    """A machine with a second-level cache of a size."""
    return replace(host(), caches=(CacheLevel(2, "unified", n_bytes, 16, 64, 1),))


@pytest.mark.parametrize(
    ("make", "m"),
    [
        (lambda: anchor((1, 58, 58, 64), 64), (4, 4)),
        (lambda: anchor((1, 4, 4, 64), 64), None),
        (lambda: anchor((1, 34, 34, 4), 4), None),
        (lambda: anchor((1, symbol("H", 2), symbol("W", 2), 64), 64), (4, 4)),
        (lambda: anchor((1, 3002, 384), 384, (3,)), (1, 4)),
        (lambda: anchor((1, 58, 58, 64), 64, (1, 3)), (1, 4)),
        (lambda: anchor((1, 58, 58, 64), 64, (3, 1)), (4, 1)),
        (lambda: anchor((1, 58, 58, 64), 64, (5, 5)), None),
        (lambda: anchor((1, 58, 58, 64), 64, strides=(2, 2)), (2, 2)),
        (lambda: anchor((1, 58, 58, 3), 64, strides=(2, 2)), None),
        (lambda: anchor((1, 58, 58, 64), 64, strides=(1, 2)), None),
        (lambda: anchor((1, 58, 58, 64), 64, strides=(3, 3)), None),
        (lambda: anchor((1, 58, 58, 64), 64, dilations=(2, 2)), None),
    ],
)
def test_choice(make: Callable[[], Node], m: tuple[int, int] | None) -> None:
    assert winograd.choose(make(), ISAS["avx512"], machine=with_cache(1 << 20)) == m


def test_weights_that_leave_the_cache_are_read_in_few_blocks_and_count_for_each() -> None:
    """28x28x128 with m = 4 has 49 tiles and 2.25 MiB of U."""
    node = anchor((1, 30, 30, 128), 128)
    w = node.inputs[1]
    assert w is not None
    small, large, huge = (with_cache(n << 20) for n in (1, 2, 8))
    assert [-(-49 // winograd.block_tiles(49, (4, 4), w, 32, x)) for x in (small, large, huge)] == [3, 2, 1]
    many = anchor((1, 16, 16, 256), 256)  # 9 MiB of U with m = 4, 4 MiB with m = 2
    assert winograd.choose(many, ISAS["avx512"], machine=small) == (2, 2)
    assert winograd.choose(node, ISAS["avx512"], machine=large) == (4, 4)


def test_few_pixels_with_many_channels_get_smaller_weights() -> None:
    found = winograd.choose(anchor((1, 9, 9, 512), 512), ISAS["avx512"])
    assert found in ((2, 2), (2, 4), (4, 2))


def test_the_largest_m_bounds_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    node = anchor((1, 58, 58, 64), 64)
    for largest, m in ((2, (2, 2)), (0, None)):
        monkeypatch.setattr(winograd, "LARGEST_M", largest)
        assert winograd.choose(node, ISAS["avx512"]) == m


def test_weights_of_a_run_time_input_are_left_to_the_direct_way() -> None:
    def make(b: Builder, x: Value, w: Value) -> Value:
        return b.conv(x, w, strides=(1, 1), dilations=(1, 1), before=(1, 1), after=(1, 1), group=1, layout="NHWC")

    g: Graph = build(make, Type(F32, (1, 12, 12, 32)), Type(F32, (32, 32, 3, 3)))
    plan = check(g, random(1, 12, 12, 32), random(32, 32, 3, 3), isas=(HERE[-1],), tol=2e-4)
    assert blocked(plan) == 0


def test_tile_registers_leave_nothing_to_save() -> None:
    w = np.zeros((64, 64, 3, 3), np.float32)
    attrs = {"strides": (1, 1), "dilations": (1, 1), "before": (0, 0), "after": (0, 0), "group": 1, "layout": "NHWC"}
    graph = build(lambda b, x: b.conv(x, b.const(w), **attrs), Type(DType.f32, (1, 58, 58, 64)))
    tiles = isa("avx512+amx_bf16+amx_int8+amx_tile+avx512_bf16")
    assert winograd.choose(graph.nodes[0], tiles) is not None
    assert winograd.choose(graph.nodes[0], tiles, half=True) is None
