"""Every node case of the ONNX back end suite that is written with core ops: lowered, compiled, and compared with what
the ops mean.

The importer's own test holds that meaning to the suite; this one holds the generated code to the meaning.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from onnx.backend.test.case.node import collect_testcases
from tests.lower.harness import BEST, run_plan
from tests.onnx.test_conformance import OLD, _array, _variants

from vivace.base.errors import UnsupportedError
from vivace.base.machine import ISAS
from vivace.graph.graph import Graph
from vivace.graph.reference import bind, evaluate
from vivace.lower.lowering import lower
from vivace.onnx.importer import import_model

# A power within 2 ulp of a whole number, cut to an integer, may be one less.
INEXACT = {"test_pow_types_int64_float32", "test_pow_types_int32_float32"}

REFUSED = {
    "the size of a result is known only when it has run": 4,
}


@dataclass
class Outcome:
    native: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


@pytest.mark.slow
def test_generated_code_means_what_the_ops_mean() -> None:
    found = Outcome()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suite itself divides by zero and overflows
        for case in collect_testcases(None):
            if case.name not in OLD | INEXACT:
                _run(case, found)
    assert not found.failures, "\n".join(found.failures)
    assert found.native >= 1500
    assert dict(found.refused) == REFUSED


def _run(case: Any, found: Outcome) -> None:
    graph = _graph(case)
    if graph is None:
        return
    try:
        _compare(case, graph)
    except UnsupportedError as e:
        found.refused[_reason(e)] += 1
    except Exception as e:
        found.failures.append(f"{case.name}: {type(e).__name__}: {str(e).strip()[:300]}")
    else:
        found.native += 1


def _reason(e: UnsupportedError) -> str:
    return e.what if "code generator" in e.what else "the size of a result is known only when it has run"


def _graph(case: Any) -> Graph | None:
    """The case without `onnx` nodes, its arguments as constants where that is needed."""
    for model in _variants(case):
        try:
            graph = import_model(model)
        except UnsupportedError:
            continue
        if not any(n.op.name == "onnx" for n in graph.walk()):
            return graph
    return None


def _compare(case: Any, graph: Graph) -> None:
    plan = lower(graph, ISAS[BEST])
    names = [v.name for v in case.model.graph.input]
    for inputs, _ in case.data_sets:
        feed = {n: _array(x) for n, x in zip(names, inputs, strict=True)}
        arrays = [feed[v.name] for v in graph.inputs]
        dims = bind((v, x.shape) for v, x in zip(plan.inputs, arrays, strict=True))
        for got, want in zip(run_plan(plan, arrays, dims, BEST), evaluate(graph, arrays), strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype
            if got.dtype.kind not in "fV":
                np.testing.assert_array_equal(got, want)
                continue
            rtol, atol = (2e-2, 1e-3) if got.dtype.itemsize < 4 else (1e-3, 2e-6)
            np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=atol)
