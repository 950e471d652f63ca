"""The engine: an image made ready to run in this process.

    engine.run({"x": x})      dict of name -> array
    engine(x)                 arrays in the model's order

`run` may be called from several Python threads at once; the GIL is released while native code runs. Each concurrent run
uses a context of its own (arena and tables); contexts are kept for reuse.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np

from vivace.base.dims import Dim, evaluate, maximum, symbol
from vivace.base.dtypes import DType
from vivace.base.errors import EngineError, InputError, ShapeError
from vivace.base.events import Event
from vivace.base.machine import isa
from vivace.base.mapped import forget
from vivace.base.specs import TensorSpec
from vivace.lower.image import ForeignEntry, Image, LineEntry, Part
from vivace.runtime.arguments import refuse_inputs, shapes_of
from vivace.runtime.binding import MemoryPlanner
from vivace.runtime.buffer import Buffer
from vivace.runtime.calls import SAME, Calls, Last
from vivace.runtime.crew import Crew, slices_program
from vivace.runtime.executable import Chunk, Context, Executable
from vivace.runtime.saved import Program, save
from vivace.runtime.sharing import Sharing
from vivace.runtime.slices import Dims, Slices, whole_specs
from vivace.targets.cpu import jit, steps
from vivace.targets.cpu.amx import missing_here

Arrays = dict[str, np.ndarray]
ForeignRunner = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]
MakeForeign = Callable[[ForeignEntry], ForeignRunner]


_COPIED_BYTES = 1 << 22  # at a time
NOT_PICKLED = "an engine is not pickled or copied: save it, and load the file in the other process"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one ONNX node runs: the kernel that computes it, the provider, and why."""

    node: str
    op: str
    kernel: str
    provider: str
    reason: str

    @property
    def fields(self) -> list[str]:
        """As a saved engine holds it."""
        return [self.node, self.op, self.kernel, self.provider, self.reason]


class Engine:
    """A compiled model. Make it with `vivace.compile` or `vivace.load`."""

    def __init__(
        self, image: Image, threads: int, placement: Sequence[Placement] = (), make_foreign: MakeForeign | None = None,
        portable: bytes | Callable[[], bytes] | None = None,
    ) -> None:  # fmt: skip
        started = time.perf_counter()
        if missing := missing_here(isa(image.isa).flags):
            raise EngineError(f"this process cannot use {', '.join(missing)}", where="engine", hint="compiling it here")
        self.image = image
        self.threads = threads
        self.inputs, self.outputs = whole_specs(image)
        self.placement = tuple(placement)
        self._portable: bytes | Callable[[], bytes] = b"" if portable is None else portable
        self._names = tuple(s.name for s in self.inputs)
        self._output_names = tuple(s.name for s in self.outputs)
        self._planner = MemoryPlanner(image)
        self._library = jit.load(image.objects) if image.objects else None
        self._constants = [_aligned(c) for c in image.constants]
        runners = [make_foreign(f) if make_foreign else None for f in image.foreign]
        self._symbols = _symbols_of(image)
        self._executable = self._link(runners)
        n_crew = 1 if self._executable.layout.calls else self._executable.n_threads
        self._calls = Calls(image, self.inputs, self.outputs, self._arena_bytes, n_crew)
        self._idle: list[tuple[Context, Last]] = []
        self.ready_seconds = time.perf_counter() - started

    # ---- running ----------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray] | None = None) -> Arrays:
        """One inference.

        `outputs` may give arrays to write results into (right dtype and shape, C-contiguous, apart from each other);
        the rest are allocated. What begins with an input may lie in place (`appended`, `vivace.runtime.rooms`).
        Raises: InputError for a missing, unknown or ill-fitting input or output.
        """
        try:
            if len(inputs) != len(self._names):
                refuse_inputs(inputs, self.inputs)
            given = list(map(inputs.__getitem__, self._names))
        except (LookupError, TypeError, AttributeError):
            refuse_inputs(inputs, self.inputs)
        return dict(zip(self._output_names, self._run(given, outputs)))

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...] | np.ndarray:
        """One inference with inputs in the model's order; a single output comes bare."""
        if len(arrays) != len(self.inputs):
            raise InputError(
                f"{len(arrays)} arrays were given", expected=f"{len(self.inputs)}: " + ", ".join(map(str, self.inputs))
            )
        results = self._run(list(arrays), None)
        return results[0] if len(results) == 1 else tuple(results)

    def _run(self, given: list[np.ndarray], outputs: Mapping[str, np.ndarray] | None) -> list[np.ndarray]:
        try:
            context, last = self._idle.pop()
        except IndexError:
            context, last = self._executable.context(), self._calls.last()
        was, last.call = last.call, None
        try:
            if outputs is None and was is not None and was.compare(*given) == SAME:
                call, results = was, self._calls.made(was)
            else:
                call, given, results = self._calls.prepare(last, was, given, outputs)
            if call.slices:
                self._run_slices(context, last, call.slices, [*given, *results])
            else:
                if was is not call:
                    self._bind(context, call.dims)
                context.run_arrays([*given, *results])
            last.call = call
        finally:
            self._idle.append((context, last))
        return results

    def _run_slices(
        self, context: Context, last: Last, slices: Sequence[Slices], arrays: Sequence[np.ndarray]
    ) -> None:
        """Slices side by side, or one after another."""
        bound: Dims | None = None
        for s in slices:
            if bound is not s.dims:
                self._bind(context, s.dims.values)
            bound = s.dims
            some = [a[rows] for a, rows in zip(arrays, s.rows, strict=True)]
            if s.n == 1:
                context.run_arrays(some)
                continue
            last.crew = crew = last.crew or Crew(self._slices_program, context)
            offsets, _ = self._planner.plan(s.dims.values)
            for c in crew.contexts[1:]:
                c.bind(s.dims.values, 1, offsets)
            crew.run(s.n, some)

    def _arena_bytes(self, dims: Mapping[str, int]) -> int:
        return self._planner.plan(dims)[1].arena_bytes

    def _bind(self, context: Context, dims: dict[str, int]) -> None:
        offsets, _ = self._planner.plan(dims)
        context.bind(dims, self._sharing.threads(dims, self.threads), offsets)

    @cached_property
    def _slices_program(self) -> Executable:
        return slices_program(self._executable)

    @cached_property
    def _sharing(self) -> Sharing:
        return Sharing(self.image.lines, self.image.kernels)

    def __repr__(self) -> str:
        return describe(
            self.inputs, self.outputs, f"{self.image.isa}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(NOT_PICKLED)

    def save(self, path: str | Path) -> int:
        """Write the engine to one file (see `vivace.runtime.saved`), atomically; returns its size in bytes."""
        portable = self._portable() if callable(self._portable) else self._portable
        part = Part("native", self.inputs, self.outputs, self.image)
        placement = [p.fields for p in self.placement]
        return save(Path(path), Program((part,), self.inputs, self.outputs, placement, self.facts), portable)

    # ---- looking inside ---------------------------------------------------------------------------------------------

    @property
    def facts(self) -> dict[str, object]:
        """What the compiler noted; it is saved with the engine."""
        return self.image.facts

    @property
    def conversions(self) -> list[dict[str, object]]:
        """The steps that only change the order or the format of a value, what each costs (at the sizes that `vivace
        bench` takes where they are open), and why it is left."""
        found = self.facts.get("conversions", [])
        return list(found) if isinstance(found, list) else []

    @property
    def stats(self) -> dict[str, object]:
        """Counts and sizes: steps, kernels, weights, arena (for static shapes), and the compiler's facts."""
        facts: dict[str, object] = {
            "isa": self.image.isa,
            "threads": self.threads,
            "n_steps": sum(line.kind == "run" for line in self.image.lines),
            "n_kernels": len(self.image.kernels),
            "n_foreign": len(self.image.foreign),
            "weights_bytes": sum(c.nbytes for c in self.image.constants),
            "code_bytes": sum(map(len, self.image.objects)),
        }
        if self._calls.solver.is_static:
            facts |= self.memory({s.name: [d for d in s.shape if isinstance(d, int)] for s in self.inputs})
        return {**facts, **self.image.facts}

    def memory(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Arena size and its lower bound, in bytes, for inputs of these shapes: of the slices that are computed at the
        same time where there are several. Raises: InputError for shapes that do not fit."""
        call = self._calls.solved(shapes_of(shapes, self.inputs))
        first = call.slices[0] if call.slices else None
        n = self._executable.n_threads if first and first.n > 1 else 1
        _, plan = self._planner.plan(first.dims.values if first else call.dims)
        return {"arena_bytes": n * plan.arena_bytes, "arena_lower_bound_bytes": n * plan.lower_bound_bytes}

    @property
    def appended(self) -> dict[str, str]:
        """The outputs that begin with an input, each with the name of that: both may be views of one array."""
        return {self.outputs[a.output].name: self.inputs[a.input].name for a in self.image.appended}

    def dims_of(self, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The value of each symbolic dim in a call, and of those that the compiler added (`lower.image.Appended`).
        Raises: InputError for an array that does not fit."""
        return self._calls.solved([inputs[n].shape for n in self._names]).dims

    def traces(self, inputs: Mapping[str, np.ndarray], n_runs: int = 1) -> list[list[Chunk]]:
        """Inferences one after another, each piece by piece in the order of their starts: `Chunk.step` numbers the
        lines of the image.
        """
        run = self.recorder(inputs)
        return [run() for _ in range(n_runs)]

    def profile(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray] | None = None) -> list[Event]:
        """One inference with the time of each kernel: one event per kernel and thread that worked on it."""
        call, _, _ = self._calls.prepare(self._calls.last(), None, [inputs[n] for n in self._names], outputs)
        runs = [(s.n, s.dims.values) for s in call.slices] or [(1, call.dims)]
        merged: dict[tuple[int, int], list[int]] = {}
        for chunk in self.recorder(inputs, outputs=outputs)():
            slot = merged.setdefault((chunk.step, chunk.thread), [chunk.start_ns, 0])
            slot[1] += chunk.duration_ns
        events = []
        for (step, thread), (start, duration) in merged.items():
            line = self.image.lines[step]
            events.append(
                Event(
                    kernel=f"{step}:{line.label}", start_ns=start, duration_ns=duration,
                    bytes=sum(n * evaluate(line.n_bytes, d) for n, d in runs),
                    flops=sum(n * evaluate(line.flops, d) for n, d in runs), thread=thread,
                )
            )  # fmt: skip
        return events

    def recorder(
        self, inputs: Mapping[str, np.ndarray], arena: Buffer | None = None,
        outputs: Mapping[str, np.ndarray] | None = None,
    ) -> Callable[[], list[Chunk]]:  # fmt: skip
        """A function that does one inference on these inputs and tells it piece by piece, as `traces` does. Recorders
        that take turns may share an arena."""
        last = self._calls.last()
        call, given, results = self._calls.prepare(last, None, [inputs[n] for n in self._names], outputs)
        context = self._executable.context(arena)
        slices = call.slices or (Slices(Dims(call.dims), (...,) * len(self.inputs + self.outputs)),)
        last.crew = Crew(self._slices_program, context) if any(s.n > 1 for s in slices) else None
        recorded = last.crew or context
        recorded.record(1 << 16)

        def run() -> list[Chunk]:
            self._run_slices(context, last, slices, [*given, *results])
            return sorted(recorded.chunks(), key=lambda chunk: chunk.start_ns)

        run()  # pays for the page faults of the context and of the record
        return run

    # ---- linking ----------------------------------------------------------------------------------------------------

    def _link(self, runners: Sequence[ForeignRunner | None]) -> Executable:
        image = self.image
        scratch: Dim = 0
        for k in image.kernels:
            scratch = maximum(scratch, k.scratch_bytes)
        made = [self._step(line, runners) for line in image.lines]
        return Executable(
            made, n_inputs=len(image.inputs), n_outputs=len(image.outputs),
            arena_bytes=symbol("@arena"), scratch_bytes=scratch,
            n_threads=self.threads, placed=self._planner.names, keep=(self._library, self._constants),
        )  # fmt: skip

    def _step(self, line: LineEntry, runners: Sequence[ForeignRunner | None]) -> steps.Step:
        refs = [self._ref(s, offset) for s, offset in line.operands]
        if line.kind == "run":
            kernel = self.image.kernels[line.kernel]
            assert self._library is not None
            args = [*refs, *(steps.Value(self._symbols[d]) for d in kernel.dims)]
            return steps.Kernel(
                self._library.address(kernel.symbol), tuple(args), kernel.units, kernel.grain, line.serial, line.beside
            )
        match line.kind:
            case "jump":
                return steps.Jump(line.target)
            case "unless":
                return steps.Unless(refs[0], line.target, 1)
            case "set":
                return steps.Set(refs[0], 0)
            case "count":
                return steps.Count(refs[0])
            case "less":
                return steps.Less(refs[0], refs[1], line.target)
            case "demand":
                return steps.Call(_refusal(line), due=line.lacks)
        return self._call(", ".join(line.nodes), self.image.foreign[line.kernel], runners[line.kernel])

    def _call(self, label: str, entry: ForeignEntry, runner: ForeignRunner | None) -> steps.Step:
        assert runner is not None
        places = (*entry.inputs, *entry.outputs)
        args: list[steps.Arg] = [self._ref(s, offset) for s, offset, _, _ in places]
        counts = [len(shape) for *_, shape in places]
        args += [steps.Value(d) for *_, shape in places for d in shape]
        dtypes = [DType(t).numpy for _, _, t, _ in places]
        n_in = len(entry.inputs)

        def call(words: Sequence[int]) -> None:
            arrays, at = [], len(places)
            for address, count, dtype in zip(words, counts, dtypes, strict=False):
                arrays.append(_array_at(address, tuple(words[at : at + count]), dtype))
                at += count
            for out, result in zip(arrays[n_in:], runner(arrays[:n_in]), strict=True):
                if out.shape != np.shape(result):  # which broadcasting would hide
                    raise ShapeError(
                        f"a result has the shape {list(np.shape(result))}", where=label,
                        expected=f"{list(out.shape)}, by the sizes around it", hint="providers='onnxruntime'",
                    )  # fmt: skip
                out[...] = result

        return steps.Call(call, tuple(args))

    def _ref(self, number: int, offset: Dim) -> steps.Ref:
        s = self.image.storages[number]
        match s.kind:
            case "arena":
                return steps.Arena(symbol(f"@{number}") + offset)
            case "constant":
                assert isinstance(offset, int)
                return steps.Constant(self._constants[s.index].ctypes.data + offset)
            case "input":
                return steps.Input(s.index, offset)
            case _:
                return steps.Output(s.index, offset)


def _refusal(line: LineEntry) -> Callable[[Sequence[int]], None]:
    """What ends a run whose sizes a branch or body is not meant for."""

    def refuse(_: Sequence[int]) -> NoReturn:
        raise ShapeError(
            "the branch or body that runs does not take inputs of these sizes", where=", ".join(line.nodes),
            expected=line.label, hint="such sizes, or providers='onnxruntime' where the model takes others",
        )  # fmt: skip

    return refuse


def describe(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], more: str) -> str:
    """An engine in a line, for people."""
    return f"<vivace engine ({', '.join(map(str, inputs))}) -> ({', '.join(map(str, outputs))}), {more}>"


def _symbols_of(image: Image) -> dict[str, Dim]:
    """Every dim name that a kernel takes, as the symbol that a binding gives a value."""
    return {d: symbol(d) for k in image.kernels for d in k.dims}


def _aligned(array: np.ndarray) -> np.ndarray:
    """The constant on a cache-line boundary, copied only if it is not."""
    if array.ctypes.data % 64 == 0 and array.flags.c_contiguous:
        return array
    raw = np.empty(array.nbytes + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    out = raw[skip : skip + array.nbytes].view(array.dtype).reshape(array.shape)
    whole, source = out.reshape(-1), array.reshape(-1)
    for i in range(0, source.size, step := max(1, _COPIED_BYTES // array.itemsize)):
        part = source[i : i + step]
        whole[i : i + step] = part
        forget(part)  # of a mapped file, no more than a part stands beside its copy
    forget(array)  # where its parts were copies
    return out


def _array_at(address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = (ctypes.c_char * max(n_bytes, 1)).from_address(address)
    return np.frombuffer(memoryview(raw), np.uint8, n_bytes).view(dtype).reshape(shape)
