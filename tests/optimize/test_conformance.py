"""The node cases of ONNX, optimized at every level: the same results; and exported: a valid model."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases

from vivace.base.errors import UnsupportedError, VivaceError
from vivace.graph.graph import Graph
from vivace.graph.reference import evaluate
from vivace.onnx.exporter import export
from vivace.onnx.importer import import_model
from vivace.optimize.pipeline import Level, optimize

WITHOUT_ONNX_FORM = {
    "shifts of i8 are not in opset 20",
    "shifts of i16 are not in opset 20",
    "shifts of i32 are not in opset 20",
    "shifts of i64 are not in opset 20",
    "a convolution of i32 has no ONNX form",
}
"""What the exporter may refuse. Convolutions whose weights come at run time keep their i32 operands."""
PARTS = 8


@cache
def cases() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [c for c in collect_testcases(None) if not c.name.endswith("_expanded")]


def runnable(case: Any) -> tuple[Graph, list[np.ndarray], list[np.ndarray]] | None:
    """The graph, inputs and results of a case that is native and whose inputs are tensors."""
    inputs = case.data_sets[0][0]
    if not all(isinstance(x, np.ndarray | np.generic) for x in inputs):
        return None
    try:
        graph = import_model(case.model)
        arrays = [np.asarray(x) for x in inputs]
        return graph, arrays, evaluate(graph, arrays)
    except VivaceError:
        return None


def assert_close(got: np.ndarray, want: np.ndarray, name: str) -> None:
    assert got.shape == want.shape, name
    assert got.dtype == want.dtype, name
    if want.dtype == object:
        return
    loose = want.dtype.itemsize < 4 and want.dtype.kind not in "iub"
    tolerance = 2e-2 if loose else 1e-5
    np.testing.assert_allclose(
        got.astype(np.float64), want.astype(np.float64), rtol=tolerance, atol=tolerance, err_msg=name
    )


@pytest.mark.parametrize("part", range(PARTS))
def test_optimized_and_exported(part: int) -> None:
    ran = 0
    for case in cases()[part::PARTS]:
        found = runnable(case)
        if found is None:
            continue
        graph, inputs, want = found
        ran += 1
        for got, expected in zip(evaluate(optimize(graph, Level.ALL), inputs), want, strict=True):
            assert_close(got, expected, case.name)
        try:
            model = export(optimize(graph, Level.EXTENDED))
        except UnsupportedError as e:
            assert e.what in WITHOUT_ONNX_FORM, case.name
            continue
        onnx.checker.check_model(model, full_check=True)
    assert ran > 60
