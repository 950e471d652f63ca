"""Last rewrites before lowering, which make explicit what the kernels want.

* Pads become `pad` nodes, shared where equal.
* The bytes of an image that a convolution reads have four channels (`pixels`).
* Products and softmax of half types are computed in f32: their operands are cast to it, their results back.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vivace.base.dims import Dim
from vivace.base.dtypes import DType
from vivace.graph.build import Builder, constant
from vivace.graph.graph import Graph, Node, Type, Value, freeze
from vivace.graph.ops.quantized import BYTES, RANGES
from vivace.graph.passes import remove_dead
from vivace.lower.bands import is_low
from vivace.lower.halves import is_widening
from vivace.lower.pixels import widen_pixels

_HALF = (DType.f16, DType.bf16)
_IN_F32 = frozenset({"matmul", "conv", "conv_transpose", "attention", "softmax", "log_softmax", "lstm", "gru", "rnn"})


def prepare(graph: Graph, without: frozenset[str] = frozenset()) -> Graph:
    """All of them; `without` may name "bands"."""
    return remove_dead(split_pads(widen_pixels(spread_dequantize(widen_halves(graph))), "bands" not in without))


def widen_halves(graph: Graph) -> Graph:
    """Before: matmul(a: f16, b: f16)    After: cast{to=@f16}(matmul(cast{to=@f32}(a), cast{to=@f32}(b)))"""
    nodes: list[Node] = []
    wide: dict[Value, Value] = {}
    for n in graph.nodes:
        if n.op.name not in _IN_F32 or all(v.dtype not in _HALF for v in n.outputs):
            nodes.append(n)
            continue
        b = Builder(n.origin, prefix=f"{n.outputs[0].name}_wide")
        for v in n.inputs:
            if v is None or v.dtype not in _HALF or v in wide:
                continue
            if v.data is not None:
                wide[v] = constant(v.data.astype(np.float32), v.name)
            else:
                wide[v] = b.cast(v, to=DType.f32)
        inputs = tuple(v if v is None else wide.get(v, v) for v in n.inputs)
        outputs = tuple(Value(f"{v.name}_f32", Type(DType.f32, v.shape)) if v.dtype in _HALF else v for v in n.outputs)
        nodes += [*b.nodes, replace(n, inputs=inputs, outputs=outputs)]
        for v, o in zip(n.outputs, outputs, strict=True):
            if v is not o:
                cast = Builder(n.origin)
                cast.cast(o, to=v.dtype)
                nodes.append(replace(cast.nodes[0], outputs=(v,)))
    return replace(graph, nodes=tuple(nodes))


def spread_dequantize(graph: Graph) -> Graph:
    """A `dequantize` for each element-wise node that reads it, right behind what makes the bytes: it is computed where
    it is read, and whoever could take that node into an epilogue finds its operands there.

    Before: p = dequantize(q); add(p, x); mul(p, y)    After: add(dequantize(q), x); mul(dequantize(q), y)
    """
    if not any(n.op.name == "dequantize" for n in graph.nodes):
        return graph
    users, outputs = graph.users(), set(graph.outputs)
    after: dict[Value | None, list[Node]] = {}  # by the operand that is made last
    copies: dict[tuple[Value, Node], Value] = {}
    made = {v: i for i, n in enumerate(graph.nodes) for v in n.outputs}
    kept: set[Node] = set()
    for n in graph.nodes:
        if n.op.name != "dequantize":
            continue
        y = n.outputs[0]
        readers = [u for u in users.get(y, []) if u.op.kind == "elementwise"]
        last = max((v for v in n.inputs if v in made), key=lambda v: made[v], default=None)
        for k, u in enumerate(readers):
            if k == 0 and len(readers) == len(users[y]) and y not in outputs:
                copies[y, u] = y  # all readers have their own: the first keeps this one
            else:
                copies[y, u] = replace(y, name=f"{y.name}_for{k}")
            after.setdefault(last, []).append(replace(n, outputs=(copies[y, u],)))
        if not readers or len(readers) < len(users[y]) or y in outputs:
            kept.add(n)
    nodes: list[Node] = list(after.get(None, []))
    for n in graph.nodes:
        if n.op.name != "dequantize" or n in kept:
            inputs = tuple(v if v is None else copies.get((v, n), v) for v in n.inputs)
            nodes.append(n if inputs == n.inputs else replace(n, inputs=inputs))
        for v in n.outputs:
            nodes += after.get(v, [])
    return replace(graph, nodes=tuple(nodes))


def _fill(n: Node, x: Value) -> float | int | None:
    """What padding holds: the zero of a sum, the least of a maximum."""
    if n.op.name == "max_pool":
        return float("-inf") if x.dtype.is_float else RANGES[x.dtype][0] if x.dtype in BYTES else None
    if n.op.name == "conv_integer":
        assert n.inputs[2] is not None and n.inputs[2].data is not None
        return int(n.inputs[2].data.reshape(-1)[0])
    return 0.0


def _with_even_channels(n: Node) -> Value | None:
    """The weights of a convolution of halves with a channel of zeros more, where the 3 channels of an image are no
    whole number of pairs.
    """
    if n.op.name != "conv" or n.attrs["layout"] != "NHWC" or n.attrs["group"] != 1:
        return None
    w = n.inputs[1]
    if w is None or w.data is None or w.data.shape[1] != 3:
        return None
    return constant(np.pad(w.data, ((0, 0), (0, 1), *((0, 0),) * (w.rank - 2))), w.name)


def split_pads(graph: Graph, has_bands: bool = True) -> Graph:
    """Split the pads off convolutions and max pools, so that the producer can write into a padded buffer.

    Before: conv{before=(1,1), after=(1,1)}(x)    After: conv{before=(0,0), after=(0,0)}(pad(x))
    Average pools keep theirs: the divisor depends on them. So do depthwise convolutions their rows of it, over low
    images, if it `has_bands`: `bands`.
    """
    nodes: list[Node] = []
    padded: dict[object, Value] = {}
    producer = graph.producers()
    for n in graph.nodes:
        pads: tuple[tuple[Dim, ...], tuple[Dim, ...]] = (n.attrs.get("before", ()), n.attrs.get("after", ()))
        if n.op.name in ("conv", "conv_integer", "max_pool") and any(d != 0 for p in pads for d in p):
            x = n.inputs[0]
            assert x is not None
            spatial = slice(1, -1) if n.attrs["layout"] == "NHWC" else slice(2, None)
            before: list[Dim] = [0] * x.rank
            after: list[Dim] = [0] * x.rank
            none: tuple[Dim, ...] = (0,) * len(pads[0])
            before[spatial], after[spatial], kept = *pads, (none, none)
            if has_bands and is_low(n):
                kept = ((pads[0][0], *none[1:]), (pads[1][0], *none[1:]))
                before[spatial], after[spatial] = (0, *pads[0][1:]), (0, *pads[1][1:])
            fill = _fill(n, x)
            if fill is None or all(d == 0 for d in (*before, *after)):
                nodes.append(n)
                continue
            cast = producer.get(x)
            narrow = cast.inputs[0] if cast is not None and is_widening(cast) else None
            source = narrow or x  # halves are padded as halves
            if narrow is not None and (weights := _with_even_channels(n)) is not None:
                after[-1] = 1
                n = replace(n, inputs=(n.inputs[0], weights, *n.inputs[2:]))
            key = (source, tuple(before), tuple(after), fill)
            if key not in padded:
                b = Builder(n.origin, prefix=f"{x.name}_pad", count=len(padded))
                padded[key] = b.pad(source, before=tuple(before), after=tuple(after), mode="constant", value=fill)
                nodes += b.nodes
            wide = padded[key]
            if narrow is not None:
                b = Builder(n.origin, prefix=f"{x.name}_wide", count=len(nodes))
                wide = b.cast(wide, to=x.dtype)
                nodes += b.nodes
            n = replace(n, inputs=(wide, *n.inputs[1:]), attrs=freeze({**n.attrs, "before": kept[0], "after": kept[1]}))
        nodes.append(n)
    return replace(graph, nodes=tuple(nodes))
