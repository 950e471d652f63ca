"""Writing trees: `tree_ensemble` as a TreeEnsembleRegressor or, with the argmax of its sums, a TreeEnsembleClassifier.

Every runtime wants real trees. Two nodes that together ask x == t (see `onnx/forest.py`) become one BRANCH_EQ again;
whatever else several nodes share is written once for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vivace.base.errors import UnsupportedError
from vivace.graph.graph import Node
from vivace.onnx.writer import Writer

ML, ML_OPSET = "ai.onnx.ml", 3
MOST_NODES = 1 << 24
_OF_NODES = (
    "nodes_treeids", "nodes_nodeids", "nodes_featureids", "nodes_values", "nodes_modes",
    "nodes_missing_value_tracks_true", "nodes_falsenodeids", "nodes_truenodeids",
)  # fmt: skip
_OF_VOTES = ("treeids", "nodeids", "ids", "weights")
_AGGREGATE = {"add": "SUM", "min": "MIN", "max": "MAX"}


def write_tree_ensemble(w: Writer, n: Node, outs: list[str]) -> None:
    """Raises: UnsupportedError for trees that are computed, or far too many nodes."""
    arrays = []
    for v in n.inputs[1:]:
        if v is None or v.data is None:
            raise UnsupportedError("trees that are computed have no ONNX form", where="export")
        arrays.append(v.data)
    w.imports.setdefault(ML, ML_OPSET)
    leaves, reduce = arrays[-1], n.attrs["reduce"]
    # Of two classes, a vote for one may be one against the other.
    winner = _winner(w, n) if reduce == "add" and leaves.shape[1] > 2 else None
    if winner is None:
        attrs = _Trees(arrays, leaves != 0 if reduce == "add" else np.isfinite(leaves)).attrs("target")
        attrs |= {"n_targets": leaves.shape[1], "aggregate_function": _AGGREGATE[reduce]}
        w.emit("TreeEnsembleRegressor", [w.ref(n.inputs[0])], outs, domain=ML, **attrs)
        return
    attrs = _Trees(arrays, np.ones_like(leaves, bool)).attrs("class")  # a class without a vote cannot win there
    attrs |= {"classlabels_int64s": list(range(leaves.shape[1]))}
    label = w.final.get(winner.output) or w.fresh(winner.output.name)
    w.emit("TreeEnsembleClassifier", [w.ref(n.inputs[0])], [label, *outs], domain=ML, **attrs)
    w.define(winner.output, label)
    w.done.add(winner)


def _winner(w: Writer, n: Node) -> Node | None:
    """The argmax of the sums."""
    how = {"axis": 1, "keepdims": False, "select_last": False}
    return next((m for m in w.readers.get(n.output, ()) if m.op.name == "argmax" and m.attrs == how), None)


class _Trees:
    """Depth-first walks through all trees, which number the nodes."""

    def __init__(self, arrays: Sequence[np.ndarray], said: np.ndarray) -> None:
        features, thresholds, missing, children, roots, self.leaves = arrays
        self.features, self.thresholds, self.missing = features.tolist(), thresholds.tolist(), missing.tolist()
        self.children, self.roots = children.tolist(), roots.tolist()
        below = np.nextafter(thresholds, np.float32(-np.inf))
        second = np.maximum(children[:, 1], 0)
        self.is_equal = (
            (children[:, 1] >= 0) & (thresholds[second] == below) & (features[second] == features)
            & (children[second, 1] == children[:, 0]) & ~missing[second]
        ).tolist()  # fmt: skip
        self.said = said  # which votes of which leaves are written
        self.columns: dict[str, list[Any]] = {name: [] for name in (*_OF_NODES, *_OF_VOTES)}

    def attrs(self, votes: str) -> dict[str, Any]:
        """The attributes of the operator, which calls what votes are for a target or a class."""
        for tree, root in enumerate(self.roots):
            first = len(self.columns["nodes_modes"])
            waiting = [(root, -1, "")]
            while waiting:
                node, parent, branch = waiting.pop()
                me = len(self.columns["nodes_modes"]) - first
                if branch:
                    self.columns[branch][first + parent] = me
                if node < 0:
                    self._put(_OF_NODES, (tree, me, 0, 0.0, "LEAF", 0, 0, 0))
                    for k in np.flatnonzero(self.said[~node]).tolist():
                        self._put(_OF_VOTES, (tree, me, k, float(self.leaves[~node, k])))
                    continue
                no, yes = self.children[node]
                mode = "BRANCH_LEQ"
                if self.is_equal[node]:
                    mode, yes = "BRANCH_EQ", self.children[yes][0]
                row = (self.features[node], self.thresholds[node], mode, int(self.missing[node]))
                self._put(_OF_NODES, (tree, me, *row, 0, 0))
                waiting += [(no, me, "nodes_falsenodeids"), (yes, me, "nodes_truenodeids")]
                if first + me > MOST_NODES:
                    raise UnsupportedError("the trees share too many nodes", where="export")
        if not self.columns["ids"]:  # there must be one
            self._put(_OF_VOTES, (0, self.columns["nodes_modes"].index("LEAF"), 0, 0.0))
        return {(f"{votes}_{name}" if name in _OF_VOTES else name): column for name, column in self.columns.items()}

    def _put(self, names: Sequence[str], values: Sequence[Any]) -> None:
        for name, value in zip(names, values, strict=True):
            self.columns[name].append(value)


WRITERS = {"tree_ensemble": write_tree_ensemble}
