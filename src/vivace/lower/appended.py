"""Outputs that begin with an input, as a decoder's caches do: `present = concat(past, new)`.

A caller may keep such a cache in one array with room for more, and give views of it: `past` lies where `present` begins
already, and only `new` is written. What is compiled leaves that to the call (`lower.image.Appended`): the strides of
`present` follow from a symbol, the room that its axis has in memory, and how much of `past` is copied is a symbol too.

Rules:
* UNREAD: nothing but the concatenation reads `past`, so that its strides matter to nobody where it is not copied.
* OPEN: `past` has no fixed length. With one, there is no next token.
* ONE ROOM: outputs of the same lengths have the same room, so that layers share kernels.
"""

from __future__ import annotations

from vivace.base.dims import Dim, Expr, symbol
from vivace.graph.graph import Graph
from vivace.graph.sizes import graph_symbols
from vivace.loops.kernel import dense_strides
from vivace.lower.image import Appended
from vivace.lower.views import Storage, View


def find_appended(graph: Graph) -> tuple[Appended, ...]:
    """The outputs of a graph that begin with an input."""
    producers, users, used = graph.producers(), graph.users(), {s.name for s in graph_symbols(graph)}
    names: dict[tuple[Dim, Dim], tuple[str, str]] = {}
    found: list[Appended] = []
    for i, y in enumerate(graph.outputs):
        node = producers.get(y)
        if node is None or node.op.name != "concat" or graph.outputs.count(y) > 1:
            continue
        x, axis = node.inputs[0], node.attrs["axis"] % y.rank
        assert x is not None
        is_past = x in graph.inputs and x not in graph.outputs and users[x] == [node] and node.inputs.count(x) == 1
        if is_past and isinstance(x.shape[axis], Expr):
            lengths = x.shape[axis], y.shape[axis]
            if lengths not in names:
                names[lengths] = _unused(f"room{len(names)}", used), _unused(f"kept{len(names)}", used)
            found.append(Appended(graph.inputs.index(x), i, axis, *names[lengths]))
    return tuple(found)


def _unused(name: str, used: set[str]) -> str:
    while name in used:
        name += "_"
    return name


def with_room(storage: Storage, shape: tuple[Dim, ...], a: Appended) -> View:
    """The view of an output whose axis has room for more."""
    held = tuple(symbol(a.room) if i == a.axis else n for i, n in enumerate(shape))
    return View(storage, storage.dtype, shape, dense_strides(held))
