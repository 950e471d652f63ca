"""Cutting a graph into pieces that run one after the other, each by one provider.

    f32[N] x --native--> f32[N] y --onnxruntime--> i64[1,u] at --native--> f32[u] z

Rules:
* TURNS: a piece takes every node of its provider that the pieces before it allow, so that providers change seldom.
* LATE: a view, or a value made of sizes alone, belongs to the piece that reads it: what crosses lies in memory.
* WITNESS: every symbol that a piece needs is a dim of one of its inputs. Where none that it reads has it, one more
  input brings it, whose elements nobody looks at; so the shapes of its inputs say all that a piece must know.
* NAMES: what crosses a border has a name of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vivace.base.dims import as_symbol
from vivace.graph.graph import Graph, Node, Value
from vivace.graph.sizes import late_nodes, node_sizes, value_sizes


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a graph, itself a graph, and who runs it."""

    provider: str
    graph: Graph


def cut(graph: Graph, provider_of: Mapping[Node, str], usual: str = "native") -> list[Piece]:
    """The pieces of a graph in the order in which they run; nodes that are not in `provider_of` go to `usual`."""
    whose = [provider_of.get(n, usual) for n in graph.nodes]
    plans = [_take_turns(graph, whose, first) for first in dict.fromkeys(whose)]
    turns = _delay(graph, min(plans, key=max), whose) if plans else []
    groups: dict[int, list[Node]] = {t: [] for t in sorted(set(turns))}
    for n, t in zip(graph.nodes, turns, strict=True):
        groups[t].append(n)
    providers = [whose[turns.index(t)] for t in groups]
    return [Piece(p, g) for p, g in zip(providers, graphs_of(graph, list(groups.values())), strict=True)]


def graphs_of(graph: Graph, groups: Sequence[Sequence[Node]]) -> list[Graph]:
    """Groups of a graph's nodes, all of them and in an order in which they can run, as graphs of their own."""
    named = dict(zip(graph.nodes, with_own_names(graph).nodes, strict=True))
    graph = replace(graph, nodes=tuple(named.values()))
    before: dict[Value, None] = dict.fromkeys(graph.inputs)
    found: list[Graph] = []
    for group in groups:
        nodes = [named[n] for n in group]
        found.append(_closed(graph, nodes, before, f"{graph.name}_{len(found)}"))
        before |= dict.fromkeys(v for n in nodes for v in n.outputs)
    return found


def _take_turns(graph: Graph, whose: Sequence[str], first: str) -> list[int]:
    """The turn of each node where `first` begins (rule TURNS)."""
    producer = {v: i for i, n in enumerate(graph.nodes) for v in n.outputs}
    late, bringer = late_nodes(graph), dict[str, int]()
    needs: list[list[int]] = []
    for i, n in enumerate(graph.nodes):
        own = late.get(n, set())
        sizes = [bringer[s] for s in node_sizes(n) - own if s in bringer]
        needs.append([*(producer[v] for v in n.inputs if v in producer), *sizes])
        bringer |= {s: i for s in own if s not in bringer}
    turns: dict[int, int] = {}
    kind, turn = first, 0
    while len(turns) < len(whose):
        for i in range(len(whose)):
            if i not in turns and whose[i] == kind and all(j in turns for j in needs[i]):
                turns[i] = turn
        left = [i for i in range(len(whose)) if i not in turns]
        ready = Counter(whose[i] for i in left if all(j in turns for j in needs[i]))
        kind, turn = max(ready, key=ready.__getitem__, default=kind), turn + 1
    return [turns[i] for i in range(len(whose))]


def _delay(graph: Graph, turns: Sequence[int], whose: Sequence[str]) -> list[int]:
    """The turns with rule LATE."""
    number = {n: i for i, n in enumerate(graph.nodes)}
    users, outputs, turns = graph.users(), set(graph.outputs), list(turns)
    for i, n in reversed(list(enumerate(graph.nodes))):
        readers = [number[u] for v in n.outputs for u in users.get(v, [])]
        is_free = n.op.kind == "movement" or all(v is None or v.data is not None for v in n.inputs)
        if is_free and readers and outputs.isdisjoint(n.outputs):
            first = min(readers, key=lambda j: turns[j])
            if whose[first] == whose[i]:
                turns[i] = turns[first]
    return turns


def _closed(graph: Graph, nodes: Sequence[Node], before: Mapping[Value, None], name: str) -> Graph:
    """Some nodes of a graph as a graph of their own; `before` are the values that exist when it runs."""
    made = {v for n in nodes for v in n.outputs}
    inside = set(nodes)
    read_later = {v for n in graph.nodes if n not in inside for v in n.inputs}
    outputs = [v for n in nodes for v in n.outputs if v in read_later or v in graph.outputs]
    if set(before) == set(graph.inputs):  # the first piece gives what no node computes
        outputs += [v for v in dict.fromkeys(graph.outputs) if v.data is not None or v in before]
    read = {v for n in nodes for v in n.inputs} | set(outputs)
    inputs = [v for v in before if v in read and v not in made]
    told = {name for v in inputs for name in _plain_sizes(v)}
    given = {s for v in before for s in value_sizes(v)}
    for name in sorted({s for n in nodes for s in node_sizes(n)} & given - told):  # rule WITNESS
        plain = [v for v in before if name in _plain_sizes(v)]
        inputs += plain[:1] or [v for v in before if name in value_sizes(v)]
    return Graph(tuple(dict.fromkeys(inputs)), tuple(nodes), tuple(outputs), name)


def _plain_sizes(v: Value) -> set[str]:
    """The symbols that are dims by themselves."""
    return {s.name for d in v.shape if (s := as_symbol(d)) is not None}


def with_own_names(graph: Graph) -> Graph:
    """Rule NAMES, for all values."""
    fixed = {*graph.inputs, *graph.outputs}
    taken = {v.name for v in fixed}
    new: dict[Value, Value] = {}
    for v in (v for n in graph.nodes for v in n.outputs if v not in fixed):
        name, k = v.name, 1
        while name in taken:
            name, k = f"{v.name}.{k}", k + 1
        taken.add(name)
        if name != v.name:
            new[v] = replace(v, name=name)
    if not new:
        return graph
    nodes = [
        replace(
            n,
            inputs=tuple(v if v is None else new.get(v, v) for v in n.inputs),
            outputs=tuple(new.get(v, v) for v in n.outputs),
        )
        for n in graph.nodes
    ]
    return replace(graph, nodes=tuple(nodes))
