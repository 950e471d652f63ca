"""Where nodes are emitted during import: constants are folded at once, shape arithmetic stays symbolic.

A `Scope` is one graph under construction; a nested one (a branch, a loop body) takes what it uses of its parents as
captures. A value can be *virtual*: its contents are known dims (see `symbolic`), no node computes it, and it is
materialised only when an operator needs it as data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vivace.base.dims import Dim, Expr, bounds, maximum, symbols
from vivace.base.dtypes import DType
from vivace.base.errors import ModelError
from vivace.graph.build import Builder, constant
from vivace.graph.graph import Graph, Op, Type, Value, substitute_type
from vivace.graph.ops.shapes import DimMismatch
from vivace.onnx import symbolic
from vivace.onnx.reader import Model
from vivace.onnx.tensors import MAX_BYTES
from vivace.onnx.unify import Assumptions

_FOLDED_KINDS = frozenset({"elementwise", "movement", "reduction"})
_FOLDED = frozenset({"gather", "gather_elements", "gather_nd", "cumsum", "scatter_nd", "scatter_elements"})
_WINDOWED = frozenset({"conv", "max_pool", "avg_pool"})
_MAX_FOLD_GROWTH_BYTES = 1 << 14


class Fallback(Exception):
    """The operator cannot be written with core ops here; `reason` goes into the placement report."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class UseBody(Fallback):
    """As Fallback, where the body by which `onnx` defines the operator serves instead."""


@dataclass(slots=True)
class Session:
    """What all scopes of one import share."""

    model: Model
    assume: Assumptions
    known: dict[Value, np.ndarray] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    n_fresh: int = 0

    def fresh_symbol(self, hint: str) -> Dim:
        """A symbol of its own for a size that only data determines. The name depends only on what was imported
        before.
        """
        self.n_fresh += 1
        base = "".join(c if c.isalnum() else "_" for c in hint).strip("_") or "u"
        base = f"u_{base}" if base[0].isdigit() else base
        k = self.names[base] = self.names.get(base, 0) + 1
        return self.assume.symbol(base if k == 1 else f"{base}_{k}")


class Scope:
    """A graph under construction and the ONNX names visible in it."""

    def __init__(self, session: Session, parent: Scope | None = None, path: str = "") -> None:
        self.session, self.parent, self.path = session, parent, path
        self.refined = session.assume.inside(path) if path else {}
        start = 0 if parent is None else parent.builder.count + 1000
        self.builder: Builder = Builder(prefix="t", count=start)
        self.names: dict[str, Any] = {}
        self.captures: dict[Value, Value] = {}
        self._data: dict[Value, Value] = {}
        self.renames: dict[Value, str] = {}

    def lookup(self, name: str) -> Any:
        """The value of an ONNX name; one of an outer graph becomes a capture unless it is a constant or known dims."""
        if name in self.names:
            return self.names[name]
        if self.parent is None:
            raise ModelError(f"{name!r} is read before it is defined", where=self.session.model.name)
        outer = self.parent.lookup(name)
        self.names[name] = outer if not isinstance(outer, Value) else self.capture(outer)
        return self.names[name]

    def capture(self, outer: Value) -> Value:
        if outer.data is not None:
            return outer
        if outer in self.session.known:
            contents = self.session.known[outer]
            return (
                self.virtual(symbolic.substitute_array(contents, self.refined), outer.dtype) if self.refined else outer
            )
        if outer not in self.captures:
            self.captures[outer] = Value(outer.name, substitute_type(outer.type, self.refined))
        return self.captures[outer]

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the nested graphs that lead here, from the outermost."""
        above = () if self.parent is None else self.parent.paths
        return (*above, self.path) if self.path else above

    def known(self, v: Value) -> np.ndarray | None:
        """The contents of a small tensor as an object array of dims and numbers, or None."""
        if v in self.session.known:
            return self.session.known[v]
        if v.data is None or v.data.size > symbolic.MAX_ELEMENTS or v.dtype is DType.string:
            return None
        try:
            return symbolic.to_object(v.data)
        except symbolic.Unknown:
            return None

    def virtual(self, contents: np.ndarray, dtype: DType) -> Value:
        """A value whose contents are known: a constant when no symbol is in them."""
        if not symbolic.is_symbolic(contents):
            return constant(symbolic.to_numbers(contents, dtype), self.builder.fresh("c"))
        v = Value(self.builder.fresh("d"), Type(dtype, contents.shape))
        self.session.known[v] = contents
        return v

    def materialise(self, v: Value) -> Value:
        """A value that a node can read: virtual contents are computed from dims."""
        contents = self.session.known.get(v)
        if contents is None:
            return v
        if v not in self._data:
            b = self.builder
            flat = [
                e if isinstance(e, symbolic.Ratio) else symbolic.Ratio(int(e) if isinstance(e, (bool, np.bool_)) else e)
                for e in contents.flat
            ]
            x = b.dims(values=tuple(e.num for e in flat))
            if v.dtype is not DType.i64:
                x = b.cast(x, to=v.dtype)
            if any(e.den != 1 for e in flat):
                x = b.div(x, constant(np.array([e.den for e in flat], v.dtype.numpy), b.fresh("c")))
            self._data[v] = x if x.shape == contents.shape else b.reshape(x, shape=contents.shape)
        return self._data[v]

    def emit(self, op: Op, inputs: Sequence[Value | None], attrs: dict[str, Any]) -> tuple[Value, ...]:
        """Append a node, unless its result is a constant or known dims."""
        if _has_symbols(attrs):
            folded = self._symbolic(op, inputs, attrs)
        elif inputs and all(v is None or v.data is not None for v in inputs):
            folded = self._constant(op, inputs, attrs)
        else:
            folded = self._symbolic(op, inputs, attrs)
        if folded is not None:
            return (folded,)
        outs = self.builder.emit(op, [None if v is None else self.materialise(v) for v in inputs], attrs)
        if op.name in _WINDOWED:
            for d in outs[0].shape:
                at_least_zero(d, op.name)
        for v in outs:
            if v.type.is_static and int(v.type.bytes) > MAX_BYTES:  # type: ignore[arg-type]
                raise ModelError(f"a tensor {v.type} has {v.type.bytes} bytes", expected=f"at most {MAX_BYTES} bytes")
        return outs

    def _constant(self, op: Op, inputs: Sequence[Value | None], attrs: dict[str, Any]) -> Value | None:
        if (op.kind not in _FOLDED_KINDS and op.name not in _FOLDED) or op.name == "dequantize":
            return None  # what is quantized stays so: the integers are what fast products read
        types = op.infer([None if v is None else v.type for v in inputs], attrs)
        given = sum(v.data.nbytes for v in inputs if v is not None and v.data is not None)
        size = types[0].bytes
        if len(types) != 1 or not isinstance(size, int) or size > given + _MAX_FOLD_GROWTH_BYTES:
            return None
        (out,) = op.evaluate([None if v is None else v.data for v in inputs], attrs)
        return constant(np.ascontiguousarray(out).reshape(out.shape), self.builder.fresh("c"))

    def _symbolic(self, op: Op, inputs: Sequence[Value | None], attrs: dict[str, Any]) -> Value | None:
        if not inputs or not any(v in self.session.known for v in inputs if v is not None):
            return None
        contents = [None if v is None else self.known(v) for v in inputs]
        if any(c is None for c in contents):
            return None
        if any(_has_symbols(a) for a in attrs.values() if not isinstance(a, DType)):
            return None
        types = op.infer([None if v is None else v.type for v in inputs], attrs)
        if len(types) != 1 or not isinstance(types[0].size, int) or types[0].size > symbolic.MAX_ELEMENTS:
            return None
        out = symbolic.evaluate(op, [c for c in contents if c is not None], attrs)
        return None if out is None else self.virtual(out, types[0].dtype)

    def discard(self, mark: int) -> None:
        """Drop the nodes since `mark`; known values that some of them computed have to be computed again."""
        del self.builder.nodes[mark:]
        alive = {v for n in self.builder.nodes for v in n.outputs}
        self._data = {k: v for k, v in self._data.items() if v in alive}

    def define(self, name: str, v: Any, mark: int) -> None:
        """Bind an ONNX name; a value that a node made since `mark` takes the name."""
        self.names[name] = v
        if isinstance(v, Value) and v not in self.renames and any(v in n.outputs for n in self.builder.nodes[mark:]):
            self.renames[v] = name

    def finish(self, outputs: Sequence[tuple[str, Value]], name: str = "main") -> Graph:
        """The graph with its outputs under their ONNX names: one value of its own for each."""
        final: list[Value] = []
        for out_name, v in outputs:
            v = self.materialise(v)
            made = any(v in n.outputs for n in reversed(self.builder.nodes))
            if v.data is not None:
                v = Value(out_name, v.type, v.data)
            elif not made or v in final:
                v = self.builder.reshape(v, shape=v.shape)
            if v.data is None:
                self.renames[v] = out_name
            final.append(v)
        graph = Graph(tuple(self.builder.inputs), tuple(self.builder.nodes), tuple(final), name)
        return rename(graph, self.renames)


def rename(graph: Graph, names: Mapping[Value, str]) -> Graph:
    """The graph with values renamed, made unique: outputs and inputs keep the name asked for, others give way."""
    from dataclasses import replace

    taken = {v.name for v in graph.inputs} | {names.get(v, v.name) for v in graph.outputs}
    fixed = set(graph.outputs)
    new: dict[Value, Value] = {}

    def renamed(v: Value) -> Value:
        want = base = names.get(v, v.name)
        if v not in fixed:
            k = 1
            while want in taken:
                k, want = k + 1, f"{base}.{k}"
            taken.add(want)
        new[v] = v if want == v.name else replace(v, name=want)
        return new[v]

    nodes = []
    for n in graph.nodes:
        inputs = tuple(None if v is None else v if v.data is not None else new.get(v, v) for v in n.inputs)
        nodes.append(replace(n, inputs=inputs, outputs=tuple(map(renamed, n.outputs))))
    return Graph(graph.inputs, tuple(nodes), tuple(new.get(v, v) for v in graph.outputs), graph.name)


def at_least_zero(d: Dim, where: str) -> None:
    """A window that is larger than its input, or a position behind its end, is an error at run time, so inputs are
    assumed large enough.

    Raises: DimMismatch, from which the importer learns a lower bound.
    """
    low, _ = bounds(d)
    if (low is None or low < 0) and len({s.name for s in symbols(d)}) == 1:
        raise DimMismatch(maximum(d, 0), d, where)


def _has_symbols(value: Any) -> bool:
    if isinstance(value, Expr):
        return True
    if isinstance(value, (tuple, list)):
        return any(map(_has_symbols, value))
    if isinstance(value, dict):
        return any(map(_has_symbols, value.values()))
    return False
