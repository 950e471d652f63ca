"""Where values lie: storages, and views of them.

A `Storage` is a run of memory: a planned piece of the arena, a constant, an input or an output of the call. A `View`
says where the elements of a value lie in a storage: an offset and a stride per axis, in elements. Movement ops are
views where strides can say them (transpose, slice, expand, most reshapes) and cost nothing. A view without a storage is
an *iota*: its "address" is its value, so it moves through the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vivace.base.dims import Dim, exact_div, prod
from vivace.base.dtypes import DType
from vivace.loops.kernel import Buffer, dense_strides

Kind = Literal["arena", "constant", "input", "output"]


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Memory that steps read and write; compared by identity. `size` is in elements, `index` the position of an input
    or output."""

    name: str
    dtype: DType
    size: Dim
    kind: Kind = "arena"
    data: np.ndarray | None = None
    index: int = -1

    @property
    def bytes(self) -> Dim:
        return self.size * self.dtype.size_bytes


@dataclass(frozen=True, slots=True)
class View:
    """A value's place: element (i0, i1, ..) lies at `offset + sum(strides[k] * ik)` of the storage."""

    storage: Storage | None
    dtype: DType
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    offset: Dim = 0

    @property
    def is_dense(self) -> bool:
        """Row-major without gaps (axes of extent 1 may have any stride)."""
        return all(
            s == d or n == 1 for s, d, n in zip(self.strides, dense_strides(self.shape), self.shape, strict=True)
        )

    def buffer(self, name: str, writable: bool = False) -> Buffer:
        return Buffer(name, self.dtype, self.shape, self.strides, writable)

    def transpose(self, perm: Sequence[int]) -> View:
        return replace(self, shape=tuple(self.shape[p] for p in perm), strides=tuple(self.strides[p] for p in perm))

    def slice(self, starts: Sequence[Dim], sizes: Sequence[Dim], steps: Sequence[int]) -> View:
        offset = self.offset
        for start, stride in zip(starts, self.strides, strict=True):
            offset = offset + start * stride
        strides = tuple(s * t for s, t in zip(self.strides, steps, strict=True))
        return replace(self, shape=tuple(sizes), strides=strides, offset=offset)

    def expand(self, shape: Sequence[Dim]) -> View:
        """Broadcast to `shape`: new axes and axes of extent 1 get stride 0."""
        lead = len(shape) - len(self.shape)
        strides: list[Dim] = [0] * lead
        for have, want, stride in zip(self.shape, shape[lead:], self.strides, strict=True):
            strides.append(0 if have == 1 and want != 1 else stride)
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def reshape(self, shape: Sequence[Dim]) -> View | None:
        """The same elements in row-major order under another shape, or None when strides cannot say it."""
        shape = tuple(shape)
        if shape == self.shape:
            return self
        if self.is_dense and self.storage is not None:
            return replace(self, shape=shape, strides=dense_strides(shape))
        strides = _reshape_strides(self.shape, self.strides, shape)
        return None if strides is None else replace(self, shape=shape, strides=strides)


def _reshape_strides(old: tuple[Dim, ...], strides: tuple[Dim, ...], new: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    """Strides of the reshaped view: split both shapes into matching runs; each old run must be one merged axis."""
    src = [(n, s) for n, s in zip(old, strides, strict=True) if n != 1]
    merged: list[tuple[Dim, Dim]] = []
    for n, s in src:
        if merged and merged[-1][1] == n * s:
            merged[-1] = (merged[-1][0] * n, s)
        else:
            merged.append((n, s))
    out: list[Dim] = []
    axis = 0
    left: Dim = merged[0][0] if merged else 1  # elements of the merged axis not yet split off
    for n in new:
        if n == 1:
            out.append(0)
            continue
        if left == 1:
            axis += 1
            if axis >= len(merged):
                return None
            left = merged[axis][0]
        rest = exact_div(left, n)
        if rest is None:
            return None
        left = rest
        out.append(left * merged[axis][1])
    return tuple(out) if left == 1 and axis >= len(merged) - 1 else None


def dense(storage: Storage, shape: Sequence[Dim]) -> View:
    return View(storage, storage.dtype, tuple(shape), dense_strides(tuple(shape)))


def iota(shape: Sequence[Dim], axis: int, dtype: DType) -> View:
    """The view whose elements are their own index along `axis`."""
    return View(None, dtype, tuple(shape), tuple(1 if i == axis else 0 for i in range(len(shape))))


def collapse(
    shape: tuple[Dim, ...], views: Sequence[View], keep: int = 0
) -> tuple[tuple[Dim, ...], list[View], list[list[int]]]:
    """Merge adjacent axes that every view walks as one; drop axes of extent 1. All views have the given shape.

    `keep` leading axes stay apart. Returns the merged shape, the views over it, and the original axes in each merged
    one.
    """
    groups: list[list[int]] = []
    for axis in range(len(shape)):
        if shape[axis] == 1 and axis >= keep:
            continue
        if groups and axis > keep and len(groups) > keep:
            inner = shape[axis]
            last = groups[-1][-1]
            if all(v.strides[last] == v.strides[axis] * inner for v in views):
                groups[-1].append(axis)
                continue
        groups.append([axis])
    merged = tuple(prod([shape[a] for a in g]) for g in groups)
    out = [replace(v, shape=merged, strides=tuple(v.strides[g[-1]] for g in groups)) for v in views]
    return merged, out, groups
