"""Graph -> ModelProto: standard operators only, so that any runtime can run the file.

The layout must be NCHW. Ops that the opset lacks are written in their parts (attention before 23, gelu before 20). A
matmul and the sum that follows are one Gemm, slices that divide a tensor are one Split, and `onnx` nodes are written as
they were. Integers of 4 bits and weights with scales per block want opset 21 at least. Opsets 18 (reductions take their
axes as an input) to `NEWEST`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper

from vivace.base.dtypes import DType
from vivace.base.errors import InputError, UnsupportedError
from vivace.graph.graph import Graph, Node, Value
from vivace.graph.rewrite import rewrite
from vivace.onnx import export_compute, export_movement, export_quantized, export_trees
from vivace.onnx.export_attention import operator_guards_itself
from vivace.onnx.export_control import write_onnx_node, write_subgraph_node
from vivace.onnx.reader import OLDEST_OPSET
from vivace.onnx.tensors import data_type_of
from vivace.onnx.writer import Writer

OLDEST, DEFAULT, NEWEST = 18, 20, 23
NIBBLES = (DType.i4, DType.u4)
_IR_VERSION = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
LIMIT_BYTES = 1_900_000_000
"""A protobuf message ends at 2 GiB; above this the weights go to a file beside the model."""

WRITERS = {**export_compute.WRITERS, **export_movement.WRITERS, **export_quantized.WRITERS, **export_trees.WRITERS}


def export(graph: Graph, opset: int = DEFAULT) -> ModelProto:
    """The graph as an ONNX model. Raises: UnsupportedError for a channels-last layout or an opset out of range."""
    if not OLDEST <= opset <= NEWEST:
        raise InputError(f"opset {opset} cannot be written", where="export", expected=f"{OLDEST} to {NEWEST}")
    if any(_wants_narrow(n) for n in graph.walk()):
        opset = max(opset, export_quantized.NARROW_SINCE)
    kept = [n for n in graph.walk() if n.op.name == "onnx" and not n.attrs["domain"]]
    opset = _agreed(opset, kept, OLDEST if any(n.op.name != "onnx" for n in graph.walk()) else OLDEST_OPSET)
    if opset >= 23:
        graph = rewrite(graph, [operator_guards_itself])
    w = Writer(opset)
    for v in graph.inputs:
        w.taken.add(v.name)
        w.define(v, v.name)
    w.taken.update(v.name for v in graph.outputs)
    w.final = {v: v.name for v in graph.outputs}
    write_nodes(w, graph)
    outputs = close_outputs(w, graph)
    proto = GraphProto(name=graph.name, node=w.nodes)
    proto.input.extend(value_info(v, v.name) for v in graph.inputs)
    proto.output.extend(value_info(v, name) for v, name in zip(graph.outputs, outputs))
    proto.initializer.extend(w.initializer_protos())
    imports = [helper.make_opsetid("", w.opset), *(helper.make_opsetid(d, k) for d, k in w.imports.items())]
    ir_version = _IR_VERSION.get(w.opset, _IR_VERSION[OLDEST])
    return helper.make_model(proto, opset_imports=imports, ir_version=ir_version, producer_name="vivace")


def _wants_narrow(n: Node) -> bool:
    """Whether a node has weights in blocks, or integers of 4 bits."""
    return n.op.name == "matmul_blocks" or any(v is not None and v.dtype in NIBBLES for v in (*n.inputs, *n.outputs))


def _agreed(opset: int, kept: Sequence[Node], oldest: int) -> int:
    """`opset`, or the newest one else in which all kept operators mean what they did. Models of nothing else may be
    older than those that are written here.
    """
    for candidate in (opset, *range(NEWEST, oldest - 1, -1)):
        if all(_means_the_same(n, candidate) for n in kept):
            return candidate
    first = next(n for n in kept if not _means_the_same(n, opset))
    proto, was = NodeProto.FromString(first.attrs["node"]), _opset_of(first)
    raise UnsupportedError(
        f"{proto.op_type} of opset {was} cannot stand in a model of opset {opset}",
        where=str(first.attrs.get("name", "")),
        hint="another opset",
    )


def _opset_of(n: Node) -> int:
    return int(n.attrs["default_opset"]) if "default_opset" in n.attrs else int(n.attrs["opset"])


def _means_the_same(n: Node, opset: int) -> bool:
    def versions(name: str) -> set[int]:
        return {onnx.defs.get_schema(name, k).since_version for k in (_opset_of(n), opset)}

    try:
        return all(len(versions(name)) == 1 for name in _operators(NodeProto.FromString(n.attrs["node"])))
    except onnx.defs.SchemaError:
        return False


def _operators(node: NodeProto) -> Iterator[str]:
    """The standard operators of a node and of the graphs inside it."""
    if node.domain in ("", "ai.onnx"):
        yield node.op_type
    for a in node.attribute:
        for g in (a.g, *a.graphs):
            for inner in g.node:
                yield from _operators(inner)


def write_nodes(w: Writer, graph: Graph) -> None:
    """Write the nodes of a graph whose inputs are defined; the values in `w.final` get the names there."""
    w.enter(graph)
    export_movement.find_splits(w, graph)
    delayed = {m for n in graph.nodes for m in export_compute.absorbed(w, n)}
    for n in graph.nodes:
        if n not in w.done and n not in delayed:
            write_node(w, n, [w.names.get(v) or w.final.get(v) or w.fresh(v.name) for v in n.outputs])


def close_outputs(w: Writer, graph: Graph, keep_names: bool = True) -> list[str]:
    """The names of a graph's outputs; an output that is an input, a constant or another output gets a node of its
    own."""
    found: list[str] = []
    inputs = set(graph.inputs)
    for v in graph.outputs:
        name = w.ref(v)
        alias = v.data is not None or v in inputs or v not in w.made or name in found
        wanted = v.name if keep_names and v.name not in found and v not in inputs else w.fresh(f"{v.name}_out")
        if alias or (keep_names and name != v.name):
            name = w.emit("Identity", [name], wanted)
        found.append(name)
    return found


def write_body(w: Writer, graph: Graph, args: Sequence[str | None], name: str) -> GraphProto:
    """A nested graph: inputs with a name in `args` are captured from outside, the others become inputs of the body."""
    outer_nodes, outer = w.nodes, (dict(w.sources), dict(w.dims), list(w.shapes))
    w.nodes = []
    own: list[ValueInfoProto] = []
    for v, arg in zip(graph.inputs, args, strict=True):
        if arg is None:
            arg = w.fresh(v.name)
            own.append(value_info(v, arg))
        w.define(v, arg)
    write_nodes(w, graph)
    outputs = close_outputs(w, graph, keep_names=False)
    proto = GraphProto(name=name, node=w.nodes)
    proto.input.extend(own)
    proto.output.extend(value_info(v, o) for v, o in zip(graph.outputs, outputs))
    w.nodes = outer_nodes
    w.sources, w.dims, w.shapes = outer
    return proto


def write_node(w: Writer, n: Node, outs: list[str]) -> None:
    """Write one node under the given output names."""
    if n.op.name == "onnx":
        write_onnx_node(w, n, outs)
    elif n.op.name in ("if", "loop"):
        write_subgraph_node(w, n, outs, write_body)
    elif n.op.name in WRITERS:
        WRITERS[n.op.name](w, n, outs)
    else:
        raise UnsupportedError(f"{n.op.name} has no ONNX form", where="export")
    for v, name in zip(n.outputs, outs):
        if v not in w.names:
            w.define(v, name)


def value_info(v: Value, name: str) -> ValueInfoProto:
    """Name, element type and dims; a symbolic dim by its text."""
    return helper.make_tensor_value_info(
        name, data_type_of(v.dtype), [d if isinstance(d, int) else str(d) for d in v.shape]
    )


def count_operators(source: Path | ModelProto) -> Counter[str]:
    """Operators of an ONNX model by type, those of nested graphs included. A Constant is no operator."""
    model = onnx.load(str(source), load_external_data=False) if isinstance(source, Path) else source
    found: Counter[str] = Counter()

    def visit(g: GraphProto) -> None:
        for n in g.node:
            found[n.op_type] += n.op_type != "Constant"
            for a in n.attribute:
                if a.type == onnx.AttributeProto.GRAPH:
                    visit(a.g)

    visit(model.graph)
    return +found


def opset_of(source: Path) -> int:
    """The version of the default domain in a model file."""
    model = onnx.load(str(source), load_external_data=False)
    return max((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), default=0)


def save(model: ModelProto, path: Path) -> None:
    """Write a model file; above 1.9 GB its weights go to `<name>.data` beside it. Not atomic: the caller renames."""
    if model.ByteSize() < LIMIT_BYTES:
        path.write_bytes(model.SerializeToString())
        return
    onnx.save_model(model, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
