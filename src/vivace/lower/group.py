"""Which nodes share a kernel.

A group has an *anchor* (the node that decides its loops) and element-wise nodes around it:
* an anchor with its own loops (convolution, product, softmax, ..) takes in the element-wise nodes that follow it: its
  *epilogue*;
* otherwise the last of a tree of element-wise nodes is the anchor and takes in its producers: they are computed where
  they are read.
Movement nodes that strides can say (transpose, slice, expand, reshape) belong to no group: they become views.

Rule ORDER: a group runs at the position of its anchor in the graph. An epilogue may use only values that exist by then,
so that the order of the anchors is an order of execution and no cycle can arise.

Rule NARROW: an epilogue that makes bytes and then only widens them ends with the bytes; whoever reads them widens them.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.dims import Dim
from vivace.base.dtypes import DType
from vivace.graph.graph import Graph, Node, Value
from vivace.graph.ops.quantized import BYTES
from vivace.lower.halves import HALVES, is_converted, is_widening, reads_half

VIEWS = frozenset({"reshape", "transpose", "slice", "expand"})
# Ops whose lowering evaluates an epilogue on each result before it is stored.
WITH_EPILOGUE = frozenset(
    {"conv", "conv_transpose", "matmul", "conv_integer", "matmul_integer", "matmul_blocks", "softmax", "layer_norm",
     "rms_norm", "reduce_sum", "reduce_max", "reduce_min", "reduce_prod",
     "reduce_mean", "max_pool", "avg_pool", "gather", "resize", "attention"}
)  # fmt: skip
# Of these an epilogue changes the dtype only by rounding at its end, to half precision or to bytes.
SAME_DTYPE = frozenset({"softmax", "layer_norm", "rms_norm"})
# Of these the ones that keep intermediate values in the result, which must not be bytes then.
STAGED = frozenset({"softmax"})
# Their whole epilogue is such a rounding.
ROUNDED_ONLY = frozenset({"attention"})
MAX_EPILOGUE = 24  # nodes: beyond this the registers of a micro-kernel's tail would spill


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes computed together. `nodes` holds the anchor and what it took in; `output` is the one value that others see,
    or the anchor's outputs when it has several."""

    anchor: Node
    position: int
    nodes: tuple[Node, ...]
    output: Value


def group(graph: Graph, without: frozenset[str] = frozenset()) -> list[Group]:
    """Partition the graph into groups, in an order of execution. Views and constants are in none. `without` may name
    "epilogues" and "trees": what they would join stays apart."""
    return _Grouping(graph, without).run()


class _Grouping:
    def __init__(self, graph: Graph, without: frozenset[str]) -> None:
        self.graph = graph
        self.without = without
        self.users = graph.users()
        self.outputs = set(graph.outputs)
        self.producer = graph.producers()
        self.position: dict[Value, int] = dict.fromkeys(
            graph.inputs, -1
        )  # when a value exists: the position of its group
        self.taken: set[Node] = set()
        self.index = {n: k for k, n in enumerate(graph.nodes)}

    def run(self) -> list[Group]:
        groups: list[Group] = []
        for i, node in enumerate(self.graph.nodes):
            if node in self.taken:
                continue
            if node.op.name in VIEWS or node.op.name == "iota":
                self._exists(node, self._after_inputs(node))
                continue
            if node.op.kind == "elementwise":
                if self._is_converted_where_read(node):
                    self._exists(node, self._after_inputs(node))
                    continue
                if self._is_read_where_used(node):
                    self._exists(node, i)
                    continue
                groups.append(self._tree(node, i))
            elif node.op.name in WITH_EPILOGUE and "epilogues" not in self.without:
                groups.append(self._with_epilogue(node, i))
            else:
                self._exists(node, i)
                groups.append(Group(node, i, (node,), node.outputs[0]))
        return groups

    def _after_inputs(self, node: Node) -> int:
        return max((self.position.get(v, -1) for v in node.inputs if v is not None), default=-1)

    def _exists(self, node: Node, position: int) -> None:
        for v in node.outputs:
            self.position[v] = position

    def _is_read_where_used(self, node: Node) -> bool:
        """True when the node's one reader is an element-wise tree that computes it on the fly."""
        y = node.outputs[0]
        users = self.users.get(y, [])
        if "trees" in self.without and not is_widening(node):
            return False
        if y in self.outputs or len(users) != 1 or users[0] in self.taken:
            return False
        user = users[0]
        if self._is_converted_where_read(user):  # its reader wants halves from memory
            return False
        return user.op.kind == "elementwise" and (user.outputs[0].shape == y.shape or is_widening(node))

    def _is_converted_where_read(self, node: Node) -> bool:
        """True for a cast from half precision or bytes that the one kernel that reads it applies to what it loads."""
        if not is_converted(node) or node.outputs[0] in self.outputs:
            return False
        users, x = self.users.get(node.outputs[0], []), node.inputs[0]
        assert x is not None
        return (
            len(users) == 1
            and users[0].inputs.count(node.outputs[0]) == 1
            and reads_half(users[0], users[0].inputs.index(node.outputs[0]), x.dtype)
        )

    def _tree(self, root: Node, i: int) -> Group:
        members: list[Node] = []

        def take(node: Node) -> None:
            members.append(node)
            self.taken.add(node)
            for v in node.inputs:
                p = self.producer.get(v) if v is not None else None
                if "trees" in self.without and not (p is not None and is_widening(p)):
                    continue
                if p is not None and p not in self.taken and p.op.kind == "elementwise" and self.users[v] == [node]:  # type: ignore[index]
                    if v not in self.outputs and (v.shape == node.outputs[0].shape or is_widening(p)):  # type: ignore[union-attr]
                        take(p)

        take(root)
        self._exists(root, i)
        return Group(root, i, tuple(reversed(members)), root.outputs[0])

    def _with_epilogue(self, anchor: Node, i: int) -> Group:
        members = [anchor]
        shape = anchor.outputs[0].shape
        tail = anchor.outputs[0]
        narrow = len(members), tail
        while tail not in self.outputs and len(members) < MAX_EPILOGUE:
            grown = self._absorb(tail, shape, i, set(members))
            if grown is not None and anchor.op.name in STAGED and grown[1].dtype in BYTES:
                back = self._absorb(grown[1], shape, i, {*members, *grown[0]})  # rounded to bytes and widened again
                grown = None if back is None else ([*grown[0], *back[0]], back[1])
            if grown is None:
                break
            rounds = grown[1].dtype in HALVES and grown[0][-1].op.name == "cast"
            rounds = rounds and anchor.outputs[0].dtype is DType.f32
            is_other = grown[1].dtype is not anchor.outputs[0].dtype and grown[1].dtype not in BYTES
            if anchor.op.name in SAME_DTYPE and is_other and not rounds:
                break
            if anchor.op.name in ROUNDED_ONLY and not (rounds and len(grown[0]) == 1):
                break
            nodes, tail = grown
            members += nodes
            if tail.dtype.size_bytes <= narrow[1].dtype.size_bytes or narrow[0] == 1:
                narrow = len(members), tail
            if rounds and anchor.op.name in SAME_DTYPE | ROUNDED_ONLY:
                break
        widened = members[narrow[0] :]
        if narrow[1].dtype in BYTES and all(n.op.name == "dequantize" for n in widened):  # rule NARROW
            members, tail = members[: narrow[0]], narrow[1]
        self.taken.update(members)
        for n in members:
            self._exists(n, i)
        return Group(anchor, i, tuple(members), tail)

    def _absorb(
        self, tail: Value, shape: tuple[Dim, ...], i: int, inside: set[Node]
    ) -> tuple[list[Node], Value] | None:
        """The next run of element-wise nodes after `tail` that ends in a single value again, or None."""
        run: list[Node] = []
        open_values = {tail}
        for _ in range(8):
            ready = [u for v in open_values for u in self.users.get(v, []) if u not in run]
            if any(v in self.outputs for v in open_values) or not ready:
                return None
            node = min(ready, key=self.index.__getitem__)
            if node in self.taken or node.op.kind != "elementwise" or node.outputs[0].shape != shape:
                return None
            if is_widening(node) and node.inputs[0] is tail:  # what was rounded is to be stored
                return None
            known = inside | set(run)
            pending: list[Node] = []
            for v in node.inputs:
                if v is None or v.data is not None or self.producer.get(v) in known:
                    continue
                if self.position.get(v, i) >= i:
                    return None
                pending += self._pending(v)
            run += [*pending, node]
            open_values.add(node.outputs[0])
            open_values = {
                v for v in open_values if any(u not in run for u in self.users.get(v, [])) or v in self.outputs
            }
            if len(open_values) == 1 and node.outputs[0] in open_values:
                return run, node.outputs[0]
        return None

    def _pending(self, v: Value) -> list[Node]:
        """Element-wise nodes behind `v` that wait to be computed where they are read, producers first."""
        p = self.producer.get(v)
        if p is None or p in self.taken or p.op.kind != "elementwise":
            return []
        return [n for u in p.inputs if u is not None for n in self._pending(u)] + [p]
