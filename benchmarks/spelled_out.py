"""Small models for `benchmarks/ablations.py`.

Functions that one kernel of ours computes, written out in other operators of ONNX: the model with the one operator, the
model without, and inputs for both; and parts of models alone: a head, embeddings, attention within a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Pair = tuple[onnx.ModelProto, onnx.ModelProto, dict[str, np.ndarray]]
STEPS, WIDTH, HIDDEN = 64, 128, 128  # of the recurrent layer
COLUMNS, N_CLASSES = 40, 6625  # of the head, as in PP-OCR's recogniser
N_TREES, DEPTH, FEATURES, ROWS = 100, 6, 32, 32  # of the forest
EMBEDDED = 128, 384, 30522  # tokens, columns and rows of the table of words, as in MiniLM
WINDOWED = 12, 512, 64, 128  # heads, tokens, columns of a head, tokens that one sees


def spelled_lstm() -> Pair:
    """An LSTM, and a Scan over its cell, whose input's half is one product for all steps."""
    return _spelled_recurrent("LSTM", 4, "hc", [
        _node("MatMul", "h rt", "hr"), _node("Add", "xw hr", "gates"),
        _node("Split", "gates", "i o f g", axis=-1, num_outputs=4),
        *(_node("Sigmoid", k, f"s{k}") for k in "iof"), _node("Tanh", "g", "tg"),
        _node("Mul", "sf c", "kept"), _node("Mul", "si tg", "added"), _node("Add", "kept added", "c_next"),
        _node("Tanh", "c_next", "tc"), _node("Mul", "so tc", "h_next"),
    ])  # fmt: skip


def spelled_gru() -> Pair:
    """A GRU as PyTorch has it, and a Scan over its cell."""
    return _spelled_recurrent("GRU", 3, "h", [
        _node("MatMul", "h rt", "hr"), _node("Split", "hr", "hz hq hn", axis=-1, num_outputs=3),
        _node("Split", "xw", "xz xq xn", axis=-1, num_outputs=3),
        _node("Add", "xz hz", "z0"), _node("Sigmoid", "z0", "z"), _node("Add", "xq hq", "q0"),
        _node("Sigmoid", "q0", "q"), _node("Mul", "q hn", "n0"), _node("Add", "xn n0", "n1"), _node("Tanh", "n1", "n"),
        _node("Sub", "h n", "far"), _node("Mul", "z far", "back"), _node("Add", "n back", "h_next"),
    ], linear_before_reset=1)  # fmt: skip


def spelled_rnn() -> Pair:
    """A plain recurrent layer, and a Scan over its cell."""
    cell = [_node("MatMul", "h rt", "hr"), _node("Add", "xw hr", "sum"), _node("Tanh", "sum", "h_next")]
    return _spelled_recurrent("RNN", 1, "h", cell)


def _spelled_recurrent(op: str, n_gates: int, states: str, cell: Sequence[onnx.NodeProto], **attributes: int) -> Pair:
    """One operator, and a Scan over its cell: from `xw`, the input's half, and states to `h_next`, ..."""
    rng = np.random.default_rng(0)
    n = n_gates * HIDDEN
    w, r = (rng.standard_normal((n, k)).astype(np.float32) / k**0.5 for k in (WIDTH, HIDDEN))
    x = rng.standard_normal((STEPS, 1, WIDTH)).astype(np.float32)
    bias = np.concatenate([rng.standard_normal(n) / 9, np.zeros(n)]).astype(np.float32)
    ends = ("x", x.shape), ("y", (STEPS, 1, HIDDEN))
    one = _model(
        [_node(op, "x w r bias", "states", hidden_size=HIDDEN, **attributes), _node("Squeeze", "states axis", "y")],
        {"w": w[None], "r": r[None], "bias": bias[None], "axis": np.array([1])}, *ends,
    )  # fmt: skip
    body = helper.make_graph(
        [*cell, _node("Identity", "h_next", "h_out")], "cell",
        [*(_info(s, (1, HIDDEN)) for s in states), _info("xw", (1, n))],
        [*(_info(f"{s}_next", (1, HIDDEN)) for s in states), _info("h_out", (1, HIDDEN))],
    )  # fmt: skip
    last = " ".join(f"last_{s}" for s in states)
    scan = _node("Scan", "zeros " * len(states) + "xwb", f"{last} y", body=body, num_scan_inputs=1)
    spelled = _model(
        [_node("MatMul", "x wt", "xw"), _node("Add", "xw bias", "xwb"), scan],
        {"wt": w.T, "rt": r.T, "bias": bias[:n], "zeros": np.zeros((1, HIDDEN), np.float32)}, *ends,
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


def embeddings() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """How an encoder such as MiniLM begins: the rows of three tables added and normalized, for 128 tokens."""
    rng = np.random.default_rng(0)
    n, width, words = EMBEDDED
    tables = {"word": words, "place": n, "kind": 2}
    data = {f"{name}s": rng.standard_normal((rows, width)).astype(np.float32) for name, rows in tables.items()}
    data |= {"one": np.ones(width, np.float32), "axis": np.array([0])}
    nodes = [_node("Cast", "x", "all", to=TensorProto.INT64),
             _node("Split", "all", "word_at place_at kind_at", axis=0, num_outputs=3),
             *(_node("Gather", f"{name}s {name}_at", name) for name in tables),
             _node("Add", "word place", "placed"), _node("Add", "placed kind", "sum"),
             _node("LayerNormalization", "sum one", "y")]  # fmt: skip
    model = _model(nodes, data, ("x", (3, n)), ("y", (1, n, width)))
    return model, {"x": np.stack([rng.integers(0, rows, n) for rows in tables.values()]).astype(np.float32)}


def windowed_attention() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Attention of 12 heads over 512 tokens, each of which sees the 128 before it: the mask is data."""
    rng = np.random.default_rng(0)
    heads, n, width, window = WINDOWED
    back = np.arange(n)[:, None] - np.arange(n)
    mask = np.where((back >= 0) & (back < window), 0, -1e9).astype(np.float32)
    data = {"mask": mask, "scale": np.array(width**-0.5, np.float32)}
    data |= {"axis": np.array([0]), **{f"at{i}": np.array([i]) for i in range(4)}}
    nodes = [_node("Slice", f"x at{i} at{i + 1} axis", name) for i, name in enumerate("qkv")]
    nodes += [_node("Transpose", "k", "kt", perm=(0, 1, 3, 2)), _node("MatMul", "q kt", "scores"),
              _node("Mul", "scores scale", "scaled"), _node("Add", "scaled mask", "masked"),
              _node("Softmax", "masked", "weights", axis=-1), _node("MatMul", "weights v", "y")]  # fmt: skip
    shape = (heads, n, width)
    model = _model(nodes, data, ("x", (3, *shape)), ("y", (1, *shape)))
    return model, {"x": rng.standard_normal((3, *shape)).astype(np.float32)}


def _node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


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
