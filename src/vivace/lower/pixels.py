"""The first convolution of a network reads 3 channels of bytes, no whole group of any product: it is given four.

Before: conv_integer(transpose(quantize(x, s, z)), w, z)    After: conv_integer(pixels(x, s, z), w with zeros, z)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vivace.graph.build import Builder, constant
from vivace.graph.graph import Graph, Node, Value
from vivace.graph.ops.quantized import BYTES, PIXEL_BYTES

_TO_LAST = (0, 2, 3, 1)


def widen_pixels(graph: Graph) -> Graph:
    """The rewrite, for images that nothing else reads."""
    users, producer, outputs = graph.users(), graph.producers(), set(graph.outputs)
    nodes: list[Node] = []
    for n in graph.nodes:
        source = _source(n, producer)
        if source is None or any(len(users[v]) != 1 or v in outputs for v in (n.inputs[0], source.outputs[0]) if v):
            nodes.append(n)
            continue
        x, scale, zero = source.inputs
        w = n.inputs[1]
        assert x is not None and scale is not None and zero is not None and w is not None and w.data is not None
        b = Builder((*source.origin, *n.origin[:1]), prefix=f"{source.outputs[0].name}_pixels")
        words = b.pixels(x, scale, zero)
        missing = ((0, 0), (0, PIXEL_BYTES - w.data.shape[1]), (0, 0), (0, 0))
        weights = constant(np.pad(w.data, missing), w.name)
        nodes += [*b.nodes, replace(n, inputs=(words, weights, *n.inputs[2:]))]
    return replace(graph, nodes=tuple(nodes))


def _source(n: Node, producer: dict[Value, Node]) -> Node | None:
    """The quantize node whose bytes a first convolution reads."""
    if n.op.name != "conv_integer" or n.attrs["layout"] != "NHWC" or n.attrs["group"] != 1:
        return None
    x, w = n.inputs[0], n.inputs[1]
    turn = producer.get(x) if x is not None and x.rank == 4 and x.shape[3] == PIXEL_BYTES - 1 else None
    if turn is None or turn.op.name != "transpose" or turn.attrs["perm"] != _TO_LAST or w is None or w.data is None:
        return None
    source = producer.get(turn.inputs[0]) if turn.inputs[0] is not None else None
    if source is None or source.op.name != "quantize" or source.outputs[0].dtype not in BYTES:
        return None
    is_single = all(v is not None and v.data is not None and v.data.size == 1 for v in source.inputs[1:])
    return source if is_single else None
