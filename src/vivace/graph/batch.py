"""Whether a model treats the rows of a batch one by one, so that a batch may be computed in slices.

    rows_of(graph)                 the size of the first axis of every input, where it is one symbol: N of f32[N,3,9,9]
    why_not_by_rows(graph, rows)   "" where row i of every output follows from row i of every input alone

Rules:
* LEADING: whatever depends on the batch has a first axis of c * rows, with c free of `rows`, and no other axis or
  attribute speaks of `rows`. So what belongs to row i are the places c*i to c*(i+1), in every value.
* LISTED: each operator is listed with what keeps rows apart. What is not listed mixes them.

Not handled: the batch on another axis (recurrent layers read [time, batch, features]), inputs without a batch, control
flow.
"""

from __future__ import annotations

from collections.abc import Callable

from vivace.base.dims import Symbol, as_symbol, linear
from vivace.graph.graph import Graph, Node, Value
from vivace.graph.sizes import attr_symbols, node_sizes, value_sizes


def rows_of(graph: Graph) -> Symbol | None:
    """The symbol that is the first dim of every input, or None."""
    firsts = {v.shape[0] if v.rank else 1 for v in graph.inputs}
    return as_symbol(next(iter(firsts))) if len(firsts) == 1 else None


def why_not_by_rows(graph: Graph, rows: str) -> str:
    """Why rows of the batch depend on each other, or cannot be shown not to; empty where each stands for itself."""
    for v in (*graph.inputs, *graph.outputs):
        if rows not in value_sizes(v):
            return f"{v.name} has no batch"
    for n in graph.nodes:
        if rows not in node_sizes(n):
            continue
        values = [v for v in (*n.inputs, *n.outputs) if v is not None]
        if any(not _leads(v, rows) for v in values):
            return f"{n.op.name} moves the batch away from the first axis"
        if not _APART.get(n.op.name, _elementwise if n.op.kind == "elementwise" else _never)(n, rows):
            return f"{n.op.name} may mix the rows of a batch"
    return ""


def _has(v: Value | None, rows: str) -> bool:
    return v is not None and rows in value_sizes(v)


def _leads(v: Value, rows: str) -> bool:
    """Rule LEADING, for one value."""
    if not _has(v, rows):
        return True
    form = linear(v.shape[0], rows)
    return form is not None and form[1] == 0 and not any(s.name == rows for s in attr_symbols(v.shape[1:]))


def _silent(n: Node, rows: str, *allowed: str) -> bool:
    """Whether no attribute but those allowed speaks of the rows."""
    return not any(s.name == rows for k, a in n.attrs.items() if k not in allowed for s in attr_symbols(a))


def _never(n: Node, rows: str) -> bool:
    return False


def _elementwise(n: Node, rows: str) -> bool:
    return _silent(n, rows)


def _first_only(n: Node, rows: str) -> bool:
    """What reads a batch and weights."""
    return _silent(n, rows) and _has(n.inputs[0], rows) and not any(_has(v, rows) for v in n.inputs[1:])


def _matmul(n: Node, rows: str) -> bool:
    b = n.inputs[1]
    assert b is not None
    return _silent(n, rows) and (b.rank > 2 or not _has(b, rows))  # else the rows would be summed over


def _attention(n: Node, rows: str) -> bool:
    return _silent(n, rows) and all(v is None or v.rank > 2 or not _has(v, rows) for v in n.inputs)


def _axis(n: Node, rows: str) -> bool:
    """What works along one axis, or along some."""
    x = n.inputs[0]
    assert x is not None
    axes = n.attrs.get("axes", (n.attrs.get("axis", 0),))
    return _silent(n, rows) and all(axis % max(x.rank, 1) for axis in axes)


def _resize(n: Node, rows: str) -> bool:
    x, y = n.inputs[0], n.outputs[0]
    assert x is not None
    return x.shape[0] == y.shape[0] and _silent(n, rows, "sizes")


def _gather(n: Node, rows: str) -> bool:
    """Rows of a table by the batch's indices, or of each row the same places."""
    data, indices = n.inputs
    if _has(data, rows):
        return not _has(indices, rows) and _axis(n, rows)
    return bool(n.attrs["axis"] == 0)


def _transpose(n: Node, rows: str) -> bool:
    return bool(n.attrs["perm"][0] == 0)


def _slice(n: Node, rows: str) -> bool:
    a = n.attrs
    whole = n.inputs[0] is not None and a["sizes"][0] == n.inputs[0].shape[0]
    return _silent(n, rows, "sizes") and whole and a["starts"][0] == 0 and a["steps"][0] == 1


def _pad(n: Node, rows: str) -> bool:
    return _silent(n, rows) and n.attrs["before"][0] == 0 and n.attrs["after"][0] == 0


def _shaped(n: Node, rows: str) -> bool:
    """Places keep their order, so a leading batch stays one."""
    return _silent(n, rows, "shape")


_APART: dict[str, Callable[[Node, str], bool]] = {
    "matmul": _matmul, "attention": _attention, "gather": _gather, "resize": _resize, "transpose": _transpose,
    "slice": _slice, "pad": _pad, "reshape": _shaped, "expand": _shaped,
    **dict.fromkeys(
        ("conv", "conv_transpose", "conv_integer", "matmul_integer", "matmul_blocks", "max_pool", "avg_pool", "pixels",
         "tree_ensemble"),
        _first_only,
    ),
    **dict.fromkeys(
        ("concat", "softmax", "log_softmax", "layer_norm", "rms_norm", "argmax", "argmin", "cumsum", "topk",
         "reduce_sum", "reduce_prod", "reduce_mean", "reduce_max", "reduce_min"),
        _axis,
    ),
}  # fmt: skip
