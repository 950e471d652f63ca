"""Every spelling that exporters use ends as the one op: small graphs, written as the exporters write them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vivace.base.dtypes import DType
from vivace.graph.graph import Graph, Value
from vivace.graph.reference import evaluate
from vivace.graph.rewrite import Example
from vivace.graph.text import print_graph
from vivace.optimize.check import random_inputs
from vivace.optimize.pipeline import Level, optimize
from vivace.optimize.report import Report

HUGE = -3.4028234663852886e38


def optimized(make: Callable[[Example], Any], level: int = Level.EXTENDED) -> tuple[Graph, Counter[str]]:
    graph = Example().graph(make)
    report = Report()
    result = optimize(graph, level, report=report)
    feeds = random_inputs(graph, {"B": 2, "T": 5, "P": 3, "N": 2}, 0)
    for want, got in zip(evaluate(graph, feeds), evaluate(result, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    return result, report.ops_after


def heads(e: Example, x: Value, n: int, d: int) -> Value:
    """[B,T,n*d] -> [B,n,T,d], as `view` and `transpose` export."""
    b, t = x.shape[:2]
    return e.transpose(e.reshape(x, shape=(b, t, n, d)), perm=(0, 2, 1, 3))


def turned_through_three_axes(e: Example, k: Value) -> Value:
    """k^T of the dynamo exporter's sdpa: reshape to three axes, transpose, reshape back."""
    b, h, t, d = k.shape
    flat = e.reshape(k, shape=(b * h, t, d))
    return e.reshape(e.transpose(flat, perm=(0, 2, 1)), shape=(b, h, d, t))


def merged(e: Example, x: Value) -> Value:
    b, h, t, d = x.shape
    return e.reshape(e.transpose(x, perm=(0, 2, 1, 3)), shape=(b, t, h * d))


def key_mask(e: Example, b: Any, t: Any) -> Value:
    """The padding mask as dynamo exports it: ranges compared with zero, and a gather over a grid of ranges."""
    mask = e.cast(e.x("i64[B,T]"), to=DType.bool)
    rows = e.reshape(e.iota(shape=(b,), axis=0, dtype=DType.i64), shape=(b, 1, 1, 1))
    keys = e.reshape(e.iota(shape=(t,), axis=0, dtype=DType.i64), shape=(1, 1, 1, t))
    grid = [e.reshape(e.expand(p, shape=(b, 1, 1, t)), shape=(b, 1, 1, t, 1)) for p in (rows, keys)]
    keep = e.gather_nd(mask, e.concat(*grid, axis=4), batch_dims=0)
    queries = e.reshape(e.iota(shape=(t,), axis=0, dtype=DType.i64), shape=(1, 1, t, 1))
    always = e.and_(e.const(True), e.ge(queries, e.const(np.int64(0))))
    return e.where(e.and_(always, keep), e.const(np.float32(0)), e.const(np.float32(HUGE)))


def sdpa(e: Example, guard: bool = True, mask: bool = True) -> Value:
    x = e.x("f32[B,T,24]")
    q, k, v = (heads(e, e.add(e.matmul(x, e.w("f32[24,24]")), e.w("f32[24]")), 3, 8) for _ in range(3))
    root = math.sqrt(1 / math.sqrt(8))
    scores = e.matmul(e.mul(q, root), e.mul(turned_through_three_axes(e, k), root))
    if mask:
        scores = e.add(scores, key_mask(e, x.shape[0], x.shape[1]))
    p = e.softmax(scores, axis=-1)
    if guard:
        p = e.where(e.isnan(p), e.const(np.float32(0)), p)
    return merged(e, e.matmul(p, v))


def eager(e: Example) -> Value:
    x = e.x("f32[B,T,24]")
    q, k, v = (heads(e, e.add(e.matmul(x, e.w("f32[24,24]")), e.w("f32[24]")), 3, 8) for _ in range(3))
    scores = e.div(e.matmul(q, e.transpose(k, perm=(0, 1, 3, 2))), math.sqrt(8))
    mask = e.mul(
        e.sub(1.0, e.cast(e.reshape(e.x("i64[B,T]"), shape=(x.shape[0], 1, 1, x.shape[1])), to=DType.f32)), HUGE
    )
    return merged(e, e.matmul(e.softmax(e.add(scores, mask), axis=3), v))


def grouped(e: Example) -> Any:
    """Llama: rotary, a cache, keys and values repeated for groups of queries, a causal mask from positions."""
    x, past_k, past_v = e.x("f32[B,T,24]"), e.x("f32[B,1,P,8]"), e.x("f32[B,1,P,8]")
    b, t, p = x.shape[0], x.shape[1], past_k.shape[2]
    q = heads(e, e.matmul(x, e.w("f32[24,24]")), 3, 8)
    k, v = (e.concat(past, heads(e, e.matmul(x, e.w("f32[24,8]")), 1, 8), axis=2) for past in (past_k, past_v))

    def repeated(y: Value) -> Value:
        wide = e.expand(e.reshape(y, shape=(b, 1, 1, p + t, 8)), shape=(b, 1, 3, p + t, 8))
        return e.reshape(wide, shape=(b, 3, p + t, 8))

    keys = e.reshape(e.iota(shape=(p + t,), axis=0, dtype=DType.i64), shape=(1, 1, 1, p + t))
    rows = e.add(e.iota(shape=(t,), axis=0, dtype=DType.i64), e.reshape(e.dims(values=(p,)), shape=()))
    seen = e.le(keys, e.reshape(rows, shape=(1, 1, t, 1)))
    mask = e.where(e.expand(seen, shape=(b, 1, t, p + t)), e.const(np.float32(0)), e.const(np.float32(HUGE)))
    root = math.sqrt(1 / math.sqrt(8))
    scores = e.add(e.matmul(e.mul(q, root), e.mul(turned_through_three_axes(e, repeated(k)), root)), mask)
    w = e.softmax(scores, axis=-1)
    w = e.where(e.isnan(w), e.const(np.float32(0)), w)
    return merged(e, e.matmul(w, repeated(v))), k, v


def packed(e: Example) -> Value:
    """One product for q, k, v, split by a transpose and slices (PaddlePaddle)."""
    x = e.x("f32[B,T,24]")
    b, t = x.shape[:2]
    five = e.reshape(e.matmul(x, e.w("f32[24,72]")), shape=(b, t, 3, 3, 8))
    first = e.transpose(five, perm=(2, 0, 3, 1, 4))
    q, k, v = (
        e.reshape(e.slice(first, starts=(i, 0, 0, 0, 0), sizes=(1, b, 3, t, 8), steps=(1,) * 5), shape=(b, 3, t, 8))
        for i in range(3)
    )
    p = e.softmax(e.matmul(e.mul(q, 0.35), e.transpose(k, perm=(0, 1, 3, 2))), axis=3)
    return merged(e, e.matmul(p, v))


@pytest.mark.parametrize(
    "make",
    [sdpa, lambda e: sdpa(e, guard=False), lambda e: sdpa(e, mask=False), eager, packed],
    ids=["sdpa", "sdpa without guard", "sdpa without mask", "eager", "packed"],
)
def test_attention(make: Callable[[Example], Any]) -> None:
    graph, ops = optimized(make)
    assert ops["attention"] == 1, print_graph(graph)
    assert ops["softmax"] == ops["isnan"] == ops["gather_nd"] == 0
    assert ops["transpose"] <= 4


def test_attention_with_grouped_queries_and_a_cache() -> None:
    graph, ops = optimized(grouped)
    (node,) = (n for n in graph.nodes if n.op.name == "attention")
    assert [v.name for v in node.inputs[1:3] if v is not None] == [
        v.name for v in graph.outputs[1:]
    ]  # the caches as they are
    assert ops["transpose"] == 2  # of q and of the result; for one key head a reshape does
    assert math.isclose(node.attrs["scale"], 1 / math.sqrt(8), rel_tol=1e-6)


def test_scores_that_are_returned_keep_their_parts() -> None:
    def make(e: Example) -> Any:
        q, k, v = (e.x("f32[2,3,4,8]") for _ in range(3))
        p = e.softmax(e.matmul(q, e.transpose(k, perm=(0, 1, 3, 2))), axis=3)
        return e.matmul(p, v), p

    assert optimized(make)[1]["attention"] == 0


def layer_norm(e: Example, power: bool, reciprocal: bool) -> Value:
    x = e.x("f32[B,T,16]")
    d = e.sub(x, e.reduce_mean(x, axes=(2,), keepdims=True))
    squared = e.pow(d, 2.0) if power else e.mul(d, d)
    root = e.sqrt(e.add(e.reduce_mean(squared, axes=(2,), keepdims=True), 1e-5))
    y = e.mul(d, e.div(1.0, root)) if reciprocal else e.div(d, root)
    return e.add(e.mul(e.w("f32[16]"), y), e.w("f32[16]"))


@pytest.mark.parametrize("power", [True, False])
@pytest.mark.parametrize("reciprocal", [True, False])
def test_layer_norm(power: bool, reciprocal: bool) -> None:
    graph, ops = optimized(lambda e: layer_norm(e, power, reciprocal))
    assert ops == {"layer_norm": 1}, print_graph(graph)
    assert len(graph.nodes[0].inputs) == 3


@pytest.mark.parametrize("reciprocal", [True, False])
def test_rms_norm(reciprocal: bool) -> None:
    def make(e: Example) -> Value:
        x = e.x("f32[B,T,16]")
        root = e.sqrt(e.add(e.reduce_mean(e.pow(x, 2.0), axes=(2,), keepdims=True), 1e-6))
        return e.mul(e.w("f32[16]"), e.mul(x, e.div(1.0, root)) if reciprocal else e.div(x, root))

    graph, ops = optimized(make)
    assert ops == {"rms_norm": 1}, print_graph(graph)


def gelus() -> dict[str, tuple[Callable[[Example, Value], Value], str]]:
    c, root = math.sqrt(2 / math.pi), math.sqrt(2)

    def tanh(e: Example, x: Value, inner: Value) -> Value:
        return e.mul(e.mul(x, 0.5), e.add(e.tanh(inner), 1.0))

    return {
        "torch": (lambda e, x: e.mul(x, e.mul(0.5, e.add(e.erf(e.div(x, root)), 1.0))), "none"),
        "bert": (lambda e, x: e.mul(e.mul(x, 0.5), e.add(e.erf(e.mul(x, 1 / root)), 1.0)), "none"),
        "halves": (lambda e, x: e.mul(x, e.add(e.mul(e.erf(e.div(x, root)), 0.5), 0.5)), "none"),
        "gpt2": (lambda e, x: tanh(e, x, e.mul(e.add(x, e.mul(e.pow(x, 3.0), 0.044715)), c)), "tanh"),
        "jax": (lambda e, x: tanh(e, x, e.mul(e.add(x, e.mul(e.mul(e.mul(0.044715, x), x), x)), c)), "tanh"),
        "fast": (lambda e, x: tanh(e, x, e.mul(e.mul(x, c), e.add(e.mul(e.mul(x, x), 0.044715), 1.0))), "tanh"),
    }


@pytest.mark.parametrize("name", gelus())
def test_gelu(name: str) -> None:
    spelling, approximate = gelus()[name]
    graph, ops = optimized(lambda e: spelling(e, e.x("f32[B,16]")))
    assert ops == {"gelu": 1}, print_graph(graph)
    assert graph.nodes[0].attrs["approximate"] == approximate


def softmax(e: Example, x: Value) -> Value:
    s = e.exp(e.sub(x, e.reduce_max(x, axes=(1,), keepdims=True)))
    return e.div(s, e.reduce_sum(s, axes=(1,), keepdims=True))


ACTIVATIONS: dict[str, tuple[Callable[[Example, Value], Value], str]] = {
    "relu6 / 6": (lambda e, x: e.div(e.mul(x, e.clip(e.add(x, 3.0), min=0.0, max=6.0)), 6.0), "hard_swish"),
    "x * (relu6 / 6)": (lambda e, x: e.mul(x, e.div(e.clip(e.add(x, 3.0), min=0.0, max=6.0), 6.0)), "hard_swish"),
    "min and max": (lambda e, x: e.mul(x, e.mul(e.min(e.max(e.add(x, 3.0), 0.0), 6.0), 1 / 6)), "hard_swish"),
    "x * hard_sigmoid": (lambda e, x: e.mul(x, e.hard_sigmoid(x, alpha=1 / 6, beta=0.5)), "hard_swish"),
    "hard_sigmoid": (lambda e, x: e.div(e.clip(e.add(x, 3.0), min=0.0, max=6.0), 6.0), "hard_sigmoid"),
    "affine hard_sigmoid": (lambda e, x: e.clip(e.add(e.mul(x, 0.2), 0.5), min=0.0, max=1.0), "hard_sigmoid"),
    "x * sigmoid": (lambda e, x: e.mul(x, e.sigmoid(x)), "silu"),
    "x / (1 + exp(-x))": (lambda e, x: e.div(x, e.add(1.0, e.exp(e.neg(x)))), "silu"),
    "1 / (1 + exp(-x))": (lambda e, x: e.div(1.0, e.add(1.0, e.exp(e.neg(x)))), "sigmoid"),
    "max(x, 0)": (lambda e, x: e.max(0.0, x), "relu"),
    "relu of relu6": (lambda e, x: e.relu(e.clip(x, min=0.0, max=6.0)), "clip"),
    "max(x, 0.1 x)": (lambda e, x: e.max(x, e.mul(x, 0.1)), "leaky_relu"),
    "softmax": (softmax, "softmax"),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    spelling, op = ACTIVATIONS[name]
    graph, ops = optimized(lambda e: spelling(e, e.x("f32[B,16]")))
    assert ops == {op: 1}, print_graph(graph)


def test_quick_gelu_is_no_silu() -> None:
    _, ops = optimized(lambda e: e.mul(e.x("f32[4]"), e.sigmoid(e.mul(e.inputs[0], 1.702))))
    assert ops["silu"] == 0


def test_glu_keeps_its_halves_as_one_split_of_views() -> None:
    def make(e: Example) -> Value:
        x = e.x("f32[B,16]")
        b = x.shape[0]
        left, right = (e.slice(x, starts=(0, s), sizes=(b, 8), steps=(1, 1)) for s in (0, 8))
        return e.mul(left, e.mul(right, e.sigmoid(right)))

    _, ops = optimized(make)
    assert ops == {"slice": 2, "silu": 1, "mul": 1}


def hot_by_operator(e: Example, ids: Value, n: int) -> Value:
    """OneHot, with values 0 and 1, as the importer writes it."""
    line = e.reshape(e.iota(shape=(n,), axis=0, dtype=DType.i64), shape=(1, 1, n))
    hot = e.eq(e.reshape(ids, shape=(*ids.shape, 1)), line)
    return e.where(hot, *(e.expand(e.const(v, DType.f32), shape=()) for v in (1.0, 0.0)))


def hot_by_comparison(e: Example, ids: Value, n: int) -> Value:
    """jax.nn.one_hot."""
    return e.cast(e.eq(e.const(np.arange(n)), e.reshape(ids, shape=(*ids.shape, 1))), to=DType.f32)


@pytest.mark.parametrize("spelling", [hot_by_operator, hot_by_comparison])
def test_product_of_one_hot_rows_is_a_gather(spelling: Callable[[Example, Value, int], Value]) -> None:
    graph, ops = optimized(lambda e: e.matmul(spelling(e, e.x("i64[B,T]"), 4), e.w("f32[4,3]")), Level.ALL)
    assert ops["gather"] == 1 and ops["matmul"] == 0
    outside = np.array([[0, 3, 4, -1]])
    rows = evaluate(graph, {"x0": outside})[0]
    assert not rows[0, 2:].any() and rows[0, :2].all()


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_the_best_class_needs_no_softmax(name: str) -> None:
    def make(e: Example) -> Value:
        return e.argmax(getattr(e, name)(e.x("f32[N,7]"), axis=1), axis=1, keepdims=False, select_last=False)

    graph = Example().graph(make)
    found = optimize(graph)
    assert name not in {n.op.name for n in found.nodes}
    x = np.random.default_rng(0).standard_normal((6, 7)).astype(np.float32)
    x[0, 3], x[1, 5], x[2], x[3, 2], x[4, 1:4] = np.nan, np.inf, -np.inf, -np.inf, 9.0  # of equal ones the first
    with np.errstate(all="ignore"):
        (want,), (got,) = evaluate(graph, [x]), evaluate(found, [x])
    np.testing.assert_array_equal(got, want)
    assert want.tolist()[:3] == [0, 0, 0] and want[4] == 1
