"""Integers of 4 bits where values stay unpacked: read, stored, wrapped, and as weights at levels that fold nothing."""

from __future__ import annotations

import numpy as np
import pytest
from tests.lower.harness import HERE, build, check
from tests.onnx import making

import vivace
from vivace.base.dtypes import DType
from vivace.graph.graph import Type

KINDS = (DType.i4, DType.u4)


@pytest.mark.parametrize("t", KINDS, ids=str)
def test_every_code_is_read_and_stored(t: DType) -> None:
    codes = np.arange(16).astype(np.uint8).astype(np.int32)
    x = np.tile(codes, 3).astype(t.numpy)
    check(build(lambda b, v: [b.cast(v, to=DType.f32), b.neg(b.cast(v, to=DType.i32))], Type(t, x.shape)), x, isas=HERE)
    check(build(lambda b, v: b.transpose(v, perm=(1, 0)), Type(t, (6, 8))), x.reshape(6, 8), isas=HERE)


@pytest.mark.parametrize("t", KINDS, ids=str)
def test_integers_wrap(t: DType) -> None:
    x = np.arange(-300, 300, dtype=np.int32)
    check(build(lambda b, v: b.cast(v, to=t), Type(DType.i32, x.shape)), x, isas=HERE)
    check(build(lambda b, v: b.cast(b.cast(v, to=t), to=DType.i64), Type(DType.i32, x.shape)), x, isas=HERE)


@pytest.mark.parametrize("level", [0, 2, 99])
@pytest.mark.parametrize("t", KINDS, ids=str)
def test_weights_at_any_level(t: DType, level: int) -> None:
    w = np.array([[1, 7], [3, 0], [5, 2]])
    nodes = [making.node("DequantizeLinear", "w s", "d", axis=1), making.node("MatMul", "x d", "y")]
    inputs, constants = [making.value("x", ("N", 3))], {"w": w.astype(t.numpy), "s": np.array([0.5, 0.25], np.float32)}
    model = making.model(nodes, inputs, [making.value("y", ("N", 2))], constants, 21)
    y = vivace.compile(model, providers=("native",), level=level, threads=1)(np.eye(3, dtype=np.float32))
    np.testing.assert_array_equal(y, (w * [0.5, 0.25]).astype(np.float32))
