"""Every rule, from its own examples: it fires, the graph stays valid, and the result computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vivace.graph.graph import Graph
from vivace.graph.reference import evaluate
from vivace.graph.rewrite import Example, Log, Rule, rewrite
from vivace.graph.text import constants_of, parse_graph, print_graph
from vivace.graph.verify import verify
from vivace.optimize.check import random_inputs
from vivace.optimize.pipeline import PIPELINE

RULES = {r.name: r for p in PIPELINE for r in p.rules}
CASES = [(r, i, example) for r in RULES.values() for i, example in enumerate(r.examples)]


def both(rule: Rule, example: Callable[[Example], Any]) -> tuple[Graph, Graph, Log]:
    graph = Example().graph(example)
    verify(graph)
    log = Log(explain=(rule.name,))
    result = rewrite(graph, [rule], log)
    verify(result)
    return graph, result, log


@pytest.mark.parametrize(("rule", "i", "example"), CASES, ids=[f"{r.name}-{i}" for r, i, _ in CASES])
def test_fires_and_computes_the_same(rule: Rule, i: int, example: Callable[[Example], Any]) -> None:
    graph, result, log = both(rule, example)
    assert log.fired[rule.name] > 0, log.notes
    for seed in range(2):
        feeds = random_inputs(graph, dict.fromkeys("BNT", 3), seed)
        for want, got in zip(evaluate(graph, feeds), evaluate(result, feeds), strict=True):
            assert got.dtype == want.dtype
            if want.dtype.kind == "f":
                np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
            else:
                np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_has_examples_and_documentation(rule: Rule) -> None:
    assert rule.examples
    assert "=" in rule.doc or "nothing" in rule.doc or "compile time" in rule.doc or "reshape" in rule.doc


@pytest.mark.parametrize(("rule", "i", "example"), CASES, ids=[f"{r.name}-{i}" for r, i, _ in CASES])
def test_comes_to_rest(rule: Rule, i: int, example: Callable[[Example], Any]) -> None:
    _, result, _ = both(rule, example)
    again = Log()
    assert rewrite(result, [rule], again) is result
    assert not again.fired


@pytest.mark.parametrize(("rule", "i", "example"), CASES, ids=[f"{r.name}-{i}" for r, i, _ in CASES])
def test_result_prints_and_parses(rule: Rule, i: int, example: Callable[[Example], Any]) -> None:
    for graph in both(rule, example)[:2]:
        text = print_graph(graph)
        assert print_graph(parse_graph(text, constants_of(graph))) == text


def test_new_nodes_carry_origins_and_the_rule() -> None:
    _, result, _ = both(RULES["fuse_gelu"], RULES["fuse_gelu"].examples[0])
    (node,) = result.nodes
    assert node.origin == ("example", "+fuse_gelu")


def test_names_are_unique_across_passes() -> None:
    kinds: dict[str, Rule] = {}
    for p in PIPELINE:
        for r in p.rules:
            assert kinds.setdefault(r.name, r) is r, f"two rules are called {r.name}"
    assert not {p.name for p in PIPELINE} & set(kinds)
