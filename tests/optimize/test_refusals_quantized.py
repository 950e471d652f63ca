"""What rules for quantized graphs must leave alone: what would compute something else, or has no kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.optimize.refusals import F32, NONE, USED, Case, conv, leaves_alone, names

from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.graph.rewrite import Example


def bytes_of(e: Example, kind: str, scale: float = 0.5, zero: int = 1) -> Value:
    x = e.x(kind)
    return e.dequantize(x, e.const(F32(scale)), e.const(np.asarray(zero, x.dtype.numpy)))


def weights(e: Example, *shape: int, scale: Any = 0.5, zero: Any = 0, dtype: type = np.int8, value: int = 3) -> Value:
    q = e.const(np.full(shape, value, dtype))
    return e.dequantize(q, e.const(np.asarray(scale, F32)), e.const(np.asarray(zero, dtype)))


def quantized(e: Example, y: Value, scale: float, zero: int) -> Value:
    return e.quantize(y, e.const(F32(scale)), e.const(np.uint8(zero)))


def total(e: Example, bias: Value | None = None, scale: Any = 0.5) -> Value:
    q = e.matmul_integer(e.x("u8[5,4]"), e.const(np.ones((4, 3), np.int8)), e.const(np.uint8(3)))
    y = e.mul(e.cast(q, to=DType.f32), e.const(np.asarray(scale, F32)))
    return e.add(y, weights(e, 3, dtype=np.int32, scale=scale) if bias is None else bias)


CASES: list[Case] = [
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
    ("dequantize_later", None, lambda e: e.reshape(weights(e, 4, 3, dtype=np.int32), shape=(3, 4))),
    ("mean_of_bytes", None, lambda e: e.reduce_mean(bytes_of(e, "i16[2,6]"), axes=(1,), keepdims=False)),
    ("quantize_earlier", None, lambda e: quantized(e, e.max_pool(e.x("f32[1,3,4,4]"), kernel=(2, 2), **NONE), -0.5, 1)),
    (
        "conv_in_integers",
        "the weights are i16",
        lambda e: conv(e, bytes_of(e, "u8[1,4,5,5]"), weights(e, 6, 4, 3, 3, dtype=np.int16)),
    ),
    (
        "conv_in_integers",
        "may not fit 32 bits",
        lambda e: conv(e, bytes_of(e, "u8[1,8000,3,3]"), weights(e, 1, 8000, 3, 3)),
    ),
    ("matmul_in_integers", "no matrix", lambda e: e.matmul(bytes_of(e, "u8[4]"), weights(e, 4, 3))),
    ("bias_in_integers", "the scale of the sums", lambda e: total(e, weights(e, 1, dtype=np.int32))),
    ("bias_in_integers", "may not fit 32 bits", lambda e: total(e, weights(e, 3, dtype=np.int32, value=2**31 - 1))),
    (
        "quantized_already",
        "are others",
        lambda e: e.quantize(bytes_of(e, "u8[4]"), e.const(F32(0.5)), e.const(np.int8(1))),
    ),
    ("scale_once", "no product", lambda e: (quantized(e, e.relu(y := e.mul(e.x("f32[4]"), 3.0)), 0.5, 1), e.neg(y))),
    ("scale_once", "no product", lambda e: quantized(e, e.neg(e.x("f32[4]")), 0.5, 1)),
    ("scale_once", "no product", lambda e: quantized(e, e.exp(e.x("f32[4]")), 1e-40, 1)),
    ("keep_blocks_packed", "no whole blocks", lambda e: e.matmul(e.x("f32[2,12]"), weights(e, 12, 3))),
    (
        "keep_blocks_packed",
        "have no kernel",
        lambda e: e.matmul(e.x("f32[2,8]"), weights(e, 8, 3, scale=np.repeat([[1], [2]], 4, 0), zero=np.zeros((8, 1)))),
    ),
    ("keep_blocks_packed", "no matrix", lambda e: e.matmul(e.x("f32[2,2,32]"), weights(e, 2, 32, 3))),
    ("keep_blocks_packed", None, lambda e: e.matmul(e.x("f32[2,32]"), weights(e, 32, 3, dtype=np.int16))),
    ("keep_blocks_packed", None, lambda e: e.matmul(bytes_of(e, "u8[2,32]"), weights(e, 32, 3))),
    ("tabulate", None, lambda e: e.quantize(bytes_of(e, "u8[4]"), e.const(F32(0.5)), e.const(np.int16(1)))),
    (
        "tabulate",
        "no function of the bytes",
        lambda e: quantized(e, e.mul(bytes_of(e, "u8[4]"), e.w("f32[4]")), 0.5, 1),
    ),
    (
        "tabulate",
        "no function of the bytes",
        lambda e: quantized(e, e.add(bytes_of(e, "u8[4]"), bytes_of(e, "u8[4]")), 0.5, 1),
    ),
    ("tabulate", "no function of the bytes", lambda e: quantized(e, e.softmax(bytes_of(e, "u8[4]"), axis=0), 0.5, 1)),
]


@pytest.mark.parametrize(("name", "reason", "make"), CASES, ids=names(CASES))
def test_leaves_alone(name: str, reason: str | None, make: Callable[[Example], Any]) -> None:
    leaves_alone(name, reason, make)
