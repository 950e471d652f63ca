"""lstm, gru and rnn: one product projects the inputs of all steps, then one kernel walks the steps.

A unit of the walk is a few sequences of one direction (one where their lengths differ); their state stays in local
memory. Each step first multiplies the state with the recurrent weights, packed as [direction][panel][hidden][lanes]
so that the weights are read in the order in which they lie, then computes the cell for all hidden units. Sequences
and directions are independent, so they may run on several threads.

Half types are computed in f32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.graph.build import Builder, constant
from vivace.graph.graph import Graph, Node, Op, Value
from vivace.loops.kernel import (
    Alloc,
    Binary,
    Buffer,
    Cast,
    Const,
    Expr,
    For,
    Index,
    Kernel,
    Let,
    Load,
    Read,
    Reduce,
    Select,
    Stmt,
    Store,
    Unary,
    dtype_of,
)  # fmt: skip
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.elementwise import Params
from vivace.lower.views import View

PANEL_LANES = (
    64,
    48,
    32,
    16,
    8,
)  # columns that one pass over the state computes; four 512-bit accumulators hide the latency of an add
_GATES = {"lstm": 4, "gru": 3, "rnn": 1}
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


@dataclass(frozen=True, slots=True)
class Operands:
    """What the walk reads: projected inputs [T,N,dirs,gates*H], packed recurrent weights, and what is optional as
    [..] views or None."""

    projected: View
    recurrent: tuple[View, ...]
    reset_bias: View | None
    lengths: View | None
    h0: View | None
    c0: View | None
    peepholes: View | None


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
    name, hidden, gates = node.op.name, node.attrs["hidden"], _GATES[node.op.name]
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
    flops = 2 * steps * span.units * span.rows * span.count * hidden * hidden * _GATES[node.op.name]
    ctx.emit(node.op.name, spec, [params.views[i] for i in order], written, (node,), flops)


def loop_symbol(name: str, extent: int) -> Dim:
    return symbol(name, 0, max(extent - 1, 1))


def vector(name: str, extent: Dim, body: Sequence[Stmt]) -> For:
    return For(name, extent, tuple(body), "vector")


class Layer:
    """What the sequences of a unit share: the weights, and local memory with a row per sequence."""

    def __init__(
        self,
        params: Params,
        ops: Operands,
        name: str,
        attrs: dict[str, object],
        functions: Sequence[str],
        hidden: int,
        rows: int,
        d: Dim,
    ) -> None:
        self.params, self.ops, self.name, self.attrs, self.hidden, self.rows, self.d = (
            params,
            ops,
            name,
            attrs,
            hidden,
            rows,
            d,
        )
        self.kind = ops.projected.dtype
        self.functions = [ACTIVATIONS[f] for f in functions]
        self.h = self._local("h", hidden)
        self.c = self._local("c", hidden) if name == "lstm" else None
        self.gates = self._local("gates", hidden * _GATES[name])
        self.reset = self._local("reset", hidden) if len(ops.recurrent) > 1 else None

    def _local(self, name: str, size: int) -> Buffer:
        return Buffer(name, self.kind, (self.rows, size), (size, 1), writable=True)

    def written(self, view: View, index: tuple[Dim, ...], value: Expr) -> Store:
        value = value if view.dtype is self.kind else Cast(view.dtype, value)
        return Store(self.params.buffer(view, writable=True), index, value)

    def as_computed(self, x: Expr) -> Expr:
        return x if dtype_of(x) is self.kind else Cast(self.kind, x)

    def product(self, which: int, state: Buffer, start: int) -> Stmt:
        """gates[.., start..] = state . R, panel by panel; all sequences of the unit use a weight while it is in a
        register."""
        weights = self.ops.recurrent[which]
        _, panels, _, lanes = weights.shape
        assert isinstance(panels, int) and isinstance(lanes, int)
        p: Dim = symbol(f"p{which}", 0) if panels > 1 else 0
        j, k = symbol(f"j{which}", 0, lanes), symbol(f"k{which}", 0)
        weight = self.params.load(weights, (self.d, p, k, j))
        sums: list[Stmt] = []
        stores: list[Stmt] = []
        for q in range(self.rows):
            sums.append(Let(f"sum{q}", Reduce("add", f"k{which}", self.hidden, mul(Load(state, (q, k)), weight))))
            stores.append(Store(self.gates, (q, p * lanes + j + start), Read(f"sum{q}", self.kind)))
        loop = vector(f"j{which}", lanes, sums + stores)
        return For(f"p{which}", panels, (loop,)) if panels > 1 else loop


class Cell:
    """The arithmetic of one step of sequence `n`, whose state is row `q` of the local memory."""

    def __init__(self, layer: Layer, n: Dim, q: int) -> None:
        self.layer, self.n, self.q = layer, n, q
        self.params, self.ops, self.attrs, self.hidden, self.d = (
            layer.params,
            layer.ops,
            layer.attrs,
            layer.hidden,
            layer.d,
        )
        self.kind, self.functions = layer.kind, layer.functions

    def load(self, buffer: Buffer, i: Dim) -> Load:
        return Load(buffer, (self.q, i))

    def start(self, buffer: Buffer, state: View | None, i: Dim) -> Store:
        given = None if state is None else self.layer.as_computed(self.params.load(state, (self.n, self.d, i)))
        return Store(buffer, (self.q, i), Const(0.0, self.kind) if given is None else given)

    def reset(self, t: Dim, i: Dim) -> list[Stmt]:
        """The state as the reset gate leaves it."""
        assert self.layer.reset is not None
        gate = self.functions[0](self._clip(self._gate(t, 1, i)))
        return [Store(self.layer.reset, (self.q, i), mul(gate, self.load(self.layer.h, i)))]

    def _gate(self, t: Dim, gate: int, u: Dim) -> Expr:
        """Projected input plus recurrent product of one gate."""
        at = u + gate * self.hidden
        return add(self.params.load(self.ops.projected, (t, self.n, self.d, at)), self.load(self.layer.gates, at))

    def _clip(self, x: Expr) -> Expr:
        limit = self.attrs["clip"]
        if limit is None:
            return x
        assert isinstance(limit, (int, float))
        return Binary("min", Binary("max", x, Const(-float(limit), self.kind)), Const(float(limit), self.kind))

    def _peephole(self, gate: int, x: Expr, c: Expr, u: Dim) -> Expr:
        """x + p * c, p in the order i o f."""
        if self.ops.peepholes is None:
            return x
        return add(
            x, mul(self.layer.as_computed(self.params.load(self.ops.peepholes, (self.d, u + gate * self.hidden))), c)
        )

    def finish(self, t: Dim, u: Dim) -> list[Stmt]:
        """The body of the loop over hidden units that gives the next state."""
        return {"lstm": self._lstm, "gru": self._gru, "rnn": self._rnn}[self.layer.name](t, u)

    def _lstm(self, t: Dim, u: Dim) -> list[Stmt]:
        assert self.layer.c is not None
        f, g, h = self.functions
        old, new = Read("old", self.kind), Read("new", self.kind)
        enter = Read("enter", self.kind)
        keep: Expr = f(self._clip(self._peephole(2, self._gate(t, 2, u), old, u)))
        if self.attrs["input_forget"]:
            keep = sub(Const(1.0, self.kind), enter)
        leave = f(self._clip(self._peephole(1, self._gate(t, 1, u), new, u)))
        return [
            Let("old", self.load(self.layer.c, u)),
            Let("enter", f(self._clip(self._peephole(0, self._gate(t, 0, u), old, u)))),
            Let("new", add(mul(keep, old), mul(enter, g(self._clip(self._gate(t, 3, u)))))),
            Store(self.layer.c, (self.q, u), new),
            Store(self.layer.h, (self.q, u), mul(leave, h(new))),
        ]

    def _gru(self, t: Dim, u: Dim) -> list[Stmt]:
        f, g = self.functions
        update, candidate, old = (Read(name, self.kind) for name in ("update", "candidate", "old"))
        inner: Expr = self.load(self.layer.gates, u + 2 * self.hidden)
        lets: list[Stmt] = [Let("update", f(self._clip(self._gate(t, 0, u))))]
        if self.layer.reset is None:
            if self.ops.reset_bias is not None:
                inner = add(inner, self.params.load(self.ops.reset_bias, (self.d, u)))
            lets.append(Let("reset_gate", f(self._clip(self._gate(t, 1, u)))))
            inner = mul(Read("reset_gate", self.kind), inner)
        projected = self.params.load(self.ops.projected, (t, self.n, self.d, u + 2 * self.hidden))
        return [
            *lets,
            Let("candidate", g(self._clip(add(projected, inner)))),
            Let("old", self.load(self.layer.h, u)),
            Store(self.layer.h, (self.q, u), add(mul(sub(Const(1.0, self.kind), update), candidate), mul(update, old))),
        ]

    def _rnn(self, t: Dim, u: Dim) -> list[Stmt]:
        return [Store(self.layer.h, (self.q, u), self.functions[0](self._clip(self._gate(t, 0, u))))]


def mul(a: Expr, b: Expr) -> Expr:
    return Binary("mul", a, b)


def add(a: Expr, b: Expr) -> Expr:
    return Binary("add", a, b)


def sub(a: Expr, b: Expr) -> Expr:
    return Binary("sub", a, b)


def _const(value: float, like: Expr) -> Const:
    return Const(value, dtype_of(like))


def _bounded(x: Expr) -> Expr:
    """0.2 x + 0.5 within [0, 1]."""
    line = add(mul(x, _const(0.2, x)), _const(0.5, x))
    return Binary("min", Binary("max", line, _const(0.0, x)), _const(1.0, x))


def _elu(x: Expr) -> Expr:
    return Select(Binary("lt", x, _const(0.0, x)), Unary("expm1", Binary("min", x, _const(0.0, x))), x)


def _softplus(x: Expr) -> Expr:
    """log(1 + e^x) = max(x, 0) + log1p(e^-|x|), which does not overflow."""
    return add(Binary("max", x, _const(0.0, x)), Unary("log1p", Unary("exp", Unary("neg", Unary("abs", x)))))


# The parameters are those of `graph.ops.recurrent`.
ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "Sigmoid": lambda x: Unary("sigmoid", x),
    "Tanh": lambda x: Unary("tanh", x),
    "Relu": lambda x: Binary("max", x, _const(0.0, x)),
    "LeakyRelu": lambda x: Select(Binary("lt", x, _const(0.0, x)), mul(x, _const(0.01, x)), x),
    "ThresholdedRelu": lambda x: Select(Binary("gt", x, _const(1.0, x)), x, _const(0.0, x)),
    "HardSigmoid": _bounded,
    "Elu": _elu,
    "Softsign": lambda x: Binary("div", x, add(_const(1.0, x), Unary("abs", x))),
    "Softplus": _softplus,
}
