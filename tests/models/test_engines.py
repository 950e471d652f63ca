"""Every real model on our engine: each output at each case against onnxruntime, the providers, and counts of steps.

The counts (steps, kernels, copies, conversions) are deterministic; `engine_counts.json` keeps them. A change that is
meant is accepted with `VIVACE_ACCEPT=1 python -m pytest tests/models/test_engines.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from benchmarks.models import MODELS, Extra, Model, ModelUnavailable, inputs, is_ready, materialise

import vivace
from vivace.base.machine import ISAS, host, missing_flags
from vivace.runtime.engine import Engine

COUNTS = Path(__file__).with_name("engine_counts.json")
ACCEPT = bool(os.environ.get("VIVACE_ACCEPT"))
# Relative to the largest magnitude of an output: f32 sums in another order, through as many layers as the model has.
# basic-pitch takes logarithms of spectra near silence: there even two orders of one sum differ by this much.
TOLERANCE = {"ppocrv4-det": 2e-4, "whisper-tiny-en-encoder": 2e-4, "basic-pitch": 1e-3}
USUAL = 5e-5
# Another vector width takes other kernels, and Winograd's tiles follow what stays in the second-level cache.
COUNTED_ON, COUNTED_L2_BYTES = "avx512", 2 << 20


@pytest.fixture(scope="module")
def kept() -> Iterator[dict[str, dict[str, int]]]:
    found: dict[str, dict[str, int]] = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    yield found
    if ACCEPT:
        COUNTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def file_of(model: Model) -> Path:
    if model.extra is not Extra.NONE and not is_ready(model.name):
        pytest.skip(f"{model.name} is not in the cache; make it with: python -m benchmarks.models get {model.name}")
    try:
        return materialise(model.name)
    except ModelUnavailable as e:
        pytest.skip(str(e))


def marked(model: Model) -> object:
    heavy = model.extra is Extra.TORCH
    return pytest.param(model, id=model.name, marks=[pytest.mark.slow] if heavy else [])


@pytest.mark.parametrize("model", [marked(m) for m in MODELS])
def test_every_output_at_every_case(model: Model, kept: dict[str, dict[str, int]]) -> None:
    """One compilation without given shapes serves all cases, with one thread and with two."""
    import onnxruntime

    path = file_of(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    engine = vivace.compile(path, threads=1, providers=("native",))
    assert isinstance(engine, Engine)
    pair = Engine(engine.image, 2, engine.placement)
    names = [o.name for o in session.get_outputs()]
    for case in model.cases:
        feeds = inputs(model.name, case.name)
        want = dict(zip(names, session.run(None, feeds), strict=True))
        for made in (engine, pair):
            compare(model, f"{case.name}, {made.threads} threads", made.run(feeds), want)
        memory = engine.memory({name: x.shape for name, x in feeds.items()})
        assert memory["arena_bytes"] <= 1.05 * memory["arena_lower_bound_bytes"], case.name
    assert {p.provider for p in engine.placement} == {"native"}
    check_counts(model.name, engine, kept)


def compare(model: Model, where: str, got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert list(got) == list(want)
    for name, w in want.items():
        y = got[name]
        assert (y.shape, y.dtype) == (w.shape, w.dtype), f"{where}: {name}"
        if w.dtype.kind != "f":
            np.testing.assert_array_equal(y, w, err_msg=f"{where}: {name}")
            continue
        scale = float(np.abs(w).max(initial=0)) or 1.0
        off = float(np.abs(y - w).max(initial=0)) / scale
        assert off <= TOLERANCE.get(model.name, USUAL), f"{where}: {name} is off by {off:.1e} of its largest value"


def counts(engine: Engine) -> dict[str, int]:
    labels = [line.label for line in engine.image.lines if line.kind == "run"]
    return {
        "steps": len(labels),
        "kernels": len(engine.image.kernels),
        "copies": sum(label in ("copy", "cast", "fill") for label in labels),
        "foreign": len(engine.image.foreign),
    }


def check_counts(name: str, engine: Engine, kept: dict[str, dict[str, int]]) -> None:
    if missing_flags(host(), ISAS[COUNTED_ON]) or host().cache_bytes(2) != COUNTED_L2_BYTES:
        return  # they are recorded for such a machine only
    found = counts(engine)
    if ACCEPT:
        kept[name] = found
    assert found == kept.get(name), f"{name}: accept a change that is meant with VIVACE_ACCEPT=1"


def test_a_model_without_native_code_runs_through_onnxruntime(tmp_path: Path) -> None:
    """A support vector machine, which is one operator."""
    import onnx
    import onnxruntime
    from onnx import helper

    vectors = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    svm = helper.make_node(
        "SVMRegressor", ["x"], ["y"], domain="ai.onnx.ml", kernel_type="RBF", kernel_params=[0.5, 0.0, 3.0],
        n_supports=4, support_vectors=vectors.ravel().tolist(), coefficients=[1.0, -2.0, 0.5, 0.25], rho=[0.1],
    )  # fmt: skip
    ends = [helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 3), ("y", 1))]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    path = tmp_path / "svm.onnx"
    graph = helper.make_graph([svm], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    engine = vivace.compile(path, threads=1)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for n in (1, 5):
        x = np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32)
        np.testing.assert_allclose(engine.run({"x": x})["y"], session.run(None, {"x": x})[0], rtol=1e-5)
    foreign = [p for p in engine.placement if p.provider == "onnxruntime"]
    assert foreign and all(p.reason for p in foreign)
