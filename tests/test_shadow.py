"""VIVACE_CHECK=1: right engines pass, and of the wrong ones the kernel at fault is named with its ONNX node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import helper
from tests.lower.test_quantized import residual_block
from tests.onnx.making import model, node, value

import vivace
from vivace import building
from vivace.base.dtypes import DType
from vivace.base.errors import InternalError
from vivace.base.knobs import knobs
from vivace.loops.kernel import Binary, Const, For, Kernel, Store
from vivace.lower.plan import Plan, Step
from vivace.runtime.engine import Engine
from vivace.shadow import ShadowedEngine, difference

rng = np.random.default_rng(3)


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def network() -> Any:
    """Two products with softmax between, a branch, integers; symbolic rows."""
    branch = [helper.make_graph([node(op, "h", f"b_{op}")], op, [], [value(f"b_{op}", None)]) for op in ("Exp", "Neg")]
    nodes = [
        node("MatMul", "x w", "h", name="first"),
        node("Softmax", "h", "s", name="weights"),
        node("CumSum", "s axis", "c", name="running"),
        node("If", "flag", "i", name="choice", then_branch=branch[0], else_branch=branch[1]),
        node("Add", "c i", "sum", name="join"),
        node("MatMul", "sum v", "y", name="second"),
        node("ArgMax", "sum", "where", axis=1, name="largest"),
    ]
    inputs = [value("x", ["n", 24]), value("flag", [], 9)]
    outputs = [value("y", None), value("where", None, 7)]
    return model(nodes, inputs, outputs, {"w": random(24, 40), "v": random(40, 20), "axis": np.array(1)})


def checked(source: object) -> ShadowedEngine:
    with knobs.scope(check=True):
        engine = vivace.compile(source, threads=2, providers=("native",))
    assert isinstance(engine, ShadowedEngine)
    return engine


def feeds(n: int, flag: bool) -> dict[str, np.ndarray]:
    return {"x": random(n, 24), "flag": np.array(flag)}


def test_a_right_engine_passes_and_gives_what_others_give() -> None:
    source = network()
    engine, plain = checked(source), vivace.compile(source, threads=2)
    for n, flag in ((1, True), (37, False), (0, True)):
        given = feeds(n, flag)
        got, want = engine.run(given), plain.run(given)
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])
    assert engine.n_compared >= 3 * 6


def test_without_the_knob_nothing_is_shadowed() -> None:
    engine = vivace.compile(network(), threads=1)
    assert type(engine) is Engine


@pytest.mark.parametrize("name", ["weights", "running"])
def test_a_broken_kernel_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_it(plan: Plan) -> Plan:
        return replace(plan, body=tuple(broken(s) if is_of(s, name) else s for s in plan.body))

    with_plan(break_it, monkeypatch)
    engine = checked(network())
    with pytest.raises(InternalError, match=f"kernel .* for {name}: .*gave a wrong .*elements differ"):
        engine.run(feeds(5, True))


@pytest.mark.parametrize("name", ["first", "second"])
def test_damaged_weights_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(plan: Plan) -> Plan:
        (step,) = [s for s in plan.body if is_of(s, name)]
        assert isinstance(step, Step)
        (packed,) = [o.storage for o in step.operands if o.storage.data is not None and o.storage.data.size > 100]
        assert packed.data is not None
        changed = replace(
            packed, data=np.where(np.arange(packed.data.size).reshape(packed.data.shape) == 5, 9, packed.data)
        )
        operands = tuple(replace(o, storage=changed) if o.storage is packed else o for o in step.operands)
        return replace(plan, body=tuple(replace(s, operands=operands) if s is step else s for s in plan.body))

    with_plan(damage, monkeypatch)
    engine = checked(network())
    with pytest.raises(InternalError, match=f"matmul.* for {name}: matmul gave a wrong"):
        engine.run(feeds(5, False))


def with_plan(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make = building.make_plan
    monkeypatch.setattr(building, "make_plan", lambda *args, **named: change(make(*args, **named)))


def is_of(step: object, name: str) -> bool:
    return isinstance(step, Step) and any(name in n.origin for n in step.nodes)


def broken(step: Any) -> Step:
    """The step with a hundredth added to all that its kernel stores."""
    assert isinstance(step.spec, Kernel)

    def change(s: Any) -> Any:
        if isinstance(s, For):
            return replace(s, body=tuple(map(change, s.body)))
        if isinstance(s, Store):
            return replace(s, value=Binary("add", s.value, Const(0.01, DType.f32)))
        return s

    result: Step = replace(step, spec=replace(step.spec, body=tuple(map(change, step.spec.body))))
    return result


def test_sums_of_bytes_may_become_either_neighbour() -> None:
    """A sum in 16 lies just between two quanta; a change of three is found all the same."""
    block, given = residual_block()
    checked(block.SerializeToString()).run(given)
    five, eight = np.full((1, 4), 5, np.uint8), np.full((1, 4), 8, np.uint8)
    assert difference(five, eight, 2.6) and not difference(five, eight - np.uint8(1), 2.6)


def test_what_counts_as_a_difference() -> None:
    x = np.array([1.0, np.nan, -0.0, np.inf], np.float32)
    assert not difference(x, np.array([1.0, np.nan, 0.0, np.inf], np.float32), 0.0)
    assert "1 of 4 elements differ, at [1] nan" in difference(x, np.array([1, 2, 0, np.inf], np.float32), 0.5)
    assert not difference(x[:1], x[:1] + np.float32(0.25), 0.3)
    assert "shape" in difference(x, x[:2], 1.0)
    assert difference(np.array([3]), np.array([4]), 0.0)
    assert not difference(np.array([3]), np.array([4]), 1e-5)
