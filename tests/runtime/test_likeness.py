"""Calls that native code checks: like the last one, or of new sizes."""

from __future__ import annotations

import pickle
from unittest import mock

import numpy as np
import onnx.parser
import pytest

import vivace
from vivace.base.errors import InputError
from vivace.runtime.calls import Calls
from vivace.runtime.engine import Engine
from vivace.runtime.likeness import Seen, Taken
from vivace.targets.cpu.matching import Likeness

MODEL = """
    <ir_version: 9, opset_import: ["" : 17]>
    sums (float[N, M] x, float[M] b) => (float[N, M] y) { y = Add(x, b) }
"""
X, B = np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(4, dtype=np.float32)
WIDE = np.arange(24, dtype=np.float32).reshape(3, 8)


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = vivace.compile(onnx.parser.parse_model(MODEL), threads=1)
    assert isinstance(engine, Engine)
    return engine


def examined() -> mock._patch[mock.MagicMock]:
    """Says when Python looks at arrays."""
    return mock.patch.object(Calls, "_examined", side_effect=AssertionError("examined"))


def test_dense_arrays_are_checked_in_native_code_only(engine: Engine) -> None:
    y = np.empty_like(X)
    with examined():
        for x in (X, X + 1, X[:2], X[1:], X[:0], np.ones((9, 4), np.float32), X):
            np.testing.assert_array_equal(engine.run({"x": x, "b": B})["y"], x + B)
        for _ in range(2):
            assert engine.run({"x": X, "b": B}, {"y": y})["y"] is y
            np.testing.assert_array_equal(y, X + B)
        np.testing.assert_array_equal(engine.run({"x": X[:2], "b": B}, {})["y"], X[:2] + B)


def test_python_looks_at_other_arrays(engine: Engine) -> None:
    read_only = np.empty_like(X)
    read_only.flags.writeable = False
    with examined():
        for x in (X.T[:, :3], X.astype(np.float64), X[None], X[:, :3], X.view(np.matrix), X.tolist(), None):
            with pytest.raises(AssertionError, match="examined"):
                engine.run({"x": x, "b": B})  # type: ignore[dict-item]
        for y in (read_only, X, X[:2], WIDE[:, ::2], np.empty((3, 4)), X.tolist()):
            with pytest.raises(AssertionError, match="examined"):
                engine.run({"x": X, "b": B}, {"y": y})  # type: ignore[dict-item]


def test_whatever_is_unlike_is_checked_and_computed(engine: Engine) -> None:
    for x in (X[:2], X, WIDE[:, ::2], X, X.view(np.matrix), X[:0], X):
        np.testing.assert_array_equal(engine.run({"x": x, "b": B})["y"], np.asarray(x) + B)
    for bad in (X.astype(np.float64), X[None], X[:, :3], X.byteswap().view(X.dtype.newbyteorder())):
        with pytest.raises(InputError):
            engine.run({"x": bad, "b": B})
        np.testing.assert_array_equal(engine.run({"x": X, "b": B})["y"], X + B)


def test_arrays_with_gaps_or_an_equal_dtype_are_compared_in_native_code_again(engine: Engine) -> None:
    unpickled = pickle.loads(pickle.dumps(X))
    assert unpickled.dtype is not X.dtype
    with mock.patch.object(Calls, "solved", side_effect=AssertionError("solved")):
        for x in (unpickled, unpickled[1:], WIDE[:, ::2], X.view(np.matrix)):
            np.testing.assert_array_equal(engine.run({"x": x, "b": B})["y"], np.asarray(x) + B)


def test_a_call_that_failed_says_nothing_of_the_next(engine: Engine) -> None:
    """Neither the sizes that were learnt from it nor those before count."""
    for x, b in ((X, B[:3]), (X[:2], B.astype(np.float64)), (X[:2], B[:3]), (X[:1], None)):
        with pytest.raises(InputError):
            engine.run({"x": x, "b": b})  # type: ignore[dict-item]
        for rows in (2, 1, 3):
            np.testing.assert_array_equal(engine.run({"x": X[:rows], "b": B})["y"], X[:rows] + B)


def test_given_outputs_are_written_and_results_are_new_arrays(engine: Engine) -> None:
    y = np.empty_like(X)
    assert engine.run({"x": X, "b": B}, {"y": y})["y"] is y
    first, second = (engine.run({"x": X, "b": B})["y"] for _ in range(2))
    assert not np.may_share_memory(first, second)
    np.testing.assert_array_equal(y, first)


def test_sizes_are_learnt_from_plain_axes_only(engine: Engine) -> None:
    """Of sizes that follow from others Python finds out what they are made of; they are compared all the same."""
    text = "<ir_version: 9, opset_import: ['' : 17]> m (float[{}] x, float[N] b) => (float[N] y) {{ y = Exp(b) }}"
    for axis, is_learnt in (("N", True), ("N + 1", True), ("2 * M", False)):
        made = vivace.compile(onnx.parser.parse_model(text.replace("'", '"').format(f'"{axis}"')), threads=1)
        assert isinstance(made, Engine)
        n = {"N": 4, "N + 1": 5}.get(axis, 6)
        arrays = [np.ones(n, np.float32), B, None]
        taken = Taken(made.inputs, made.outputs, ())
        seen = Seen(taken)
        assert seen.compare[taken.plain](*arrays) == (Likeness.NEW if is_learnt else Likeness.NONE)
        for _ in range(2):
            np.testing.assert_allclose(made(arrays[0], B), np.exp(B), rtol=1e-6)
        with pytest.raises(InputError):
            made(np.ones(9, np.float32), B)
