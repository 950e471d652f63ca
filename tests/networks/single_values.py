"""Functions of elements and of rows: arithmetic, reductions, norms, quantization. Each function draws one operator and
gives its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tests.networks.draw import Array, Draw

F32 = np.float32
SPECIAL = np.array(
    [0, -0.0, 1, -1, 0.5, -0.5, 1.5, 2.5, -2.5, 3.4e38, -3.4e38, 1e-40, np.inf, -np.inf, np.nan, 1e-7, 100, -100, 88.8,
     -88.8, 20, -20, 1e10, -1e10], F32,
)  # fmt: skip
UNARY = (
    "Abs", "Neg", "Sqrt", "Exp", "Log", "Erf", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Tanh",
    "Asinh", "Acosh", "Atanh", "Sigmoid", "Floor", "Ceil", "Round", "Sign", "Relu", "IsNaN", "IsInf", "Softplus",
    "Softsign", "Selu", "Celu", "Elu", "ThresholdedRelu", "LeakyRelu", "HardSigmoid", "HardSwish", "Mish", "Reciprocal",
    "Shrink", "Gelu",
)  # fmt: skip
BINARY = (
    "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mod", "And", "Or", "Xor", "Equal", "Greater", "Less",
    "GreaterOrEqual", "LessOrEqual", "PRelu", "Where", "BitShift", "Mean", "Sum",
)  # fmt: skip
SINCE = {"Mish": 18, "Gelu": 20, "HardSwish": 14, "LayerNormalization": 17, "GroupNormalization": 21,
         "RMSNormalization": 23}  # fmt: skip


def unary(d: Draw) -> Sequence[str]:
    op = d.random.choice(UNARY)
    d.opset = max(d.opset, SINCE.get(op, 0))
    more: dict[str, Any] = {}
    if op in ("Celu", "Elu", "ThresholdedRelu", "LeakyRelu"):
        more["alpha"] = d.pick(0.1, 1.0, 2.0)
    elif op == "Gelu":
        more["approximate"] = d.pick("none", "tanh")
    elif op == "Shrink":
        more = {"lambd": 0.7, "bias": 0.2}
    elif op == "IsInf":
        more = {"detect_negative": d.pick(0, 1), "detect_positive": d.pick(0, 1)}
    special = SPECIAL[np.abs(SPECIAL) < 1e3] if op in ("Sin", "Cos", "Tan") else SPECIAL
    x = np.concatenate([d.normal(d.size(1, 40)) * d.pick(1, 5), d.numbers.permutation(special)[: d.pick(0, 24)]])
    return [d.op(op, d.input(x.astype(F32)), **more)]


def binary(d: Draw) -> Sequence[str]:
    op = d.random.choice(BINARY)
    s = list(d.shape(d.size(0, 4), 1, 5))
    t = [1 if d.flip(0.3) else n for n in s][d.size(0, len(s)) :]
    if d.flip(0.3):
        s = [1 if d.flip(0.4) else n for n in s]
    dtype = d.pick(F32, F32, np.int32, np.int64)
    signs = d.pick(1, -1)
    match op:
        case "And" | "Or" | "Xor":
            return [d.op(op, d.x(*s, dtype=bool), d.x(*t, dtype=bool))]
        case "Where":
            return [d.op(op, d.x(*t, dtype=bool), d.x(*s, dtype=dtype), d.x(*t, dtype=dtype))]
        case "PRelu":
            slope = [1 if d.flip(0.3) else n for n in s][d.size(0, len(s)) :]  # broadcasts to the operand alone
            return [d.op(op, d.x(*s), d.x(*slope))]
        case "BitShift":
            a, b = (d.input(d.numbers.integers(0, n, shape).astype(np.uint32)) for n, shape in ((255, s), (31, t)))
            return [d.op(op, a, b, direction=d.pick("LEFT", "RIGHT"))]
        case "Mod" if dtype is F32:
            return [d.op(op, d.x(*s), d.input((d.numbers.random(t) + 0.5).astype(F32)), fmod=1)]
        case "Mod":
            return [d.op(op, d.x(*s, dtype=dtype), d.input(_divisors(d, t, signs, dtype)), fmod=d.pick(0, 1))]
        case "Div" if dtype is not F32:
            return [d.op(op, d.x(*s, dtype=dtype), d.input(_divisors(d, t, signs, dtype)))]
        case "Pow" if dtype is not F32:
            return [d.op(op, d.x(*s, dtype=dtype), d.input(d.numbers.integers(0, 4, t).astype(dtype)))]
        case "Pow":
            x = d.x(*s)
            by = d.either(d.numbers.choice((0, 1, 2, 3, 0.5, -1, -2, 1.5), t).astype(F32))
            return [d.op(op, d.op("Abs", x) if d.flip(0.6) else x, by)]
        case "Mean" | "Sum":
            dtype = F32
    return [d.op(op, d.x(*s, dtype=dtype), d.x(*t, dtype=dtype))]


def _divisors(d: Draw, shape: Sequence[int], sign: int, dtype: Any) -> Array:
    return np.asarray(d.numbers.integers(1, 9, shape) * sign).astype(dtype)


def clip(d: Draw) -> Sequence[str]:
    low, high = sorted(d.normal(2))
    ends = [d.either(F32(v)) if d.flip(0.7) else "" for v in (low, high)]
    return [d.op("Clip", d.x(*d.shape(2, 1, 9)), *ends)]


def cast(d: Draw) -> Sequence[str]:
    dtypes = {1: F32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16, 11: np.float64, 2: np.uint8, 3: np.int8,
              5: np.int16, 4: np.uint16, 12: np.uint32, 13: np.uint64}  # fmt: skip
    source, to = d.random.choice(list(dtypes)), d.random.choice(list(dtypes))
    x = np.clip(d.normal(20) * 50, -120, 120)  # what no type can hold is nobody's promise
    if {source, to} & {2, 4, 12, 13}:
        x = abs(x)
    return [d.op("Cast", d.input(x.astype(dtypes[source])), to=to)]


def softmax(d: Draw) -> Sequence[str]:
    d.opset, rank = d.pick(7, 11, 12, 13, 18), d.size(1, 4)
    axis = d.random.randint(-rank if d.opset >= 11 else 0, rank - 1)
    x = d.x(*d.shape(rank, 1, 9), scale=d.pick(1, 30))
    return [d.op(d.pick("Softmax", "LogSoftmax", "Hardmax"), x, axis=axis)]


def reduce(d: Draw) -> Sequence[str]:
    op = d.pick("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
    shape = d.shape(d.size(1, 4), 1, 9)
    axes, keep, x = d.axes(len(shape)), d.pick(0, 1), d.x(*shape)
    if op == "LogSum":
        x = d.op("Abs", x)
    if d.opset < 18 and op != "Sum":
        return [d.op(f"Reduce{op}", x, axes=axes or None, keepdims=keep)]
    if axes:
        return [d.op(f"Reduce{op}", x, d.ints(*axes), keepdims=keep)]
    return [d.op(f"Reduce{op}", x, keepdims=keep, noop_with_empty_axes=d.pick(0, 1))]


def argument(d: Draw) -> Sequence[str]:
    shape = d.shape(d.size(1, 4), 1, 9)
    x = d.input(d.numbers.integers(-2, 3, shape).astype(F32))
    more = {"keepdims": d.pick(0, 1), "select_last_index": d.pick(0, 1)}
    return [d.op(d.pick("ArgMax", "ArgMin"), x, axis=d.axis(len(shape)), **more)]


def norm(d: Draw) -> Sequence[str]:
    op = d.pick(
        "LayerNormalization", "InstanceNormalization", "BatchNormalization", "LRN", "MeanVarianceNormalization",
        "LpNormalization", "GroupNormalization", "RMSNormalization",
    )  # fmt: skip
    d.opset = max(d.opset, SINCE.get(op, 0))
    shape = d.shape(4)
    c = shape[1]
    match op:
        case "LayerNormalization" | "RMSNormalization":
            axis = d.axis(4)
            bias = d.weight(*shape[axis:]) if op[0] == "L" and d.flip(0.6) else ""
            x, scale = d.x(*shape), d.weight(*shape[axis:])
            return [d.op(op, x, scale, bias, axis=axis, epsilon=d.pick(1e-5, 1e-2))]
        case "InstanceNormalization":
            return [d.op(op, d.x(*shape), d.weight(c), d.weight(c))]
        case "GroupNormalization":
            groups = d.size(1, 3)
            c = groups * d.size(1, 3)
            return [d.op(op, d.x(shape[0], c, *shape[2:]), d.weight(c), d.weight(c), num_groups=groups)]
        case "BatchNormalization":
            shape = d.shape(d.size(2, 5), 1, 6)
            given = [d.const((d.numbers.random(shape[1]) + 0.3).astype(F32)) for _ in range(4)]
            return [d.op(op, d.x(*shape), *given)]
        case "LRN":
            return [d.op(op, d.x(*shape), size=d.pick(1, 3, 5), alpha=0.1, beta=0.6, bias=1.5)]
        case "MeanVarianceNormalization":
            return [d.op(op, d.x(3, 3, 4, 5), axes=d.pick([0, 2, 3], [1], [2, 3], None))]
    return [d.op(op, d.x(*shape), axis=d.axis(4), p=d.pick(1, 2))]


FAMILIES = (unary, binary, clip, cast, softmax, reduce, argument, norm)
