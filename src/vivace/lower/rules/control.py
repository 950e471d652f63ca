"""Control flow and foreign operators: `if`, `loop`, `onnx`.

Both branches of an `if` write the same storages. A `loop` with few turns, known when it is lowered, is written out;
otherwise its state lies in storages of its own: the body reads them, computes the next state beside them, and copies
it back.

Not handled: results whose size only the run decides; `lower` refuses storages of unknown size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vivace.base.dims import Dim, Symbol, symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Graph, Node, Value
from vivace.graph.ops.control import lacking, narrower
from vivace.graph.sizes import shape_symbols
from vivace.loops.kernel import Const, For, Kernel, Let, Stmt, Store
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.plan import Branch, Demand, Foreign, Instruction, Loop, Operand
from vivace.lower.prepare import prepare
from vivace.lower.rules.elementwise import Params, emit_pointwise, loop_var
from vivace.lower.views import Storage, View, dense

MAX_UNROLLED = 8  # turns: beyond this the steps of a body outgrow the cost of counting
MAX_UNROLLED_NODES = 64  # nodes in all turns together
FOREVER = np.iinfo(np.int64).max


def lower_if(ctx: Lowering, g: Group) -> None:
    """Lower both branches onto the same results."""
    node = g.anchor
    cond_value, *captures = node.inputs
    assert cond_value is not None
    cond = operand_of(ctx, cond_value)
    views = [ctx.view(v) for v in captures if v is not None]
    results = [ctx.target(v) for v in node.outputs]
    branches = []
    for graph in (node.attrs["then"], node.attrs["else"]):
        body = lower_body(ctx, graph, views, results)
        branches.append((*_demands(ctx, graph, g.nodes), *body))
    ctx.body.append(Branch("if", cond, branches[0], branches[1], g.nodes))


def _demands(ctx: Lowering, graph: Graph, nodes: tuple[Node, ...]) -> tuple[Demand, ...]:
    """What a branch or body asks of sizes that the graphs around it do not."""
    outer: dict[str, Symbol] = {}
    around: Lowering | None = ctx
    while around is not None:
        outer = shape_symbols(around.graph) | outer
        around = around.parent
    bounds = narrower(graph, outer)
    told = [f"{name} from {s.lo or 0} to {'any' if s.hi is None else s.hi}" for name, s in sorted(bounds.items())]
    return (Demand(lacking(bounds, outer), ", ".join(told), nodes),) if told else ()


def lower_body(ctx: Lowering, graph: Graph, inputs: Sequence[View], outputs: Sequence[View]) -> tuple[Instruction, ...]:
    """The instructions of a nested graph whose inputs lie at `inputs` and whose outputs are to lie at `outputs`."""
    graph = prepare(graph, ctx.without)
    inner = Lowering(graph, ctx.isa, parent=ctx)
    inner.views.update(zip(graph.inputs, inputs, strict=True))
    return inner.run(list(zip(graph.outputs, outputs, strict=True)))


def operand_of(ctx: Lowering, value: Value) -> Operand:
    """Where a single element lies in memory."""
    view = ctx.view(value)
    if view.storage is None:
        view = ctx.contiguous(view, value.name)
    assert view.storage is not None
    return Operand(view.storage, view.offset)


def lower_loop(ctx: Lowering, g: Group) -> None:
    """Write the turns out, or make a loop of the plan."""
    node = g.anchor
    n_turns = _turns(node)
    if (
        n_turns is not None
        and n_turns <= MAX_UNROLLED
        and n_turns * len(node.attrs["body"].nodes) <= MAX_UNROLLED_NODES
    ):
        _unrolled(ctx, node, n_turns)
        return
    _counted(ctx, g)


def _turns(node: Node) -> int | None:
    """How often the body runs, where that is known; None otherwise."""
    trip, cond = (*node.inputs, None, None)[:2]
    body: Graph = node.attrs["body"]
    flag = body.outputs[0]
    goes_on = flag is body.inputs[1] or (flag.data is not None and bool(flag.data.reshape(())))
    starts = cond is None or (cond.data is not None and bool(cond.data.reshape(())))
    if cond is not None and cond.data is not None and not starts:
        return 0
    if trip is None or trip.data is None or not goes_on or not starts:
        return None
    return max(0, int(trip.data.reshape(())))


def _unrolled(ctx: Lowering, node: Node, n_turns: int) -> None:
    body: Graph = node.attrs["body"]
    n_state, inputs = node.attrs["n_state"], [v for v in node.inputs[2:] if v is not None]
    state = [ctx.view(v) for v in inputs[:n_state]]
    captures = [ctx.view(v) for v in inputs[n_state:]]
    results = [ctx.target(v) for v in node.outputs]
    go = ctx.constant(np.asarray(True), "true", ("true",))
    ctx.body += _demands(ctx, body, (node,)) if n_turns else ()
    for turn in range(n_turns):
        last = turn == n_turns - 1
        following = (
            results[:n_state] if last else [ctx.temporary(v.name, v.dtype, v.shape) for v in node.outputs[:n_state]]
        )
        slices = [_slice(scan, turn) for scan in results[n_state:]]
        flag = ctx.temporary("go", DType.bool, ())
        index = ctx.constant(np.asarray(turn, np.int64), f"turn{turn}", ("turn", turn))
        ctx.body += lower_body(ctx, body, [index, go, *state, *captures], [flag, *following, *slices])
        state = following
    if not n_turns:
        for source, out in zip(state, results, strict=False):
            ctx.copy(source, out, (node,))


def _slice(scan: View, at: Dim) -> View:
    return View(scan.storage, scan.dtype, scan.shape[1:], scan.strides[1:], scan.offset + at * scan.strides[0])


def _counted(ctx: Lowering, g: Group) -> None:
    node = g.anchor
    body: Graph = node.attrs["body"]
    n_state, inputs = node.attrs["n_state"], [v for v in node.inputs[2:] if v is not None]
    trip, cond = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    counter = ctx.storage("turn", DType.i64, 1)
    captures = [ctx.view(v) for v in inputs[n_state:]]
    results = [ctx.target(v) for v in node.outputs]
    state = [_own(ctx, v) for v in inputs[:n_state]]
    limit = ctx.constant(np.asarray(FOREVER), "forever", ("forever",)) if trip is None else ctx.view(trip)
    if limit.storage is None:
        limit = ctx.contiguous(limit, "limit")
    assert limit.storage is not None
    go = ctx.temporary("go", DType.bool, ())
    if cond is None:
        emit_pointwise(ctx, "fill", [], go, lambda xs: Const(True, DType.bool), (node,))
    else:
        ctx.copy(ctx.view(cond), go, (node,))
    next_go = ctx.temporary("go_next", DType.bool, ())
    following = [ctx.temporary(f"{v.name}_next", v.dtype, v.shape) for v in node.outputs[:n_state]]
    slices = [ctx.temporary(f"{v.name}_slice", v.dtype, v.shape[1:]) for v in node.outputs[n_state:]]
    turn = dense(counter, ())
    outer, ctx.body = ctx.body, [*_demands(ctx, body, g.nodes)]
    ctx.body += lower_body(ctx, body, [turn, go, *state, *captures], [next_go, *following, *slices])
    ctx.copy(next_go, go, (node,))
    for source, out in zip(following, state, strict=True):
        ctx.copy(source, out, (node,))
    for source, scan in zip(slices, results[n_state:], strict=True):
        _stack(ctx, source, scan, turn, node)
    turns, ctx.body = tuple(ctx.body), outer
    assert go.storage is not None
    carried: list[Storage] = [
        counter,
        go.storage,
        *(v.storage for v in (*state, *results[n_state:]) if v.storage is not None),
    ]
    ctx.body.append(
        Loop("loop", counter, Operand(limit.storage, limit.offset), go.storage, turns, tuple(carried), g.nodes)
    )
    for source, out in zip(state, results, strict=False):
        ctx.copy(source, out, (node,))


def _own(ctx: Lowering, value: Value) -> View:
    """A copy of a value that the loop may change."""
    out = ctx.temporary(f"{value.name}_state", value.dtype, value.shape)
    ctx.copy(ctx.view(value), out)
    return out


def _stack(ctx: Lowering, source: View, scan: View, turn: View, node: Node) -> None:
    """Copy a slice to its place, which the counter says."""
    params = Params()
    index = tuple(loop_var(i, n) for i, n in enumerate(source.shape))
    at = Let("at", params.load(turn, ()))
    value = params.load(source, index)
    body: tuple[Stmt, ...] = (Store(params.buffer(scan, writable=True), (symbol("at", 0), *index), value),)
    for i in reversed(range(len(source.shape))):
        body = (For(f"i{i}", source.shape[i], body, "vector" if i == len(source.shape) - 1 else "serial"),)
    spec = Kernel("k", tuple(params.buffers), (For("b", 1, (at, *body), "parallel"),))
    ctx.emit("stack", spec, params.views, len(params.views) - 1, (node,), 0, updates=True)


def lower_onnx(ctx: Lowering, g: Group) -> None:
    """Leave a node to another provider, on dense copies of what it reads."""
    node = g.anchor
    inputs = [None if v is None else ctx.contiguous(ctx.view(v), f"{v.name}_dense") for v in node.inputs]
    outputs = []
    late: list[tuple[View, View]] = []
    for v in node.outputs:
        out = ctx.target(v)
        if not out.is_dense:
            late.append((out, ctx.temporary(v.name, v.dtype, v.shape)))
            out = late[-1][1]
        outputs.append(out)
    ctx.body.append(Foreign("onnx", node, tuple(inputs), tuple(outputs), node.attrs.get("reason", "")))
    for out, source in late:
        ctx.copy(source, out, (node,))
