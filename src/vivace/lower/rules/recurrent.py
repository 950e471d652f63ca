"""lstm, gru and rnn: one product projects the inputs of all steps, then one kernel walks the steps.

A unit of the walk is a few sequences of one direction (one where their lengths differ); their state stays in local
memory. Each step first multiplies the state with the recurrent weights, packed as [direction][panel][hidden][lanes]
so that the weights are read in the order in which they lie, then computes the cell for all hidden units. Sequences
and directions are independent, so they may run on several threads.

Half types are computed in f32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.graph.build import Builder, constant
from vivace.graph.graph import Graph, Node, Op, Value
from vivace.loops.kernel import (
    Alloc,
    Binary,
    Cast,
    Const,
    For,
    Index,
    Kernel,
    Let,
    Stmt,
    dtype_of,
)  # fmt: skip
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.elementwise import Params
from vivace.lower.rules.recurrent_cell import GATES, Cell, Layer, Operands, loop_symbol, vector
from vivace.lower.views import View

# Columns that one pass over the state computes: four 512-bit accumulators hide the latency of an add.
PANEL_LANES = (64, 48, 32, 16, 8)
_FUNCTIONS = {"lstm": 3, "gru": 2, "rnn": 1}


class Folding(Builder):
    """A builder that computes what depends on constants only."""

    def emit(
        self, op: Op, inputs: Sequence[Value | None], attrs: dict[str, object], names: Sequence[str] = ()
    ) -> tuple[Value, ...]:
        data = [None if v is None else v.data for v in inputs]
        if inputs and all(d is not None for d in data):
            return tuple(constant(np.ascontiguousarray(a), self.fresh("c")) for a in op.evaluate(data, attrs))
        return super().emit(op, inputs, attrs, names)

    def place(self, v: Value) -> Value:
        """An input of the graph under construction, unless `v` is constant."""
        return v if v.data is not None else self.input(v.name, v.type)


def lower_recurrent(ctx: Lowering, g: Group) -> None:
    """One step for the projection (a product), one for the walk; one walk per direction where their activations
    differ."""
    node = g.anchor
    hidden, name = node.attrs["hidden"], node.op.name
    dirs = 2 if node.attrs["direction"] == "bidirectional" else 1
    each = _FUNCTIONS[name]
    functions = [tuple(node.attrs["activations"][d * each : (d + 1) * each]) for d in range(dirs)]
    operands = _operands(ctx, node, dirs)
    y, *states = node.outputs
    time_first = (1, 0, 2, 3) if node.attrs["layout"] else (0, 2, 1, 3)  # to [T,N,dirs,H]
    batch_first = (0, 1, 2) if node.attrs["layout"] else (1, 0, 2)  # to [N,dirs,H]
    y_view = ctx.target(y).transpose(time_first)
    state_views = [ctx.target(v).transpose(batch_first) for v in states]
    walks = [(0, dirs)] if len(set(functions)) == 1 else [(d, 1) for d in range(dirs)]
    rows = 1 if operands.lengths is not None else 4 if ctx.isa.n_vector_registers >= 32 else 2
    for first, count in walks:
        for span in _spans(first, count, y_view.shape[1], rows):
            _walk(ctx, node, operands, y_view, state_views, functions[first], span, hidden)


def _operands(ctx: Lowering, node: Node, dirs: int) -> Operands:
    inputs: list[Value | None] = [*node.inputs, *[None] * (8 - len(node.inputs))]
    x, w, r, bias, lengths, h0, c0, peepholes = inputs
    assert x is not None and w is not None and r is not None
    name, hidden, gates = node.op.name, node.attrs["hidden"], GATES[node.op.name]
    kind = computed(x.dtype)
    split_reset = name == "gru" and not node.attrs["linear_before_reset"]
    b = Folding(node.origin, prefix=f"{node.outputs[0].name}_")

    def wide(v: Value) -> Value:
        return v if v.dtype is kind else b.cast(v, to=kind)

    weights, packed = wide(b.place(w)), wide(b.place(r))
    flat = b.reshape(b.transpose(weights, perm=(2, 0, 1)), shape=(x.shape[2], dirs * gates * hidden))
    projected = b.matmul(wide(b.place(x)), flat)
    reset_bias: Value | None = None
    if bias is not None:
        halves = b.reshape(wide(b.place(bias)), shape=(dirs, 2, gates, hidden))
        first, second = (b.reshape(_part(b, halves, 1, half, 1), shape=(dirs, gates, hidden)) for half in range(2))
        if (
            name == "gru" and not split_reset
        ):  # the reset gate scales the recurrent bias of the candidate with its product
            reset_bias = b.reshape(_part(b, second, 1, 2, 1), shape=(dirs, hidden))
            second = b.mul(second, b.const(np.array([1, 1, 0], kind.numpy).reshape(1, 3, 1)))
        projected = b.add(projected, b.reshape(b.add(first, second), shape=(dirs * gates * hidden,)))
    parts = [(0, 2 * hidden), (2 * hidden, hidden)] if split_reset else [(0, gates * hidden)]
    recurrent = [_pack(b, _part(b, packed, 1, start, size), hidden) for start, size in parts]
    views = _place(ctx, b, node, [projected, *recurrent, *([reset_bias] if reset_bias is not None else [])])
    over = views[0]
    if node.attrs["layout"]:
        over = over.transpose((1, 0, 2))
    t, n, _ = over.shape
    columns = gates * hidden
    over = View(
        over.storage,
        over.dtype,
        (t, n, dirs, columns),
        (*over.strides[:2], columns * over.strides[2], over.strides[2]),
        over.offset,
    )
    batch_first = (0, 1, 2) if node.attrs["layout"] else (1, 0, 2)

    def state(v: Value | None) -> View | None:
        return None if v is None else ctx.view(v).transpose(batch_first)

    return Operands(
        projected=over,
        recurrent=tuple(views[1 : 1 + len(recurrent)]),
        reset_bias=None if reset_bias is None else views[-1],
        lengths=None if lengths is None else ctx.view(lengths),
        h0=state(h0),
        c0=state(c0),
        peepholes=None if peepholes is None else ctx.view(peepholes),
    )


def computed(t: DType) -> DType:
    return DType.f64 if t is DType.f64 else DType.f32


def _part(b: Builder, v: Value, axis: int, start: int, size: int) -> Value:
    starts = tuple(start if i == axis else 0 for i in range(v.rank))
    sizes = tuple(size if i == axis else d for i, d in enumerate(v.shape))
    result: Value = b.slice(v, starts=starts, sizes=sizes, steps=(1,) * v.rank)
    return result


def _pack(b: Builder, r: Value, hidden: int) -> Value:
    """[dirs, columns, H] -> [dirs, panels, H, lanes]."""
    dirs, columns = r.shape[0], r.shape[1]
    assert isinstance(columns, int)
    lanes = panel_width(columns)
    split = b.reshape(r, shape=(dirs, columns // lanes, lanes, hidden))
    result: Value = b.transpose(split, perm=(0, 1, 3, 2))
    return result


def panel_width(columns: int) -> int:
    """Columns per panel: they must fill panels exactly."""
    return next((lanes for lanes in PANEL_LANES if columns % lanes == 0), columns)


def _place(ctx: Lowering, b: Folding, node: Node, values: Sequence[Value]) -> list[View]:
    """Lower the graph under construction; constants become constant storages."""
    computed_values = [v for v in values if v.data is None]
    graph: Graph = b.finish(computed_values)
    inner = Lowering(graph, ctx.isa, parent=ctx)
    by_name = {v.name: v for v in node.inputs if v is not None}
    for v in graph.inputs:
        inner.views[v] = ctx.view(by_name[v.name])
    targets = {v: ctx.temporary(f"{node.outputs[0].name}_{v.name}", v.dtype, v.shape) for v in computed_values}
    ctx.body += inner.run(list(targets.items()))
    return [targets[v] if v.data is None else ctx.constant(v.data, f"{node.outputs[0].name}_{v.name}") for v in values]


@dataclass(frozen=True, slots=True)
class Span:
    """Which part of the layer one kernel walks: directions `first` .. `first + count - 1`, units of `rows` sequences
    from `start` on."""

    first: int
    count: int
    start: Dim
    units: Dim
    rows: int


def _spans(first: int, count: int, n: Dim, rows: int) -> list[Span]:
    """Sequences by units of `rows`, and one by one what is left."""
    if rows == 1:
        return [Span(first, count, 0, n, 1)]
    together = [] if isinstance(n, int) and n < rows else [Span(first, count, 0, n // rows, rows)]
    return together + ([Span(first, count, n - n % rows, n % rows, 1)] if n % rows != 0 else [])


def _walk(
    ctx: Lowering,
    node: Node,
    ops: Operands,
    y: View,
    states: Sequence[View],
    functions: Sequence[str],
    span: Span,
    hidden: int,
) -> None:
    """The steps of one kernel, in order; all its sequences and directions are independent."""
    params = Params()
    unit, step, u = symbol("n", 0), symbol("s", 0), loop_symbol("u", hidden)
    d: Dim = symbol("d", 0) + span.first if span.count > 1 else span.first
    steps = y.shape[0]
    rows = [span.start + unit * span.rows + q for q in range(span.rows)]
    layer = Layer(params, ops, node.op.name, dict(node.attrs), functions, hidden, span.rows, d)
    cells = [Cell(layer, n, q) for q, n in enumerate(rows)]
    length: Dim = steps if ops.lengths is None else symbol("len", 0)
    backward: Dim = length - 1 - step
    t = backward if node.attrs["direction"] == "reverse" else step + d * (backward - step)
    body: list[Stmt] = [Alloc(b) for b in (layer.h, layer.c, layer.gates, layer.reset) if b is not None]
    if ops.lengths is not None:
        given = params.load(ops.lengths, (rows[0],))
        given = given if dtype_of(given) is DType.i64 else Cast(DType.i64, given)
        body.append(Let("len", Binary("max", Binary("min", given, Index(steps)), Const(0, DType.i64))))
    for cell in cells:
        body.append(vector("u0", hidden, [cell.start(layer.h, ops.h0, symbol("u0", 0))]))
        if layer.c is not None:
            body.append(vector("u1", hidden, [cell.start(layer.c, ops.c0, symbol("u1", 0))]))
    turn: list[Stmt] = [layer.product(0, layer.h, 0)]
    if layer.reset is not None:  # the candidate's product needs the reset state of all units
        turn += [vector("v", hidden, cell.reset(t, symbol("v", 0))) for cell in cells]
        turn.append(layer.product(1, layer.reset, 2 * hidden))
    for cell, n in zip(cells, rows, strict=True):
        turn.append(vector("u", hidden, [*cell.finish(t, u), layer.written(y, (t, n, d, u), cell.load(layer.h, u))]))
    body.append(For("s", length, tuple(turn)))
    if ops.lengths is not None:
        blank = layer.written(y, (length + symbol("z", 0), rows[0], d, symbol("u2", 0)), Const(0.0, layer.kind))
        body.append(For("z", steps - length, (vector("u2", hidden, [blank]),)))
    for k, (state, source) in enumerate(zip(states, (layer.h, layer.c), strict=False)):
        assert source is not None
        i = symbol(f"w{k}", 0)
        for cell, n in zip(cells, rows, strict=True):
            body.append(vector(f"w{k}", hidden, [layer.written(state, (n, d, i), cell.load(source, i))]))
    loops: tuple[Stmt, ...] = tuple(body)
    if span.count > 1:
        loops = (For("d", span.count, loops, "parallel"),)
    loops = (For("n", span.units, loops, "parallel"),)
    order = sorted(range(len(params.buffers)), key=lambda i: params.buffers[i].writable)
    written = [k for k, i in enumerate(order) if params.buffers[i].writable]
    spec = Kernel("k", tuple(params.buffers[i] for i in order), loops)
    flops = 2 * steps * span.units * span.rows * span.count * hidden * hidden * GATES[node.op.name]
    ctx.emit(node.op.name, spec, [params.views[i] for i in order], written, (node,), flops)
