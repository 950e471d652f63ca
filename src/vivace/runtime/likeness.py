"""What native code compares arrays with, so that a call like the last one needs no checks in Python.

    words = likeness([np.dtype("f4")], [(2, 3)])       # arrays of exactly this dtype and shape, C-contiguous
    words.ctypes.data                                  # for `Context.expect`

Per array: the addresses of its type and its dtype, its rank, its sizes; a 0 ends the table. Native code reads the same
from the array objects (numpy/ndarraytypes.h, PyArrayObject_fields), after their type has turned out to be `ndarray`.

Rule SEEN: `ArrayField` is compared with arrays once, at import; where NumPy keeps arrays otherwise, there is no
likeness.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vivace.runtime.buffer import DATA_FIELD, data_is_first
from vivace.targets.cpu.formulas import Words
from vivace.targets.cpu.methods import ArrayField


def likeness(dtypes: Sequence[np.dtype], shapes: Sequence[tuple[int, ...]]) -> Words | None:
    """The table for arrays of these dtypes and shapes, which the caller keeps alive; None where it cannot be used."""
    if not _is_seen:
        return None
    words: list[int] = []
    for dtype, shape in zip(dtypes, shapes, strict=True):
        words += [id(np.ndarray), id(dtype), len(shape), *shape]
    return np.array([*words, 0], np.int64)


def _fields_are_where_expected() -> bool:
    square: npt.NDArray[np.float32] = np.zeros((4, 6), np.float32)
    samples: list[npt.NDArray[np.generic]] = [square, square[1:, 2:], square.T, np.zeros(3), np.zeros((), np.int8)]
    return sys.implementation.name == "cpython" and data_is_first and all(map(_is_as_expected, samples))


def _is_as_expected(a: npt.NDArray[np.generic]) -> bool:
    if sys.getsizeof(a) < DATA_FIELD + ArrayField.FLAGS + 4:
        return False

    def word(field: ArrayField) -> int:
        return ctypes.c_int64.from_address(id(a) + DATA_FIELD + field).value

    def half(field: ArrayField) -> int:
        return ctypes.c_int32.from_address(id(a) + DATA_FIELD + field).value

    return (
        word(ArrayField.TYPE) == id(np.ndarray)
        and word(ArrayField.DTYPE) == id(a.dtype)
        and half(ArrayField.RANK) == a.ndim
        and bool(half(ArrayField.FLAGS) & 1) == a.flags.c_contiguous
        and (ctypes.c_int64 * a.ndim).from_address(word(ArrayField.SHAPE))[:] == [*a.shape]
    )


_is_seen = _fields_are_where_expected()
