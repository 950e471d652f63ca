"""How large the elements of a value can be, where constants and integer types say so.

What is known to stay far from the limits of i32 can be rounded to integers first and clipped then, by the instruction
that narrows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from vivace.base.dims import prod
from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.graph.ops.quantized import RANGES

BOUNDED = 2.0**30
_SAME = frozenset({"relu", "round", "neg", "abs", "reshape", "transpose", "expand", "slice"})
_AT_MOST_1 = frozenset({"softmax", "sigmoid", "tanh", "erf", "sin", "cos"})


def magnitude(v: Value | None, producer: Mapping[Value, Node]) -> float:
    """A bound on |v| without NaN; infinite where none is known."""
    if v is None:
        return math.inf
    if v.data is not None:
        largest = float(np.abs(v.data.astype(np.float64)).max()) if v.data.size else 0.0
        return largest if largest == largest else math.inf
    n = producer.get(v)
    if n is None:
        return math.inf
    name, ins = n.op.name, n.inputs
    if name in _AT_MOST_1:
        return 1.001
    if name in _SAME:
        return magnitude(ins[0], producer)
    match name:
        case "conv_integer" | "matmul_integer":
            return _sums(n)
        case "cast" if n.attrs["to"] is DType.f32:
            return magnitude(ins[0], producer)
        case "dequantize" if ins[0] is not None and ins[0].dtype in RANGES:
            low, high = RANGES[ins[0].dtype]
            return (high - low) * magnitude(ins[1], producer)
        case "add" | "sub":
            return magnitude(ins[0], producer) + magnitude(ins[1], producer)
        case "mul":
            factors = [magnitude(x, producer) for x in ins]
            return 0.0 if 0.0 in factors and all(map(math.isfinite, factors)) else math.prod(factors)
        case "layer_norm":
            return _norm(n, producer)
        case "clip" if n.attrs.get("min") is not None and n.attrs.get("max") is not None:
            return max(abs(n.attrs["min"]), abs(n.attrs["max"]))
    return math.inf


def _norm(n: Node, producer: Mapping[Value, Node]) -> float:
    """A number less the mean of n is at most sqrt(n - 1) deviations."""
    x, *rest = n.inputs
    assert x is not None
    size = prod(x.shape[n.attrs["axis"] % x.rank :])
    if not isinstance(size, int):
        return math.inf
    scale, bias = (*rest, None, None)[:2]
    most = 1.01 * math.sqrt(size) * (1.0 if scale is None else magnitude(scale, producer))
    return most + (0.0 if bias is None else magnitude(bias, producer))


def _sums(n: Node) -> float:
    """Of integer products: all operands extreme."""
    w, bias = n.inputs[1], n.inputs[3] if len(n.inputs) > 3 else None
    if w is None or w.data is None or (bias is not None and bias.data is None):
        return math.inf
    is_conv = n.op.name == "conv_integer"
    depth = int(np.prod(w.data.shape[1:] if is_conv else w.data.shape[-2:-1]))
    return depth * 255.0 * 128.0 + (magnitude(bias, {}) if bias is not None else 0.0)
