"""Open a model: a path, bytes or ModelProto becomes a checked `Model`. The only door to protobuf parsing and
external data.

After `read`:
* the graph and every nested graph are topologically sorted, each name is defined once, and every name read is defined;
* functions of the model are inlined; every operator has a schema in `onnx`, or belongs to `com.microsoft`;
* one opset per domain, from 7 to the newest that `onnx` knows for the default domain.
Tensors are not read here but through `Model.tensors`, when an importer asks for them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

from vivace.base.errors import InputError, ModelError, UnsupportedError
from vivace.base.version import ENGINE_MAGIC
from vivace.onnx.tensors import Tensors
from vivace.onnx.wire import skeleton

OLDEST_OPSET = 7
_LARGEST_MESSAGE = 1 << 31  # bytes, of protobuf
MICROSOFT = "com.microsoft"
_LONG = 1024  # elements of an attribute


@dataclass(frozen=True, slots=True)
class Model:
    """A checked model. `opsets` maps a domain ('' is the default) to its version."""

    proto: ModelProto
    opsets: dict[str, int]
    tensors: Tensors
    name: str


def read(source: str | Path | bytes | ModelProto) -> Model:
    """Parse and check a model. Raises: ModelError, UnsupportedError."""
    proto, tensors, name = _parse(source)
    if not proto.ir_version or not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise ModelError("this is not an ONNX model", where=name, expected="a file written by an ONNX exporter")
    if proto.functions:
        proto = _inline(proto, name)
    try:
        _check_text(proto.graph)
        opsets = _opsets(proto, name)
        _check_graph(proto.graph, frozenset(), opsets, proto.ir_version, name)
    except (TypeError, UnicodeError) as e:  # protobuf hands out names that are no UTF-8 as bytes
        raise ModelError("a name in it is not text", where=name, hint="copy or download the file again") from e
    return Model(proto, opsets, tensors, proto.graph.name or name)


def as_given(source: object) -> bytes | None:
    """The model as it was given, in one piece; None for what is no ONNX model, or more than one message holds."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if not isinstance(source, (str, Path, ModelProto)):
        return None
    model = source if isinstance(source, ModelProto) else onnx.load(str(source))
    return model.SerializeToString() if model.ByteSize() < _LARGEST_MESSAGE else None


def _parse(source: str | Path | bytes | ModelProto) -> tuple[ModelProto, Tensors, str]:
    if isinstance(source, ModelProto):
        copy = ModelProto()
        copy.CopyFrom(source)
        return copy, Tensors(None), "model"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), len(source), "model"), Tensors(None), "model"
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"a model of type {type(source).__name__}", where="compile",
            expected="the path of an ONNX file, its bytes, or an onnx.ModelProto",
        )  # fmt: skip
    path = Path(source)
    try:
        size = path.stat().st_size
        data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    except (OSError, ValueError) as e:
        raise ModelError(
            f"cannot be read ({getattr(e, 'strerror', None) or e})",
            where=str(path)[:200],
            expected="the path of an ONNX file",
        ) from e
    if data[: len(ENGINE_MAGIC)].tobytes() == ENGINE_MAGIC:
        raise ModelError("is a saved engine", where=str(path), expected="an ONNX model", hint="vivace.load")
    return _decode(skeleton(data), size, path.name), Tensors(path.parent, data), path.name


def _decode(data: bytes, size: int, name: str) -> ModelProto:
    if not size:
        raise ModelError("the file is empty", where=name, expected="an ONNX model", hint="copy or download it again")
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as e:  # DecodeError, whose class depends on the protobuf implementation
        raise ModelError(
            f"the {size} bytes cannot be parsed as ONNX",
            where=name,
            expected="a complete ONNX model",
            hint="copy or download the file again",
        ) from e
    return proto


def _inline(proto: ModelProto, name: str) -> ModelProto:
    try:
        return onnx.inliner.inline_local_functions(proto)
    except Exception as e:  # the checker of onnx raises many kinds
        raise ModelError(f"its local functions cannot be inlined ({_first_line(e)})", where=name) from e


def _first_line(e: BaseException) -> str:
    text = str(e).strip().splitlines()
    return text[0] if text else type(e).__name__


def _opsets(proto: ModelProto, name: str) -> dict[str, int]:
    opsets: dict[str, int] = {}
    for o in proto.opset_import:
        domain = "" if o.domain == "ai.onnx" else o.domain
        if opsets.setdefault(domain, o.version) != o.version:
            raise ModelError(f"domain {domain!r} is imported in versions {opsets[domain]} and {o.version}", where=name)
    used = {_domain(n) for n in _all_nodes(proto.graph)}
    if "" in used and "" not in opsets:
        raise ModelError("uses ONNX operators without importing their opset", where=name)
    newest = onnx.defs.onnx_opset_version()
    if "" in used and not OLDEST_OPSET <= opsets[""] <= newest:
        hint = "convert it with onnx.version_converter" if opsets[""] < OLDEST_OPSET else "install a newer onnx package"
        raise ModelError(f"opset {opsets['']}", where=name, expected=f"{OLDEST_OPSET} to {newest}", hint=hint)
    for domain in used - set(opsets):
        if domain not in (MICROSOFT,):
            raise ModelError(f"uses domain {domain!r} without importing it", where=name)
        opsets[domain] = 1
    opsets.setdefault("", newest)
    return opsets


def _domain(n: NodeProto) -> str:
    return "" if n.domain == "ai.onnx" else n.domain


def _all_nodes(g: GraphProto) -> Iterator[NodeProto]:
    for n in g.node:
        yield n
        for inner in graphs_of(n):
            yield from _all_nodes(inner)


def graphs_of(n: NodeProto) -> list[GraphProto]:
    """The graphs in a node's attributes."""
    found = [a.g for a in n.attribute if a.type == AttributeProto.GRAPH]
    return found + [g for a in n.attribute if a.type == AttributeProto.GRAPHS for g in a.graphs]


def label(n: NodeProto) -> str:
    """What a person calls the node: its name, or its operator and first output."""
    return n.name or f"{n.op_type}:{next((o for o in n.output if o), '')}"


def free_names(g: GraphProto) -> dict[str, None]:
    """Names that a nested graph reads from outside, in order."""
    own = {v.name for v in g.input} | {t.name for t in g.initializer} | {t.values.name for t in g.sparse_initializer}
    free: dict[str, None] = {}
    for n in g.node:
        for name in needs(n):
            if name not in own:
                free[name] = None
        own |= set(n.output)
    free |= dict.fromkeys(v.name for v in g.output if v.name not in own)
    return free


def needs(n: NodeProto) -> dict[str, None]:
    """Every name that a node reads, those of its nested graphs included."""
    names = dict.fromkeys(i for i in n.input if i)
    for g in graphs_of(n):
        names |= free_names(g)
    return names


def _check_text(g: GraphProto) -> None:
    """Raise TypeError for text that protobuf could not decode and handed out as bytes."""
    dims = [d.dim_param for v in g.input for d in v.type.tensor_type.shape.dim]
    "".join([g.name, *dims, *(v.name for v in (*g.input, *g.output)), *(t.name for t in g.initializer)])


def _check_graph(g: GraphProto, outer: frozenset[str], opsets: dict[str, int], ir_version: int, where: str) -> None:
    own: set[str] = set()
    initializers = {t.name for t in g.initializer} | {t.values.name for t in g.sparse_initializer}
    if len(initializers) != len(g.initializer) + len(g.sparse_initializer):
        raise ModelError("two initializers have one name", where=where, hint="export the model again")
    for v in g.input:
        if not v.name or v.name in own:
            raise ModelError(
                f"the input name {v.name!r} is empty or used twice", where=where, hint="export the model again"
            )
        own.add(v.name)
    own |= initializers
    made: set[str] = set(own)
    for n in g.node:
        for o in n.output:
            if o and o in made:
                raise ModelError(
                    f"its output {o!r} is already defined",
                    where=f"{where} node {label(n)!r}",
                    expected="each name once",
                    hint="export the model again",
                )
            made.add(o)
    _sort(g, own, outer, where)
    visible = frozenset(made | outer)
    for n in g.node:
        _check_node(n, opsets, ir_version, f"{where} node {label(n)!r}")
        for inner in graphs_of(n):
            _check_graph(inner, visible, opsets, ir_version, f"{where} node {label(n)!r}")
    for v in g.output:
        if v.name not in visible:
            raise ModelError(f"the output {v.name!r} is never computed", where=where, hint="export the model again")


def _sort(g: GraphProto, own: set[str], outer: frozenset[str], where: str) -> None:
    """Put the nodes in an order in which each reads only what stands before it; already sorted graphs keep their
    order.
    """
    wants = [[name for name in needs(n) if name not in own] for n in g.node]
    makers = {o: i for i, n in enumerate(g.node) for o in n.output if o}
    for n, names in zip(g.node, wants):
        for name in names:
            if name not in makers and name not in outer:
                raise ModelError(
                    f"reads {name!r}, which nothing defines",
                    where=f"{where} node {label(n)!r}",
                    hint="export the model again",
                )
    if all(makers.get(name, -1) < i for i, names in enumerate(wants) for name in names):
        return
    order, state = [], [0] * len(wants)  # 0 unseen, 1 on the stack, 2 done
    for root in range(len(wants)):
        stack: list[tuple[int, Iterable[str]]] = [(root, iter(wants[root]))] if not state[root] else []
        state[root] = max(state[root], 1)
        while stack:
            i, rest = stack[-1]
            j = next((makers[name] for name in rest if name in makers and state[makers[name]] != 2), None)
            if j is None:
                state[i] = 2
                order.append(i)
                stack.pop()
            elif state[j] == 1:
                raise ModelError(
                    f"depends on itself through {label(g.node[i])!r}",
                    where=f"{where} node {label(g.node[j])!r}",
                    expected="a graph without cycles",
                    hint="export the model again",
                )
            else:
                state[j] = 1
                stack.append((j, iter(wants[j])))
    nodes = [NodeProto.FromString(g.node[i].SerializeToString()) for i in order]
    del g.node[:]
    g.node.extend(nodes)


def _check_node(n: NodeProto, opsets: dict[str, int], ir_version: int, where: str) -> None:
    domain = _domain(n)
    if domain == MICROSOFT:
        return
    try:
        schema = onnx.defs.get_schema(n.op_type, opsets[domain], domain)
    except onnx.defs.SchemaError as e:
        known = {s.domain for s in onnx.defs.get_all_schemas()}
        what = (
            f"operator {n.op_type!r} of opset {opsets[domain]}"
            if domain in known
            else f"domain {domain!r} (operator {n.op_type!r})"
        )
        raise UnsupportedError(
            f"{what} is unknown", where=where, hint="export the model with standard ONNX operators"
        ) from e
    if schema.deprecated:
        raise UnsupportedError(
            f"operator {n.op_type} was removed before opset {opsets[domain]}",
            where=where,
            hint="export the model again",
        )
    if n.op_type == "Constant" or graphs_of(n):
        # A Constant holds its data, which is checked when it is read; nested graphs are checked node by node.
        for a in n.attribute:
            kind = getattr(schema.attributes.get(a.name), "type", None)
            if kind is None or kind.value != a.type:
                raise ModelError(f"breaks the definition of {n.op_type} (attribute {a.name})", where=where)
        return
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = ir_version, opsets
    try:
        onnx.checker.check_node(_shortened(n), context)
    except onnx.checker.ValidationError as e:
        raise ModelError(f"breaks the definition of {n.op_type} ({_first_line(e)})", where=where) from e


def _shortened(n: NodeProto) -> NodeProto:
    """The node, or a copy with the first element of each long list: the checker asks for kinds, not for lengths, and
    copies what it is given several times."""
    lists = ("floats", "ints", "strings")
    if all(len(getattr(a, name)) <= _LONG for a in n.attribute for name in lists):
        return n
    short = NodeProto(input=n.input, output=n.output, op_type=n.op_type, domain=n.domain, name=n.name)
    for a in n.attribute:
        if all(len(getattr(a, name)) <= _LONG for name in lists):
            short.attribute.append(a)
        else:
            short.attribute.add(name=a.name, type=a.type, **{name: getattr(a, name)[:1] for name in lists})
    return short
