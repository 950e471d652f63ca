"""Element-wise ops; operands of binary ops broadcast as in NumPy and have one dtype.

unary   neg abs sqrt exp log log1p expm1 erf sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh sigmoid floor
        ceil round (half to even) sign not bitnot isnan isinf relu silu
        gelu{approximate: "none"|"tanh"}  leaky_relu{alpha}  hard_sigmoid{alpha, beta}  hard_swish  clip{min, max:
        float|None}  cast{to: DType}
binary  add sub mul div (integers truncate toward zero)  mod{fmod: bool}  pow  max  min  eq ne lt le gt ge  and or xor
        bitand bitor bitxor shl shr
ternary where(cond, a, b)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vivace.base.dims import Dim
from vivace.base.dtypes import DType
from vivace.base.errors import GraphError
from vivace.graph.graph import Attrs, Op, Type
from vivace.graph.ops.shapes import broadcast, need

Array = np.ndarray


def _erf(x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[np.float64])(x.astype(np.float64)) if x.size else x


def _sigmoid(x: Array) -> Array:
    x = x.astype(np.float64)
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def _wide(fn: Callable[..., Array]) -> Callable[..., Array]:
    """Evaluate in f64 and round once: the reference is the correctly rounded value up to f64's own error."""

    def run(x: Array, **attrs: Any) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(fn(x.astype(np.float64), **attrs)).astype(x.dtype)

    return run


def _gelu(x: Array, approximate: str = "none") -> Array:
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _clip(x: Array, min: float | None = None, max: float | None = None) -> Array:
    if min is not None:
        x = np.maximum(x, x.dtype.type(min))
    if max is not None:
        x = np.minimum(x, x.dtype.type(max))
    return x


def _cast(x: Array, to: DType) -> Array:
    if x.dtype == to.numpy:
        return x
    with np.errstate(all="ignore"):
        if to is DType.bool:
            return x != 0
        return x.astype(to.numpy)


UNARY_FLOPS = {
    "exp": 8,
    "log": 8,
    "erf": 10,
    "sin": 8,
    "cos": 8,
    "tanh": 10,
    "sigmoid": 10,
    "gelu": 14,
    "silu": 11,
    "cast": 0,
}

_TRANSCENDENTAL: dict[str, Callable[..., Array]] = {
    "exp": np.exp,
    "log": np.log,
    "log1p": np.log1p,
    "expm1": np.expm1,
    "erf": _erf,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "sigmoid": _sigmoid,
    "gelu": _gelu,
    "silu": lambda x: x * _sigmoid(x),
}
# name -> (evaluate, exact, tolerance): transcendental tolerances are a few ulp of f32 (2^-23).
_UNARY: dict[str, tuple[Callable[..., Array], bool, float]] = {
    "neg": (np.negative, True, 0),
    "abs": (np.abs, True, 0),
    "sqrt": (np.sqrt, True, 0),
    **{name: (_wide(f), False, 5e-7) for name, f in _TRANSCENDENTAL.items()},
    "floor": (np.floor, True, 0),
    "ceil": (np.ceil, True, 0),
    "round": (np.rint, True, 0),
    "sign": (np.sign, True, 0),
    "not": (np.logical_not, True, 0),
    "bitnot": (np.bitwise_not, True, 0),
    "isnan": (np.isnan, True, 0),
    "isinf": (np.isinf, True, 0),
    "relu": (lambda x: np.maximum(x, x.dtype.type(0)), True, 0),
    "leaky_relu": (lambda x, alpha: np.where(x < 0, x * x.dtype.type(alpha), x), True, 0),
    "hard_sigmoid": (_wide(lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1)), False, 5e-7),
    "hard_swish": (_wide(lambda x: x * np.clip(x / 6 + 0.5, 0, 1)), False, 5e-7),
    "clip": (_clip, True, 0),
    "cast": (_cast, True, 0),
}  # fmt: skip


def _int_div(a: Array, b: Array) -> Array:
    if a.dtype == object:
        return a // b  # symbolic dims: never negative where models divide them
    if a.dtype.kind in "iu":
        with np.errstate(all="ignore"):
            q = a // np.where(b == 0, 1, b)
            q = q + ((a % np.where(b == 0, 1, b) != 0) & ((a < 0) != (b < 0)))
            return np.where(b == 0, 0, q).astype(a.dtype)
    with np.errstate(all="ignore"):
        return a / b


def _mod(a: Array, b: Array, fmod: bool = False) -> Array:
    with np.errstate(all="ignore"):
        return np.fmod(a, b) if fmod else np.mod(a, b)


def _pow(a: Array, b: Array) -> Array:
    with np.errstate(all="ignore"):
        if a.dtype.kind == "f":
            return np.power(a.astype(np.float64), b.astype(np.float64)).astype(a.dtype)
        return np.power(a.astype(np.float64), b).astype(a.dtype) if b.dtype.kind == "f" else np.power(a, b)


def _quiet(fn: Callable[..., Array]) -> Callable[..., Array]:
    def run(a: Array, b: Array) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(fn(a, b))

    return run


_BINARY: dict[str, Callable[..., Array]] = {
    "add": _quiet(np.add), "sub": _quiet(np.subtract), "mul": _quiet(np.multiply),
    "div": _int_div, "mod": _mod, "pow": _pow,
    "max": np.maximum, "min": np.minimum,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
    "bitand": np.bitwise_and, "bitor": np.bitwise_or, "bitxor": np.bitwise_xor,
    "shl": np.left_shift, "shr": np.right_shift,
}  # fmt: skip
COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
_LOGICAL = frozenset({"and", "or", "xor"})


def _unary_op(name: str, evaluate: Callable[..., Array], exact: bool, tolerance: float) -> Op:
    def infer(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
        x = need(types, 0, name)
        if name == "cast":
            return (Type(attrs["to"], x.shape),)
        return (Type(DType.bool, x.shape) if name in ("isnan", "isinf", "not") else x,)

    def run(arrays: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
        x = arrays[0]
        assert x is not None
        with np.errstate(all="ignore"):
            return (np.asarray(evaluate(x, **attrs)),)

    def flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
        return outs[0].size * UNARY_FLOPS.get(name, 1)

    return Op(name, infer, run, flops, exact, tolerance, "elementwise")


def _binary_op(name: str, evaluate: Callable[..., Array]) -> Op:
    def infer(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
        a, b = need(types, 0, name), need(types, 1, name)
        if a.dtype is not b.dtype:
            raise GraphError(f"operands have dtypes {a.dtype} and {b.dtype}", where=name, expected="one dtype")
        dtype = DType.bool if name in COMPARISONS or name in _LOGICAL else a.dtype
        return (Type(dtype, broadcast((a.shape, b.shape), name)),)

    def run(arrays: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
        a, b = arrays
        assert a is not None and b is not None
        out = np.asarray(evaluate(a, b, **attrs))
        keep = a.dtype == object or name in COMPARISONS or name in _LOGICAL
        return (out if keep else out.astype(a.dtype, copy=False),)

    def flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
        return outs[0].size * (20 if name == "pow" else 1)

    return Op(name, infer, run, flops, name != "pow", 1e-6 if name == "pow" else 0.0, "elementwise")


def _where_infer(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    c, a, b = (need(types, i, "where") for i in range(3))
    if c.dtype is not DType.bool or a.dtype is not b.dtype:
        raise GraphError(
            f"operands have dtypes {c.dtype}, {a.dtype}, {b.dtype}", where="where", expected="bool and one dtype twice"
        )
    return (Type(a.dtype, broadcast((c.shape, a.shape, b.shape), "where")),)


def _where_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    c, a, b = xs
    assert c is not None and a is not None and b is not None
    return (np.where(c, a, b),)


_WHERE = Op(
    "where",
    _where_infer,
    _where_run,
    lambda ins, outs, attrs: outs[0].size,
    kind="elementwise",
)

FAMILY = (
    *(_unary_op(n, f, e, t) for n, (f, e, t) in _UNARY.items()),
    *(_binary_op(n, f) for n, f in _BINARY.items()),
    _WHERE,
)
