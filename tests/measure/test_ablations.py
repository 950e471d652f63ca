"""The ablations name what exists, and functions that are spelled out are the same functions."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.ablations import ABLATIONS, MADE, SPELLED_OUT, compare_engines, markdown
from benchmarks.models import MODELS

import vivace
from vivace.lower.lowering import OPTIONS
from vivace.optimize.pipeline import rule_names


def test_every_option_has_a_line() -> None:
    disabled = {name for names, _ in ABLATIONS.values() for name in names}
    assert set(OPTIONS) <= disabled <= {*OPTIONS, *rule_names()}
    assert {case.model for _, cases in ABLATIONS.values() for case in cases} <= {m.name for m in MODELS} | MADE.keys()


@pytest.mark.parametrize("name", SPELLED_OUT)
def test_spelled_out_functions(name: str) -> None:
    *models, x = SPELLED_OUT[name]()
    engines = [vivace.compile(model, threads=1) for model in models]
    one, spelled = (next(iter(e.run(x).values())) for e in engines)
    np.testing.assert_allclose(one, spelled, rtol=1e-4, atol=1e-5)
    record = compare_engines(*engines, x, 0.0)
    assert record["agrees"] and record["kernels"][0] < record["kernels"][1]
    table = markdown([{**record, "model": name, "ablation": name, "threads": 1, "cpu": "this one"}])
    assert f"| {name} | 1 | 1 | " in table and f"| {name} | {name} | 1 | " in table
