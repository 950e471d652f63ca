"""tree_ensemble as generated code, against what the graph means."""

from __future__ import annotations

import numpy as np
import pytest
from tests.lower.harness import BEST, build, check, check_engine

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Graph, Type
from vivace.lower.rules import trees
from vivace.lower.rules.trees import pack

Array = np.ndarray


def forest(
    seed: int, n_trees: int, n_nodes: int, n_features: int, n_targets: int, missing: bool = False
) -> list[Array]:
    """Random trees of `n_nodes` nodes each; some nodes are shared by several."""
    rng = np.random.default_rng(seed)
    m, n_leaves = n_trees * n_nodes, 7
    children = rng.integers(-n_leaves, 0, (m, 2))
    for t in range(n_trees):
        for k in range(1, n_nodes):  # a later node is a child of an earlier one, so that there is no cycle
            children[t * n_nodes + int(rng.integers(k)), int(rng.integers(2))] = t * n_nodes + k
    return [
        rng.integers(0, n_features, m).astype(np.int32), rng.normal(size=m).astype(np.float32),
        rng.random(m) < (0.5 if missing else 0.0), children.astype(np.int32),
        (np.arange(n_trees) * n_nodes if n_nodes else rng.integers(-n_leaves, 0, n_trees)).astype(np.int32),
        rng.normal(size=(n_leaves, n_targets)).astype(np.float32),
    ]  # fmt: skip


def graph_of(arrays: list[Array], n_features: int, reduce: str = "add") -> Graph:
    rows = Type(DType.f32, (symbol("rows", 0), n_features))
    return build(lambda b, x: b.tree_ensemble(x, *(b.const(a) for a in arrays), reduce=reduce), rows)


def data(n: int, n_features: int) -> Array:
    x = np.random.default_rng(n).normal(size=(n, n_features)).astype(np.float32)
    x[np.random.default_rng(n + 1).random(x.shape) < 0.1] = np.nan
    return x


@pytest.mark.parametrize("isas", [(None,), ("sse",), (BEST,)])
@pytest.mark.parametrize(("n_trees", "n_nodes"), [(1, 5), (3, 0), (4, 9), (9, 30), (17, 12)])
def test_random_trees(isas: tuple[str | None, ...], n_trees: int, n_nodes: int) -> None:
    """Rows one by one, blocks of rows and rows that are left, fewer and more trees than go side by side."""
    for n_targets, reduce in ((1, "add"), (3, "min"), (10, "add"), (17, "max")):
        arrays = forest(n_nodes, n_trees, n_nodes, 6, n_targets, missing=n_targets == 3)
        for n in (1, 5, 37) if isas != (None,) else (1, 19):
            check(graph_of(arrays, 6, reduce), data(n, 6), isas=isas)


def test_no_rows() -> None:
    check(graph_of(forest(0, 2, 3, 4, 2), 4), np.zeros((0, 4), np.float32))


def test_several_threads() -> None:
    arrays = forest(1, 20, 40, 8, 3)
    check_engine(graph_of(arrays, 8), data(301, 8))


def test_many_features_and_nodes_take_two_words(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = forest(2, 5, 6, 1 << 28, 2, missing=True)
    assert pack(*arrays).is_wide
    arrays = forest(2, 5, 6, 9, 2, missing=True)
    assert not pack(*arrays).is_wide
    monkeypatch.setattr(trees, "WORD_BITS", 8)
    assert pack(*arrays).is_wide
    check(graph_of(arrays, 9), data(18, 9))


def test_shared_nodes_have_one_place() -> None:
    """A chain in which each node has the next as both children has 2**n paths and n places."""
    n = 30
    children = np.stack([np.arange(1, n + 1)] * 2, axis=1)
    children[-1] = (-1, -2)
    arrays = [
        np.zeros(n, np.int32), np.zeros(n, np.float32), np.zeros(n, bool), children.astype(np.int32),
        np.zeros(1, np.int32), np.array([[1.0], [2.0]], np.float32),
    ]  # fmt: skip
    packed = pack(*arrays)
    assert len(packed.records) == 2 * n + 1 and n <= packed.depth <= 2 * n
    check(graph_of(arrays, 1), np.array([[-1.0], [1.0], [np.nan]], np.float32))
