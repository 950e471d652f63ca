"""The attributes of ai.onnx.ml tree ensembles as the arrays of the core op `tree_ensemble`.

Rules:
* TESTS: every test becomes `x <= threshold`, with the same answer for every float, infinities and NaN included:
      x < t     x <= the float below t; never, which is x <= NaN, where there is none
      x >= t    the children of x < t change places, and so does what NaN does; x > t likewise
      x == t    x <= t, and then not x <= the float below t; x != t with its children changed
      x in {..} a search in the sorted members
* CHILDREN: a child c >= 0 is a node, c < 0 the leaf ~c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import AttributeProto

from vivace.onnx.call import Call
from vivace.onnx.scope import Fallback

Array = np.ndarray
MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ", "BRANCH_MEMBER")
_LEQ, _LT, _GTE, _GT, _EQ, _NEQ, _MEMBER, _LEAF = range(len(MODES) + 1)
MOST_WEIGHTS = 1 << 28  # numbers in the table of leaves and targets


@dataclass(frozen=True, slots=True)
class Votes:
    """What leaves say: `values[i]` is for target `targets[i]` and said by leaf `leaves[i]` of tree `trees[i]`."""

    leaves: Array
    trees: Array
    targets: Array
    values: Array


@dataclass(frozen=True, slots=True)
class Forest:
    """Trees of tests `x <= threshold` (rule TESTS) and the votes of their leaves."""

    features: Array
    thresholds: Array
    missing: Array
    children: Array
    roots: Array
    n_leaves: int
    tree_of_leaf: Array
    votes: Votes

    def table(self, n_targets: int, absent: float = 0.0) -> Array:
        """The leaves as rows of a number per target; `absent` where a leaf says nothing."""
        if self.n_leaves * n_targets > MOST_WEIGHTS:
            raise Fallback(f"{self.n_leaves} leaves and {n_targets} targets are too many for a table")
        v, shape = self.votes, (self.n_leaves, n_targets)
        table = np.zeros(shape, np.float32)
        np.add.at(table, (v.leaves, v.targets), v.values)
        if absent != 0:
            said = np.zeros(shape, bool)
            said[v.leaves, v.targets] = True
            table[~said] = absent
        return table

    def always(self, n_targets: int) -> Array:
        """For which targets every row gets a vote: some tree has one for it in all of its leaves."""
        n_trees = len(self.roots)
        leaves, targets = np.divmod(np.unique(self.votes.leaves * n_targets + self.votes.targets), n_targets)
        counts = np.zeros((n_trees, n_targets), np.int64)
        np.add.at(counts, (self.tree_of_leaf[leaves], targets), 1)
        per_tree = np.bincount(self.tree_of_leaf, minlength=n_trees)
        return np.asarray((counts == per_tree[:, None]).any(axis=0))

    def only(self, target: int) -> Forest:
        """The trees that vote for a target, where each tree votes for one."""
        v = self.votes
        trees = np.unique(v.trees[v.targets == target])
        mine = v.targets == target
        kept = np.isin(self.tree_of_leaf, trees)
        number = np.cumsum(kept) - 1
        leaf_child = self.children < 0
        children = np.where(leaf_child, ~number[np.where(leaf_child, ~self.children, 0)], self.children)
        roots = self.roots[trees]
        roots = np.where(roots < 0, ~number[np.where(roots < 0, ~roots, 0)], roots)
        of_votes, of_leaves = (np.searchsorted(trees, t) for t in (v.trees[mine], self.tree_of_leaf[kept]))
        votes = Votes(number[v.leaves[mine]], of_votes, np.zeros(int(mine.sum()), np.int64), v.values[mine])
        n_leaves = int(kept.sum())
        return pruned(
            replace(self, children=children, roots=roots, n_leaves=n_leaves, tree_of_leaf=of_leaves, votes=votes)
        )


def by_nodes(c: Call, votes: str) -> Forest:
    """The trees of TreeEnsembleClassifier and Regressor; `votes` is what their votes are called."""
    for name in ("nodes_values", f"{votes}_weights"):
        if c.attr(f"{name}_as_tensor") is not None:
            raise Fallback("its numbers are f64")
    trees, ids = _ints(c, "nodes_treeids"), _ints(c, "nodes_nodeids")
    modes, values = _modes(c), _floats(c, "nodes_values")
    if not trees.size or len({trees.size, ids.size, modes.size, values.size}) > 1:
        raise c.error(f"nodes_treeids, nodes_nodeids, nodes_modes and nodes_values have {trees.size}, {ids.size}, "
                      f"{modes.size} and {values.size} elements", "as many in each")  # fmt: skip
    is_leaf = modes == _LEAF
    number = np.where(is_leaf, ~(np.cumsum(is_leaf) - 1), np.cumsum(~is_leaf) - 1)
    find = _Finder(c, trees, ids)
    inner = ~is_leaf
    ends = [find(trees[inner], _ints(c, name)[inner]) for name in ("nodes_falsenodeids", "nodes_truenodeids")]
    is_child = np.zeros(trees.size, bool)
    for end in ends:
        is_child[end] = True
    order = {int(t): k for k, t in enumerate(dict.fromkeys(trees.tolist()))}
    tree_numbers = np.array([order[int(t)] for t in trees], np.int64)
    tops = np.flatnonzero(~is_child)
    if not np.array_equal(tree_numbers[tops], np.arange(len(order))):
        raise Fallback("a tree has no root, or several")
    vote_at = find(_ints(c, f"{votes}_treeids"), _ints(c, f"{votes}_nodeids"))
    counted = is_leaf[vote_at]  # what inner nodes say is ignored
    vote_at = vote_at[counted]
    missing = _ints(c, "nodes_missing_value_tracks_true")
    return pruned(
        canonical(
            c,
            features=_ints(c, "nodes_featureids")[inner],
            thresholds=values[inner],
            missing=missing[inner] != 0 if missing.size else np.zeros(int(inner.sum()), bool),
            modes=modes[inner],
            children=np.stack([number[e] for e in ends], axis=1),
            roots=number[tops],
            tree_of_leaf=tree_numbers[is_leaf],
            votes=Votes(
                ~number[vote_at], tree_numbers[vote_at], _ints(c, f"{votes}_ids")[counted],
                _floats(c, f"{votes}_weights")[counted],
            ),
        )
    )  # fmt: skip


def by_leaves(c: Call) -> Forest:
    """The trees of TreeEnsemble."""
    splits, weights = c.attr("nodes_splits"), c.attr("leaf_weights")
    if splits.dtype != np.float32 or weights.dtype != np.float32:
        raise Fallback(f"its numbers are {splits.dtype}")
    ends = []
    for end in ("false", "true"):
        at, leafs = _ints(c, f"nodes_{end}nodeids"), _ints(c, f"nodes_{end}leafs")
        limit = np.where(leafs != 0, weights.size, splits.size)
        if np.any((at < 0) | (at >= limit)):
            raise c.error(f"nodes_{end}nodeids names a node or leaf that there is not")
        ends.append(np.where(leafs != 0, ~at, at))
    missing = _ints(c, "nodes_missing_value_tracks_true")
    children, roots = np.stack(ends, axis=1), _ints(c, "tree_roots")
    tree_of_leaf = _trees_of(children, roots, weights.size)
    return pruned(
        canonical(
            c,
            features=_ints(c, "nodes_featureids"), thresholds=splits.reshape(-1),
            missing=missing != 0 if missing.size else np.zeros(splits.size, bool),
            modes=np.asarray(c.attr("nodes_modes"), np.int64).reshape(-1), children=children, roots=roots,
            tree_of_leaf=tree_of_leaf,
            votes=Votes(np.arange(weights.size), tree_of_leaf, _ints(c, "leaf_targetids"), weights.reshape(-1)),
        )
    )  # fmt: skip


def _ints(c: Call, name: str) -> Array:
    """Read without a Python object for each: a large forest has hundreds of thousands."""
    a = c.attrs.get(name)
    if a is not None and a.type == AttributeProto.INTS:
        return np.fromiter(a.ints, np.int64, len(a.ints))
    return np.asarray(c.attr(name, ()), np.int64)


def _floats(c: Call, name: str) -> Array:
    a = c.attrs.get(name)
    return np.zeros(0, np.float32) if a is None else np.fromiter(a.floats, np.float32, len(a.floats))


def _modes(c: Call) -> Array:
    """The test of each node as a position in MODES, or _LEAF."""
    a, known = c.attrs.get("nodes_modes"), {name.encode(): i for i, name in enumerate((*MODES, "LEAF"))}
    names = a.strings if a is not None else ()
    if unknown := set(names) - known.keys():
        raise c.error(f"nodes_modes has {unknown.pop()!r}", "one of " + ", ".join(MODES[:-1]))
    return np.fromiter((known[s] for s in names), np.int64, len(names))


class _Finder:
    """Positions of nodes by tree and id."""

    def __init__(self, c: Call, trees: Array, ids: Array) -> None:
        self.c = c
        self.keys = (trees << 32) + ids
        self.order = np.argsort(self.keys, kind="stable")
        self.sorted = self.keys[self.order]
        if np.any(self.sorted[1:] == self.sorted[:-1]):
            raise c.error("two nodes of a tree have one id")

    def __call__(self, trees: Array, ids: Array) -> Array:
        keys = (trees << 32) + ids
        at = np.minimum(np.searchsorted(self.sorted, keys), len(self.sorted) - 1)
        if lost := np.flatnonzero(self.sorted[at] != keys).tolist():
            k = lost[0]
            raise self.c.error(f"node {ids[k]} of tree {trees[k]} is named but not there")
        return np.asarray(self.order[at])


def canonical(
    c: Call, features: Array, thresholds: Array, missing: Array, modes: Array, children: Array, roots: Array,
    tree_of_leaf: Array, votes: Votes,
) -> Forest:  # fmt: skip
    """Rule TESTS."""
    if np.any(features < 0):
        raise c.error("nodes_featureids has a negative number")
    if np.any(modes > _MEMBER):
        raise c.error(f"nodes_modes has {modes.max()}", "0 to 6")
    t, children, missing = thresholds.astype(np.float32), children.copy(), missing.copy()
    below = _below(t)
    upper = (modes == _GTE) | (modes == _GT)
    t = np.where((modes == _LT) | (modes == _GTE), below, t)
    t = np.where(upper & np.isnan(thresholds), np.float32(np.inf), t)  # nothing is greater than NaN
    missing[upper] = ~missing[upper]
    turned = upper | (modes == _NEQ)
    missing[modes == _NEQ] = False  # NaN differs from everything
    children[turned] = children[turned][:, ::-1]
    made = _Nodes(features, t, missing, children)
    members = _members(c)
    for i in np.flatnonzero(modes >= _EQ).tolist():
        no, yes = children[i].tolist()
        if modes[i] == _MEMBER:
            if not members:
                raise c.error("membership_values has fewer sets than there are nodes that test membership")
            made.search(i, int(features[i]), members.pop(0), bool(missing[i]), no, yes)
        else:
            made.equal(i, int(features[i]), float(t[i]), bool(missing[i]), no, yes)
    return Forest(*made.arrays(), roots, len(tree_of_leaf), tree_of_leaf, votes)


def _below(t: Array) -> Array:
    """The float below; NaN below minus infinity."""
    lowest = np.isneginf(t)
    return np.where(lowest, np.float32(np.nan), np.nextafter(t, np.float32(-np.inf))).astype(np.float32)


def _members(c: Call) -> list[list[float]]:
    """The sets of `membership_values`, which NaN divides, sorted."""
    values = c.attr("membership_values")
    if values is None:
        return []
    sets: list[list[float]] = [[]]
    for v in np.asarray(values, np.float32).reshape(-1).tolist():
        if np.isnan(v):
            sets.append([])
        else:
            sets[-1].append(v)
    return [sorted(set(s)) for s in sets]


class _Nodes:
    """Nodes, of which some become several."""

    def __init__(self, features: Array, thresholds: Array, missing: Array, children: Array) -> None:
        self.given = (features, thresholds, missing, children)
        self.added: list[tuple[int, float, bool, tuple[int, int]]] = []

    def _put(self, at: int | None, feature: int, threshold: float, missing: bool, no: int, yes: int) -> int:
        if at is None:
            self.added.append((feature, threshold, missing, (no, yes)))
            return len(self.given[0]) + len(self.added) - 1
        for column, value in zip(self.given, (feature, threshold, missing, (no, yes)), strict=True):
            column[at] = value
        return at

    def equal(self, at: int | None, feature: int, value: float, missing: bool, no: int, yes: int) -> int:
        below = float(_below(np.asarray([value], np.float32))[0])
        second = self._put(None, feature, below, False, yes, no)
        return self._put(at, feature, value, missing, no, second)

    def search(self, at: int | None, feature: int, values: Sequence[float], missing: bool, no: int, yes: int) -> int:
        if not values:
            return self._put(at, feature, float("nan"), missing, no, yes)
        if len(values) == 1:
            return self.equal(at, feature, values[0], missing, no, yes)
        half = len(values) // 2
        low = self.search(None, feature, values[:half], missing, no, yes)
        high = self.search(None, feature, values[half:], False, no, yes)
        return self._put(at, feature, values[half - 1], missing, high, low)

    def arrays(self) -> tuple[Array, Array, Array, Array]:
        columns = list(zip(*self.added)) or [(), (), (), ()]
        shaped = [np.asarray(x, g.dtype).reshape((-1, *g.shape[1:])) for x, g in zip(columns, self.given, strict=True)]
        features, thresholds, missing, children = (np.concatenate(p) for p in zip(self.given, shaped, strict=True))
        return features, thresholds, missing, children


def _trees_of(children: Array, roots: Array, n_leaves: int) -> Array:
    """The tree that each leaf belongs to."""
    tree = np.zeros(n_leaves, np.int64)
    at, owner = roots, np.arange(roots.size)
    for _ in range(len(children) + 1):
        if not at.size:
            break
        ends, owners = children[at].reshape(-1), np.repeat(owner, 2)
        tree[~ends[ends < 0]] = owners[ends < 0]
        at, first = np.unique(ends[ends >= 0], return_index=True)
        owner = owners[ends >= 0][first]
    return tree


def pruned(f: Forest) -> Forest:
    """Without the nodes that no root reaches. Raises: Fallback where nodes form a cycle."""
    reached = np.zeros(len(f.features), bool)
    level = np.unique(f.roots[f.roots >= 0])
    for _ in range(len(f.features) + 1):
        if not level.size:
            break
        reached[level] = True
        level = np.unique(f.children[level])
        level = level[level >= 0]
    else:
        raise Fallback("its nodes form a cycle")
    number = np.append(np.cumsum(reached) - 1, 0)  # there may be no node
    children = f.children[reached]
    children = np.where(children < 0, children, number[np.maximum(children, 0)])
    roots = np.where(f.roots < 0, f.roots, number[np.maximum(f.roots, 0)])
    features, thresholds, missing = f.features[reached], f.thresholds[reached], f.missing[reached]
    return replace(f, features=features, thresholds=thresholds, missing=missing, children=children, roots=roots)
