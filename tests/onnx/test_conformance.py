"""Every node case of the ONNX back end suite: imported, verified, evaluated in NumPy and compared.

A case is tried as it is; where it becomes an `onnx` node, also with its arguments (axes, sizes) as constants, as
models have them. The tables below list what is left to a provider or refused, exactly, so that they change knowingly.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.backend.test.case.node import collect_testcases

from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.graph.graph import Graph
from vivace.graph.reference import evaluate
from vivace.graph.verify import verify
from vivace.onnx.importer import import_model
from vivace.onnx.tensors import Tensors, data_type_of

SUPPORTED = {data_type_of(d) for d in DType}
OLD = {"test_not_2d", "test_not_3d", "test_not_4d"}  # opset 1

FALLBACK: dict[tuple[str, str], int] = {
    ("Adagrad", "it is not written with core ops"): 2,
    ("Adam", "it is not written with core ops"): 2,
    ("BatchNormalization", "it trains, or normalizes each position on its own"): 2,
    ("Bernoulli", "it is not written with core ops"): 3,
    ("BitCast", "it is not written with core ops"): 10,
    ("Cast", "it rounds to powers of two"): 2,
    ("Col2Im", "it is not written with core ops"): 5,
    ("CumProd", "it is not written with core ops"): 9,
    ("DFT", "it is not written with core ops"): 10,
    ("DeformConv", "it is not written with core ops"): 4,
    ("Det", "it is not written with core ops"): 2,
    ("Dropout", "it drops at random (training mode)"): 6,
    ("Einsum", "it takes a diagonal"): 1,
    ("Equal", "it works on strings"): 2,
    ("GridSample", "it is not written with core ops"): 18,
    ("ImageDecoder", "it is not written with core ops"): 9,
    ("LabelEncoder", "it works on strings"): 4,
    ("Loop", "its state grows from f32[1] to f32[slice_out_0]"): 1,
    ("MaxPool", "it also gives the positions of the maxima"): 2,
    ("MaxUnpool", "it is not written with core ops"): 2,
    ("MelWeightMatrix", "it is not written with core ops"): 1,
    ("Momentum", "it is not written with core ops"): 3,
    ("NonMaxSuppression", "it is not written with core ops"): 10,
    ("NonZero", "it is not written with core ops"): 1,
    ("OptionalGetElement", "it is not written with core ops"): 2,
    ("OptionalHasElement", "it is not written with core ops"): 6,
    ("RegexFullMatch", "it works on strings"): 3,
    ("Resize", "it resamples with antialiasing"): 4,
    ("Resize", "the output size depends on data"): 4,
    ("RoiAlign", "it is not written with core ops"): 3,
    ("STFT", "it is not written with core ops"): 2,
    ("Scan", "it is not written with core ops"): 1,
    ("StringConcat", "it works on strings"): 5,
    ("StringNormalizer", "it works on strings"): 6,
    ("StringSplit", "it works on strings"): 6,
    ("TensorScatter", "it is not written with core ops"): 3,
    ("TfIdfVectorizer", "it is not written with core ops"): 7,
    ("TreeEnsemble", "its input is f64"): 1,
    ("Unique", "it is not written with core ops"): 7,
    ("expanded bernoulli", "it is not written with core ops"): 3,
}
UNSUPPORTED: dict[tuple[str, str], int] = {
    ("Cast", "element type INT2 is not supported"): 5,
    ("Cast", "element type UINT2 is not supported"): 5,
    ("CastLike", "element type INT2 is not supported"): 5,
    ("CastLike", "element type UINT2 is not supported"): 5,
    ("DequantizeLinear", "element type INT2 is not supported"): 1,
    ("DequantizeLinear", "element type UINT2 is not supported"): 1,
    ("Identity", "is a optional"): 1,
    ("Identity", "is a sequence"): 1,
    ("If", "the output 'res' is a sequence"): 1,
    ("If", "the output 'sequence' is a optional"): 1,
    ("Loop", "is a optional"): 1,
    ("Loop", "is a sequence"): 1,
    ("OptionalGetElement", "is a optional"): 1,
    ("OptionalGetElement", "is a sequence"): 1,
    ("OptionalHasElement", "is a optional"): 1,
    ("QuantizeLinear", "element type INT2 is not supported"): 1,
    ("QuantizeLinear", "element type UINT2 is not supported"): 1,
    ("SequenceInsert", "is a sequence"): 2,
    ("SequenceMap", "is a sequence"): 6,
    ("SplitToSequence", "the output 'seq' is a sequence"): 3,
    ("expanded castlike", "element type INT2 is not supported"): 5,
    ("expanded castlike", "element type UINT2 is not supported"): 5,
    ("expanded sequence", "is a sequence"): 6,
}


@dataclass
class Outcome:
    native: int = 0
    fallback: Counter[tuple[str, str]] = field(default_factory=Counter)
    unsupported: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    found = Outcome()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suite itself divides by zero and overflows
        cases = collect_testcases(None)
        for case in cases:
            if case.name not in OLD:
                _run(case, found)
    return found


def test_cases_agree(outcome: Outcome) -> None:
    assert not outcome.failures, "\n".join(outcome.failures)
    assert outcome.native >= 1590


def test_fallbacks_are_known(outcome: Outcome) -> None:
    assert dict(outcome.fallback) == FALLBACK


def test_refusals_are_known(outcome: Outcome) -> None:
    assert dict(outcome.unsupported) == UNSUPPORTED


def _run(case: Any, found: Outcome) -> None:
    op = _operator(case.model)
    graph: Graph | None = None
    refusal = ""
    for model in _variants(case):
        try:
            trial = import_model(model)
            verify(trial)
        except UnsupportedError as e:
            refusal = refusal or e.what
            continue
        except Exception as e:
            found.failures.append(f"{case.name}: {type(e).__name__}: {e}")
            return
        graph = graph or trial
        if not any(n.op.name == "onnx" for n in trial.walk()):
            graph = trial
            break
    if graph is None:
        found.unsupported[op, refusal] += 1
        return
    left = [n for n in graph.walk() if n.op.name == "onnx"]
    if left:
        found.fallback[op, left[0].attrs["reason"]] += 1
        return
    try:
        _compare(case, graph)
    except Exception as e:
        found.failures.append(f"{case.name}: {type(e).__name__}: {str(e).strip()[:300]}")
    else:
        found.native += 1


def _operator(model: ModelProto) -> str:
    """The operator that a case is about: cases expanded into a function body start with other nodes."""
    name = model.graph.name.removeprefix("test_")
    return model.graph.node[0].op_type if not name.endswith("_expanded") else "expanded " + name.split("_")[0]


def _variants(case: Any) -> Iterator[ModelProto]:
    """The case; then with integer arguments, all arguments, and all inputs as constants."""
    yield case.model
    if any(isinstance(x, TensorProto) and x.data_type not in SUPPORTED for x in case.data_sets[0][0]):
        return
    arrays = [x if isinstance(x, (list, dict)) or x is None else _array(x) for x in case.data_sets[0][0]]
    for first, kinds in ((1, "iub"), (1, "iubfV"), (0, "iubfV")):
        model = ModelProto()
        model.CopyFrom(case.model)
        for i, (v, x) in enumerate(zip(model.graph.input, arrays)):
            if i >= first and isinstance(x, np.ndarray) and x.dtype.kind in kinds:
                model.graph.initializer.append(numpy_helper.from_array(x, v.name))
        yield model


def _array(x: Any) -> np.ndarray:
    return Tensors(None).array(x, "input") if isinstance(x, TensorProto) else np.asarray(x)


def _compare(case: Any, graph: Graph) -> None:
    names = [v.name for v in case.model.graph.input]
    for inputs, outputs in case.data_sets:
        feed = {n: _array(x) for n, x in zip(names, inputs) if any(v.name == n for v in graph.inputs)}
        for got, given in zip(evaluate(graph, feed), outputs, strict=True):
            want = _array(given)
            assert got.shape == want.shape and (got.dtype == want.dtype or want.dtype == object)
            if got.dtype.kind not in "fV":
                np.testing.assert_array_equal(got, want)
                continue
            half = (
                got.dtype.itemsize < 4
            )  # intermediate results of the suite are rounded to half precision, ours are not
            rtol, atol = (2e-2, 1e-3) if half else (case.rtol, max(case.atol, 1e-7))
            np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=atol)
