"""Control flow: If, Loop, Scan.

A condition that is known at import selects its branch. A nested graph becomes a closed Graph: what it uses of the outer
graph (other than constants and known dims) comes in as captures.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import GraphProto

from vivace.base.dims import Dim, bounds, maximum
from vivace.base.dtypes import DType
from vivace.base.errors import BranchError, ModelError
from vivace.graph.graph import Graph, Type, Value, substitute_type
from vivace.graph.ops.shapes import DimMismatch
from vivace.onnx.call import Call, Result, onnx_op
from vivace.onnx.scope import Fallback, Scope, at_least_zero
from vivace.onnx.unify import BODY, TURN, Learnt


def _known_condition(c: Call, cond: Value | None) -> bool | None:
    if cond is None:
        return True
    contents = c.known(cond)
    return None if contents is None or contents.size != 1 else bool(contents.reshape(-1)[0])


@onnx_op("If")
def if_(c: Call, cond: Value) -> Result:
    from vivace.onnx.importer import import_inline

    then, other = c.attr("then_branch"), c.attr("else_branch")
    known = _known_condition(c, cond)
    if known is not None:
        return import_inline(c.scope, then if known else other)
    branches = [_branch(c, g, k) for k, g in (("then", then), ("else", other))]
    _unify(c, branches)
    captures = list({v: None for inner, _ in branches for v in inner.captures})
    graphs = [_close(c.scope, inner, g, outs, captures) for (inner, outs), g in zip(branches, (then, other))]
    result = c.if_(c.reshaped(cond, ()), *captures, **{"then": graphs[0], "else": graphs[1]})
    return result if isinstance(result, tuple) else (result,)


def _branch(c: Call, proto: GraphProto, which: str) -> tuple[Scope, list[Value]]:
    """A branch as a graph of its own. Raises: BranchError where it contradicts itself or what is around it."""
    from vivace.onnx.importer import import_subgraph

    try:
        return import_subgraph(c.scope, proto, (), c.site, f"{c.site}/{which}")
    except ModelError as e:
        raise BranchError(e.what, where=e.where, expected=e.expected, hint=e.hint) from e


def _unify(c: Call, branches: Sequence[tuple[Scope, list[Value]]]) -> None:
    """Both branches must give equal types, for sizes that both can take. Raises: DimMismatch, from which the importer
    learns; Learnt; Fallback.
    """
    results = list(zip(branches[0][1], branches[1][1]))
    then, other = paths = [inner.path for inner, _ in branches]
    for a, b in results:
        if a.rank != b.rank:
            _choose_branch(c, paths)
        if a.dtype is not b.dtype or a.rank != b.rank:
            raise Fallback(f"its branches give {a.type} and {b.type}")
    assume = c.scope.session.assume
    if assume.share(then, other, c.scope.paths):
        raise Learnt
    for name, d in (pair for path in paths for pair in assume.equalities(path).items()):
        raise Fallback(f"one of its branches needs {name} to be {d}")
    for a, b in results:
        for m, n in zip(a.shape, b.shape):
            m, n = (assume.apply(d) for d in (m, n))  # without what each branch assumes for itself
            if m != n:
                if isinstance(m, int) and isinstance(n, int):
                    raise Fallback(f"its branches give {a.type} and {b.type}")
                raise DimMismatch(m, n, "If")


def _choose_branch(c: Call, paths: Sequence[str]) -> None:
    """Exporters write squeeze as `if size == 1: squeeze, else: keep`: what makes the squeeze right is what makes the
    condition true.

    Raises: Learnt, after the assumption of the one branch that made some was taken over for the outer graph.
    """
    assume = c.scope.session.assume
    assuming = [p for p in paths if assume.inside(p)]
    if len(assuming) == 1 and assume.promote(assuming[0], c.scope.paths):
        raise Learnt


def _close(scope: Scope, inner: Scope, proto: GraphProto, outputs: Sequence[Value], captures: Sequence[Value]) -> Graph:
    """Finish a nested graph with one input for each capture, after its own inputs."""
    for v in captures:
        inner.builder.inputs.append(inner.capture(v))
    return inner.finish([(o.name, v) for o, v in zip(proto.output, outputs)], proto.name or "body")


@onnx_op("Loop")
def loop(c: Call, trip: Value | None, cond: Value | None = None, *state: Value) -> Result:
    from vivace.onnx.importer import import_subgraph

    body, n = c.attr("body"), len(state)
    types = (Type(DType.i64, ()), Type(DType.bool, ()), *(v.type for v in state))
    if len(body.input) != 2 + n:
        raise c.error(f"its body has {len(body.input)} inputs", f"{2 + n}")
    inner, outputs = import_subgraph(c.scope, body, types, c.site, _body(c, _has_turns(c, trip, cond)))
    carried = outputs[1 : 1 + n]
    _check_state(c, state, carried)
    captures = list(inner.captures)
    graph = _close(c.scope, inner, body, [_as_scalar(inner, outputs[0]), *outputs[1:]], captures)
    n_scan = len(outputs) - 1 - n
    _check_slices(c, outputs[1 + n :])
    length = _length(c, trip, cond, body, outputs[0], has_scans=n_scan > 0)
    first = None if cond is None or _known_condition(c, cond) is True else c.reshaped(cond, ())
    limit = None if trip is None else c.reshaped(trip, ())
    result = c.loop(limit, first, *state, *captures, body=graph, n_state=n, n_scan=n_scan, length=length)
    return result if isinstance(result, tuple) else (result,)


def _has_turns(c: Call, trip: Value | None, cond: Value | None) -> bool:
    """Whether a loop runs its body at least once, whatever the inputs are."""
    limit = None if trip is None else c.known(trip)
    if _known_condition(c, cond) is not True or (trip is not None and limit is None):
        return False
    return limit is None or (limit.size == 1 and _is_positive(limit.reshape(-1)[0]))


def _is_positive(d: Dim) -> bool:
    low, _ = bounds(d)
    return low is not None and low > 0


def _body(c: Call, has_turns: bool) -> str:
    """The path of a loop's body, by which `unify` knows whether it may assume sizes for itself."""
    return c.site + (BODY if has_turns else TURN)


def _check_slices(c: Call, slices: Sequence[Value]) -> None:
    """Results of a loop without turns have the sizes of its slices too. Raises: DimMismatch, from which the importer
    learns.
    """
    for d in (d for v in slices for d in v.shape):
        at_least_zero(c.scope.session.assume.apply(d), "Loop")


def _as_scalar(scope: Scope, cond: Value) -> Value:
    """The loop's condition as a scalar."""
    from vivace.graph.ops import OPS

    return cond if cond.rank == 0 else scope.emit(OPS["reshape"], [cond], {"shape": ()})[0]


def _check_state(c: Call, state: Sequence[Value], carried: Sequence[Value]) -> None:
    """A loop keeps the types of its state. Raises: Fallback."""
    apply = c.scope.session.assume.apply  # without what the body assumes for itself
    for before, after in zip(state, carried, strict=True):
        if before.dtype is not after.dtype or before.rank != after.rank:
            raise Fallback(f"its state changes from {before.type} to {after.type}")
        for a, b in zip(before.shape, after.shape):
            if apply(a) != apply(b):
                raise Fallback(f"its state grows from {before.type} to {after.type}")


def _length(c: Call, trip: Value | None, cond: Value | None, body: GraphProto, last: Value, has_scans: bool) -> Dim:
    """How many iterations there are, when only the trip count ends the loop; else a symbol of its own where results
    have that size, and one where none has: then no array ever tells it.
    """
    passed = body.output[0].name == body.input[1].name or (last.data is not None and bool(last.data.all()))
    if not passed:
        source = [n for n in body.node if body.output[0].name in n.output]
        passed = len(source) == 1 and source[0].op_type == "Identity" and source[0].input[0] == body.input[1].name
    if passed and _known_condition(c, cond) is True and trip is not None and c.known(trip) is not None:
        return maximum(c.scalar(trip, "the trip count"), 0)
    return c.scope.session.fresh_symbol(f"{c.node.output[0] or 'loop'}_length") if has_scans else 1


@onnx_op("Scan", since=9)
def scan(c: Call, *inputs: Value) -> Result:
    """Scan as a loop: each step takes one slice of every scan input."""
    body, n_scan = c.attr("body"), c.attr("num_scan_inputs")
    n_state = len(inputs) - n_scan
    states, sequences = inputs[:n_state], inputs[n_state:]
    n_out = len(body.output) - n_state
    axes = [c.axis(a, x.rank) for a, x in zip(c.attr("scan_input_axes", (0,) * n_scan), sequences)]
    backwards = c.attr("scan_input_directions", (0,) * n_scan)
    length = sequences[0].shape[axes[0]]
    for x, a in zip(sequences, axes):
        if x.shape[a] != length:
            raise DimMismatch(length, x.shape[a], "Scan")
    wrapper = Scope(c.scope.session, c.scope, _body(c, _is_positive(length)))
    i = wrapper.builder.input(f"{c.node.name or 'scan'}_i", Type(DType.i64, ()))
    go = wrapper.builder.input(f"{c.node.name or 'scan'}_go", Type(DType.bool, ()))
    carried = [
        wrapper.builder.input(f"{v.name}_in", substitute_type(s.type, wrapper.refined))
        for v, s in zip(body.input, states)
    ]
    step = Call(wrapper, c.node, c.opset, c.site)
    slices = []
    for x, a, back in zip(sequences, axes, backwards):
        at = step.sub(step.dims([length - 1], ()), i) if back else i
        slices.append(step.gather(wrapper.capture(x), at, axis=a))
    wrapper.names |= {v.name: x for v, x in zip(body.input, [*carried, *slices])}
    outputs = _import_body(wrapper, body)
    _check_state(c, states, outputs[:n_state])
    _check_slices(c, outputs[n_state:])
    captures = list(wrapper.captures)
    for v in captures:
        wrapper.builder.inputs.append(wrapper.captures[v])
    named = [(f"{c.node.name or 'scan'}_continue", go), *((o.name, v) for o, v in zip(body.output, outputs))]
    graph = wrapper.finish(named, body.name or "scan")
    trip = c.dims([length], ())
    outs = c.loop(trip, None, *states, *captures, body=graph, n_state=n_state, n_scan=n_out, length=length)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    for k in range(n_out):
        y = outs[n_state + k]
        if c.attr("scan_output_directions", (0,) * n_out)[k]:
            y = c.slice(y, starts=(y.shape[0] - 1, *[0] * (y.rank - 1)), sizes=y.shape, steps=(-1, *[1] * (y.rank - 1)))
        axis = c.axis(c.attr("scan_output_axes", (0,) * n_out)[k], y.rank)
        outs[n_state + k] = c.transposed(y, [*range(1, axis + 1), 0, *range(axis + 1, y.rank)])
    return tuple(outs)


def _import_body(scope: Scope, proto: GraphProto) -> list[Value]:
    """Import the nodes of a body into a scope whose names already hold the body's inputs."""
    from vivace.onnx.importer import import_nodes, initializers

    initializers(scope, proto, "body")
    import_nodes(scope, proto)
    outputs = [scope.lookup(v.name) for v in proto.output]
    if not all(isinstance(v, Value) for v in outputs):
        raise Fallback("its body gives values that are no tensors")
    return outputs
