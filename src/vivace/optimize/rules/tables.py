"""Functions of one byte as tables: whatever lies between the bytes of one tensor and bytes again, element by element.

    quantize(f(dequantize(q, s, z)), t, y) = lookup(q, [quantize(f(dequantize(i, s, z)), t, y) for i in all bytes])

for any f of element-wise nodes whose other operands are single constants. The table holds what the operators give one
after the other, so that nothing is rounded differently. Activations that exporters write in parts (hard swish, a scale
and a shift per tensor), each part quantized on its way, become one table.
"""

from __future__ import annotations

import numpy as np

from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.graph.ops.quantized import BYTES
from vivace.graph.rewrite import At, Example, Outcome, Rule, rule

Array = np.ndarray
F32 = np.float32
_MOST_NODES = 32


def _cone(root: Node, at: At) -> tuple[Value, list[Node]] | None:
    """The one tensor of bytes that `root` is a function of, element by element, and the nodes between, in order; None
    where there is no such tensor."""
    order: dict[Node, None] = {}
    leaves: dict[Value, None] = {}

    def visit(n: Node) -> bool:
        if n in order:
            return True
        operands = [v for v in n.inputs if v is not None]
        if n.op.kind != "elementwise" or len(order) >= _MOST_NODES or len(n.outputs) != 1:
            return False
        for v in operands:
            if v.data is not None:
                if v.data.size != 1:
                    return False
            elif v.shape != root.output.shape and v.type.size != 1:
                return False
            elif v.shape == root.output.shape and v.dtype in BYTES:
                leaves[v] = None
            elif (made := at.by(v)) is None or not visit(made):
                return False
        order[n] = None
        return True

    if not visit(root):
        return None
    while len(leaves) > 1:  # tables of the same bytes are looked through
        v = next((v for v in leaves if at.by(v, "lookup") is not None), None)
        if v is None:
            return None
        del leaves[v]
        inner = at.by(v, "lookup")
        assert inner is not None and inner.inputs[0] is not None
        leaves[inner.inputs[0]] = None
        order = {inner: None, **order}
    return (next(iter(leaves)), list(order)) if leaves else None


def _table(leaf: Value, nodes: list[Node]) -> Array:
    """What the nodes make of every byte, by its bits."""
    known: dict[Value, np.ndarray] = {leaf: np.arange(256, dtype=np.uint8).view(leaf.dtype.numpy)}
    for n in nodes:
        arrays = [known[v] if v.data is None else v.data.reshape(()) for v in n.inputs if v is not None]
        (known[n.output],) = n.op.evaluate(arrays, n.attrs)
    return known[nodes[-1].output]


def _example(e: Example, how: str) -> Value:
    q = e.x("i8[2,40]" if how == "signed" else "u8[2,40]")
    x = e.dequantize(q, e.const(F32(0.25)), e.const(np.asarray(7, q.dtype.numpy)))
    if how == "hard swish":
        middle = e.quantize(
            e.clip(e.add(x, e.const(F32(3))), min=0.0, max=6.0), e.const(F32(0.1)), e.const(np.uint8(0))
        )
        gate = e.dequantize(middle, e.const(F32(0.1)), e.const(np.uint8(0)))
        x = e.mul(x, gate)
    return e.quantize(e.mul(x, e.const(np.array([1.5], F32))), e.const(F32(0.4)), e.const(np.uint8(9)))


@rule(
    "quantize",
    examples=(
        lambda e: _example(e, "scale"),
        lambda e: _example(e, "signed"),
        lambda e: _example(e, "hard swish"),
    ),
)
def tabulate(n: Node, at: At) -> Outcome:
    """quantize(f(dequantize(q))) = lookup(q, table) for an element-wise f of constants"""
    if n.output.dtype not in BYTES:
        return None
    found = _cone(n, at)
    if found is None:
        return "it is no function of the bytes of one tensor"
    leaf, nodes = found
    return at.op.lookup(leaf, table=_table(leaf, nodes).tobytes().hex(), to=n.output.dtype)


def _example_twice(e: Example) -> Value:
    first, second = (e.random.bytes(256).hex() for _ in range(2))
    return e.lookup(e.lookup(e.x("u8[2,40]"), table=first, to=DType.u8), table=second, to=DType.u8)


@rule("lookup", examples=(_example_twice,))
def join_tables(n: Node, at: At) -> Outcome:
    """lookup(lookup(q, s), t) = lookup(q, t[s])"""
    inner = at.by(n.inputs[0], "lookup")
    if inner is None:
        return None
    first, second = (bytes.fromhex(m.attrs["table"]) for m in (inner, n))
    return at.op.lookup(inner.inputs[0], table=bytes(second[b] for b in first).hex(), to=n.attrs["to"])


RULES: tuple[Rule, ...] = (tabulate, join_tables)
