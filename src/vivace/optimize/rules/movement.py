"""Reshapes, transposes, slices, pads, concats and expands that merge, cancel, or turn into something cheaper. All are
exact."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from vivace.base.dims import Dim, bounds
from vivace.graph.graph import Node, Value
from vivace.graph.rewrite import At, Example, Outcome, Rule, rule


def is_reshape(shape: Sequence[Dim], perm: Sequence[int]) -> bool:
    """True when transposing moves only axes of extent 1, so that the elements keep their order."""
    wide = [p for p in perm if shape[p] != 1]
    return wide == sorted(wide)


@rule(
    "transpose",
    examples=(
        lambda e: e.transpose(e.transpose(e.x("f32[2,3,4]"), perm=(1, 2, 0)), perm=(0, 2, 1)),
        lambda e: e.exp(e.transpose(e.transpose(e.x("f32[2,3]"), perm=(1, 0)), perm=(1, 0))),
        lambda e: e.transpose(e.x("f32[2,1,4]"), perm=(1, 0, 2)),
    ),
)
def join_transposes(n: Node, at: At) -> Outcome:
    """transpose(transpose(x, p), q) = transpose(x, p[q]); one that moves only extents of 1 is a reshape; none when in
    order"""
    x, perm = n.inputs[0], n.attrs["perm"]
    assert x is not None
    if perm == tuple(range(len(perm))):
        return x
    if is_reshape(x.shape, perm):
        return at.op.reshape(x, shape=n.output.shape)
    m = at.by(x, "transpose")
    if m is None:
        return None
    first = m.attrs["perm"]
    return at.op.transpose(m.inputs[0], perm=tuple(first[p] for p in perm))


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


def regroup(inner: Sequence[Dim], outer: Sequence[Dim]) -> list[list[int]] | None:
    """For each dim of `outer`, the neighbouring axes of `inner` whose product it is; None when dims are split instead
    of joined."""
    groups: list[list[int]] = []
    i = 0
    for d in outer:
        taken: list[int] = []
        size: Dim = 1
        while size != d or not taken:
            if i == len(inner) or (taken and size != 1 and d == 1):
                return None
            if d == 1 and inner[i] != 1:
                break  # a one that joins nothing
            size = size * inner[i]
            taken.append(i)
            i += 1
            if isinstance(size, int) and isinstance(d, int) and size > d:
                return None
        groups.append(taken)
    while i < len(inner) and groups:
        if inner[i] != 1:
            return None
        groups[-1].append(i)
        i += 1
    return groups


def _through(x: Value, middle: Sequence[Dim], perm: Sequence[int]) -> tuple[int, ...] | None:
    """The permutation of `x` that does to its elements what `perm` does after a reshape to `middle`."""
    groups = regroup(x.shape, middle)
    return None if groups is None else tuple(axis for p in perm for axis in groups[p])


@rule(
    "reshape",
    examples=(
        lambda e: e.reshape(
            e.transpose(e.reshape(e.x("f32[2,3,4,5]"), shape=(6, 4, 5)), perm=(0, 2, 1)), shape=(2, 3, 5, 4)
        ),
    ),
)
def transpose_before_joining(n: Node, at: At) -> Outcome:
    """reshape(transpose(reshape(x))) = reshape(transpose(x)) where the inner reshape only joins axes that stay
    together"""
    t = at.by(n.inputs[0], "transpose")
    inner = at.by(t.inputs[0], "reshape") if t is not None else None
    if t is None or inner is None or inner.inputs[0] is None:
        return None
    if not at.only_use(t.output):
        return f"%{t.output.name} is used elsewhere too"
    perm = _through(inner.inputs[0], inner.output.shape, t.attrs["perm"])
    if perm is None:
        return "the inner reshape splits axes"
    return at.op.reshape(at.op.transpose(inner.inputs[0], perm=perm), shape=n.output.shape)


@rule(
    "transpose",
    examples=(
        lambda e: e.transpose(
            e.reshape(e.transpose(e.x("f32[2,3,5,4]"), perm=(0, 1, 3, 2)), shape=(6, 4, 5)), perm=(0, 2, 1)
        ),
    ),
)
def meet_transposes(n: Node, at: At) -> Outcome:
    """transpose(reshape(transpose(x, p)), q) = reshape(transpose(x, p')) where the reshape only joins axes"""
    inner = at.by(n.inputs[0], "reshape")
    t = at.by(inner.inputs[0], "transpose") if inner is not None else None
    if inner is None or t is None:
        return None
    perm = _through(t.output, inner.output.shape, n.attrs["perm"])
    if perm is None:
        return "the reshape splits axes"
    first = t.attrs["perm"]
    return at.op.reshape(at.op.transpose(t.inputs[0], perm=tuple(first[p] for p in perm)), shape=n.output.shape)


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


def _one_of_three(e: Example) -> Value:
    packed = e.transpose(e.x("f32[2,5,3,4]"), perm=(2, 0, 1, 3))
    return e.slice(packed, starts=(1, 0, 0, 0), sizes=(1, 2, 5, 4), steps=(1, 1, 1, 1))


@rule("slice", examples=(_one_of_three,))
def slice_before_transpose(n: Node, at: At) -> Outcome:
    """slice(transpose(x)) = transpose(slice(x)): a view of less"""
    t = at.by(n.inputs[0], "transpose")
    if t is None:
        return None
    perm, a = t.attrs["perm"], n.attrs
    back = [perm.index(i) for i in range(len(perm))]
    starts, sizes, steps = (tuple(a[k][i] for i in back) for k in ("starts", "sizes", "steps"))
    return at.op.transpose(at.op.slice(t.inputs[0], starts=starts, sizes=sizes, steps=steps), perm=perm)


@rule("reshape", examples=(lambda e: e.reshape(e.transpose(e.x("f32[2,5,1,4]"), perm=(0, 3, 1, 2)), shape=(2, 4, 5)),))
def drop_ones_before_transpose(n: Node, at: At) -> Outcome:
    """reshape(transpose(x)) = transpose(reshape(x)) where the reshape only drops axes of extent 1"""
    t = at.by(n.inputs[0], "transpose")
    if t is None or t.inputs[0] is None or not at.only_use(t.output):
        return None
    x, wide = t.inputs[0], t.output.shape
    kept = _kept_axes(wide, n.output.shape)
    if kept is None:
        return "the reshape does more than drop axes of extent 1"
    left = [t.attrs["perm"][i] for i in kept]
    thin = at.op.reshape(x, shape=tuple(x.shape[i] for i in sorted(left)))
    return at.op.transpose(thin, perm=tuple(sorted(left).index(i) for i in left))


def _kept_axes(wide: Sequence[Dim], thin: Sequence[Dim]) -> list[int] | None:
    """The axes of `wide` that `thin` keeps, when the others have extent 1."""
    kept: list[int] = []
    for i, d in enumerate(wide):
        if len(kept) < len(thin) and d == thin[len(kept)] and (d != 1 or len(wide) - i == len(thin) - len(kept)):
            kept.append(i)
        elif d != 1:
            return None
    return kept if len(kept) == len(thin) < len(wide) else None


RULES: tuple[Rule, ...] = (
    join_transposes,
    join_reshapes,
    transpose_before_joining,
    meet_transposes,
    reduce_without_the_axis,
    join_expands,
    join_slices,
    slice_of_one_part,
    join_concats,
    join_pads,
)
NATIVE_RULES: tuple[Rule, ...] = (gather_as_slice, slice_before_transpose, drop_ones_before_transpose)
