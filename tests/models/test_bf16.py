"""Real models in bf16: the error against ONNX Runtime's f32, the choice of class, and that casts fuse.

Tolerance: a product adds two roundings, of its operand and of its weights, each off by at most 2**-9 and by 2**-9 / 3
of the value in power on average: n products stand `10 log10(3 * 2**18 / 2n)` dB below the values if nothing damps or
amplifies them. Depthwise networks amplify: 18 dB is the most that any of these models takes (MobileNetV2; OpenVINO's
bf16 loses as much there).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from benchmarks.models import MODELS, Extra, Model, ModelUnavailable, inputs, is_ready, materialise

import vivace
from vivace.base.knobs import knobs
from vivace.base.machine import ISAS, host, missing_flags
from vivace.measure.compare import Tolerance, compare_arrays
from vivace.runtime.engine import Engine

AMPLIFIED_DB = 18.0
# Steps that only convert, besides one for each norm whose result both products and an addition read. An input of the
# model that a product reads is one; so is a value that a product and an operator without bf16 both read.
CASTS = 2


def file_of(model: Model) -> Path:
    if model.extra is not Extra.NONE and not is_ready(model.name):
        pytest.skip(f"{model.name} is not in the cache; make it with: python -m benchmarks.models get {model.name}")
    try:
        return materialise(model.name)
    except ModelUnavailable as e:
        pytest.skip(str(e))


def reference(file: Path | bytes, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def check(model: Model, engine: Engine, feeds: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    got = engine.run(feeds)
    n_products = engine.stats["n_narrow_products"]
    assert isinstance(n_products, int)
    least_db = 10 * math.log10(3 * 2**18 / (2 * max(n_products, 1))) - AMPLIFIED_DB
    for name, w in want.items():
        y = got[name]
        assert (y.shape, y.dtype) == (w.shape, w.dtype)
        if w.dtype.kind != "f" or not w.size:
            continue
        found = compare_arrays(name, y, w, Tolerance(0, 0))
        assert found.n_special == 0
        assert found.snr_db >= least_db, f"{name}: {found.snr_db:.1f} dB, {least_db:.1f} wanted"
        if w.ndim == 2 and w.shape[1] >= 100:  # classes: each one's first choice is among the other's first five
            for a, b in ((y, w), (w, y)):
                assert (np.argsort(-a, axis=1)[:, :5] == b.argmax(axis=1)[:, None]).any(axis=1).all()


def marked(model: Model) -> object:
    return pytest.param(model, id=model.name, marks=[pytest.mark.slow] if model.extra is Extra.TORCH else [])


@pytest.mark.parametrize("model", [marked(m) for m in MODELS])
def test_error_of_bf16(model: Model) -> None:
    path = file_of(model)
    with knobs.scope(emulate=True):
        engine = vivace.compile(path, threads=1, providers=("native",), precision="bf16")
    assert isinstance(engine, Engine)
    for case in model.cases:
        feeds = inputs(model.name, case.name)
        check(model, engine, feeds, reference(path, feeds))
    labels = [line.label for line in engine.image.lines if line.kind == "run"]
    norms = sum(label in ("layer_norm", "rms_norm") for label in labels)
    n_beyond = labels.count("cast") - CASTS - norms
    if n_beyond > 0:  # what f32 has as well
        plain = vivace.compile(path, threads=1, providers=("native",))
        assert isinstance(plain, Engine)
        assert n_beyond <= sum(line.label == "cast" for line in plain.image.lines)


def beginning(path: Path) -> bytes:
    """The model up to its fourth squeeze-and-excitation."""
    whole = onnx.load(path)
    ends = [i for i, node in enumerate(whole.graph.node) if node.op_type == "GlobalAveragePool"]
    last = whole.graph.node[ends[3]].input[0]
    del whole.graph.node[ends[3] :], whole.graph.output[:]
    whole.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    return whole.SerializeToString()


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    """Emulated where it has no products of bf16. The blocks of the rest of the model are of the same kinds."""
    if missing_flags(host(), ISAS[isa]):
        pytest.skip("not on this CPU")
    model = next(m for m in MODELS if m.name == "ppocr-cls")
    file, feeds = beginning(file_of(model)), inputs(model.name, model.cases[0].name)
    with knobs.scope(emulate=True):
        engine = vivace.compile(file, threads=2, providers=("native",), precision="bf16", target=isa)
    assert isinstance(engine, Engine)
    kinds = {line.label for line in engine.image.lines if line.kind == "run"}
    assert {"conv", "depthwise", "reduce_mean", "cast+mul", "cast"} <= kinds
    check(model, engine, feeds, reference(file, feeds))
