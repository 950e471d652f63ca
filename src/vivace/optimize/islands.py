"""Which nodes of a quantized model broke a chain of integers, and why.

An *island* is a node that computes in f32 what came from integers, and whose result becomes integers again.
Element-wise nodes are none: they run on what is in registers, between the integers of their neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping

from vivace.base.dtypes import DType
from vivace.graph.graph import Graph, Node, Value
from vivace.graph.ops.quantized import BYTES

_PASSES = frozenset({"elementwise", "movement"})
_BECAUSE = {
    "softmax": "softmax is computed in f32",
    "log_softmax": "softmax is computed in f32",
    "layer_norm": "normalization is computed in f32",
    "rms_norm": "normalization is computed in f32",
    "reduce_mean": "means of what is not bytes of one scale are computed in f32",
    "avg_pool": "means of what is not bytes of one scale, or with padding that counts, are computed in f32",
    "attention": "attention is computed in f32",
    "reduce_max": "maxima over axes are taken in f32",
    "reduce_min": "minima over axes are taken in f32",
    "conv_transpose": "transposed convolutions are computed in f32",
    "resize": "interpolation is computed in f32",
}


def float_islands(graph: Graph) -> dict[str, str]:
    """The reason for each island of an optimized graph, by the name of the ONNX node; empty for a graph of floats."""
    quantized = {n for n in graph.nodes if n.op.name in ("dequantize", "conv_integer", "matmul_integer")}
    if not quantized:
        return {}
    from_integers: set[Value] = set()
    for n in graph.nodes:
        if n in quantized or any(v in from_integers for v in n.inputs if v is not None):
            from_integers.update(n.outputs)
    to_integers: set[Value] = set()
    for n in reversed(graph.nodes):
        if n.op.name == "quantize" or any(v in to_integers for v in n.outputs):
            to_integers.update(v for v in n.inputs if v is not None)
    producer = graph.producers()
    found: dict[str, str] = {}
    for n in graph.nodes:
        is_island = n.op.kind not in _PASSES and n.outputs[0].dtype is DType.f32 and n not in quantized
        if not is_island or n.outputs[0] not in to_integers or _reads_bytes(n, producer):
            continue
        if any(v in from_integers for v in n.inputs if v is not None):
            name = next((o for o in n.origin if not o.startswith("+")), n.outputs[0].name)
            found[name] = f"f32 between integers: {_because(n)}"
    return found


def _reads_bytes(n: Node, producer: Mapping[Value, Node]) -> bool:
    """Whether a mean is one of bytes: its sums are integers, whatever they are summed in."""
    cast = producer.get(n.inputs[0]) if n.op.name in ("reduce_mean", "avg_pool") and n.inputs[0] is not None else None
    return cast is not None and cast.op.name == "cast" and cast.inputs[0] is not None and cast.inputs[0].dtype in BYTES


def _because(n: Node) -> str:
    name = n.op.name
    if name in ("conv", "matmul"):
        w = n.inputs[1]
        if w is None or w.data is None:
            return "both operands of the product change at run time"
        return "its operands are not both 8-bit with one scale, or i8 cannot hold the weights less their zero point"
    return _BECAUSE.get(name, f"{name} has no integer form")
