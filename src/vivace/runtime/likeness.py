"""What native code compares the arrays of a call with, so that neither a call like the last one nor one with new sizes
needs checks in Python, whatever the number of arrays (see `vivace.targets.cpu.matching`).

    taken = Taken(inputs, outputs, families)           # once for an engine
    seen = Seen(taken)                                 # one for each run at a time: it holds the sizes of the last call
    seen.compare[taken.plain](*inputs, *outputs)       # a `Likeness`; None for an output to be made, or no outputs
    seen.dims(taken.plain), seen.output_sizes()        # sizes, unless it was NONE

Native code reads array objects as NumPy lays them out (numpy/ndarraytypes.h, PyArrayObject_fields).

Rules:
* SEEN: `ArrayField` is compared with arrays once, at import; where NumPy keeps arrays otherwise, nothing is like.
* FORMS: of an engine whose outputs may begin with inputs (`vivace.runtime.rooms`) there are two tables: all arrays are
  dense, or all such outputs lie in place.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from vivace.base.dims import symbols
from vivace.base.specs import TensorSpec
from vivace.lower.image import Appended
from vivace.runtime.buffer import DATA_FIELD, data_is_first
from vivace.runtime.evaluation import check_status
from vivace.runtime.pool import pool
from vivace.targets.cpu.formulas import Frame, Words, formulas_of
from vivace.targets.cpu.matching import DENSE, UNSET, WRITEABLE, ArrayField, Likeness, Match


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """One way in which the arrays of a call may lie, as the table that native code reads."""

    entries: Words
    is_in_place: bool


class Taken:
    """What an engine takes and gives. Sizes are places in the table of `formulas`: `names` first, then `rooms`."""

    def __init__(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], families: Sequence[Sequence[Appended]]
    ) -> None:
        self.n_inputs, self.n_arrays = len(inputs), len(inputs) + len(outputs)
        axes = [d for s in (*inputs, *outputs) for d in s.shape]
        found = {x.name: x for d in axes for x in symbols(d)}
        self.names = tuple(sorted(found))
        self.wanted = frozenset(x.name for s in outputs for d in s.shape for x in symbols(d))
        self.rooms = tuple(family[0].room for family in families)
        self.formulas = formulas_of(axes, (*self.names, *self.rooms))
        self.bounds = [(n, x.lo or 0, x.hi) for n, x in found.items() if (x.lo or 0) > 0 or x.hi is not None]
        self._dtypes = [s.dtype.numpy for s in (*inputs, *outputs)]  # which keeps them where they are
        starts = np.cumsum([0, *(len(s.shape) for s in (*inputs, *outputs))]).tolist()
        self._places = [self.formulas.results[a:b].tolist() for a, b in pairwise(starts)]
        first = starts[self.n_inputs]
        self.output_places = self.formulas.results[first:]
        self.output_ranges = [slice(a - first, b - first) for a, b in pairwise(starts[self.n_inputs :])]
        self.plain = self._form(())
        self.forms = (self._form(families), self.plain) if families else (self.plain,)
        # Where room, and what is kept of the input, come from when all arrays are dense.
        self.appended = [
            (f[0], self._places[self.n_inputs + f[0].output][f[0].axis], self._places[f[0].input][f[0].axis])
            for f in families
        ]

    def _form(self, families: Sequence[Sequence[Appended]]) -> Form:
        pitches: dict[int, tuple[int, int, int]] = {}  # by array: axis, place of its pitch, pair
        for number, family in enumerate(families):
            for a in family:
                pitches[a.input] = (a.axis, len(self.names) + number, -1)
                pitches[self.n_inputs + a.output] = (a.axis, len(self.names) + number, a.input)
        words: list[int] = []
        for i, (dtype, places) in enumerate(zip(self._dtypes, self._places, strict=True)):
            is_output = i >= self.n_inputs
            axis, pitch, pair = pitches.get(i, (-1, -1, -1))
            flags = (DENSE if axis < 0 else 0) | (WRITEABLE if is_output else 0)
            none = id(None) if is_output and axis < 0 else 0
            words += [id(np.ndarray), id(dtype), none, flags, dtype.itemsize, pair, len(places)]
            for k, place in enumerate(places):
                words += [place, pitch if k == axis else -1]
        return Form(np.array(words, np.int64), bool(families))


class Seen:
    """The sizes of the call that was looked at last, for one run at a time."""

    def __init__(self, taken: Taken) -> None:
        self._taken = taken
        self._values = taken.formulas.values.copy()
        self._extents = np.zeros(2 * taken.n_arrays, np.int64)
        n_symbols = len(taken.names) + len(taken.rooms)
        self._values[:n_symbols] = UNSET
        self._frames: list[Words] = []
        self.compare: dict[Form, Callable[..., int]] = {}
        for form in taken.forms:
            frame = np.zeros(Match.SIZE, np.int64)
            frame[: Frame.SIZE] = taken.formulas.frame(self._values)
            frame[Match.ENTRIES], frame[Match.FIELD] = form.entries.ctypes.data, DATA_FIELD
            frame[Match.N_KNOWN], frame[Match.N_SYMBOLS] = len(taken.names), n_symbols
            frame[Match.N_INPUTS], frame[Match.EXTENTS] = taken.n_inputs, self._extents.ctypes.data
            frame[Match.N_LEAST] = taken.n_arrays if form.is_in_place else taken.n_inputs
            self._frames.append(frame)
            self.compare[form] = pool().native.matching(frame.ctypes.data) if _is_seen else unlike
        self._evaluate = pool().native.evaluation(self._frames[0].ctypes.data)

    def tell(self, dims: Mapping[str, int]) -> None:
        """Sizes that Python found. Raises: KeyError for one that outputs have, but no input tells; ShapeError for one
        that 64 bits do not hold."""
        names = (*self._taken.names, *self._taken.rooms)
        self._values[: len(names)] = [dims.get(name, UNSET) for name in names]
        if untold := self._taken.wanted - dims.keys():
            raise KeyError(*sorted(untold))
        check_status(self._evaluate())

    def dims(self, form: Form) -> dict[str, int]:
        """Every dim of a call of this form."""
        taken, values = self._taken, self._values
        names = (*taken.names, *taken.rooms)
        dims = {name: v for name, v in zip(names, values[: len(names)].tolist()) if v != UNSET}
        for appended, length, past in taken.appended:
            if not form.is_in_place or appended.room not in dims:
                dims[appended.room] = int(values[length])
            dims[appended.kept] = 0 if form.is_in_place else int(values[past])
        return dims

    def output_sizes(self) -> list[int]:
        """The sizes of all outputs, one after another (`Taken.output_ranges`)."""
        sizes: list[int] = self._values[self._taken.output_places].tolist()
        return sizes


def unlike(*_: object) -> int:
    """Compares with arrays that nobody knows."""
    return Likeness.NONE


def _fields_are_where_expected() -> bool:
    square: npt.NDArray[np.float32] = np.zeros((4, 6), np.float32)
    samples: list[npt.NDArray[np.generic]] = [square, square[1:, 2:], square.T, np.zeros(3), np.zeros((), np.int8)]
    square.flags.writeable = False
    samples.append(square[:2])
    return sys.implementation.name == "cpython" and data_is_first and all(map(_is_as_expected, samples))


def _is_as_expected(a: npt.NDArray[np.generic]) -> bool:
    if sys.getsizeof(a) < DATA_FIELD + ArrayField.FLAGS + 4:
        return False

    def word(field: ArrayField) -> int:
        return ctypes.c_int64.from_address(id(a) + DATA_FIELD + field).value

    def half(field: ArrayField) -> int:
        return ctypes.c_int32.from_address(id(a) + DATA_FIELD + field).value

    def words(field: ArrayField) -> list[int]:
        return (ctypes.c_int64 * a.ndim).from_address(word(field))[:]

    flags = half(ArrayField.FLAGS)
    return (
        word(ArrayField.TYPE) == id(np.ndarray)
        and word(ArrayField.DTYPE) == id(a.dtype)
        and half(ArrayField.RANK) == a.ndim
        and bool(flags & DENSE) == a.flags.c_contiguous
        and bool(flags & WRITEABLE) == a.flags.writeable
        and words(ArrayField.SHAPE) == [*a.shape]
        and words(ArrayField.STRIDES) == [*a.strides]
    )


_is_seen = _fields_are_where_expected()
