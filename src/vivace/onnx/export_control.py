"""Writing `if`, `loop` and the operators that were kept as they came."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx import AttributeProto, GraphProto, NodeProto, helper

from vivace.graph.graph import Graph, Node
from vivace.onnx.writer import Writer

Body = Callable[[Writer, Graph, Sequence[str | None], str], GraphProto]


def write_subgraph_node(w: Writer, n: Node, outs: list[str], body: Body) -> None:
    """Captures are read from the outer graph by name, as ONNX has it."""
    ins = [w.ref(v) for v in n.inputs]
    if n.op.name == "if":
        then, other = (body(w, n.attrs[k], ins[1:], k) for k in ("then", "else"))
        w.emit("If", [_scalar(w, n, 0)], outs, then_branch=then, else_branch=other)
        return
    states = n.attrs["n_state"]
    graph: Graph = n.attrs["body"]
    captured = ins[2 + states :]
    inner = body(w, graph, [None] * (2 + states) + list(captured), "body")
    trip = "" if n.inputs[0] is None else _scalar(w, n, 0)
    go = "" if len(n.inputs) < 2 or n.inputs[1] is None else _scalar(w, n, 1)
    proto = helper.make_node(
        "Loop", [trip, go, *ins[2 : 2 + states]], outs, name=w.node_name("Loop", outs[0]), body=inner
    )
    w.nodes.append(proto)


def _scalar(w: Writer, n: Node, i: int) -> str:
    """Input `i` without axes."""
    v = n.inputs[i]
    assert v is not None
    return w.ref(v) if v.rank == 0 else w.emit("Reshape", [w.ref(v), w.const([])])


def write_onnx_node(w: Writer, n: Node, outs: list[str]) -> None:
    """A kept NodeProto with its tensors under their new names, those read inside its graphs included."""
    proto = NodeProto.FromString(n.attrs["node"])
    new = {old: w.ref(v) for old, v in zip(n.attrs["names"], n.inputs)}
    kept = [o for o in proto.output if o]
    names = dict(zip(n.attrs.get("outputs", kept), outs))
    del_outputs = [names.get(o, "") if o else "" for o in proto.output]
    del proto.output[:]
    proto.output.extend(del_outputs)
    _rename(proto, new)
    w.nodes.append(proto)
    if proto.domain and proto.domain != "ai.onnx":
        w.imports[proto.domain] = n.attrs["opset"]


def _rename(n: NodeProto, new: dict[str, str]) -> None:
    for i, name in enumerate(n.input):
        n.input[i] = new.get(name, name)
    for a in n.attribute:
        if a.type == AttributeProto.GRAPH:
            _rename_graph(a.g, new)
        for g in a.graphs:
            _rename_graph(g, new)


def _rename_graph(g: GraphProto, new: dict[str, str]) -> None:
    """Names that the graph defines itself hide those outside."""
    own = {v.name for v in g.input} | {t.name for t in g.initializer} | {o for m in g.node for o in m.output}
    free = {k: v for k, v in new.items() if k not in own}
    for m in g.node:
        _rename(m, free)
    for o in g.output:
        o.name = free.get(o.name, o.name)
