"""Transposes: as few as there can be, and the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vivace.graph.graph import Graph, Value
from vivace.graph.reference import evaluate
from vivace.graph.rewrite import Example
from vivace.graph.text import print_graph
from vivace.optimize.check import random_inputs
from vivace.optimize.layout import transposed_bytes
from vivace.optimize.mincut import Cut
from vivace.optimize.permute import POOLS
from vivace.optimize.pipeline import Level, optimize


def conv(e: Example, x: Value, w: str, stride: int = 1, pad: int = 1, group: int = 1) -> Value:
    weight = e.w(w, -0.5, 0.5)
    n = weight.rank - 2
    return e.conv(
        x,
        weight,
        strides=(stride,) * n,
        dilations=(1,) * n,
        before=(pad,) * n,
        after=(pad,) * n,
        group=group,
        layout="NCHW",
    )


def pool(e: Example, x: Value, kind: str = "max_pool") -> Value:
    n = x.rank - 2
    more = {} if kind == "max_pool" else {"count_include_pad": False}
    return getattr(e, kind)(
        x, kernel=(2,) * n, strides=(2,) * n, dilations=(1,) * n, before=(0,) * n, after=(0,) * n, layout="NCHW", **more
    )


def optimized(make: Callable[[Example], Any], level: int = Level.LAYOUT) -> tuple[Graph, list[tuple[int, ...]]]:
    graph = Example().graph(make)
    result = optimize(graph, level)
    feeds = random_inputs(graph, {"N": 2, "T": 6}, 1)
    for want, got in zip(evaluate(graph, feeds), evaluate(result, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    return result, [n.attrs["perm"] for n in result.nodes if n.op.name == "transpose"]


def mobile(e: Example) -> Value:
    """Depthwise block with squeeze and excitation, residual, concat, pooling, classifier."""
    x = e.relu(conv(e, e.x("f32[N,3,8,8]"), "f32[8,3,3,3]"))
    y = e.mul(conv(e, x, "f32[8,1,3,3]", group=8), e.w("f32[8,1,1]"))
    s = e.reduce_mean(y, axes=(2, 3), keepdims=True)
    y = e.mul(y, e.sigmoid(conv(e, e.relu(conv(e, s, "f32[2,8,1,1]", pad=0)), "f32[8,2,1,1]", pad=0)))
    x = pool(e, e.concat(e.add(x, y), x, axis=1))
    x = pool(e, e.pad(x, before=(0, 0, 1, 1), after=(0, 0, 1, 1), mode="reflect", value=0.0), "avg_pool")
    x = e.reshape(e.reduce_mean(x, axes=(2, 3), keepdims=True), shape=(x.shape[0], 16))
    return e.softmax(e.matmul(x, e.w("f32[16,5]")), axis=1)


def test_a_cnn_has_one_transpose_at_its_input() -> None:
    graph, perms = optimized(mobile)
    assert perms == [(0, 2, 3, 1)], print_graph(graph)
    assert graph.nodes[0].op.name == "transpose"
    assert {n.attrs["layout"] for n in graph.nodes if n.op.name in POOLS | {"conv"}} == {"NHWC"}


def test_one_channel_needs_no_transpose() -> None:
    _, perms = optimized(
        lambda e: e.reduce_max(e.relu(conv(e, e.x("f32[N,1,8,8]"), "f32[4,1,3,3]")), axes=(1, 2, 3), keepdims=False)
    )
    assert perms == []


def test_flatten_and_a_constant_matrix_take_the_last_transpose() -> None:
    def make(e: Example) -> Value:
        x = conv(e, e.x("f32[N,3,4,4]"), "f32[5,3,3,3]")
        return e.matmul(e.reshape(x, shape=(x.shape[0], 80)), e.w("f32[80,7]"))

    _, perms = optimized(make)
    assert perms == [(0, 2, 3, 1)]


def channels_last_model(e: Example) -> Value:
    """As TensorFlow converters write: NHWC, a transpose before and after every convolution."""
    x = e.x("f32[N,8,8,3]")
    for w in ("f32[4,3,3,3]", "f32[6,4,3,3]"):
        y = conv(e, e.transpose(x, perm=(0, 3, 1, 2)), w)
        x = e.relu(e.add(e.transpose(y, perm=(0, 2, 3, 1)), e.w(f"f32[{y.shape[1]}]")))
    return e.reduce_mean(x, axes=(1, 2), keepdims=False)


def test_a_model_that_was_channels_last_needs_none() -> None:
    assert optimized(channels_last_model)[1] == []


def test_portable_level_keeps_only_what_nchw_needs() -> None:
    graph, perms = optimized(channels_last_model, Level.BASIC)
    assert perms == [(0, 3, 1, 2)], print_graph(graph)
    assert {n.attrs["layout"] for n in graph.nodes if n.op.name == "conv"} == {"NCHW"}


def audio(e: Example) -> Value:
    """One axis, then a transformer's [N,T,C]."""
    x = conv(e, e.x("f32[N,4,16]"), "f32[8,4,3]")
    x = e.gelu(conv(e, e.gelu(x, approximate="none"), "f32[8,8,3]", stride=2), approximate="none")
    x = e.add(e.transpose(x, perm=(0, 2, 1)), e.w("f32[8,8]"))
    return e.matmul(e.layer_norm(x, e.w("f32[8]"), axis=2, epsilon=1e-5), e.w("f32[8,3]"))


def test_one_axis() -> None:
    assert optimized(audio)[1] == [(0, 2, 1)]


def volume(e: Example) -> Value:
    x = pool(e, e.relu(conv(e, e.x("f32[N,2,6,6,6]"), "f32[4,2,3,3,3]")))
    return e.reduce_mean(conv(e, x, "f32[3,4,1,1,1]", pad=0), axes=(2, 3, 4), keepdims=False)


def test_three_axes() -> None:
    assert optimized(volume)[1] == [(0, 2, 3, 4, 1)]


def text_line(e: Example) -> Value:
    """Height becomes 1; squeeze, transpose, dense: the transposes of rank 4 and 3 meet."""
    x = e.silu(conv(e, e.x("f32[N,3,2,T]"), "f32[6,3,2,1]", pad=0))
    n, c, _, t = x.shape
    return e.matmul(e.transpose(e.reshape(x, shape=(n, c, t)), perm=(0, 2, 1)), e.w("f32[6,9]"))


def test_transposes_meet_across_a_squeeze() -> None:
    assert optimized(text_line)[1] == [(0, 2, 3, 1)]


def test_sinking_never_adds_bytes() -> None:
    def make(e: Example) -> Any:
        x = e.transpose(e.x("f32[2,3,4,5]"), perm=(0, 2, 1, 3))
        return e.matmul(e.relu(x), e.w("f32[5,5]")), e.exp(x)

    graph = Example().graph(make)
    assert transposed_bytes(optimize(graph, Level.BASIC)) <= transposed_bytes(graph)


def test_swaps_cancel_through_a_residual() -> None:
    def make(e: Example) -> Value:
        x = e.x("f32[2,3,4,5]")
        y = e.transpose(e.exp(e.transpose(x, perm=(0, 2, 1, 3))), perm=(0, 2, 1, 3))
        return e.add(x, e.reduce_sum(y, axes=(3,), keepdims=True))

    assert optimized(make, Level.BASIC)[1] == []


def test_an_odd_number_of_swaps_leaves_one() -> None:
    def make(e: Example) -> Value:
        x = e.x("f32[3,3,4]")
        return e.add(x, e.transpose(e.exp(x), perm=(1, 0, 2)))

    assert len(optimized(make, Level.BASIC)[1]) == 1


OPS = ("relu", "add", "transpose", "conv", "pool", "reduce", "concat", "pad", "softmax", "slice")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_random_graphs_keep_their_meaning(steps: list[tuple[str, int, int]]) -> None:
    perms = [(0, 2, 3, 1), (0, 3, 1, 2), (0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0)]

    def make(e: Example) -> Any:
        values = [e.x("f32[2,2,2,2]"), e.x("f32[2,2,2,2]")]
        for op, i, j in steps:
            x, y = values[i % len(values)], values[j % len(values)]
            match op:
                case "relu":
                    z = e.relu(x)
                case "add":
                    z = e.add(x, y)
                case "transpose":
                    z = e.transpose(x, perm=perms[j])
                case "conv":
                    z = conv(e, x, "f32[2,2,1,1]", pad=0)
                case "pool":
                    z = e.slice(
                        e.pad(x, before=(0, 0, 0, j), after=(0,) * 4, mode="constant", value=1.0),
                        starts=(0,) * 4,
                        sizes=(2,) * 4,
                        steps=(1,) * 4,
                    )
                case "reduce":
                    z = e.add(x, e.reduce_max(y, axes=(j % 4,), keepdims=True))
                case "concat":
                    z = e.slice(
                        e.concat(x, y, axis=j % 4),
                        starts=tuple(int(k == j % 4) for k in range(4)),
                        sizes=(2,) * 4,
                        steps=(1,) * 4,
                    )
                case "pad":
                    z = e.expand(e.reduce_sum(x, axes=(0, j % 3 + 1), keepdims=True), shape=(2, 2, 2, 2))
                case "softmax":
                    z = e.softmax(x, axis=j % 4)
                case _:
                    z = e.mul(e.slice(x, starts=(0, 0, 1, 0), sizes=(2, 2, 1, 2), steps=(1,) * 4), y)
            values.append(z)
        return tuple(values[-2:])

    graph, _ = optimized(make)
    before = Example().graph(make)
    assert transposed_bytes(optimize(before, Level.BASIC)) <= transposed_bytes(before), print_graph(graph)


def test_minimum_cut_by_hand() -> None:
    cut = Cut()
    cut.force("a", 1)
    cut.force("d", 0)
    cut.edge("a", "b", 3)
    cut.edge("b", "c", 1)
    cut.edge("c", "d", 2)
    assert cut.solve() == {"a": 1, "d": 0, "b": 1, "c": 0}


def test_ties_go_to_the_side_asked_for() -> None:
    for most_on_1 in (False, True):
        cut = Cut()
        cut.force("a", 1)
        cut.force("c", 0)
        cut.edge("a", "b", 2)
        cut.edge("b", "c", 2)
        assert cut.solve(most_on_1)["b"] == int(most_on_1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 9)), max_size=14))
def test_minimum_cut_is_minimal(edges: list[tuple[int, int, int]]) -> None:
    cut = Cut()
    cut.force(0, 1)
    cut.force(5, 0)
    for a, b, w in edges:
        cut.edge(a, b, w)
    found = cut.solve()

    def cost(side: dict[int, int]) -> int:
        return sum(w for a, b, w in edges if a != b and side[a] == 1 and side[b] == 0)

    sides = [{0: 1, 5: 0, **{i + 1: bits >> i & 1 for i in range(4)}} for bits in range(16)]
    assert cost({i: found.get(i, 0) for i in range(6)}) == min(map(cost, sides))
