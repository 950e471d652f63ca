"""The real models that are in the cache: what fuses, how many transposes stay, equal outputs from the exported file."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest
from benchmarks.models import BY_NAME, inputs, is_ready, materialise

from vivace.graph.graph import Graph
from vivace.onnx.exporter import count_operators, export
from vivace.onnx.importer import import_model
from vivace.optimize.pipeline import Level, optimize
from vivace.optimize.report import Report

ort = pytest.importorskip("onnxruntime")

FUSED: dict[str, dict[str, int]] = {
    "resnet50": {"conv": 53, "transpose": 1},
    "resnet50-bn": {"conv": 53, "transpose": 1, "mul": 0},
    "mobilenetv2": {"conv": 52, "transpose": 1},
    "mobilenetv2-bn": {"conv": 52, "transpose": 1, "mul": 0},
    "efficientnet-lite0": {"conv": 49, "transpose": 1},
    "efficientnet-lite0-ts": {"conv": 49, "transpose": 1, "pad": 0},
    "ppocr-cls": {"conv": 53, "transpose": 1, "hard_swish": 18, "hard_sigmoid": 9},
    "ppocrv4-det": {"conv": 62, "transpose": 1, "hard_swish": 24, "hard_sigmoid": 10},
    "ppocrv4-rec": {"conv": 38, "transpose": 9, "attention": 2, "layer_norm": 5, "silu": 7, "hard_swish": 28},
    "minilm-l6": {"attention": 6, "layer_norm": 13, "gelu": 6, "transpose": 24, "isnan": 0, "gather_nd": 0},
    "minilm-l6-eager": {"attention": 6, "layer_norm": 13, "gelu": 6, "transpose": 24},
    "minilm-l6-op23": {"attention": 6, "layer_norm": 13, "gelu": 6, "transpose": 24},
    "bert-base": {"attention": 12, "layer_norm": 25, "gelu": 12, "transpose": 48},
    "vit-b": {"attention": 12, "layer_norm": 25, "gelu": 12, "transpose": 49, "isnan": 0},
    "whisper-tiny-en-encoder": {"attention": 4, "layer_norm": 9, "gelu": 6, "transpose": 17},
    "smollm2-135m": {"attention": 30, "rms_norm": 61, "silu": 30, "transpose": 120, "softmax": 0},
    "silero-vad": {"transpose": 0},
    "basic-pitch": {"conv": 32, "transpose": 2},
    "magika": {"gelu": 2, "softmax": 1, "transpose": 0, "gather": 1, "eq": 0},
}
PORTABLE = {
    "ppocr-cls": (None, 124),
    "ppocrv4-rec": ("1x3x48x160", 182),
    "silero-vad": (None, 54),
    "silero-vad-ifless": (None, 90),
    "magika": (None, 60),
    "basic-pitch": (None, 177),
    "tabular-mlp": (None, 13),
    "minilm-l6": ("1x16", 194),
    "minilm-l6-eager": ("1x16", 194),
    "minilm-l6-op23": ("1x16", 169),
    "mobilenetv2-bn": (None, 99),
    "efficientnet-lite0-ts": (None, 93),
}
"""The case to run, and the operators that the portable file may have."""


@cache
def imported(name: str) -> Graph:
    if name not in BY_NAME or not is_ready(name):
        pytest.skip(f"{name} is not in the cache; make it with: python -m benchmarks.models get {name}")
    return import_model(materialise(name))


@pytest.mark.parametrize("name", FUSED)
def test_what_is_left_of_it(name: str) -> None:
    report = Report()
    optimize(imported(name), Level.ALL, report=report)
    left: Counter[str] = report.ops_after
    assert {op: left[op] for op in FUSED[name]} == FUSED[name]


@pytest.mark.parametrize("name", PORTABLE)
def test_exported_file_is_small_and_computes_the_same(name: str) -> None:
    case, operators = PORTABLE[name]
    model = export(optimize(imported(name), Level.EXTENDED), 23 if name.endswith("op23") else 20)
    assert count_operators(model).total() <= operators
    feeds = inputs(name, case)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    before, after = (
        ort.InferenceSession(m, options, providers=["CPUExecutionProvider"])
        for m in (str(materialise(name)), model.SerializeToString())
    )
    assert [o.name for o in after.get_outputs()] == [o.name for o in before.get_outputs()]
    for want, got in zip(before.run(None, feeds), after.run(None, feeds), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
