"""What an operator function sees: the ONNX node's attributes, known contents of its inputs, and core ops to write it
with.

    @onnx_op("Elu")
    def elu(c: Call, x: Value) -> Value:
        return c.where(c.lt(x, c.like(x, 0)), c.mul(c.expm1(x), c.like(x, c.attr("alpha", 1.0))), x)

`c.<op>(...)` emits a core op, folding constants and shape arithmetic (see `scope`). A function raises
`Fallback(reason)` when it cannot be written with core ops for these operands; what it emitted is then discarded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto

from vivace.base.dims import Dim, bounds
from vivace.base.dtypes import DType
from vivace.base.errors import ModelError
from vivace.graph.build import constant
from vivace.graph.graph import Value
from vivace.graph.ops import OPS
from vivace.onnx.scope import Fallback, Scope, at_least_zero
from vivace.onnx.symbolic import Ratio

Result = Value | tuple[Value, ...]
Function = Callable[..., Result]
REGISTRY: dict[tuple[str, str], list[tuple[int, Function]]] = {}


def onnx_op(*names: str, since: int = 1, domain: str = "") -> Callable[[Function], Function]:
    """Register an operator function from opset `since` on, until a newer registration."""

    def register(fn: Function) -> Function:
        for name in names:
            entries = REGISTRY.setdefault((domain, name), [])
            assert all(v != since for v, _ in entries), f"{name} is registered twice for opset {since}"
            entries.append((since, fn))
            entries.sort(key=lambda e: e[0])
        return fn

    return register


def find(domain: str, name: str, opset: int) -> Function | None:
    """The newest function for an operator that is not newer than the opset."""
    found = None
    for since, fn in REGISTRY.get((domain, name), []):
        if since <= opset:
            found = fn
    return found


class Call:
    """One application of an ONNX operator."""

    def __init__(self, scope: Scope, node: NodeProto, opset: int, where: str) -> None:
        self.scope, self.node, self.opset, self.site = scope, node, opset, where
        self.op_type = node.op_type
        self.n_outputs = len(node.output)
        self.attrs = {a.name: a for a in node.attribute}

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute as Python data: numbers, str, tuples, arrays, or GraphProto."""
        a = self.attrs.get(name)
        if a is None:
            return default
        match a.type:
            case AttributeProto.FLOAT:
                return a.f
            case AttributeProto.INT:
                return a.i
            case AttributeProto.STRING:
                return a.s.decode(errors="replace")
            case AttributeProto.TENSOR:
                return self.scope.session.model.tensors.array(a.t, self.site)
            case AttributeProto.SPARSE_TENSOR:
                return self.scope.session.model.tensors.sparse(a.sparse_tensor, self.site)
            case AttributeProto.GRAPH:
                return a.g
            case AttributeProto.FLOATS:
                return tuple(a.floats)
            case AttributeProto.INTS:
                return tuple(a.ints)
            case AttributeProto.STRINGS:
                return tuple(s.decode(errors="replace") for s in a.strings)
        raise Fallback(f"attribute {name} has a type that is not supported")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = OPS.get(name.rstrip("_"))
        if op is None:
            raise AttributeError(f"no core op is called {name!r}")

        def apply(*inputs: Value | None, **attrs: Any) -> Any:
            ins = list(inputs)
            while ins and ins[-1] is None:
                ins.pop()
            outs = self.scope.emit(op, ins, attrs)
            return outs[0] if len(outs) == 1 else outs

        return apply

    def const(self, data: Any, dtype: DType | None = None) -> Value:
        return constant(np.asarray(data, dtype=None if dtype is None else dtype.numpy), self.scope.builder.fresh("c"))

    def like(self, x: Value, value: float | int | bool) -> Value:
        """A scalar constant of x's dtype."""
        return self.const(value, x.dtype)

    def dims(self, values: Sequence[Dim], shape: tuple[int, ...] | None = None) -> Value:
        """An i64 tensor that holds dims."""
        contents = np.empty(len(values), object)
        contents[:] = list(values)
        return self.scope.virtual(contents.reshape((len(values),) if shape is None else shape), DType.i64)

    def known(self, v: Value | None) -> np.ndarray | None:
        return None if v is None else self.scope.known(v)

    def ints(self, v: Value, what: str) -> tuple[Dim, ...]:
        """The elements of an integer tensor. Raises: Fallback when they depend on data."""
        contents = self.scope.known(v)
        if contents is None:
            raise Fallback(f"{what} depends on data")
        return tuple(contents.ravel())

    def static_ints(self, v: Value, what: str) -> tuple[int, ...]:
        """As `ints`, of plain numbers."""
        values = self.ints(v, what)
        if not all(isinstance(d, int) for d in values):
            raise Fallback(f"{what} depends on the sizes of inputs")
        return tuple(int(d) for d in values)  # type: ignore[arg-type]

    def array(self, v: Value, what: str) -> np.ndarray:
        """A constant. Raises: Fallback for any other value."""
        if v.data is None:
            raise Fallback(f"{what} is not a constant")
        return v.data

    def scalar(self, v: Value, what: str) -> Any:
        """The only element of a tensor: a dim, a float or a bool."""
        contents = self.scope.known(v)
        if contents is not None and contents.size == 1:
            e = contents.reshape(-1)[0]
            if not isinstance(e, Ratio):
                return e
            if isinstance(e.num, int):
                return e.num / e.den
        if v.data is not None and v.data.size == 1:
            return v.data.reshape(-1)[0].item()
        raise Fallback(f"{what} depends on data")

    def axis(self, axis: int, rank: int, extra: int = 0) -> int:
        """A non-negative axis. Raises: ModelError when out of range."""
        if not -rank - extra <= axis < rank + extra:
            raise ModelError(f"axis {axis} is out of range for rank {rank}", where=self.site)
        return axis % (rank + extra) if axis < 0 else axis

    def axes(self, axes: Sequence[int], rank: int) -> tuple[int, ...]:
        """Non-negative axes in ascending order."""
        found = [self.axis(int(a), rank) for a in axes]
        if len(set(found)) != len(found):
            raise ModelError(f"axes {tuple(axes)} hold one twice", where=self.site)
        return tuple(sorted(found))

    def error(self, what: str, expected: str = "") -> ModelError:
        return ModelError(what, where=self.site, expected=expected)

    def demand(self, d: Dim, fault: str) -> None:
        """What must not be below zero, since what would then be read is memory of others.

        Raises: ModelError; DimMismatch, from which the importer learns a bound.
        """
        most = bounds(d)[1]
        if most is not None and most < 0:
            raise self.error(fault)
        at_least_zero(d, self.node.op_type)

    def full(self, shape: Sequence[Dim], value: Any, dtype: DType) -> Value:
        """A tensor of one repeated value."""
        scalar = self.const(value, dtype)
        return scalar if not shape else self.expand(scalar, shape=tuple(shape))

    def cast_to(self, x: Value, dtype: DType) -> Value:
        return x if x.dtype is dtype else self.cast(x, to=dtype)

    def reshaped(self, x: Value, shape: Sequence[Dim]) -> Value:
        return x if x.shape == tuple(shape) else self.reshape(x, shape=tuple(shape))

    def transposed(self, x: Value, perm: Sequence[int]) -> Value:
        return x if tuple(perm) == tuple(range(x.rank)) else self.transpose(x, perm=tuple(perm))

    def sliced(self, x: Value, axis: int, start: Dim, size: Dim) -> Value:
        """`size` elements of one axis from `start` on."""
        if start == 0 and size == x.shape[axis]:
            return x
        starts, sizes = (
            [start if i == axis else 0 for i in range(x.rank)],
            [size if i == axis else d for i, d in enumerate(x.shape)],
        )
        return self.slice(x, starts=tuple(starts), sizes=tuple(sizes), steps=(1,) * x.rank)
