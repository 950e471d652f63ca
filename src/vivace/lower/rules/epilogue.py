"""The element-wise tail of a group with its own loops: what happens to each result before it is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.loops.contraction import substitute_expr
from vivace.loops.kernel import Binary, Cast, Expr, Fma, Lookup, Read, Select, Unary
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.elementwise import Params, Tree
from vivace.lower.views import View

ACC = Read("acc", DType.f32)
COLUMN = symbol("n", 0)


class Epilogue:
    """The element-wise tail of a contraction: buffers for what it reads, and the expression over `acc`.

    `bias` is added to the accumulator; a function gives the anchor's result as an expression over `acc` instead.
    `shape` is the shape of the anchor's result; `index` gives, per axis of that shape, the loop symbol that walks it.
    `columns` are vectors that stand for values of the tail, read at the column `n`.
    """

    def __init__(
        self, ctx: Lowering, g: Group, bias: View | Callable[[Params], Expr] | None, index: Sequence[Dim],
        columns: Mapping[Value, View] = {},
    ) -> None:  # fmt: skip
        anchor = g.anchor.outputs[0]
        self.params = Params()
        at = tuple(index)
        acc: Expr = ACC
        if isinstance(bias, View):
            acc = Binary("add", ACC, self.params.load(bias.expand(anchor.shape), at))
        elif bias is not None:
            acc = bias(self.params)
        rest = [n for n in g.nodes if n is not g.anchor]
        if rest:
            tree = Tree(ctx, rest, g.output, given=[anchor])

            def leaf(v: Value) -> Expr:
                return self.params.load(columns[v], (COLUMN,)) if v in columns else self.params.load(tree.leaves[v], at)

            acc = tree.expr(leaf, {anchor: acc})
        self.expr: Expr | None = None if acc is ACC else acc
        self.extra = tuple(self.params.buffers)
        self.views = list(self.params.views)

    def at(self, index: Mapping[str, Dim], acc: Expr) -> Expr:
        """The expression with `acc` in the place of the accumulator and loop symbols replaced."""
        return acc if self.expr is None else _with_acc(substitute_expr(self.expr, index), acc)


def _with_acc(e: Expr, acc: Expr) -> Expr:
    match e:
        case Read(name="acc"):
            return acc
        case Unary(x=x) | Cast(x=x) | Lookup(x=x):
            return replace(e, x=_with_acc(x, acc))
        case Binary(a=a, b=b):
            return replace(e, a=_with_acc(a, acc), b=_with_acc(b, acc))
        case Fma(a=a, b=b, c=c):
            return Fma(_with_acc(a, acc), _with_acc(b, acc), _with_acc(c, acc))
        case Select(cond=c, a=a, b=b):
            return Select(_with_acc(c, acc), _with_acc(a, acc), _with_acc(b, acc))
        case _:
            return e


def tail_flops(g: Group) -> Dim:
    total: Dim = 0
    for n in g.nodes:
        total = total + n.cost.flops
    return total
