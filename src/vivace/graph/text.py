"""The text of a graph, and the way back.

    graph main(%x: f32[N,64]) {
      dim N in 1..512
      const %half: f32[] = 0.5
      const %w: f32[64,32]
      %t0: f32[N,32] = matmul(%x, %w)  # /fc/MatMul
      %t1: f32[N,32] = mul(%t0, %half)  # /fc/MatMul; +fold_scale
      return %t1
    }

Attributes stand in braces: `softmax{axis=-1}`; lists are tuples, `@f32` is a dtype, `none` is None, a nested graph is
printed in place.
Rules:
* TINY: a constant of at most `TINY` elements is written out, bit for bit; a larger one is named, and its data travel
  beside the text.
* UNIQUE: two values, those of nested graphs included, never print under one name; the later of two gets a number.
* ROUND: `parse_graph(print_graph(g), constants_of(g))` prints the same text.
"""

from __future__ import annotations

import base64
import re
from typing import Any

import numpy as np

from vivace.base.dims import Symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Graph, Node, Value
from vivace.graph.parse import parse_graph, parse_type
from vivace.graph.sizes import graph_symbols

__all__ = ["constants_of", "parse_graph", "parse_type", "print_graph", "print_node", "quote"]

TINY = 8
_PLAIN = re.compile(r"[A-Za-z0-9_./\-]+")


class _Names:
    """One name per value (rule UNIQUE)."""

    def __init__(self) -> None:
        self.of: dict[Value, str] = {}
        self.taken: set[str] = set()

    def __call__(self, v: Value | None) -> str:
        if v is None:
            return "none"
        if v not in self.of:
            name, k = v.name or "v", 1
            while name in self.taken:
                k += 1
                name = f"{v.name or 'v'}.{k}"
            self.taken.add(name)
            self.of[v] = name
        return quote(self.of[v])


def quote(name: str) -> str:
    """`%name`, in quotes when it holds characters that the grammar uses."""
    if _PLAIN.fullmatch(name):
        return f"%{name}"
    return "%" + _print_string(name)


def _print_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def print_graph(graph: Graph) -> str:
    """The whole graph as text."""
    return _print(graph, _Names(), "")


def _print(graph: Graph, names: _Names, indent: str) -> str:
    head = ", ".join(f"{names(v)}: {v.type}" for v in graph.inputs)
    lines = [f"graph {graph.name}({head}) {{"]
    lines += [_print_symbol(s) for s in _bounded_symbols(graph)] if not indent else []
    lines += [_print_const(names(v), v) for v in graph.constants()]
    lines += [_print_node(n, names, indent) for n in graph.nodes]
    lines.append(f"return {', '.join(names(v) for v in graph.outputs)}")
    return f"\n{indent}  ".join(lines) + f"\n{indent}}}"


def print_node(node: Node) -> str:
    """One line: `%y: f32[2] = relu(%x)  # origin`."""
    return _print_node(node, _Names(), "")


def constants_of(graph: Graph) -> dict[str, np.ndarray]:
    """The data that the text leaves out, by printed name; what `parse_graph` takes beside the text."""
    names = _Names()
    _print(graph, names, "")
    return {name: v.data for v, name in names.of.items() if v.data is not None and v.data.size > TINY}


def _print_node(n: Node, names: _Names, indent: str) -> str:
    outs = ", ".join(f"{names(v)}: {v.type}" for v in n.outputs)
    attrs = ", ".join(f"{k}={_print_attr(v, names, indent)}" for k, v in n.attrs.items())
    origin = "  # " + "; ".join(o.replace(";", ",").replace("\n", " ") for o in n.origin) if n.origin else ""
    return f"{outs} = {n.op.name}{'{' + attrs + '}' if attrs else ''}({', '.join(map(names, n.inputs))}){origin}"


def _print_attr(v: Any, names: _Names, indent: str) -> str:
    match v:
        case None | True | False:
            return {None: "none", True: "true", False: "false"}[v]
        case tuple() | list():
            return "[" + ", ".join(_print_attr(x, names, indent) for x in v) + "]"
        case DType():
            return f"@{v}"
        case str():
            return _print_string(v)
        case bytes():
            return "0x" + base64.b16encode(v).decode()
        case Graph():
            return _print(v, names, indent + "  ")
        case float() | np.floating():
            return repr(float(v))
        case _:
            return str(v)


def _print_symbol(s: Symbol) -> str:
    return f"dim {s.name} in {'' if s.lo is None else s.lo}..{'' if s.hi is None else s.hi}"


def _print_const(name: str, v: Value) -> str:
    data = v.data
    assert data is not None
    if data.size > TINY:
        return f"const {name}: {v.type}"
    return f"const {name}: {v.type} = {_print_array(data)}"


def _print_array(data: np.ndarray) -> str:
    if data.ndim:
        return "[" + ", ".join(_print_array(x) for x in data) + "]"
    x = data[()]
    if data.dtype == object:
        return _print_string(str(x))
    if data.dtype.kind == "b":
        return str(bool(x)).lower()
    return str(int(x)) if DType.of(data.dtype).is_int else repr(float(x))


def _bounded_symbols(graph: Graph) -> list[Symbol]:
    return [s for s in dict.fromkeys(graph_symbols(graph)) if (s.lo, s.hi) != (0, None)]
