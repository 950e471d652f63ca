"""What a rule must leave alone: graphs in which its pattern stands, and the reason that it gives (or None, where it has
nothing to say). Each would compute something else, or cost more, if the rule fired."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.graph.rewrite import Example, Log, rewrite
from vivace.optimize.pipeline import PIPELINE

RULES = {r.name: r for p in PIPELINE for r in p.rules}
F32 = np.float32
WINDOW: dict[str, Any] = {"strides": (1, 1), "dilations": (1, 1), "layout": "NCHW"}
NONE: dict[str, Any] = {**WINDOW, "before": (0, 0), "after": (0, 0)}


def full(e: Example, value: float, *shape: int) -> Value:
    return e.const(np.full(shape, value, F32))


def conv(e: Example, x: Value | None = None, w: Value | None = None, pad: int = 0) -> Value:
    x = e.x("f32[1,4,5,5]") if x is None else x
    pads = {"before": (pad, pad), "after": (pad, pad)}
    return e.conv(x, e.w("f32[6,4,3,3]") if w is None else w, group=1, **WINDOW, **pads)


def product(e: Example, w: Value | None = None) -> Value:
    return e.matmul(e.x("f32[5,4]"), e.w("f32[4,3]") if w is None else w)


def bytes_of(e: Example, kind: str, scale: float = 0.5, zero: int = 1) -> Value:
    x = e.x(kind)
    return e.dequantize(x, e.const(F32(scale)), e.const(np.asarray(zero, x.dtype.numpy)))


def weights(e: Example, *shape: int, scale: Any = 0.5, zero: Any = 0, dtype: type = np.int8) -> Value:
    q = e.const(np.full(shape, 3, dtype))
    return e.dequantize(q, e.const(np.asarray(scale, F32)), e.const(np.asarray(zero, dtype)))


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


def used_weights(e: Example) -> Any:
    p = e.softmax(e.matmul(e.x("f32[2,3,4,8]"), e.x("f32[2,3,8,5]")), axis=3)
    return e.matmul(p, e.x("f32[2,3,5,6]")), e.neg(p)


def norm(e: Example, *more: Value) -> Value:
    return e.layer_norm(e.x("f32[2,8]"), *more, axis=1, epsilon=1e-5)


def one_hot(e: Example, first: int, w: Value) -> Value:
    """cast(x == first..) @ w"""
    line = e.const(np.arange(first, first + 4, dtype=np.int32))
    return e.matmul(e.cast(e.eq(e.x("i32[5,1]"), line), to=DType.f32), w)


def quantized(e: Example, y: Value, scale: float, zero: int) -> Value:
    return e.quantize(y, e.const(F32(scale)), e.const(np.uint8(zero)))


def part(e: Example, start: int, step: int) -> Value:
    """Two elements of one tensor after the other."""
    whole = e.concat(e.x("f32[3]"), e.x("f32[4]"), axis=0)
    return e.slice(whole, starts=(start,), sizes=(2,), steps=(step,))


def pad(e: Example, x: Value, value: float) -> Value:
    return e.pad(x, before=(1,), after=(0,), mode="constant", value=value)


def padded(e: Example, pool: str, value: float, mode: str = "constant", channels: int = 0, **more: Any) -> Value:
    pads = (0, channels, 2, 0)
    x = e.pad(e.x("f32[1,4,5,5]"), before=pads, after=pads, mode=mode, value=value)
    return getattr(e, pool)(x, **{**NONE, "kernel": (2, 2), **more})


def total(e: Example, bias: Value | None = None, scale: Any = 0.5) -> Value:
    q = e.matmul_integer(e.x("u8[5,4]"), e.const(np.ones((4, 3), np.int8)), e.const(np.uint8(3)))
    y = e.mul(e.cast(q, to=DType.f32), e.const(np.asarray(scale, F32)))
    return e.add(y, weights(e, 3, dtype=np.int32, scale=scale) if bias is None else bias)


USED = "is used elsewhere too"
CASES: list[tuple[str, str | None, Callable[[Example], Any]]] = [
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
    ("negate_comparison", "a NaN compares false", lambda e: e.not_(e.lt(e.x("f32[4]"), e.x("f32[4]")))),
    ("join_casts", "does not hold every i32", lambda e: e.cast(e.cast(e.x("i32[4]"), to=DType.f32), to=DType.f64)),
    ("join_casts", "does not hold every f32", lambda e: e.cast(e.cast(e.x("f32[4]"), to=DType.f16), to=DType.f32)),
    ("drop_zero", "-0.0 + 0.0", lambda e: e.neg(e.add(e.x("f32[4]"), 0.0))),
    ("drop_zero", "-0.0 + 0.0", lambda e: e.neg(e.sub(e.x("f32[4]"), full(e, -0.0)))),
    ("drop_one", "widens", lambda e: e.neg(e.mul(e.x("f32[4]"), full(e, 1, 2, 4)))),
    ("multiply_by_zero", None, lambda e: e.neg(e.mul(e.x("f32[4]"), 0.0))),
    ("join_clips", None, lambda e: e.max(e.x("f32[4]"), full(e, math.nan))),
    ("slice_of_one_part", "crosses", lambda e: part(e, 2, 1)),
    ("slice_of_one_part", "step", lambda e: part(e, 0, 2)),
    ("join_pads", "different values", lambda e: pad(e, pad(e, e.x("f32[3]"), 1.0), 2.0)),
    ("gather_as_slice", "no constant step", lambda e: e.gather(e.x("f32[4,3]"), e.const(np.array([0, 1, 3])), axis=0)),
    ("gather_one_hot", "not finite", lambda e: one_hot(e, 0, full(e, math.nan, 4, 3))),
    ("gather_one_hot", "no range", lambda e: one_hot(e, 1, e.w("f32[4,3]"))),
    ("compare_index_with_zero", None, lambda e: e.not_(e.ge(e.iota(shape=(5,), axis=0, dtype=DType.i64), 1))),
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
    ("conv_in_integers", "run time", lambda e: conv(e, bytes_of(e, "u8[1,4,5,5]"), bytes_of(e, "i8[6,4,3,3]"))),
    (
        "conv_in_integers",
        "along another axis",
        lambda e: conv(
            e,
            bytes_of(e, "u8[1,4,5,5]"),
            weights(e, 6, 4, 3, 3, scale=np.full((1, 4, 1, 1), 0.5), zero=np.zeros((1, 4, 1, 1))),
        ),
    ),
    (
        "conv_in_integers",
        "do not fit i8",
        lambda e: conv(e, bytes_of(e, "u8[1,4,5,5]"), weights(e, 6, 4, 3, 3, zero=200, dtype=np.uint8)),
    ),
    ("conv_in_integers", "is i16", lambda e: conv(e, bytes_of(e, "i16[1,4,5,5]"), weights(e, 6, 4, 3, 3))),
    ("matmul_in_integers", "no matrix", lambda e: e.matmul(bytes_of(e, "u8[2,5,4]"), weights(e, 2, 4, 3))),
    ("matmul_in_integers", "may not fit 32 bits", lambda e: e.matmul(bytes_of(e, "u8[1,70000]"), weights(e, 70000, 1))),
    ("bias_in_integers", "the scale of the sums", lambda e: total(e, weights(e, 3, dtype=np.int32, scale=0.25))),
    ("bias_in_integers", "the scale of the sums", lambda e: total(e, weights(e, 3, dtype=np.int32, zero=1))),
    (
        "dequantize_later",
        "interpolation",
        lambda e: e.resize(
            bytes_of(e, "u8[2,3]"),
            mode="linear",
            coordinate="half_pixel",
            nearest_mode="floor",
            cubic_coeff=-0.75,
            exclude_outside=False,
            sizes=(4, 6),
            scales=(None, None),
        ),
    ),
    (
        "dequantize_later",
        "not a single constant",
        lambda e: e.reshape(weights(e, 4, 3, scale=[1, 2, 3], zero=[0, 0, 0]), shape=(3, 4)),
    ),
    (
        "mean_of_bytes",
        "padding counts",
        lambda e: e.avg_pool(
            bytes_of(e, "u8[1,3,4,4]"), kernel=(2, 2), count_include_pad=True, **{**NONE, "before": (1, 1)}
        ),
    ),
    ("dequantize_joined", "differ", lambda e: e.concat(bytes_of(e, "u8[2,3]"), bytes_of(e, "u8[2,3]", zero=2), axis=1)),
    ("dequantize_joined", "types differ", lambda e: e.concat(bytes_of(e, "u8[2,3]"), bytes_of(e, "i8[2,3]"), axis=1)),
    (
        "quantize_earlier",
        USED,
        lambda e: (quantized(e, y := e.transpose(e.x("f32[2,3]"), perm=(1, 0)), 0.5, 1), e.neg(y)),
    ),
    ("scale_once", None, lambda e: quantized(e, e.mul(e.x("f32[4]"), 3.0), -0.5, 1)),
    ("saturate_for_clip", "wider than the clip's", lambda e: quantized(e, e.relu(e.x("f32[4]")), 0.5, 3)),
    ("saturate_for_clip", None, lambda e: quantized(e, e.relu(e.x("f32[4]")), -0.5, 0)),
    ("quantized_already", "are others", lambda e: quantized(e, bytes_of(e, "u8[4]", 0.5, 1), 0.5, 2)),
    ("quantized_already", "are others", lambda e: quantized(e, bytes_of(e, "u8[4]", 0.5, 1), 0.25, 1)),
]


@pytest.mark.parametrize(("name", "reason", "make"), CASES, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(CASES)])
def test_leaves_alone(name: str, reason: str | None, make: Callable[[Example], Any]) -> None:
    graph = Example().graph(make)
    log = Log(explain=(name,))
    assert rewrite(graph, [RULES[name]], log) is graph, log.notes
    assert any(reason in note for note in log.notes) if reason else not log.notes, log.notes
