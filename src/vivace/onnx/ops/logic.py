"""Selection and control flow: Where, If."""

from __future__ import annotations

from vivace.graph.graph import Value
from vivace.onnx.call import Call, onnx_op


@onnx_op("Where", since=9)
def where(c: Call, cond: Value, a: Value, b: Value) -> Value:
    return c.where(cond, a, b)
