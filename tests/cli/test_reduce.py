"""`vivace reduce` finds a planted fault."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from vivace.lower.group import Group
from vivace.lower.lowering import Lowering, Rule
from vivace.lower.rules import RULES
from vivace.onnx.shrink import minimize

TEXT = """<ir_version: 9, opset_import: ["" : 17]>
    m (float[N, 8] x, int64[2] shape) => (float[N, 8] y, float[A, B] z)
    <float[8, 8] w = {1,0,0,0,0,0,0,0, 0,1,0,0,0,0,0,0, 0,0,1,0,0,0,0,0, 0,0,0,1,0,0,0,0,
                      0,0,0,0,1,0,0,0, 0,0,0,0,0,1,0,0, 0,0,0,0,0,0,1,0, 0,0,0,0,0,0,0,1}>
    { a = MatMul(x, w)  b = Exp(a)  c = MatMul(b, w)  d = Tanh(c)  e = Softmax(d)  f = MatMul(e, w)
      g = Sigmoid(f)  h = Sqrt(g)  i = Tanh(h)  y = MatMul(i, w)  z = Reshape(h, shape) }"""


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    path = tmp_path / "chain.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    return path


def arguments(tmp_path: Path) -> list[object]:
    np.savez(tmp_path / "in.npz", shape=np.array([4, 4]), x=np.random.default_rng(0).random((2, 8), np.float32))
    return ["--input", tmp_path / "in.npz", "-o", tmp_path / "small.onnx", "--threads", 1, "--json"]


@pytest.mark.parametrize("is_checked", [False, True])
def test_a_wrong_kernel(cli, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_checked: bool) -> None:  # type: ignore[no-untyped-def]
    def copies(ctx: Lowering, g: Group) -> None:
        assert g.anchor.inputs[0] is not None
        ctx.copy(ctx.view(g.anchor.inputs[0]), ctx.target(g.anchor.outputs[0]), g.nodes)

    monkeypatch.setitem(RULES, "softmax", copies)
    if is_checked:
        monkeypatch.setenv("VIVACE_CHECK", "1")
    result = cli("reduce", chain, *arguments(tmp_path))
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["nodes"] == ["Softmax:e (Softmax)"] and data["n_nodes_before"] == 11
    assert data["failure"] == ("InternalError" if is_checked else "gives other answers than onnxruntime")
    small = onnx.load(tmp_path / "small.onnx")
    assert [v.name for v in small.graph.input] == ["d"] and [v.name for v in small.graph.output] == ["e"]
    with np.load(tmp_path / "small.npz") as values:
        assert values["d"].shape == (2, 8)
    again = cli("run", tmp_path / "small.onnx", "--input", tmp_path / "small.npz", "--against", "onnxruntime")
    assert again.code == (3 if is_checked else 1)


def test_a_fault_of_two_nodes_together(cli, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    for name in ("elementwise", "matmul"):

        def refuses(ctx: Lowering, g: Group, rule: Rule = RULES[name]) -> None:
            if {"sigmoid", "sqrt"} <= {n.op.name for n in g.nodes}:
                raise RuntimeError("together")
            rule(ctx, g)

        monkeypatch.setitem(RULES, name, refuses)
    data = json.loads(cli("reduce", chain, *arguments(tmp_path)).out)
    assert data["failure"] == "RuntimeError"
    assert [n.partition(":")[0] for n in data["nodes"]] == ["Sigmoid", "Sqrt"]


def test_a_model_that_does_not_fail_is_refused(cli, chain: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    result = cli("reduce", chain, *arguments(tmp_path))
    assert result.code == 2 and "does not fail" in result.err
    assert not (tmp_path / "small.onnx").exists()


def test_what_remains_is_needed() -> None:
    for wanted in ([0], [49], [3, 4], [0, 25, 49], list(range(0, 50, 7))):
        trials = 0

        def fails(nodes: object, wanted: list[int] = wanted) -> bool:
            nonlocal trials
            trials += 1
            return set(wanted) <= set(nodes)  # type: ignore[call-overload]

        assert minimize(50, fails) == wanted
        assert trials <= 60 * len(wanted)
