"""Graph -> Plan: every group becomes kernel calls over views.

`lower(graph, isa)` is the driver; the rules per family live in `lower/rules/`, each a function `(Lowering, Group) ->
None` that reads operands through `view`, asks `target` where its result goes, and appends steps through `emit`.

Placement: a value is written where its reader wants it. An operand of `concat` is written into its part of the result,
the operand of `pad` into the interior, a graph output into the caller's array; each happens once per value, a second
wish is served by a copy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from vivace.base.dims import Dim, minimum, prod, symbol, symbols
from vivace.base.dtypes import DType
from vivace.base.errors import UnknownSizeError
from vivace.base.machine import Isa
from vivace.graph.graph import Graph, Node, Value, substitute_dims
from vivace.loops.digits import DigitRows
from vivace.loops.kernel import Cast
from vivace.lower.appended import find_appended, with_room
from vivace.lower.byte_products import multiply_bytes_in_halves
from vivace.lower.choices import NO_CHOICES, Choices, Site
from vivace.lower.group import VIEWS, Group, group
from vivace.lower.halves import holds, is_converted, is_widening
from vivace.lower.packed import Packed
from vivace.lower.plan import Instruction, Operand, Plan, Spec, Step
from vivace.lower.views import Storage, View, dense, iota

Placement = Callable[[], View | None]
Rule = Callable[["Lowering", Group], None]


class Lowering:
    """The state of one lowering: where each value lies, and the steps so far. `parent` is the lowering around a
    branch."""

    def __init__(
        self, graph: Graph, isa: Isa, parent: Lowering | None = None, without: frozenset[str] = frozenset(),
        choices: Choices = NO_CHOICES, packed: Packed | None = None,
    ) -> None:  # fmt: skip
        self.graph, self.isa, self.parent = graph, isa, parent
        self.without: frozenset[str] = without if parent is None else parent.without
        self.storages: list[Storage] = [] if parent is None else parent.storages
        self.choices: Choices = choices if parent is None else parent.choices
        self.packed: Packed = (packed or Packed()) if parent is None else parent.packed
        self.constants: set[object] = set() if parent is None else parent.constants
        self.answers: dict[object, tuple[bool, np.ndarray]] = {} if parent is None else parent.answers
        self.body: list[Instruction] = []
        self.views: dict[Value, View] = {}
        self.producer = graph.producers()
        self.placement: dict[Value, Placement] = {}
        self.copies: dict[View, View] = {}
        self.kept: dict[Value, Dim] = {}  # of an input that an output begins with: the length to copy (`appended`)
        self.splits: dict[tuple[View, int, bool], tuple[View, View]] = {}  # rows in parts (`loops.split`)
        self.digits: dict[tuple[View, DigitRows, int], View] = {}  # rows as signed bytes

    # ---- storages and views -----------------------------------------------------------------------------------------

    def storage(self, name: str, dtype: DType, size: Dim) -> Storage:
        s = Storage(name, dtype, size)
        self.storages.append(s)
        return s

    def temporary(self, name: str, dtype: DType, shape: Sequence[Dim]) -> View:
        """Fresh dense memory."""
        size: Dim = 1
        for d in shape:
            size = size * d
        return dense(self.storage(name, dtype, size), shape)

    def constant(self, data: np.ndarray, name: str, key: object = None) -> View:
        """A view of constant data; equal keys share one storage."""
        return self.made_of((data,) if key is None else (), (key,), name, lambda: data)

    def made_of(
        self, sources: tuple[np.ndarray, ...], how: tuple[object, ...], name: str, make: Callable[[], np.ndarray]
    ) -> View:
        """A view of constant data made of other constants, once for each `how`."""
        key = (*how, *map(id, sources))
        s = self.packed.storage(key, sources, name, make)
        if key not in self.constants:
            self.constants.add(key)
            self.storages.append(s)
        assert s.data is not None
        return dense(s, s.data.shape)

    def view(self, value: Value) -> View:
        """Where a value lies; movement nodes are resolved to views of their operands, copied only where strides
        cannot say it."""
        if value in self.views:
            return self.views[value]
        if value.data is not None:
            found = self.constant(value.data, value.name)
        else:
            found = self._moved(self.producer[value])
        self.views[value] = found
        return found

    def _moved(self, node: Node) -> View:
        name, attrs, y = node.op.name, node.attrs, node.outputs[0]
        if name == "iota":
            return iota(y.shape, attrs["axis"], y.dtype)
        assert node.inputs[0] is not None
        x = self.view(node.inputs[0])
        if is_widening(node):
            return self._widened(node, x)
        assert name in VIEWS, node
        match name:
            case "transpose":
                return x.transpose(attrs["perm"])
            case "slice":
                return x.slice(attrs["starts"], attrs["sizes"], attrs["steps"])
            case "expand":
                return x.expand(y.shape)
        moved = x.reshape(y.shape)
        if moved is None:
            moved = self.contiguous(x, y.name, (node,)).reshape(y.shape)
            assert moved is not None
        return moved

    def operand(self, value: Value) -> View:
        """Where a value lies; in half precision or bytes where it is a cast of them, for rules that convert what they
        load."""
        n = self.producer.get(value) if value not in self.views else None
        if n is not None and is_converted(n):
            assert n.inputs[0] is not None
            return self.view(n.inputs[0])
        return self.view(value)

    def fits(self, w: Value, half: DType) -> bool:
        """Whether a half type holds all elements of a constant."""
        assert w.data is not None
        key = ("fits", half, id(w.data))
        if key not in self.answers:
            self.answers[key] = holds(half, w.data), w.data  # held, so that no other array takes over its id
        return self.answers[key][0]

    def _widened(self, node: Node, x: View) -> View:
        """A widening that its reader does not apply itself."""
        from vivace.lower.rules.elementwise import emit_pointwise

        out = self.temporary(node.outputs[0].name, node.outputs[0].dtype, x.shape)
        emit_pointwise(self, "cast", [x], out, lambda xs: Cast(out.dtype, xs[0]), (node,))
        return out

    def contiguous(self, view: View, name: str, nodes: tuple[Node, ...] = ()) -> View:
        """A dense copy of a view, or the view itself when it is dense already."""
        if view.is_dense and view.storage is not None:
            return view
        out = self.temporary(name, view.dtype, view.shape)
        self.copy(view, out, nodes)
        return out

    def copy(self, source: View, out: View, nodes: tuple[Node, ...] = ()) -> None:
        from vivace.lower.rules.elementwise import emit_pointwise

        emit_pointwise(self, "copy", [source], out, lambda xs: xs[0], nodes)

    # ---- results ----------------------------------------------------------------------------------------------------

    def target(self, value: Value) -> View:
        """Where a computed value is to be written, decided on the first call."""
        if value not in self.views:
            place = self.placement.get(value)
            wanted = place() if place else None
            self.views[value] = wanted or self.temporary(value.name, value.dtype, value.shape)
        return self.views[value]

    def emit(
        self, label: str, spec: Spec, views: Sequence[View], written: int | Sequence[int], nodes: Sequence[Node],
        flops: Dim,
        moved: Dim | None = None, updates: bool = False, site: Site | None = None, chosen: View | None = None,
    ) -> None:  # fmt: skip
        """Append a step. `views` follow the kernel's params; those at `written` (an index or several) are the results.
        Of `chosen` no more elements are read than the first of these has.

        `updates` says that the results hold data already, of which the step changes a part: it must run after those
        who wrote it.
        """
        results = {written} if isinstance(written, int) else set(written)
        if all(any(d == 0 for d in views[i].shape) for i in results):
            return  # nothing to compute
        operands = []
        reads: list[Storage] = []
        writes: list[Storage] = []
        total: Dim = 0
        most = prod(views[min(results)].shape)
        for i, v in enumerate(views):
            assert v.storage is not None
            operands.append(Operand(v.storage, v.offset))
            if i in results:
                writes.append(v.storage)
            if i not in results or updates:
                reads.append(v.storage)
            total = total + (_touched(v) if v != chosen else minimum(_touched(v), most * v.dtype.size_bytes))
        self.body.append(
            Step(
                label,
                spec,
                tuple(operands),
                tuple(reads),
                tuple(writes),
                tuple(nodes),
                flops,
                total if moved is None else moved,
                site,
            )
        )

    # ---- placement --------------------------------------------------------------------------------------------------

    def plan_placement(self, groups: Sequence[Group], outputs: Sequence[tuple[Value, View]]) -> None:
        """Decide which group outputs are written straight into an output, a concatenation, a padded buffer, or
        transposed."""
        computed = {v for g in groups for v in (g.output, *g.anchor.outputs)}
        for value, out in outputs:
            self._place(value, _fixed(out), computed)
        if "placement" in self.without:
            return
        for g in groups:
            node, y = g.anchor, g.anchor.outputs[0]
            if node.op.name == "concat":
                start: Dim = 0
                axis = node.attrs["axis"] % y.rank
                for x in node.inputs:
                    assert x is not None
                    starts = tuple(start if i == axis else 0 for i in range(y.rank))
                    self._place(x, self._inside(y, starts, x), computed)
                    start = start + x.shape[axis]
            elif node.op.name == "pad" and node.attrs["mode"] == "constant":
                x = node.inputs[0]
                assert x is not None
                self._place(x, self._inside(y, node.attrs["before"], x), computed)
        users = self.graph.users()
        for node in self.graph.nodes:
            x = node.inputs[0] if node.inputs else None
            if node.op.name == "transpose" and x in computed and users[x] == [node] and _keeps_last(node):
                self._place(node.outputs[0], self._fresh(node.outputs[0]), computed)

    def _place(self, value: Value, make: Placement, computed: set[Value]) -> None:
        """Have `value` written into the view that `make` gives, through reshapes and transposes back to what computes
        it."""
        while value not in computed and value in self.producer:
            node = self.producer[value]
            x = node.inputs[0] if node.inputs else None
            if x is None or x.data is not None:
                return
            if node.op.name == "reshape":
                make = _through(make, partial(View.reshape, shape=x.shape))
            elif node.op.name == "transpose" and _keeps_last(node):
                back = tuple(node.attrs["perm"].index(i) for i in range(x.rank))
                make = _through(make, partial(View.transpose, perm=back))
            else:
                return
            value = x
        if value in computed:
            self.placement.setdefault(value, make)

    def _inside(self, y: Value, starts: Sequence[Dim], x: Value) -> Placement:
        return lambda: self.target(y).slice(starts, x.shape, (1,) * y.rank)

    def _fresh(self, y: Value) -> Placement:
        return lambda: self.temporary(y.name, y.dtype, y.shape)

    # ---- running the rules ------------------------------------------------------------------------------------------

    def run(self, outputs: Sequence[tuple[Value, View]]) -> tuple[Instruction, ...]:
        """Lower every group, then make sure that each output's view holds its value."""
        from vivace.lower.rules import RULES

        groups = group(self.graph, self.without)
        self.plan_placement(groups, outputs)
        for g in groups:
            RULES[g.anchor.op.name if g.anchor.op.kind != "elementwise" else "elementwise"](self, g)
        for value, out in outputs:
            have = self.view(value)
            if have.storage is not out.storage or have.offset != out.offset:
                self.copy(have, out)
        return tuple(self.body)


# Choices of the lowering that a user may switch off by name, as the optimizer's passes.
OPTIONS = {
    "winograd": "3x3 convolutions with fewer products: other rounding, NaN reaches its whole tile",
    "epilogues": "element-wise nodes on the results of a product, norm, reduction or pool, in registers",
    "trees": "element-wise nodes computed where the one other that reads them is",
    "placement": "operands of concat and pad, and what a transpose reads, written where they are wanted",
    "strips": "depthwise convolutions and their neighbours strip by strip (`strips`)",
    "row_blocks": "products and those that read their rows, a block of rows at a time (`row_blocks`)",
    "slices": "large batches a few rows at a time, whose values stay in near caches (`lower.image.Batch`)",
    "in_place": "results over residuals that nobody reads any more (`in_place`)",
    "bands": "depthwise convolutions over low images band by band, without rows of padding (`bands`)",
    "gathered_rows": "rows that fill few tile registers copied next to each other before a product",
    "shared_rows": "rows as digits or parts once for all block-wise products that read them",
}


def lower(
    graph: Graph, isa: Isa, without: frozenset[str] = frozenset(), choices: Choices | None = None,
    packed: Packed | None = None,
) -> Plan:  # fmt: skip
    """Lower a graph whose convolutions may be in either layout. Shapes may be symbolic. `without` are names of
    `OPTIONS`. `packed` keeps packed weights and what they were made of, for whoever lowers one graph several times: by
    identity, so that only what is prepared already (`prepare`) is packed once."""
    from vivace.lower.prepare import prepare

    graph = prepare(multiply_bytes_in_halves(_without_loop_names(graph), isa), without)
    state = Lowering(graph, isa, without=without, choices=choices or NO_CHOICES, packed=packed)
    for i, v in enumerate(graph.inputs):
        s = Storage(v.name, v.dtype, v.type.size, "input", None, i)
        state.storages.append(s)
        state.views[v] = dense(s, v.shape)
    appended = find_appended(graph)
    begins = {a.output: a for a in appended}
    state.kept = {graph.inputs[a.input]: symbol(a.kept) for a in appended}
    outputs = []
    for i in sorted(range(len(graph.outputs)), key=lambda i: i not in begins):  # they are written nowhere else
        v = graph.outputs[i]
        s = Storage(v.name, v.dtype, v.type.size, "output", None, i)
        state.storages.append(s)
        outputs.append((v, with_room(s, v.shape, begins[i]) if i in begins else dense(s, v.shape)))
    body = state.run(outputs)
    _refuse_unknown_sizes(graph, state.storages)
    return Plan(graph.inputs, graph.outputs, body, tuple(state.storages), graph, state.views, appended=appended)


# Names that kernels give to their loops, to positions and to what they let stand for something.
LOOP_NAME = re.compile(
    r"[a-z]\d*|[a-z]\d+_\d+|(acc|at|base|col|inverse|mean|row|scale|sum|top|total)\d*(_\d+)?|before|blk|block|candidate|chunk_top|chunk_total"
    r"|enter|found|here|i_only|image|img|kc|key|last|len|new|old|only|part|rel|rescale|reset_gate|result|run"
    r"|step|tile|update"
)


def _without_loop_names(graph: Graph) -> Graph:
    """The graph with the dims renamed that a name inside a kernel would hide: `n` becomes `dim_n`."""
    found = {s.name: s for v in graph.inputs for d in v.shape for s in symbols(d)}
    renamed = {}
    for name, s in found.items():
        if LOOP_NAME.fullmatch(name):
            other = f"dim_{name}"
            while other in found:
                other = f"dim_{other}"
            renamed[name] = symbol(other, s.lo, s.hi)
    return substitute_dims(graph, renamed)


def _refuse_unknown_sizes(graph: Graph, storages: Sequence[Storage]) -> None:
    known = {s.name for v in graph.inputs for d in v.shape for s in symbols(d)}
    for storage in storages:
        unknown = sorted({s.name for s in symbols(storage.size)} - known)
        if unknown:
            raise UnknownSizeError(
                f"the size of {storage.name} only shows when the model runs", where=f"dims {', '.join(unknown)}",
                expected="sizes that follow from those of the inputs",
            )  # fmt: skip


def _fixed(view: View) -> Placement:
    return lambda: view


def _through(make: Placement, change: Callable[[View], View | None]) -> Placement:
    def changed() -> View | None:
        view = make()
        return None if view is None else change(view)

    return changed


def _keeps_last(transpose: Node) -> bool:
    """Whether the innermost axis stays innermost, so that rows stay contiguous."""
    perm = transpose.attrs["perm"]
    return bool(perm) and perm[-1] == len(perm) - 1


def _touched(v: View) -> Dim:
    """Bytes of the distinct elements behind a view: broadcast axes count once."""
    total: Dim = v.dtype.size_bytes
    for n, s in zip(v.shape, v.strides, strict=True):
        if s != 0:
            total = total * n
    return total


def merge_axes(extents: Sequence[Dim], strides: Sequence[Sequence[Dim]]) -> list[list[int]]:
    """Runs of adjacent axes that all of the given stride lists walk as one axis; axes of extent 1 are dropped."""
    runs: list[list[int]] = []
    for axis, n in enumerate(extents):
        if n == 1:
            continue
        if runs and all(s[runs[-1][-1]] == s[axis] * n for s in strides):
            runs[-1].append(axis)
        else:
            runs.append([axis])
    return runs
