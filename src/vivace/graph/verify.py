"""The verifier: holds a graph to the rules of `vivace.graph.graph` and every node to its op's `infer`."""

from __future__ import annotations

from vivace.base.errors import GraphError, VivaceError
from vivace.graph.graph import Graph, Value, subgraphs


def verify(graph: Graph, where: str = "") -> None:
    """Raise GraphError unless every value is defined once, before use, with the type that its op infers. Cost:
    O(nodes)."""
    seen: set[Value] = set(graph.inputs)
    if len(seen) != len(graph.inputs):
        raise GraphError("a value is listed twice among the inputs", where=where)
    for i, n in enumerate(graph.nodes):
        for v in n.inputs:
            if v is not None and v.data is None and v not in seen:
                raise GraphError(f"node {i}: %{v.name} is used before it is defined\n{around(graph, i)}", where=where)
        try:
            want = n.op.infer([None if v is None else v.type for v in n.inputs], n.attrs)
        except VivaceError as e:
            raise GraphError(f"node {i}: {e}\n{around(graph, i)}", where=where) from e
        got = tuple(v.type for v in n.outputs)
        if got != want:
            raise GraphError(
                f"node {i}: {n.op.name} gives {', '.join(map(str, want))}, the graph says {', '.join(map(str, got))}\n"
                f"{around(graph, i)}",
                where=where,
            )
        for v in n.outputs:
            if v in seen:
                raise GraphError(f"node {i}: %{v.name} is defined twice\n{around(graph, i)}", where=where)
            seen.add(v)
        for g in subgraphs(n):
            verify(g, where=f"{where}/{n.op.name} %{n.outputs[0].name}" if n.outputs else where)
    for v in graph.outputs:
        if v.data is None and v not in seen:
            raise GraphError(f"output %{v.name} is never defined", where=where)


def around(graph: Graph, i: int, k: int = 3) -> str:
    """The lines of the graph around node `i`, the node marked."""
    lines = range(max(0, i - k), min(len(graph.nodes), i + k + 1))
    return "\n".join(("> " if j == i else "  ") + str(graph.nodes[j]) for j in lines)
