"""From the arrays of a call to what follows from them: dims, results, slices.

Native code looks at the arrays first (`vivace.runtime.likeness`). Only what it does not know, Python looks at: arrays
of other kinds or with gaps, arrays that lie over each other, sizes that follow from others, and what does not fit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import empty, ndarray

from vivace.base.errors import ShapeError
from vivace.base.specs import TensorSpec
from vivace.lower.image import Image
from vivace.runtime.arguments import apart, checked, refuse_outputs, refuse_overlaps, result_for
from vivace.runtime.binding import ShapeSolver
from vivace.runtime.crew import Crew
from vivace.runtime.likeness import Form, Seen, Taken, unlike
from vivace.runtime.rooms import PLAIN, Rooms, families_of, rooms_of
from vivace.runtime.slices import Slices, slices_of
from vivace.targets.cpu.matching import Likeness

SAME = int(Likeness.SAME)

Array = np.ndarray
Outputs = Mapping[str, Array]


@dataclass(slots=True, eq=False)
class Call:
    """What follows from the arrays of a call: the dims, the sizes of all outputs, the slices of a batch that is not
    computed at once; how the arrays lie where native code knows, and what compares others with them."""

    dims: dict[str, int]
    sizes: list[int]
    slices: Sequence[Slices]
    form: Form | None
    compare: Callable[..., int]
    shapes: list[tuple[int, ...]] | None = None  # of the outputs, once they were made


@dataclass(slots=True, eq=False)
class Last:
    """The call that a context is bound to, if any, the sizes that were seen last, and the crew of the context once it
    computed slices side by side."""

    seen: Seen
    call: Call | None = None
    crew: Crew | None = None


class Calls:
    """The calls of an engine. `arena_bytes` tells how much memory values between steps take with given dims;
    `n_threads` may compute slices side by side."""

    def __init__(
        self, image: Image, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec],
        arena_bytes: Callable[[Mapping[str, int]], int], n_threads: int,
    ) -> None:  # fmt: skip
        self.inputs, self.outputs = inputs, outputs
        self.solver = ShapeSolver(inputs)
        self._batch, self._arena_bytes, self._n_threads = image.batch, arena_bytes, n_threads
        self._families = families_of(image.appended)
        self._taken = Taken(inputs, outputs, self._families)
        self._names = [s.name for s in outputs]
        self._known = frozenset(self._names)
        self._dtypes = [s.dtype.numpy for s in inputs]
        self._output_dtypes = [s.dtype.numpy for s in outputs]

    def last(self) -> Last:
        """For a context that was not bound yet."""
        return Last(Seen(self._taken))

    def prepare(
        self, last: Last, was: Call | None, given: list[Array], outputs: Outputs | None
    ) -> tuple[Call, list[Array], list[Array]]:
        """What follows from the arrays of a call, its inputs as kernels read them, and where its results go. The first
        is `was` again where the context that is bound to that may stay so.

        Raises: InputError for what does not fit.
        """
        theirs = () if outputs is None else self._theirs(outputs)
        if was is not None and theirs and was.compare(*given, *theirs) == SAME:
            return was, given, self._results(was, theirs)
        forms = self._taken.forms
        for form in forms if was is None or was.form is forms[0] else forms[::-1]:
            if last.seen.compare[form](*given, *theirs):
                call = self._learnt(last.seen, was, form, given)
                return call, given, self._results(call, theirs)
        return self._examined(last.seen, was, given, outputs or {}, theirs)

    def made(self, call: Call) -> list[Array]:
        """New arrays for all outputs."""
        if call.shapes is None:
            call.shapes = self._shapes(call.sizes)
        return list(map(empty, call.shapes, self._output_dtypes))

    def solved(self, shapes: Sequence[tuple[int, ...]], rooms: Rooms = PLAIN, seen: Seen | None = None) -> Call:
        """The call of inputs of these shapes. Raises: InputError where a shape does not fit."""
        dims, seen, plain = self.solver.solve(shapes), seen or Seen(self._taken), self._taken.plain
        try:
            seen.tell(dims)
        except KeyError as e:
            raise ShapeError(f"the shapes of the inputs do not tell {e}", where="engine.run") from e
        return self._call(seen, seen.dims(plain) | dict(rooms.dims), plain if rooms == PLAIN else None, shapes)

    def _theirs(self, outputs: Outputs) -> list[Array | None]:
        """The caller's arrays for all outputs; None for those that are to be made."""
        with contextlib.suppress(AttributeError):  # of what is no mapping
            if outputs.keys() <= self._known:
                return [*map(outputs.get, self._names)]
        return refuse_outputs(outputs, self.outputs)

    def _results(self, call: Call, theirs: Sequence[Array | None]) -> list[Array]:
        if not theirs:
            return self.made(call)
        return [
            empty(tuple(call.sizes[at]), dtype) if y is None else y
            for y, at, dtype in zip(theirs, self._taken.output_ranges, self._output_dtypes)
        ]

    def _examined(
        self, seen: Seen, was: Call | None, given: list[Array], outputs: Outputs, theirs: Sequence[Array | None]
    ) -> tuple[Call, list[Array], list[Array]]:
        """As `prepare`, where native code does not know the arrays."""
        rooms = rooms_of(self._families, given, outputs, self.outputs) if outputs else PLAIN
        for i, (a, dtype) in enumerate(zip(given, self._dtypes)):
            if type(a) is not ndarray or a.dtype is not dtype or not (a.flags.c_contiguous or i in rooms.inputs):
                given[i] = checked(self.inputs[i], a)
        if rooms == PLAIN:
            plain = self._taken.plain
            whole = apart(given, [y for y in theirs if isinstance(y, ndarray)]) if outputs else given
            if seen.compare[plain](*whole, *theirs):
                call = self._learnt(seen, was, plain, whole)
                return call, whole, self._results(call, theirs)
        call = self.solved([a.shape for a in given], rooms, seen)
        shapes = self._shapes(call.sizes)
        results = [
            result_for(s.name, shape, dtype, outputs, i in rooms.outputs)
            for i, (s, shape, dtype) in enumerate(zip(self.outputs, shapes, self._output_dtypes, strict=True))
        ]
        mine = {s.name: r for s, r, y in zip(self.outputs, results, theirs) if y is not None}
        refuse_overlaps(mine)
        return call, apart(given, list(mine.values()), rooms.inputs), results

    def _learnt(self, seen: Seen, was: Call | None, form: Form, given: Sequence[Array]) -> Call:
        """The call whose sizes were just learnt, or the one before. Raises: InputError for a size out of its bounds."""
        dims = seen.dims(form)
        if was is not None and was.form is form and was.dims == dims:
            return was
        if any(dims[name] < low or (high is not None and dims[name] > high) for name, low, high in self._taken.bounds):
            self.solver.solve([a.shape for a in given])
        return self._call(seen, dims, form, given)

    def _call(
        self, seen: Seen, dims: dict[str, int], form: Form | None, inputs: Sequence[Array | tuple[int, ...]]
    ) -> Call:
        sizes = seen.output_sizes()
        if min(sizes, default=0) < 0:
            spec, shape = next((s, y) for s, y in zip(self.outputs, self._shapes(sizes)) if min(y, default=0) < 0)
            raise ShapeError(f"of inputs of these sizes, {spec} would be {list(shape)}", where="engine.run")

        def shapes() -> list[tuple[int, ...]]:
            return [*(a if isinstance(a, tuple) else a.shape for a in inputs), *self._shapes(sizes)]

        slices = slices_of(self._batch, dims, shapes, self._arena_bytes, self._n_threads)
        return Call(dims, sizes, slices, form, unlike if form is None else seen.compare[form])

    def _shapes(self, sizes: list[int]) -> list[tuple[int, ...]]:
        return [tuple(sizes[at]) for at in self._taken.output_ranges]
