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
from tests.lower.test_matrix import FAMILIES, Numbers
from tests.lower.test_recurrent import layer
from tests.lower.test_resize import resized

from vivace.base.dtypes import DType
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


def check(graph: Graph, feeds: list[np.ndarray]) -> None:
    target = choose_isa("host")
    with races.sharing_all():
        image = build_image(graph, target, True)
    races.check(image, {v.name: x for v, x in zip(graph.inputs, feeds, strict=True)}, repeats=2)


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
