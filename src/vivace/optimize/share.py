"""Common subexpressions: one node for equal ops on equal operands, one constant for equal contents."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import replace

from vivace.graph.graph import Graph, Node, Value
from vivace.graph.rewrite import Log, map_subgraphs

SMALL_BYTES = 1 << 16
"""Constants up to this size are compared by contents; larger ones only by the memory that they lie in."""

EFFECTS = frozenset({"onnx", "loop"})
"""Never shared: a foreign operator may draw random numbers."""


def share_common(graph: Graph, log: Log) -> Graph:
    """The graph without repeated computations; the graph itself when there are none. Graph outputs stay apart from
    each other."""
    graph = map_subgraphs(graph, lambda g: share_common(g, log))
    outputs = set(graph.outputs)
    same: dict[Value, Value] = {}
    known: dict[Hashable, Node] = {}
    contents: dict[Hashable, Value] = {}
    nodes: list[Node] = []
    merged = 0
    for n in graph.nodes:
        ins = tuple(
            None if v is None else _shared_constant(v, contents) if v.data is not None else same.get(v, v)
            for v in n.inputs
        )
        if any(a is not b for a, b in zip(ins, n.inputs)):
            n = replace(n, inputs=ins)
        if n.op.name in EFFECTS:
            nodes.append(n)
            continue
        key = (n.op.name, ins, _key(n))
        first = known.setdefault(key, n)
        if first is n or not outputs.isdisjoint(n.outputs):
            nodes.append(n)
        else:
            same.update(zip(n.outputs, first.outputs))
            merged += 1
    if not merged:
        return graph
    log.fired["share_common"] += merged
    return replace(graph, nodes=tuple(nodes))


def _key(n: Node) -> Hashable:
    """The attributes; floats by their spelling, so that -0.0 and 0.0 differ and NaN equals itself."""
    return tuple(sorted((k, repr(v) if isinstance(v, float) else v) for k, v in n.attrs.items())) if n.attrs else ()


def _shared_constant(v: Value, contents: dict[Hashable, Value]) -> Value:
    data = v.data
    if data is None or data.dtype == object:
        return v
    if data.nbytes <= SMALL_BYTES:
        digest: Hashable = hashlib.blake2b(data.tobytes(), digest_size=16).digest()
    else:
        digest = (data.__array_interface__["data"][0], data.strides)
    return contents.setdefault((v.dtype, data.shape, digest), v)
