"""Random graphs: the engine, at several sizes and thread counts, gives what the reference evaluator gives.

A graph is grown from a few inputs by choosing an operator that fits some of the values so far. What it returns are some
of its values, also inputs, views and values that others read, so that placement, epilogues and views meet in ways that
no model has shown yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import races
from tests.images import build_image

from vivace.base.dims import Dim, evaluate, symbol
from vivace.base.dtypes import DType
from vivace.building import optimize_for_native
from vivace.graph import reference
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.graph.text import print_graph
from vivace.options import choose_isa
from vivace.runtime.engine import Engine

N, S = symbol("N"), symbol("S")
SIZES = ({"N": 1, "S": 1}, {"N": 2, "S": 19}, {"N": 3, "S": 8}, {"N": 0, "S": 5}, {"N": 2, "S": 19})
UNARY = ("neg", "abs", "tanh", "sigmoid", "relu", "silu", "hard_swish", "erf", "sin", "identity_mul")
Make = Callable[["Garden", Value], Value | None]


@dataclass
class Garden:
    """A graph under construction, and the values that may be used."""

    random: Random
    numbers: np.random.Generator
    b: Builder = field(default_factory=Builder)
    values: list[Value] = field(default_factory=list)

    def array(self, *shape: int) -> np.ndarray:
        return self.numbers.uniform(-1, 1, shape).astype(np.float32)

    def const(self, *shape: int) -> Value:
        return self.b.const(self.array(*shape))

    def another(self, fits: Callable[[Value], bool]) -> Value | None:
        found = [v for v in self.values if v.dtype is DType.f32 and fits(v)]
        return self.random.choice(found) if found else None


def unary(g: Garden, x: Value) -> Value:
    fn = g.random.choice(UNARY)
    if fn == "identity_mul":
        return g.b.mul(x, g.b.const(np.float32(0.5)))
    return getattr(g.b, fn)(x)


def binary(g: Garden, x: Value) -> Value | None:
    y = g.another(lambda v: broadcasts(v.shape, x.shape))
    if y is None or g.random.random() < 0.2:
        y = row_of(g, x)
    fn = getattr(g.b, g.random.choice(("add", "sub", "mul", "max", "min")))
    return fn(x, y) if g.random.random() < 0.5 else fn(y, x)


def row_of(g: Garden, x: Value) -> Value:
    """A constant that broadcasts against `x`."""
    shape = tuple(d if isinstance(d, int) and g.random.random() < 0.7 else 1 for d in x.shape)
    return g.const(*shape[g.random.randrange(len(shape) + 1) :])


def broadcasts(small: tuple[Dim, ...], large: tuple[Dim, ...]) -> bool:
    return len(small) <= len(large) and all(a in (1, b) for a, b in zip(small[::-1], large[::-1], strict=False))


def choose(g: Garden, x: Value) -> Value | None:
    y, z = (g.another(lambda v: v.shape == x.shape) for _ in range(2))
    return None if y is None or z is None else g.b.where(g.b.lt(x, y), z, x)


def transpose(g: Garden, x: Value) -> Value:
    perm = list(range(x.rank))
    g.random.shuffle(perm)
    return g.b.transpose(x, perm=tuple(perm))


def reshape(g: Garden, x: Value) -> Value | None:
    shape = list(x.shape)
    way = g.random.choice(("merge", "split", "ones", "drop"))
    at = g.random.randrange(len(shape)) if shape else 0
    if way == "merge" and at + 1 < len(shape):
        shape[at : at + 2] = [shape[at] * shape[at + 1]]
    elif way == "split" and shape and isinstance(shape[at], int) and shape[at] % 2 == 0 and len(shape) < 5:
        shape[at : at + 1] = [2, shape[at] // 2]
    elif way == "ones" and len(shape) < 5:
        shape.insert(at, 1)
    elif way == "drop" and 1 in shape:
        shape.remove(1)
    else:
        return None
    return g.b.reshape(x, shape=tuple(shape))


def slice_(g: Garden, x: Value) -> Value | None:
    starts: list[Dim] = [0] * x.rank
    sizes: list[Dim] = list(x.shape)
    steps = [1] * x.rank
    axes = [i for i, d in enumerate(x.shape) if isinstance(d, int) and d > 1]
    if not axes:
        return None
    for i in g.random.sample(axes, g.random.randint(1, len(axes))):
        n = x.shape[i]
        assert isinstance(n, int)
        step = g.random.choice((1, 1, 1, 2, -1))
        count = g.random.randint(1, -(-n // abs(step)))
        reach = (count - 1) * abs(step)
        low = g.random.randint(0, n - 1 - reach)
        starts[i], sizes[i], steps[i] = (low + reach if step < 0 else low), count, step
    return g.b.slice(x, starts=tuple(starts), sizes=tuple(sizes), steps=tuple(steps))


def expand(g: Garden, x: Value) -> Value | None:
    if x.rank > 3:
        return None
    shape = tuple(g.random.choice((1, 3)) if d == 1 else d for d in x.shape)
    return g.b.expand(x, shape=(*([g.random.choice((1, 2))] if g.random.random() < 0.5 else []), *shape))


def concat(g: Garden, x: Value) -> Value | None:
    if not x.rank:
        return None
    axis = g.random.randrange(x.rank)
    parts = [x]
    for _ in range(g.random.randint(1, 2)):
        y = g.another(
            lambda v: (
                v.rank == x.rank
                and all(a == b or i == axis for i, (a, b) in enumerate(zip(v.shape, x.shape, strict=True)))
            )
        )
        if y is not None:
            parts.append(y)
    g.random.shuffle(parts)
    return g.b.concat(*parts, axis=axis)


def pad(g: Garden, x: Value) -> Value | None:
    if not x.rank:
        return None
    before, after = ([g.random.choice((0, 0, 1, 2)) for _ in range(x.rank)] for _ in range(2))
    return g.b.pad(x, before=tuple(before), after=tuple(after), mode="constant", value=g.random.choice((0.0, 1.5)))


def edge_pad(g: Garden, x: Value) -> Value | None:
    axes = [i for i, d in enumerate(x.shape) if isinstance(d, int) and d > 2]
    if not axes:
        return None
    axis = g.random.choice(axes)
    before, after = ([g.random.choice((0, 1, 2)) if i == axis else 0 for i in range(x.rank)] for _ in range(2))
    return g.b.pad(
        x, before=tuple(before), after=tuple(after), mode=g.random.choice(("edge", "reflect", "wrap")), value=0.0
    )


def product(g: Garden, x: Value) -> Value | None:
    if not x.rank or not isinstance(x.shape[-1], int):
        return None
    k = x.shape[-1]
    y = g.another(lambda v: v.rank == x.rank and v.rank > 1 and v.shape[-2] == k and v.shape[:-2] == x.shape[:-2])
    if y is None or g.random.random() < 0.6:
        y = g.const(*((k,) if g.random.random() < 0.1 else (k, g.random.choice((1, 3, 8, 17, 40)))))
    return g.b.mul(g.b.matmul(x, y), g.b.const(np.float32(1 / max(k, 1))))


def scores(g: Garden, x: Value) -> Value | None:
    """x times its own transpose."""
    if x.rank < 2 or not isinstance(x.shape[-1], int):
        return None
    turned = g.b.transpose(x, perm=(*range(x.rank - 2), x.rank - 1, x.rank - 2))
    return g.b.softmax(g.b.matmul(x, turned), axis=x.rank - 1)


def softmax(g: Garden, x: Value) -> Value | None:
    return g.b.softmax(x, axis=g.random.randrange(x.rank)) if x.rank else None


def norm(g: Garden, x: Value) -> Value | None:
    if not x.rank or not isinstance(x.shape[-1], int):
        return None
    n = x.shape[-1]
    if g.random.random() < 0.5:
        return g.b.rms_norm(x, g.const(n), axis=x.rank - 1, epsilon=1e-2)
    return g.b.layer_norm(x, g.const(n), g.const(n), axis=x.rank - 1, epsilon=1e-2)


def reduce(g: Garden, x: Value) -> Value | None:
    axes = [i for i, d in enumerate(x.shape) if isinstance(d, int)]
    if not axes:
        return None
    axes = sorted(g.random.sample(axes, g.random.randint(1, len(axes))))
    fn = getattr(g.b, g.random.choice(("reduce_mean", "reduce_max", "reduce_min")))
    return fn(x, axes=tuple(axes), keepdims=g.random.random() < 0.5)


def gather(g: Garden, x: Value) -> Value | None:
    axes = [i for i, d in enumerate(x.shape) if isinstance(d, int)]
    if not axes or x.rank > 4:
        return None
    axis = g.random.choice(axes)
    n = x.shape[axis]
    assert isinstance(n, int)
    if not n:
        return None
    shape = g.random.choice(((), (3,), (2, 2)))
    return g.b.gather(x, g.b.const(g.numbers.integers(-n, n, shape)), axis=axis)


def image(g: Garden, x: Value) -> tuple[str, int] | None:
    """The layout to read `x` in, and its channels."""
    if x.rank != 4:
        return None
    layout = g.random.choice(("NCHW", "NHWC"))
    c = x.shape[1] if layout == "NCHW" else x.shape[3]
    return (layout, c) if isinstance(c, int) and c else None


def conv(g: Garden, x: Value) -> Value | None:
    found = image(g, x)
    if found is None:
        return None
    layout, c = found
    way = g.random.choice(("plain", "depthwise", "grouped"))
    groups = c if way == "depthwise" else 2 if way == "grouped" and c % 2 == 0 else 1
    n_out = groups * g.random.choice((1, 2, 7, 16)) if groups != c or c == 1 else c
    kernel = (g.random.choice((1, 3)), g.random.choice((1, 2, 3)))
    w, bias = g.array(n_out, c // groups, *kernel) / (c // groups * kernel[0] * kernel[1]), g.const(n_out)
    y = g.b.conv(
        x,
        g.b.const(w),
        *([bias] if g.random.random() < 0.7 else []),
        strides=(g.random.choice((1, 2)), 1),
        dilations=(1, 1),
        before=(1, 1),
        after=(1, g.random.choice((1, 2))),
        group=groups,
        layout=layout,
    )
    return g.b.relu(y) if g.random.random() < 0.4 else y


def pool(g: Garden, x: Value) -> Value | None:
    found = image(g, x)
    if found is None:
        return None
    spatial = x.shape[2:] if found[0] == "NCHW" else x.shape[1:3]
    if any(not isinstance(d, int) or not d for d in spatial):
        return None
    kind = g.random.choice(("max_pool", "avg_pool"))
    return getattr(g.b, kind)(
        x,
        kernel=(2, 2),
        strides=g.random.choice(((1, 1), (2, 2))),
        dilations=(1, 1),
        before=(g.random.choice((0, 1)),) * 2,
        after=(1, 1),
        count_include_pad=g.random.random() < 0.5,
        layout=found[0],
    )


def through_half(g: Garden, x: Value) -> Value:
    """f16 and back: rounds, so only what is already a half is sent through it."""
    exact = g.b.cast(g.b.round(g.b.mul(g.b.tanh(x), g.b.const(np.float32(0)))), to=DType.f16)
    return g.b.add(x, g.b.cast(exact, to=DType.f32))


MOVES: tuple[Make, ...] = (
    unary,
    unary,
    binary,
    binary,
    binary,
    choose,
    transpose,
    transpose,
    reshape,
    reshape,
    slice_,
    slice_,
    expand,
    concat,
    concat,
    pad,
    edge_pad,
    product,
    product,
    scores,
    softmax,
    norm,
    reduce,
    gather,
    conv,
    conv,
    pool,
    through_half,
)
SHAPES: tuple[tuple[Dim, ...], ...] = (
    (N, S, 8),
    (N, 4, S),
    (2, 3, 16),
    (N, 6),
    (S,),
    (5,),
    (),
    (1, 7, 9, 4),
    (N, 8, 10, 3),
    (2, 4, 6, 5),
    (N, S, 4, 6),
    (1, 1, 33),
)
LARGEST = 40_000  # elements of a value


def grow(random: Random, n_nodes: int) -> Graph:
    g = Garden(random, np.random.default_rng(random.randrange(1 << 30)))
    for i in range(random.randint(1, 3)):
        g.values.append(g.b.input(f"x{i}", Type(DType.f32, random.choice(SHAPES))))
    for _ in range(n_nodes):
        # The newest values twice as often: chains as well as bushes.
        x = random.choice(g.values if random.random() < 0.5 else g.values[-2:])
        y = random.choice(MOVES)(g, x)
        if y is not None and all(0 < evaluate(y.type.size, s) <= LARGEST for s in SIZES[:3]):
            g.values.append(y)
    alive = {v for n in g.b.nodes for v in n.inputs}
    leaves = [v for v in g.values if v not in alive]
    extra = random.sample(g.values, min(len(g.values), random.choice((0, 0, 1, 2))))
    return g.b.finish(list(dict.fromkeys([*leaves, *extra])) or [g.values[0]])


def feed_of(graph: Graph, dims: dict[str, int], numbers: np.random.Generator) -> dict[str, np.ndarray]:
    """Random inputs of a graph at one size."""
    return {
        v.name: numbers.uniform(-2, 2, [evaluate(d, dims) for d in v.shape]).astype(np.float32) for v in graph.inputs
    }


def compare(graph: Graph, seed: int, optimize: bool) -> None:
    """Compile once; run at every size with one thread and with three."""
    prepared = optimize_for_native(graph) if optimize else graph
    image = build_image(prepared, choose_isa("host"), True)
    numbers = np.random.default_rng(seed)
    for threads in (1, 3):
        engine = Engine(image, threads, [])
        for dims in SIZES:
            feed = feed_of(graph, dims, numbers)
            with np.errstate(all="ignore"):
                want = reference.evaluate(graph, feed)
            got = engine.run(feed)
            for spec, w in zip(engine.outputs, want, strict=True):
                y = got[spec.name]
                assert y.shape == w.shape and y.dtype == w.dtype
                if not np.allclose(y, w, rtol=1e-3, atol=1e-3, equal_nan=True):
                    where = f"{spec.name} with {dims}, {threads} threads, optimized {optimize}"
                    worst = float(np.nanmax(np.abs(y.astype(np.float64) - w)))
                    raise AssertionError(f"{where}: off by {worst}\n{print_graph(graph)}")


@settings(max_examples=100)
@given(random=st.randoms(use_true_random=False), n_nodes=st.integers(2, 14), optimize=st.booleans())
def test_random_graphs_match_the_reference(random: Random, n_nodes: int, optimize: bool) -> None:
    compare(grow(random, n_nodes), random.randrange(1 << 30), optimize)


@settings(max_examples=40)
@given(random=st.randoms(use_true_random=False), n_nodes=st.integers(2, 14), optimize=st.booleans())
def test_random_graphs_do_not_race(random: Random, n_nodes: int, optimize: bool) -> None:
    graph = grow(random, n_nodes)
    numbers = np.random.default_rng(random.randrange(1 << 30))
    with races.sharing_all():
        prepared = optimize_for_native(graph) if optimize else graph
        image = build_image(prepared, choose_isa("host"), True)
    races.check(image, feed_of(graph, SIZES[1], numbers), repeats=2)
