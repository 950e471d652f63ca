"""Quantized variants of the real models: how many products run in integers, the same answers as onnxruntime's, and
errors against the f32 model that are those of onnxruntime."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from benchmarks.models import inputs, is_ready, materialise
from benchmarks.models.fetch import cache_dir
from benchmarks.models.quantized import materialise_quantized

import vivace
from vivace.onnx.importer import import_model
from vivace.optimize.pipeline import optimize

ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

PRODUCTS = {
    ("resnet50", "qdq"): {"conv_integer": 53, "matmul_integer": 1, "conv": 0, "matmul": 0},
    ("resnet50", "qlinear"): {"conv_integer": 53, "matmul_integer": 1, "conv": 0, "matmul": 0},
    ("mobilenetv2", "qdq"): {"conv_integer": 52, "matmul_integer": 1, "conv": 0, "matmul": 0},
    ("mobilenetv2", "qdq-signed"): {"conv_integer": 52, "matmul_integer": 1, "conv": 0, "matmul": 0},
    ("efficientnet-lite0", "qdq"): {"conv_integer": 49, "matmul_integer": 1, "conv": 0, "matmul": 0},
    ("minilm-l6-eager", "qdq"): {"matmul_integer": 36, "matmul": 12},
    ("minilm-l6-eager", "dynamic"): {"matmul_integer": 36, "quantize": 24},
}


def model_path(base: str, form: str) -> str:
    if not is_ready(base) or not (cache_dir() / f"{base}-{form}.onnx").exists():
        pytest.skip(f"{base}-{form} is not in the cache")
    return str(materialise_quantized(base, form))


def snr_db(want: np.ndarray, got: np.ndarray) -> float:
    want, got = want.astype(np.float64), got.astype(np.float64)
    return float(10 * np.log10((want**2).sum() / max(((want - got) ** 2).sum(), 1e-30)))


def ran(path: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize(("base", "form"), PRODUCTS)
def test_products_run_in_integers(base: str, form: str) -> None:
    graph = optimize(import_model(model_path(base, form)))
    found = Counter(n.op.name for n in graph.nodes)
    wanted = PRODUCTS[base, form]
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(("base", "form"), PRODUCTS)
def test_answers_are_as_good_as_those_of_onnxruntime(base: str, form: str) -> None:
    """Roundings at ties differ between runtimes and spread through the layers: both results are held to the f32
    model, ours may be at most 1 dB further from it."""
    path, feeds = model_path(base, form), inputs(base)
    engine = vivace.compile(path, shapes={k: v.shape for k, v in feeds.items()}, providers="native")
    got = engine.run(feeds)[engine.outputs[0].name]
    theirs, exact = ran(path, feeds), ran(str(materialise(base)), feeds)
    assert snr_db(exact, got) > snr_db(exact, theirs) - 1
    if exact.ndim == 2:
        np.testing.assert_array_equal(got.argmax(-1), theirs.argmax(-1))


def test_placement_says_what_is_no_integer_arithmetic() -> None:
    engine = vivace.compile(model_path("minilm-l6-eager", "qdq"), providers="native")
    reasons = Counter(p.reason for p in engine.placement if p.reason)
    assert reasons["f32 between integers: both operands of the product change at run time"] == 12
    assert reasons["f32 between integers: softmax is computed in f32"] == 6
    assert {p.provider for p in engine.placement} == {"native"}
