"""Tuning a model on this machine: its versions are built and run here, `lower/tune.py` says which.

Rules:
* IN TURN: the versions of a turn run one after the other, round after round, in a changing order, so that a change of
  the machine's speed meets all of them.
* ONE ARENA: versions share their activations' memory and the weights that they pack alike. Each finds the caches as a
  second run of one engine would, and none gains or loses by where its memory happens to lie.
* AS IN A RUN: kernels are timed by the records of the runtime, with as many threads as the engine has. The pieces of a
  step are laid out anew, each on the thread that is free first, so that an uneven cut counts and a thread that others
  kept waiting does not; a piece that took three times as long as its like was interrupted, and counts as they do.

Inputs are generated. Where shapes are symbolic the choices are those for the sizes that `vivace bench` would take.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from vivace.base.errors import InputError, VivaceError
from vivace.base.events import warn
from vivace.base.knobs import knobs
from vivace.base.machine import Isa, host
from vivace.base.specs import TensorSpec
from vivace.lower.choices import Choice, Choices, Site
from vivace.lower.plan import steps_of
from vivace.lower.schedule import schedule
from vivace.lower.timings import EFFORTS, TimingCache, own_file, refuse_other_file
from vivace.lower.tune import WHOLE, Result, Run, Tuning

if TYPE_CHECKING:
    import numpy as np

    from vivace.graph.graph import Graph
    from vivace.lower.candidates import Rates
    from vivace.lower.image import Image
    from vivace.lower.plan import Plan
    from vivace.runtime.engine import Engine
    from vivace.runtime.executable import Chunk

BUDGETS = {"fast": 12.0, "full": 300.0}  # seconds, with what building the versions takes
_ROUND_SECONDS = 0.25  # of a turn's rounds there are more where the model is small
_MOST_ROUNDS = 40
_INTERRUPTED = 3.0
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Tune:
    """What the user asked for. `file` is a timing cache besides the machine's own; `keeps` whether that is used. With
    the effort `off` nothing is measured, and the file's choices are taken.
    """

    effort: str = "off"
    budget_seconds: float | None = None
    file: Path | None = None
    keeps: bool = True


@dataclass(frozen=True, slots=True)
class Workshop:
    """How versions of a model are made: `plan` lowers, `link` generates and links, `engine` makes them ready."""

    graph: Graph
    isa: Isa
    threads: int
    plan: Callable[[Choices], Plan]
    link: Callable[[Plan, Choices], Image]
    engine: Callable[[Image], Engine]


def tune_of(effort: str, budget: float | None, file: str | Path | None, keeps: bool) -> Tune | None:
    """The order, None where nothing is asked for. Raises: InputError for an unknown effort, a budget below 0 or without
    tuning, and for a file to take choices from that is not there.
    """
    if effort not in EFFORTS:
        raise InputError(f"unknown effort of tuning {effort!r}", where="tune", expected=", ".join(EFFORTS))
    if budget is not None and not budget >= 0:
        raise InputError(f"a budget of {budget} s", where="tune_budget", expected="0 or more")
    path = None if file is None else Path(file)
    if path is not None:
        refuse_other_file(path)
    if effort != "off":
        return Tune(effort, budget, path, keeps)
    if budget is not None:
        raise InputError("a budget has no effect without tuning", where="tune_budget", expected="tune='fast' or 'full'")
    if path is not None and not path.is_file():
        raise InputError("no such file", where=str(path), expected="a timing cache", hint="tune='fast' makes it")
    return None if path is None else Tune(effort, file=path, keeps=False)


def tuned(shop: Workshop, wanted: Tune, progress: Progress | None) -> tuple[Plan, Choices, dict[str, object]]:
    """The plan that measuring says is fastest, the choices that it is made with, and facts for people."""
    cache = timing_cache(wanted, shop.isa, shop.threads)
    base = cache.choices(sizes_text(shop.graph)[1], wanted.effort)
    plan = shop.plan(base)
    choices, facts = tune(shop, wanted, base, plan, cache, progress)
    # What a cut search had measured may be confirmed without measuring more. Choices for sites of other models, which
    # `base` has too, do not matter.
    is_base = choices.by_key.items() <= base.by_key.items()
    return (plan if is_base else shop.plan(choices)), choices, facts


def timing_cache(wanted: Tune, isa: Isa, threads: int) -> TimingCache:
    """The file that was asked for, then the machine's own."""
    own = own_file() if wanted.keeps and knobs.cache_bytes else None
    return TimingCache(wanted.file, own, host().fingerprint(), isa.name, threads)


def sizes_text(graph: Graph) -> tuple[dict[str, tuple[int, ...]], str]:
    """Shapes of the inputs to tune for, and the symbolic sizes among them in words."""
    from vivace.graph.sizes import inner_demands
    from vivace.measure.inputs import choose_shapes

    specs = [TensorSpec(v.name, v.dtype, v.shape) for v in graph.inputs]
    shapes, sizes = choose_shapes(specs, {}, tuple(inner_demands(graph)))
    return shapes, ",".join(f"{k}={v}" for k, v in sorted(sizes.items()))


def tune(
    shop: Workshop, wanted: Tune, base: Choices, plan: Plan, cache: TimingCache, progress: Progress | None
) -> tuple[Choices, dict[str, object]]:
    """Choices for all sites of a plan that was made with `base`, and facts for people. What the cache knows is not
    measured again."""
    started = time.perf_counter()
    decided = cache.decided(wanted.effort)
    sites = {s.site.key: s.site for s in steps_of(plan.body) if s.site is not None}
    fresh = [] if wanted.effort == "off" else [s for s in sites.values() if s.key not in decided]
    if wanted.effort == "off" and not cache.timings:
        warn("tuning", f"{wanted.file} has nothing for this machine, instruction set, thread count and version")
    kept = {k: c for k, c in base.by_key.items() if k in sites}
    facts: dict[str, object] = {"effort": wanted.effort, "n_sites": len(sites), "n_measured": 0}
    if fresh:
        kept = {k: c for k, c in kept.items() if k in decided}
        try:
            result = _search(shop, wanted, kept, fresh, base.at, cache, progress)
        except VivaceError as e:  # of inputs that cannot be generated, of a model that does not run on them
            warn("tuning", f"not tuned: {e}")
            result = Result()
        kept |= result.choices
        facts |= {"n_measured": result.n_measured, "is_complete": result.is_complete, "whole_ratio": result.whole}
    facts["seconds"] = round(time.perf_counter() - started, 3)
    facts["n_changed"] = sum(c != Choice() for c in kept.values())
    known = {t.site: t for t in cache.timings.values() if t.decided}
    facts["changes"] = [
        {"site": known[k].what, "choice": str(c), "ratio": round(known[k].ratio, 3)}
        for k, c in kept.items()
        if k in known and c != Choice()
    ]
    return Choices(kept, base.at), facts


def _search(
    shop: Workshop, wanted: Tune, kept: Mapping[str, Choice], fresh: Sequence[Site], at: str, cache: TimingCache,
    progress: Progress | None,
) -> Result:  # fmt: skip
    from vivace.lower.candidates import neighbours
    from vivace.measure.inputs import generate

    rates = _rates(shop.threads)  # of a machine that nobody measured yet they take longer than a budget, once
    started = time.perf_counter()
    shapes, _ = sizes_text(shop.graph)
    inputs = generate([TensorSpec(v.name, v.dtype, v.shape) for v in shop.graph.inputs], shapes)
    bench = _Bench(shop, kept, at, inputs)
    budget = BUDGETS[wanted.effort] if wanted.budget_seconds is None else wanted.budget_seconds
    left_ns = 1e9 * max(0.0, budget - (time.perf_counter() - started))
    tell = (lambda done, total: progress("tune", done, total)) if progress else None
    search = Tuning(
        fresh, lambda site, now: neighbours(site, now, shop.isa, rates), bench.measure, cache, wanted.effort, left_ns,
        clock_ns, tell,
    )  # fmt: skip
    return search.run()


def _rates(threads: int) -> Rates:
    from vivace.lower.candidates import rates_of
    from vivace.measure.peaks import machine_peaks

    peaks = machine_peaks()
    kinds = {p.of for p in peaks.peaks if p.what == "arithmetic"}
    operations = {k: peaks.operations(k, threads) for k in kinds}
    beyond = "L3" if any(name == "L3" for name, _ in peaks.levels) else "memory"
    return rates_of(operations, [peaks.read_bandwidth(level, threads) for level in ("L2", beyond)], threads)


@dataclass(slots=True)
class _Version:
    """A version of the model that is ready to run, with the site of each line and whether one thread runs it."""

    engine: Engine
    sites: list[str]
    serial: list[bool]


class _Bench:
    """Builds versions and times them. What versions have in common is made once."""

    def __init__(self, shop: Workshop, kept: Mapping[str, Choice], at: str, inputs: Mapping[str, np.ndarray]) -> None:
        self.shop, self.kept, self.at, self.inputs = shop, dict(kept), at, inputs
        self.order = random.Random(0)
        self.plain: _Version | None = None

    def measure(
        self, assignments: Sequence[Mapping[str, Choice]], n_rounds: int, until_ns: float = math.inf
    ) -> list[list[Run]]:
        """The runs of each version."""
        from vivace.runtime.buffer import Buffer

        versions: list[_Version] = []
        for assignment in assignments:
            if len(versions) < 2 or clock_ns() < until_ns:
                versions.append(self._build(assignment))
        shapes = {name: a.shape for name, a in self.inputs.items()}
        arena = Buffer(max(v.engine.memory(shapes)["arena_bytes"] for v in versions))  # rule ONE ARENA
        runs = [v.engine.recorder(self.inputs, arena) for v in versions]
        found: list[list[Run]] = [[] for _ in versions]
        started = time.perf_counter()
        while len(found[0]) < n_rounds or (
            len(found[0]) < _MOST_ROUNDS and time.perf_counter() - started < _ROUND_SECONDS * len(versions)
        ):
            for i in self.order.sample(range(len(versions)), len(versions)):  # rule IN TURN
                found[i].append(site_times(runs[i](), versions[i].sites, versions[i].serial))
        return found

    def _build(self, assignment: Mapping[str, Choice]) -> _Version:
        changed = {k: c for k, c in assignment.items() if c != Choice()}
        if self.plain is not None and not changed:
            return self.plain
        choices = Choices({**self.kept, **changed}, self.at)
        plan = self.shop.plan(choices)
        lines = schedule(plan).lines
        version = _Version(
            self.shop.engine(self.shop.link(plan, choices)),
            [line.step.site.key if line.step is not None and line.step.site is not None else "" for line in lines],
            [line.serial for line in lines],
        )
        if not changed:
            self.plain = version
        return version


def clock_ns() -> float:
    """Nanoseconds of a clock that only grows."""
    return time.perf_counter() * 1e9


def site_times(chunks: Sequence[Chunk], sites: Sequence[str], serial: Sequence[bool]) -> Run:
    """Rule AS IN A RUN. `sites` and `serial` are by line."""
    by_line: dict[int, list[Chunk]] = {}
    for c in sorted(chunks, key=lambda c: c.start_ns):
        by_line.setdefault(c.step, []).append(c)
    threads = 1 + max((c.thread for c in chunks), default=0)
    times: dict[str, float] = {WHOLE: 0.0}
    for line, pieces in by_line.items():
        per_unit = [c.duration_ns / max(1, c.end - c.begin) for c in pieces]
        usual = median(per_unit)
        ends = [0.0] * (1 if serial[line] else threads)
        for c, ns in zip(pieces, per_unit, strict=True):
            ends[ends.index(min(ends))] += (ns if ns <= _INTERRUPTED * usual else usual) * max(1, c.end - c.begin)
        times[WHOLE] += max(ends)
        if sites[line]:
            times[sites[line]] = times.get(sites[line], 0.0) + max(ends)
    return times
