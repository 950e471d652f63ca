"""Ensembles of decision trees.

tree_ensemble{reduce: add|min|max}(x: f32[N,F], features: i32[M], thresholds: f32[M], missing: bool[M],
                                   children: i32[M,2], roots: i32[T], leaves: f32[L,C]) -> f32[N,C]
        Each row starts at every root. Node m sends it to children[m,1] where x[features[m]] <= thresholds[m], or where
        the feature is NaN and missing[m] is set; otherwise to children[m,0]. A negative child c, or root, is leaf ~c,
        a row of `leaves`; the rows that the T trees end in are reduced.

Every other test is written with these: x < t is x <= (the float below t), x > t swaps the children, x == t takes two
nodes. Nodes may be shared, but form no cycle.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vivace.base.dims import Dim
from vivace.base.dtypes import DType
from vivace.base.errors import GraphError
from vivace.graph.graph import Attrs, Op, Type
from vivace.graph.ops.shapes import need, same

Array = np.ndarray
REDUCTIONS = ("add", "min", "max")
_OPERANDS = (
    ("x", DType.f32, 2), ("features", DType.i32, 1), ("thresholds", DType.f32, 1), ("missing", DType.bool, 1),
    ("children", DType.i32, 2), ("roots", DType.i32, 1), ("leaves", DType.f32, 2),
)  # fmt: skip


def _infer(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    found = [need(types, i, "tree_ensemble") for i in range(len(_OPERANDS))]
    for t, (name, dtype, rank) in zip(found, _OPERANDS, strict=True):
        if t.dtype is not dtype or t.rank != rank:
            raise GraphError(f"{name} is {t}", where="tree_ensemble", expected=f"{dtype} of rank {rank}")
    x, features, *per_node, roots, leaves = found
    for t in per_node:
        same(features.shape[0], t.shape[0], "tree_ensemble")
    same(per_node[-1].shape[1], 2, "tree_ensemble")
    if attrs["reduce"] not in REDUCTIONS:
        raise GraphError(f"reduce is {attrs['reduce']!r}", where="tree_ensemble", expected=", ".join(REDUCTIONS))
    if roots.shape[0] == 0 or leaves.shape[0] == 0:
        raise GraphError("there is no tree", where="tree_ensemble", expected="at least one tree and one leaf")
    return (Type(DType.f32, (x.shape[0], leaves.shape[1])),)


def leaves_of(x: Array, features: Array, thresholds: Array, missing: Array, children: Array, roots: Array) -> Array:
    """The leaf that each row ends in, per tree: i32[N,T]. Raises: GraphError where the nodes form a cycle."""
    at = np.broadcast_to(roots, (x.shape[0], roots.shape[0])).astype(np.int32)
    for _ in range(features.shape[0] + 1):
        rows, trees = np.nonzero(at >= 0)
        if not rows.size:
            return np.asarray(~at)
        node = at[rows, trees]
        value = x[rows, features[node]]
        yes = (value <= thresholds[node]) | (np.isnan(value) & missing[node])
        at[rows, trees] = children[node, yes.astype(np.intp)]
    raise GraphError("the nodes form a cycle", where="tree_ensemble")


def _run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    arrays = [a for a in xs if a is not None]
    leaves = arrays[-1]
    taken = leaves[leaves_of(*arrays[:-1])]  # N,T,C
    with np.errstate(all="ignore"):
        if attrs["reduce"] == "add":
            return (taken.sum(axis=1, dtype=np.float64).astype(np.float32),)
        return (taken.min(axis=1) if attrs["reduce"] == "min" else taken.max(axis=1),)


def _flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    """One per tree and result: what the path costs depends on the data."""
    roots = ins[5]
    return 0 if roots is None else outs[0].size * roots.shape[0]


FAMILY = (Op("tree_ensemble", _infer, _run, _flops, exact=False, tolerance=1e-7),)
