"""Each family of kernels as an engine on one to five threads, its pieces in a changing order: the bits of one thread.

`tests.lower.harness.check` cuts and orders the units of every other test of lowering; here are the hand-overs as well.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from tests import races
from tests.images import build_image
from tests.lower.harness import build
from tests.lower.test_attention import attention
from tests.lower.test_bands import LOW
from tests.lower.test_blockwise import weights as blocks
from tests.lower.test_byte_products import numbers, product
from tests.lower.test_matrix import FAMILIES, Numbers
from tests.lower.test_recurrent import layer
from tests.lower.test_resize import resized
from tests.lower.test_row_blocks import gated, halves
from tests.lower.test_strips import block
from tests.lower.test_trees import forest, graph_of
from tests.networks.test_networks import HAS_ALL
from tests.networks.ways import Way, on
from tests.optimize.test_gates import Block, rewritten

from vivace.base.dtypes import DType
from vivace.building import apply_precision
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.lower.precision import narrow
from vivace.options import choose_isa

F32 = DType.f32
RNG = np.random.default_rng(2)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def conv(c: int, size: int, k: int = 3) -> Graph:
    w, bias = random(c, c, k, k) / np.float32(k * c**0.5), random(c)
    attrs = {"strides": (1, 1), "dilations": (1, 1), "before": (k // 2,) * 2, "after": (k // 2,) * 2, "group": 1}
    return build(
        lambda b, x: b.relu(b.conv(x, b.const(w), b.const(bias), **attrs, layout="NHWC")),
        Type(F32, (1, size, size, c)),
    )


def bytes_conv() -> Graph:
    w = RNG.integers(-128, 128, (40, 32, 3, 3)).astype(np.int8)
    attrs = {"strides": (1, 1), "dilations": (1, 1), "before": (1, 1), "after": (1, 1), "group": 1, "layout": "NHWC"}
    return build(
        lambda b, x: b.conv_integer(x, b.const(w), b.const(np.uint8(7)), **attrs), Type(DType.u8, (1, 20, 20, 32))
    )


def of(make: Callable[[Builder, Value], object], *shape: int) -> Graph:
    return build(make, Type(F32, shape))


GRAPHS: dict[str, Callable[[], Graph]] = {
    "winograd": lambda: conv(32, 28),
    "pointwise": lambda: conv(48, 23, 1),
    "bf16": lambda: narrow(conv(32, 28)).graph,
    "int8": bytes_conv,
    "lstm": lambda: layer("lstm", 3, 9, 20, 33, "bidirectional")[0],
    "gru": lambda: layer("gru", 1, 7, 16, 40, states=True)[0],
    "linear resize": lambda: of(lambda b, x: resized(b, x, (2, 9, 31, 17), "linear"), 2, 5, 13, 17),
    "cubic resize": lambda: of(lambda b, x: resized(b, x, (2, 9, 31, 17), "cubic"), 2, 5, 13, 17),
    "topk": lambda: of(lambda b, x: list(b.topk(x, axis=1, k=5, largest=True, sorted=True)), 30, 70),
    "argmax": lambda: of(lambda b, x: b.argmax(x, axis=2, keepdims=False, select_last=False), 9, 20, 130),
    "cumsum": lambda: of(lambda b, x: b.cumsum(x, axis=1, exclusive=False, reverse=True), 9, 40, 17),
}


def blockwise(n_rows: int) -> Graph:
    """Three products that share the digits of their rows, or their rows in three parts each."""
    return build(
        lambda b, x: [b.matmul_blocks(x, *blocks(96, n, 4, 32, z), block=32) for n, z in ((40, "real"), (70, "none"))],
        Type(F32, (n_rows, 96)),
    )


def gathered() -> Graph:
    attrs = {"strides": (2, 2), "dilations": (1, 1), "before": (0, 0), "after": (0, 0), "group": 1, "layout": "NHWC"}
    w = random(512, 32, 1, 1)
    return narrow(of(lambda b, x: b.relu(b.conv(b.relu(x), b.const(w), **attrs)), 2, 14, 14, 32)).graph


def gated_filters(precision: str) -> Graph:
    return apply_precision(rewritten(Block("2,8,8", 64, 16).graph())[0], precision, choose_isa("host"))[0]


def scattered() -> Graph:
    at, kind = RNG.integers(0, 30, (200, 33)), Type(F32, (200, 33))
    return build(lambda b, x, y: b.scatter_elements(x, b.const(at), y, axis=0, reduction="add"), kind, kind)


def elements() -> Graph:
    at, kind = RNG.integers(0, 200, (200, 33)), Type(F32, (200, 33))
    return build(lambda b, x: b.neg(b.gather_elements(b.relu(x), b.const(at), axis=0)), kind)


# What steps take from each other or join, and the labels of theirs where the CPU has all instructions.
JOINED: dict[str, tuple[Callable[[], Graph], str]] = {
    "decode attention": (lambda: attention((2, 9, 1, 64), (2, 3, 200, 64), 64), "attention"),
    "gate into weights": (lambda: gated_filters("f32"), "mul"),
    "gate into packed weights": (lambda: gated_filters("bf16"), "pack"),
    "gathered rows": (gathered, "copy"),
    "bands": (lambda: LOW["7x"][0].graph(), "depthwise"),
    "strips": (lambda: of(block(16, 64, residual=True), 1, 21, 19, 16), "strips"),
    "halves of an MLP": (lambda: of(halves, 150, 24), "row_blocks"),
    "a gated MLP": (lambda: of(gated, 150, 24), "row_blocks"),
    "digits": (lambda: blockwise(3), "digits"),
    "rows in three parts": (lambda: blockwise(40), "split"),
    "products of bytes": (lambda: product((2, 40, 48), (2, 48, 40), (DType.u8, DType.i8), (7, 0)), "pack"),
    "a forest": (lambda: graph_of(forest(1, 9, 30, 6, 3), 6), "tree_ensemble"),
    "sums at places": (scattered, "scatter_elements"),
    "elements at places": (elements, "gather_elements"),
}


def check(graph: Graph, feeds: list[np.ndarray]) -> None:
    target = choose_isa("host")
    with races.sharing_all():
        image = build_image(graph, target, True)
    races.check(image, {v.name: x for v, x in zip(graph.inputs, feeds, strict=True)}, repeats=2)


@pytest.mark.parametrize("name", JOINED)
def test_what_is_joined_or_shared(name: str) -> None:
    make, label = JOINED[name]
    graph = make()
    n_bytes = 1 << 12 if label in ("strips", "row_blocks") else None
    way = Way("f32", "host", 1, 99, n_bytes, 1 << 14, n_bytes is not None, ())
    with on(way):
        image = build_image(graph, choose_isa("host"), True)
    if HAS_ALL:
        assert label in {line.label for line in image.lines}
    feeds = {}
    for v in graph.inputs:
        shape = [d if isinstance(d, int) else 37 for d in v.shape]
        feeds[v.name] = numbers(v.dtype, *shape) if v.dtype.is_int else random(*shape)
    races.check(image, feeds, repeats=2)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_family(name: str) -> None:
    graph = GRAPHS[name]()
    feeds = [
        RNG.integers(0, 256, v.shape).astype(np.uint8) if v.dtype is DType.u8 else random(*v.shape)
        for v in graph.inputs
    ]
    check(graph, feeds)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_a_random_sample(family: Callable[[Numbers], object], seed: int) -> None:
    sample = family(Numbers(Random(seed), "plain"))
    check(sample.graph, sample.feeds)
