"""What rules for weights, norms and attention must leave alone: what would compute something else, or cost more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from tests.optimize.refusals import NONE, USED, Case, conv, full, leaves_alone, names

from vivace.graph.graph import Value
from vivace.graph.rewrite import Example


def product(e: Example, w: Value | None = None) -> Value:
    return e.matmul(e.x("f32[5,4]"), e.w("f32[4,3]") if w is None else w)


def scaled(e: Example, y: Value, factor: Value, op: str = "mul") -> tuple[Value, Value]:
    """A product of a value that is wanted elsewhere too."""
    return getattr(e, op)(y, factor), e.neg(y)


def attention(
    e: Example,
    change: Callable[[Value], Value] = lambda s: s,
    axis: int = 3,
    k: str = "f32[2,3,5,8]",
) -> Value:
    scores = e.matmul(e.x("f32[2,3,4,8]"), e.transpose(e.x(k), perm=(0, 1, 3, 2)))
    return e.matmul(e.softmax(change(scores), axis=axis), e.x("f32[2,3,5,6]"))


def used_scores(e: Example) -> Any:
    q, k, v = e.x("f32[2,3,4,8]"), e.x("f32[2,3,8,5]"), e.x("f32[2,3,5,6]")
    scores = e.matmul(q, k)
    return e.matmul(e.softmax(scores, axis=3), v), e.neg(scores)


def used_weights(e: Example, is_guarded: bool = False, is_output: bool = False) -> Any:
    p = e.softmax(e.matmul(e.x("f32[2,3,4,8]"), e.x("f32[2,3,8,5]")), axis=3)
    safe = e.where(e.isnan(p), full(e, 0), p) if is_guarded else p
    return e.matmul(safe, e.x("f32[2,3,5,6]")), p if is_output else e.neg(p)


def inner_used(e: Example) -> Any:
    y = product(e)
    return e.mul(e.add(y, e.w("f32[3]")), e.w("f32[3]")), e.neg(y)


def norm(e: Example, *more: Value) -> Value:
    return e.layer_norm(e.x("f32[2,8]"), *more, axis=1, epsilon=1e-5)


def padded(e: Example, pool: str, value: float, mode: str = "constant", channels: int = 0, **more: Any) -> Value:
    pads = (0, channels, 2, 0)
    x = e.pad(e.x("f32[1,4,5,5]"), before=pads, after=pads, mode=mode, value=value)
    return getattr(e, pool)(x, **{**NONE, "kernel": (2, 2), **more})


def guarded(e: Example) -> Any:
    """Weights with torch's guard for rows that see no key, used twice."""
    p = e.softmax(e.matmul(e.x("f32[2,3,4,8]"), e.x("f32[2,3,8,5]")), axis=3)
    safe = e.where(e.isnan(p), full(e, 0), p)
    y = e.matmul(safe, e.x("f32[2,3,5,6]"))
    return y, e.neg(safe)


def by_groups(e: Example, mask: str) -> Value:
    scores = e.matmul(e.x("f32[2,2,3,4,8]"), e.x("f32[2,2,1,8,5]"))
    return e.matmul(e.softmax(e.add(scores, e.x(mask)), axis=4), e.x("f32[2,2,1,5,8]"))


def grouped(e: Example, tiled: bool = False, values: int = 2) -> Value:
    """Two groups of keys for six queries, repeated one by one, or `tiled`: all of them, then all again."""

    def repeated(n: int) -> Value:
        thin, wide = ((2, 1, n, 5, 8), (2, 6 // n, n, 5, 8)) if tiled else ((2, n, 1, 5, 8), (2, n, 6 // n, 5, 8))
        return e.reshape(e.expand(e.reshape(e.x(f"f32[2,{n},5,8]"), shape=thin), shape=wide), shape=(2, 6, 5, 8))

    return e.attention(e.x("f32[2,6,4,8]"), repeated(2), repeated(values), scale=0.3, causal=False, softcap=0.0)


def layer_norm(e: Example, mean: tuple[int, ...], variance: tuple[int, ...]) -> Value:
    x = e.x("f32[4,4]")
    d = e.sub(x, e.reduce_mean(x, axes=mean, keepdims=True))
    spread = e.sqrt(e.add(e.reduce_mean(e.mul(d, d), axes=variance, keepdims=True), 1e-5))
    return e.div(d, spread)


CASES: list[Case] = [
    ("scale_into_conv", USED, lambda e: scaled(e, conv(e), e.w("f32[6,1,1]"))),
    ("bias_into_conv", USED, lambda e: scaled(e, conv(e), e.w("f32[6,1,1]"), "add")),
    ("scale_into_matmul", USED, lambda e: scaled(e, product(e), e.w("f32[3]"))),
    ("scale_into_conv", "not constant", lambda e: e.mul(conv(e, w=e.x("f32[6,4,3,3]")), e.w("f32[6,1,1]"))),
    ("scale_into_conv", "one per channel", lambda e: e.mul(conv(e), e.w("f32[1,3]"))),
    ("scale_into_conv", "one per channel", lambda e: e.mul(conv(e), e.w("f32[2,1,1,1]"))),
    ("scale_into_conv", "not finite", lambda e: e.div(conv(e), full(e, 0, 6, 1, 1))),
    ("scale_into_conv", "not finite", lambda e: e.mul(conv(e, w=full(e, 1e30, 6, 4, 3, 3)), full(e, 1e30, 6, 1, 1))),
    ("bias_into_conv", "not constant", lambda e: e.add(conv(e, w=e.x("f32[6,4,3,3]")), e.w("f32[6,1,1]"))),
    ("bias_into_conv", "one per channel", lambda e: e.add(conv(e), e.w("f32[3,1]"))),
    ("scale_before_conv", USED, lambda e: (conv(e, x := e.mul(e.x("f32[1,4,5,5]"), e.w("f32[4,1,1]"))), e.neg(x))),
    ("scale_before_conv", "one per channel", lambda e: conv(e, e.mul(e.x("f32[1,4,5,5]"), e.w("f32[5,5]")))),
    (
        "scale_before_conv",
        "not constant",
        lambda e: conv(e, e.mul(e.x("f32[1,4,5,5]"), e.w("f32[4,1,1]")), e.x("f32[6,4,3,3]")),
    ),
    ("scale_before_conv", "not finite", lambda e: conv(e, e.mul(e.x("f32[1,4,5,5]"), full(e, math.inf, 4, 1, 1)))),
    ("bias_before_conv", "pads with zeros", lambda e: conv(e, e.add(e.x("f32[1,4,5,5]"), e.w("f32[4,1,1]")), pad=1)),
    ("pad_into_window", "pads with constant 0", lambda e: padded(e, "max_pool", 0.0, kernel=(4, 4))),
    ("pad_into_window", "pads with edge", lambda e: padded(e, "avg_pool", 0.0, "edge", count_include_pad=True)),
    ("pad_into_window", "the batch or the channels", lambda e: padded(e, "max_pool", -math.inf, channels=1)),
    (
        "pad_into_window",
        "does not count its own pads",
        lambda e: padded(e, "avg_pool", 0.0, before=(1, 1), after=(1, 1), count_include_pad=False),
    ),
    ("pad_into_window", "in the pads alone", lambda e: padded(e, "max_pool", -math.inf)),
    ("pad_into_window", "in the pads alone", lambda e: padded(e, "max_pool", -math.inf, kernel=(3, 3), before=(1, 1))),
    ("scale_into_matmul", "one per column", lambda e: e.mul(product(e), e.w("f32[5,1]"))),
    ("scale_into_matmul", "one per column", lambda e: e.mul(product(e), e.w("f32[2,1,1]"))),
    ("scale_into_matmul", "not finite", lambda e: e.div(product(e), full(e, 0, 3))),
    ("scale_into_matmul", "not finite", lambda e: e.mul(product(e, full(e, 1e30, 4, 3)), full(e, 1e30))),
    ("scale_past_bias", "one per column", lambda e: e.mul(e.add(product(e), e.w("f32[3]")), e.w("f32[5,1]"))),
    ("scale_past_bias", "not finite", lambda e: e.mul(e.add(product(e), full(e, 1e30, 3)), full(e, 1e30))),
    (
        "scale_before_matmul",
        USED,
        lambda e: (e.matmul(x := e.mul(e.x("f32[5,4]"), e.w("f32[4]")), e.w("f32[4,3]")), e.neg(x)),
    ),
    (
        "scale_before_matmul",
        "one per row",
        lambda e: e.matmul(e.mul(e.x("f32[5,4]"), e.w("f32[5,1]")), e.w("f32[4,3]")),
    ),
    ("scale_before_matmul", "one per row", lambda e: e.matmul(e.mul(e.x("f32[4]"), e.w("f32[2,4]")), e.w("f32[4,3]"))),
    (
        "scale_before_matmul",
        "not finite",
        lambda e: e.matmul(e.mul(e.x("f32[5,4]"), full(e, 1e30, 4)), full(e, 1e30, 4, 3)),
    ),
    (
        "transpose_into_matmul",
        "more than the flattened axes",
        lambda e: e.matmul(e.reshape(e.transpose(e.x("f32[2,3,4]"), perm=(1, 0, 2)), shape=(3, 8)), e.w("f32[8,5]")),
    ),
    ("scale_into_norm", "varies along other axes", lambda e: e.mul(norm(e), e.w("f32[2,1]"))),
    ("scale_into_norm", "follows a bias", lambda e: e.mul(norm(e, e.w("f32[8]"), e.w("f32[8]")), e.w("f32[8]"))),
    ("scale_into_norm", "not constant", lambda e: e.mul(norm(e, e.w("f32[8]")), e.x("f32[8]"))),
    ("scale_into_norm", USED, lambda e: scaled(e, norm(e), e.w("f32[8]"))),
    ("bias_into_norm", "no constant", lambda e: e.add(norm(e), e.w("f32[2,1]"))),
    ("bias_into_norm", USED, lambda e: scaled(e, norm(e), e.w("f32[8]"), "add")),
    (
        "fuse_softmax",
        "sums over axes",
        lambda e: e.div(x := e.exp(e.x("f32[2,3]")), e.reduce_sum(x, axes=(0, 1), keepdims=True)),
    ),
    ("fuse_attention", "not over the last axis", lambda e: attention(e, axis=2)),
    ("fuse_attention", "the scores are used", used_scores),
    ("fuse_attention", "the weights are used", used_weights),
    (
        "fuse_attention",
        "the mask comes before the scale",
        lambda e: attention(e, lambda s: e.mul(e.add(s, e.x("f32[4,5]")), 0.5)),
    ),
    (
        "fuse_attention",
        "tanh without matching factors",
        lambda e: attention(e, lambda s: e.mul(e.tanh(e.mul(s, 0.5)), 3.0)),
    ),
    ("fuse_attention", "exp stands between", lambda e: attention(e, lambda s: e.exp(s))),
    ("fuse_attention", "div stands between", lambda e: attention(e, lambda s: e.div(s, 0.0))),
    (
        "fuse_attention",
        "different ranks",
        lambda e: e.matmul(e.softmax(e.matmul(e.x("f32[4,8]"), e.x("f32[8,5]")), axis=1), e.x("f32[2,5,6]")),
    ),
    ("fuse_attention", "query, key and value are", lambda e: attention(e, k="f32[2,1,5,8]")),
    (
        "scale_into_attention",
        None,
        lambda e: e.attention(
            e.div(e.x("f32[2,3,4,8]"), 0.0),
            e.x("f32[2,3,5,8]"),
            e.x("f32[2,3,5,8]"),
            scale=0.3,
            causal=False,
            softcap=0.0,
        ),
    ),
    (
        "fuse_attention",
        "several masks",
        lambda e: attention(e, lambda s: e.where(e.x("bool[4,5]"), e.add(s, e.x("f32[4,5]")), full(e, -math.inf))),
    ),
    ("fuse_attention", "the mask is", lambda e: by_groups(e, "f32[2,2,1,4,5]")),
    ("fuse_attention", "the guarded weights are used", guarded),
    ("fuse_attention", "the weights are used", lambda e: used_weights(e, is_guarded=True)),
    ("fuse_attention", "the weights are used", lambda e: used_weights(e, is_output=True)),
    ("scale_past_bias", None, inner_used),
    (
        "transpose_into_matmul",
        "more than the flattened axes",
        lambda e: e.matmul(e.reshape(e.transpose(e.x("f32[2,3,4]"), perm=(0, 2, 1)), shape=(4, 6)), e.w("f32[6,5]")),
    ),
    ("group_queries", None, lambda e: grouped(e, tiled=True)),
    ("group_queries", "repeated differently", lambda e: grouped(e, values=3)),
    (
        "scale_into_attention",
        USED,
        lambda e: (
            e.attention(
                q := e.mul(e.x("f32[2,3,4,8]"), 0.5),
                e.x("f32[2,3,5,8]"),
                e.x("f32[2,3,5,8]"),
                scale=0.3,
                causal=False,
                softcap=0.0,
            ),
            e.neg(q),
        ),
    ),
    ("scale_into_matmul", "one per column", lambda e: e.mul(e.matmul(e.x("f32[4]"), e.w("f32[4,3]")), e.w("f32[3]"))),
    ("scale_past_bias", None, lambda e: scaled(e, e.add(product(e), e.w("f32[3]")), e.w("f32[3]"))),
    (
        "transpose_into_matmul",
        USED,
        lambda e: (
            e.matmul(x := e.reshape(e.transpose(e.x("f32[2,3,4]"), perm=(0, 2, 1)), shape=(2, 12)), e.w("f32[12,5]")),
            e.neg(x),
        ),
    ),
    ("fuse_layer_norm", "have axes", lambda e: layer_norm(e, (1,), (0,))),
]


@pytest.mark.parametrize(("name", "reason", "make"), CASES, ids=names(CASES))
def test_leaves_alone(name: str, reason: str | None, make: Callable[[Example], Any]) -> None:
    leaves_alone(name, reason, make)
