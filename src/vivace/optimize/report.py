"""What the optimizer did: nodes per op before and after, how often each rule fired, memory traffic, time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vivace.base.dims import typical
from vivace.graph.graph import Graph, Node
from vivace.graph.passes import Stage

VIEWS = frozenset({"reshape", "slice", "expand"})
"""Ops that a good runtime does not copy for: they count as no traffic."""


@dataclass(slots=True)
class Report:
    """Filled by `optimize`. `explain` names the rules whose near misses are wanted; `notes` holds them.

    The counts of ONNX operators and the error are known where a file was written (`vivace.optimizer`).
    """

    explain: tuple[str, ...] = ()
    stages: list[Stage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ops_before: Counter[str] = field(default_factory=Counter)
    ops_after: Counter[str] = field(default_factory=Counter)
    bytes_before: int = 0
    bytes_after: int = 0
    operators_before: Counter[str] = field(default_factory=Counter)
    operators_after: Counter[str] = field(default_factory=Counter)
    largest_error: float | None = None

    @property
    def fired(self) -> Counter[str]:
        """How often each rule fired."""
        return sum((s.fired for s in self.stages), Counter())

    @property
    def seconds(self) -> float:
        return sum(s.seconds for s in self.stages)

    def __str__(self) -> str:
        lines = [
            f"nodes {self.ops_before.total()} -> {self.ops_after.total()}, "
            f"memory traffic {self.bytes_before / 1e6:.1f} -> {self.bytes_after / 1e6:.1f} MB, "
            f"{self.seconds * 1e3:.0f} ms"
        ]
        lines += [f"  {count:5d} x {name}" for name, count in self.fired.most_common()]
        return "\n".join([*lines, *self.notes])


def count_ops(graph: Graph) -> Counter[str]:
    """Nodes by op, those of nested graphs included."""
    return Counter(n.op.name for n in graph.walk())


def node_bytes(n: Node) -> int:
    """Bytes that a node reads and writes; a view moves none, an `expand` is read by its reader."""
    if n.op.name in VIEWS:
        return 0
    total = 0
    for v in (*n.inputs, *n.outputs):
        if v is not None:
            size = v.dtype.size_bytes
            for d in v.shape:
                size *= max(typical(d), 0)
            total += size
    return total


def moved_bytes(graph: Graph) -> int:
    """Bytes that the nodes read and write, symbols at a typical size. One branch of an `if`, one turn of a loop: all
    are counted once."""
    return sum(map(node_bytes, graph.walk()))
