"""Writing i32 products of 8-bit operands: ConvInteger and MatMulInteger, which take the bytes and a zero point.

conv(cast(x8) - zero, w)    the weights are constant and fit 8 bits again
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.graph.graph import Node, Value
from vivace.graph.rewrite import scalar
from vivace.onnx.writer import Writer

BYTES = (DType.u8, DType.i8)


def _bytes_below(w: Writer, v: Value | None) -> tuple[Value, int, list[Node]] | None:
    """The 8-bit tensor, its zero point, and the nodes between it and `v`, which nothing else may need."""
    zero, between = 0, []
    n = w.by(v, "add", "sub", "cast")
    if n is not None and n.op.name != "cast":
        c = scalar(n.inputs[1])
        if not isinstance(c, int):
            return None
        zero = c if n.op.name == "sub" else -c
        between.append(n)
        n = w.by(n.inputs[0], "cast")
    if n is None or n.inputs[0] is None or n.inputs[0].dtype not in BYTES:
        return None
    x = n.inputs[0]
    limits = np.iinfo(x.dtype.numpy)
    return (x, zero, [*between, n]) if limits.min <= zero <= limits.max else None


def _bytes_of(v: Value | None) -> np.ndarray | None:
    """A constant as 8-bit numbers, where it fits."""
    if v is None or v.data is None:
        return None
    low, high = (int(v.data.min()), int(v.data.max())) if v.data.size else (0, 0)
    for dtype in (np.int8, np.uint8):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return v.data.astype(dtype)
    return None


def is_integer_product(n: Node) -> bool:
    return n.op.name in ("conv", "matmul") and n.output.dtype is DType.i32


def absorbed_below(w: Writer, n: Node) -> list[Node]:
    """The nodes that make i32 of the bytes, when `n` takes the bytes themselves."""
    found = _bytes_below(w, n.inputs[0]) if _bytes_of(n.inputs[1]) is not None else None
    return found[2] if found is not None else []


def write_integer_product(w: Writer, n: Node, outs: list[str], window: dict[str, Any]) -> None:
    """ConvInteger or MatMulInteger. Raises: UnsupportedError for a convolution of numbers that are not bytes."""
    found, weights = _bytes_below(w, n.inputs[0]), _bytes_of(n.inputs[1])
    if found is None or weights is None:
        if n.op.name == "conv":
            raise UnsupportedError("a convolution of i32 has no ONNX form", where="export", expected="8-bit operands")
        w.emit("MatMul", [w.ref(v) for v in n.inputs], outs)
        return
    x, zero, _ = found
    args = [w.ref(x), w.const(weights, "weight"), w.const(np.asarray(zero, x.dtype.numpy), "zero") if zero else ""]
    bias = n.inputs[2] if len(n.inputs) > 2 else None
    op = "ConvInteger" if n.op.name == "conv" else "MatMulInteger"
    product = w.emit(op, args, outs if bias is None else "", **window)
    if bias is not None:
        column = w.emit("Reshape", [w.ref(bias), w.const([1, -1, *[1] * (n.output.rank - 2)], "shape")])
        w.emit("Add", [product, column], outs)
