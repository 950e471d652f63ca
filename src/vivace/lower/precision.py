"""Reduced precision: what lies in memory between kernels in bf16 (or f16), what is computed in f32.

    before  %y: f32 = relu(conv(%x, %w))
    after   %y_bf16: bf16 = cast{to=@bf16}(relu(conv(cast{to=@f32}(%x_bf16), %w_rounded)))

Every operator keeps its meaning in f32: sums, statistics and element-wise chains round as before. Only the value that a
group of nodes (`group.py`) leaves in memory is rounded, once, by a cast that its kernel applies before it stores; who
reads it converts on the way into registers. Weights of products with such an operand are rounded too.

Rules:
* INTERFACE: inputs and outputs of the model, and of the graphs inside it, keep their types.
* GIVEN: an input of the model that a product reads is rounded in the step that brings it into the product's order.
* FUSED: a value is only stored narrow where whoever makes it can round it, and where those who read it can convert it,
  so that a cast is a step of its own only for a value that both a product and an f32-only operator read.
* STREAM: the sum that runs past the layers of a transformer, read by norms and the next addition but by no product,
  stays f32: 3.3 dB less error in ViT-B at equal time. So does what a norm makes of it for the next addition and for
  products (BERT), which read a cast of it: 2.8 dB less error in MiniLM, and with that less than OpenVINO's bf16 has,
  for one pass over it. In ResNet-50 and MobileNetV2 it would change nothing.
* STATISTICS: what a reduction makes, and what is computed from such values alone, stays f32 where neither a product nor
  a mover reads it (the spectrogram of Basic Pitch is a sum of squares, and convolutions read it padded and joined).
  A variance is the small difference of a mean of squares and a squared mean: with both rounded to bf16, Magika's norms,
  which its file spells out so, gave 20 dB on one input where they now give 54.
* DEPTHWISE: weights of depthwise convolutions stay f32. Few terms make a sum there, so that what rounding adds to a
  weight stays in its channel: PP-OCR's recogniser lost 7 dB by it, and its kernels convert to f32 anyway.
* RANGE: sums of integers are not stored in f16, whose largest number is 65504, before a scale is multiplied in.
* SMALL: what is small stays f32, where neither a product nor a mover (`MOVERS`) reads it: nothing would be gained.

Error: each stored value and each weight is off by at most 2**-9 of its magnitude in bf16 (8 bits of mantissa, to
nearest), 2**-12 in f16 (11 bits); in f16 numbers below 2**-14 are off by up to 2**-25, and those from 65520 on become
infinite. Functions whose results are factors of what is rounded to bf16 at once are off by up to 2**-10.9 besides
(`lower/scalar.py`).

Not handled: branches and loops (they stay f32), f64.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from vivace.base.dtypes import DType
from vivace.graph.build import Builder, constant
from vivace.graph.graph import Graph, Node, Type, Value
from vivace.graph.ops import OPS
from vivace.lower.group import VIEWS, WITH_EPILOGUE, Group, group
from vivace.lower.halves import is_depthwise, is_pair_product, reads_half, rounded

# They hand elements on, so they run on narrow ones, and what they make is narrow.
MOVERS = frozenset({"concat", "pad", "resize", "gather"})
_PRODUCTS = frozenset({"conv", "matmul", "matmul_blocks", "attention"})
_NORMS = frozenset({"layer_norm", "rms_norm"})
_STREAM_READERS = _NORMS | {"add"}
_SMALL = 4096  # elements


@dataclass(frozen=True, slots=True)
class Narrowed:
    """The graph, how many values are stored narrow, and how many products read them."""

    graph: Graph
    n_values: int
    n_products: int


def narrow(graph: Graph, half: DType = DType.bf16, only: Collection[Value] | None = None) -> Narrowed:
    """The graph with its intermediate values stored in a half type. `only` are the results of the products that may
    multiply halves (None: all); what follows such a product up to the next one is narrow with it.
    """
    groups = group(graph)
    allowed = {n.outputs[0] for n in products(graph, half)} if only is None else set(only)
    chosen = _Storage(graph, groups, half, allowed).stored
    made = _Rebuild(graph, groups, half, chosen, allowed)
    return Narrowed(made.run(), len(chosen), made.n_products)


def products(graph: Graph, half: DType = DType.bf16) -> list[Node]:
    """The nodes that can multiply halves, in order."""
    return [n for n in graph.nodes if n.op.name in _PRODUCTS and reads_half(n, 0, half)]


class _Storage:
    """Which group outputs are stored narrow."""

    def __init__(self, graph: Graph, groups: list[Group], half: DType, allowed: set[Value]) -> None:
        self.graph, self.half, self.allowed = graph, half, allowed
        self.layer = _layers(groups, half)
        self.users, self.producer = graph.users(), graph.producers()
        self.outputs = set(graph.outputs)
        self.maker = {g.output: g for g in groups}
        self.readers = {v: self._readers(v) for v in self.maker}
        self.statistics: set[Value] = set()
        for g in groups:
            if self._is_statistic(g):
                self.statistics.add(g.output)
        self.stored = {v for v in self.maker if self._can_be_narrow(v)}
        while dropped := {v for v in self.stored if not self._stays(v)}:
            self.stored -= dropped

    def _is_statistic(self, g: Group) -> bool:
        """Whether a group reduces, or computes from what such groups made alone (STATISTICS)."""
        if g.anchor.op.name.startswith("reduce_"):
            return True
        inside = {v for n in g.nodes for v in n.outputs}
        read = [x for n in g.nodes for x in n.inputs if x is not None and x.data is None and x not in inside]
        return bool(read) and all(self._root(x) in self.statistics for x in read)

    def _readers(self, v: Value) -> list[tuple[Node | None, int]]:
        """Nodes that read `v`, through views, and at which operand; None stands for the model's outputs."""
        found: list[tuple[Node | None, int]] = [(None, 0)] if v in self.outputs else []
        for n in self.users.get(v, []):
            if n.op.name in VIEWS and n.inputs[0] is v:
                found += self._readers(n.outputs[0])
            else:
                found += [(n, i) for i, x in enumerate(n.inputs) if x is v]
        return found

    def _can_be_narrow(self, v: Value) -> bool:
        """Whether its kernel can round it (FUSED)."""
        g = self.maker[v]
        anchor = g.anchor
        if self.half is DType.f16 and _is_sum_of_integers(g):
            return False
        return v.dtype is DType.f32 and (anchor.op.kind == "elementwise" or anchor.op.name in WITH_EPILOGUE | MOVERS)

    def _stays(self, v: Value) -> bool:
        readers = self.readers[v]
        if any(n is None for n, _ in readers) or not readers:  # INTERFACE
            return False
        g = self.maker[v]
        if g.anchor.op.name in MOVERS and g.output is g.anchor.outputs[0] and not self._all_narrow(g.anchor):
            return False
        able = [n is not None and self._converts(n, i) for n, i in readers]
        wanted = [n.op.name for (n, _), ok in zip(readers, able, strict=True) if ok and n is not None]
        if any(name in _PRODUCTS for name in wanted):
            return not (self.producer[v].op.name in _NORMS and "add" in wanted)  # STREAM
        if (layer := self.layer[v]) is not None and layer not in self.allowed:
            return False
        is_moved = any(name in MOVERS for name in wanted)
        if v in self.statistics and not is_moved:
            return False
        if len(readers) > 1 and "add" in wanted and _STREAM_READERS.issuperset(wanted):  # STREAM
            return False
        size = v.type.size
        is_small = isinstance(size, int) and size <= _SMALL and not is_moved  # SMALL
        return all(able) and not is_small

    def _converts(self, n: Node, operand: int) -> bool:
        if n.op.kind == "elementwise":
            return True
        if n.op.name in MOVERS:
            return self._moves(n, operand)
        if n.op.name in _PRODUCTS and n.outputs[0] not in self.allowed:
            return False
        if (n.op.name == "attention" and operand in (1, 2)) or (operand == 1 and is_pair_product(n)):
            return self._is_half(n.inputs[0])
        return reads_half(n, operand, self.half)

    def _is_half(self, x: Value | None) -> bool:
        """Whether the first operand of a product will be read as halves."""
        assert x is not None
        root = self._root(x)
        return root in self.stored or root in self.graph.inputs

    def _moves(self, n: Node, operand: int) -> bool:
        if n.op.name != "concat" and operand != 0:
            return False
        g = self.maker.get(n.outputs[0])
        return self._all_narrow(n) and (g is None or n.outputs[0] in self.stored)

    def _all_narrow(self, n: Node) -> bool:
        """Whether all the data that a mover reads is narrow, or constant."""
        return n.outputs[0].dtype is DType.f32 and all(
            x is not None and (x.data is not None or self._root(x) in self.stored) for x in moved(n)
        )

    def _root(self, v: Value) -> Value:
        while (n := self.producer.get(v)) is not None and n.op.name in VIEWS:
            assert n.inputs[0] is not None
            v = n.inputs[0]
        return v


def _is_sum_of_integers(g: Group) -> bool:
    """Whether a group leaves wide integers as floats, unscaled (RANGE)."""
    wide = (DType.i32, DType.i64)
    is_cast = any(n.op.name == "cast" and (x := n.inputs[0]) is not None and x.dtype in wide for n in g.nodes)
    return is_cast and not any(n.op.name in ("mul", "div") for n in g.nodes)


def moved(n: Node) -> tuple[Value | None, ...]:
    """The operands whose elements a mover hands on."""
    return n.inputs if n.op.name == "concat" else n.inputs[:1]


def _layers(groups: list[Group], half: DType) -> dict[Value, Value | None]:
    """For the result of each group the last product before it (the first one, where there is none)."""
    anchors = [g.anchor for g in groups if g.anchor.op.name in _PRODUCTS and reads_half(g.anchor, 0, half)]
    last = anchors[0].outputs[0] if anchors else None
    found: dict[Value, Value | None] = {}
    for g in groups:
        if g.anchor in anchors:
            last = g.anchor.outputs[0]
        found[g.output] = last
    return found


class _Rebuild:
    """The graph in the order of its groups, with casts where values are stored and read."""

    def __init__(self, graph: Graph, groups: list[Group], half: DType, stored: set[Value], allowed: set[Value]) -> None:
        self.graph, self.groups, self.half, self.stored, self.allowed = graph, groups, half, stored, allowed
        self.producer = graph.producers()
        self.nodes: list[Node] = []
        self.done: set[Node] = set()
        self.narrow: dict[Value, Value] = {}
        self.for_products: dict[Value, Value] = {}
        self.weights: dict[int, Value] = {}
        self.n_products = 0

    def run(self) -> Graph:
        for g in self.groups:
            self._group(g)
        for v in self.graph.outputs:
            self._exists(v)
        return replace(self.graph, nodes=tuple(self.nodes))

    def _group(self, g: Group) -> None:
        inside = {v for n in g.nodes for v in n.outputs}
        for n in g.nodes:
            for x in n.inputs:
                if x is not None and x not in inside:
                    self._exists(x)
        # What an epilogue reads must exist before the anchor runs (rule ORDER of `group.py`).
        made = {n: self._widened(n, inside) for n in g.nodes}
        for n in g.nodes:
            self._node(g, n, made[n])

    def _widened(self, n: Node, inside: set[Value]) -> Node:
        """The node with its narrow operands converted, or taken as they are where it moves them."""
        if self._is_moved_narrow(n):
            return self._mover(n)
        inputs = list(n.inputs)
        for i, x in enumerate(n.inputs):
            if x is None or x in inside:
                continue
            is_factor = i <= is_pair_product(n) and n.outputs[0] in self.allowed and reads_half(n, i, self.half)
            source = self.narrow.get(x)
            if source is None and is_factor and self._is_rounded_for_products(x):
                source = self._rounded(x, n.origin)
            if source is None:
                continue
            inputs[i] = self._cast(source, DType.f32, n.origin)
            if is_factor and n.op.name == "attention":
                self.n_products += 2
            elif is_factor and i == 0:
                # Those of blocks its kernel makes of what is stored.
                if not (n.op.name == "matmul_blocks" or is_depthwise(n) or is_pair_product(n)):
                    inputs[1] = self._weight(n.inputs[1])
                self.n_products += 1
        return replace(n, inputs=tuple(inputs))

    def _rounded(self, x: Value, origin: tuple[str, ...]) -> Value:
        """A value that stays f32, once more for products."""
        if x not in self.for_products:
            self.for_products[x] = self._cast(x, self.half, origin)
        return self.for_products[x]

    def _is_rounded_for_products(self, x: Value) -> bool:
        """Whether a value is an input of the model (GIVEN), made by a norm (STREAM), or a view of such a value."""
        while (n := self.producer.get(x)) is not None and n.op.name in VIEWS:
            assert n.inputs[0] is not None
            x = n.inputs[0]
        return x.dtype is DType.f32 and (x in self.graph.inputs or (n is not None and n.op.name in _NORMS))

    def _is_moved_narrow(self, n: Node) -> bool:
        if n.op.name not in MOVERS or n.outputs[0].dtype is not DType.f32:
            return False
        data = [x for x in moved(n) if x is not None and x.data is None]
        return all(x in self.narrow for x in data) and (bool(data) or n.outputs[0] in self.stored)

    def _mover(self, n: Node) -> Node:
        data = len(moved(n))
        ins = tuple(
            self._constant(x) if i < data and x is not None and x.data is not None else self.narrow.get(x, x)  # type: ignore[arg-type]
            for i, x in enumerate(n.inputs)
        )
        y = n.outputs[0]
        return replace(n, inputs=ins, outputs=(Value(f"{y.name}_{self.half}", Type(self.half, y.shape)),))

    def _node(self, g: Group, n: Node, changed: Node) -> None:
        y = n.outputs[0]
        self.done.add(n)
        self.nodes.append(changed)
        result = changed.outputs[0]
        if result is not y:  # a mover
            self.narrow[y] = result
            if y is not g.output or y not in self.stored:
                self.nodes.append(_cast_to(result, y, n.origin))
                if y not in self.stored:
                    del self.narrow[y]
        elif y is g.output and y in self.stored:
            self.narrow[y] = self._cast(y, self.half, n.origin)

    def _exists(self, v: Value) -> None:
        """Emit the views and the like behind a value that groups do not hold."""
        n = self.producer.get(v)
        if n is None or n in self.done:
            return
        self.done.add(n)
        for x in n.inputs:
            if x is not None:
                self._exists(x)
        x = n.inputs[0] if n.inputs else None
        if n.op.name in VIEWS and x in self.narrow:
            y = n.outputs[0]
            self.narrow[y] = Value(f"{y.name}_{self.half}", Type(self.half, y.shape))
            n = replace(n, inputs=(self.narrow[x], *n.inputs[1:]), outputs=(self.narrow[y],))
        self.nodes.append(n)

    def _cast(self, v: Value, to: DType, origin: tuple[str, ...]) -> Value:
        y = Value(f"{v.name}_{to}", Type(to, v.shape))
        self.nodes.append(_cast_to(v, y, origin))
        return y

    def _weight(self, w: Value | None) -> Value:
        assert w is not None and w.data is not None
        if id(w.data) not in self.weights:
            self.weights[id(w.data)] = constant(rounded(w.data, self.half), w.name)
        return self.weights[id(w.data)]

    def _constant(self, x: Value) -> Value:
        assert x.data is not None
        with np.errstate(over="ignore"):
            return constant(x.data.astype(self.half.numpy), x.name)


def _cast_to(x: Value, y: Value, origin: tuple[str, ...]) -> Node:
    b = Builder(origin)
    b.emit(OPS["cast"], [x], {"to": y.dtype})
    return replace(b.nodes[0], outputs=(y,))
