"""The meaning of the loop IR: an interpreter over NumPy arrays.

Parallel and vector loops are evaluated for all iterations at once, their variables being index arrays with an axis of
their own; serial loops and reductions run one iteration after the other. A kernel that depends on the order of a
parallel or vector loop therefore shows here, as does any access outside a buffer's shape (rule FLAT).

Numbers: functions of f32 are computed in f64 and rounded once; sums and products are accumulated in f64 (integers wrap
in their own type). f16 and bf16 are computed in f32 and rounded where they are stored or cast. Integer division by zero
gives 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vivace.base.dims import Dim
from vivace.base.dims import Expr as DimExpr
from vivace.base.dims import Symbol as DimSymbol
from vivace.base.dtypes import DType
from vivace.base.errors import InternalError
from vivace.loops.kernel import (
    Alloc,
    Binary,
    Buffer,
    Cast,
    Const,
    Expr,
    Fetch,
    Fma,
    For,
    Guard,
    Index,
    Kernel,
    Let,
    Load,
    Lookup,
    Read,
    Reduce,
    Select,
    Stmt,
    Store,
    Unary,
    dims_of,
    dtype_of,
)  # fmt: skip

Array = np.ndarray
_COMPUTED = {DType.f16: np.dtype(np.float32), DType.bf16: np.dtype(np.float32)}


def computed_dtype(t: DType) -> np.dtype:
    """The NumPy type that elements are computed in."""
    return _COMPUTED.get(t, t.numpy)


@dataclass(frozen=True, slots=True)
class _Context:
    """`symbols` and `names` hold arrays that broadcast to `shape`; `active` says where a guard holds."""

    buffers: dict[Buffer, Array]
    symbols: dict[str, Array]
    names: dict[str, Array] = field(default_factory=dict)
    rank: int = 0
    active: Array | None = None


def run(kernel: Kernel, arrays: Sequence[Array], dims: Mapping[str, int] | None = None) -> None:
    """Run a kernel. `arrays` are one-dimensional, one per parameter, with element 0 where the buffer begins; written in
    place.

    Raises: InternalError for an access outside a buffer.
    """
    values = dims or {}
    symbols = {name: np.int64(values[name]) for name in dims_of(kernel)}
    context = _Context(dict(zip(kernel.params, arrays, strict=True)), symbols)  # type: ignore[arg-type]
    with np.errstate(all="ignore"):
        _block(context, kernel.body)


def value_of(
    e: Expr,
    buffers: Mapping[Buffer, Array],
    symbols: Mapping[str, Array | int],
    names: Mapping[str, Array] | None = None,
) -> Array:
    """The value of one expression; symbols may be index arrays that broadcast with each other."""
    arrays = {k: np.asarray(v, np.int64) for k, v in symbols.items()}
    rank = max((a.ndim for a in arrays.values()), default=0)
    with np.errstate(all="ignore"):
        return _value(_Context(dict(buffers), arrays, dict(names or {}), rank), e)


def _block(context: _Context, stmts: tuple[Stmt, ...]) -> None:
    context = replace(context, symbols=dict(context.symbols), names=dict(context.names), buffers=dict(context.buffers))
    for s in stmts:
        _statement(context, s)


def _statement(context: _Context, s: Stmt) -> None:
    match s:
        case Let(name=name, expr=e):
            value = _value(context, e)
            context.names[name] = value
            if dtype_of(e).is_int:
                context.symbols[name] = value.astype(np.int64)
        case Store(buffer=buffer, index=index, value=e):
            _store(context, buffer, index, _value(context, e))
        case Guard(cond=c, body=body):
            active = _value(context, c)
            if context.active is not None:
                active = active & context.active
            if active.any():
                _block(replace(context, active=active), body)
        case Fetch():
            pass
        case Alloc(buffer=buffer):
            lead = _shape(context)
            cells = _extent(buffer, [int(_dim(context, d)) for d in buffer.shape], context)
            # One copy per iteration that is evaluated at once.
            context.buffers[buffer] = np.zeros((*lead, cells), buffer.dtype.numpy)
        case For(var=var, extent=extent, body=body, kind=kind):
            n = _dim(context, extent)
            if kind in ("parallel", "vector"):
                _together(context, var, n, body)
                return
            for k in range(int(np.max(n, initial=0))):
                inner = replace(context, symbols={**context.symbols, var: np.int64(k)})  # type: ignore[dict-item]
                if np.ndim(n):
                    active = k < n
                    inner = replace(inner, active=active if context.active is None else active & context.active)
                _block(inner, body)


def _together(context: _Context, var: str, n: Array, body: tuple[Stmt, ...]) -> None:
    """All iterations at once, on a new last axis; buffers of the enclosing iterations keep their axes."""

    def widen(a: Array) -> Array:
        return a[..., None] if np.ndim(a) else a

    numbers = np.arange(int(np.max(n, initial=0)))
    if not len(numbers):
        return
    symbols = {k: widen(v) for k, v in context.symbols.items()}
    active = None if context.active is None else widen(context.active)
    if np.ndim(n):
        short = numbers < n[..., None]
        active = short if active is None else active & short
    symbols[var] = numbers
    names = {k: widen(v) for k, v in context.names.items()}
    inner = replace(context, symbols=symbols, names=names, rank=context.rank + 1, active=active)
    _block(inner, body)


def _shape(context: _Context) -> tuple[int, ...]:
    """The iterations that are evaluated at once."""
    shapes = [np.shape(v) for v in (*context.symbols.values(), *context.names.values())]
    return np.broadcast_shapes(*shapes) if shapes else ()


def _extent(buffer: Buffer, shape: list[int], context: _Context) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * int(_dim(context, s)) for n, s in zip(shape, buffer.strides))


def _dim(context: _Context, d: Dim) -> Array:
    if not isinstance(d, DimExpr):
        return np.asarray(d, np.int64)
    total = np.asarray(0, np.int64)
    for monomial, coefficient in d.terms:
        term = np.asarray(coefficient, np.int64)
        for a in monomial:
            if isinstance(a, DimSymbol):
                if a.name not in context.symbols:
                    raise InternalError(f"symbol {a.name} has no value")
                term = term * context.symbols[a.name]
                continue
            x, y = _dim(context, a.a), _dim(context, a.b)
            term = term * _DIM_FUNCTIONS[a.fn](x, y)
        total = total + term
    return total


_DIM_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "//": np.floor_divide, "%": np.mod, "min": np.minimum, "max": np.maximum,
}  # fmt: skip


def _address(context: _Context, buffer: Buffer, index: tuple[Dim, ...], needed: Array | None) -> tuple[Array, ...]:
    """Indices into the buffer's array; where an element is not needed, its address is 0."""
    flat = np.asarray(0, np.int64)
    for axis, (i, n, stride) in enumerate(zip(index, buffer.shape, buffer.strides, strict=True)):
        at, size = _dim(context, i), _dim(context, n)
        outside = (at < 0) | (at >= size)
        if needed is not None:
            outside = outside & needed
        if np.any(outside):
            raise InternalError(f"index {i} is outside axis {axis} of {buffer}", expected=f"0 .. {n}-1")
        flat = flat + at * _dim(context, stride)
    if needed is not None:
        flat = np.where(needed, flat, 0)
    array = context.buffers[buffer]
    if array.ndim == 1:
        return (flat,)
    # A local buffer: one copy per iteration of the loops around its Alloc.
    lead = array.shape[:-1]
    grid = np.ogrid[tuple(slice(n) for n in lead)]
    missing = max(np.ndim(flat), context.rank) - len(lead)
    return (*(g.reshape(g.shape + (1,) * missing) for g in grid), flat)


def _inside(context: _Context, load: Load) -> Array | None:
    result: Array | None = context.active
    for c in load.inside:
        d = _dim(context, c.dim)
        holds = (d >= _dim(context, c.lo)) & (d < _dim(context, c.hi))
        result = holds if result is None else result & holds
    return result


def _load(context: _Context, load: Load) -> Array:
    array, needed = context.buffers[load.buffer], _inside(context, load)
    t = computed_dtype(load.buffer.dtype)
    if needed is not None and not np.any(needed):
        return np.full(np.shape(needed), load.fill).astype(t)
    values = array[_address(context, load.buffer, load.index, needed)].astype(t)
    return values if needed is None else np.where(needed, values, np.asarray(load.fill).astype(t))


def _store(context: _Context, buffer: Buffer, index: tuple[Dim, ...], value: Array) -> None:
    active = context.active
    if active is not None and not np.any(active):
        return
    address = _address(context, buffer, index, active)
    value = value.astype(buffer.dtype.numpy)
    if active is None:
        *address, value = np.broadcast_arrays(*address, value)  # type: ignore[assignment]
        context.buffers[buffer][tuple(address)] = value
        return
    *address, value, active = np.broadcast_arrays(*address, value, active)  # type: ignore[assignment]
    context.buffers[buffer][tuple(a[active] for a in address)] = value[active]


def _value(context: _Context, e: Expr) -> Array:
    match e:
        case Const(value=v, dtype=t):
            return np.asarray(v).astype(computed_dtype(t))
        case Index(dim=d, dtype=t):
            return np.asarray(_dim(context, d)).astype(computed_dtype(t))
        case Load():
            return _load(context, e)
        case Read(name=name):
            return context.names[name]
        case Unary(fn=fn, x=x):
            return unary(fn, _value(context, x), dtype_of(x))
        case Binary(fn=fn, a=a, b=b):
            return binary(fn, _value(context, a), _value(context, b), dtype_of(a))
        case Fma(a=a, b=b, c=c):
            return _fma(_value(context, a), _value(context, b), _value(context, c))
        case Select(cond=c, a=a, b=b):
            return np.where(_value(context, c), _value(context, a), _value(context, b))
        case Cast(dtype=t, x=x):
            return cast(_value(context, x), dtype_of(x), t)
        case Lookup(table=table, dtype=t, x=x):
            return np.frombuffer(table, t.numpy)[_value(context, x).astype(np.uint8)]
        case Reduce():
            return _reduce(context, e)


def _reduce(context: _Context, e: Reduce) -> Array:
    t = dtype_of(e)
    wide = np.dtype(np.float64) if t.is_float else t.numpy
    total = np.asarray(_START[e.fn](t)).astype(wide)
    n = _dim(context, e.extent)
    for k in range(int(np.max(n, initial=0))):
        inner = replace(context, symbols={**context.symbols, e.var: np.int64(k)})  # type: ignore[dict-item]
        if np.ndim(n):
            inner = replace(inner, active=k < n if context.active is None else (k < n) & context.active)
        x = _value(inner, e.x).astype(wide)
        following = binary(e.fn, total, x, DType.f64 if t.is_float else t)
        total = np.where(k < n, following, total) if np.ndim(n) else following
    return total.astype(computed_dtype(t))


def _fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of f32, rounded once: f64 holds the product, and the sum is rounded to odd there."""
    product, c = np.broadcast_arrays(a.astype(np.float64) * b, c.astype(np.float64))
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    is_even = total.view(np.int64) & 1 == 0
    odd = np.nextafter(total, np.copysign(np.inf, lost))
    return np.where((lost != 0) & is_even & np.isfinite(total), odd, total).astype(np.float32)


def _least(t: DType) -> float | int | bool:
    return -math.inf if t.is_float else False if t is DType.bool else int(np.iinfo(t.numpy).min)


def _greatest(t: DType) -> float | int | bool:
    return math.inf if t.is_float else True if t is DType.bool else int(np.iinfo(t.numpy).max)


_START: dict[str, Callable[[DType], float | int | bool]] = {
    "add": lambda t: 0, "mul": lambda t: 1, "max": _least, "min": _greatest, "maxnum": _least,
}  # fmt: skip


def cast(x: Array, source: DType, target: DType) -> Array:
    """Fractions are cut off, integers wrap, bool is `!= 0`, halves are rounded."""
    if target in _COMPUTED:
        return x.astype(np.float32).astype(target.numpy).astype(np.float32)
    if target.is_int and source.is_float:
        via = np.uint64 if target is DType.u64 else np.int64 if target in (DType.i64, DType.u32) else np.int32
        return x.astype(via).astype(target.numpy)
    return x.astype(target.numpy)


def _vectorized(fn: Callable[[float], float]) -> Callable[[Array], Array]:
    return np.vectorize(fn, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1.0) / (1.0 + e)


def _gelu(x: Array) -> Array:
    return x * 0.5 * _vectorized(math.erfc)(-x / math.sqrt(2))


_ROUNDED: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp, "log": np.log, "erf": _vectorized(math.erf), "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "tanh": np.tanh, "sigmoid": _sigmoid, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "sinh": np.sinh,
    "cosh": np.cosh, "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh, "log1p": np.log1p,
    "expm1": np.expm1, "exp2": np.exp2, "gelu": _gelu, "exp2_bf16": np.exp2, "sigmoid_bf16": _sigmoid,
    "gelu_bf16": _gelu,
}  # fmt: skip
_EXACT: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "floor": np.floor, "ceil": np.ceil, "round": np.rint,
    "isnan": np.isnan, "isinf": np.isinf, "bitnot": np.invert, "sign": np.sign,
    "recip": lambda x: (1 / x).astype(x.dtype), "not": lambda x: x == 0,
}  # fmt: skip


def unary(fn: str, x: Array, t: DType) -> Array:
    """A function of one value of element type `t`."""
    if fn in _ROUNDED:
        return _ROUNDED[fn](x.astype(np.float64)).astype(x.dtype)
    if t.is_int and fn in ("floor", "ceil", "round"):
        return x
    if t.is_int and fn in ("isnan", "isinf"):
        return np.zeros(np.shape(x), bool)
    return np.asarray(_EXACT[fn](x))


def _divide(a: Array, b: Array, t: DType) -> Array:
    if t.is_float:
        return np.divide(a, b)
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    q = np.floor_divide(a, safe)
    q = q + ((q * safe != a) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, 0, q).astype(a.dtype)


def _shift(fn: str, a: Array, b: Array, t: DType) -> Array:
    bits = t.size_bytes * 8
    amount = b.astype(np.uint64)
    over, amount = amount >= bits, np.minimum(amount, bits - 1).astype(a.dtype)
    moved = np.left_shift(a, amount) if fn == "shl" else np.right_shift(a, amount)
    return np.asarray(moved if fn == "shr" and t.is_signed else np.where(over, 0, moved)).astype(a.dtype)


def _power(a: Array, b: Array) -> Array:
    result = np.power(a.astype(np.float64), b.astype(np.float64))
    return result.astype(a.dtype) if a.dtype.kind == "f" else np.rint(result).astype(a.dtype)


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "pow": _power, "max": np.maximum, "min": np.minimum,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
    "bitand": np.bitwise_and, "bitor": np.bitwise_or, "bitxor": np.bitwise_xor, "mod": np.mod, "fmod": np.fmod,
    "maxnum": np.fmax,
}  # fmt: skip


def binary(fn: str, a: Array, b: Array, t: DType) -> Array:
    """A function of two values of element type `t`."""
    if fn == "div":
        return _divide(a, b, t)
    if fn in ("shl", "shr"):
        return _shift(fn, a, b, t)
    result = np.asarray(_BINARY[fn](a, b))
    if t.is_int and fn in ("mod", "fmod"):
        return np.where(b == 0, 0, result).astype(a.dtype)
    return result
