"""Times several engines on one model in one process, side by side, so that a disturbance hits all of them alike.

    result = bench([contestant, ...], inputs, Settings(budget_seconds=10))

Rules:
* TURNS: a round gives every engine one turn, in an order that changes; a turn is calls that are not counted, and
  counted ones. The uncounted calls bring the engine's data back into the caches: what is timed is the steady state of
  each.
* IDLE: a turn begins when no thread of the process works any more. After a run ONNX Runtime's threads spin for 45 ms,
  OpenMP's for 20: who came next would lose a core to them (PP-OCR's recogniser at 2 threads 6.8 ms, right after ONNX
  Runtime 10.8).
* EQUAL: all engines have the same inputs and as many threads; each returns arrays that belong to the caller.
* CHECKED: outputs are compared with the reference's before anything is timed; an engine that differs is timed and
  marked, never silently ranked.
* HONEST: an interval that the sample cannot support is None (see `statistics`), and the noise of the machine is part of
  the result.

Not handled: energy; several requests at once.
"""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vivace.base.errors import InputError, VivaceError
from vivace.measure.compare import Difference, Tolerance, compare
from vivace.measure.noise import Noise, noise_since, snapshot
from vivace.measure.statistics import Estimate, percentile, ratio_of_medians, variation
from vivace.providers.provider import Arrays

_LOOK_SECONDS, _MOST_LOOKS = 0.002, 250
_TASKS = Path("/proc/self/task")
_CHECK_EVERY = 5  # rounds between looks at the interval of the ratio
_TAIL_FRACTIONS = (0.5, 0.9, 0.99)

Runner = Callable[[Arrays], Mapping[str, np.ndarray]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Contestant:
    """An engine that is yet to load the model: `load` returns a function that runs it, and is timed."""

    name: str
    version: str
    load: Callable[[], Runner]


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and how closely to measure.

    Measuring ends with the budget, or earlier once every ratio is known to `half_width` (relative); never before
    `least_rounds`. `turn_seconds` is the aim for the counted calls of one turn.
    """

    budget_seconds: float = 10.0
    half_width: float = 0.0
    least_rounds: int = 8
    turn_seconds: float = 0.03
    least_calls: int = 2
    most_calls: int = 200
    seed: int = 0


@dataclass(frozen=True, slots=True)
class EngineTimes:
    """What was measured of one engine; times in seconds, `calls` per round by round.

    `ratio` is the first engine's median over this one's: below 1, the first is faster. `failure` says why an engine
    could not be measured at all.
    """

    name: str
    version: str
    load_seconds: float = math.nan
    first_run_seconds: float = math.nan
    calls: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    percentiles: tuple[tuple[float, Estimate], ...] = ()
    ratio: Estimate | None = None
    variation: float = math.nan
    differences: tuple[Difference, ...] = ()
    failure: str = ""

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.calls)) if self.calls.size else math.nan

    @property
    def least(self) -> float:
        """Seconds of the fastest call."""
        return float(np.min(self.calls)) if self.calls.size else math.nan

    @property
    def agrees(self) -> bool | None:
        """Whether all outputs equal the reference's within the tolerance; None where there is no reference."""
        return all(difference.agrees for difference in self.differences) if self.differences else None


@dataclass(frozen=True, slots=True)
class Bench:
    """The times of all engines, and the noise while they were taken."""

    engines: tuple[EngineTimes, ...]
    tolerance: Tolerance
    reference: str
    n_rounds: int
    seconds: float
    noise: Noise


@dataclass(slots=True)
class _Entry:
    """A loaded engine while it is measured."""

    contestant: Contestant
    run: Runner
    load_seconds: float
    first_run_seconds: float
    differences: tuple[Difference, ...]
    n_calls: int = 1
    rounds: list[list[int]] = field(default_factory=list)


def bench(
    contestants: Sequence[Contestant],
    inputs: Arrays,
    settings: Settings | None = None,
    *,
    reference: Mapping[str, np.ndarray] | None = None,
    reference_name: str = "",
    tolerance: Tolerance | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Loads, checks and times the engines; ratios are against the first.

    Raises: InputError for no contestant. An engine that fails is reported, not raised.
    """
    if not contestants:
        raise InputError("no engine to measure", expected="at least one")
    settings, tolerance = settings or Settings(), tolerance or Tolerance()
    entries: dict[str, _Entry] = {}
    failures: dict[str, str] = {}
    for i, contestant in enumerate(contestants):
        if progress:
            progress(f"loading {contestant.name}", i, len(contestants))
        try:
            entries[contestant.name] = _load(contestant, inputs, reference, tolerance)
        except VivaceError as error:
            failures[contestant.name] = str(error)
        except Exception as error:  # a fault inside one engine must not hide what the others do
            failures[contestant.name] = f"{type(error).__name__}: {error}"
    start, began = snapshot(), time.monotonic()
    n_rounds = _measure(list(entries.values()), inputs, settings, progress) if entries else 0
    return Bench(
        _results(contestants, entries, failures),
        tolerance,
        reference_name,
        n_rounds,
        time.monotonic() - began,
        noise_since(start),
    )


def _load(
    contestant: Contestant, inputs: Arrays, reference: Mapping[str, np.ndarray] | None, tolerance: Tolerance
) -> _Entry:
    start = time.perf_counter()
    run = contestant.load()
    loaded = time.perf_counter()
    outputs = run(inputs)
    ended = time.perf_counter()
    differences = compare(outputs, reference, tolerance) if reference is not None else ()
    return _Entry(contestant, run, loaded - start, ended - loaded, differences)


def _measure(entries: Sequence[_Entry], inputs: Arrays, settings: Settings, progress: Progress | None) -> int:
    """Fills the entries' rounds and returns how many there were (TURNS)."""
    for entry in entries:
        estimate_s = min(_turn(entry.run, inputs, 3)) / 1e9
        wanted = math.ceil(settings.turn_seconds / max(estimate_s, 1e-7))
        entry.n_calls = min(max(wanted, settings.least_calls), settings.most_calls)
    order = np.random.default_rng(settings.seed)
    began = time.monotonic()
    n_rounds = 0
    while True:
        elapsed = time.monotonic() - began
        if n_rounds >= settings.least_rounds and elapsed >= settings.budget_seconds:
            return n_rounds
        if progress:
            progress("measuring", min(round(elapsed * 10), round(settings.budget_seconds * 10)),
                     round(settings.budget_seconds * 10))  # fmt: skip
        for i in order.permutation(len(entries)):
            entries[i].rounds.append(_turn(entries[i].run, inputs, entries[i].n_calls))
        n_rounds += 1
        if settings.half_width and n_rounds >= settings.least_rounds and n_rounds % _CHECK_EVERY == 0:
            if _is_close(entries, settings.half_width):
                return n_rounds


def wait_until_idle() -> None:
    """Returns when no other thread of this process works any more (IDLE), or after half a second."""
    for _ in range(_MOST_LOOKS):
        time.sleep(_LOOK_SECONDS)
        if not any(map(_is_running, _TASKS.iterdir())):
            return


def _is_running(task: Path) -> bool:
    """Whether a thread runs or could run, and is not the one that asks."""
    try:
        state = (task / "stat").read_text().rpartition(")")[2].split()[0]  # the name before it may hold anything
    except OSError:  # it has ended
        return False
    return state == "R" and task.name != str(threading.get_native_id())


def _turn(run: Runner, inputs: Arrays, n_calls: int) -> list[int]:
    """Nanoseconds of each counted call."""
    wait_until_idle()
    clock = time.perf_counter_ns
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(1 + n_calls // 8):
            run(inputs)
        times = []
        for _ in range(n_calls):
            start = clock()
            run(inputs)
            times.append(clock() - start)
    finally:
        if was_enabled:
            gc.enable()
    return times


def _is_close(entries: Sequence[_Entry], half_width: float) -> bool:
    first = np.array(entries[0].rounds)
    for entry in entries[1:]:
        found = ratio_of_medians(first, np.array(entry.rounds), n_resamples=200).half_width
        if found is None or found > half_width:
            return False
    return True


def _results(
    contestants: Sequence[Contestant], entries: Mapping[str, _Entry], failures: Mapping[str, str]
) -> tuple[EngineTimes, ...]:
    first = entries.get(contestants[0].name)
    base = np.array(first.rounds, float) / 1e9 if first else None
    results = []
    for contestant in contestants:
        entry = entries.get(contestant.name)
        if entry is None:
            results.append(EngineTimes(contestant.name, contestant.version, failure=failures[contestant.name]))
            continue
        calls = np.array(entry.rounds, float) / 1e9
        is_first = contestant is contestants[0]
        results.append(
            EngineTimes(
                contestant.name,
                contestant.version,
                entry.load_seconds,
                entry.first_run_seconds,
                calls,
                tuple((fraction, percentile(calls.ravel(), fraction)) for fraction in _TAIL_FRACTIONS),
                None if is_first or base is None else ratio_of_medians(base, calls),
                variation(calls.ravel()),
                entry.differences,
            )
        )
    return tuple(results)
