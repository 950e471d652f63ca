"""Calls like the last one, which native code checks."""

from __future__ import annotations

from unittest import mock

import numpy as np
import onnx.parser
import pytest

import vivace
from vivace.base.errors import InputError
from vivace.runtime.engine import Engine
from vivace.runtime.likeness import likeness

MODEL = """
    <ir_version: 9, opset_import: ["" : 17]>
    sums (float[N, M] x, float[M] b) => (float[N, M] y) { y = Add(x, b) }
"""
X, B = np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(4, dtype=np.float32)


@pytest.fixture
def engine() -> Engine:
    engine = vivace.compile(onnx.parser.parse_model(MODEL), threads=1)
    assert isinstance(engine, Engine)
    np.testing.assert_array_equal(engine.run({"x": X, "b": B})["y"], X + B)
    return engine


def test_a_call_like_the_last_one_is_checked_in_native_code_only(engine: Engine) -> None:
    assert likeness([X.dtype], [X.shape]) is not None
    with mock.patch.object(engine, "_prepared", side_effect=AssertionError("checked anew")):
        np.testing.assert_array_equal(engine.run({"x": X + 1, "b": 2 * B})["y"], X + 1 + 2 * B)
        for other in (X[:2], X.T[:, :3], X.astype(np.float64), X[None], X.view(np.matrix), X.tolist(), None):
            with pytest.raises(AssertionError, match="checked anew"):
                engine.run({"x": other, "b": B})  # type: ignore[dict-item]


def test_whatever_is_unlike_is_checked_and_computed(engine: Engine) -> None:
    wide = np.arange(24, dtype=np.float32).reshape(3, 8)
    for x in (X[:2], X, wide[:, ::2], X, X.view(np.matrix), X[:0], X):
        np.testing.assert_array_equal(engine.run({"x": x, "b": B})["y"], np.asarray(x) + B)
    for bad in (X.astype(np.float64), X[None], X[:, :3], X.byteswap().view(X.dtype.newbyteorder())):
        with pytest.raises(InputError):
            engine.run({"x": bad, "b": B})
        np.testing.assert_array_equal(engine.run({"x": X, "b": B})["y"], X + B)


def test_given_outputs_are_written_and_results_are_new_arrays(engine: Engine) -> None:
    y = np.empty_like(X)
    assert engine.run({"x": X, "b": B}, {"y": y})["y"] is y
    first, second = (engine.run({"x": X, "b": B})["y"] for _ in range(2))
    assert not np.may_share_memory(first, second)
    np.testing.assert_array_equal(y, first)
