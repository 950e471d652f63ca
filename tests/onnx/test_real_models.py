"""The real models that are in the cache: everything native, and outputs as ONNX Runtime's."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from benchmarks.models import BY_NAME, inputs, is_ready, materialise

from vivace.base.dims import bounds, symbols
from vivace.graph.graph import Graph
from vivace.graph.reference import evaluate
from vivace.graph.verify import verify
from vivace.onnx.importer import import_model

LIGHT = {
    "ppocr-cls": None,
    "ppocrv4-rec": "1x3x48x160",
    "silero-vad": None,
    "silero-vad-16k": None,
    "silero-vad-ifless": None,
    "magika": None,
    "tabular-mlp": None,
    "tabular-forest": None,
    "minilm-l6": "1x16",
    "minilm-l6-eager": "1x16",
    "minilm-l6-op23": "1x16",
    "mobilenetv2-bn": None,
    "efficientnet-lite0": None,
}


def _graph(name: str) -> Graph:
    if name not in BY_NAME or not is_ready(name):
        pytest.skip(f"{name} is not in the cache; make it with: python -m benchmarks.models get {name}")
    return import_model(materialise(name))


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_node_is_native(name: str) -> None:
    graph = _graph(name)
    verify(graph)
    assert not any(n.op.name == "onnx" for n in graph.walk())


@pytest.mark.parametrize("name", LIGHT)
def test_outputs_agree_with_onnxruntime(name: str) -> None:
    graph = _graph(name)
    feed = inputs(name, LIGHT[name])
    session = ort.InferenceSession(str(materialise(name)), providers=["CPUExecutionProvider"])
    for got, want in zip(evaluate(graph, feed), session.run(None, feed), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_what_is_assumed_about_the_sizes_of_inputs() -> None:
    """Multiples of 32 for the detector, 512 positions for the encoder; what a branch needs binds only that branch."""
    detector = _graph("ppocrv4-det").inputs[0]
    assert [str(d).split("*")[0] for d in detector.shape[2:]] == ["32", "32"]
    assert bounds(_graph("minilm-l6").inputs[0].shape[1]) == (0, 512)
    assert {bounds(d) for v in _graph("silero-vad").inputs for d in v.shape if list(symbols(d))} == {(0, None)}
