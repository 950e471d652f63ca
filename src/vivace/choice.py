"""`providers="auto"`: every installed provider runs the model, and parts of it, on this machine; the fastest stays.

    whole     each provider runs the model, side by side on the same inputs
    pieces    the model is cut where few bytes cross into pieces that take us equal times; each provider runs each piece
    mixed     the best choice for each piece, where changes of provider cost what was measured, is built and runs beside
              the best whole: it stays only where it wins (rule MARGIN)

Rules:
* MARGIN: another choice than the simplest (our engine; then one provider) must win by more than noise.
* SAME: whoever gives other answers than ours, beyond the tolerance of `vivace bench`, is refused.
* ONCE: the choice is kept in the cache, by the graph with its weights, the machine and the versions; a second compile
  measures nothing, unless it was told to leave the cache alone.

Not handled: choosing anew when other sizes come than those that were measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise, product
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vivace.base.cache import default_cache
from vivace.base.dims import evaluate
from vivace.base.errors import ModelError, UnsupportedError, VivaceError
from vivace.base.machine import host
from vivace.base.specs import TensorSpec
from vivace.graph.cut import graphs_of, with_own_names
from vivace.graph.graph import Graph, Node
from vivace.graph.sizes import inner_demands
from vivace.graph.text import constants_of, print_graph
from vivace.measure.bench import Contestant, Runner, Settings, bench
from vivace.measure.compare import Tolerance
from vivace.measure.inputs import choose_shapes, generate
from vivace.providers.provider import KNOWN, availability

if TYPE_CHECKING:
    from vivace.runtime.engine import Engine
    from vivace.runtime.partitioned import PartitionedEngine

    Compiled = Engine | PartitionedEngine

MARGIN = 0.97  # of a time
N_PIECES = 5
LEAST_SECONDS = 2e-4  # a model that takes less is not cut: one more part costs 10 us, a call and its arrays
NATIVE, MIXED = "native", "parts"
_SETTINGS = Settings(budget_seconds=2.0, least_rounds=5, turn_seconds=0.02)
_FINAL = replace(_SETTINGS, budget_seconds=4.0, least_rounds=12)
Arrays = Mapping[str, np.ndarray]


class EngineMaker(Protocol):
    """What the choice needs of the compiler: engines of one model."""

    @property
    def key(self) -> str:
        """What times depend on besides the graph, the machine and the versions of providers."""
        ...

    @property
    def tolerance(self) -> Tolerance:
        """How near answers must be to ours."""
        ...

    def portable_graph(self) -> Graph:
        """The graph that every provider can run."""
        ...

    def native(self) -> Compiled: ...

    def whole(self, provider: str, reason: str) -> Compiled: ...

    def pieces(self, graph: Graph, whose: Mapping[Node, str], reasons: Mapping[Node, str]) -> Compiled: ...


@dataclass(frozen=True, slots=True)
class Partition:
    """What was chosen, and the times that decided, in milliseconds.

    `name` is a provider, or `parts`: then `runs` says of each piece of the graph, in the order of its nodes, who runs
    it and how many nodes it has, and `pieces` what each provider takes for it.
    """

    name: str
    times: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    runs: tuple[tuple[str, int], ...] = ()
    pieces: tuple[dict[str, float], ...] = ()

    @property
    def reason(self) -> str:
        return _reason(self.times)


def _reason(times: Mapping[str, float]) -> str:
    return "measured: " + ", ".join(f"{name} {t:.3g} ms" for name, t in sorted(times.items(), key=lambda x: x[1]))


def fastest(job: EngineMaker, shapes: Mapping[str, Sequence[int]] | None, remembers: bool = True) -> Compiled:
    """The engine of the fastest choice. Its `stats` have the times (`auto_ms`) and who was refused (`auto_refused`).

    `remembers`: whether a choice is kept, and one that was kept is taken.
    """
    try:
        graph = with_own_names(job.portable_graph())
    except (ModelError, UnsupportedError) as e:
        return job.whole("onnxruntime", f"vivace cannot import the model: {e}")
    cache = default_cache() if remembers else None
    key = _key(job, graph, shapes) if cache else ""
    found = cache.get("choice", key) if cache else None
    if found is not None:
        try:
            data = json.loads(found)
            runs = tuple((provider, n) for provider, n in data.pop("runs"))
            return _engine(job, graph, Partition(**{**data, "runs": runs, "pieces": tuple(data["pieces"])}))
        except (VivaceError, TypeError, KeyError, ValueError):
            pass  # a provider that is gone, or an entry of another version
    choice = choose(job, graph, shapes)
    if cache:
        cache.put("choice", key, json.dumps(asdict(choice)).encode())
    return _engine(job, graph, choice)


def _key(job: EngineMaker, graph: Graph, shapes: Mapping[str, Sequence[int]] | None) -> str:
    machine = host()
    versions = [(name, availability(name).version) for name in KNOWN if availability(name).is_available]
    facts = (1, job.key, versions, machine.model, machine.n_cores, sorted((shapes or {}).items()), _digest(graph))
    return repr(facts) + print_graph(graph)


def _digest(graph: Graph) -> str:
    """Of the constants that the text leaves out: answers, which may refuse a provider, depend on them."""
    digest = hashlib.sha256()
    for name, data in constants_of(graph).items():
        digest.update(name.encode())
        is_text = data.dtype == object
        raw = np.frombuffer(repr(data.tolist()).encode(), np.uint8) if is_text else np.ascontiguousarray(data)
        digest.update(raw.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _engine(job: EngineMaker, graph: Graph, choice: Partition) -> Compiled:
    if choice.name == MIXED:
        whose, reasons = dict[Node, str](), dict[Node, str]()
        nodes = iter(graph.nodes)
        for (provider, n), times in zip(choice.runs, choice.pieces, strict=True):
            taken = [next(nodes) for _ in range(n)]
            whose |= dict.fromkeys(taken, provider)
            reasons |= dict.fromkeys(taken, _reason(times))
        engine = job.pieces(graph, whose, reasons)
    elif choice.name == NATIVE:
        engine = job.native()
        engine.placement = tuple(replace(p, reason=p.reason or choice.reason) for p in engine.placement)
    else:
        engine = job.whole(choice.name, choice.reason)
    engine.facts.update(auto_choice=choice.name, auto_ms=choice.times, auto_refused=choice.refused)
    return engine


def choose(job: EngineMaker, graph: Graph, shapes: Mapping[str, Sequence[int]] | None) -> Partition:
    """Measure."""
    specs = [TensorSpec(v.name, v.dtype, v.shape) for v in graph.inputs]
    given = {k: tuple(v) for k, v in (shapes or {}).items()}
    concrete, sizes = choose_shapes(specs, given, tuple(inner_demands(graph)))
    inputs = generate(specs, concrete)
    others = [name for name in KNOWN if availability(name).is_available]
    ours = job.native()
    wholes = {NATIVE: ours}
    refused: dict[str, str] = {}
    for name in others:
        try:
            wholes[name] = job.whole(name, "measured")
        except VivaceError as e:
            refused[name] = str(e)
    near = job.tolerance
    times = _measure({name: e.run for name, e in wholes.items()}, inputs, near, refused, _SETTINGS)
    best = min(times, key=lambda name: times[name] * (MARGIN if name == NATIVE else 1.0))
    choice = Partition(best, {k: 1e3 * t for k, t in times.items()}, refused)
    if len(times) < 2 or times[best] < LEAST_SECONDS:
        return choice
    groups = split(graph, node_seconds(graph, ours, inputs), sizes)
    fastest_whole = wholes[best]
    del ours, wholes  # and their weights
    table = _piece_times(job, graph, groups, inputs, list(times))
    runs = assign(table, times)
    if runs is None or len(set(runs)) == 1:
        return choice
    parts = tuple((provider, len(g)) for provider, g in zip(runs, groups, strict=True))
    pieces = tuple({name: 1e3 * t for name, t in row.items()} for row in table)
    mixed = Partition(MIXED, choice.times, refused, parts, pieces)
    rivals = {best: fastest_whole.run, MIXED: _engine(job, graph, mixed).run}
    final = _measure(rivals, inputs, near, refused, _FINAL)
    all_times = {**choice.times, **{k: 1e3 * t for k, t in final.items()}}
    if final.get(MIXED, np.inf) < MARGIN * final[best]:
        return replace(mixed, times=all_times)
    return replace(choice, times=all_times)


def _measure(
    runs: Mapping[str, Runner], inputs: Arrays, near: Tolerance, refused: dict[str, str], settings: Settings
) -> dict[str, float]:
    """Seconds of each, side by side, the lower quartile: a busy neighbour makes calls longer, never shorter. Who fails
    or differs from the first goes to `refused` (rule SAME)."""
    reference = next(iter(runs.values()))(inputs)

    def contestant(name: str) -> Contestant:
        return Contestant(name, "", lambda: runs[name])

    found = bench([contestant(name) for name in runs], inputs, settings, reference=reference, tolerance=near)
    refused |= {e.name: e.failure or "its outputs differ from ours" for e in found.engines if e.failure or not e.agrees}
    return {e.name: float(np.percentile(e.calls, 25)) for e in found.engines if not e.failure and e.agrees}


def node_seconds(graph: Graph, ours: Compiled, inputs: Arrays) -> list[float]:
    """What each node of the graph takes in our engine: a kernel's time goes in equal shares to the nodes that it came
    from."""
    nodes_of: dict[str, list[int]] = {}
    for i, n in enumerate(graph.nodes):
        for name in n.origin:
            nodes_of.setdefault(name, []).append(i)
    kernels: dict[str, list[str]] = {}
    for p in ours.placement:
        kernels.setdefault(p.kernel, []).append(p.node)
    seconds = [1e-9] * len(graph.nodes)
    for _ in range(3):
        for event in ours.profile(inputs):
            mine = sorted({i for name in kernels.get(event.kernel, ()) for i in nodes_of.get(name, ())})
            for i in mine:
                seconds[i] += event.duration_ns / 3e9 / len(mine)
    return seconds


class _Sizes(dict[str, int]):
    def __missing__(self, name: str) -> int:
        return 64  # of a size that only a run shows


def split(
    graph: Graph, seconds: Sequence[float], sizes: Mapping[str, int], n_pieces: int = N_PIECES
) -> list[list[Node]]:
    """The nodes in order, cut into pieces of about equal time: near each border, where the fewest bytes cross it."""
    env = _Sizes(sizes)
    last_use = {v: i for i, n in enumerate(graph.nodes) for v in n.inputs if v is not None}
    crossing = [0] * (len(graph.nodes) + 1)
    for i, n in enumerate(graph.nodes):
        for v in n.outputs:
            for at in range(i + 1, last_use.get(v, i) + 1):
                crossing[at] += evaluate(v.type.bytes, env)
    before = np.cumsum([0.0, *seconds])
    share = before[-1] / n_pieces
    cuts = [0]
    for k in range(1, n_pieces):
        near = [i for i in range(cuts[-1] + 1, len(graph.nodes)) if abs(before[i] - k * share) <= share / 2]
        if near:
            cuts.append(min(near, key=lambda i: (crossing[i], abs(before[i] - k * share))))
    return [list(graph.nodes[a:b]) for a, b in pairwise([*cuts, len(graph.nodes)])]


def _piece_times(
    job: EngineMaker, graph: Graph, groups: Sequence[Sequence[Node]], inputs: Arrays, providers: Sequence[str]
) -> list[dict[str, float]]:
    """Seconds of each provider for each piece by itself, its borders included, on the values that our engine gives."""
    values = dict(inputs)
    table = []
    for piece in graphs_of(graph, groups):
        engines = {NATIVE: job.pieces(piece, {}, {})}
        for name in providers:
            if name != NATIVE:
                try:
                    engines[name] = job.pieces(piece, dict.fromkeys(piece.nodes, name), {})
                except VivaceError:
                    continue  # it cannot run this piece
        given = {v.name: values[v.name] for v in piece.inputs}
        table.append(_measure({name: e.run for name, e in engines.items()}, given, job.tolerance, {}, _SETTINGS))
        values |= engines[NATIVE].run(given)
    return table


def assign(table: Sequence[Mapping[str, float]], wholes: Mapping[str, float]) -> tuple[str, ...] | None:
    """Who runs each piece for the least estimated time; None where one provider for all is estimated as fast.

    A border between two pieces of one provider vanishes: it is worth what the provider's pieces take together beyond
    its time for the whole, shared among the borders.
    """
    n_borders = max(1, len(table) - 1)
    saved = {
        name: max(0.0, sum(row[name] for row in table) - whole) / n_borders
        for name, whole in wholes.items()
        if all(name in row for row in table)
    }

    def estimate(runs: tuple[str, ...]) -> float:
        alone = sum(row[name] for row, name in zip(table, runs, strict=True))
        return alone - sum(saved.get(a, 0.0) for a, b in pairwise(runs) if a == b)

    best = min(product(*table), key=estimate)
    return best if estimate(best) < MARGIN * min(wholes.values()) else None
