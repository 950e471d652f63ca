"""Writing trees: `tree_ensemble` as a TreeEnsembleRegressor, of which every runtime wants real trees.

Two nodes that together ask x == t (see `onnx/forest.py`) become one BRANCH_EQ again; whatever else several nodes share
is written once for each of them.
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
_OF_VOTES = ("target_treeids", "target_nodeids", "target_ids", "target_weights")
_AGGREGATE = {"add": "SUM", "min": "MIN", "max": "MAX"}


def write_tree_ensemble(w: Writer, n: Node, outs: list[str]) -> None:
    """Raises: UnsupportedError for trees that are computed, or far too many nodes."""
    arrays = []
    for v in n.inputs[1:]:
        if v is None or v.data is None:
            raise UnsupportedError("trees that are computed have no ONNX form", where="export")
        arrays.append(v.data)
    w.imports.setdefault(ML, ML_OPSET)
    attrs: dict[str, Any] = {**_Trees(arrays, n.attrs["reduce"]).attrs()}
    attrs |= {"n_targets": arrays[-1].shape[1], "aggregate_function": _AGGREGATE[n.attrs["reduce"]]}
    w.emit("TreeEnsembleRegressor", [w.ref(n.inputs[0])], outs, domain=ML, **attrs)


class _Trees:
    """Depth-first walks through all trees, which number the nodes."""

    def __init__(self, arrays: Sequence[np.ndarray], reduce: str) -> None:
        features, thresholds, missing, children, roots, self.leaves = arrays
        self.features, self.thresholds, self.missing = features.tolist(), thresholds.tolist(), missing.tolist()
        self.children, self.roots = children.tolist(), roots.tolist()
        below = np.nextafter(thresholds, np.float32(-np.inf))
        second = np.maximum(children[:, 1], 0)
        self.is_equal = (
            (children[:, 1] >= 0) & (thresholds[second] == below) & (features[second] == features)
            & (children[second, 1] == children[:, 0]) & ~missing[second]
        ).tolist()  # fmt: skip
        self.said = self.leaves != 0 if reduce == "add" else np.isfinite(self.leaves)
        self.columns: dict[str, list[Any]] = {name: [] for name in (*_OF_NODES, *_OF_VOTES)}

    def attrs(self) -> dict[str, list[Any]]:
        """The attributes of the operator."""
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
        if not self.columns["target_ids"]:  # there must be one
            self._put(_OF_VOTES, (0, self.columns["nodes_modes"].index("LEAF"), 0, 0.0))
        return self.columns

    def _put(self, names: Sequence[str], values: Sequence[Any]) -> None:
        for name, value in zip(names, values, strict=True):
            self.columns[name].append(value)


WRITERS = {"tree_ensemble": write_tree_ensemble}
