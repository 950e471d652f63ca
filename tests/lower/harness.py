"""Runs lowered plans step by step on NumPy arrays: each kernel by the loop IR's reference, or as generated code of
one instruction set.

Every storage lies between guard zones that no kernel may write, and is filled with garbage before the run.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

import numpy as np
from tests import races
from tests.images import build_image

from vivace.base.dims import Dim, evaluate
from vivace.base.machine import ISAS, Isa, host, missing_flags
from vivace.base.machine import isa as named
from vivace.graph import reference as graph_reference
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.loops import reference as loops_reference
from vivace.loops.kernel import Kernel
from vivace.loops.verify import verify_kernel
from vivace.lower.image import Appended
from vivace.lower.in_place import write_in_place
from vivace.lower.lowering import lower
from vivace.lower.plan import Branch, Demand, Foreign, Instruction, Loop, Operand, Plan, Step, steps_of
from vivace.lower.views import Storage
from vivace.runtime.engine import Engine
from vivace.targets.cpu import jit
from vivace.targets.cpu.code import NOTES_BYTES, KernelCode
from vivace.targets.cpu.codegen import emit

Array = np.ndarray
GUARD = 4096  # elements: more than any single wrong vector would reach
HERE = [name for name, isa in ISAS.items() if not missing_flags(host(), isa)]
BEST = HERE[-1]
_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
_loaded: dict[tuple[str, str], tuple[KernelCode, jit.Library]] = {}


class Memory:
    """The arrays behind the storages of a plan for one binding of the dims."""

    def __init__(self, plan: Plan, inputs: Sequence[Array], dims: Mapping[str, int]) -> None:
        shapes = [tuple(evaluate(d, dims) for d in v.shape) for v in plan.outputs]
        self.dims = {**plain_rooms(plan.appended, [x.shape for x in inputs], shapes), **dims}
        self.whole: dict[Storage, Array] = {}
        for s in plan.storages:
            size = evaluate(s.size, self.dims)
            whole = np.frombuffer(bytearray(b"\xc5" * ((size + 2 * GUARD) * s.dtype.size_bytes)), s.dtype.numpy)
            self.whole[s] = whole
            if s.kind == "constant":
                assert s.data is not None
                whole[GUARD : GUARD + size] = s.data.reshape(-1)
            elif s.kind == "input":
                whole[GUARD : GUARD + size] = inputs[s.index].reshape(-1)

    def array(self, s: Storage, start: Dim = 0) -> Array:
        """From an element to the end of the storage."""
        return self.whole[s][GUARD + evaluate(start, self.dims) : len(self.whole[s]) - GUARD]

    def address(self, o: Operand) -> int:
        return self.whole[o.storage].ctypes.data + (GUARD + evaluate(o.offset, self.dims)) * o.storage.dtype.size_bytes

    def check_guards(self) -> None:
        for s, whole in self.whole.items():
            for zone in (whole[:GUARD], whole[len(whole) - GUARD :]):
                assert np.all(zone.view(np.uint8) == 0xC5), f"{s.name} was written outside its bounds"


def run_plan(
    plan: Plan, inputs: Sequence[Array], dims: Mapping[str, int], isa: str | None, parts: int = 3
) -> list[Array]:
    """The outputs; `isa` None runs loop kernels by the reference interpreter."""
    memory = Memory(plan, inputs, dims)
    for step in steps_of(plan.body):
        if isinstance(step.spec, Kernel):
            verify_kernel(step.spec)
    _body(plan.body, memory, isa, parts)
    memory.check_guards()
    outputs: dict[int, Array] = {s.index: memory.array(s) for s in plan.storages if s.kind == "output"}
    return [outputs[i].reshape([evaluate(d, dims) for d in v.shape]) for i, v in enumerate(plan.outputs)]


def _body(body: Sequence[Instruction], memory: Memory, isa: str | None, parts: int) -> None:
    for item in body:
        match item:
            case Step():
                _step(item, memory, isa, parts)
            case Demand():
                assert evaluate(item.lacks, memory.dims) == 0, item.expected
            case Branch():
                taken = bool(memory.array(item.cond.storage, item.cond.offset)[0])
                _body(item.then if taken else item.otherwise, memory, isa, parts)
            case Loop():
                counter = memory.array(item.counter)
                counter[0] = 0
                while counter[0] < memory.array(item.limit.storage, item.limit.offset)[0]:
                    if item.go is not None and not memory.array(item.go)[0]:
                        break
                    _body(item.body, memory, isa, parts)
                    counter[0] += 1
            case Foreign():
                _foreign(item, memory)


def _step(step: Step, memory: Memory, isa: str | None, parts: int) -> None:
    if isa is None and isinstance(step.spec, Kernel) and not _walks_back(step.spec):
        arrays = [
            _as_type(memory.array(o.storage, o.offset), p.dtype.numpy)
            for o, p in zip(step.operands, step.spec.params, strict=True)
        ]
        loops_reference.run(step.spec, arrays, memory.dims)
        return
    code, library = _compiled(step.spec, named(isa or BEST))
    words = [memory.address(o) for o in step.operands] + [memory.dims[d] for d in code.dims]
    args = np.array(words, np.int64)
    scratch = np.full(evaluate(code.scratch_bytes, memory.dims) + 128, 0xC5, np.uint8)
    aligned = scratch.ctypes.data + -scratch.ctypes.data % 64
    units = evaluate(code.units, memory.dims)
    call = _ENTRY(library.address(code.name))
    ranges = list(itertools.pairwise(units * k // parts for k in range(parts + 1)))
    draw = Random(units)
    draw.shuffle(ranges)  # no order is promised
    for i, (begin, end) in enumerate(ranges):
        if i == 0 or draw.random() < 0.5:  # another thread
            scratch[:] = 0xC5
            scratch[aligned - scratch.ctypes.data :][:NOTES_BYTES] = 0
        call(args.ctypes.data, begin, end, aligned)


def _as_type(array: Array, dtype: np.dtype) -> Array:
    """The same memory as elements of another type, as many as fit."""
    raw = array.view(np.uint8)
    return raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)


def _walks_back(kernel: Kernel) -> bool:
    """Whether elements lie before element 0 of a parameter: the interpreter takes arrays that begin there."""
    return any(isinstance(s, int) and s < 0 for p in kernel.params for s in p.strides)


def _compiled(spec: object, isa: Isa) -> tuple[KernelCode, jit.Library]:
    key = (repr(spec), isa.name)
    if key not in _loaded:
        code = emit(replace(spec, name="k"), isa)  # type: ignore[type-var]
        _loaded[key] = (code, jit.load(jit.compile_objects([code], isa)))
    return _loaded[key]


def _foreign(item: Foreign, memory: Memory) -> None:
    xs = []
    for v in item.inputs:
        if v is None:
            xs.append(None)
            continue
        assert v.storage is not None
        shape = [evaluate(d, memory.dims) for d in v.shape]
        xs.append(memory.array(v.storage, v.offset)[: int(np.prod(shape))].reshape(shape))
    for v, y in zip(item.outputs, item.node.op.evaluate(xs, item.node.attrs), strict=True):
        assert v.storage is not None
        memory.array(v.storage, v.offset)[: y.size] = y.reshape(-1)


def build(make: Callable[..., object], *types: Type) -> Graph:
    """A graph from a function of a builder and values."""
    b = Builder()
    values: list[Value] = [b.input(f"x{i}", t) for i, t in enumerate(types)]
    outs = make(b, *values)
    return b.finish(outs if isinstance(outs, (tuple, list)) else [outs])


def check(
    graph: Graph, *inputs: Array, isas: Sequence[str | None] = (None, BEST), tol: float | None = None, parts: int = 3
) -> Plan:
    """Lower and run a graph; every output must be what the graph means, and the same bits for any way to share the
    units of a step out.
    """
    want = graph_reference.evaluate(graph, list(inputs))
    exact = all(n.op.exact for n in graph.walk())
    tol = tol if tol is not None else 0.0 if exact else 2e-5
    plan = None
    for isa in isas:
        plan = write_in_place(lower(graph, ISAS[isa or BEST]))
        check_writes(plan)
        dims = graph_reference.bind((v, x.shape) for v, x in zip(plan.inputs, inputs, strict=True))
        got = run_plan(plan, inputs, dims, isa, parts)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert g.shape == w.shape and g.dtype == w.dtype
            compare(g, w, tol, f"output {i} on {isa or 'the reference'}")
        if isa is not None and parts > 1:
            for i, (g, w) in enumerate(zip(got, run_plan(plan, inputs, dims, isa, 1), strict=True)):
                assert g.tobytes() == w.tobytes(), f"output {i} on {isa} depends on how the units are shared out"
    assert plan is not None
    return plan


def check_writes(plan: Plan) -> None:
    """What a step says that it writes, by which steps wait for each other, is what its kernel stores to."""
    for s in steps_of(plan.body):
        if isinstance(s.spec, Kernel):
            stored = {o.storage for o, b in zip(s.operands, s.spec.params, strict=True) if b.writable}
            assert stored == set(s.writes), s.label


def check_engine(graph: Graph, *inputs: Array, threads: int = 2, tol: float = 2e-5, repeats: int = 3) -> None:
    """Compile a graph as it stands, without the optimizer, and run it as users do: one arena, one native call,
    several threads; then look for races."""
    feeds = {v.name: x for v, x in zip(graph.inputs, inputs, strict=True)}
    with races.sharing_all():
        image = build_image(graph, ISAS[BEST], False)
    engine = Engine(image, threads, [])
    want = graph_reference.evaluate(graph, list(inputs))
    for _ in range(repeats):
        got = engine.run(feeds)
        for v, w in zip(graph.outputs, want, strict=True):
            compare(got[v.name], w, tol, f"output {v.name} of the engine")
    races.check(image, feeds)


def compare(got: Array, want: Array, tol: float, where: str) -> None:
    """Equal, or within `tol * (1 + |want|)`, for integers within `tol` if that is 1 or more; NaN equals NaN."""
    if got.dtype.kind in "iu" and tol >= 1:
        assert np.abs(got.astype(np.int64) - want.astype(np.int64)).max(initial=0) <= tol, where
        return
    if got.dtype.kind in "iub":
        assert np.array_equal(got, want), f"{where}: {got!r} instead of {want!r}"
        return
    g, w = got.astype(np.float64), want.astype(np.float64)
    same = (g == w) | (np.isnan(g) & np.isnan(w))
    with np.errstate(invalid="ignore"):
        near = np.abs(g - w) <= tol * (1 + np.abs(w))
    bad = ~(same | near)
    if bad.any():
        at = tuple(int(i[0]) for i in np.nonzero(bad))
        raise AssertionError(
            f"{where}: {int(bad.sum())} of {bad.size} differ, first at {at}: {g[at]} instead of {w[at]}"
        )


def plain_rooms(
    appended: Sequence[Appended], inputs: Sequence[tuple[int, ...]], outputs: Sequence[tuple[int, ...]]
) -> dict[str, int]:
    """The dims that `appended` name, where inputs and outputs of these shapes are dense and lie apart."""
    rooms = {a.room: outputs[a.output][a.axis] for a in appended}
    return rooms | {a.kept: inputs[a.input][a.axis] for a in appended}
