"""Weights with a scale per block or column stay packed in the products that read them; other dequantized constants are
folded.
"""

from __future__ import annotations

import numpy as np

from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.graph.ops.quantized import BYTES, RANGES
from vivace.graph.rewrite import At, Example, Outcome, rule
from vivace.optimize.rules.quantized_operands import F32, Array, example_weights

_BLOCKS_OF_COLUMNS = (256, 128, 64, 32)
"""Where a column has one scale: the largest blocks that kernels of few rows sum in integers, for few scales to read."""


def _example_blocks(e: Example, dtype: DType = DType.u4, turned: bool = False) -> Value:
    low, high = RANGES[dtype]
    q = e.const(e.random.integers(low, high + 1, (3, 2, 16) if turned else (2, 16, 3)).astype(dtype.numpy))
    small = (3, 2, 1) if turned else (2, 1, 3)
    scale = e.const(e.random.uniform(0.01, 0.02, small).astype(F32))
    zero = e.const(e.random.integers(low, high + 1, small).astype(dtype.numpy))
    w = e.reshape(e.dequantize(q, scale, zero), shape=(3, 32) if turned else (32, 3))
    return e.matmul(e.x("f32[2,32]"), e.transpose(w, perm=(1, 0)) if turned else w)


def _example_columns(e: Example, dtype: type, turned: bool = False) -> Value:
    w = example_weights(e, *((3, 32) if turned else (32, 3)), axis=0 if turned else 1, dtype=dtype)
    return e.matmul(e.x("f32[2,32]"), e.transpose(w, perm=(1, 0)) if turned else w)


@rule(
    "matmul",
    examples=(
        lambda e: _example_blocks(e),
        lambda e: _example_blocks(e, DType.i4, True),
        lambda e: _example_blocks(e, DType.i8),
        lambda e: _example_columns(e, np.int8),
        lambda e: _example_columns(e, np.uint8, True),
    ),
)
def keep_blocks_packed(n: Node, at: At) -> Outcome:
    """a @ dequantize(w) = matmul_blocks(a, w): weights stay as small as they are"""
    found = _blocks(n.inputs[1], at)
    if found is None or isinstance(found, str):
        return found
    if at.by(n.inputs[0], "dequantize") is not None:
        return None
    q, scale, zero, block = found
    made = (at.const(np.ascontiguousarray(v), name) for v, name in ((q, "levels"), (scale, "scale"), (zero, "zero")))
    return at.op.matmul_blocks(n.inputs[0], *made, block=block)


def _blocks(v: Value | None, at: At) -> tuple[Array, Array, Array, int] | str | None:
    """Constant weights [k, n] with scales per block of k: unsigned levels, scales, zero points, the size of a block."""
    turn = at.by(v, "transpose")
    last = turn.inputs[0] if turn is not None else v
    shaped = at.by(last, "reshape")
    m = at.by(shaped.inputs[0] if shaped is not None else last, "dequantize")
    if m is None or last is None or m.inputs[0] is None or m.inputs[0].dtype not in (*BYTES, DType.i4, DType.u4):
        return None
    if (turn is not None and turn.attrs["perm"] != (1, 0)) or last.rank != 2:
        return "the weights are no matrix"
    q, scale, zero = (x.data if x is not None else None for x in m.inputs)
    if q is None or scale is None or zero is None:
        return "the weights change at run time"
    matrix = (int(last.shape[0]), int(last.shape[1]))  # type: ignore[arg-type]
    parts = [np.broadcast_to(x, q.shape).reshape(matrix) for x in (q, scale, zero)]
    q, scale, zero = (x.T if turn is not None else x for x in parts)
    apart = (scale[1:] != scale[:-1]).any(axis=1) | (zero[1:] != zero[:-1]).any(axis=1)
    if apart.any():
        block = int(np.gcd.reduce(1 + np.flatnonzero(apart)))
    else:
        block = next((size for size in _BLOCKS_OF_COLUMNS if len(scale) % size == 0), 0)
    if not block:
        return f"{len(scale)} rows are no whole blocks"
    if block % 8:
        return f"blocks of {block} have no kernel"
    low = RANGES[m.inputs[0].dtype][0]  # -8 of i4 is level 0
    kind = DType.u8 if m.inputs[0].dtype in BYTES else DType.u4
    levels = (q.astype(np.int16) - low).astype(kind.numpy)
    return levels, scale[::block].astype(F32), zero[::block].astype(F32) - F32(low), block


@rule("dequantize", examples=(lambda e: e.add(e.x("f32[4,3]"), example_weights(e, 4, 3)),))
def fold_dequantized(n: Node, at: At) -> Outcome:
    """dequantize(constants) is computed at compile time, once no integer product wants the integers."""
    if any(v is None or v.data is None for v in n.inputs):
        return None
    (made,) = n.op.evaluate([v.data for v in n.inputs if v is not None], n.attrs)
    return at.const(np.ascontiguousarray(made).reshape(made.shape), n.output.name)
