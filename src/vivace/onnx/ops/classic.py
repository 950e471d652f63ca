"""The ai.onnx.ml operators that are plain arithmetic: Scaler, Normalizer, Binarizer, ArrayFeatureExtractor,
LinearRegressor.
"""

from __future__ import annotations

import numpy as np

from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.onnx.call import Call, onnx_op
from vivace.onnx.scope import Fallback

ML = "ai.onnx.ml"


@onnx_op("Scaler", domain=ML)
def scaler(c: Call, x: Value) -> Value:
    x = c.cast_to(x, DType.f32)
    offset, scale = (np.asarray(c.attr(a, ()), np.float32) for a in ("offset", "scale"))
    y = c.sub(x, c.const(offset)) if offset.size else x
    return c.mul(y, c.const(scale)) if scale.size else y


@onnx_op("Normalizer", domain=ML)
def normalizer(c: Call, x: Value) -> Value:
    x, norm = c.cast_to(x, DType.f32), c.attr("norm", "MAX")
    axes = (x.rank - 1,)
    if norm == "L1":
        size = c.reduce_sum(c.abs(x), axes=axes, keepdims=True)
    elif norm == "L2":
        size = c.sqrt(c.reduce_sum(c.mul(x, x), axes=axes, keepdims=True))
    else:
        size = c.reduce_max(x, axes=axes, keepdims=True)
    return c.where(c.eq(size, c.like(size, 0)), x, c.div(x, size))


@onnx_op("Binarizer", domain=ML)
def binarizer(c: Call, x: Value) -> Value:
    return c.cast_to(c.gt(x, c.like(x, c.attr("threshold", 0.0))), x.dtype)


@onnx_op("ArrayFeatureExtractor", domain=ML)
def array_feature_extractor(c: Call, x: Value, indices: Value) -> Value:
    if x.dtype is DType.string:
        raise Fallback("it works on strings")
    # The indices are a list whatever their shape; a vector counts as one row.
    rows = c.reshaped(x, (1, *x.shape)) if x.rank == 1 else x
    return c.gather(rows, c.reshaped(indices, (indices.type.size,)), axis=rows.rank - 1)


@onnx_op("LinearRegressor", domain=ML)
def linear_regressor(c: Call, x: Value) -> Value:
    if c.attr("post_transform", "NONE") != "NONE":
        raise Fallback(f"it transforms its scores by {c.attr('post_transform')}")
    x, targets = c.cast_to(x, DType.f32), c.attr("targets", 1)
    weights = np.asarray(c.attr("coefficients"), np.float32).reshape(targets, -1).T
    y = c.matmul(x, c.const(np.ascontiguousarray(weights)))
    bias = np.asarray(c.attr("intercepts", ()), np.float32)
    return c.add(y, c.const(bias)) if bias.size else y
