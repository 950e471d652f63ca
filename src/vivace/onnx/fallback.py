"""`onnx` nodes: operators that run through a provider, with the types that shape inference of `onnx` gives.

A node is kept as its serialized NodeProto. Its inputs are those of the ONNX node and the outer values that nested
graphs read. Sequences, maps, optional values and tensors of unknown rank cannot be held by a graph: the nodes that make
and use them are kept together (an `Opaque` collects them) until tensors come out, and then stand in one `If` whose
condition is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

from vivace.base.dims import Dim
from vivace.base.dtypes import DType
from vivace.base.errors import ModelError, UnsupportedError
from vivace.graph.graph import Type, Value
from vivace.graph.ops import OPS
from vivace.onnx.reader import MICROSOFT, label, needs
from vivace.onnx.scope import Scope
from vivace.onnx.tensors import data_type_of, dtype_of

_INFERENCE_BYTES = 1 << 16  # constants up to this size take part in shape inference


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that has no tensor type: the nodes that compute it and the tensors that they read."""

    nodes: tuple[NodeProto, ...]
    inputs: dict[str, Value]
    type: TypeProto

    @property
    def kind(self) -> str:
        kind = (self.type.WhichOneof("value") or "value of unknown type").removesuffix("_type").replace("_", " ")
        return "tensor of unknown rank" if kind == "tensor" else kind


def emit(scope: Scope, n: NodeProto, inputs: Sequence[Any], reason: str, where: str) -> tuple[Any, ...]:
    """Emit an `onnx` node for `n`; the outputs are Values, or Opaque where they are no tensors."""
    nodes: list[NodeProto] = []
    tensors: dict[str, Value] = {}
    for name in needs(n):
        v = scope.lookup(name)
        if isinstance(v, Opaque):
            nodes += [m for m in v.nodes if not any(m is k for k in nodes)]
            tensors |= v.inputs
        else:
            tensors[name] = v
    nodes.append(n)
    n_fresh = scope.session.n_fresh
    types = _infer(scope, nodes, tensors, n, where)
    late = scope.session.n_fresh > n_fresh
    if not all(t is None or isinstance(t, Type) for t in types):
        group = Opaque(tuple(nodes), tensors, TypeProto())
        return tuple(
            Opaque(group.nodes, group.inputs, t)
            if isinstance(t, TypeProto)
            else _one(scope, nodes, tensors, n, i, t, reason, late)
            for i, t in enumerate(types)
        )
    kept = [t if t is not None else Type(DType.bool, ()) for t in types]
    names = list(n.output)
    return _node(scope, nodes, tensors, names, kept, reason, label(n), late)


def _one(
    scope: Scope, nodes: list[NodeProto], tensors: dict[str, Value], n: NodeProto, i: int, t: Any, reason: str,
    late: bool,
) -> Any:  # fmt: skip
    return None if t is None else _node(scope, nodes, tensors, [n.output[i]], [t], reason, label(n), late)[0]


def _node(
    scope: Scope,
    nodes: list[NodeProto],
    tensors: dict[str, Value],
    outputs: list[str],
    types: list[Type],
    reason: str,
    name: str,
    late: bool,
) -> tuple[Value, ...]:
    if len(nodes) == 1 and outputs == list(nodes[0].output):
        proto = nodes[0]
    else:
        group = GraphProto(name="group", node=nodes)
        group.output.extend(
            helper.make_tensor_value_info(o, data_type_of(t.dtype), None) for o, t in zip(outputs, types, strict=True)
        )
        cond = f"{outputs[0]}/always"
        tensors = {cond: scope.virtual(np.array([True], object).reshape(()), DType.bool), **tensors}
        proto = helper.make_node("If", [cond], outputs, name=name, then_branch=group, else_branch=group)
    attrs = {
        "node": proto.SerializeToString(),
        "opset": scope.session.model.opsets.get(proto.domain, scope.session.model.opsets[""]),
        "domain": proto.domain,
        "types": tuple(types),
        "names": tuple(tensors),
        "outputs": tuple(outputs),
        "default_opset": scope.session.model.opsets[""],
        "name": name,
        "reason": reason,
        "late": late,
    }
    return scope.builder.emit(OPS["onnx"], [scope.materialise(v) for v in tensors.values()], attrs)


def _infer(
    scope: Scope, nodes: list[NodeProto], tensors: dict[str, Value], n: NodeProto, where: str
) -> list[Type | TypeProto | None]:
    """Types of the outputs of `n`, from shape inference over `nodes`; unknown sizes get symbols of their own."""
    graph = GraphProto(name="infer", node=nodes)
    spelled: dict[str, Dim] = {}
    for name, v in tensors.items():
        shape = [d if isinstance(d, int) else _spell(d, spelled) for d in v.shape]
        graph.input.append(helper.make_tensor_value_info(name, data_type_of(v.dtype), shape))
        if v.data is not None and v.data.nbytes <= _INFERENCE_BYTES and v.dtype is not DType.string:
            graph.initializer.append(_tensor(v.data, name))
    imports = [helper.make_opsetid(d, k) for d, k in scope.session.model.opsets.items()]
    graph.output.extend(onnx.ValueInfoProto(name=o) for o in n.output if o)
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    try:
        # Inside a group types may be unknown, which strict inference takes for an error.
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True, strict_mode=len(nodes) == 1).graph
    except Exception as e:  # several kinds, all saying that the node does not fit its inputs
        text = next((line for line in str(e).splitlines() if "rror" in line), str(e)).strip()
        raise ModelError(f"its operands do not fit ({text[:300]})", where=where) from e
    found = {v.name: v.type for v in [*inferred.output, *inferred.value_info]}
    declared = {
        v.name: v.type for v in [*scope.session.model.proto.graph.value_info, *scope.session.model.proto.graph.output]
    }
    if n.domain == MICROSOFT and not all(_is_typed(declared.get(o)) for o in n.output if o):
        hint = "export the model with standard ONNX operators, or declare the types in its value_info"
        raise UnsupportedError(f"operator {n.op_type!r} of {n.domain} is unknown", where=where, hint=hint)
    rows = next((v.shape[0] for v in tensors.values() if v.rank), None) if n.domain == "ai.onnx.ml" else None
    return [None if not o else _type(scope, found.get(o), declared.get(o), o, spelled, rows, where) for o in n.output]


def _is_typed(t: TypeProto | None) -> bool:
    return t is not None and t.HasField("tensor_type") and t.tensor_type.HasField("shape")


def _spell(d: Dim, spelled: dict[str, Dim]) -> str:
    text = str(d)
    spelled[text] = d
    return text


def _tensor(data: np.ndarray, name: str) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(data).reshape(data.shape), name)


def _type(
    scope: Scope,
    t: TypeProto | None,
    declared: TypeProto | None,
    name: str,
    spelled: dict[str, Dim],
    rows: Dim | None,
    where: str,
) -> Type | TypeProto:
    """The type of one output.

    `rows` is the size of its first axis where inference leaves it open: the operators of ai.onnx.ml work row by row.
    """
    for candidate in (t, declared):
        if candidate is None or candidate.WhichOneof("value") is None:
            continue
        if not candidate.HasField("tensor_type"):
            return candidate
        tensor = candidate.tensor_type
        if not tensor.elem_type or not tensor.HasField("shape"):
            continue
        dims = [
            rows
            if i == 0 and rows is not None and not d.HasField("dim_value")
            else _dim(scope, d, f"{name}_{i}", spelled)
            for i, d in enumerate(tensor.shape.dim)
        ]
        return Type(dtype_of(tensor.elem_type, where), tuple(dims))
    return TypeProto() if t is None else t


def _dim(scope: Scope, d: Any, name: str, spelled: dict[str, Dim]) -> Dim:
    if d.HasField("dim_value"):
        return int(d.dim_value)
    if d.dim_param in spelled:
        return spelled[d.dim_param]
    return scope.session.fresh_symbol(name)
