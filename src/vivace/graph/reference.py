"""Run a graph in NumPy: the meaning that every target is held to. Clear, not fast.

Symbols get their values from the shapes of the inputs, then, for outputs whose size depends on data, from the arrays
that nodes give.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vivace.base.dims import Dim, Expr, linear, substitute, symbols
from vivace.base.dtypes import DType
from vivace.base.errors import InputError, InternalError
from vivace.graph.graph import Graph, Type, Value, substitute_attrs

Array = np.ndarray


def bind(pairs: Iterable[tuple[Value, Sequence[int]]], env: Mapping[str, int] | None = None) -> dict[str, int]:
    """The value of every symbol, from `(value, shape)` pairs; each dim must then evaluate to the size given.

    Solves dims that are linear in one unknown symbol, in as many rounds as needed.
    Raises: InputError for a wrong rank or size, or a size that no value of the symbol explains.
    """
    found: dict[str, int] = dict(env or {})
    open_: list[tuple[Value, int, Dim, int]] = []
    for v, shape in pairs:
        if len(shape) != v.rank:
            raise InputError(f"has rank {len(shape)}", where=f"input {v.name!r}", expected=str(v.type))
        open_ += [(v, i, d, int(n)) for i, (d, n) in enumerate(zip(v.shape, shape, strict=True))]
    while True:
        left = [(v, i, d, n) for v, i, d, n in open_ if not _solve(v, i, substitute(d, found), n, found)]
        if len(left) == len(open_):
            return found
        open_ = left


def _solve(v: Value, axis: int, d: Dim, size: int, found: dict[str, int]) -> bool:
    """Check `d == size`, or learn one symbol from it. False when it has more unknowns than one."""
    if not isinstance(d, Expr):
        if d != size:
            raise InputError(
                f"has size {size} on axis {axis}",
                where=f"input {v.name!r}",
                expected=f"{d}, since its type is {v.type}",
            )
        return True
    names = {s.name: s for s in symbols(d)}
    if len(names) != 1:
        return False
    ((name, s),) = names.items()
    split = linear(d, name)
    if split is None or isinstance(split[0], Expr) or isinstance(split[1], Expr) or split[0] == 0:
        return False
    value, rest = divmod(size - split[1], split[0])
    if rest or (s.lo is not None and value < s.lo) or (s.hi is not None and value > s.hi):
        low, high = "-" if s.lo is None else s.lo, "any" if s.hi is None else s.hi
        raise InputError(
            f"has size {size} on axis {axis}",
            where=f"input {v.name!r}",
            expected=f"{d} with {name} from {low} to {high}",
        )
    found[name] = value
    return True


def evaluate(
    graph: Graph, inputs: Mapping[str, Array] | Sequence[Array | None], env: Mapping[str, int] | None = None
) -> list[Array]:
    """The outputs of `graph` for inputs by name, or in order. `env` gives symbols that no input determines."""
    if isinstance(inputs, Mapping):
        missing = [v.name for v in graph.inputs if v.name not in inputs]
        if missing:
            raise InputError(
                f"missing {', '.join(missing)}", where="inputs", expected=", ".join(map(str, graph.inputs))
            )
        inputs = [inputs[v.name] for v in graph.inputs]
    if len(inputs) != len(graph.inputs):
        raise InputError(
            f"{len(inputs)} arrays",
            where="inputs",
            expected=f"{len(graph.inputs)}: {', '.join(map(str, graph.inputs))}",
        )
    values: dict[Value, Array] = {}
    for v, given in zip(graph.inputs, inputs, strict=True):
        array = np.asarray(given)
        if v.dtype is not DType.string and array.dtype != v.dtype.numpy:
            raise InputError(f"has dtype {array.dtype}", where=f"input {v.name!r}", expected=str(v.dtype))
        values[v] = array
    bound = bind(((v, values[v].shape) for v in graph.inputs), env)
    last_use = {v: i for i, n in enumerate(graph.nodes) for v in n.inputs if v is not None} | dict.fromkeys(
        graph.outputs, len(graph.nodes)
    )
    for i, n in enumerate(graph.nodes):
        arrays = [None if v is None else v.data if v.data is not None else values[v] for v in n.inputs]
        results = n.op.evaluate(arrays, substitute_attrs(n.attrs, bound))
        for v, r in zip(n.outputs, results, strict=True):
            _check(v, r, bound, n.op.name)
            values[v] = r
        for u in n.inputs:
            if u is not None and last_use[u] == i:
                values.pop(u, None)
    return [v.data if v.data is not None else values[v] for v in graph.outputs]


def _check(v: Value, array: Array, bound: dict[str, int], op: str) -> None:
    """Hold a result to its type; learn the symbols that only data determines."""
    want = Type(v.dtype, tuple(substitute(d, bound) for d in v.shape))
    if want.is_static and array.shape == want.shape and (array.dtype == v.dtype.numpy or v.dtype is DType.string):
        return
    if len(array.shape) != v.rank or (v.dtype is not DType.string and array.dtype != v.dtype.numpy):
        raise InternalError(f"gave {array.dtype}{list(array.shape)}", where=f"{op} %{v.name}", expected=str(v.type))
    bound |= bind([(v, array.shape)], bound)
