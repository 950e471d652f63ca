"""Small models for `benchmarks/ablations.py`.

Functions that one kernel of ours computes, written out in other operators of ONNX: the model with the one operator, the
model without, and inputs for both; and a head as no model of the catalogue has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Pair = tuple[onnx.ModelProto, onnx.ModelProto, dict[str, np.ndarray]]
STEPS, WIDTH, HIDDEN = 64, 128, 128  # of the recurrent layer
COLUMNS, N_CLASSES = 40, 6625  # of the head, as in PP-OCR's recogniser
N_TREES, DEPTH, FEATURES, ROWS = 100, 6, 32, 32  # of the forest


def spelled_lstm() -> Pair:
    """An LSTM, and a Scan over its cell, whose input's half is one product for all steps."""
    rng = np.random.default_rng(0)
    w, r = (rng.standard_normal((4 * HIDDEN, k)).astype(np.float32) / k**0.5 for k in (WIDTH, HIDDEN))
    x = rng.standard_normal((STEPS, 1, WIDTH)).astype(np.float32)
    bias = np.concatenate([rng.standard_normal(4 * HIDDEN) / 9, np.zeros(4 * HIDDEN)]).astype(np.float32)
    one = _model(
        [helper.make_node("LSTM", ["x", "w", "r", "bias"], ["states"], hidden_size=HIDDEN),
         helper.make_node("Squeeze", ["states", "axis"], ["y"])],
        {"w": w[None], "r": r[None], "bias": bias[None], "axis": np.array([1])},
        ("x", x.shape), ("y", (STEPS, 1, HIDDEN)),
    )  # fmt: skip
    cell = helper.make_graph(
        [
            helper.make_node("MatMul", ["h", "rt"], ["hr"]),
            helper.make_node("Add", ["xw", "hr"], ["gates"]),
            helper.make_node("Split", ["gates"], ["i", "o", "f", "g"], axis=-1, num_outputs=4),
            *(helper.make_node("Sigmoid", [k], [f"s{k}"]) for k in "iof"),
            helper.make_node("Tanh", ["g"], ["tg"]),
            helper.make_node("Mul", ["sf", "c"], ["kept"]),
            helper.make_node("Mul", ["si", "tg"], ["added"]),
            helper.make_node("Add", ["kept", "added"], ["c_next"]),
            helper.make_node("Tanh", ["c_next"], ["tc"]),
            helper.make_node("Mul", ["so", "tc"], ["h_next"]),
            helper.make_node("Identity", ["h_next"], ["h_out"]),
        ],
        "cell", [_info("h", (1, HIDDEN)), _info("c", (1, HIDDEN)), _info("xw", (1, 4 * HIDDEN))],
        [_info(name, (1, HIDDEN)) for name in ("h_next", "c_next", "h_out")],
    )  # fmt: skip
    spelled = _model(
        [helper.make_node("MatMul", ["x", "wt"], ["xw"]), helper.make_node("Add", ["xw", "bias"], ["xwb"]),
         helper.make_node("Scan", ["zeros", "zeros", "xwb"], ["last_h", "last_c", "y"], body=cell, num_scan_inputs=1)],
        {"wt": w.T, "rt": r.T, "bias": bias[: 4 * HIDDEN], "zeros": np.zeros((1, HIDDEN), np.float32)},
        ("x", x.shape), ("y", (STEPS, 1, HIDDEN)),
    )  # fmt: skip
    return one, spelled, {"x": x}


def spelled_forest() -> Pair:
    """A forest of full trees, and a walk from node to node by gathers, one turn per level."""
    rng = np.random.default_rng(0)
    inner, n = 2**DEPTH - 1, 2 ** (DEPTH + 1) - 1
    feature = rng.integers(0, FEATURES, (N_TREES, n))
    threshold = rng.standard_normal((N_TREES, n)).astype(np.float32)
    leaf = rng.standard_normal((N_TREES, n)).astype(np.float32)
    tree, node = (a.ravel() for a in np.indices((N_TREES, n)))
    is_leaf = node >= inner
    one = _model(
        [helper.make_node(
            "TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", n_targets=1, nodes_treeids=tree,
            nodes_nodeids=node, nodes_featureids=feature.ravel(), nodes_values=threshold.ravel(),
            nodes_modes=["LEAF" if end else "BRANCH_LEQ" for end in is_leaf],
            nodes_truenodeids=np.where(is_leaf, 0, 2 * node + 1), nodes_falsenodeids=np.where(is_leaf, 0, 2 * node + 2),
            target_treeids=tree[is_leaf], target_nodeids=node[is_leaf], target_ids=np.zeros(is_leaf.sum(), np.int64),
            target_weights=leaf.ravel()[is_leaf],
        )],
        {}, ("x", (ROWS, FEATURES)), ("y", (ROWS, 1)),
    )  # fmt: skip
    nodes, at = [], "roots"
    for level in range(DEPTH):
        nodes += [
            helper.make_node("Gather", ["feature", at], [f"f{level}"]),
            helper.make_node("Gather", ["threshold", at], [f"t{level}"]),
            helper.make_node("GatherElements", ["x", f"f{level}"], [f"v{level}"], axis=1),
            helper.make_node("LessOrEqual", [f"v{level}", f"t{level}"], [f"c{level}"]),
            helper.make_node("Gather", ["left", at], [f"l{level}"]),
            helper.make_node("Gather", ["right", at], [f"r{level}"]),
            helper.make_node("Where", [f"c{level}", f"l{level}", f"r{level}"], [f"at{level}"]),
        ]
        at = f"at{level}"
    nodes += [
        helper.make_node("Gather", ["leaf", at], ["found"]),
        helper.make_node("ReduceSum", ["found", "axis"], ["y"]),
    ]
    first = np.arange(N_TREES)[:, None] * n
    data = {
        "feature": feature.ravel(), "threshold": threshold.ravel(), "leaf": leaf.ravel(), "axis": np.array([1]),
        "roots": np.repeat(first.T, ROWS, axis=0), "left": (first + 2 * np.arange(n) + 1).ravel(),
        "right": (first + 2 * np.arange(n) + 2).ravel(),
    }  # fmt: skip
    spelled = _model(nodes, data, ("x", (ROWS, FEATURES)), ("y", (ROWS, 1)))
    return one, spelled, {"x": rng.standard_normal((ROWS, FEATURES)).astype(np.float32)}


def text_head() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The head of a text recogniser with its greedy decoding: the best of 6625 classes in each of 40 columns."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((WIDTH, N_CLASSES)).astype(np.float32) / WIDTH**0.5
    nodes = [helper.make_node("MatMul", ["x", "w"], ["logits"]),
             helper.make_node("Softmax", ["logits"], ["p"], axis=-1),
             helper.make_node("ArgMax", ["p"], ["best"], axis=-1, keepdims=0),
             helper.make_node("Cast", ["best"], ["y"], to=TensorProto.FLOAT)]  # fmt: skip
    model = _model(nodes, {"w": w}, ("x", (1, COLUMNS, WIDTH)), ("y", (1, COLUMNS)))
    return model, {"x": rng.standard_normal((1, COLUMNS, WIDTH)).astype(np.float32)}


def _info(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _model(
    nodes: Sequence[onnx.NodeProto], data: dict[str, np.ndarray], x: tuple[str, tuple[int, ...]],
    y: tuple[str, tuple[int, ...]],
) -> onnx.ModelProto:  # fmt: skip
    constants = [numpy_helper.from_array(np.ascontiguousarray(v), name) for name, v in data.items()]
    graph = helper.make_graph(nodes, "spelled_out", [_info(*x)], [_info(*y)], constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)
