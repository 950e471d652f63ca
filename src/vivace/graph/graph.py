"""The graph: an immutable SSA list, and the record that says what an operator means.

    graph(%x: f32[N,64]) {
      %t0: f32[N,32] = matmul(%x, %w)      # /fc/MatMul
      return %t0
    }

Rules:
* SSA: a value is defined once: as a graph input, by one node, or as a constant (a value with `data`); nodes stand in
  execution order.
* IDENTITY: values compare by identity; a name is for people and for the text format.
* CLOSED: a graph in an attribute (the branches of `if`, the body of `loop`) sees nothing of the outer graph: what it
  uses comes in as inputs.
* OPTIONAL: an absent optional input is None; trailing Nones are dropped.
* ORIGIN: `origin` names the ONNX nodes that a node came from, then the rules that touched it: `("/fc/MatMul",
  "+fold_scale")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from vivace.base.dims import Dim, Expr, prod, substitute
from vivace.base.dtypes import DType

Attrs = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Type:
    """Element type and dims of a tensor, written `f32[N,64]`."""

    dtype: DType
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> Dim:
        """Number of elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> Dim:
        return self.size * self.dtype.size_bytes

    @property
    def is_static(self) -> bool:
        return all(isinstance(d, int) for d in self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One tensor, defined once. `data` is not None for a constant (read-only, maybe memory-mapped)."""

    name: str
    type: Type
    data: np.ndarray | None = None

    def __str__(self) -> str:
        return f"%{self.name}: {self.type}"

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.type.shape

    @property
    def rank(self) -> int:
        return len(self.type.shape)


Infer = Callable[[Sequence[Type | None], Attrs], tuple[Type, ...]]
Evaluate = Callable[[Sequence[np.ndarray | None], Attrs], tuple[np.ndarray, ...]]


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of a node. `flops` counts a multiply-add as two; bytes are those of the operands and results, each once."""

    flops: Dim
    bytes: Dim


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """Everything true of an operator whatever the target.

    `infer` gives the output types from the input types (raising GraphError or DimMismatch); `evaluate` is the meaning,
    in NumPy, on arrays and integer attrs; `flops` counts arithmetic. `exact` says that a correct implementation gives
    the same bits; otherwise `tolerance` bounds |got - want| / (1 + |want|) for f32 and says how far correct
    implementations may differ, per unit of reduction depth where the op reduces.
    """

    name: str
    infer: Infer
    evaluate: Evaluate
    flops: Callable[[Sequence[Type | None], Sequence[Type], Attrs], Dim]
    exact: bool = True
    tolerance: float = 0.0
    kind: str = "other"  # elementwise | movement | reduction | contraction | other

    def __repr__(self) -> str:
        return f"Op({self.name})"


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One application of an op."""

    op: Op
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    attrs: Attrs = field(default_factory=lambda: MappingProxyType({}))
    origin: tuple[str, ...] = ()

    @property
    def output(self) -> Value:
        return self.outputs[0]

    @property
    def cost(self) -> Cost:
        types = [None if v is None else v.type for v in self.inputs]
        outs = [v.type for v in self.outputs]
        moved: Dim = 0
        for t in [t for t in types if t is not None] + outs:
            moved = moved + t.bytes
        return Cost(self.op.flops(types, outs, self.attrs), moved)

    def __str__(self) -> str:
        from vivace.graph.text import print_node

        return print_node(self)


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A closed computation. Immutable; passes build another."""

    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]
    name: str = "main"

    def __str__(self) -> str:
        from vivace.graph.text import print_graph

        return print_graph(self)

    def producers(self) -> dict[Value, Node]:
        return {v: n for n in self.nodes for v in n.outputs}

    def users(self) -> dict[Value, list[Node]]:
        """Nodes that read each value, in order, once per node."""
        found: dict[Value, list[Node]] = {}
        for n in self.nodes:
            for v in dict.fromkeys(n.inputs):
                if v is not None:
                    found.setdefault(v, []).append(n)
        return found

    def constants(self) -> list[Value]:
        """Constants read by nodes or returned, in order of first use."""
        seen: dict[Value, None] = {}
        for n in self.nodes:
            for v in n.inputs:
                if v is not None and v.data is not None:
                    seen[v] = None
        for v in self.outputs:
            if v.data is not None:
                seen[v] = None
        return list(seen)

    def walk(self) -> Iterator[Node]:
        """Every node, those of nested graphs included, outer first."""
        for n in self.nodes:
            yield n
            for g in subgraphs(n):
                yield from g.walk()


def subgraphs(node: Node) -> list[Graph]:
    """The graphs in a node's attributes, in the order of the attributes."""
    return [g for g in node.attrs.values() if isinstance(g, Graph)]


def freeze(attrs: Mapping[str, Any]) -> Attrs:
    return attrs if isinstance(attrs, MappingProxyType) else MappingProxyType(dict(attrs))


def substitute_type(t: Type, env: Mapping[str, Dim]) -> Type:
    return Type(t.dtype, tuple(substitute(d, env) for d in t.shape))


def substitute_attr(value: Any, env: Mapping[str, Dim]) -> Any:
    """An attribute with symbols replaced; nested graphs are rebuilt, tuples walked, other values kept."""
    if isinstance(value, Expr):
        return substitute(value, env)
    if isinstance(value, tuple):
        return tuple(substitute_attr(v, env) for v in value)
    if isinstance(value, Type):
        return substitute_type(value, env)
    if isinstance(value, Graph):
        return substitute_dims(value, env)
    return value


def substitute_attrs(attrs: Attrs, env: Mapping[str, Dim]) -> Attrs:
    return freeze({k: substitute_attr(v, env) for k, v in attrs.items()})


def substitute_dims(graph: Graph, env: Mapping[str, Dim]) -> Graph:
    """The graph with symbols replaced in every type and attribute."""
    if not env:
        return graph
    new: dict[Value, Value] = {}

    def value(v: Value) -> Value:
        if v.data is not None:
            return v
        if v not in new:
            new[v] = replace(v, type=substitute_type(v.type, env))
        return new[v]

    return Graph(
        tuple(map(value, graph.inputs)),
        tuple(
            replace(
                n,
                inputs=tuple(None if v is None else value(v) for v in n.inputs),
                outputs=tuple(map(value, n.outputs)),
                attrs=substitute_attrs(n.attrs, env),
            )
            for n in graph.nodes
        ),
        tuple(map(value, graph.outputs)),
        graph.name,
    )
