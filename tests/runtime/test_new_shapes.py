"""What a call with a new shape costs: native code evaluates its dims, whatever the number of steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import pytest
from tests.onnx.making import model, node, value

import vivace
from vivace.base.dims import Dim, evaluate, floordiv, maximum, minimum, mod, symbol
from vivace.base.errors import ShapeError
from vivace.runtime import binding
from vivace.runtime.evaluation import Evaluation

TraceFunction = Callable[[FrameType, str, Any], Any]


def test_native_evaluation_agrees_with_the_plain_one() -> None:
    a, b = symbol("a"), symbol("b", 1)
    dims: list[Dim] = [3, a, b, 2 * a * b - 7, a * a * b * 5 - a + 1, floordiv(a + 5, 3), mod(a * b, b + 1), -a]
    dims += [minimum(a, b), maximum(a - 3, floordiv(b, a + 1)), floordiv(-a, b + 1), mod(-a, b + 2), a, 3]
    native = Evaluation(dims)
    assert native.names == ("a", "b")
    for env in ({"a": 0, "b": 1}, {"a": 17, "b": 4}, {"a": 100, "b": 999}, {"a": 1 << 20, "b": 1 << 18}):
        assert native(env).tolist() == [evaluate(d, env) for d in dims]
    with pytest.raises(KeyError):
        native({"a": 1})


def test_sizes_beyond_64_bits_and_divisors_of_zero_are_refused() -> None:
    a, b = symbol("a"), symbol("b")
    native = Evaluation([a * b, a - b, floordiv(a, b + 1), mod(a, b - 1)])
    assert native({"a": 1 << 31, "b": 1 << 31}).tolist()[0] == 1 << 62
    for env in ({"a": 1 << 32, "b": 1 << 31}, {"a": 1 << 63, "b": 1}, {"a": -(1 << 63), "b": -2}):
        with pytest.raises((ShapeError, OverflowError), match=r"64 bits|too large"):
            native(env)
    with pytest.raises(ShapeError, match="zero"):
        native({"a": 5, "b": 1})


def layers(n: int) -> vivace.Engine:
    """Matrix products and softmaxes one after another, of any number of rows."""
    nodes, constants = [], {"w": np.eye(8, dtype=np.float32)}
    for i in range(n):
        nodes += [node("MatMul", f"x{i} w", f"p{i}"), node("Softmax", f"p{i}", f"x{i + 1}", axis=0)]
    engine = vivace.compile(model(nodes, [value("x0", ["n", 8])], [value(f"x{n}", None)], constants), threads=1)
    assert isinstance(engine, vivace.Engine)
    return engine


def n_opcodes(function: Callable[[], object]) -> int:
    """Instructions of Python that a call takes."""
    counted = 0

    def count(frame: FrameType, event: str, _: object) -> TraceFunction:
        nonlocal counted
        frame.f_trace_opcodes = True
        counted += event == "opcode"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        function()
    finally:
        sys.settrace(before)
    return counted


def test_a_new_shape_costs_the_same_python_for_any_number_of_steps() -> None:
    def cost(engine: vivace.Engine) -> int:
        xs = [np.ones((n, 8), np.float32) for n in (60, 61, 62)]
        for x in (*xs, xs[0]):
            engine(x)
        return n_opcodes(partial(engine, xs[1]))

    assert cost(layers(2)) == cost(layers(9))


def decoder(n: int) -> vivace.Engine:
    """A model with caches."""
    nodes = [node("Concat", f"past{i} x", f"all{i}", axis=1) for i in range(n)]
    inputs = [*(value(f"past{i}", ["b", "p"]) for i in range(n)), value("x", ["b", "s"])]
    engine = vivace.compile(model(nodes, inputs, [value(f"all{i}", None) for i in range(n)]), threads=1)
    assert isinstance(engine, vivace.Engine)
    return engine


def test_a_token_more_costs_the_same_python_for_any_number_of_caches() -> None:
    """But for a list of the results, which takes ten instructions for each."""

    def cost(n: int) -> int:
        engine, caches = decoder(n), np.zeros((n, 2, 99), np.float32)
        x, costs = np.ones((2, 1), np.float32), []
        for length in range(60, 70):
            inputs = {f"past{i}": caches[i, :, :length] for i in range(n)} | {"x": x}
            outputs = {f"all{i}": caches[i, :, : length + 1] for i in range(n)}
            costs.append(n_opcodes(partial(engine.run, inputs, outputs)))
        assert (caches[:, :, 60:70] == 1).all()
        return min(costs)

    assert cost(12) - cost(2) <= 10 * 12


def test_memory_does_not_grow_with_the_number_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "MAX_PLANS", 4)
    engine = layers(2)
    engine(np.ones((1200, 8), np.float32))
    (context, last), arena = engine._idle[0], engine._idle[0][0].arena.n_bytes
    for n in range(1, 1200, 13):
        engine(np.ones((n, 8), np.float32))
        assert len(engine._planner.planned) <= 4
    assert engine._idle == [(context, last)]
    assert context.arena.n_bytes == arena
