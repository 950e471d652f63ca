"""Reshapes, slices, pads, concats and expands that merge, cancel, or turn into something cheaper. All are exact."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from vivace.base.dims import Dim, bounds
from vivace.graph.graph import Node, Value
from vivace.graph.rewrite import At, Example, Outcome, Rule, rule


@rule(
    "reshape",
    examples=(
        lambda e: e.reshape(e.reshape(e.x("f32[2,3,4]"), shape=(6, 4)), shape=(24,)),
        lambda e: e.exp(e.reshape(e.x("f32[2,3]"), shape=(2, 3))),
    ),
)
def join_reshapes(n: Node, at: At) -> Outcome:
    """reshape(reshape(x, s), t) = reshape(x, t); reshape to its own shape is nothing"""
    x = n.inputs[0]
    assert x is not None
    if x.type == n.output.type:
        return x
    m = at.by(x, "reshape")
    return at.op.reshape(m.inputs[0], shape=n.attrs["shape"]) if m else None


@rule(
    "reshape",
    examples=(lambda e: e.reshape(e.reduce_sum(e.x("f32[2,3,4]"), axes=(1,), keepdims=True), shape=(2, 4)),),
)
def reduce_without_the_axis(n: Node, at: At) -> Outcome:
    """reshape(reduce(x, keepdims), s) = reduce(x) where s lacks just the reduced axes"""
    m = at.by(n.inputs[0], "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_mean")
    if m is None or m.inputs[0] is None or not at.only_use(m.output):
        return None
    axes = m.attrs["axes"]
    shape = m.inputs[0].shape
    for keep in (False, True):
        want = tuple(1 if i in axes else d for i, d in enumerate(shape) if keep or i not in axes)
        if keep is not m.attrs["keepdims"] and n.output.shape == want:
            return at.op.emit(m.op, m.inputs, {"axes": axes, "keepdims": keep})
    return None


@rule(
    "expand",
    examples=(
        lambda e: e.expand(e.expand(e.x("f32[1,1]"), shape=(3, 1)), shape=(3, 4)),
        lambda e: e.exp(e.expand(e.x("f32[3]"), shape=(3,))),
        lambda e: e.expand(e.reshape(e.x("f32[3]"), shape=(1, 3)), shape=(2, 3)),
    ),
)
def join_expands(n: Node, at: At) -> Outcome:
    """expand(expand(x, s), t) = expand(x, t); expand sees through a reshape that adds leading ones; to its own shape
    it is nothing"""
    x = n.inputs[0]
    assert x is not None
    if x.type == n.output.type:
        return x
    m = at.by(x, "expand", "reshape")
    if m is None or m.inputs[0] is None:
        return None
    inner = m.inputs[0]
    if m.op.name == "reshape" and x.shape != (1,) * (x.rank - inner.rank) + inner.shape:
        return None
    return at.op.expand(inner, shape=n.attrs["shape"])


def _is_whole(n: Node) -> bool:
    x = n.inputs[0]
    assert x is not None
    a = n.attrs
    return x.type == n.output.type and all(s == 0 for s in a["starts"]) and all(s == 1 for s in a["steps"])


@rule(
    "slice",
    examples=(
        lambda e: e.slice(
            e.slice(e.x("f32[20]"), starts=(18,), sizes=(9,), steps=(-2,)), starts=(1,), sizes=(3,), steps=(2,)
        ),
        lambda e: e.exp(e.slice(e.x("f32[3]"), starts=(0,), sizes=(3,), steps=(1,))),
    ),
)
def join_slices(n: Node, at: At) -> Outcome:
    """slice(slice(x, a), b) = slice(x, a then b); a slice of everything is nothing"""
    if _is_whole(n):
        return n.inputs[0]
    m = at.by(n.inputs[0], "slice")
    if m is None:
        return None
    a, b = m.attrs, n.attrs
    starts = tuple(s + t * k for s, k, t in zip(a["starts"], a["steps"], b["starts"]))
    steps = tuple(k * t for k, t in zip(a["steps"], b["steps"]))
    return at.op.slice(m.inputs[0], starts=starts, sizes=b["sizes"], steps=steps)


def _at_most(a: Dim, b: Dim) -> bool:
    low = bounds(b - a)[0]
    return low is not None and low >= 0


@rule(
    "slice",
    examples=(
        lambda e: e.slice(
            e.concat(e.x("f32[2,3]"), e.x("f32[2,4]"), axis=1), starts=(0, 4), sizes=(2, 2), steps=(1, 1)
        ),
    ),
)
def slice_of_one_part(n: Node, at: At) -> Outcome:
    """slice(concat(x, y)) = slice(y) where it lies inside y"""
    m = at.by(n.inputs[0], "concat")
    if m is None:
        return None
    axis = m.attrs["axis"] % n.output.rank
    starts, sizes, steps = n.attrs["starts"], n.attrs["sizes"], n.attrs["steps"]
    if steps[axis] != 1:
        return "its step is not 1"
    low: Dim = 0
    for part in m.inputs:
        assert part is not None
        high = low + part.shape[axis]
        if _at_most(low, starts[axis]) and _at_most(starts[axis] + sizes[axis], high):
            inside = (*starts[:axis], starts[axis] - low, *starts[axis + 1 :])
            return at.op.slice(part, starts=inside, sizes=sizes, steps=steps)
        low = high
    return "it crosses parts"


def _continues(a: Node, b: Node, axis: int) -> bool:
    """True when slice `b` begins where slice `a` of the same value ends, and they agree elsewhere."""
    if a.inputs[0] is not b.inputs[0]:
        return False
    p, q = a.attrs, b.attrs
    for i, (s, t) in enumerate(zip(p["starts"], q["starts"])):
        if p["steps"][i] != q["steps"][i]:
            return False
        if i == axis and (t != s + p["sizes"][i] or p["steps"][i] != 1):
            return False
        if i != axis and (s != t or p["sizes"][i] != q["sizes"][i]):
            return False
    return True


def _halves(e: Example) -> Value:
    x = e.x("f32[2,6]")
    left = e.slice(x, starts=(0, 0), sizes=(2, 2), steps=(1, 1))
    right = e.slice(x, starts=(0, 2), sizes=(2, 4), steps=(1, 1))
    return e.exp(e.concat(left, right, axis=1))


@rule(
    "concat",
    examples=(
        lambda e: e.exp(e.concat(e.x("f32[2,3]"), axis=0)),
        lambda e: e.concat(e.concat(e.x("f32[2]"), e.x("f32[3]"), axis=0), e.x("f32[4]"), axis=0),
        _halves,
        lambda e: e.concat(e.w("f32[2]"), e.w("f32[3]"), e.x("f32[1]"), axis=0),
    ),
)
def join_concats(n: Node, at: At) -> Outcome:
    """concat(x) = x; concat(concat(x, y), z) = concat(x, y, z); neighbouring slices and constants are one operand;
    empty ones none"""
    axis = n.attrs["axis"]
    if len(n.inputs) == 1:
        return n.inputs[0]
    parts: list[Value] = []
    changed = False
    for v in n.inputs:
        assert v is not None
        m = at.by(v, "concat")
        if m is not None and m.attrs["axis"] == axis and at.only_use(v):
            parts.extend(u for u in m.inputs if u is not None)
            changed = True
        elif v.shape[axis] == 0:
            changed = True
        else:
            parts.append(v)
    joined: list[Value] = parts[:1]
    for v in parts[1:]:
        last = joined[-1]
        if last.data is not None and v.data is not None:
            joined[-1] = at.const(np.concatenate([last.data, v.data], axis=axis))
            changed = True
            continue
        a, b = at.by(last, "slice"), at.by(v, "slice")
        if a is None:
            a = next((m for m in at.op.nodes if m.output is last), None)
        if a is not None and b is not None and _continues(a, b, axis):
            p, q = a.attrs, b.attrs
            sizes = (*p["sizes"][:axis], p["sizes"][axis] + q["sizes"][axis], *p["sizes"][axis + 1 :])
            joined[-1] = at.op.slice(a.inputs[0], starts=p["starts"], sizes=sizes, steps=p["steps"])
            changed = True
        else:
            joined.append(v)
    if not changed or not joined:
        return None
    return at.op.concat(*joined, axis=axis) if len(joined) > 1 else joined[0]


@rule(
    "pad",
    examples=(
        lambda e: e.pad(
            e.pad(e.x("f32[2,3]"), before=(0, 1), after=(1, 0), mode="constant", value=0.0),
            before=(1, 1), after=(0, 2), mode="constant", value=0.0,
        ),
        lambda e: e.exp(e.pad(e.x("f32[2,3]"), before=(0, 0), after=(0, 0), mode="edge", value=0.0)),
    ),
)  # fmt: skip
def join_pads(n: Node, at: At) -> Outcome:
    """pad(pad(x, a), b) = pad(x, a + b) for one constant or both edge; a pad by 0 is nothing"""
    a = n.attrs
    if all(p == 0 for p in (*a["before"], *a["after"])):
        return n.inputs[0]
    m = at.by(n.inputs[0], "pad")
    if m is None or not at.only_use(m.output):
        return None
    b = m.attrs
    if (
        a["mode"] != b["mode"]
        or a["mode"] not in ("constant", "edge")
        or (a["mode"] == "constant" and a["value"] != b["value"])
    ):
        return "they pad with different values"
    before, after = (tuple(p + q for p, q in zip(a[k], b[k])) for k in ("before", "after"))
    return at.op.pad(m.inputs[0], before=before, after=after, mode=a["mode"], value=a["value"])


@rule(
    "gather",
    examples=(
        lambda e: e.gather(e.x("f32[4,3]"), e.const(np.int64(-1)), axis=0),
        lambda e: e.gather(e.x("f32[4,3]"), e.const(np.array([1, 2])), axis=1),
    ),
)
def gather_as_slice(n: Node, at: At) -> Outcome:
    """gather(x, [i, i+1, ...]) = slice(x); gather(x, i) = reshape(slice(x)): a view"""
    x, idx = n.inputs
    assert x is not None and idx is not None
    axis = n.attrs["axis"] % x.rank
    if idx.data is None or idx.rank > 1 or not idx.data.size or not isinstance(x.shape[axis], int):
        return None
    at_index = [int(i) + (x.shape[axis] if i < 0 else 0) for i in idx.data.reshape(-1)]
    steps = {b - a for a, b in pairwise(at_index)}
    if len(steps) > 1 or 0 in steps:
        return "the indices have no constant step"
    step = steps.pop() if steps else 1
    part = at.op.slice(
        x,
        starts=tuple(at_index[0] if i == axis else 0 for i in range(x.rank)),
        sizes=tuple(len(at_index) if i == axis else d for i, d in enumerate(x.shape)),
        steps=tuple(step if i == axis else 1 for i in range(x.rank)),
    )
    return part if idx.rank else at.op.reshape(part, shape=n.output.shape)


RULES: tuple[Rule, ...] = (
    join_reshapes,
    reduce_without_the_axis,
    join_expands,
    join_slices,
    slice_of_one_part,
    join_concats,
    join_pads,
)
NATIVE_RULES: tuple[Rule, ...] = (gather_as_slice,)
