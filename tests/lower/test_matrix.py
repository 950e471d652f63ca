"""Every family of kernels x number format x instruction set against the reference: random shapes with tails, NaN,
infinities, denormals, extremes of integers. Bounds are those of docs/tolerances.md; integers and moved data are equal.

The same bits must come out whatever way the units of a step are cut and ordered (`tests.lower.harness`), and what is
said of threads is in `tests.races`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tolerance
from tests.lower.harness import build, run_plan

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.base.machine import host, isa, missing_flags
from vivace.graph import reference
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.lower.lowering import lower
from vivace.lower.precision import narrow
from vivace.targets.cpu.amx import is_permitted

Array = np.ndarray
F32 = DType.f32
_AMX = "+amx_bf16+amx_int8+amx_tile"
SETS = {
    "f32": ("sse", "avx2", "avx512"),
    "bf16": ("sse", "avx2", "avx512", "avx512+avx512_bf16", f"avx512+avx512_bf16{_AMX}"),
    "int8": ("sse", "avx2", "avx2+avx_vnni", "avx512", "avx512+avx512_vnni", f"avx512+avx512_vnni{_AMX}"),
}


def sets(form: str) -> list[object]:
    """The instruction sets of a format as test parameters; what this CPU lacks is skipped with that reason."""
    found = []
    for name in SETS[form]:
        missing = missing_flags(host(), isa(name))
        reason = f"the CPU lacks {', '.join(missing)}" if missing else "Linux refuses AMX"
        skip = bool(missing) or ("amx" in name and not is_permitted())
        found.append(pytest.param(name, id=name, marks=pytest.mark.skipif(skip, reason=reason)))
    return found


@dataclass
class Sample:
    """A graph of one operator, inputs for it, and how far its result may be from the exact one."""

    graph: Graph
    feeds: list[Array]
    bound: Callable[[Array], Array | float]


class Numbers:
    """Random shapes, and numbers of one mood: plain, special (some NaN and infinite), tiny (denormal), signed zeros."""

    MOODS = ("plain", "special", "tiny", "zeros")

    def __init__(self, random: Random, mood: str) -> None:
        self.random, self.mood = random, mood
        self.rng = np.random.default_rng(random.randrange(1 << 30))

    def size(self, *choices: int) -> int:
        return self.random.choice(choices or (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 48, 65))

    def plain(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape).astype(np.float32)

    def of(self, *shape: int) -> Array:
        x = self.plain(*shape)
        if self.mood == "tiny":
            x = np.ldexp(x, self.rng.integers(-148, -124, shape)).astype(np.float32)
        if self.mood == "zeros":
            x = np.where(self.rng.random(shape) < 0.5, np.copysign(np.float32(0), x), x)
        if self.mood == "special" and x.size:
            for value in (np.nan, np.inf, -np.inf)[: self.random.randint(1, 3)]:
                x.reshape(-1)[self.random.randrange(x.size)] = value
        return x


Family = Callable[[Numbers], Sample]


def magnitudes(make: Callable[..., object], feeds: Sequence[Array]) -> Array:
    """The sums of the magnitudes of the terms: the operator on the magnitudes of all operands."""
    wide = [np.abs(np.where(np.isfinite(x), x, 0)).astype(np.float32) for x in feeds]
    graph = build(lambda b, *xs: make(b, *xs, np.abs), *(Type(F32, x.shape) for x in feeds))
    with np.errstate(all="ignore"):
        return np.asarray(reference.evaluate(graph, wide)[0], np.float64) * (1 + 4 * tolerance.U) + tolerance.NORMAL


def linear(make: Callable[..., object], feeds: list[Array], n_terms: int, rows: Dim | None = None) -> Sample:
    """A sum of products; `make(b, *values, f)` builds it with `f` of its constants, `rows` is a symbol for axis 0."""
    types = [
        Type(F32, (rows if i == 0 and rows is not None else x.shape[0], *x.shape[1:])) for i, x in enumerate(feeds)
    ]
    graph = build(lambda b, *xs: make(b, *xs, lambda c: c), *types)
    size = magnitudes(make, feeds)
    return Sample(graph, feeds, lambda want: tolerance.of_sum(size, n_terms))


def matmul(n: Numbers) -> Sample:
    m, k, width, heads = n.size(), n.size(), n.size(), n.size(1, 3)
    if n.random.random() < 0.5:  # constant weights
        w = n.plain(k, width)
        return linear(lambda b, x, f: b.matmul(x, b.const(f(w))), [n.of(m, k)], k, symbol("M"))
    return linear(lambda b, x, y, f: b.matmul(x, y), [n.of(heads, m, k), n.plain(heads, k, width)], k)


def conv(n: Numbers) -> Sample:
    return _conv(n, "conv")


def conv_transpose(n: Numbers) -> Sample:
    return _conv(n, "conv_transpose", output_padding=(0, 0))


def _conv(n: Numbers, op: str, **more: object) -> Sample:
    c, out = n.size(1, 3, 8, 17, 32), n.size(1, 5, 16, 33)
    group = c if op == "conv" and n.random.random() < 0.4 else 1
    out = c if group > 1 else out
    kernel = (n.size(1, 2, 3), n.size(1, 3))
    w = n.plain(out, c // group, *kernel) if op == "conv" else n.plain(c, out, *kernel)
    bias, layout = n.plain(out), n.random.choice(("NCHW", "NHWC"))
    h, width = n.size(5, 8, 13), n.size(6, 9, 17)
    x = n.of(2, c, h, width) if layout == "NCHW" else n.of(2, h, width, c)
    attrs = {
        "strides": (n.size(1, 2), n.size(1, 2)), "dilations": (1, n.size(1, 2)), "before": (n.size(0, 1), 1),
        "after": (1, n.size(0, 1)), "group": group, "layout": layout, **more,
    }  # fmt: skip
    terms = c // group * kernel[0] * kernel[1]
    return linear(
        lambda b, x, f: getattr(b, op)(x, b.const(f(w)), b.const(f(bias)), **attrs), [x], terms + 1, symbol("N")
    )


def sums(n: Numbers) -> Sample:
    shape = (n.size(), n.size(1, 3, 16), n.size())
    axes = n.random.choice([(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
    op, keep = n.random.choice(("reduce_sum", "reduce_mean")), n.random.random() < 0.5
    count = int(np.prod([shape[a] for a in axes]))
    return linear(lambda b, x, f: getattr(b, op)(x, axes=axes, keepdims=keep), [n.of(*shape)], count)


def avg_pool(n: Numbers) -> Sample:
    x = n.of(2, n.size(5, 9), n.size(6, 17), n.size(1, 3, 16, 33))
    attrs = {"kernel": (2, 3), "strides": (1, 2), "dilations": (1, 1), "before": (1, 0), "after": (1, 1)}
    count = n.random.random() < 0.5
    return linear(lambda b, x, f: b.avg_pool(x, **attrs, count_include_pad=count, layout="NHWC"), [x], 6)


def softmax(n: Numbers) -> Sample:
    x = n.of(n.size(), n.size(), n.size()) * np.float32(3)
    axis = n.size(0, 1, 2)
    graph = build(lambda b, v: b.softmax(v, axis=axis), Type(F32, x.shape))
    with np.errstate(invalid="ignore"):
        bound = tolerance.of_softmax(x.astype(np.float64), axis)
    return Sample(graph, [x], lambda want: bound)


def layer_norm(n: Numbers) -> Sample:
    """Off by what centring and the variance are, each a sum of `size` terms, times the slope of the quotient."""
    size, kind = n.size(), n.random.choice(("layer_norm", "rms_norm"))
    x, scale, bias = n.of(n.size(), size), n.plain(size), n.plain(size)

    def make(b: Builder, v: Value) -> Value:
        operands = [b.const(scale), b.const(bias)][: 2 if kind == "layer_norm" else 1]
        return getattr(b, kind)(v, *operands, axis=1, epsilon=1e-2)

    with np.errstate(invalid="ignore"):
        wide = np.abs(np.nan_to_num(x.astype(np.float64), posinf=0, neginf=0))
        centred = (wide + wide.mean(1, keepdims=True)) / 0.1  # the least deviation is sqrt(epsilon)
    bound = (size + 8) * 4 * tolerance.U * (centred * (1 + centred**2)) * np.abs(scale) + 4 * tolerance.U
    return Sample(build(make, Type(F32, x.shape)), [x], lambda want: bound + 2 * tolerance.U * np.abs(want))


def attention(n: Numbers) -> Sample:
    """Scores are off as sums, what enters softmax moves its result by as much, and the result is a weighted mean."""
    heads, s, t, d, e = 2, n.size(), n.size(), n.size(4, 16, 20), n.size(5, 16, 33)
    q, k, v = n.of(1, heads, s, d), n.plain(1, heads, t, d), n.plain(1, heads, t, e)
    attrs = {"scale": 0.3, "causal": n.random.random() < 0.5 and t >= s, "softcap": 0.0}
    graph = build(lambda b, *xs: b.attention(*xs, **attrs), *(Type(F32, x.shape) for x in (q, k, v)))
    finite = np.abs(np.nan_to_num(q, posinf=0, neginf=0)).astype(np.float64)
    scores = (finite @ np.abs(k.astype(np.float64)).swapaxes(-1, -2) * 0.3).max(initial=0.0)
    bound = ((2 * d + 8) * scores + 2 * t + 24) * 2 * tolerance.U * np.abs(v).max(initial=0.0)
    return Sample(graph, [q, k, v], lambda want: bound)


FUNCTIONS = (
    "exp",
    "tanh",
    "sigmoid",
    "erf",
    "sqrt",
    "silu",
    "gelu",
    "hard_swish",
    "relu",
    "neg",
    "abs",
    "floor",
    "round",
)


def functions(n: Numbers) -> Sample:
    """Polynomials: a few ulp of the result or of 1, as their records say."""
    name = n.random.choice(FUNCTIONS)
    x = n.of(n.size(), n.size(), n.size(1, 4, 17))
    graph = build(lambda b, v: getattr(b, name)(v), Type(F32, x.shape))
    op = graph.nodes[0].op
    return Sample(graph, [x], lambda want: op.tolerance * (1 + np.nan_to_num(np.abs(want), posinf=0)))


def exact(n: Numbers) -> Sample:
    """Choices and moves: the bits of an operand."""
    shape = (n.size(2, 5), n.size(4, 9), n.size())
    x, at = n.of(*shape), n.rng.integers(-shape[1], shape[1], (2, 3))
    moves: list[Callable[[Builder, Value], Value]] = [
        lambda b, v: b.transpose(v, perm=(2, 0, 1)),
        lambda b, v: b.slice(
            v, starts=(0, shape[1] - 1, 0), sizes=(shape[0], shape[1] // 2, shape[2]), steps=(1, -2, 1)
        ),
        lambda b, v: b.pad(v, before=(0, 1, 2), after=(1, 0, 3), mode="constant", value=1.5),
        lambda b, v: b.gather(v, b.const(at), axis=1),
        lambda b, v: b.concat(v, b.transpose(v, perm=(0, 1, 2)), axis=2),
        lambda b, v: b.reduce_max(v, axes=(n.size(0, 1, 2),), keepdims=False),
        lambda b, v: b.max(v, b.const(np.float32(0.25))),
        lambda b, v: b.where(b.lt(v, b.const(np.float32(0))), b.neg(v), v),
    ]
    return Sample(build(n.random.choice(moves), Type(F32, shape)), [x], lambda want: 0.0)


FAMILIES: tuple[Family, ...] = (
    matmul, conv, conv_transpose, sums, avg_pool, softmax, layer_norm, attention, functions, exact
)  # fmt: skip


def results(graph: Graph, feeds: Sequence[Array], target: str) -> Array:
    """What generated code gives; the same bits, cut and ordered in two ways."""
    plan = lower(graph, isa(target))
    dims = reference.bind((v, x.shape) for v, x in zip(plan.inputs, feeds, strict=True))
    (got,) = run_plan(plan, feeds, dims, target, 3)
    (whole,) = run_plan(plan, feeds, dims, target, 1)
    assert got.tobytes() == whole.tobytes()
    return got


@pytest.mark.parametrize("target", sets("f32"))
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
@settings(max_examples=6)
@given(random=st.randoms(use_true_random=False), mood=st.sampled_from(Numbers.MOODS))
def test_f32(family: Family, target: str, random: Random, mood: str) -> None:
    sample = family(Numbers(random, mood))
    with np.errstate(all="ignore"):
        (want,) = reference.evaluate(sample.graph, sample.feeds)
    why = tolerance.agree(results(sample.graph, sample.feeds, target), want, sample.bound(want))
    assert not why, f"{why}\n{sample.graph}"


@pytest.mark.parametrize("target", sets("bf16"))
@settings(max_examples=8)
@given(random=st.randoms(use_true_random=False), is_conv=st.booleans(), mood=st.sampled_from(Numbers.MOODS))
def test_bf16(target: str, random: Random, is_conv: bool, mood: str) -> None:
    """Products of bf16 that are summed in f32, and rounded to bf16 by their reader."""
    n = Numbers(random, mood)
    sample = (conv if is_conv else matmul)(n)
    graph = narrow(sample.graph).graph
    with np.errstate(all="ignore"):
        (want,) = reference.evaluate(graph, sample.feeds)
        size = sample.bound(want) / tolerance.U  # at least the magnitude of the terms times their number
    bound = tolerance.of_bf16_result(np.nan_to_num(want, posinf=0, neginf=0), tolerance.of_bf16_sum(size, 2) * 4)
    why = tolerance.agree(results(graph, sample.feeds, target), want, bound)
    assert not why, f"{why}\n{graph}"


@pytest.mark.parametrize("target", sets("int8"))
@settings(max_examples=8)
@given(random=st.randoms(use_true_random=False), is_conv=st.booleans(), is_signed=st.booleans(), extreme=st.booleans())
def test_int8(target: str, random: Random, is_conv: bool, is_signed: bool, extreme: bool) -> None:
    """Products of bytes are exact, also where every byte is an extreme."""
    n = Numbers(random, "plain")
    dtype = np.int8 if is_signed else np.uint8

    def data(kind: type, *shape: int) -> Array:
        low, high = np.iinfo(kind).min, np.iinfo(kind).max
        some = n.rng.integers(low, high + 1, shape)
        return (
            np.where(n.rng.random(shape) < 0.9, n.rng.choice([low, high], shape), some).astype(kind)
            if extreme
            else (some.astype(kind))
        )

    zero = data(dtype, 1).reshape(())
    k, out = n.size(1, 3, 4, 8, 17, 32, 64, 96), n.size()
    bias = n.rng.integers(-(1 << 20), 1 << 20, out).astype(np.int32)
    if is_conv:
        kernel = n.size(1, 3)
        x, w = data(dtype, 1, n.size(4, 7), n.size(5, 18), k), data(np.int8, out, k, kernel, kernel)
        attrs = {
            "strides": (1, n.size(1, 2)),
            "dilations": (1, n.size(1, 2)),
            "before": (1, 1),
            "after": (1, 0),
            "group": 1,
        }

        def make(b: Builder, v: Value) -> Value:
            return b.conv_integer(v, b.const(w), b.const(zero), b.const(bias), **attrs, layout="NHWC")
    else:
        x, w = data(dtype, n.size(), k), data(np.int8, k, out)

        def make(b: Builder, v: Value) -> Value:
            return b.matmul_integer(v, b.const(w), b.const(zero), b.const(bias))

    graph = build(make, Type(DType.of(x.dtype), x.shape))
    (want,) = reference.evaluate(graph, [x])
    np.testing.assert_array_equal(results(graph, [x], target), want)


@pytest.mark.parametrize("target", sets("int8"))
def test_int8_taps_with_gaps(target: str) -> None:
    """One channel and a dilation: nothing lies side by side, so runs have one element."""
    rng = np.random.default_rng(0)
    x, w = rng.integers(0, 256, (1, 9, 12, 1)).astype(np.uint8), rng.integers(-128, 128, (5, 1, 3, 3)).astype(np.int8)
    attrs = {"strides": (1, 1), "dilations": (1, 2), "before": (1, 1), "after": (1, 1), "group": 1, "layout": "NHWC"}
    graph = build(lambda b, v: b.conv_integer(v, b.const(w), b.const(np.uint8(3)), **attrs), Type(DType.u8, x.shape))
    np.testing.assert_array_equal(results(graph, [x], target), reference.evaluate(graph, [x])[0])
