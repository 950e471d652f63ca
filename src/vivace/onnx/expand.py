"""Operators that `onnx` itself defines as functions of others: the body is imported in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import FunctionProto, GraphProto, NodeProto, helper

from vivace.graph.graph import Value
from vivace.onnx.tensors import data_type_of


def function_body(n: NodeProto, domain: str, opsets: dict[str, int], inputs: Sequence[Any]) -> GraphProto | None:
    """The body of an operator as a graph with the node's attributes filled in, or None when it has none for this
    opset.
    """
    try:
        schema: Any = onnx.defs.get_schema(n.op_type, opsets[domain], domain)
    except onnx.defs.SchemaError:
        return None
    version = opsets[""]
    if schema.has_context_dependent_function:
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= version]
        if not versions:
            return None
        types = [onnx.TypeProto().SerializeToString() if v is None else _type(v).SerializeToString() for v in inputs]
        try:
            data = schema.get_context_dependent_function_with_opset_version(max(versions), n.SerializeToString(), types)
        except RuntimeError:  # the builder of the body refused these types
            return None
        body = FunctionProto.FromString(data)
    elif schema.has_function:
        versions = [v for v in schema.function_opset_versions if v <= version]
        if not versions:
            return None
        body = FunctionProto.FromString(schema.get_function_with_opset_version(max(versions)))
    else:
        return None
    return _instantiate(body, n, schema) if body.node else None


def _type(v: Value) -> onnx.TypeProto:
    shape = [d if isinstance(d, int) else str(d) for d in v.shape]
    return helper.make_tensor_type_proto(data_type_of(v.dtype), shape)


def _instantiate(body: FunctionProto, n: NodeProto, schema: Any) -> GraphProto:
    """The body as a graph. Attributes that refer to the caller's are replaced by the caller's value or its default."""
    given = {a.name: a for a in n.attribute}
    defaults = {name: a.default_value for name, a in schema.attributes.items() if a.default_value.name}
    graph = GraphProto(name=n.op_type)
    graph.input.extend(onnx.ValueInfoProto(name=name) for name in body.input)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in body.output)
    for inner in body.node:
        copy = graph.node.add()
        copy.CopyFrom(inner)
        _bind(copy, given, defaults)
        copy.name = copy.name and f"{n.name or n.op_type}/{copy.name}"
    return graph


def _bind(node: NodeProto, given: dict[str, Any], defaults: dict[str, Any]) -> None:
    kept = []
    for a in node.attribute:
        if a.ref_attr_name:
            source = given.get(a.ref_attr_name, defaults.get(a.ref_attr_name))
            if source is None:
                continue
            bound = onnx.AttributeProto()
            bound.CopyFrom(source)
            bound.name = a.name
            kept.append(bound)
        else:
            for g in [a.g, *a.graphs] if a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) else []:
                for inner in g.node:
                    _bind(inner, given, defaults)
            kept.append(a)
    copies = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in kept]
    del node.attribute[:]
    node.attribute.extend(copies)
