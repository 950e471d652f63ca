"""How dims are written: as text, which people and models write, and as plain data, which saved engines hold."""

from __future__ import annotations

import ast

from vivace.base.dims import (
    FUNCTIONS,
    Apply,
    Atom,
    Bound,
    Dim,
    Expr,
    Symbol,
    ceildiv,
    floordiv,
    maximum,
    minimum,
    mod,
    symbol,
)
from vivace.base.errors import ModelError


def parse(text: str, lo: Bound = 0) -> Dim:
    """Read a dim such as `2*N+1`, `floor(H/2)`, `max(a, b)`. Symbols get the lower bound `lo`.

    Raises: ModelError when the text is not integer arithmetic over names.
    """
    try:
        return _parse(ast.parse(text.strip(), mode="eval").body, lo)
    except (SyntaxError, ValueError, RecursionError) as e:
        raise ModelError(f"cannot read dim {text!r}", expected="integer arithmetic over names, such as 2*N+1") from e


def _parse(node: ast.expr, lo: Bound) -> Dim:
    match node:
        case ast.Constant(value=int(v)):
            return v
        case ast.Name(id=name):
            return symbol(name, lo)
        case ast.UnaryOp(op=ast.USub(), operand=x):
            return -_parse(x, lo)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _parse(left, lo), _parse(right, lo)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.FloorDiv() | ast.Div():
                    return floordiv(a, b)
                case ast.Mod():
                    return mod(a, b)
        case ast.Call(func=ast.Name(id="floor"), args=[x]):
            return _parse(x, lo)
        case ast.Call(func=ast.Name(id="ceiling" | "ceil"), args=[ast.BinOp(left=left, op=ast.Div(), right=right)]):
            return ceildiv(_parse(left, lo), _parse(right, lo))
        case ast.Call(func=ast.Name(id="min" | "Min"), args=[x, y]):
            return minimum(_parse(x, lo), _parse(y, lo))
        case ast.Call(func=ast.Name(id="max" | "Max"), args=[x, y]):
            return maximum(_parse(x, lo), _parse(y, lo))
    raise ValueError(ast.dump(node))


def to_data(d: Dim) -> object:
    """A dim as JSON data: an int, or a list of `[coefficient, [atom, ..]]` where an atom is a name with bounds or a
    function."""
    if not isinstance(d, Expr):
        return int(d)
    return [[c, [_atom_data(a) for a in m]] for m, c in d.terms]


def _atom_data(a: Atom) -> object:
    return [a.name, a.lo, a.hi] if isinstance(a, Symbol) else [a.fn, to_data(a.a), to_data(a.b), "fn"]


def _atom_of(name: str, a: object, b: object, kind: str = "") -> Atom:
    if kind:
        if name not in FUNCTIONS:
            raise ValueError(name)
        return Apply(name, from_data(a), from_data(b))
    if not (type(name) is str and all(x is None or isinstance(x, int) for x in (a, b))):
        raise TypeError(name)
    return Symbol(name, a, b)  # type: ignore[arg-type]


def from_data(data: object) -> Dim:
    """The inverse of `to_data`. Raises: ModelError for anything else.

    Cost: what was simplified when it was written is not simplified again, as engines are full of dims.
    """
    if isinstance(data, int):
        return data
    try:
        terms = tuple((tuple(_atom_of(*a) for a in atoms), int(c)) for c, atoms in data)  # type: ignore[attr-defined]
        if not terms:
            raise ValueError("no terms")
        return Expr(terms)
    except (TypeError, ValueError, KeyError, IndexError) as e:
        raise ModelError(f"cannot read the dim {data!r}", expected="a dim as `to_data` writes it") from e
