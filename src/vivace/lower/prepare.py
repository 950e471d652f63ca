"""Last rewrites before lowering, which make explicit what the kernels want.

* Pads become `pad` nodes, shared where equal.
* Products and softmax of half types are computed in f32: their operands are cast to it, their results back.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vivace.base.dims import Dim
from vivace.base.dtypes import DType
from vivace.graph.build import Builder, constant
from vivace.graph.graph import Graph, Node, Type, Value, freeze

_HALF = (DType.f16, DType.bf16)
_IN_F32 = frozenset({"matmul", "conv", "conv_transpose", "attention", "softmax", "log_softmax", "lstm", "gru", "rnn"})


def prepare(graph: Graph) -> Graph:
    """All of them."""
    return split_pads(widen_halves(graph))


def widen_halves(graph: Graph) -> Graph:
    """Before: matmul(a: f16, b: f16)    After: cast{to=@f16}(matmul(cast{to=@f32}(a), cast{to=@f32}(b)))"""
    nodes: list[Node] = []
    wide: dict[Value, Value] = {}
    for n in graph.nodes:
        if n.op.name not in _IN_F32 or all(v.dtype not in _HALF for v in n.outputs):
            nodes.append(n)
            continue
        b = Builder(n.origin, prefix=f"{n.outputs[0].name}_wide")
        for v in n.inputs:
            if v is None or v.dtype not in _HALF or v in wide:
                continue
            if v.data is not None:
                wide[v] = constant(v.data.astype(np.float32), v.name)
            else:
                wide[v] = b.cast(v, to=DType.f32)
        inputs = tuple(v if v is None else wide.get(v, v) for v in n.inputs)
        outputs = tuple(
            Value(f"{v.name}_f32", Type(DType.f32, v.shape)) if v.dtype in _HALF else v for v in n.outputs
        )
        nodes += [*b.nodes, replace(n, inputs=inputs, outputs=outputs)]
        for v, o in zip(n.outputs, outputs, strict=True):
            if v is not o:
                cast = Builder(n.origin)
                cast.cast(o, to=v.dtype)
                nodes.append(replace(cast.nodes[0], outputs=(v,)))
    return replace(graph, nodes=tuple(nodes))


def split_pads(graph: Graph) -> Graph:
    """Split the pads off convolutions and max pools, so that the producer can write into a padded buffer.

    Before: conv{before=(1,1), after=(1,1)}(x)    After: conv{before=(0,0), after=(0,0)}(pad(x))
    Average pools keep theirs: the divisor depends on them.
    """
    nodes: list[Node] = []
    padded: dict[object, Value] = {}
    for n in graph.nodes:
        pads: tuple[tuple[Dim, ...], tuple[Dim, ...]] = (n.attrs.get("before", ()), n.attrs.get("after", ()))
        if n.op.name in ("conv", "max_pool") and any(d != 0 for p in pads for d in p):
            x = n.inputs[0]
            assert x is not None
            spatial = slice(1, -1) if n.attrs["layout"] == "NHWC" else slice(2, None)
            before: list[Dim] = [0] * x.rank
            after: list[Dim] = [0] * x.rank
            before[spatial], after[spatial] = pads
            fill = float("-inf") if n.op.name == "max_pool" else 0.0
            if n.op.name == "max_pool" and not x.dtype.is_float:
                nodes.append(n)
                continue
            key = (x, tuple(before), tuple(after), fill)
            if key not in padded:
                b = Builder(n.origin, prefix=f"{x.name}_pad", count=len(padded))
                padded[key] = b.pad(x, before=tuple(before), after=tuple(after), mode="constant", value=fill)
                nodes += b.nodes
            zeros = (0,) * len(pads[0])
            n = replace(
                n, inputs=(padded[key], *n.inputs[1:]), attrs=freeze({**n.attrs, "before": zeros, "after": zeros})
            )
        nodes.append(n)
    return replace(graph, nodes=tuple(nodes))
