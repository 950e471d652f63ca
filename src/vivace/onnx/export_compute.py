"""Writing ops that compute: element-wise, reductions, contractions (with Gemm), normalizations, pools, recurrent
layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.graph.graph import Node, Value
from vivace.graph.ops.reduction import lowest
from vivace.onnx.export_attention import key_transpose, write_attention
from vivace.onnx.export_integer import absorbed_below, is_integer_product, write_integer_product
from vivace.onnx.tensors import data_type_of
from vivace.onnx.writer import Writer

Write = Callable[[Writer, Node, list[str]], None]

PLAIN = {
    "neg": "Neg", "abs": "Abs", "sqrt": "Sqrt", "exp": "Exp", "log": "Log", "erf": "Erf", "sin": "Sin", "cos": "Cos",
    "tan": "Tan", "asin": "Asin", "acos": "Acos", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "tanh": "Tanh",
    "asinh": "Asinh", "acosh": "Acosh", "atanh": "Atanh", "sigmoid": "Sigmoid", "floor": "Floor", "ceil": "Ceil",
    "round": "Round", "sign": "Sign", "not": "Not", "bitnot": "BitwiseNot", "isnan": "IsNaN", "isinf": "IsInf",
    "relu": "Relu", "add": "Add", "sub": "Sub", "mul": "Mul", "pow": "Pow", "max": "Max", "min": "Min", "eq": "Equal",
    "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "and": "And", "or": "Or",
    "xor": "Xor", "bitand": "BitwiseAnd", "bitor": "BitwiseOr", "bitxor": "BitwiseXor", "where": "Where",
    "hard_swish": "HardSwish",
}  # fmt: skip


def _plain(w: Writer, n: Node, outs: list[str]) -> None:
    w.emit(PLAIN[n.op.name], [w.ref(v) for v in n.inputs], outs)


def _number(w: Writer, x: Value | None, value: float) -> str:
    """A scalar of x's dtype."""
    assert x is not None
    return w.const(np.asarray(value, x.dtype.numpy))


def _ne(w: Writer, n: Node, outs: list[str]) -> None:
    w.emit("Not", [w.emit("Equal", [w.ref(v) for v in n.inputs])], outs)


def _div(w: Writer, n: Node, outs: list[str]) -> None:
    a, b = n.inputs
    assert a is not None and b is not None
    if (
        a.data is not None
        and a.dtype.is_float
        and a.data.size == 1
        and a.data.reshape(-1)[0] == 1
        and b.type == n.output.type
    ):
        w.emit("Reciprocal", [w.ref(b)], outs)
    else:
        w.emit("Div", [w.ref(a), w.ref(b)], outs)


def _mod(w: Writer, n: Node, outs: list[str]) -> None:
    x, y = n.inputs
    if x is not None and x.dtype.is_float and not n.attrs.get("fmod", False):  # Mod takes floats with fmod only
        whole = w.emit("Floor", [w.emit("Div", [w.ref(x), w.ref(y)])])
        w.emit("Sub", [w.ref(x), w.emit("Mul", [whole, w.ref(y)])], outs)
        return
    w.emit("Mod", [w.ref(v) for v in n.inputs], outs, fmod=int(n.attrs.get("fmod", False)))


def _shift(w: Writer, n: Node, outs: list[str]) -> None:
    if n.output.dtype.is_signed:
        raise UnsupportedError(f"shifts of {n.output.dtype} are not in opset {w.opset}", where="export")
    w.emit("BitShift", [w.ref(v) for v in n.inputs], outs, direction="LEFT" if n.op.name == "shl" else "RIGHT")


def _log1p(w: Writer, n: Node, outs: list[str]) -> None:
    x = n.inputs[0]
    w.emit("Log", [w.emit("Add", [w.ref(x), _number(w, x, 1)])], outs)


def _expm1(w: Writer, n: Node, outs: list[str]) -> None:
    x = n.inputs[0]
    w.emit("Sub", [w.emit("Exp", [w.ref(x)]), _number(w, x, 1)], outs)


def _silu(w: Writer, n: Node, outs: list[str]) -> None:
    x = w.ref(n.inputs[0])
    w.emit("Mul", [x, w.emit("Sigmoid", [x])], outs)


def _gelu(w: Writer, n: Node, outs: list[str]) -> None:
    v = n.inputs[0]
    x, tanh = w.ref(v), n.attrs["approximate"] == "tanh"
    if w.opset >= 20:
        w.emit("Gelu", [x], outs, approximate="tanh" if tanh else None)
        return
    if tanh:
        cube = w.emit("Pow", [x, _number(w, v, 3)])
        inner = w.emit("Add", [x, w.emit("Mul", [cube, _number(w, v, 0.044715)])])
        curve = w.emit("Tanh", [w.emit("Mul", [inner, _number(w, v, np.sqrt(2 / np.pi))])])
    else:
        curve = w.emit("Erf", [w.emit("Div", [x, _number(w, v, np.sqrt(2))])])
    half = w.emit("Mul", [x, w.emit("Add", [curve, _number(w, v, 1)])])
    w.emit("Mul", [half, _number(w, v, 0.5)], outs)


def _leaky_relu(w: Writer, n: Node, outs: list[str]) -> None:
    w.emit("LeakyRelu", [w.ref(n.inputs[0])], outs, alpha=n.attrs["alpha"])


def _hard_sigmoid(w: Writer, n: Node, outs: list[str]) -> None:
    w.emit("HardSigmoid", [w.ref(n.inputs[0])], outs, alpha=n.attrs["alpha"], beta=n.attrs["beta"])


def _clip(w: Writer, n: Node, outs: list[str]) -> None:
    x = n.inputs[0]
    low, high = (n.attrs.get(k) for k in ("min", "max"))
    w.emit(
        "Clip", [w.ref(x), "" if low is None else _number(w, x, low), "" if high is None else _number(w, x, high)], outs
    )


def _cast(w: Writer, n: Node, outs: list[str]) -> None:
    w.emit("Cast", [w.ref(n.inputs[0])], outs, to=data_type_of(n.attrs["to"]))


_REDUCTIONS = {"sum": "ReduceSum", "max": "ReduceMax", "min": "ReduceMin", "prod": "ReduceProd", "mean": "ReduceMean"}


def _reduce(w: Writer, n: Node, outs: list[str]) -> None:
    axes, keep = n.attrs["axes"], int(n.attrs["keepdims"])
    op = _REDUCTIONS[n.op.name.removeprefix("reduce_")]
    if not axes:
        w.emit("Identity", [w.ref(n.inputs[0])], outs)
        return
    w.emit(op, [w.ref(n.inputs[0]), w.const(list(axes), "axes")], outs, keepdims=keep)


def _arg(w: Writer, n: Node, outs: list[str]) -> None:
    a = n.attrs
    op = {"argmax": "ArgMax", "argmin": "ArgMin"}[n.op.name]
    w.emit(
        op,
        [w.ref(n.inputs[0])],
        outs,
        axis=a["axis"],
        keepdims=int(a["keepdims"]),
        select_last_index=int(a["select_last"]),
    )


def _cumsum(w: Writer, n: Node, outs: list[str]) -> None:
    a = n.attrs
    axis = w.const(np.int64(a["axis"]), "axis")
    w.emit("CumSum", [w.ref(n.inputs[0]), axis], outs, exclusive=int(a["exclusive"]), reverse=int(a["reverse"]))


# ---- contractions ----


def _turned(w: Writer, v: Value | None) -> Node | None:
    """The transpose of a matrix that only this operand needs."""
    return w.by(v, "transpose") if v is not None and v.rank == 2 else None


def _is_gemm(n: Node) -> bool:
    a, b = n.inputs
    return a is not None and b is not None and a.rank == b.rank == 2 and a.dtype in (DType.f32, DType.f64, DType.f16)


def _gemm_below(w: Writer, n: Node) -> tuple[Node, Value] | None:
    """The product and the constant that an `add` joins into one Gemm."""
    a, b = n.inputs
    m = w.by(a, "matmul")
    if m is None or b is None or b.data is None or not _is_gemm(m) or b.rank > 2 or m.output.type != n.output.type:
        return None
    return m, b


def absorbed(w: Writer, n: Node) -> list[Node]:
    """The nodes that `n` is written together with."""
    if is_integer_product(n):
        return absorbed_below(w, n)
    if n.op.name == "attention":
        return [t for t in [key_transpose(w, n)] if t is not None]
    if n.op.name == "matmul" and _is_gemm(n):
        return [t for v in n.inputs if (t := _turned(w, v)) is not None]
    found = _gemm_below(w, n) if n.op.name == "add" else None
    return [found[0]] if found is not None else []


def _write_gemm(w: Writer, m: Node, bias: Value | None, outs: list[str]) -> None:
    turned = [_turned(w, v) for v in m.inputs]
    a, b = (w.ref(v if t is None else t.inputs[0]) for v, t in zip(m.inputs, turned))
    flags = [int(t is not None) for t in turned]
    w.emit("Gemm", [a, b, w.ref(bias)], outs, transA=flags[0] or None, transB=flags[1] or None)


def _matmul(w: Writer, n: Node, outs: list[str]) -> None:
    if is_integer_product(n):
        write_integer_product(w, n, outs, {})
    elif _is_gemm(n) and any(_turned(w, v) for v in n.inputs):
        _write_gemm(w, n, None, outs)
    else:
        w.emit("MatMul", [w.ref(v) for v in n.inputs], outs)


def _add(w: Writer, n: Node, outs: list[str]) -> None:
    found = _gemm_below(w, n)
    if found is None:
        _plain(w, n, outs)
    else:
        _write_gemm(w, found[0], found[1], outs)


def _pads(n: Node) -> list[int]:
    pads = [*n.attrs["before"], *n.attrs["after"]]
    if n.attrs["layout"] != "NCHW":
        raise UnsupportedError(
            f"{n.op.name} has layout {n.attrs['layout']}", where="export", hint="optimize up to level extended (2)"
        )
    if not all(isinstance(p, int) for p in pads):
        raise UnsupportedError(f"{n.op.name} has symbolic pads {pads}", where="export", hint="fix the input shapes")
    return pads


def _padded(w: Writer, n: Node, value: float) -> tuple[str, list[int]]:
    """What a window slides over, and its pads; those that depend on sizes are a Pad of their own."""
    x, pads = n.inputs[0], [*n.attrs["before"], *n.attrs["after"]]
    assert x is not None
    if n.attrs["layout"] != "NCHW" or all(isinstance(p, int) for p in pads):
        return w.ref(x), _pads(n)
    return w.emit("Pad", [w.ref(x), _around(w, n), _number(w, x, value)]), [0] * len(pads)


def _around(w: Writer, n: Node) -> str:
    return w.shape([0, 0, *n.attrs["before"], 0, 0, *n.attrs["after"]])


def _conv(w: Writer, n: Node, outs: list[str]) -> None:
    a = n.attrs
    window: dict[str, Any] = {k: list(a[k]) for k in ("strides", "dilations")} | {"group": a["group"]}
    if is_integer_product(n):
        write_integer_product(w, n, outs, window | {"pads": _pads(n)})
    elif n.op.name == "conv":
        x, pads = _padded(w, n, 0)
        w.emit("Conv", [x, *(w.ref(v) for v in n.inputs[1:])], outs, pads=pads, **window)
    else:
        _conv_transpose(w, n, outs, _pads(n), window | {"output_padding": list(a["output_padding"])})


def _conv_transpose(w: Writer, n: Node, outs: list[str], pads: list[int], window: dict[str, Any]) -> None:
    """A negative crop adds zeros (or the bias) around the result, which takes a Pad of its own."""
    ins, grown = [w.ref(v) for v in n.inputs], [max(-p, 0) for p in pads]
    if not any(grown):
        w.emit("ConvTranspose", ins, outs, pads=pads, **window)
        return
    bias = ins.pop() if len(ins) > 2 else ""
    half = len(pads) // 2
    around = [0, 0, *grown[:half], 0, 0, *grown[half:]]
    small = w.emit("ConvTranspose", ins, pads=[max(p, 0) for p in pads], **window)
    wide = w.emit("Pad", [small, w.const(around, "pads")], "" if bias else outs)
    if bias:
        w.emit("Add", [wide, w.emit("Reshape", [bias, w.const([1, -1, *[1] * half], "shape")])], outs)


def _pool(w: Writer, n: Node, outs: list[str]) -> None:
    a, x, is_mean = n.attrs, n.inputs[0], n.op.name == "avg_pool"
    assert x is not None
    over, pads = _padded(w, n, 0 if is_mean else lowest(x.dtype.numpy))
    window: dict[str, Any] = {
        "kernel_shape": list(a["kernel"]),
        "strides": list(a["strides"]),
        "dilations": list(a["dilations"]) if any(d != 1 for d in a["dilations"]) else None,
        "pads": pads,
    }
    if not is_mean:
        w.emit("MaxPool", [over], outs, **window)
    elif over == w.ref(x) or a["count_include_pad"]:
        w.emit("AveragePool", [over], outs, **window, count_include_pad=int(a["count_include_pad"]))
    else:  # the mean of all cells, over the share of those that count
        ones = w.emit("Expand", [_number(w, x, 1), w.shape(x.shape)])
        share = w.emit("AveragePool", [w.emit("Pad", [ones, _around(w, n)])], **window)
        w.emit("Div", [w.emit("AveragePool", [over], **window), share], outs)


# ---- normalizations ----


def _softmax(w: Writer, n: Node, outs: list[str]) -> None:
    w.emit(
        {"softmax": "Softmax", "log_softmax": "LogSoftmax"}[n.op.name], [w.ref(n.inputs[0])], outs, axis=n.attrs["axis"]
    )


def _whole(w: Writer, n: Node, i: int, default: float) -> str:
    """Scale or bias in the full shape of the normalized axes, which runtimes insist on."""
    x, v = n.inputs[0], n.inputs[i] if i < len(n.inputs) else None
    assert x is not None
    tail = x.shape[n.attrs["axis"] % x.rank :]
    fixed = tuple(d for d in tail if isinstance(d, int))
    if v is not None and v.shape == tail:
        return w.ref(v)
    if len(fixed) == len(tail) and (v is None or v.data is not None):
        data = np.asarray(default, x.dtype.numpy) if v is None or v.data is None else v.data
        return w.const(np.ascontiguousarray(np.broadcast_to(data, fixed)), "scale")
    return w.emit("Expand", [_number(w, x, default) if v is None else w.ref(v), w.shape(tail)])


def _layer_norm(w: Writer, n: Node, outs: list[str]) -> None:
    a = n.attrs
    ins = [w.ref(n.inputs[0]), _whole(w, n, 1, 1.0)]
    if len(n.inputs) > 2:
        ins.append(_whole(w, n, 2, 0.0))
    w.emit("LayerNormalization", ins, outs, axis=a["axis"], epsilon=a["epsilon"])


def _rms_norm(w: Writer, n: Node, outs: list[str]) -> None:
    v, a = n.inputs[0], n.attrs
    assert v is not None
    x = w.ref(v)
    if w.opset >= 23:
        w.emit("RMSNormalization", [x, _whole(w, n, 1, 1.0)], outs, axis=a["axis"], epsilon=a["epsilon"])
        return
    axes = w.const(list(range(a["axis"] % v.rank, v.rank)), "axes")
    mean = w.emit("ReduceMean", [w.emit("Pow", [x, _number(w, v, 2)]), axes], keepdims=1)
    root = w.emit("Sqrt", [w.emit("Add", [mean, _number(w, v, a["epsilon"])])])
    if len(n.inputs) > 1 and n.inputs[1] is not None:
        w.emit("Mul", [w.emit("Div", [x, root]), w.ref(n.inputs[1])], outs)
    else:
        w.emit("Div", [x, root], outs)


def _recurrent(w: Writer, n: Node, outs: list[str]) -> None:
    a = n.attrs
    more: dict[str, Any] = {"input_forget": int(a["input_forget"])} if n.op.name == "lstm" else {}
    if n.op.name == "gru":
        more = {"linear_before_reset": int(a["linear_before_reset"])}
    w.emit(
        n.op.name.upper(), [w.ref(v) for v in n.inputs], outs, direction=a["direction"], hidden_size=a["hidden"],
        activations=list(a["activations"]), clip=a["clip"], layout=a["layout"] or None, **more,
    )  # fmt: skip


WRITERS: dict[str, Write] = {
    **dict.fromkeys(PLAIN, _plain),
    "add": _add,
    "ne": _ne,
    "div": _div,
    "mod": _mod,
    "shl": _shift,
    "shr": _shift,
    "log1p": _log1p,
    "expm1": _expm1,
    "silu": _silu,
    "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "hard_sigmoid": _hard_sigmoid,
    "clip": _clip,
    "cast": _cast,
    **{f"reduce_{k}": _reduce for k in _REDUCTIONS},
    "argmax": _arg,
    "argmin": _arg,
    "cumsum": _cumsum,
    "matmul": _matmul,
    "conv": _conv,
    "conv_transpose": _conv,
    "max_pool": _pool,
    "avg_pool": _pool,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "attention": write_attention,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn": _recurrent,
}
