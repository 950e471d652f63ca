"""Choice by measurement: which candidates are tried at each site, and which are kept.

    profile    the model as it is; sites that take too little of its time stay as they are
    search     in each turn the model runs in several versions, in every one of which every site is made in a way of its
               own; a site goes on from its best way so far (`candidates.neighbours`)
    confirm    the best of all sites together against the default, measured anew: what is not faster goes back

Rules:
* IN PLACE: a site is timed inside of runs of the whole model, with the caches as its neighbours leave them.
* BEYOND NOISE: a choice is kept where it is faster by `MARGIN` and in most of the rounds, twice: in the search, and
  when it is confirmed. If the whole model is then not faster, nothing is kept.
* QUIET: times are compared by their lower quartiles, since a neighbour on the core only ever adds.
* RESUMED: what a turn found is in the timing cache before the next begins. A site of which nothing was measured, as the
  budget ended before, is not decided: the next search takes it up.

Pure: measuring, the clock and the cache are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from vivace.base.dims import Dim, prod
from vivace.loops.contraction import Depthwise
from vivace.lower.choices import BLOCKS, DEFAULT, Choice, Site
from vivace.lower.timings import TimingCache

Assignment = Mapping[str, Choice]  # by key of a site; the others are made by default
Run = Mapping[str, float]  # nanoseconds of each site in one run of the model, and under WHOLE of all of it

# The runs of each version, at least so many; of the first versions only where there is no time to build the others, by
# the same clock that the search has.
Measure = Callable[[Sequence[Assignment], int, float], Sequence[Sequence[Run]]]

WHOLE = ""
MARGIN = 0.02  # of a site's time; below it two equal kernels differ at times
WINS = 0.7  # of the rounds
LEAST_SHARE = 0.004  # of the model's time: what a site must take to be worth looking at
VERSIONS = 4  # of the model in a turn, besides the best so far
TURNS = {"fast": 2, "full": 25}
SEARCH_ROUNDS, CONFIRM_ROUNDS = 7, 21
CONFIRMATIONS = 3  # each leaves out what did not hold; the last counts for the whole only
_LEFT_TO_CONFIRM = 0.25  # of the budget


@dataclass(frozen=True, slots=True)
class Change:
    """A site that is made otherwise than by default, and its time over the default's."""

    what: str
    choice: Choice
    ratio: float


@dataclass(slots=True)
class Result:
    """The choices that are kept; `whole` is the model's time with them over the time without."""

    choices: dict[str, Choice] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    whole: float = 1.0
    n_sites: int = 0
    n_measured: int = 0
    is_complete: bool = True


class Tuning:
    """One search over the sites of a model. `neighbours` gives ways to make a site from one way, best guess first."""

    def __init__(
        self, sites: Sequence[Site], neighbours: Callable[[Site, Choice], Sequence[Choice]], measure: Measure,
        cache: TimingCache, effort: str, budget_ns: float, clock: Callable[[], float],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        self.sites = {s.key: s for s in sites}
        self.neighbours, self.measure, self.cache, self.effort = neighbours, measure, cache, effort
        self.clock, self.progress = clock, progress or (lambda done, total: None)
        self.started = clock()
        self.budget_ns = budget_ns
        self.best: dict[str, Choice] = {}
        self.ratio: dict[str, float] = {}
        self.ns: dict[str, float] = {}
        self.tried: dict[str, set[Choice]] = {}
        self.result = Result(n_sites=len(self.sites))

    def run(self) -> Result:
        """The whole search."""
        (runs,) = self.measure([{}], SEARCH_ROUNDS, inf)
        self.ns = {key: _quiet([r.get(key, 0.0) for r in runs]) for key in (*self.sites, WHOLE)}
        least = LEAST_SHARE * self.ns[WHOLE]
        active = sorted((k for k in self.sites if self.ns[k] >= least), key=lambda k: -self.ns[k])
        for key in active:
            known = self.cache.tried(key)
            self.tried[key] = {DEFAULT, *known}
            best = min(known, key=lambda c: known[c], default=DEFAULT)
            good = best is not DEFAULT and known[best] < 1 - MARGIN
            self.best[key], self.ratio[key] = (best, known[best]) if good else (DEFAULT, 1.0)
        self._search(active)
        self._confirm()
        self._decide()
        return self.result

    def _search(self, active: Sequence[str]) -> None:
        turns = TURNS[self.effort]
        longest = 0.0
        for turn in range(turns):
            self.progress(turn, turns)
            begun, until = self.clock(), self.started + self.budget_ns * (1 - _LEFT_TO_CONFIRM)
            if begun + longest > until:
                self.result.is_complete = False
                return
            versions = self._versions(active)
            if not versions:
                return
            self._learn(versions, self.measure([dict(self.best), *versions], SEARCH_ROUNDS, until))
            longest = max(longest, (self.clock() - begun) / 2)  # a later turn may have to do with fewer versions

    def _versions(self, active: Sequence[str]) -> list[dict[str, Choice]]:
        """Versions of the model, each with a way of its own at every site that has one left to try."""
        versions: list[dict[str, Choice]] = []
        for key in active:
            fresh = [c for c in self.neighbours(self.sites[key], self.best[key]) if c not in self.tried[key]]
            for i, choice in enumerate(fresh[:VERSIONS]):
                if i == len(versions):
                    versions.append({})
                versions[i][key] = choice
        return [{**self.best, **v} for v in versions]

    def _learn(self, versions: Sequence[Assignment], runs: Sequence[Sequence[Run]]) -> None:
        """Takes over what a turn found. The first runs are those of the best so far."""
        reference, *others = runs
        before, ratio_before = dict(self.best), dict(self.ratio)
        lines = []
        for version, found in zip(versions, others):
            for key, choice in version.items():
                if choice == before[key]:
                    continue
                ratio, wins = _compare(found, reference, key)
                is_faster = ratio < 1 - MARGIN and wins >= WINS
                ratio *= ratio_before[key]
                self.tried[key].add(choice)
                self.result.n_measured += 1
                lines.append(self.cache.timing(key, what(self.sites[key]), choice, ratio, self.ns[key] * ratio))
                if is_faster and ratio < self.ratio[key]:
                    self.best[key], self.ratio[key] = choice, ratio
        self.cache.add(lines)

    def _confirm(self) -> None:
        """Keeps what is faster again, and all of it only if the model is."""
        chosen = {k: c for k, c in self.best.items() if c != DEFAULT}
        for attempt in range(CONFIRMATIONS):
            if not chosen:
                return
            plain, tuned = self.measure([{}, chosen], CONFIRM_ROUNDS, inf)
            held = {}
            for key, choice in chosen.items():
                self.ratio[key], wins = _compare(tuned, plain, key)
                if self.ratio[key] < 1 - MARGIN and wins >= WINS:
                    held[key] = choice
            if held == chosen or attempt == CONFIRMATIONS - 1:
                whole, wins = _compare(tuned, plain, WHOLE)
                if whole < 1 and wins >= WINS:
                    self.result.choices, self.result.whole = chosen, whole
                return
            chosen = held

    def _decide(self) -> None:
        decided = self.effort if self.result.is_complete else "fast"  # so that a cut search goes on when asked again
        lines = []
        for key, site in self.sites.items():
            if not self.result.is_complete and self.tried.get(key) == {DEFAULT}:
                continue
            choice = self.result.choices.get(key, DEFAULT)
            ratio = self.ratio[key] if choice != DEFAULT else 1.0
            lines.append(self.cache.timing(key, what(site), choice, ratio, self.ns[key] * ratio, decided))
            if choice != DEFAULT:
                self.result.changes.append(Change(what(site), choice, ratio))
        self.cache.add(lines)


def _quiet(times: Sequence[float]) -> float:
    """The lower quartile."""
    return sorted(times)[(len(times) - 1) // 4] if times else 0.0


def _compare(runs: Sequence[Run], reference: Sequence[Run], key: str) -> tuple[float, float]:
    """A site's time over the reference's, and in what share of the rounds it was faster."""
    ours, theirs = [r.get(key, 0.0) for r in runs], [r.get(key, 0.0) for r in reference]
    n_wins = sum(a < b for a, b in zip(ours, theirs, strict=True))
    return _quiet(ours) / max(_quiet(theirs), 1e-9), n_wins / max(1, len(ours))


def what(site: Site) -> str:
    """A site in words: rows x depth x columns."""
    c = site.spec

    def size(d: Dim) -> str:
        return str(d).replace(" ", "")

    rows, taps = (prod([x.extent for x in axes]) for axes in (c.rows, c.taps))
    if isinstance(c, Depthwise):
        return f"depthwise {c.a.dtype} {size(rows)}x{size(taps)}x{size(c.channels)}"
    batch = "".join(f"{size(b.extent)}x" for b in c.batch)
    kind = "attention" if site.ways == (BLOCKS,) else "conv" if len(c.taps) > 1 else "matmul"
    return f"{kind} {c.a.dtype} {batch}{size(rows)}x{size(taps)}x{size(c.n)}"
