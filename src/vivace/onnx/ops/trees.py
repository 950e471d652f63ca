"""TreeEnsemble, TreeEnsembleRegressor and TreeEnsembleClassifier of ai.onnx.ml, over f32 numbers.

What the specification leaves open follows ONNX Runtime: how two classes share one score, which class wins when a
class got no vote, and the approximation of the probit function.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt

import numpy as np

from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.onnx.call import Call, onnx_op
from vivace.onnx.forest import Forest, by_leaves, by_nodes
from vivace.onnx.scope import Fallback

ML = "ai.onnx.ml"
MOST_LEAVES = 1 << 22
WIDE_TABLE = 1 << 18  # numbers: beyond 1 MiB a table that is nearly empty costs more than an ensemble per target
MOST_PARTS = 64
_REDUCE = {"SUM": "add", "AVERAGE": "add", "MIN": "min", "MAX": "max"}
_AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")
_TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")


@onnx_op("TreeEnsembleRegressor", domain=ML)
def tree_ensemble_regressor(c: Call, x: Value) -> Value:
    x, n = _rows(c, x), c.attr("n_targets", 1)
    if c.attr("base_values_as_tensor") is not None:
        raise Fallback("its numbers are f64")
    base = np.asarray(c.attr("base_values", ()), np.float32)
    aggregate, transform = c.attr("aggregate_function", "SUM"), c.attr("post_transform", "NONE")
    return _regression(c, x, by_nodes(c, "target"), n, aggregate, transform, base)


@onnx_op("TreeEnsemble", since=5, domain=ML)
def tree_ensemble(c: Call, x: Value) -> Value:
    x, n = _rows(c, x), c.attr("n_targets", 1)
    aggregate, transform = _AGGREGATES[c.attr("aggregate_function", 1)], _TRANSFORMS[c.attr("post_transform", 0)]
    return _regression(c, x, by_leaves(c), n, aggregate, transform, np.zeros(0, np.float32))


@onnx_op("TreeEnsembleClassifier", domain=ML)
def tree_ensemble_classifier(c: Call, x: Value) -> tuple[Value, ...]:
    x, labels = _rows(c, x), np.asarray(c.attr("classlabels_int64s", ()), np.int64)
    if not labels.size:
        raise Fallback("its labels are strings")
    if c.attr("base_values_as_tensor") is not None:
        raise Fallback("its numbers are f64")
    forest, n = by_nodes(c, "class"), labels.size
    base = np.asarray(c.attr("base_values", ()), np.float32)
    transform = c.attr("post_transform", "NONE")
    if n <= 2:
        return _two_classes(c, x, forest, labels, base, transform)
    scores = _based(c, _scores(c, x, forest, n), base, n)
    if not base.size and not forest.always(n).all():
        raise Fallback("a class may be left without a vote")
    return _labels(c, c.argmax(scores, axis=1, keepdims=False, select_last=False), labels), _after(c, scores, transform)


def _two_classes(
    c: Call, x: Value, forest: Forest, labels: np.ndarray, base: np.ndarray, transform: str
) -> tuple[Value, ...]:
    """One score for both classes: the second wins above 0, or above 0.5 where no vote is negative."""
    used = np.unique(forest.votes.targets)
    if labels.size != 2 or used.size != 1:
        raise Fallback("its classes have votes of their own" if labels.size == 2 else "it has one class")
    if transform == "PROBIT" or base.size > 1 or (base.size and used[0] == 1):
        raise Fallback("its one score has several base values or becomes a probability")
    forest = forest.only(int(used[0]))
    positive = bool(np.all(forest.votes.values >= 0))
    score = _scores(c, x, forest, 1)
    score = c.add(score, c.const(base)) if base.size else score
    wins = c.reshaped(c.gt(score, c.like(score, 0.5 if positive else 0.0)), (x.shape[0],))
    label = c.where(wins, c.const(labels[1]), c.const(labels[0]))
    if used[0] == 1:  # the scores of the first class are zero
        if not forest.always(1).all():
            raise Fallback("a class may be left without a vote")
        return label, _after(c, c.concat(c.full(score.shape, 0.0, DType.f32), score, axis=1), transform)
    if transform == "LOGISTIC":
        return label, c.concat(c.sigmoid(c.neg(score)), c.sigmoid(score), axis=1)
    return label, c.concat(c.sub(c.like(score, 1.0), score) if positive else c.neg(score), score, axis=1)


def _rows(c: Call, x: Value) -> Value:
    """The rows as f32: ints are compared as floats."""
    if x.dtype is DType.f64:
        raise Fallback("its input is f64")
    if x.rank != 2:
        raise Fallback(f"its input has rank {x.rank}")
    return c.cast_to(x, DType.f32)


def _scores(c: Call, x: Value, f: Forest, n_targets: int, reduce: str = "add") -> Value:
    """The reduced votes: f32[N, n_targets]."""
    if f.votes.targets.size and not 0 <= f.votes.targets.min() <= f.votes.targets.max() < n_targets:
        raise c.error(f"a vote is for target {f.votes.targets.max()}", f"0 to {n_targets - 1}")
    n_features = x.shape[1]
    if not isinstance(n_features, int):
        raise Fallback("the number of features depends on the sizes of inputs")
    if f.features.size and f.features.max() >= n_features:
        raise c.error(f"a node reads feature {f.features.max()}", f"0 to {n_features - 1}, as {x.type} has them")
    if f.n_leaves >= MOST_LEAVES:
        raise Fallback(f"it has {f.n_leaves} leaves")
    if f.n_leaves * n_targets > WIDE_TABLE and 1 < n_targets <= MOST_PARTS and _votes_apart(f, n_targets):
        return c.concat(*(_scores(c, x, f.only(k), 1, reduce) for k in range(n_targets)), axis=1)
    if reduce != "add" and not f.always(n_targets).all():
        raise Fallback("a target may be left without a vote")
    absent = {"add": 0.0, "min": np.inf, "max": -np.inf}[reduce]
    arrays = (
        f.features.astype(np.int32), f.thresholds.astype(np.float32), f.missing, f.children.astype(np.int32),
        f.roots.astype(np.int32), f.table(n_targets, absent),
    )  # fmt: skip
    result: Value = c.tree_ensemble(x, *(c.const(np.ascontiguousarray(a)) for a in arrays), reduce=reduce)
    return result


def _votes_apart(f: Forest, n_targets: int) -> bool:
    """Whether each tree votes for one target, and each target has a tree."""
    pairs = np.unique(np.stack([f.votes.trees, f.votes.targets], axis=1), axis=0)
    return len(pairs) == len(f.roots) and len(np.unique(pairs[:, 1])) == n_targets


def _regression(c: Call, x: Value, forest: Forest, n: int, aggregate: str, transform: str, base: np.ndarray) -> Value:
    if aggregate not in _REDUCE:
        raise c.error(f"aggregate_function is {aggregate!r}", ", ".join(_AGGREGATES))
    if n == 1 and transform not in ("NONE", "PROBIT"):
        raise Fallback(f"it transforms one number by {transform}")
    scores = _scores(c, x, forest, n, _REDUCE[aggregate])
    if aggregate == "AVERAGE":
        scores = c.div(scores, c.like(scores, float(len(forest.roots))))
    return _after(c, _based(c, scores, base, n), transform)


def _based(c: Call, scores: Value, base: np.ndarray, n: int) -> Value:
    if base.size not in (0, n):
        raise Fallback(f"it has {base.size} base values for {n} targets")
    return c.add(scores, c.const(base)) if base.size else scores


def _labels(c: Call, index: Value, labels: np.ndarray) -> Value:
    same = np.array_equal(labels, np.arange(labels.size))
    return index if same else c.gather(c.const(labels), index, axis=0)


def _after(c: Call, s: Value, transform: str) -> Value:
    """The scores transformed."""
    if transform not in _AFTER:
        raise c.error(f"post_transform is {transform!r}", ", ".join(_AFTER))
    return _AFTER[transform](c, s)


def _softmax_zero(c: Call, s: Value) -> Value:
    """softmax, of which what is about zero stays so and is not counted."""
    top = c.reduce_max(s, axes=(1,), keepdims=True)
    counts = c.gt(c.abs(s), c.like(s, 1e-7))
    e = c.exp(c.sub(s, top))
    total = c.reduce_sum(c.where(counts, e, c.like(s, 0.0)), axes=(1,), keepdims=True)
    return c.div(c.where(counts, e, c.mul(s, c.exp(c.neg(top)))), total)


def _probit(c: Call, s: Value) -> Value:
    """sqrt(2) * erfinv(2 s - 1), after S. Winitzki, "A handy approximation for the error function and its inverse"."""
    x = c.sub(c.mul(s, c.like(s, 2.0)), c.like(s, 1.0))
    one, k = c.like(s, 1.0), 0.147
    log = c.log(c.mul(c.sub(one, x), c.add(one, x)))
    v = c.add(c.mul(log, c.like(s, 0.5)), c.like(s, 2.0 / (pi * k)))
    root = c.sqrt(c.sub(c.sqrt(c.sub(c.mul(v, v), c.mul(log, c.like(s, 1.0 / k)))), v))
    return c.mul(c.where(c.lt(x, c.like(s, 0.0)), c.neg(root), root), c.like(s, sqrt(2.0)))


_AFTER: dict[str, Callable[[Call, Value], Value]] = {
    "NONE": lambda c, s: s,
    "SOFTMAX": lambda c, s: c.softmax(s, axis=1),
    "LOGISTIC": lambda c, s: c.sigmoid(s),
    "SOFTMAX_ZERO": _softmax_zero,
    "PROBIT": _probit,
}
