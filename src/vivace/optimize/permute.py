"""How each op computes on a transposed copy of its operands: the knowledge that the layout passes share.

For a permutation `perm` of rank r, "side 1" of a value of rank r is `transpose(value, perm)`. An op is *flexible* when
it can read and write side 1 instead of side 0 by changing its attributes alone; `flexible(node, perm)` says how.

    relu, add, where, ...     as they are; operands of lower rank get leading ones, then the same transpose
    reduce, softmax, concat, slice, pad, expand, resize, gather, cumsum, argmax, iota     their axes move
    layer_norm, rms_norm      when the normalized axes stay last
    conv, pools               NCHW becomes NHWC, when asked for and `perm` moves axis 1 to the end
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vivace.base.dims import Dim
from vivace.graph.graph import Node

Perm = tuple[int, ...]
CONVS = frozenset({"conv", "conv_transpose", "conv_integer"})
POOLS = frozenset({"max_pool", "avg_pool"})


@dataclass(frozen=True, slots=True)
class Flexible:
    """A node on side 1: its attributes there, which operands follow it, and whether its result does (a reduction may
    leave rank r)."""

    attrs: dict[str, Any]
    follows: tuple[bool, ...]
    result_follows: bool = True


def channels_last(rank: int) -> Perm:
    """The permutation that moves axis 1 to the end."""
    return (0, *range(2, rank), 1)


def inverse(perm: Perm) -> Perm:
    return tuple(perm.index(i) for i in range(len(perm)))


def permuted(items: Sequence[Any], perm: Perm) -> tuple[Any, ...]:
    return tuple(items[p] for p in perm)


def lifted(shape: tuple[Dim, ...], rank: int) -> tuple[Dim, ...]:
    """A shape with leading ones up to `rank`."""
    return (1,) * (rank - len(shape)) + shape


def _all(n: Node) -> tuple[bool, ...]:
    return (True,) * len(n.inputs)


def flexible(n: Node, perm: Perm, windows: bool) -> Flexible | None:
    """How `n` runs on side 1, or None when it cannot; convolutions and pools only where `windows` says so."""
    name, a, rank = n.op.name, n.attrs, len(perm)
    if name == "transpose" or (not n.inputs and name != "iota"):
        return None
    x = n.inputs[0] if n.inputs else None
    if n.op.kind == "elementwise":
        return Flexible(dict(a), _all(n)) if n.output.rank == rank else None
    if name == "expand" and n.output.rank == rank:
        return Flexible({"shape": permuted(a["shape"], perm)}, (True,))
    if name == "iota" and n.output.rank == rank:
        return Flexible({**a, "shape": permuted(a["shape"], perm), "axis": perm.index(a["axis"] % rank)}, ())
    if x is None or x.rank != rank:
        return None
    if name in CONVS | POOLS:
        if not windows or perm != channels_last(rank) or a["layout"] != "NCHW":
            return None
        return Flexible({**a, "layout": "NHWC"}, (True,) + (False,) * (len(n.inputs) - 1))
    if name in ("slice", "pad", "resize"):
        lists = {"slice": ("starts", "sizes", "steps"), "pad": ("before", "after"), "resize": ("sizes", "scales")}[name]
        return Flexible({**a, **{k: permuted(a[k], perm) for k in lists}}, _all(n))
    if name in ("softmax", "log_softmax", "cumsum", "concat"):
        return Flexible({**a, "axis": perm.index(a["axis"] % rank)}, _all(n))
    if name == "gather" and n.inputs[1] is not None and n.inputs[1].rank == 1:
        return Flexible({**a, "axis": perm.index(a["axis"] % rank)}, (True, False))
    if name in ("layer_norm", "rms_norm"):
        tail = a["axis"] % rank
        return (
            Flexible(dict(a), (True,) + (False,) * (len(n.inputs) - 1))
            if perm[tail:] == tuple(range(tail, rank))
            else None
        )
    if name.startswith("reduce_"):
        return _reduction(n, perm, a["axes"], {"axes": tuple(sorted(perm.index(i) for i in a["axes"]))})
    if name in ("argmax", "argmin"):
        axis = a["axis"] % rank
        return _reduction(n, perm, (axis,), {"axis": perm.index(axis)})
    return None


def _reduction(n: Node, perm: Perm, axes: tuple[int, ...], moved: dict[str, Any]) -> Flexible | None:
    attrs = {**n.attrs, **moved}
    if n.attrs["keepdims"]:
        return Flexible(attrs, (True,))
    left = [p for p in perm if p not in axes]
    return Flexible(attrs, (True,), result_follows=False) if left == sorted(left) else None
