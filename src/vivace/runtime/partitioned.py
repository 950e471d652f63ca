"""An engine whose program runs in parts: native code and other providers in turn (see `graph.cut`).

Rules:
* SIZES: a part learns the sizes of what it reads from the arrays, so a part may decide them when it runs.
* SURPRISE: where a size contradicts what the compiler concluded (that two sizes are equal, or that one is at least 4),
  the whole model runs in the provider of the other parts, with a notice.
* MINE: results belong to the caller; nothing that one run made is seen by another.

Not handled: keeping the memory of values between parts from one run to the next; outputs in one array with the inputs
that they begin with (`rooms`): they are copied.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from vivace.base.dtypes import DType
from vivace.base.errors import InputError, ShapeError
from vivace.base.events import Event, warn
from vivace.lower.image import Part
from vivace.providers.provider import LoadOptions, Session, find
from vivace.runtime.arguments import apart, check_outputs, checked, fitting, refuse_inputs
from vivace.runtime.binding import ShapeSolver
from vivace.runtime.engine import NOT_PICKLED, Arrays, Engine, Placement, describe
from vivace.runtime.saved import Program, save

_SUMMED = ("n_steps", "n_kernels", "n_foreign", "weights_bytes", "code_bytes")


class PartitionedEngine:
    """An engine of several parts, or of one that another provider runs. Made by `vivace.compile` and `vivace.load`.

    `runners` are the parts, loaded.
    """

    def __init__(
        self,
        program: Program,
        runners: Sequence[Engine | Session],
        threads: int,
        portable: Callable[[], bytes],
    ) -> None:
        self.parts, self.inputs, self.outputs = program.parts, program.inputs, program.outputs
        self.placement = tuple(Placement(*p) for p in program.placement)
        self.threads, self.facts = threads, program.facts
        self._runners, self._portable = tuple(runners), portable
        self._solver = ShapeSolver(self.inputs)
        self._names = {s.name for s in self.inputs}
        self._ends = list(_last_uses(self.parts, {s.name for s in self.outputs}))
        self._whole: Session | None = None
        self._loading = threading.Lock()

    # ---- running ----------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray] | None = None) -> Arrays:
        """One inference; `outputs` may give arrays to write results into (right dtype and shape, C-contiguous).

        Raises: InputError for a missing, unknown or ill-fitting input or output.
        """
        values, mine = self._given(inputs), {} if outputs is None else outputs
        check_outputs(mine, self.outputs)
        if mine:
            values = dict(zip(values, apart(list(values.values()), list(map(np.asarray, mine.values())))))
        first = dict(values)
        try:
            for k, ends in enumerate(self._ends):
                values |= self._run_part(k, values, mine)
                for name in ends:
                    del values[name]
        except ShapeError as surprise:
            values = self._run_whole(first, mine, surprise)
        return {s.name: values[s.name] for s in self.outputs}

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...] | np.ndarray:
        """One inference with inputs in the model's order; a single output comes bare."""
        if len(arrays) != len(self.inputs):
            raise InputError(
                f"{len(arrays)} arrays were given", expected=f"{len(self.inputs)}: " + ", ".join(map(str, self.inputs))
            )
        results = tuple(self.run(dict(zip((s.name for s in self.inputs), arrays))).values())
        return results[0] if len(results) == 1 else results

    def __repr__(self) -> str:
        return describe(self.inputs, self.outputs, f"{len(self.parts)} parts, {self.threads} threads")

    def __reduce__(self) -> NoReturn:
        raise TypeError(NOT_PICKLED)

    def _given(self, inputs: object) -> Arrays:
        if not isinstance(inputs, Mapping) or set(inputs) != self._names:
            refuse_inputs(inputs, self.inputs)
        given = {
            s.name: np.asarray(inputs[s.name]) if s.dtype is DType.string else checked(s, inputs[s.name])
            for s in self.inputs
        }
        self._solver.solve([a.shape for a in given.values()])
        return given

    def _run_part(self, k: int, values: Arrays, mine: Mapping[str, np.ndarray]) -> Arrays:
        part, runner = self.parts[k], self._runners[k]
        given = {s.name: values[s.name] for s in part.inputs}
        targets = {s.name: mine[s.name] for s in part.outputs if s.name in mine}
        if isinstance(runner, Engine):
            return runner.run(given, targets or None)
        return _into(targets, runner.run(given, [s.name for s in part.outputs]))

    def _run_whole(self, inputs: Arrays, mine: Mapping[str, np.ndarray], surprise: ShapeError) -> Arrays:
        """Rule SURPRISE."""
        provider = next((p.provider for p in self.parts if p.image is None), None)
        if provider is None or len(self.parts) == 1:
            raise surprise
        with self._loading:
            if self._whole is None:
                warn("engine", f"the model runs as a whole in {provider}, here and where it has to again: {surprise}")
                self._whole = find(provider).load(self._portable(), LoadOptions(threads=self.threads))
        return _into({s.name: mine[s.name] for s in self.outputs if s.name in mine}, self._whole.run(inputs))

    # ---- keeping, looking inside ------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> int:
        """Write the engine to one file (see `vivace.runtime.saved`), atomically; returns its size in bytes."""
        placement = [p.fields for p in self.placement]
        return save(Path(path), Program(self.parts, self.inputs, self.outputs, placement, self.facts), self._portable())

    @property
    def conversions(self) -> list[dict[str, object]]:
        """Those of the native parts; see `Engine.conversions`."""
        return [c for runner in self._runners if isinstance(runner, Engine) for c in runner.conversions]

    @property
    def stats(self) -> dict[str, object]:
        """Counts and sizes of the native parts together, and the compiler's facts."""
        found: dict[str, Any] = {"threads": self.threads, "n_parts": len(self.parts)}
        for runner in self._runners:
            if isinstance(runner, Engine):
                found |= {name: found.get(name, 0) + runner.stats[name] for name in _SUMMED}
        return {**found, "conversions": self.conversions, **self.facts}

    @property
    def appended(self) -> dict[str, str]:
        """The outputs that may lie in one array with an input: none."""
        return {}

    def profile(self, inputs: Mapping[str, np.ndarray]) -> list[Event]:
        """One inference with the time of each kernel of ours, and of each part of another provider as a whole."""
        values: Arrays = self._given(inputs)
        events: list[Event] = []
        for k, runner in enumerate(self._runners):
            given = {s.name: values[s.name] for s in self.parts[k].inputs}
            if isinstance(runner, Engine):
                events += [_of_part(k, event) for event in runner.profile(given)]
            start = time.perf_counter_ns()
            values |= self._run_part(k, values, {})
            if not isinstance(runner, Engine):
                duration = time.perf_counter_ns() - start
                events.append(Event(f"{k}:{self.parts[k].provider}", start, duration, bytes=0, flops=0, thread=0))
        return events


def load_part(part: Part, threads: int, portable: Callable[[], bytes], spin: bool) -> Session:
    """A part that another provider runs, loaded."""
    return find(part.provider).load(part.model or portable(), LoadOptions(threads=threads, spin=spin))


def _into(targets: Mapping[str, np.ndarray], results: Mapping[str, np.ndarray]) -> Arrays:
    """The results, those that the caller has arrays for in them."""
    found = dict(results)
    for name, array in targets.items():
        fitting(name, array, found[name].shape, found[name].dtype)[...] = found[name]
        found[name] = array
    return found


def _last_uses(parts: Sequence[Part], kept: set[str]) -> Iterator[list[str]]:
    """For each part the names of values that nobody reads after it."""
    for k, part in enumerate(parts):
        later = {s.name for p in parts[k + 1 :] for s in p.inputs} | kept
        yield sorted({s.name for s in (*part.inputs, *part.outputs)} - later)


def _of_part(k: int, e: Event) -> Event:
    return Event(f"{k}/{e.kernel}", e.start_ns, e.duration_ns, bytes=e.bytes, flops=e.flops, thread=e.thread)
