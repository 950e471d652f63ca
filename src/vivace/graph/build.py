"""Build graphs: the one mutable thing, alive only inside an importer or a pass.

    b = Builder()
    x = b.input("x", Type(DType.f32, (2, 3)))
    y = b.relu(b.add(x, b.const(np.float32(1))))
    graph = b.finish([y])

`b.<op>(*values, **attrs)` appends a node with inferred types and returns its output (a tuple when it has several).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from vivace.base.dtypes import DType
from vivace.graph.graph import Graph, Node, Op, Type, Value, freeze
from vivace.graph.ops import OPS


class Builder:
    """Appends nodes in execution order."""

    def __init__(self, origin: tuple[str, ...] = (), prefix: str = "t", count: int = 0) -> None:
        self.inputs: list[Value] = []
        self.nodes: list[Node] = []
        self.origin = origin
        self.prefix, self.count = prefix, count

    def input(self, name: str, type: Type) -> Value:
        v = Value(name, type)
        self.inputs.append(v)
        return v

    def const(
        self, data: np.ndarray | np.generic | float | int | bool, dtype: DType | None = None, name: str = ""
    ) -> Value:
        """A constant; Python scalars need `dtype` unless NumPy's choice (f64, i64, bool) is wanted."""
        array = np.asarray(data, dtype=None if dtype is None else dtype.numpy)
        return constant(array, name or self.fresh("c"))

    def fresh(self, prefix: str = "") -> str:
        self.count += 1
        return f"{prefix or self.prefix}{self.count}"

    def emit(
        self, op: Op, inputs: Sequence[Value | None], attrs: dict[str, Any], names: Sequence[str] = ()
    ) -> tuple[Value, ...]:
        """Append a node and return its outputs; `names` overrides the generated names of the outputs."""
        ins = list(inputs)
        while ins and ins[-1] is None:
            ins.pop()
        frozen = freeze(attrs)
        types = op.infer([None if v is None else v.type for v in ins], frozen)
        outs = tuple(Value((names[i] if i < len(names) else "") or self.fresh(), t) for i, t in enumerate(types))
        self.nodes.append(Node(op, tuple(ins), outs, frozen, self.origin))
        return outs

    def __getattr__(self, name: str) -> Callable[..., Any]:
        try:
            op = OPS[name.rstrip("_")]  # `and_`, `or_`, `not_`, `if_` are keywords without the underscore
        except KeyError:
            raise AttributeError(f"no core op is called {name!r}") from None

        def apply(*inputs: Value | None, **attrs: Any) -> Value | tuple[Value, ...]:
            outs = self.emit(op, inputs, attrs)
            return outs[0] if len(outs) == 1 else outs

        return apply

    def finish(self, outputs: Iterable[Value], name: str = "main") -> Graph:
        return Graph(tuple(self.inputs), tuple(self.nodes), tuple(outputs), name)


def constant(data: np.ndarray, name: str) -> Value:
    """A constant value that owns a read-only view of `data`."""
    view = data.view()
    view.flags.writeable = False
    return Value(name, Type(DType.of(data.dtype), data.shape), view)
