"""About what one turn of a loop costs, and what follows for how the loop is written: as scalar code, twice, several
vectors together, in units for threads."""

from __future__ import annotations

from collections.abc import Iterator

from vivace.base.dims import Dim, bounds
from vivace.loops.analysis import varies
from vivace.loops.kernel import Expr, For, Guard, Let, Reduce, Stmt, Store, Unary, walk
from vivace.targets.cpu.memory import flat_index
from vivace.targets.cpu.tiles import linear_in

_FUNCTIONS = frozenset(
    {
        "exp", "log", "erf", "gelu", "sin", "cos", "tanh", "sigmoid", "tan", "asin", "acos", "atan", "sinh", "cosh",
        "asinh", "acosh", "atanh", "log1p", "expm1", "pow",
    }
)  # fmt: skip


def scatters_cheaply(loop: For) -> bool:
    """Whether the body stores far apart and computes little: a scatter would cost more than scalar code."""
    stores = [s for s in loop.body if isinstance(s, Store)]
    apart = any(linear_in(flat_index(s.buffer, s.index), loop.var) not in (1, -1) for s in stores)
    return len(stores) == len(loop.body) and apart and _cost(loop.body) <= 8


def is_small(loop: For) -> bool:
    """Whether the body is worth writing twice."""
    return _cost(loop.body) <= 60


def n_together(loop: For, lanes: int, hi: int | None) -> int:
    """How many vectors to compute side by side: several where the body waits for its own results, which reductions
    do."""
    n = 1
    if any(isinstance(s, Reduce) and varies(s, {loop.var}) for s in _nodes(loop.body)):
        n = 4
    elif _cost(loop.body) <= 8:
        n = 2
    while n > 1 and hi is not None and lanes * n > hi:
        n //= 2
    return n


def _nodes(body: tuple[Stmt, ...]) -> Iterator[Stmt | Expr]:
    for s in body:
        yield from walk(s)


def _cost(body: tuple[Stmt, ...]) -> int:
    """About how many instructions one vector of the body takes."""
    cost = 0
    for node in _nodes(body):
        cost += 25 if isinstance(node, Unary) and node.fn in _FUNCTIONS else 1
    return cost


def work(body: tuple[Stmt, ...]) -> int:
    """About how many operations one unit takes, where symbolic extents count as their lower bound or 64."""
    total = 0
    for s in body:
        match s:
            case For(extent=n, body=inner):
                total += _trips(n) * work(inner)
            case Guard(body=inner):
                total += work(inner)
            case Let(expr=e) | Store(value=e):
                total += 1
                for node in walk(e):
                    total += _trips(node.extent) if isinstance(node, Reduce) else 1
    return max(total, 1)


def _trips(n: Dim) -> int:
    if isinstance(n, int):
        return n
    return max(64, bounds(n)[0] or 0)
