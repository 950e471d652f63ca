"""`optimize_model`: a file in, a checked file out, or nothing at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from vivace.base.errors import GateError, InputError, ModelError
from vivace.graph.rewrite import rule
from vivace.optimize import pipeline
from vivace.optimize.check import compare, largest_difference
from vivace.optimizer import optimize_model

pytest.importorskip("onnxruntime")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((3, 2, 3, 3)).astype(np.float32), "w")
    scale = numpy_helper.from_array(np.array([1.5, 2, 3], np.float32).reshape(3, 1, 1), "s")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["a", "s"], ["b"]),
        helper.make_node("Sigmoid", ["b"], ["c"]),
        helper.make_node("Identity", ["c"], ["d"]),
        helper.make_node("Mul", ["b", "d"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", 1, ["N", 2, "H", "W"])],
        [helper.make_tensor_value_info("y", 1, ["N", 3, "H", "W"])],
        [weight, scale],
    )
    path = tmp_path / "in.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def test_writes_a_smaller_equal_model(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = optimize_model(model, out)
    assert report.operators_before == {"Conv": 1, "Mul": 2, "Sigmoid": 1, "Identity": 1}
    assert report.operators_after == {"Conv": 1, "Mul": 1, "Sigmoid": 1}
    assert report.largest_error is not None
    assert report.largest_error < 1e-6
    written = onnx.load(out)
    onnx.checker.check_model(written)
    assert [v.name for v in written.graph.input] == ["x"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]


def test_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    report = optimize_model(model, None, dry_run=True)
    assert report.operators_after.total() == 3
    optimize_model(model, tmp_path / "out.onnx", dry_run=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx"]


def test_may_replace_its_source(model: Path) -> None:
    optimize_model(model, model)
    assert len(onnx.load(model).graph.node) == 3


def test_opset_can_be_chosen(model: Path, tmp_path: Path) -> None:
    optimize_model(model, tmp_path / "out.onnx", opset=18)
    assert onnx.load(tmp_path / "out.onnx").opset_import[0].version == 18


def test_a_wrong_rule_is_caught_and_nothing_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @rule("sigmoid")
    def guess(n, at):  # type: ignore[no-untyped-def]
        """sigmoid(x) = tanh(x), wrongly"""
        return at.op.tanh(n.inputs[0])

    lie = pipeline.Pass("lie", "", pipeline.Level.BASIC, rules=(guess,))
    monkeypatch.setattr(pipeline, "PIPELINE", (lie, *pipeline.PIPELINE))
    out = tmp_path / "out.onnx"
    out.write_bytes(b"as it was")
    with pytest.raises(GateError, match="output 'y' differs"):
        optimize_model(model, out)
    assert out.read_bytes() == b"as it was"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]


def test_errors_are_told_apart(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file to write"):
        optimize_model(model, None)
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(model.read_bytes()[:100])
    with pytest.raises(ModelError):
        optimize_model(bad, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_differences() -> None:
    a = np.array([1.0, 2.0, np.nan, np.inf], np.float32)
    assert largest_difference(a, a) == 0
    assert largest_difference(a, a * np.float32(1.001)) == pytest.approx(1e-3, rel=0.01)
    assert largest_difference(a, np.nan_to_num(a)) == np.inf
    assert largest_difference(a, a.astype(np.float64)) == np.inf
    assert largest_difference(a, a[:2]) == np.inf
    assert largest_difference(np.array([1, 2]), np.array([1, 3])) == np.inf
    with pytest.raises(GateError, match="'y' differs"):
        compare({"y": np.float32([1])}, {"y": np.float32([2])}, "here")
