"""The ablations name what exists, and functions that are spelled out are the same functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from benchmarks.ablation_cases import ABLATIONS, DECISIONS, MADE, SPELLED_OUT, Case
from benchmarks.ablations import Side, compare_sides, markdown, settled
from benchmarks.models import MODELS

import vivace
from vivace.lower.choices import DEFAULT
from vivace.lower.lowering import OPTIONS
from vivace.optimize.pipeline import rule_names


def test_every_option_has_a_line() -> None:
    disabled = {name for a in ABLATIONS.values() for name in a.without}
    assert set(OPTIONS) <= disabled <= {*OPTIONS, *rule_names()}
    assert {case.model for a in ABLATIONS.values() for case in a.cases} <= {m.name for m in MODELS} | MADE.keys()


@pytest.mark.parametrize("name", SPELLED_OUT)
def test_spelled_out_functions(name: str) -> None:
    *models, x = SPELLED_OUT[name]()
    sides = [Side(vivace.compile(model, threads=1), x) for model in models]
    one, spelled = (next(iter(side.run().values())) for side in sides)
    np.testing.assert_allclose(one, spelled, rtol=1e-4, atol=1e-5)
    record = compare_sides(sides[0], sides[1], 0.0)
    assert record["agrees"] and record["kernels"][0] < record["kernels"][1]
    table = markdown([{**record, "model": name, "ablation": name, "threads": 1, "cpu": "this one"}])
    assert f"| {name} | " in table and f"| {name} | {name} | 1 | " in table


@pytest.mark.parametrize("name", ["embeddings", "windowed"])
def test_parts_of_models(name: str) -> None:
    (ablation,) = [a for a in ABLATIONS.values() if Case(name) in a.cases]
    model, x = MADE[name]()
    sides = [Side(vivace.compile(model, threads=1, disable=names), x) for names in ((), ablation.without)]
    record = compare_sides(sides[0], sides[1], 0.0)
    assert record["agrees"] and record["kernels"][0] < record["kernels"][1]


def test_a_decision_is_settled_for_all_products() -> None:
    model, x = MADE["text_head"]()
    assert all(choice != DEFAULT for _, choice in DECISIONS.values())
    engines: list[Any] = [settled(model, x, 1, DECISIONS[name][1]) for name in ("units", "panel_lanes")]
    results = [next(iter(e.run(x).values())) for e in (vivace.compile(model, threads=1), *engines)]
    for y in results[1:]:
        np.testing.assert_array_equal(y, results[0])
    assert len({tuple(e.image.objects) for e in engines}) == 2
