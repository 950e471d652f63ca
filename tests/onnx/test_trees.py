"""Tree ensembles of ai.onnx.ml: random trees, as the graph means them and on our engine, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tests.onnx.making import I64, model, node, value

import vivace
from vivace.base.errors import ModelError
from vivace.graph.graph import Graph
from vivace.graph.reference import evaluate
from vivace.graph.verify import verify
from vivace.onnx.exporter import export
from vivace.onnx.importer import import_model
from vivace.runtime.engine import Engine

Array = np.ndarray
N_FEATURES = 5
CHOICES = np.array([-np.inf, -2, -1, -0.0, 0, 0.5, 1, 2, np.inf], np.float32)
EVERY_MODE = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ")


def trees(
    seed: int, n_trees: int, depth: int, modes: tuple[str, ...] = EVERY_MODE, missing: bool = True
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """The `nodes_*` attributes of random trees, and where their leaves are."""
    rng = np.random.default_rng(seed)
    text = "treeids nodeids featureids values modes truenodeids falsenodeids missing_value_tracks_true"
    rows: list[list[Any]] = []
    leaves = []
    for tree in range(n_trees):
        n_nodes = 0

        def grow(left: int, tree: int = tree) -> int:
            nonlocal n_nodes
            me, n_nodes = n_nodes, n_nodes + 1
            row: list[Any] = [tree, me, 0, 0.0, "LEAF", 0, 0, 0]
            rows.append(row)
            if left == 0 or (left < depth and rng.random() < 0.2):
                leaves.append((tree, me))
                return me
            row[2], row[3], row[4] = int(rng.integers(N_FEATURES)), float(rng.choice(CHOICES)), str(rng.choice(modes))
            row[7] = int(rng.integers(2)) if missing else 0
            row[5] = grow(left - 1)
            row[6] = grow(left - 1)
            return me

        grow(depth if tree else min(depth, 2))
    return {f"nodes_{name}": [r[k] for r in rows] for k, name in enumerate(text.split())}, leaves


def votes(
    name: str, leaves: list[tuple[int, int]], n_targets: int, seed: int, positive: bool = False
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    said = [(t, k, c) for t, k in leaves for c in range(n_targets)]
    weights = rng.integers(1 if positive else -8, 9, len(said)) / 8
    ids = {"treeids": 0, "nodeids": 1, "ids": 2}
    return {f"{name}_{k}": [s[i] for s in said] for k, i in ids.items()} | {f"{name}_weights": weights.tolist()}


def rows(n: int, seed: int = 0) -> Array:
    """Numbers that often equal a threshold, and some NaN."""
    x = np.random.default_rng(seed).choice(CHOICES, (n, N_FEATURES))
    x[np.random.default_rng(seed + 1).random(x.shape) < 0.1] = np.nan
    return x


def regressor(attrs: dict[str, Any], n_targets: int) -> ModelProto:
    nodes = [node("TreeEnsembleRegressor", "x", "y", domain="ai.onnx.ml", n_targets=n_targets, **attrs)]
    return model(nodes, [value("x", ["n", N_FEATURES])], [value("y", ["n", n_targets])], ai_onnx_ml=3)


def classifier(attrs: dict[str, Any], labels: list[int]) -> ModelProto:
    nodes = [node("TreeEnsembleClassifier", "x", "label y", domain="ai.onnx.ml", classlabels_int64s=labels, **attrs)]
    outputs = [value("label", ["n"], I64), value("y", ["n", len(labels)])]
    return model(nodes, [value("x", ["n", N_FEATURES])], outputs, ai_onnx_ml=3)


def native(proto: ModelProto) -> Graph:
    graph = import_model(proto)
    verify(graph)
    assert [n.attrs["reason"] for n in graph.walk() if n.op.name == "onnx"] == []
    return graph


def check(proto: ModelProto, tmp_path: Any, atol: float = 1e-6) -> None:
    """The graph, the graph written and read again, and the engine, against ONNX Runtime."""
    path = tmp_path / "trees.onnx"
    path.write_bytes(proto.SerializeToString())
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    graph = native(proto)
    written = export(graph)
    again = native(written)
    session_again = ort.InferenceSession(written.SerializeToString(), providers=["CPUExecutionProvider"])
    engine = vivace.compile(path, threads=2, providers=("native",))
    assert isinstance(engine, Engine)
    for n in (1, 7, 40):
        x = rows(n, seed=n)
        want = session.run(None, {"x": x})
        found = [evaluate(graph, [x]), evaluate(again, [x]), session_again.run(None, {"x": x})]
        found.append(list(engine.run({"x": x}).values()))
        for got in found:
            for g, w in zip(got, want, strict=True):
                assert (g.shape, g.dtype) == (w.shape, w.dtype)
                np.testing.assert_allclose(g, w, rtol=1e-6, atol=atol)
    empty = engine.run({"x": rows(0)})
    assert [a.shape[0] for a in empty.values()] == [0] * len(engine.outputs)


@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize("missing", [False, True])
def test_every_test_with_infinities_and_nan(mode: str, missing: bool, tmp_path: Any) -> None:
    nodes, leaves = trees(3, 4, 4, (mode,), missing)
    check(regressor(nodes | votes("target", leaves, 1, 5), 1), tmp_path)


@pytest.mark.parametrize("aggregate", ["SUM", "AVERAGE", "MIN", "MAX"])
@pytest.mark.parametrize("n_targets", [1, 3, 20])
def test_regressors(aggregate: str, n_targets: int, tmp_path: Any) -> None:
    nodes, leaves = trees(n_targets, 11, 6)
    attrs = nodes | votes("target", leaves, n_targets, 1) | {"aggregate_function": aggregate}
    base = (np.arange(n_targets) / 4).tolist()
    check(regressor(attrs | {"base_values": base}, n_targets), tmp_path)


@pytest.mark.parametrize("transform", ["SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO"])
def test_transforms(transform: str, tmp_path: Any) -> None:
    nodes, leaves = trees(9, 5, 4)
    check(regressor(nodes | votes("target", leaves, 4, 1) | {"post_transform": transform}, 4), tmp_path)
    check(classifier(nodes | votes("class", leaves, 4, 1) | {"post_transform": transform}, [3, 1, 4, 9]), tmp_path)


def test_probit(tmp_path: Any) -> None:
    nodes, leaves = trees(9, 5, 4)
    attrs = nodes | votes("target", leaves, 3, 1, positive=True)
    attrs |= {"post_transform": "PROBIT", "aggregate_function": "AVERAGE"}
    attrs["target_weights"] = [w * 0.9 + 0.05 for w in attrs["target_weights"]]
    check(regressor(attrs, 3), tmp_path, atol=1e-4)


@pytest.mark.parametrize("n_trees", [1, 3, 8, 13])
def test_classifiers_with_ties(n_trees: int, tmp_path: Any) -> None:
    """Votes are few multiples of an eighth, so that classes are often level: the first wins."""
    nodes, leaves = trees(n_trees, n_trees, 5)
    proto = classifier(nodes | votes("class", leaves, 3, 2), [0, 1, 2])
    check(proto, tmp_path)
    assert [n.op_type for n in export(native(proto)).graph.node] == ["TreeEnsembleClassifier"]
    check(classifier(nodes | votes("class", leaves, 3, 2) | {"base_values": [0.5, 0.0, 0.25]}, [7, -5, 6]), tmp_path)


@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("transform", ["NONE", "LOGISTIC", "SOFTMAX"])
@pytest.mark.parametrize("base", [[], [0.25]])
def test_two_classes_that_share_a_score(
    target: int, positive: bool, transform: str, base: list[float], tmp_path: Any
) -> None:
    nodes, leaves = trees(21, 3, 4)
    attrs = nodes | votes("class", leaves, 1, 3, positive) | {"post_transform": transform}
    attrs["class_ids"] = [target] * len(leaves)
    proto = classifier(attrs | ({"base_values": base} if base else {}), [10, 20])
    if target == 1 and base:
        assert [n.op.name for n in import_model(proto).nodes] == ["onnx"]
    else:
        check(proto, tmp_path)


def test_trees_of_one_node(tmp_path: Any) -> None:
    nodes, leaves = trees(0, 3, 0)
    assert set(nodes["nodes_modes"]) == {"LEAF"}
    check(regressor(nodes | votes("target", leaves, 2, 1), 2), tmp_path)


def test_each_tree_may_vote_for_one_class(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One ensemble for each class where a common table would be nearly empty."""
    from vivace.onnx.ops import trees as importing

    nodes, leaves = trees(4, 12, 4)
    attrs = nodes | votes("class", leaves, 1, 3)
    attrs["class_ids"] = [t % 3 for t, _ in leaves]
    proto = classifier(attrs, [0, 1, 2])
    check(proto, tmp_path)
    monkeypatch.setattr(importing, "WIDE_TABLE", 0)
    assert [n.op.name for n in native(proto).nodes].count("tree_ensemble") == 3
    check(proto, tmp_path)


def test_integers_are_compared_as_floats(tmp_path: Any) -> None:
    nodes, leaves = trees(2, 3, 4)
    proto = classifier(nodes | votes("class", leaves, 3, 1), [0, 1, 2])
    proto.graph.input[0].type.tensor_type.elem_type = I64
    graph = native(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).integers(-3, 4, (20, N_FEATURES))
    for got, want in zip(evaluate(graph, [x]), session.run(None, {"x": x}), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_set_membership() -> None:
    """TreeEnsemble of opset 5; NaN is in no set unless the node says so."""
    attrs = {
        "n_targets": 2, "tree_roots": [0, 2], "nodes_featureids": [0, 1, 2],
        "nodes_missing_value_tracks_true": [1, 0, 0],
        "nodes_modes": numpy_helper.from_array(np.array([6, 0, 6], np.uint8)),
        "nodes_splits": numpy_helper.from_array(np.array([0, 0.5, 0], np.float32)),
        "membership_values": numpy_helper.from_array(np.array([1, -2, 0.5, np.nan, 2], np.float32)),
        "nodes_truenodeids": [0, 1, 3], "nodes_trueleafs": [1, 1, 1],
        "nodes_falsenodeids": [1, 2, 4], "nodes_falseleafs": [0, 1, 1],
        "leaf_targetids": [0, 1, 0, 1, 1],
        "leaf_weights": numpy_helper.from_array(np.array([1, 2, 4, 8, 16], np.float32)),
    }  # fmt: skip
    nodes = [helper.make_node("TreeEnsemble", ["x"], ["y"], domain="ai.onnx.ml", **attrs)]
    proto = model(nodes, [value("x", ["n", N_FEATURES])], [value("y", ["n", 2])], ai_onnx_ml=5)
    x = rows(60)
    first = np.isin(x[:, 0], [1, -2, 0.5]) | np.isnan(x[:, 0])
    want = np.zeros((60, 2), np.float32)
    want[:, 0] = np.where(first, 1, np.where(x[:, 1] <= 0.5, 0, 4))
    want[:, 1] = np.where(first, 0, np.where(x[:, 1] <= 0.5, 2, 0)) + np.where(x[:, 2] == 2, 8, 16)
    np.testing.assert_array_equal(evaluate(native(proto), [x])[0], want)


def test_what_stays_with_a_provider() -> None:
    """Labels that are strings, numbers in f64, one number through softmax, classes that may get no vote."""
    nodes, leaves = trees(1, 2, 2)
    strings = classifier(nodes | votes("class", leaves, 3, 1), [0, 1, 2])
    kept = [a for a in strings.graph.node[0].attribute if a.name != "classlabels_int64s"]
    del strings.graph.node[0].attribute[:]
    strings.graph.node[0].attribute.extend([*kept, helper.make_attribute("classlabels_strings", ["a", "b", "c"])])
    strings.graph.output[0].type.tensor_type.elem_type = TensorProto.STRING
    few = votes("class", leaves, 3, 1)
    few = {k: v[1:] for k, v in few.items()}
    double = regressor(nodes | votes("target", leaves, 1, 1), 1)
    double.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    one = regressor(nodes | votes("target", leaves, 1, 1) | {"post_transform": "SOFTMAX"}, 1)
    lonely = {k: [v[0]] for k, v in few.items()}
    for proto, reason in (
        (strings, "strings"), (double, "f64"), (one, "SOFTMAX"),
        (classifier(nodes | lonely, [0, 1, 2]), "without a vote"),
    ):  # fmt: skip
        (kept_node,) = [n for n in import_model(proto).walk() if n.op.name == "onnx"]
        assert reason in kept_node.attrs["reason"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes_truenodeids": [99] * 3}, "node 99 of tree 0 is named but not there"),
        ({"nodes_featureids": [9] * 3}, "feature 9"),
        ({"nodes_modes": ["BRANCH_UP", "LEAF", "LEAF"]}, "BRANCH_UP"),
        ({"nodes_values": [1.0]}, "as many in each"),
        ({"target_ids": [4, 4]}, "target 4"),
    ],
)
def test_trees_that_are_none(change: dict[str, Any], message: str) -> None:
    nodes, leaves = trees(0, 1, 1)
    attrs = nodes | votes("target", leaves, 1, 1) | change
    with pytest.raises(ModelError, match=message):
        import_model(regressor(attrs, 1))
