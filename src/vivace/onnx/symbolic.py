"""Shape arithmetic: run core ops on arrays of dims.

The contents of a small tensor whose elements are known integer expressions are held as an object array of `Dim`
(integers and bools) or `Ratio` (floats that are a dim over an integer, as `Cast(Shape) * 0.5` gives). `evaluate` runs a
core op on such arrays; it returns None where the result cannot be stated, such as a comparison that depends on the
value of a symbol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from vivace.base.dims import Dim, Expr, bounds, ceildiv, exact_div, floordiv, maximum, minimum, substitute
from vivace.base.dtypes import DType
from vivace.graph.graph import Attrs, Op

Array = np.ndarray
MAX_ELEMENTS = 4096
_MAX_DENOMINATOR = 1 << 16


@dataclass(frozen=True, slots=True)
class Ratio:
    """A float that is `num / den` exactly, with den > 0."""

    num: Dim
    den: int = 1


class Unknown(Exception):
    """The result depends on the value of a symbol."""


def value_of(r: Ratio) -> float | None:
    """The number that a ratio is, or None when a symbol is in it."""
    return None if isinstance(r.num, Expr) else r.num / r.den


def is_symbolic(array: Array) -> bool:
    return array.dtype == object and any(
        isinstance(e, Expr) or (isinstance(e, Ratio) and isinstance(e.num, Expr)) for e in array.flat
    )


def to_object(data: Array) -> Array:
    """A constant as an object array of Python numbers; floats become ratios. Raises: Unknown."""
    if data.dtype.kind in "iub":
        return data.astype(object)
    if data.dtype.kind == "O":
        return data
    return _map(_ratio, data.astype(np.float64).astype(object))


def _ratio(x: float) -> Ratio:
    if not np.isfinite(x):
        raise Unknown
    f = Fraction(x)
    if f.denominator > _MAX_DENOMINATOR:
        raise Unknown
    return Ratio(f.numerator, f.denominator)


def to_numbers(array: Array, dtype: DType) -> Array:
    """An object array without symbols as an array of its dtype."""
    plain = [value_of(e) if isinstance(e, Ratio) else e for e in array.flat]
    return np.array(plain, dtype=dtype.numpy).reshape(array.shape)


def substitute_array(array: Array, env: dict[str, Dim]) -> Array:
    return _map(lambda e: Ratio(substitute(e.num, env), e.den) if isinstance(e, Ratio) else substitute(e, env), array)


def _map(fn: Callable[..., Any], *arrays: Array) -> Array:
    """`fn` element by element, broadcast, into an object array."""
    broadcast = np.broadcast_arrays(*arrays)
    out = np.empty(broadcast[0].shape, object)
    for i in np.ndindex(out.shape):
        out[i] = fn(*(a[i] for a in broadcast))
    return out


def _lift(x: Any) -> Ratio:
    return x if isinstance(x, Ratio) else Ratio(x)


def _arithmetic(name: str) -> Callable[[Any, Any], Any]:
    def run(a: Any, b: Any) -> Any:
        if not isinstance(a, Ratio) and not isinstance(b, Ratio):
            return _INTEGER[name](a, b)
        a, b = _lift(a), _lift(b)
        if name == "div":
            return _divide(a, b)
        if name == "mul":
            return _reduce(a.num * b.num, a.den * b.den)
        if name == "mod":
            raise Unknown
        return _reduce(_INTEGER[name](a.num * b.den, b.num * a.den), a.den * b.den)

    return run


def _reduce(num: Dim, den: int) -> Ratio:
    for p in (den, 2):
        while den > 1 and den % p == 0 and (q := exact_div(num, p)) is not None:
            num, den = q, den // p
    return Ratio(num, den)


def _divide(a: Ratio, b: Ratio) -> Ratio:
    if isinstance(b.num, int):
        if b.num == 0:
            raise Unknown
        sign = 1 if b.num > 0 else -1
        return _reduce(a.num * b.den * sign, a.den * abs(b.num))
    if (q := exact_div(a.num * b.den, b.num * a.den)) is not None:
        return Ratio(q)
    raise Unknown


def _integer_div(a: Dim, b: Dim) -> Dim:
    """Truncating division; floor and truncation agree unless the quotient may be negative."""
    if isinstance(b, int) and b == 0:
        raise Unknown
    if not isinstance(a, Expr) and not isinstance(b, Expr):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    lo, _ = bounds(a)
    below, _ = bounds(b)
    if exact_div(a, b) is None and (lo is None or lo < 0 or below is None or below < 0):
        raise Unknown
    return floordiv(a, b)


_INTEGER: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": _integer_div,
    "mod": lambda a, b: a % b, "max": maximum, "min": minimum,
}  # fmt: skip


def _compare(name: str) -> Callable[[Any, Any], bool]:
    def run(a: Any, b: Any) -> bool:
        a, b = _lift(a), _lift(b)
        lo, hi = bounds(a.num * b.den - b.num * a.den)
        if name in ("eq", "ne"):
            if lo == hi == 0:
                return name == "eq"
            if (lo is not None and lo > 0) or (hi is not None and hi < 0):
                return name == "ne"
            raise Unknown
        always = {
            "lt": hi is not None and hi < 0,
            "le": hi is not None and hi <= 0,
            "gt": lo is not None and lo > 0,
            "ge": lo is not None and lo >= 0,
        }
        never = {"lt": always["ge"], "le": always["gt"], "gt": always["le"], "ge": always["lt"]}
        if always[name] or never[name]:
            return always[name]
        raise Unknown

    return run


def _floor(x: Ratio) -> Ratio:
    return Ratio(floordiv(x.num, x.den))


def _ceil(x: Ratio) -> Ratio:
    return Ratio(ceildiv(x.num, x.den))


def _cast(x: Any, to: DType) -> Any:
    if to is DType.bool:
        return _compare("ne")(x, 0)
    if to.is_float:
        return _lift(x)
    if isinstance(x, Ratio):
        lo, _ = bounds(x.num)
        if x.den != 1 and (lo is None or lo < 0):
            raise Unknown  # truncation and floor differ below zero
        return floordiv(x.num, x.den)
    return int(x) if isinstance(x, (bool, np.bool_)) else x


_UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": lambda x: Ratio(-x.num, x.den) if isinstance(x, Ratio) else -x,
    "abs": lambda x: x if _compare("ge")(x, 0) else _UNARY["neg"](x),
    "relu": lambda x: Ratio(maximum(x.num, 0), x.den) if isinstance(x, Ratio) else maximum(x, 0),
    "floor": _floor,
    "ceil": _ceil,
    "not": lambda x: not x,
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    **{n: _arithmetic(n) for n in _INTEGER},
    **{n: _compare(n) for n in ("eq", "ne", "lt", "le", "gt", "ge")},
    "and": lambda a, b: bool(a) and bool(b),
    "or": lambda a, b: bool(a) or bool(b),
}
_FOLDS = {"reduce_sum": ("add", 0), "reduce_prod": ("mul", 1), "reduce_max": ("max", None), "reduce_min": ("min", None)}
_MOVES = frozenset({"reshape", "transpose", "expand", "slice", "concat", "gather", "gather_elements", "gather_nd"})


def _fold(x: Array, name: str, attrs: Attrs) -> Array:
    combine, start = _FOLDS[name]
    kept = np.moveaxis(x, attrs["axes"], range(len(attrs["axes"]))) if attrs["axes"] else x[None]
    flat = kept.reshape(-1, *kept.shape[len(attrs["axes"]) or 1 :])
    out = np.full(flat.shape[1:], start, object) if start is not None else None
    for row in flat:
        out = np.asarray(row, object) if out is None else _map(_BINARY[combine], out, np.asarray(row, object))
    if out is None:
        raise Unknown
    keep = attrs["keepdims"] and attrs["axes"]
    return out.reshape([1 if i in attrs["axes"] else d for i, d in enumerate(x.shape)]) if keep else out


def evaluate(op: Op, inputs: Sequence[Array], attrs: Attrs) -> Array | None:
    """The contents of the only output of `op` on object arrays, or None where they cannot be stated."""
    try:
        if op.name == "cast":
            return _map(lambda x: _cast(x, attrs["to"]), inputs[0])
        if op.name in _UNARY:
            return _map(_UNARY[op.name], inputs[0])
        if op.name in _BINARY:
            return _map(_BINARY[op.name], *inputs)
        if op.name in _FOLDS:
            return _fold(inputs[0], op.name, attrs)
        if op.name == "where":
            return _map(lambda c, a, b: a if c else b, *inputs)
        if op.name == "cumsum" and inputs[0].ndim == 1 and not attrs["exclusive"] and not attrs["reverse"]:
            total = 0
            return _array([total := _BINARY["add"](total, e) for e in inputs[0]])
    except Unknown:
        return None
    if op.name in _MOVES:
        whole = [i.astype(np.int64) if k and op.name.startswith("gather") else i for k, i in enumerate(inputs)]
        return np.asarray(op.evaluate(whole, attrs)[0], object)
    return None


def _array(elements: Sequence[Any]) -> Array:
    out = np.empty(len(elements), object)
    out[:] = elements
    return out
