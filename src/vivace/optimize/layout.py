"""Where to transpose: decided for the whole graph at once, as a minimum cut.

Every value of rank r may be stored on side 0 (as the graph says) or on side 1 (transposed by one permutation); a
transpose is paid, in bytes, for each value that is needed on the other side than it is made on. Ops that can run on
either side choose; transposes that the graph already has are free where they lead from one side to the other. The
cheapest choice is exact, so `sink_transposes` never adds work, and `channels_last` (convolutions pinned to NHWC) leaves
as few transposes as there can be.

For a permutation that is its own inverse, a transpose swaps the sides; counting sides modulo the swaps on the way
(`parity`) keeps the problem a cut.

Rule TOGETHER: quantize, dequantize and cast are nodes with a side like any other, and the same value in f32 and in
bytes are two values with prices of their own: one cut decides the layout of each and the format in which it is turned.
Bytes are in the graph by then (`use_integers` comes before). Halves come later (`lower/precision.py`), which changes
nothing: casts fuse on either side (rule FUSED there), and half of the price for all that is not an input or output has
the same cheapest cut. To choose layouts once more after the halves made eight casts steps of their own in PP-OCR's
recogniser. Prices that depend on layout and format of both ends at once would ask for labels by four, which no cut
solves in general (Kolmogorov and Zabih, What energy functions can be minimized via graph cuts?, 2004).

Rule BYTES: a transpose costs its bytes. A lone one of bytes takes longer than one of f32 (`base/conversions.py`), but
few stand alone: products and `quantize` read turned operands, at the speed of their bytes. With the times of lone
passes as prices, transposes stood between `dequantize` and products, which then ran in f32: of 47 models 30, those
without quantized activations among them, stay as they are; 17 turn f32 instead of bytes, and no fewer values (PP-OCR's
recogniser 13 instead of 9).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import numpy as np

from vivace.base.dims import typical
from vivace.graph.graph import Graph, Node, Type, Value, freeze
from vivace.graph.ops import OPS
from vivace.graph.rewrite import Log, map_subgraphs
from vivace.optimize.mincut import FOREVER, Cut
from vivace.optimize.permute import CONVS, POOLS, Flexible, Perm, channels_last, flexible, inverse, lifted, permuted
from vivace.optimize.rules.transposes import is_reshape


def price(type: Type, perm: Perm) -> int:
    """The cost of transposing: bytes read and written, or next to nothing where no element moves."""
    if is_reshape(type.shape, perm):
        return 1
    size = type.dtype.size_bytes
    for d in type.shape:
        size *= max(typical(d), 1)
    return 64 + 2 * size


def transposed_bytes(graph: Graph) -> int:
    """The cost of every transpose in a graph and in those inside it."""
    return sum(
        price(n.inputs[0].type, n.attrs["perm"])
        for n in graph.walk()
        if n.op.name == "transpose" and n.inputs[0] is not None
    )


class _Sides:
    """The choice for one graph and one permutation."""

    def __init__(self, graph: Graph, perm: Perm, pin_convs: bool) -> None:
        self.graph, self.perm, self.rank, self.pin = graph, perm, len(perm), pin_convs
        self.own_inverse = inverse(perm) == perm
        self.plans: dict[Node, Flexible] = {}
        for n in graph.nodes:
            plan = flexible(n, perm, windows=pin_convs)
            if plan is not None:
                self.plans[n] = plan
        self.parent: dict[Value | Node, tuple[Value | Node, int]] = {}
        self.swaps: set[Node] = set()
        if self.own_inverse:
            self._count_parity()
        self.side = self._solve()

    def is_step(self, n: Node, perm: Perm) -> bool:
        return n.op.name == "transpose" and n.attrs["perm"] == perm

    def find(self, x: Value | Node) -> tuple[Value | Node, int]:
        """The representative of a region and the parity of `x` in it."""
        path: list[tuple[Value | Node, int]] = []
        while x in self.parent:
            up, p = self.parent[x]
            path.append((x, p))
            x = up
        odd = 0
        for y, p in reversed(path):  # what was passed on the way now points to the representative
            odd ^= p
            self.parent[y] = (x, odd)
        return x, odd

    def _join(self, a: Value | Node, b: Value | Node, odd: int) -> bool:
        (ra, pa), (rb, pb) = self.find(a), self.find(b)
        if ra is rb:
            return pa ^ pb == odd
        self.parent[ra] = (rb, pa ^ pb ^ odd)
        return True

    def _count_parity(self) -> None:
        for n in self.graph.nodes:
            if n in self.plans:
                plan = self.plans[n]
                ins = [
                    v
                    for v, f in zip(n.inputs, plan.follows)
                    if f and v is not None and v.data is None and v.rank == self.rank
                ]
                outs = list(n.outputs) if plan.result_follows else []
                joined = [self._join(v, n, 0) for v in (*ins, *outs)]  # all of them, also after a conflict
                if not all(joined):
                    del self.plans[n]
            elif self.is_step(n, self.perm) and n.inputs[0] is not None and n.inputs[0].data is None:
                if self._join(n.inputs[0], n, 0) and self._join(n, n.output, 1):
                    self.swaps.add(n)

    def _solve(self) -> dict[Hashable, int]:
        cut = Cut()
        cut.force("one", 1)
        cut.force("zero", 0)
        self.makers: dict[Value, Hashable] = {}
        takers: dict[Value, list[Hashable]] = {}
        for v in self.graph.inputs:
            self._made(v, 0)
        for n in self.graph.nodes:
            plan = self.plans.get(n)
            if plan is not None:
                self._flexible(n, plan, cut, takers)
            elif n in self.swaps:
                self.makers[n.output] = n
                takers.setdefault(n.inputs[0], []).append(n)  # type: ignore[arg-type]
            elif n.op.name == "transpose":
                self._transpose(n, takers)
            else:
                for v in n.outputs:
                    self._made(v, 0)
                for u in n.inputs:
                    self._taken(u, 0, takers)
        for v in self.graph.outputs:
            self._taken(v, 0, takers)
        for v, readers in takers.items():
            weight = price(v.type, self.perm)
            maker = self.makers.get(v)
            if maker is None:
                continue
            zero, one = (v, "any 0"), (v, "any 1")
            for t in set(readers):
                cut.edge(zero, t, FOREVER)
                cut.edge(t, one, FOREVER)
            cut.edge(maker, zero, weight)
            cut.edge(one, maker, weight)
        # NHWC lasts as long as it costs nothing: a transpose below element-wise ops meets those of other ranks
        return cut.solve(most_on_1=self.pin)

    def _end(self, v: Value, side: int) -> str:
        """The terminal that stands for side `side` of `v`, parity counted."""
        return "one" if side ^ self.find(v)[1] else "zero"

    def _made(self, v: Value, side: int) -> None:
        if v.rank == self.rank:
            self.makers[v] = self._end(v, side)

    def _taken(self, v: Value | None, side: int, takers: dict[Value, list[Hashable]]) -> None:
        if v is not None and v.data is None and v.rank == self.rank:
            takers.setdefault(v, []).append(self._end(v, side))

    def _flexible(self, n: Node, plan: Flexible, cut: Cut, takers: dict[Value, list[Hashable]]) -> None:
        parity = self.find(n)[1]
        for v, follows in zip(n.inputs, plan.follows):
            if v is None or v.data is not None:
                continue
            if follows and v.rank == self.rank:
                takers.setdefault(v, []).append(n)
            elif follows and v.rank < self.rank:
                cut.price(n, 1 ^ parity, price(Type(v.dtype, lifted(v.shape, self.rank)), self.perm) - 1)
            else:
                self._taken(v, 0, takers)
        for v in n.outputs:
            if plan.result_follows:
                self.makers[v] = n
            else:
                self._made(v, 0)
        if self.pin and n.op.name in CONVS | POOLS:
            cut.force(n, 1 ^ parity)

    def _transpose(self, n: Node, takers: dict[Value, list[Hashable]]) -> None:
        """A step from one side to the other is free; any other transpose reads either side."""
        if self.is_step(n, self.perm):
            self._taken(n.inputs[0], 1, takers)
            self._made(n.output, 0)
        elif self.is_step(n, inverse(self.perm)):
            self._taken(n.inputs[0], 0, takers)
            self._made(n.output, 1)
        else:
            self._made(n.output, 0)

    def of(self, n: Node) -> int:
        """The side that a flexible node runs on."""
        return self.side.get(n, 0) ^ self.find(n)[1]


class _Rebuild:
    """The graph with every node on its side, and a transpose wherever a value is needed on the other one."""

    def __init__(self, sides: _Sides) -> None:
        self.sides, self.graph, self.perm, self.rank = sides, sides.graph, sides.perm, sides.rank
        self.nodes: list[Node] = []
        self.have: dict[tuple[Value, int], Value] = {}
        self.outputs = set(self.graph.outputs)
        self.origin: dict[Value, tuple[str, ...]] = {}

    def run(self) -> Graph:
        for v in self.graph.inputs:
            self.have[v, 0] = v
        for n in self.graph.nodes:
            for v in n.outputs:
                self.origin[v] = n.origin
            self._node(n)
        outs = tuple(v if v.data is not None else self.get(v, 0) for v in self.graph.outputs)
        return replace(self.graph, nodes=tuple(self.nodes), outputs=outs)

    def _node(self, n: Node) -> None:
        plan, sides = self.sides.plans.get(n), self.sides
        if plan is not None:
            side = sides.of(n)
            ins = [self.operand(v, side if f else 0) for v, f in zip(n.inputs, plan.follows)]
            self.add(n, ins, dict(n.attrs) if side == 0 else plan.attrs, side if plan.result_follows else 0)
        elif n in sides.swaps:
            side = sides.of(n)
            self.alias(n.output, 1 - side, self.operand(n.inputs[0], side))
        elif sides.is_step(n, self.perm):
            self.alias(n.output, 0, self.operand(n.inputs[0], 1))
        elif sides.is_step(n, inverse(self.perm)):
            self.alias(n.output, 1, self.operand(n.inputs[0], 0))
        elif (
            n.op.name == "transpose"
            and n.inputs[0] is not None
            and (n.inputs[0], 0) not in self.have
            and (n.inputs[0], 1) in self.have
        ):
            back = inverse(self.perm)
            perm = tuple(back[p] for p in n.attrs["perm"])
            self.add(n, [self.have[n.inputs[0], 1]], {"perm": perm}, 0)
        else:
            self.add(n, [self.operand(v, 0) for v in n.inputs], dict(n.attrs), 0)

    def add(self, n: Node, ins: list[Value | None], attrs: dict[str, object], side: int) -> None:
        attrs_ = n.attrs if side == 0 and attrs == dict(n.attrs) else freeze(attrs)
        types = n.op.infer([None if v is None else v.type for v in ins], attrs_)
        outs = tuple(self.value(v, t, side) for v, t in zip(n.outputs, types))
        self.nodes.append(replace(n, inputs=tuple(ins), outputs=outs, attrs=attrs_))
        for v, w in zip(n.outputs, outs):
            self.have[v, side] = w

    def value(self, old: Value, type: Type, side: int) -> Value:
        """A value for one side of `old`: graph outputs keep their name on side 0, others wherever they are made."""
        if side == 0 and type == old.type:
            return old
        return Value(f"{old.name}.t" if old in self.outputs else old.name, type)

    def alias(self, v: Value, side: int, is_: Value | None) -> None:
        """`v` on `side` is a value that exists. A graph output gets a node of its own to carry its name."""
        assert is_ is not None
        if v in self.outputs and side == 0:
            node = Node(OPS["reshape"], (is_,), (v,), freeze({"shape": v.shape}), self.origin[v])
            self.nodes.append(node)
            is_ = v
        self.have[v, side] = is_

    def operand(self, v: Value | None, side: int) -> Value | None:
        if v is None or (side == 0 and v.data is not None):
            return v
        if v.rank < self.rank:
            return self.low_rank(v, side)
        return self.get(v, side)

    def low_rank(self, v: Value, side: int) -> Value:
        """A broadcast operand: with leading ones it has the full rank, and sides."""
        if side == 0:
            return self.have.get((v, 0), v)
        if v.type.size == 1:
            return self.have.get((v, 0), v)
        if (v, 1) not in self.have:
            shape = lifted(v.shape, self.rank)
            if v.data is not None:
                self.have[v, 1] = self.constant(v, v.data.reshape((1,) * (self.rank - v.rank) + v.data.shape))
            else:
                wide = Value(f"{v.name}.w", Type(v.dtype, shape))
                self.nodes.append(
                    Node(OPS["reshape"], (self.have[v, 0],), (wide,), freeze({"shape": shape}), self.origin.get(v, ()))
                )
                self.have[v, 1] = self.convert(
                    wide, self.perm, Value(f"{v.name}.t", Type(v.dtype, permuted(shape, self.perm))), v
                )
        return self.have[v, 1]

    def constant(self, v: Value, data: np.ndarray) -> Value:
        moved = np.ascontiguousarray(data.transpose(self.perm))
        moved.flags.writeable = False
        return Value(v.name, Type(v.dtype, moved.shape), moved)

    def get(self, v: Value, side: int) -> Value:
        if (v, side) not in self.have:
            if v.data is not None:
                self.have[v, side] = self.constant(v, v.data) if side else v
            else:
                made = self.have[v, 1 - side]
                perm = self.perm if side else inverse(self.perm)
                to = v if side == 0 else Value(f"{v.name}.t", Type(v.dtype, permuted(v.shape, perm)))
                self.have[v, side] = self.convert(made, perm, to, v)
        return self.have[v, side]

    def convert(self, x: Value, perm: Perm, to: Value, v: Value) -> Value:
        if x.type == to.type and is_reshape(x.shape, perm) and v not in self.outputs:
            return x
        origin = (*self.origin.get(v, ()), "+layout")
        if is_reshape(x.shape, perm):
            self.nodes.append(Node(OPS["reshape"], (x,), (to,), freeze({"shape": to.shape}), origin))
        else:
            self.nodes.append(Node(OPS["transpose"], (x,), (to,), freeze({"perm": perm}), origin))
        return to


def relabel(graph: Graph, perm: Perm, pin_convs: bool) -> Graph:
    """The graph with the cheapest choice of sides for one permutation."""
    return _Rebuild(_Sides(graph, perm, pin_convs)).run()


def sink_transposes(graph: Graph, log: Log) -> Graph:
    """Moves transposes through the ops between them until they cancel; the graph itself when that saves no bytes."""
    graph = map_subgraphs(graph, lambda g: sink_transposes(g, log))
    perms = dict.fromkeys(n.attrs["perm"] for n in graph.nodes if n.op.name == "transpose")
    for perm in perms:
        moved = relabel(graph, perm, pin_convs=False)
        if transposed_bytes(moved) < transposed_bytes(graph):
            graph = moved
            log.fired["sink_transposes"] += 1
    return graph


def put_channels_last(graph: Graph, log: Log) -> Graph:
    """Convolutions and pools on NHWC; the transposes that this takes are as few bytes as can be."""
    graph = map_subgraphs(graph, lambda g: put_channels_last(g, log))
    windows = [n for n in graph.nodes if n.op.name in CONVS | POOLS and n.attrs["layout"] == "NCHW"]
    for rank in sorted({n.output.rank for n in windows}):
        if rank > 2:
            graph = relabel(graph, channels_last(rank), pin_convs=True)
            log.fired["put_channels_last"] += sum(n.output.rank == rank for n in windows)
    return graph
