"""Writing attention: the operator from opset 23 on, else softmax(q k^T * scale + mask) v in its parts."""

from __future__ import annotations

import numpy as np

from vivace.base.dims import Dim
from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Value
from vivace.graph.rewrite import At, Outcome, rule, scalar
from vivace.onnx.writer import Writer


def key_transpose(w: Writer, n: Node) -> Node | None:
    """The transpose that makes the keys, when the one written for k^T can take its place."""
    return w.by(n.inputs[1], "transpose") if not _is_operator(w, n) else None


def _is_operator(w: Writer, n: Node) -> bool:
    """True where the ONNX operator says the same: its causal mask aligns the first query with the first key."""
    q, k = n.inputs[:2]
    assert q is not None and k is not None
    aligned = not n.attrs["causal"] or q.shape[2] == k.shape[2]
    return w.opset >= 23 and aligned and not n.attrs["softcap"]


def _number(w: Writer, x: Value, value: float) -> str:
    return w.const(np.asarray(value, x.dtype.numpy))


@rule("where")
def operator_guards_itself(n: Node, at: At) -> Outcome:
    """where(any(mask), attention(q, k, v, mask), 0) and where(isnan(a), 0, a): the ONNX operator gives 0 for a row
    that sees no key"""
    cond, a, b = n.inputs
    attention = at.by(a, "attention")
    if attention is not None and scalar(b) == 0 and len(attention.inputs) > 3:
        any_ = at.by(cond, "reduce_max")
        mask = attention.inputs[3]
        if any_ is not None and any_.inputs[0] is mask and mask is not None and any_.attrs["axes"] == (mask.rank - 1,):
            return a
    attention, test = at.by(b, "attention"), at.by(cond, "isnan")
    if attention is not None and scalar(a) == 0 and test is not None and test.inputs[0] is b:
        return b
    return None


def write_attention(w: Writer, n: Node, outs: list[str]) -> None:
    q, k, v = n.inputs[:3]
    mask = n.inputs[3] if len(n.inputs) > 3 else None
    assert q is not None and k is not None and v is not None
    if _is_operator(w, n):
        extra = [w.ref(mask)] if mask is not None else []
        if mask is not None and mask.rank < 2:
            extra = [w.emit("Reshape", [extra[0], w.const([1] * (2 - mask.rank) + [-1])])]
        w.emit(
            "Attention",
            [w.ref(q), w.ref(k), w.ref(v), *extra],
            outs,
            scale=n.attrs["scale"],
            is_causal=int(n.attrs["causal"]),
        )
        return
    heads, groups = q.shape[1], k.shape[1]
    assert isinstance(heads, int) and isinstance(groups, int)
    grouped = groups not in (1, heads)
    queries, keys, values = _scaled(w, n, q), _turned_keys(w, n, k), w.ref(v)
    if grouped:  # [B,G,R,S,D] with keys and values that broadcast over R
        queries = w.emit("Reshape", [queries, _split_heads(w, q.shape, groups)])
        keys, values = (w.emit("Unsqueeze", [x, w.const([2], "axes")]) for x in (keys, values))
    scores = w.emit("MatMul", [queries, keys])
    if n.attrs["softcap"]:
        cap = n.attrs["softcap"]
        scores = w.emit("Tanh", [w.emit("Mul", [scores, _number(w, q, 1 / cap)])])
        scores = w.emit("Mul", [scores, _number(w, q, cap)])
    if n.attrs["causal"]:
        scores = w.emit("Where", [_causal(w, q.shape[2], k.shape[2]), scores, _number(w, q, -np.inf)])
    if mask is not None:
        name = _grouped_mask(w, mask, groups) if grouped else w.ref(mask)
        if mask.dtype is DType.bool:
            scores = w.emit("Where", [name, scores, _number(w, q, -np.inf)])
        else:
            scores = w.emit("Add", [scores, name])
    weights = w.emit("Softmax", [scores], axis=-1)
    if grouped:
        merged = w.emit("MatMul", [weights, values])
        w.emit("Reshape", [merged, _join_heads(w, n.output)], outs)
    else:
        w.emit("MatMul", [weights, values], outs)


def _scaled(w: Writer, n: Node, q: Value) -> str:
    scale = n.attrs["scale"]
    return w.ref(q) if scale == 1 else w.emit("Mul", [w.ref(q), _number(w, q, scale)])


def _turned_keys(w: Writer, n: Node, k: Value) -> str:
    """k^T; a transpose that makes k is joined with it."""
    t = key_transpose(w, n)
    source, perm = (k, (0, 1, 2, 3)) if t is None else (t.inputs[0], t.attrs["perm"])
    turned = (*perm[:2], perm[3], perm[2])
    return w.ref(source) if turned == (0, 1, 2, 3) else w.emit("Transpose", [w.ref(source)], perm=list(turned))


def _split_heads(w: Writer, shape: tuple[Dim, ...], groups: int) -> str:
    """The shape [B,G,R,S,D] for Reshape, with zeros where a dim stays in its place."""
    b, h, s, d = shape
    assert isinstance(h, int)
    if sum(not isinstance(x, int) for x in (b, s, d)) <= 1 or (isinstance(d, int) and not isinstance(b, int)):
        said = [
            b if isinstance(b, int) else 0,
            groups,
            h // groups,
            s if isinstance(s, int) else -1,
            d if isinstance(d, int) else -1,
        ]
        return w.const(said, "heads")
    return w.shape((b, groups, h // groups, s, d))


def _join_heads(w: Writer, out: Value) -> str:
    b, h, s, e = out.shape
    if isinstance(e, int) or isinstance(s, int):
        return w.const(
            [b if isinstance(b, int) else 0, h, s if isinstance(s, int) else -1, e if isinstance(e, int) else -1],
            "heads",
        )
    return w.shape(out.shape)


def _grouped_mask(w: Writer, mask: Value, groups: int) -> str:
    """A mask [B,H|1,S,T] against scores [B,G,R,S,T]; written once for all layers that share it."""
    if mask.rank < 3:
        return w.ref(mask)
    key = (mask, groups)
    if key not in w.masks:
        heads = mask.shape[-3]
        name = w.ref(mask)
        if heads == 1:
            w.masks[key] = w.emit("Unsqueeze", [name, w.const([mask.rank - 2], "axes")])
        else:
            assert isinstance(heads, int)
            lead = [0] * (mask.rank - 3)
            parts = [w.const([*lead, groups, heads // groups]), w.shape(mask.shape[-2:])] if lead else []
            shape = w.emit("Concat", parts, axis=0) if parts else w.shape((groups, heads // groups, *mask.shape[-2:]))
            w.masks[key] = w.emit("Reshape", [name, shape])
    return w.masks[key]


def _causal(w: Writer, s: Dim, t: Dim) -> str:
    """bool[S,T], true where key <= query + T - S."""

    def line(d: Dim) -> str:
        end = w.emit("Squeeze", [w.dim(d)])
        return w.emit("Range", [w.const(np.int64(0)), end, w.const(np.int64(1))])

    rows = w.emit("Add", [line(s), w.dim(t - s)])
    return w.emit("LessOrEqual", [line(t), w.emit("Unsqueeze", [rows, w.const([1], "axes")])])
