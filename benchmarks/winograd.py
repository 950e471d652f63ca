"""Convolutions of 3 taps an axis: the direct way against tiles of every size, in time and in error, and what is chosen.

    python -m benchmarks.winograd [56x56x64 14x14x256x512 3000x384 ..] [--threads 1] [--rounds 60]

A layer is `height x width x channels [x output channels]`, or `length x channels`; its input is padded already, and it
has a bias and a ReLU. The ways take turns; the best of the rounds counts. `cold`: the median after a sweep through
64 MiB. `error`: largest against f64, over the largest result.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from vivace.base.dtypes import DType
from vivace.base.machine import Isa
from vivace.building import link_image, make_plan
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Node, Type
from vivace.lower.rules import winograd
from vivace.options import choose_isa
from vivace.runtime.engine import Engine

LAYERS = ("56x56x64", "28x28x128", "14x14x256", "7x7x512", "112x112x32", "112x112x3x64", "20x20x192", "3000x384")
COLD_ROUNDS = 8
Size = tuple[int, int] | None


def layer(text: str) -> tuple[Graph, np.ndarray, np.ndarray]:
    """The graph of a layer, its input, and its result in f64."""
    numbers = [int(x) for x in text.split("x")]
    n_axes = 1 if len(numbers) == 2 else 2
    spatial, channels, n_out = numbers[:n_axes], numbers[n_axes], numbers[-1]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, *(d + 2 for d in spatial), channels)).astype(np.float32)
    w = (rng.standard_normal((n_out, channels, *(3,) * n_axes)) / np.sqrt(channels * 3**n_axes)).astype(np.float32)
    bias = rng.standard_normal(n_out).astype(np.float32)
    b = Builder()
    ones, zeros = (1,) * n_axes, (0,) * n_axes
    y = b.conv(
        b.input("x", Type(DType.f32, x.shape)), b.const(w), b.const(bias), strides=ones, dilations=ones,
        before=zeros, after=zeros, group=1, layout="NHWC",
    )  # fmt: skip
    exact = np.zeros((1, *spatial, n_out))
    for tap in np.ndindex(*(3,) * n_axes):
        window = tuple(slice(t, t + d) for t, d in zip(tap, spatial, strict=True))
        exact += x[(0, *window)].astype(np.float64)[None] @ w[(..., *tap)].T.astype(np.float64)
    return b.finish([b.relu(y)]), x, np.maximum(exact + bias, 0)


def engine(graph: Graph, size: Size, threads: int) -> Engine:
    """The layer lowered with tiles of a size, None for the direct way."""
    chosen = winograd.choose

    def fixed(node: Node, isa: Isa, half: bool = False) -> Size:
        return size

    winograd.choose, target = fixed, choose_isa("host")
    try:
        return Engine(link_image(make_plan(graph, target, ()), target, True, None), threads)
    finally:
        winograd.choose = chosen


def measure(text: str, threads: int, rounds: int) -> None:
    graph, x, exact = layer(text)
    node = next(n for n in graph.nodes if n.op.name == "conv")
    choice = winograd.choose(node, choose_isa("host"))
    ways: list[Size] = [None, *winograd.sizes(node)]
    engines = {way: engine(graph, way, threads) for way in ways}
    warm: dict[Size, list[float]] = {way: [] for way in ways}
    cold: dict[Size, list[float]] = {way: [] for way in ways}
    sweep = np.zeros(64 << 20, np.uint8)
    for i in range(rounds + COLD_ROUNDS):
        for way, run in engines.items():
            if i >= rounds:
                sweep += 1
            else:
                run(x)
            start = time.perf_counter()
            run(x)
            (cold if i >= rounds else warm)[way].append(time.perf_counter() - start)
    print(f"{text}, {threads} thread{'s' * (threads > 1)}")
    for way, run in engines.items():
        error = np.abs(run(x) - exact).max() / np.abs(exact).max()
        best = min(warm[way])
        name = "direct" if way is None else "{}x{}".format(*way)
        swept = statistics.median(cold[way])
        print(
            f"  {name:7s} {best * 1e6:8.0f} us   x{min(warm[None]) / best:4.2f}   cold {swept * 1e6:8.0f} us   "
            f"error {error:.1e}{'   chosen' if way == choice else ''}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", nargs="*", default=LAYERS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    for text in options.layers:
        measure(text, options.threads, options.rounds)


if __name__ == "__main__":
    main()
