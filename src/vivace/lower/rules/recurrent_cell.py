"""The step of a recurrent layer as loops: state times recurrent weights, then the cell of lstm, gru or rnn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vivace.base.dims import Dim, symbol
from vivace.loops.expressions import add, div, mul, sub
from vivace.loops.kernel import (
    Binary,
    Buffer,
    Cast,
    Const,
    Expr,
    For,
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
from vivace.lower.rules.elementwise import Params
from vivace.lower.scalar import const
from vivace.lower.views import View

GATES = {"lstm": 4, "gru": 3, "rnn": 1}


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
        self.gates = self._local("gates", hidden * GATES[name])
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


def _bounded(x: Expr) -> Expr:
    """0.2 x + 0.5 within [0, 1]."""
    line = add(mul(x, const(0.2, x)), const(0.5, x))
    return Binary("min", Binary("max", line, const(0.0, x)), const(1.0, x))


def _elu(x: Expr) -> Expr:
    return Select(Binary("lt", x, const(0.0, x)), Unary("expm1", Binary("min", x, const(0.0, x))), x)


def _softplus(x: Expr) -> Expr:
    """log(1 + e^x) = max(x, 0) + log1p(e^-|x|), which does not overflow."""
    return add(Binary("max", x, const(0.0, x)), Unary("log1p", Unary("exp", Unary("neg", Unary("abs", x)))))


# The parameters are those of `graph.ops.recurrent`.
ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "Sigmoid": lambda x: Unary("sigmoid", x),
    "Tanh": lambda x: Unary("tanh", x),
    "Relu": lambda x: Binary("max", x, const(0.0, x)),
    "LeakyRelu": lambda x: Select(Binary("lt", x, const(0.0, x)), mul(x, const(0.01, x)), x),
    "ThresholdedRelu": lambda x: Select(Binary("gt", x, const(1.0, x)), x, const(0.0, x)),
    "HardSigmoid": _bounded,
    "Elu": _elu,
    "Softsign": lambda x: div(x, add(const(1.0, x), Unary("abs", x))),
    "Softplus": _softplus,
}
