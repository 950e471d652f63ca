"""What the exporter writes into: unique names, initializers without duplicates, and dims computed from the shapes of
tensors.

Rules:
* NAMES: graph inputs and outputs keep their names; every other tensor gets a free one near its own.
* DIMS: a symbolic dim is read from a tensor that has it on an axis (`Shape`), or computed from its symbols; each dim
  once per graph.
* SCOPE: a nested graph sees the tensors of the graphs around it; what it computes is forgotten with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from vivace.base.dims import Apply, Dim, Expr, Symbol, bounds
from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.graph.graph import Graph, Node, Value
from vivace.onnx.tensors import data_type_of

Array = np.ndarray
END = np.iinfo(np.int64).max


class Writer:
    """Collects the NodeProtos and initializers of one model."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.weights: dict[str, Array] = {}
        self.names: dict[Value, str] = {}
        self.taken: set[str] = set()
        self.contents: dict[Any, str] = {}
        self.sources: dict[Dim, tuple[str, int]] = {}
        self.dims: dict[Dim, str] = {}
        self.shapes: list[tuple[str, tuple[Dim, ...]]] = []
        self.made: dict[Value, Node] = {}
        self.readers: dict[Value, list[Node]] = {}
        self.outputs: set[Value] = set()
        self.done: set[Node] = set()
        self.splits: dict[Node, tuple[int, list[Node]]] = {}
        self.final: dict[Value, str] = {}
        self.masks: dict[tuple[Value, int], str] = {}
        self.imports: dict[str, int] = {}

    def fresh(self, name: str) -> str:
        """A name that nothing has (rule NAMES)."""
        name = name or "t"
        unique, k = name, 1
        while unique in self.taken:
            k += 1
            unique = f"{name}_{k}"
        self.taken.add(unique)
        return unique

    def define(self, v: Value, name: str) -> str:
        """Record that `v` now exists as tensor `name`, and which dims it shows."""
        self.names[v] = name
        self.show(v, name)
        return name

    def show(self, v: Value, name: str) -> None:
        self.shapes.append((name, v.shape))
        for axis, d in enumerate(v.shape):
            if isinstance(d, Expr):
                self.sources.setdefault(d, (name, axis))

    def ref(self, v: Value | None) -> str:
        """The tensor that holds `v`; a constant becomes an initializer."""
        if v is None:
            return ""
        if v not in self.names:
            assert v.data is not None, v
            self.names[v] = self.const(v.data, v.name)
        return self.names[v]

    def const(
        self, data: Array | np.generic | Sequence[Any] | float | int, name: str = "c", dtype: DType = DType.i64
    ) -> str:
        """An initializer with these contents; equal small ones are one."""
        array = np.asarray(data) if isinstance(data, (np.ndarray, np.generic)) else np.asarray(data, dtype.numpy)
        key: Any = None
        if array.dtype != object and array.nbytes <= 4096:
            key = (str(array.dtype), array.shape, array.tobytes())
        elif array.dtype != object:
            key = (str(array.dtype), array.shape, array.__array_interface__["data"][0], array.strides)
        if key is not None and key in self.contents:
            return self.contents[key]
        unique = self.fresh(name)
        self.weights[unique] = array
        if key is not None:
            self.contents[key] = unique
        return unique

    def emit(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str] | str = "", domain: str = "", **attrs: Any
    ) -> str:
        """Append a node; the name of its first output (made up when none is given)."""
        outs = (
            [self.fresh(f"{op.lower()}")] if outputs == "" else [outputs] if isinstance(outputs, str) else list(outputs)
        )
        ins = list(inputs)
        while ins and not ins[-1]:
            ins.pop()
        kept = {k: x for k, x in attrs.items() if x is not None}
        self.nodes.append(helper.make_node(op, ins, outs, domain=domain, name=self.node_name(op, outs[0]), **kept))
        return outs[0]

    def node_name(self, op: str, output: str) -> str:
        return f"{op}/{output}"

    # ---- dims ----

    def dim(self, d: Dim) -> str:
        """An i64[1] tensor that holds a dim (rule DIMS)."""
        if not isinstance(d, Expr):
            return self.const([int(d)])
        if d not in self.dims:
            self.dims[d] = self._read(d) if d in self.sources else self._compute(d)
        return self.dims[d]

    def _read(self, d: Dim) -> str:
        name, axis = self.sources[d]
        return self.emit("Shape", [name], start=axis, end=axis + 1)

    def _compute(self, d: Expr) -> str:
        if len(d.terms) == 1 and d.terms[0][1] == 1 and len(d.terms[0][0]) == 1:
            atom = d.terms[0][0][0]
            return self._symbol(atom) if isinstance(atom, Symbol) else self._apply(atom)
        total = ""
        for factors, c in d.terms:
            term = ""
            for atom in factors:
                one = self.dim(Expr((((atom,), 1),)))
                term = self.emit("Mul", [term, one]) if term else one
            if not term:
                term = self.const([c])
            elif c != 1:
                term = self.emit("Mul", [term, self.const([c])])
            total = self.emit("Add", [total, term]) if total else term
        return total

    def _symbol(self, s: Symbol) -> str:
        """A symbol that no axis shows alone: solve an axis that is linear in it."""
        for known in self.sources:
            assert isinstance(known, Expr)
            terms = dict(known.terms)
            c = terms.pop((s,), 0)
            rest: Dim = 0
            if c and not any(a == s or isinstance(a, Apply) for m in terms for a in m):
                for m, k in terms.items():
                    rest = rest + Expr(((m, k),)) if m else rest + k
                if all(Expr((((a,), 1),)) in self.sources or Expr((((a,), 1),)) in self.dims for m in terms for a in m):
                    value = self.dim(known)
                    if rest != 0:
                        value = self.emit("Sub", [value, self.dim(rest)])
                    return value if c == 1 else self.emit("Div", [value, self.const([c])])
        raise UnsupportedError(f"no tensor shows the dim {s.name}", where="export", hint="fix the input shapes")

    def _apply(self, a: Apply) -> str:
        x, y = self.dim(a.a), self.dim(a.b)
        if a.fn in ("min", "max"):
            return self.emit(a.fn.capitalize(), [x, y])
        if a.fn == "%":
            return self.emit("Mod", [x, y])
        low = bounds(a.a)[0]
        if low is None or low < 0:  # ONNX divides toward zero, dims toward minus infinity
            x = self.emit("Sub", [x, self.emit("Mod", [x, y])])
        return self.emit("Div", [x, y])

    def shape(self, dims: Sequence[Dim]) -> str:
        """An i64[n] tensor that holds several dims."""
        if all(isinstance(d, int) for d in dims):
            return self.const([int(d) for d in dims])  # type: ignore[arg-type]
        whole = tuple(dims)
        for name, shape in self.shapes:
            for i in range(len(shape) - len(whole) + 1):
                if shape[i : i + len(whole)] == whole:
                    return self.emit("Shape", [name], start=i, end=i + len(whole))
        parts: list[str] = []
        fixed: list[int] = []
        for d in [*whole, None]:
            if isinstance(d, int):
                fixed.append(d)
                continue
            if fixed:
                parts.append(self.const(fixed))
                fixed = []
            if d is not None:
                parts.append(self.dim(d))
        return self.emit("Concat", parts, axis=0) if len(parts) > 1 else parts[0]

    # ---- structure ----

    def enter(self, graph: Graph) -> None:
        """Learn who makes and reads what in a graph, before its nodes are written."""
        for n in graph.nodes:
            for v in n.outputs:
                self.made[v] = n
            for u in n.inputs:
                if u is not None:
                    self.readers.setdefault(u, []).append(n)
        for v in graph.outputs:
            self.outputs.add(v)

    def by(self, v: Value | None, *ops: str) -> Node | None:
        """The node that makes `v` and that nothing else reads, if its op is one of `ops`."""
        n = self.made.get(v) if v is not None else None
        if v is None or n is None or n.op.name not in ops or v in self.outputs or len(self.readers.get(v, ())) != 1:
            return None
        return n

    def initializer_protos(self) -> Iterable[TensorProto]:
        for name, data in self.weights.items():
            yield tensor_proto(data, name)


def tensor_proto(data: Array, name: str) -> TensorProto:
    if data.dtype == object:
        flat = [x if isinstance(x, bytes) else str(x).encode() for x in data.reshape(-1)]
        return TensorProto(name=name, data_type=TensorProto.STRING, dims=data.shape, string_data=flat)
    array = np.ascontiguousarray(data)
    if array.dtype.kind in "fiub" and array.dtype.itemsize <= 8 and array.dtype.isbuiltin:
        return numpy_helper.from_array(array.reshape(data.shape), name)
    dtype = DType.of(data.dtype)
    proto = TensorProto(name=name, data_type=data_type_of(dtype), dims=data.shape)
    if dtype in (DType.i4, DType.u4):
        return numpy_helper.from_array(array, name)
    proto.raw_data = array.tobytes()
    return proto
