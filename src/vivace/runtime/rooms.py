"""Outputs in one array with the inputs that they begin with (`vivace.lower.image.Appended`): a decoder's caches.

    cache = np.empty((1, heads, capacity, depth), np.float32)
    engine.run({"past": cache[:, :, :n], ...}, outputs={"present": cache[:, :, : n + 1], ...})

Rules:
* STRIDES: such an output may be a view of an array that is longer along the axis, and dense otherwise.
* ALL: outputs of the same lengths (one `room`) are all given, with the same room in memory, or must be dense.
* IN PLACE: where each of them begins at the place of its input, with its strides, nothing of the inputs is copied.
  Else all are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from vivace.base.specs import TensorSpec
from vivace.lower.image import Appended
from vivace.runtime.buffer import DATA_FIELD, data_is_first

ANY = 0  # room that strides do not tell
_word_at = ctypes.c_size_t.from_address


@dataclass(frozen=True, slots=True)
class Rooms:
    """What the arrays of a call say: dims by name that are not those of dense arrays, the inputs that lie in place, and
    the outputs that need not be dense, by number."""

    dims: tuple[tuple[str, int], ...] = ()
    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()


PLAIN = Rooms()


def families_of(appended: Sequence[Appended]) -> tuple[tuple[Appended, ...], ...]:
    """Those of one room, together (rule ALL)."""

    def room(a: Appended) -> str:
        return a.room

    return tuple(tuple(family) for _, family in groupby(sorted(appended, key=room), room))


def rooms_of(
    families: Sequence[Sequence[Appended]], given: Sequence[object], outputs: Mapping[str, object],
    specs: Sequence[TensorSpec],
) -> Rooms:  # fmt: skip
    """How the arrays of a call lie; it says nothing of whether they fit."""
    dims: list[tuple[str, int]] = []
    inputs: list[int] = []
    longer: list[int] = []
    for family in families:
        results = [outputs.get(specs[a.output].name) for a in family]
        arrays = [y for y in results if isinstance(y, np.ndarray)]
        if len(arrays) < len(results):
            continue
        layouts = {(y.shape, y.strides, y.itemsize, a.axis) for y, a in zip(arrays, family, strict=True)}
        sizes = {_room(*layout) for layout in layouts} - {ANY}
        if None in sizes or len(sizes) > 1:
            continue
        dims += [(family[0].room, size) for size in sizes if size is not None]
        longer += [a.output for a in family]
        if all(_begins(y, given[a.input]) for y, a in zip(arrays, family, strict=True)):
            dims.append((family[0].kept, 0))
            inputs += [a.input for a in family]
    return Rooms(tuple(dims), frozenset(inputs), frozenset(longer))


def _room(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, axis: int) -> int | None:
    """How many places along an axis an array has in memory; None where it is not one of rule STRIDES."""
    if len(shape) <= axis:
        return None
    if 0 in shape or itemsize == 0:
        return ANY
    size, room = itemsize, ANY
    for i in range(len(shape) - 1, -1, -1):
        n, stride = shape[i], strides[i]
        if i < axis and n > 1 and room == ANY:
            room, rest = divmod(stride, size)
            if rest or room < shape[axis]:
                return None
            size = stride
        elif n > 1 and stride != size:
            return None
        size *= n if i != axis else 1
    return room


def _begins(y: np.ndarray, x: object) -> bool:
    """Whether an input lies where the output begins."""
    if type(x) is not np.ndarray or type(y) is not np.ndarray or x.strides != y.strides or x.dtype != y.dtype:
        return False
    return _address(x) == _address(y)


def _address(x: np.ndarray) -> int:
    return _word_at(id(x) + DATA_FIELD).value if data_is_first else x.ctypes.data
