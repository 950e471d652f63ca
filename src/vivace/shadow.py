"""VIVACE_CHECK=1: an engine that compares what its kernels wrote with the reference, and names the first that differs.

    x, y --native run--> memory --for each group of nodes--> its inputs as native code left them --reference--> outputs

Rules:
* LOCAL: the reference computes each group from the native values of its inputs, so that errors do not add up over
  layers and the group that is named is the one at fault.
* APART: no two values share memory, so that all of them are there when the run has ended.
* EXACT: groups of exact ops must give the same bits. Others may be off by the tolerances of their ops (per unit of
  reduction depth), relative to the largest magnitude that the reference met in the group; integers by one, or by two
  where that is more than one.
* BETWEEN: what lies just between two integers may become either where sums or products are rounded only once
  (`lower/requantize.py`): a sum that becomes bytes is off by one then, and what is quantized inside of a group by a
  step of its scale.

Not handled: nodes that another provider runs (taken as right), and single nodes inside of branches and loops, which
are compared as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from vivace.base.dims import evaluate
from vivace.base.dtypes import DType
from vivace.base.errors import InternalError
from vivace.graph.graph import Node, Value, substitute_attrs
from vivace.graph.ops.quantized import rounded_to
from vivace.lower.group import Group, group
from vivace.lower.halves import is_widening
from vivace.lower.image import Image
from vivace.lower.plan import Plan
from vivace.lower.schedule import schedule
from vivace.lower.views import Storage, View
from vivace.runtime.binding import MemoryPlanner
from vivace.runtime.engine import Engine, MakeForeign, Placement

Array = np.ndarray
LEAST = 1e-5  # what f32 code of any op may be off by: a few roundings more than the reference
ORDERS = 4.0  # sums in another order, and products by Winograd, exceed an op's own tolerance by up to this
_HALF_STEP = {DType.f16: 2.0**-10, DType.bf16: 2.0**-7}
_ROUNDED_STEP = _HALF_STEP | {DType.i8: 2.0**-7}  # of the largest of a block; those of a sum add up like noise


class ShadowedEngine(Engine):
    """An engine whose runs end with a comparison. `n_compared` counts the values compared so far."""

    def __init__(
        self, plan: Plan, image: Image, threads: int, placement: Sequence[Placement], make_foreign: MakeForeign | None,
        portable: object = None,
    ) -> None:  # fmt: skip
        super().__init__(image, threads, placement, make_foreign, portable)  # type: ignore[arg-type]
        self._planner = MemoryPlanner(_apart(image))  # rule APART
        self._plan = plan
        self._numbers = _numbers(plan, image)
        self._groups = [g for g in group(plan.graph) if not _is_hosted(g)]
        self._producer = plan.graph.producers()
        computed = {v for g in group(plan.graph) for v in (g.output, *g.anchor.outputs)}
        self._places = {v: view for v, view in plan.views.items() if v in computed and view.storage is not None}
        self._one_run = threading.Lock()
        self.n_compared = 0

    def _run(self, given: list[Array], outputs: Mapping[str, Array] | None) -> list[Array]:
        with self._one_run:
            results = super()._run(given, outputs)
            context, _ = self._idle[-1]
            assert context.dims is not None
            memory = _Memory(self, context.arena.bytes, context.dims, given, results)
            for g in self._groups:
                self._compare(g, memory)
        return results

    def _compare(self, g: Group, memory: _Memory) -> None:
        reference = _Reference(memory, self._producer, self._places, set(g.nodes))
        for y in dict.fromkeys((g.output, *g.anchor.outputs)):
            if y not in self._places:
                continue
            with np.errstate(all="ignore"):
                want = reference.value(y)
            found = difference(
                memory.read(self._places[y]), want, allowed(g, reference.values, memory.dims, self._producer)
            )
            self.n_compared += 1
            if found:
                names = dict.fromkeys(o for n in g.nodes for o in n.origin if not o.startswith("+"))
                steps = [s.label for s in self._plan.body if getattr(s, "nodes", ()) and g.anchor in s.nodes]  # type: ignore[union-attr]
                raise InternalError(
                    f"{' + '.join(n.op.name for n in g.nodes)} gave a wrong {y}: {found}",
                    where=f"kernel {', '.join(dict.fromkeys(steps)) or '(none)'} for {', '.join(names) or y.name}",
                    expected="what graph/reference.py computes from the same inputs",
                )


class _Memory:
    """Everything that one run left behind."""

    def __init__(
        self, engine: ShadowedEngine, arena: Array, dims: Mapping[str, int], given: list[Array], results: list[Array]
    ) -> None:
        self.numbers, self.arena, self.dims = engine._numbers, arena, dims
        self.given, self.results = given, results
        self.inputs = dict(zip(engine._plan.inputs, given, strict=True))

    def read(self, view: View) -> Array:
        """A copy of the value at a view."""
        shape = [evaluate(d, self.dims) for d in view.shape]
        item = view.dtype.size_bytes
        if 0 in shape:
            return np.empty(shape, view.dtype.numpy)
        storage = view.storage
        assert storage is not None
        raw = self._bytes(storage)[evaluate(view.offset, self.dims) * storage.dtype.size_bytes :]
        flat = raw[: raw.size // item * item].view(view.dtype.numpy)
        strides = [evaluate(s, self.dims) * item for s in view.strides]
        return np.lib.stride_tricks.as_strided(flat, shape, strides).copy()

    def _bytes(self, storage: Storage) -> Array:
        match storage.kind:
            case "constant":
                assert storage.data is not None
                return np.ascontiguousarray(storage.data).reshape(-1).view(np.uint8)
            case "input":
                return _span(self.given[storage.index])
            case "output":
                return _span(self.results[storage.index])
        start = self.dims[f"@{self.numbers[storage]}"]
        return self.arena[start : start + evaluate(storage.bytes, self.dims)]


class _Reference:
    """The values of one group, computed from the native ones around it (rule LOCAL)."""

    def __init__(
        self, memory: _Memory, producer: Mapping[Value, Node], places: Mapping[Value, View], inside: set[Node]
    ) -> None:
        self.memory, self.producer, self.places, self.inside = memory, producer, places, inside
        self.values: dict[Value, Array] = {}

    def value(self, v: Value) -> Array:
        if v.data is not None:
            return v.data
        if v not in self.values:
            node = self.producer.get(v)
            if node is None:
                self.values[v] = self.memory.inputs[v]
            elif node not in self.inside and v in self.places:
                self.values[v] = self.memory.read(self.places[v])
            else:
                xs = [None if u is None else self.value(u) for u in node.inputs]
                results = node.op.evaluate(xs, substitute_attrs(node.attrs, self.memory.dims))
                self.values |= dict(zip(node.outputs, results, strict=True))
        return self.values[v]


def allowed(g: Group, values: Mapping[Value, Array], dims: Mapping[str, int], producer: Mapping[Value, Node]) -> float:
    """How far a group's results may be from the reference: 0 where the same bits are expected (rule EXACT)."""
    between = _between(g, values)
    inexact = [n for n in g.nodes if not n.op.exact or any(s.op.exact is False for s in _inner(n))]
    halves = [_HALF_STEP[v.dtype] for n in g.nodes for v in n.outputs if v.dtype in _HALF_STEP]
    if g.anchor.op.name == "attention":  # what multiplies halves rounds its weights to them
        read = [producer[v] for v in g.anchor.inputs if v is not None and v in producer]
        halves += [_HALF_STEP[n.inputs[0].dtype] for n in read if is_widening(n)][:1]  # type: ignore[union-attr]
    halves += [_ROUNDED_STEP[rounded_to(n.attrs)] * _depth(n, dims) ** 0.5 for n in g.nodes if _is_rounded(n)]
    if not inexact and not (halves and len(g.nodes) > 1):
        return between
    relative = max(LEAST, ORDERS * sum(n.op.tolerance * _depth(n, dims) for n in inexact), sum(halves))
    inside = {v for n in g.nodes for v in (*n.inputs, *n.outputs) if v is not None}
    sizes = [_largest(values.get(v, v.data)) for v in inside if v in values or v.data is not None]
    return relative * max(sizes, default=1.0) + between


def _is_rounded(n: Node) -> bool:
    """Whether the kernel may round what it reads."""
    return n.op.name == "matmul_blocks" and rounded_to(n.attrs) is not DType.f32


def _between(g: Group, values: Mapping[Value, Array]) -> float:
    """Rule BETWEEN."""
    bytes_made = {n.output for n in g.nodes if n.op.name == "quantize"}
    inner = [n.inputs[1] for n in g.nodes if n.op.name == "dequantize" and n.inputs[0] in bytes_made]
    steps = sum(_largest(values.get(s, s.data)) for s in inner if s is not None)
    is_sum = g.output in bytes_made and any(n.op.name == "add" for n in g.nodes)
    return steps + (1.0 if is_sum else 0.0)


def difference(got: Array, want: Array, allowed: float) -> str:
    """What is wrong with `got`, in words; empty when nothing is."""
    if got.shape != want.shape:
        return f"shape {list(got.shape)} instead of {list(want.shape)}"
    if got.dtype.kind not in "iub":
        a, b = got.astype(np.float64), want.astype(np.float64)
        with np.errstate(invalid="ignore"):
            bad = ~((a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= allowed))
    elif got.dtype.kind == "b":
        bad = got != want
        if allowed and bad.mean() <= 0.01:  # a comparison of numbers that were nearly equal
            return ""
    else:
        bad = np.abs(got.astype(np.int64) - want.astype(np.int64)) > min(np.ceil(allowed), 2)
    if not bad.any():
        return ""
    at = tuple(int(i[0]) for i in np.nonzero(bad))
    place = ", ".join(map(str, at))
    return f"{int(bad.sum())} of {bad.size} elements differ, at [{place}] {got[at]} instead of {want[at]}"


def _apart(image: Image) -> Image:
    last = max((s.last for s in image.storages), default=0)
    return replace(image, storages=tuple(replace(s, first=0, last=last) for s in image.storages))


def _numbers(plan: Plan, image: Image) -> dict[Storage, int]:
    """The number that the linker gave each storage: it kept the order of lines and operands."""
    found: dict[Storage, int] = {}
    foreign = iter(image.foreign)
    for line, entry in zip(schedule(plan).lines, image.lines, strict=True):
        if line.step is not None:
            found |= {o.storage: k for o, (k, _) in zip(line.step.operands, entry.operands, strict=True)}
        elif line.foreign is not None:
            places = next(foreign)
            views = [v for v in (*line.foreign.inputs, *line.foreign.outputs) if v is not None]
            for v, (k, *_) in zip(views, (*places.inputs, *places.outputs), strict=True):
                assert v.storage is not None
                found[v.storage] = k
    return found


def _inner(node: Node) -> list[Node]:
    """The nodes of a node's graphs."""
    from vivace.graph.graph import subgraphs

    return [n for g in subgraphs(node) for n in g.walk()]


def _span(array: Array) -> Array:
    """The bytes from the first element of an array to its last, those between included where it has gaps."""
    if array.flags.c_contiguous:
        return array.reshape(-1).view(np.uint8)
    items = 1 + sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)) // array.itemsize
    return np.lib.stride_tricks.as_strided(array, (items,), (array.itemsize,)).view(np.uint8)


def _is_hosted(g: Group) -> bool:
    return any(m.op.name == "onnx" for n in g.nodes for m in (n, *_inner(n)))


def _depth(n: Node, dims: Mapping[str, int]) -> float:
    """How many terms one element of a result adds up; the roundings of a branch or loop are not counted."""
    if n.op.kind == "elementwise" or _inner(n):
        return 1.0
    elements = evaluate(n.outputs[0].type.size, dims)
    return max(1.0, evaluate(n.cost.flops, dims) / max(elements, 1))


def _largest(a: Array | None) -> float:
    if a is None or a.dtype.kind in "b" or a.dtype == object or not a.size:
        return 0.0
    magnitude = np.abs(a.astype(np.float64))
    return float(np.max(magnitude, initial=0.0, where=np.isfinite(magnitude)))
