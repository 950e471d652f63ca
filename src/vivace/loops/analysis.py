"""Questions about loop bodies: what varies over an axis, and how wide its elements are."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from vivace.base.dims import Dim, symbols
from vivace.base.dtypes import DType
from vivace.loops.kernel import (
    Binary,
    Cast,
    Const,
    Expr,
    Fma,
    For,
    Guard,
    Index,
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

# f16 and bf16 are computed in f32.
_COMPUTED_BITS = {DType.f16: 32, DType.bf16: 32, DType.bool: 8}


def computed_bits(t: DType) -> int:
    """Bits of one element while it is computed with."""
    return _COMPUTED_BITS.get(t, t.size_bytes * 8)


def _names(d: Dim) -> Iterator[str]:
    return (s.name for s in symbols(d))


def varies(e: Expr, names: Collection[str]) -> bool:
    """Whether the value depends on one of the names: loop variables, symbols or lets."""
    match e:
        case Const():
            return False
        case Read(name=name):
            return name in names
        case Index(dim=d):
            return any(n in names for n in _names(d))
        case Load(index=index, inside=inside):
            dims = [*index, *(d for c in inside for d in (c.dim, c.lo, c.hi))]
            return any(n in names for d in dims for n in _names(d))
        case Unary(x=x) | Cast(x=x) | Lookup(x=x):
            return varies(x, names)
        case Reduce(x=x, extent=extent):
            return varies(x, names) or any(n in names for n in _names(extent))
        case Binary(a=a, b=b):
            return varies(a, names) or varies(b, names)
        case Select(cond=c, a=a, b=b) | Fma(a=c, b=a, c=b):
            return varies(c, names) or varies(a, names) or varies(b, names)


def widest_bits(node: Expr | Stmt | tuple[Stmt, ...], names: Collection[str]) -> int:
    """The widest element among the values that vary with `names`; 0 if none does. Integer lets that vary count as i64
    indices."""
    return max(_bits(node, set(names)), default=0)


def _bits(node: Expr | Stmt | tuple[Stmt, ...], names: set[str]) -> Iterator[int]:
    match node:
        case tuple():
            for s in node:
                yield from _bits(s, names)
        case For(body=body):
            yield from _bits(body, names)
        case Guard(cond=c, body=body):
            yield from _bits(c, names)
            yield from _bits(body, names)
        case Let(name=name, expr=e):
            yield from _bits(e, names)
            if varies(e, names):
                names.add(name)
        case Store(buffer=b, value=v):
            yield computed_bits(b.dtype)
            yield from _bits(v, names)
        case Unary(x=x) | Cast(x=x) | Lookup(x=x) | Reduce(x=x):
            if varies(node, names):
                yield computed_bits(dtype_of(node))
            yield from _bits(x, names)
        case Binary(a=a, b=b):
            if varies(node, names):
                yield computed_bits(dtype_of(node))
            yield from _bits(a, names)
            yield from _bits(b, names)
        case Select(cond=c, a=a, b=b) | Fma(a=c, b=a, c=b):
            if varies(node, names):
                yield computed_bits(dtype_of(node))
            yield from _bits(c, names)
            yield from _bits(a, names)
            yield from _bits(b, names)
        case Load() | Index() | Read():
            if varies(node, names):
                yield computed_bits(dtype_of(node))
