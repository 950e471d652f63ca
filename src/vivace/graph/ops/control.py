"""Control flow, and operators that we do not lower.

if{then: Graph, else: Graph}(cond, *captures)
        both graphs take the captures as inputs and give outputs of equal types
loop{body: Graph, n_state, n_scan}(trip?, cond?, *state, *captures) -> *state, *scans
        body inputs: iteration i64[], cond bool[], *state, *captures; body outputs: cond, *state, *scan slices.
        Runs while iteration < trip and cond; state keeps its types; a scan output is the slices stacked on a new
        first axis,
        of the static length `length` where trip is a constant and cond absent, otherwise of a symbol of its own.
        attr length: Dim
onnx{node: bytes, opset, domain, types, names, reason, late}(*inputs)
        a serialized NodeProto that a provider runs. `types` are the output types; `names` name the inputs as the
        node (and the graphs
        inside it) knows them; `reason` says why it is not lowered; `late`, that a size of its results is only assumed
        (what else the model says of them) or a symbol that it brings. The graph floor cannot run it: a provider sets
        `RUN_ONNX`.

Rule NARROWER: a symbol may have tighter bounds inside a nested graph than outside: the graph is only meant for sizes
within them (a branch that reads 512 samples, say). Types are compared with the outer bounds. A branch or body that runs
at other sizes is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vivace.base.dims import Dim, Expr, Symbol, maximum, symbol, symbols
from vivace.base.dtypes import DType
from vivace.base.errors import GraphError, UnsupportedError
from vivace.graph.graph import Attrs, Graph, Op, Type, substitute_type
from vivace.graph.ops.shapes import need, same

Array = np.ndarray
OnnxHook = Callable[[Sequence[Array | None], Attrs], tuple[Array, ...]]
RUN_ONNX: list[OnnxHook] = []
"""Set by a provider (the last one wins): runs an `onnx` node on arrays."""


def _widened(t: Type, outer: Sequence[Type | None]) -> Type:
    """A type of a nested graph with its symbols as the outer graph bounds them (rule NARROWER)."""
    env = {s.name: Expr((((s,), 1),)) for o in outer if o is not None for d in o.shape for s in symbols(d)}
    return substitute_type(t, env)


def narrower(graph: Graph, outer: Mapping[str, Symbol]) -> dict[str, Symbol]:
    """The symbols, of those outside, that a nested graph bounds more tightly (rule NARROWER)."""
    values = (*graph.inputs, *(v for n in graph.nodes for v in n.outputs))
    found: dict[str, Symbol] = {}
    for s in {s for v in values for d in v.shape for s in symbols(d) if s.name in outer}:
        known = found.get(s.name, outer[s.name])
        low = s.lo if known.lo is None or (s.lo is not None and s.lo > known.lo) else known.lo
        high = s.hi if known.hi is None or (s.hi is not None and s.hi < known.hi) else known.hi
        if (low, high) != (known.lo, known.hi):
            found[s.name] = Symbol(s.name, low, high)
    return found


def lacking(bounds: Mapping[str, Symbol], outer: Mapping[str, Symbol]) -> Dim:
    """By how much sizes are outside of tighter bounds, in all: 0 where they fit."""
    total: Dim = 0
    for name, s in sorted(bounds.items()):
        size = symbol(name, outer[name].lo, outer[name].hi)
        total += maximum(0 if s.lo is None else s.lo - size, 0) + maximum(0 if s.hi is None else size - s.hi, 0)
    return total


def _match(got: Type, want: Type, where: str) -> None:
    if got.dtype is not want.dtype or got.rank != want.rank:
        raise GraphError(f"types are {got} and {want}", where=where, expected="equal types")
    for a, b in zip(got.shape, want.shape, strict=True):
        same(a, b, where)


def _scalar(t: Type, dtype: DType, where: str) -> None:
    if t.dtype is not dtype or t.size != 1:
        raise GraphError(f"operand is {t}", where=where, expected=f"{dtype}[]")


def _operands(graph: Graph, types: Sequence[Type | None], where: str) -> None:
    if len(graph.inputs) != len(types):
        raise GraphError(f"the graph takes {len(graph.inputs)} inputs and is given {len(types)}", where=where)
    for i, v in enumerate(graph.inputs):
        _match(_widened(v.type, types), need(types, i, where), where)


def _if(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    _scalar(need(types, 0, "if"), DType.bool, "if")
    then, other = attrs["then"], attrs["else"]
    for g in (then, other):
        _operands(g, types[1:], "if")
    if len(then.outputs) != len(other.outputs):
        raise GraphError("the branches give different numbers of outputs", where="if")
    for a, b in zip(then.outputs, other.outputs, strict=True):
        _match(_widened(a.type, types), _widened(b.type, types), "if")
    return tuple(_widened(v.type, types) for v in then.outputs)


def _if_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    from vivace.graph.reference import evaluate

    cond = xs[0]
    assert cond is not None
    return tuple(evaluate(attrs["then" if bool(cond.reshape(())) else "else"], xs[1:]))


def _loop(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
    body, n_state, n_scan = attrs["body"], attrs["n_state"], attrs["n_scan"]
    if types[0] is not None:
        _scalar(types[0], DType.i64, "loop")
    if len(types) > 1 and types[1] is not None:
        _scalar(types[1], DType.bool, "loop")
    scalars = (Type(DType.i64, ()), Type(DType.bool, ()))
    _operands(body, (*scalars, *types[2:]), "loop")
    if len(body.outputs) != 1 + n_state + n_scan:
        raise GraphError(
            f"the body gives {len(body.outputs)} outputs", where="loop", expected=f"{1 + n_state + n_scan}"
        )
    _scalar(body.outputs[0].type, DType.bool, "loop")
    states = tuple(need(types, 2 + i, "loop") for i in range(n_state))
    for v, t in zip(body.outputs[1:], states, strict=False):
        _match(_widened(v.type, types), t, "loop")
    slices = [_widened(v.type, types) for v in body.outputs[1 + n_state :]]
    scans = tuple(Type(t.dtype, (attrs["length"], *t.shape)) for t in slices)
    return states + scans


def _loop_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    from vivace.graph.reference import evaluate

    body, n_state = attrs["body"], attrs["n_state"]
    trip, cond, *rest = (*xs, None)[: max(2, len(xs))]
    captures = rest[n_state:]
    go, limit, i = cond is None or bool(cond.reshape(())), None if trip is None else int(trip.reshape(())), 0
    state: Sequence[Array | None] = rest[:n_state]
    slices: list[list[Array]] = [[] for _ in range(attrs["n_scan"])]
    while go and (limit is None or i < limit):
        flag, *outs = evaluate(body, [np.asarray(i, np.int64), np.asarray(go), *state, *captures])
        go, state, i = bool(flag.reshape(())), outs[:n_state], i + 1
        for kept, new in zip(slices, outs[n_state:], strict=True):
            kept.append(new)
    scans = []
    for v, kept in zip(body.outputs[1 + n_state :], slices, strict=True):
        empty = (0, *(d if isinstance(d, int) else 0 for d in v.shape))
        scans.append(np.stack(kept) if kept else np.zeros(empty, v.dtype.numpy))
    return (*(s for s in state if s is not None), *scans)


def _onnx_run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
    if not RUN_ONNX:
        raise UnsupportedError(
            f"an operator is left to another provider ({attrs['reason']})",
            where=attrs["name"],
            hint="install a provider such as onnxruntime",
        )
    return RUN_ONNX[-1](xs, attrs)


def _unknown(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    return 0


def _branch_flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    """The work of the dearer branch is not known before it runs; count the first."""
    total: Dim = 0
    for n in attrs["then"].nodes:
        total = total + n.cost.flops
    return total


def _loop_flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
    total: Dim = 0
    for n in attrs["body"].nodes:
        total = total + n.cost.flops
    return total * attrs["length"]


FAMILY = (
    Op("if", _if, _if_run, _branch_flops),
    Op("loop", _loop, _loop_run, _loop_flops),
    Op("onnx", lambda types, attrs: tuple(attrs["types"]), _onnx_run, _unknown, exact=False, tolerance=1e-5),
)
