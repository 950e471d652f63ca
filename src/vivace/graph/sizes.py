"""Which symbolic sizes a graph speaks of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vivace.base.dims import Dim, Expr, Symbol, symbols
from vivace.graph.graph import Graph, Node, Type, Value, subgraphs
from vivace.graph.ops.control import lacking, narrower


def attr_symbols(v: Any) -> Iterator[Symbol]:
    """Every symbol in a type, an attribute, or a tuple of them, possibly repeated."""
    if isinstance(v, Expr):
        yield from symbols(v)
    elif isinstance(v, Type):
        yield from attr_symbols(v.shape)
    elif isinstance(v, tuple):
        for x in v:
            yield from attr_symbols(x)
    elif isinstance(v, Graph):
        yield from graph_symbols(v)


def graph_symbols(graph: Graph) -> Iterator[Symbol]:
    """Every symbol in the types and attributes of a graph, possibly repeated."""
    for v in (*graph.inputs, *(v for n in graph.nodes for v in n.outputs)):
        yield from attr_symbols(v.type)
    for n in graph.nodes:
        for a in n.attrs.values():
            yield from attr_symbols(a)


def shape_symbols(graph: Graph) -> dict[str, Symbol]:
    """The symbols in the shapes of a graph's values, by name; not those of the graphs inside it, which may bound them
    otherwise."""
    values = (*graph.inputs, *(v for n in graph.nodes for v in n.outputs))
    return {s.name: s for v in values for d in v.shape for s in symbols(d)}


def value_sizes(v: Value) -> set[str]:
    """The names of the symbols in a value's type."""
    return {s.name for s in attr_symbols(v.type)}


def node_sizes(n: Node) -> set[str]:
    """The names of all symbols that a node, its operands and its graphs speak of."""
    types = tuple(v.type for v in (*n.inputs, *n.outputs) if v is not None)
    return {s.name for s in attr_symbols((*types, *n.attrs.values()))}


def late_nodes(graph: Graph) -> dict[Node, set[str]]:
    """The nodes whose sizes only show when they run, each with the symbols that it brings: those of its results that
    follow neither from the graph's inputs nor from its operands. A node may also be late for what
    is inside of its graphs, or for a size that the model around it demands; then it may bring none."""
    given = {s for v in graph.inputs for s in value_sizes(v)}
    known = set(given)
    found: dict[Node, set[str]] = {}
    for n in graph.nodes:
        if n.op.name not in ("onnx", "if", "loop"):
            continue  # whose sizes follow from operands and attributes
        operands = {s for v in n.inputs if v is not None for s in value_sizes(v)}
        brought = {s for v in n.outputs for s in value_sizes(v)} - operands - given
        inside = {s.name for g in subgraphs(n) for s in graph_symbols(g)}
        if brought or n.attrs.get("late") or not inside <= known | operands:
            found[n] = brought
        known |= brought
    return found


def inner_demands(graph: Graph, outer: Mapping[str, Symbol] | None = None) -> Iterator[Dim]:
    """By how much sizes are outside of what each branch or body is meant for, where it asks more of them than the
    graphs around it (rule NARROWER of `graph.ops.control`)."""
    here = {**(outer or {}), **shape_symbols(graph)}
    for n in graph.nodes:
        for inner in subgraphs(n):
            if bounds := narrower(inner, here):
                yield lacking(bounds, here)
            yield from inner_demands(inner, here)
