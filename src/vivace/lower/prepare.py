"""Last rewrites before lowering, which make explicit what the kernels want: pads become `pad` nodes, shared where equal."""

from __future__ import annotations

from dataclasses import replace

from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Node, Value, freeze


def prepare(graph: Graph) -> Graph:
    """Split the pads off convolutions and max pools, so that the producer can write into a padded buffer.

    Before: conv{before=(1,1), after=(1,1)}(x)    After: conv{before=(0,0), after=(0,0)}(pad(x))
    Average pools keep theirs: the divisor depends on them.
    """
    nodes: list[Node] = []
    padded: dict[object, Value] = {}
    for n in graph.nodes:
        pads = n.attrs.get("before"), n.attrs.get("after")
        if n.op.name in ("conv", "max_pool") and any(d != 0 for p in pads for d in p):
            x = n.inputs[0]
            assert x is not None
            spatial = slice(1, -1) if n.attrs["layout"] == "NHWC" else slice(2, None)
            before, after = [0] * x.rank, [0] * x.rank
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
