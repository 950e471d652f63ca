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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from vivace.base.dims import evaluate, symbols
from vivace.base.dtypes import DType
from vivace.base.errors import InputError, ShapeError
from vivace.base.events import Event, warn
from vivace.lower.image import Part
from vivace.providers.provider import LoadOptions, Session, find
from vivace.runtime.arguments import apart, check_outputs, checked, fitting, refuse_inputs, refuse_overlaps, shapes_of
from vivace.runtime.binding import ShapeSolver
from vivace.runtime.buffer import Buffer
from vivace.runtime.engine import NOT_PICKLED, Arrays, Engine, Placement, describe
from vivace.runtime.executable import Chunk
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
        values, mine = self._given(inputs, outputs)
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

    def _given(self, inputs: object, outputs: Mapping[str, np.ndarray] | None) -> tuple[Arrays, Arrays]:
        """The inputs and the caller's arrays for results, checked as far as can be before a run."""
        if not isinstance(inputs, Mapping) or set(inputs) != self._names:
            refuse_inputs(inputs, self.inputs)
        given = {
            s.name: np.asarray(inputs[s.name]) if s.dtype is DType.string else checked(s, inputs[s.name])
            for s in self.inputs
        }
        self._solver.solve([a.shape for a in given.values()])
        if not outputs:
            return given, {}
        check_outputs(outputs, self.outputs)
        mine = {name: np.asarray(y) for name, y in outputs.items()}
        refuse_overlaps(mine)
        return dict(zip(given, apart(list(given.values()), list(mine.values())))), dict(outputs)

    def _arrays(self, k: int, values: Arrays, mine: Arrays) -> tuple[Arrays, Arrays]:
        """What a part reads, and the caller's arrays for what it gives."""
        part = self.parts[k]
        given = {s.name: values[s.name] for s in part.inputs}
        return given, {s.name: mine[s.name] for s in part.outputs if s.name in mine}

    def _run_part(self, k: int, values: Arrays, mine: Arrays) -> Arrays:
        runner, (given, targets) = self._runners[k], self._arrays(k, values, mine)
        if isinstance(runner, Engine):
            return runner.run(given, targets or None)
        return _into(targets, runner.run(given, [s.name for s in self.parts[k].outputs]))

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

    def memory(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Arena sizes of the native parts together, as `Engine.memory`; `n_late_parts` are left out of them, as their
        sizes only show when the model runs. Raises: InputError for shapes that do not fit."""
        dims = self._solver.solve(shapes_of(shapes, self.inputs))
        total = {"arena_bytes": 0, "arena_lower_bound_bytes": 0}
        n_late = 0
        for part, runner in zip(self.parts, self._runners, strict=True):
            if isinstance(runner, Engine):
                if {x.name for s in part.inputs for d in s.shape for x in symbols(d)} - dims.keys():
                    n_late += 1
                    continue
                known = runner.memory({s.name: [evaluate(d, dims) for d in s.shape] for s in part.inputs})
                total = {name: n + known[name] for name, n in total.items()}
        return {**total, "n_late_parts": n_late}

    def dims_of(self, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The value of each symbolic dim of the inputs in a call; see `Engine.dims_of`."""
        return self._solver.solve([inputs[s.name].shape for s in self.inputs])

    def traces(self, inputs: Mapping[str, np.ndarray], n_runs: int = 1) -> list[list[Chunk]]:
        """Inferences one after another, each piece by piece in the order of their starts. `Chunk.step` numbers the
        lines of all images, one after the other; a part of another provider counts as one line.
        """
        run = self.recorder(inputs)
        return [run() for _ in range(n_runs)]

    def recorder(
        self, inputs: Mapping[str, np.ndarray], arena: Buffer | None = None,
        outputs: Mapping[str, np.ndarray] | None = None,
    ) -> Callable[[], list[Chunk]]:  # fmt: skip
        """As `Engine.recorder`. What parts hand to each other is that of a first run."""
        values, mine = self._given(inputs, outputs)
        runs: list[Callable[[], list[Chunk]]] = []
        line = 0
        for k, runner in enumerate(self._runners):
            given, targets = self._arrays(k, values, mine)
            if isinstance(runner, Engine):
                runs.append(partial(_from_line, line, runner.recorder(given, arena, targets)))
            else:
                runs.append(partial(self._timed, k, line, dict(values), mine))
            line += len(runner.image.lines) if isinstance(runner, Engine) else 1
            values |= self._run_part(k, values, mine)
        return lambda: [chunk for run in runs for chunk in run()]

    def _timed(self, k: int, line: int, values: Arrays, mine: Arrays) -> list[Chunk]:
        start = time.perf_counter_ns()
        self._run_part(k, values, mine)
        return [Chunk(line, 0, start, time.perf_counter_ns() - start, 0, 1)]

    def profile(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray] | None = None) -> list[Event]:
        """One inference with the time of each kernel of ours, and of each part of another provider as a whole."""
        values, mine = self._given(inputs, outputs)
        events: list[Event] = []
        for k, runner in enumerate(self._runners):
            given, targets = self._arrays(k, values, mine)
            if isinstance(runner, Engine):
                events += [_of_part(k, event) for event in runner.profile(given, targets)]
            else:
                (c,) = self._timed(k, 0, values, mine)
                name = f"{k}:{self.parts[k].provider}"
                events.append(Event(name, c.start_ns, c.duration_ns, bytes=0, flops=0, thread=0))
            values |= self._run_part(k, values, mine)
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


def _from_line(line: int, run: Callable[[], list[Chunk]]) -> list[Chunk]:
    """The chunks of a part whose first line is numbered `line`."""
    return [replace(chunk, step=chunk.step + line) for chunk in run()]


def _of_part(k: int, e: Event) -> Event:
    return Event(f"{k}/{e.kernel}", e.start_ns, e.duration_ns, bytes=e.bytes, flops=e.flops, thread=e.thread)
