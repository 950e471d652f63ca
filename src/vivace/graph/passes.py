"""Passes: `Graph -> Graph` steps with what they require and ensure, and the runner that verifies, times and dumps each.

Rules:
* VERIFIED: the verifier runs after every pass that changed the graph; on failure the message names the pass and the
  file that holds the bad graph.
* DECLARED: a pass runs only where what it `requires` is ensured by the passes before it and not destroyed since
  (`destroys`).
* DUMPED: with a dump folder, stage `k` is written to `k-<pass>.txt`; a pass that changed nothing leaves
  `k-<pass>.unchanged`.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vivace.base.errors import GraphError, InternalError
from vivace.graph.graph import Graph, Node
from vivace.graph.rewrite import Log, Rule, map_subgraphs, rewrite
from vivace.graph.text import print_graph
from vivace.graph.verify import verify


@dataclass(frozen=True, slots=True)
class Pass:
    """One step of a pipeline: either rules run to a fixpoint, or a function of the graph."""

    name: str
    doc: str
    level: int
    rules: tuple[Rule, ...] = ()
    function: Callable[[Graph, Log], Graph] | None = None
    requires: frozenset[str] = frozenset()
    ensures: frozenset[str] = frozenset()
    destroys: frozenset[str] = frozenset()

    def run(self, graph: Graph, log: Log, disabled: frozenset[str] = frozenset()) -> Graph:
        """The rewritten graph; the same object when nothing changed."""
        if self.function is not None:
            return self.function(graph, log)
        return rewrite(graph, [r for r in self.rules if r.name not in disabled], log)


@dataclass(frozen=True, slots=True)
class Stage:
    """What one pass did."""

    name: str
    nodes: int
    seconds: float
    fired: Counter[str]
    changed: bool


@dataclass(slots=True)
class Run:
    """The record of a pipeline's run."""

    stages: list[Stage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fired(self) -> Counter[str]:
        """How often each rule fired, over all stages."""
        return sum((s.fired for s in self.stages), Counter())

    @property
    def seconds(self) -> float:
        return sum(s.seconds for s in self.stages)


def run_passes(
    graph: Graph,
    passes: Iterable[Pass],
    *,
    disabled: frozenset[str] = frozenset(),
    dump: Path | None = None,
    explain: Sequence[str] = (),
    record: Run | None = None,
) -> Graph:
    """Run passes in order. What needs a disabled pass is left out with it. Raises: GraphError naming the pass that
    broke the graph (VERIFIED), InternalError for a false order (DECLARED)."""
    record = record if record is not None else Run()
    holds: set[str] = set()
    withheld: set[str] = set()
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / "00-imported.txt").write_text(print_graph(graph), encoding="utf-8")
    for k, p in enumerate(passes, 1):
        missing = p.requires - holds
        if p.name in disabled or (missing and missing <= withheld):
            withheld |= p.ensures
            continue
        if missing:
            raise InternalError(
                f"pass {p.name} needs {', '.join(sorted(missing))}, which no pass before it ensures", where="pipeline"
            )
        start = time.perf_counter()
        log = Log(explain=explain)
        changed = p.run(graph, log, disabled)
        if changed is not graph:
            _verify_after(changed, p.name, dump)
        record.stages.append(
            Stage(p.name, len(changed.nodes), time.perf_counter() - start, log.fired, changed is not graph)
        )
        record.notes.extend(log.notes)
        if dump is not None:
            if changed is graph:
                (dump / f"{k:02d}-{p.name}.unchanged").write_text("", encoding="utf-8")
            else:
                (dump / f"{k:02d}-{p.name}.txt").write_text(print_graph(changed), encoding="utf-8")
        graph = changed
        holds = (holds - p.destroys) | p.ensures
    return graph


def _verify_after(graph: Graph, name: str, dump: Path | None) -> None:
    try:
        verify(graph, where=f"after {name}")
    except GraphError as e:
        if dump is None:
            with tempfile.NamedTemporaryFile(
                "w", prefix=f"vivace-{name}-", suffix=".txt", delete=False, encoding="utf-8"
            ) as f:
                path = Path(f.name)
        else:
            path = dump / f"bad-{name}.txt"
        path.write_text(print_graph(graph), encoding="utf-8")
        raise GraphError(f"pass {name} broke the graph, saved as {path}: {e.what}", where=e.where) from e


def remove_dead(graph: Graph) -> Graph:
    """Drop nodes whose outputs nothing reads, in nested graphs too; the graph itself when there are none."""
    graph = map_subgraphs(graph, remove_dead)
    live = set(graph.outputs)
    kept: list[Node] = []
    for n in reversed(graph.nodes):
        if not live.isdisjoint(n.outputs):
            kept.append(n)
            live.update(v for v in n.inputs if v is not None)
    return graph if len(kept) == len(graph.nodes) else replace(graph, nodes=tuple(reversed(kept)))
