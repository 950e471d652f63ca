"""Where f32 arithmetic reads numbers that are stored in half precision, or as bytes.

A *widening* is a cast from bf16 or f16 to f32. In front of an element-wise node it fuses as any element-wise node does.
In front of the first operand of the ops below it is no step of its own either: their kernels load halves and convert
them in registers (`Lowering.operand`). A product of widened halves by constants that their type can hold is a product
of halves with f32 sums, which the CPU may have instructions for. Attention multiplies bf16, but no f16. Means and other
reductions convert bytes in the same way.
"""

from __future__ import annotations

import numpy as np

from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.graph.ops.quantized import BYTES

HALVES = (DType.f16, DType.bf16)
# Their kernels convert what they load, from either half type.
_CONVERTING = frozenset(
    {"layer_norm", "rms_norm", "softmax", "log_softmax", "max_pool", "avg_pool",
     "reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod"}
)  # fmt: skip
_CONVERTING_BYTES = frozenset({"avg_pool", "reduce_sum", "reduce_mean", "reduce_max", "reduce_min"})
LEAST_ROWS = 16  # one tile register full; packing reads and writes each element of B once
NARROW_RESULTS = 2  # per pixel and group: so few are computed along the taps (`rules/narrow.py`), in f32


def is_widening(n: Node) -> bool:
    """Whether a node is a cast from a half type to f32."""
    x = n.inputs[0] if n.inputs else None
    return n.op.name == "cast" and n.attrs["to"] is DType.f32 and x is not None and x.dtype in HALVES


def is_converted(n: Node) -> bool:
    """Whether a node is a cast to f32 that a kernel may apply to what it loads: of a half type, or of bytes."""
    x = n.inputs[0] if n.inputs else None
    return is_widening(n) or (n.op.name == "cast" and n.attrs["to"] is DType.f32 and x is not None and x.dtype in BYTES)


def reads_half(n: Node, operand: int, half: DType = DType.bf16) -> bool:
    """Whether the kernel of `n` can read an operand in a half type, or bytes, where the graph says f32."""
    x = n.inputs[operand]
    if x is None or n.outputs[0].dtype is not DType.f32:
        return False
    if n.op.name == "attention":
        return half is DType.bf16 and operand < 3
    if is_pair_product(n):
        return half is DType.bf16 and operand < 2
    if operand != 0:
        return False
    if half in BYTES:
        return n.op.name in _CONVERTING_BYTES
    if n.op.name in _CONVERTING:
        return True
    if len(n.inputs) < 2 or (w := n.inputs[1]) is None or w.data is None:
        return False
    match n.op.name:
        case "matmul_blocks":
            return half is DType.bf16
        case "matmul":
            return x.rank > 0 and isinstance(x.shape[-1], int) and _is_matrix(w)
        case "conv":
            groups = n.attrs["group"]
            return w.data.size > 0 and not (groups <= 4 and w.data.shape[0] // groups <= NARROW_RESULTS)
    return False


def is_pair_product(n: Node) -> bool:
    """Whether a node is a matrix product of two values that only show when the model runs, with rows enough to pay for
    packing the second one.
    """
    if n.op.name != "matmul" or (a := n.inputs[0]) is None or (b := n.inputs[1]) is None or b.data is not None:
        return False
    k = a.shape[-1] if a.rank > 1 else 0
    return isinstance(k, int) and k > 0 and b.rank > 1 and _rows_for_one(a, b) >= LEAST_ROWS


def _rows_for_one(a: Value, b: Value) -> int:
    """Rows of `a` that surely meet one matrix of `b`: those of its last matrices, where `b` has but one for them."""
    rows = 1
    for i in range(2, a.rank + 1):
        d = a.shape[-i]
        if not isinstance(d, int) or (2 < i <= b.rank and b.shape[-i] != 1):
            break
        rows *= d
    return rows


def is_depthwise(n: Node) -> bool:
    """Whether a node is a convolution of each channel by itself. Its kernel widens what it loads, and weights of it are
    never stored in half precision.
    """
    if n.op.name != "conv":
        return False
    x, w = n.inputs[:2]
    if x is None or w is None or w.data is None:
        return False
    channels = x.shape[-1 if n.attrs["layout"] == "NHWC" else 1]
    return bool(n.attrs["group"] == w.shape[0] == channels and w.shape[1] == 1)


def _is_matrix(w: Value) -> bool:
    assert w.data is not None
    return w.rank >= 2 and w.data.size > 0 and all(d == 1 for d in w.data.shape[:-2])


def rounded(data: np.ndarray, half: DType = DType.bf16) -> np.ndarray:
    """f32 numbers rounded to what a half type holds, still in f32."""
    with np.errstate(over="ignore"):
        return data.astype(half.numpy).astype(np.float32)


def holds(half: DType, data: np.ndarray) -> bool:
    """Whether a half type holds every one of these f32 numbers."""
    if half is DType.bf16:
        return not bool((np.ascontiguousarray(data, np.float32).view(np.uint32) & 0xFFFF).any())
    return np.array_equal(rounded(data, half), data, equal_nan=True)
