"""Transposes that merge, cancel, or meet across a reshape. All are exact."""

from __future__ import annotations

from collections.abc import Sequence

from vivace.base.dims import Dim
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


RULES: tuple[Rule, ...] = (join_transposes, transpose_before_joining, meet_transposes)
NATIVE_RULES: tuple[Rule, ...] = (slice_before_transpose, drop_ones_before_transpose)
