"""Checks that a kernel obeys the rules of the loop IR, before code is generated from it.

Checked: names are bound before use, never bound twice on one path, and hold in the block that binds them; element types
of operands, conditions and stores agree; functions exist and suit their operands; index and buffer have the same rank;
only writable parameters and local buffers are written; parallel loops stand alone at the top; local buffers have a
static size; no vector iteration writes an element that does not depend on its variable.

Not checked: that indices lie inside the shapes (the reference interpreter finds it), that iterations are independent
beyond the last point.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NoReturn

from vivace.base.dims import Dim, symbols
from vivace.base.dtypes import DType
from vivace.base.errors import GraphError
from vivace.loops.kernel import (
    BINARY,
    OF_F32,
    REDUCE,
    UNARY,
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
    dtype_of,
)  # fmt: skip
from vivace.loops.text import buffer_text, expr_text

_LOGICAL = frozenset({"and", "or", "xor"})
_BITS = frozenset({"bitand", "bitor", "bitxor", "shl", "shr"})
_NUMERIC_ONLY = frozenset({"add", "sub", "mul", "div", "mod", "fmod", "pow"})
_BYTES = (DType.u8, DType.i8)
_ANY_UNARY = frozenset({"neg", "abs", "sign", "floor", "ceil", "round", "not", "isnan", "isinf"})


@dataclass(frozen=True, slots=True)
class _Scope:
    """`integers` are names that dims may use; `vectors` the vector variables around, with the lets that vary with
    them."""

    kernel: str
    buffers: frozenset[Buffer]
    integers: frozenset[str] = frozenset()
    lets: dict[str, DType] = field(default_factory=dict)
    bound: frozenset[str] = frozenset()
    vector: str | None = None
    varying: frozenset[str] = frozenset()

    def fail(self, what: str, expected: str = "") -> NoReturn:
        raise GraphError(what, where=f"kernel {self.kernel}", expected=expected)

    def bind(self, name: str) -> _Scope:
        if name in self.bound:
            self.fail(f"{name} is bound twice", expected="one name for each loop variable and let")
        return replace(self, bound=self.bound | {name})


def verify_kernel(kernel: Kernel) -> None:
    """Raises: GraphError naming the rule that is broken."""
    scope = _Scope(kernel.name, frozenset(kernel.params))
    names = [p.name for p in kernel.params]
    if len(set(names)) != len(names):
        scope.fail("two parameters have one name")
    for p in kernel.params:
        _buffer(scope, p)
    writable = {p for p in kernel.params if p.writable}
    body, depth = kernel.body, 0
    while len(body) == 1 and isinstance(body[0], For) and body[0].kind == "parallel":
        scope = _loop_scope(scope, body[0])
        body, depth = body[0].body, depth + 1
    _block(scope, body, frozenset(writable))


def verify_expr(e: Expr, buffers: tuple[Buffer, ...], names: dict[str, DType], where: str) -> DType:
    """Check an expression over given names, such as an epilogue over `acc`; its type. Raises: GraphError."""
    return _expr(_Scope(where, frozenset(buffers), lets=dict(names)), e)


def _buffer(scope: _Scope, b: Buffer) -> None:
    if len(b.shape) != len(b.strides):
        scope.fail(f"{b} has {len(b.strides)} strides", expected=f"{len(b.shape)}")
    if b.dtype is DType.string:
        scope.fail(f"{b} holds strings", expected="numbers or bool")


def _loop_scope(scope: _Scope, loop: For) -> _Scope:
    if any(s.name == loop.var for s in symbols(loop.extent)):
        scope.fail(f"the extent of loop {loop.var} depends on itself")
    _dims(scope, loop.extent)
    scope = scope.bind(loop.var)
    return replace(scope, integers=scope.integers | {loop.var})


def _block(scope: _Scope, stmts: tuple[Stmt, ...], writable: frozenset[Buffer]) -> None:
    for s in stmts:
        match s:
            case Let(name=name, expr=e):
                t = _expr(scope, e)
                scope = scope.bind(name)
                integers = scope.integers | {name} if t.is_int else scope.integers
                varying = scope.varying | {name} if scope.vector and _varies(scope, e) else scope.varying
                scope = replace(scope, lets={**scope.lets, name: t}, integers=integers, varying=varying)
            case Store(buffer=b, index=index, value=e):
                _store(scope, b, index, e, writable)
            case Guard(cond=c, body=body):
                if (t := _expr(scope, c)) is not DType.bool:
                    scope.fail(f"condition {expr_text(c)} is {t}", expected="bool")
                _block(scope, body, writable)
            case Fetch(buffer=b, index=index):
                _index(scope, b, index)
            case Alloc(buffer=b):
                _buffer(scope, b)
                if not all(isinstance(d, int) for d in (*b.shape, *b.strides)):
                    scope.fail(f"local buffer {buffer_text(b)} has no static size")
                if scope.vector:
                    scope.fail(f"local buffer {b.name} stands inside vector loop {scope.vector}")
                scope = replace(scope, buffers=scope.buffers | {b})
                writable = writable | {b}
            case For(kind=kind, body=body, var=var):
                if kind == "parallel":
                    scope.fail(f"parallel loop {var} is not at the top, alone")
                if kind == "unroll" and not isinstance(s.extent, int):
                    scope.fail(f"loop {var} of {s.extent} iterations cannot be written out", expected="a static extent")
                inner = _loop_scope(scope, s)
                if kind == "vector" and not scope.vector and s.extent != 1:
                    inner = replace(inner, vector=var, varying=frozenset({var}))
                elif any(x.name in scope.varying for x in symbols(s.extent)):
                    scope.fail(f"the extent of loop {var} varies over the vector loop {scope.vector}")
                _block(inner, body, writable)


def _store(scope: _Scope, b: Buffer, index: tuple[Dim, ...], e: Expr, writable: frozenset[Buffer]) -> None:
    if b not in writable:
        scope.fail(f"{b.name} is stored to", expected="a writable parameter or a local buffer")
    _index(scope, b, index)
    if (t := _expr(scope, e)) is not b.dtype:
        scope.fail(f"{t} {expr_text(e)} is stored to {b}", expected=f"{b.dtype}; put a Cast there")
    moving = [s.name for d, stride in zip(index, b.strides) if stride != 0 for s in symbols(d)]
    if scope.vector and not scope.varying & set(moving):
        scope.fail(f"all iterations of vector loop {scope.vector} store to one element of {b}")


def _index(scope: _Scope, b: Buffer, index: tuple[Dim, ...]) -> None:
    if b not in scope.buffers:
        scope.fail(f"buffer {b} is not known here", expected="a parameter, or a local buffer of this block")
    if len(index) != len(b.shape):
        scope.fail(f"{b} is indexed by {len(index)} dims", expected=f"{len(b.shape)}")
    _dims(scope, *index)


def _dims(scope: _Scope, *dims: Dim) -> None:
    for d in dims:
        for s in symbols(d):
            if s.name in scope.lets and s.name not in scope.integers:
                scope.fail(f"{s.name} is {scope.lets[s.name]} and stands in index {d}", expected="an integer let")


def _varies(scope: _Scope, e: Expr) -> bool:
    from_dims = {s.name for d in _all_dims(e) for s in symbols(d)}
    return bool(scope.varying & (from_dims | _reads(e)))


def _all_dims(e: Expr) -> list[Dim]:
    match e:
        case Index(dim=d):
            return [d]
        case Load(index=index, inside=inside):
            return [*index, *(d for c in inside for d in (c.dim, c.lo, c.hi))]
        case _:
            return [d for x in _children(e) for d in _all_dims(x)]


def _reads(e: Expr) -> set[str]:
    return {e.name} if isinstance(e, Read) else {n for x in _children(e) for n in _reads(x)}


def _children(e: Expr) -> tuple[Expr, ...]:
    match e:
        case Unary(x=x) | Cast(x=x) | Lookup(x=x) | Reduce(x=x):
            return (x,)
        case Binary(a=a, b=b):
            return (a, b)
        case Select(cond=a, a=b, b=c) | Fma(a=a, b=b, c=c):
            return (a, b, c)
        case _:
            return ()


def _expr(scope: _Scope, e: Expr) -> DType:
    match e:
        case Index(dim=d):
            _dims(scope, d)
        case Load(buffer=b, index=index, inside=inside):
            _index(scope, b, index)
            for c in inside:
                _dims(scope, c.dim, c.lo, c.hi)
        case Read(name=name, dtype=t):
            if scope.lets.get(name) is not t:
                known = scope.lets.get(name)
                scope.fail(f"{name} is read as {t}", expected=f"{known}" if known else "a let of this block")
        case Unary(fn=fn, x=x):
            t = _expr(scope, x)
            if fn not in UNARY:
                scope.fail(f"unknown function {fn}", expected=", ".join(UNARY))
            if not t.is_float and (fn not in _ANY_UNARY and not (fn == "bitnot" and t.is_int)):
                scope.fail(f"{fn} of {t} {expr_text(x)}", expected="a floating-point operand")
            if fn in OF_F32 and t is not DType.f32:
                scope.fail(f"{fn} of {t} {expr_text(x)}", expected="an operand of f32")
            if t is DType.bool and fn != "not":
                scope.fail(f"{fn} of bool {expr_text(x)}", expected="a number")
        case Binary(fn=fn, a=a, b=b):
            _binary(scope, fn, a, b)
        case Fma(a=a, b=b, c=c):
            for x in (a, b, c):
                if (t := _expr(scope, x)) is not DType.f32:
                    scope.fail(f"{expr_text(x)} of {expr_text(e)} is {t}", expected="f32")
        case Select(cond=c, a=a, b=b):
            if (t := _expr(scope, c)) is not DType.bool:
                scope.fail(f"condition {expr_text(c)} is {t}", expected="bool")
            _same(scope, a, b)
        case Cast(x=x):
            _expr(scope, x)
        case Lookup(table=table, dtype=to, x=x):
            if (t := _expr(scope, x)) not in _BYTES or to not in _BYTES or len(table) != 256:
                scope.fail(
                    f"{len(table)} entries of {to}, looked up by {t}", expected="256 bytes, looked up by u8 or i8"
                )
        case Reduce(fn=fn, var=var, extent=n, x=x):
            if fn not in REDUCE:
                scope.fail(f"unknown reduction {fn}", expected=", ".join(REDUCE))
            _dims(scope, n)
            if any(s.name in scope.varying for s in symbols(n)):
                scope.fail(f"the extent {n} of reduction {var} varies over vector loop {scope.vector}")
            inner = scope.bind(var)
            _expr(replace(inner, integers=inner.integers | {var}), x)
        case Const():
            pass
    return dtype_of(e)


def _same(scope: _Scope, a: Expr, b: Expr) -> DType:
    x, y = _expr(scope, a), _expr(scope, b)
    if x is not y:
        scope.fail(f"operands {expr_text(a)} and {expr_text(b)} are {x} and {y}", expected="one element type")
    return x


def _binary(scope: _Scope, fn: str, a: Expr, b: Expr) -> None:
    if fn not in BINARY:
        scope.fail(f"unknown function {fn}", expected=", ".join(BINARY))
    t = _same(scope, a, b)
    if fn in _LOGICAL and t is not DType.bool:
        scope.fail(f"{fn} of {t}", expected="bool; the bits of integers have bitand, bitor, bitxor")
    if fn in _BITS and not t.is_int:
        scope.fail(f"{fn} of {t}", expected="integers")
    if fn in _NUMERIC_ONLY and t is DType.bool:
        scope.fail(f"{fn} of bool", expected="a Cast to a number, or and, or, xor")
