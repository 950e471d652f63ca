"""`providers="auto"`, with the clock replaced: tests never compare times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import vivace
from vivace import choice
from vivace.compilation import Compilation, load_graph
from vivace.measure.compare import Tolerance
from vivace.options import Options, choose_isa
from vivace.providers.provider import availability
from vivace.runtime.engine import Engine
from vivace.runtime.partitioned import PartitionedEngine

TEXT = """<ir_version: 9, opset_import: ["" : 17]>
    m (float[N, 8] x) => (float[N, 8] y)
    <float[8, 8] w = {1,0,0,0,0,0,0,0, 0,1,0,0,0,0,0,0, 0,0,1,0,0,0,0,0, 0,0,0,1,0,0,0,0,
                      0,0,0,0,1,0,0,0, 0,0,0,0,0,1,0,0, 0,0,0,0,0,0,1,0, 0,0,0,0,0,0,0,1}>
    { a = MatMul(x, w)  b = Exp(a)  c = MatMul(b, w)  d = Tanh(c)  e = Softmax(d)  f = MatMul(e, w)
      g = Exp(f)  h = Softmax(g)  i = Tanh(h)  y = MatMul(i, w) }"""
SHAPES = {"x": (16, 8)}

pytestmark = pytest.mark.skipif(not availability("openvino").is_available, reason="openvino is not installed")


def model() -> onnx.ModelProto:
    return onnx.parser.parse_model(TEXT)


class Clock:
    """Planted times: of wholes, then of each piece, then of the mixed engine against the best whole."""

    def __init__(self, *rows: Mapping[str, float]) -> None:
        self.rows: Iterator[Mapping[str, float]] = iter(rows)

    def __call__(
        self, runs: Mapping[str, Any], inputs: Any, near: Any, refused: Any, settings: Any
    ) -> dict[str, float]:
        outputs = [run(inputs) for run in runs.values()]
        for found in outputs[1:]:
            for name, a in outputs[0].items():
                np.testing.assert_allclose(found[name], a, rtol=1e-5, atol=1e-6)
        row = next(self.rows)
        return {name: row[name] for name in runs}


def plant(monkeypatch: pytest.MonkeyPatch, *rows: Mapping[str, float]) -> None:
    monkeypatch.setattr(choice, "_measure", Clock(*rows))


WHOLE = {"native": 1.0, "onnxruntime": 1.2, "openvino": 1.1}
OURS, THEIRS = (
    {"native": 0.1, "onnxruntime": 0.3, "openvino": 0.3},
    {"native": 0.4, "onnxruntime": 0.3, "openvino": 0.1},
)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIVACE_CACHE_DIR", str(tmp_path / "cache"))


def pieces_of_model() -> int:
    job = Compilation(model(), SHAPES, Options(1, choose_isa("host")))
    graph = job.portable_graph()
    return len(choice.split(graph, [1.0] * len(graph.nodes), {}))


def test_parts_go_to_whom_measures_fastest_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "node_seconds", lambda graph, ours, inputs: [1.0] * len(graph.nodes))
    rows = [THEIRS if k == 2 else OURS for k in range(pieces_of_model())]
    plant(monkeypatch, WHOLE, *rows, {"native": 1.0, "parts": 0.5})
    engine = vivace.compile(model(), providers="auto", shapes=SHAPES, threads=1)
    assert isinstance(engine, PartitionedEngine)
    assert [p.provider for p in engine.parts] == ["native", "openvino", "native"]
    assert engine.stats["auto_choice"] == "parts" and engine.facts["auto_ms"]["parts"] == 500.0  # type: ignore[index]
    theirs = [p for p in engine.placement if p.provider == "openvino"]
    assert theirs and all(p.reason == "measured: openvino 100 ms, onnxruntime 300 ms, native 400 ms" for p in theirs)

    plant(monkeypatch)  # nothing is measured again, neither by a second compile nor by a saved engine
    again = vivace.compile(model(), providers="auto", shapes=SHAPES, threads=1)
    engine.save(tmp_path / "m.vivace")
    loaded = vivace.load(tmp_path / "m.vivace", threads=1)
    assert again.placement == engine.placement == loaded.placement
    x = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    want = vivace.compile(model(), threads=1)(x)
    for e in (engine, again, loaded):
        np.testing.assert_allclose(e(x), want, rtol=1e-5, atol=1e-6)


def test_a_choice_is_remembered_for_the_same_weights_and_only_with_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"native": 1e-4, "onnxruntime": 5e-5, "openvino": 9e-5}
    second = {"native": 1e-4, "onnxruntime": 9e-5, "openvino": 5e-5}

    def provider(m: onnx.ModelProto, cache: bool = True) -> str:
        return vivace.compile(m, providers="auto", shapes=SHAPES, threads=1, cache=cache).placement[0].provider

    other = model()
    weights = np.asarray(onnx.numpy_helper.to_array(other.graph.initializer[0])) * 2
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    plant(monkeypatch, first, second, second)
    assert provider(model()) == "onnxruntime"
    assert provider(other) == "openvino"  # other weights are measured by themselves
    assert provider(model(), cache=False) == "openvino"  # measured, and not kept
    assert provider(model()) == "onnxruntime"


def test_a_partition_that_loses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "node_seconds", lambda graph, ours, inputs: [1.0] * len(graph.nodes))
    rows = [THEIRS if k == 2 else OURS for k in range(pieces_of_model())]
    plant(monkeypatch, WHOLE, *rows, {"native": 1.0, "parts": 0.99})
    engine = vivace.compile(model(), providers="auto", shapes=SHAPES, threads=1)
    assert isinstance(engine, Engine)
    assert engine.facts["auto_ms"]["parts"] == 990.0  # type: ignore[index]
    assert all("native 1e+03 ms" in p.reason for p in engine.placement)


def test_one_provider_for_all_can_be_chosen_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, {"native": 1e-4, "onnxruntime": 5e-5, "openvino": 9e-5})
    engine = vivace.compile(model(), providers="auto", shapes=SHAPES, threads=1)
    assert [p.provider for p in engine.placement] == ["onnxruntime"]
    engine.save(tmp_path / "m.vivace")
    loaded = vivace.load(tmp_path / "m.vivace", threads=1)
    x = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    np.testing.assert_array_equal(loaded(x), engine(x))


def test_who_gives_other_answers_or_fails_is_refused() -> None:
    def fails(inputs: Any) -> Any:
        raise vivace.VivaceError("no")

    runs = {"native": lambda x: {"y": x["x"]}, "wrong": lambda x: {"y": x["x"] + 1}, "fails": fails}
    refused: dict[str, str] = {}
    settings = choice.Settings(budget_seconds=0.0, least_rounds=1, turn_seconds=1e-4)
    times = choice._measure(runs, {"x": np.zeros(3, np.float32)}, Tolerance(), refused, settings)
    assert list(times) == ["native"] and refused["wrong"] == "its outputs differ from ours" and "no" in refused["fails"]


def test_borders_lie_where_little_crosses() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]> m (float[N, 64] x) => (float[N] z)
        { a = Exp(x)  b = Tanh(x)  c = Mul(a, b)  d = ReduceMax<axes = [1], keepdims = 0>(c)  e = Exp(d)
          f = Tanh(e)  z = Softmax(f) }"""
    graph = load_graph(onnx.parser.parse_model(text), None)
    groups = choice.split(graph, [1.0] * 7, {"N": 8}, n_pieces=2)
    assert [len(g) for g in groups] == [4, 3]
    assert [n for g in groups for n in g] == list(graph.nodes)


def test_the_estimate_counts_what_borders_cost() -> None:
    table = [{"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 0.7}, {"a": 1.0, "b": 2.0}]
    assert choice.assign(table, {"a": 3.0, "b": 4.7}) == ("a", "b", "a")
    assert choice.assign(table, {"a": 2.5, "b": 4.7}) is None  # a's borders cost a quarter each


def test_formats_are_not_chosen_beside_providers() -> None:
    with pytest.raises(vivace.VivaceError, match="in one"):
        vivace.compile(model(), providers="auto", precision="auto", max_drop=0.01)
