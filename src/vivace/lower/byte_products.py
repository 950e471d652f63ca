"""Products of two quantized values of which none is constant, such as those of attention, as products of bf16.

    before  matmul(dequantize(a, a_scale, a_zero), dequantize(b, b_scale, b_zero))
    after   matmul(widened(a - a_zero), widened(b - b_zero)) * (a_scale * b_scale)

A byte less its zero point is a whole number of at most 8 bits, which bf16 holds: products are exact, and so are their
sums below 2**24, from which on they round as sums of f32 do. Only where the CPU has instructions for products of bf16.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vivace.base.dtypes import DType
from vivace.base.machine import Isa
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Node, Value
from vivace.graph.ops.quantized import BYTES
from vivace.lower.arithmetic import choose_arithmetic
from vivace.lower.halves import is_pair_product

BF16, F32 = DType.bf16, DType.f32


def multiply_bytes_in_halves(graph: Graph, isa: Isa) -> Graph:
    """The graph with such products rewritten."""
    if choose_arithmetic(BF16, BF16, isa).kind in ("split16", "wide16"):
        return graph
    made = graph.producers()
    nodes: list[Node] = []
    for n in graph.nodes:
        factors = [made.get(x) if x is not None else None for x in n.inputs]
        if not is_pair_product(n) or not all(f is not None and _is_dequantize(f) for f in factors):
            nodes.append(n)
            continue
        b = Builder(n.origin, prefix=f"{n.outputs[0].name}_in_bf16")
        x, y = (_difference(b, f) for f in factors if f is not None)
        scales = [f.inputs[1].data for f in factors if f is not None and f.inputs[1] is not None]
        product = np.float32(np.prod([np.float64(s) for s in scales if s is not None]))
        b.mul(b.matmul(x, y), b.const(product))
        *before, last = b.nodes
        nodes += [*before, replace(last, outputs=n.outputs)]
    return replace(graph, nodes=tuple(nodes))


def _is_dequantize(n: Node) -> bool:
    """Whether bytes are dequantized by one known scale and zero point."""
    if n.op.name != "dequantize":
        return False
    q, *constants = n.inputs
    is_known = all(c is not None and c.data is not None and c.rank == 0 for c in constants)
    return q is not None and q.dtype in BYTES and is_known


def _difference(b: Builder, n: Node) -> Value:
    """q - zero, from memory in bf16."""
    q, _, zero = n.inputs
    assert q is not None and zero is not None and zero.data is not None
    whole = b.cast(q, to=F32)
    if zero.data != 0:
        whole = b.sub(whole, b.const(np.float32(zero.data)))
    return b.cast(b.cast(whole, to=BF16), to=F32)
