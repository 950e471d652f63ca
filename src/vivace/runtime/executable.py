"""A program ready to run: `Executable` is shared and constant, `Context` holds all that one run changes.

    executable = Executable(steps, n_inputs=1, n_outputs=1, arena_bytes=..., scratch_bytes=..., n_threads=2,
                            keep=(library, weights))
    context = executable.context()
    context.bind({"N": 4})                      # new dims: rewrites words, makes memory grow; well under 0.1 ms
    context.run([x_address], [y_address])       # one native call; or, with NumPy arrays:
    context.run_arrays([x, y])

Rules:
* ONE RUN: a context runs once at a time; a second `run` or `bind` meanwhile is an error. Several contexts of one
  executable run at once.
* ADDRESSES: inputs and outputs are addresses of memory that fits the bound dims; nothing is checked here.
* STEADY: `run` allocates nothing and calls no Python but the program's own `Call` steps.

Not handled: shapes of inputs, dtypes, layouts (the session's), stopping a run from outside.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vivace.base.dims import Dim
from vivace.base.errors import InternalError
from vivace.runtime.buffer import DATA_FIELD, PAGE_BYTES, Buffer, data_is_first
from vivace.runtime.evaluation import check_status
from vivace.runtime.pool import pool
from vivace.targets.cpu.code import NOTES_BYTES
from vivace.targets.cpu.formulas import Frame, Words
from vivace.targets.cpu.program_layout import Header, Record, Ring, Status
from vivace.targets.cpu.steps import Call, Step
from vivace.targets.cpu.team import MAX_THREADS
from vivace.targets.cpu.words import Layout, encode

_Trampoline = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Units [begin, end) of a step, run by one thread. `start_ns` is on the clock of `time.perf_counter_ns`."""

    step: int
    thread: int
    start_ns: int
    duration_ns: int
    begin: int
    end: int


class Executable:
    """Steps encoded for this process. The values of the dims `placed` come as one array when a context is bound."""

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        n_inputs: int = 0,
        n_outputs: int = 0,
        arena_bytes: Dim = 0,
        scratch_bytes: Dim = 0,
        n_threads: int = 1,
        placed: Sequence[str] = (),
        keep: object = None,
    ) -> None:
        self.steps = tuple(steps)
        self.n_inputs = n_inputs
        self.n_outputs = n_outputs
        self.n_threads = max(1, min(n_threads, MAX_THREADS))
        self.keep = keep
        self.n_placed = len(placed)
        self.layout: Layout = encode(self.steps, n_inputs, (arena_bytes, scratch_bytes), placed)
        self.names = self.layout.formulas.names[self.n_placed :]
        self.is_static = not self.layout.formulas.names

    def context(self, arena: Buffer | None = None) -> Context:
        """New memory for runs. Without symbolic dims it is bound already. Contexts that do not run at the same time may
        share an arena."""
        return Context(self, arena)


class Context:
    """The memory of one run at a time."""

    def __init__(self, executable: Executable, arena: Buffer | None = None) -> None:
        self.executable = executable
        self._is_shared = arena is not None
        self._pool = pool()
        self._lock = threading.Lock()
        layout = executable.layout
        self._memory = Buffer(8 * len(layout.words))
        self._words: Words = self._memory.view(np.int64, (len(layout.words),))
        self._base = self._memory.address
        self._values = layout.formulas.values.copy()
        self._frame = layout.frame(self._base, self._values)
        self._evaluate = self._pool.native.evaluation(self._frame.ctypes.data)
        self._fill = self._pool.native.filling(self._frame.ctypes.data)
        self._enter = self._pool.native.entry(self._base)
        # Native code finds the address of an input or output in a word, DATA_FIELD bytes behind the place in the table
        # `_places`: the place is the array itself, or leads to a word of `_addresses`.
        n_io = executable.n_inputs + executable.n_outputs
        self._addresses, self._places = (ctypes.c_int64 * n_io)(), (ctypes.c_int64 * n_io)()
        first = ctypes.addressof(self._addresses)
        self._places[:] = [first - DATA_FIELD + 8 * i for i in range(n_io)]
        self._arena = arena or Buffer(0)
        self._scratch = Buffer(0)
        self._ring: Buffer | None = None
        self._failure: BaseException | None = None
        self._trampolines = [self._trampoline(call) for call in layout.calls]
        self._write_words()
        self._dims: Mapping[str, int] | None = None
        self._offsets: Words | None = None
        self.n_threads = executable.n_threads
        if executable.is_static:
            self.bind({})

    @property
    def address(self) -> int:
        """Where its words are."""
        return self._base

    @property
    def arena(self) -> Buffer:
        """The arena, for reading intermediate values in tests and tools."""
        return self._arena

    @property
    def dims(self) -> dict[str, int] | None:
        """The dims that it is bound to, those `placed` among them."""
        if self._dims is None:
            return None
        names = self.executable.layout.formulas.names
        return {**self._dims, **dict(zip(names, self._values[: len(names)].tolist(), strict=True))}

    def bind(self, dims: Mapping[str, int], n_threads: int | None = None, offsets: Words | None = None) -> None:
        """Makes the context ready for these dims, and for the values of those `placed`; does nothing when it is.

        `n_threads` lessens the executable's: waking a sleeping worker pays from about 100 us of work on.
        """
        n_threads = max(1, min(n_threads or self.executable.n_threads, self.executable.n_threads))
        if self._dims is not None and self._dims == dims and self._offsets is offsets and self.n_threads == n_threads:
            return
        with _Exclusive(self._lock):
            self._dims = None
            self.n_threads = n_threads
            self._words[Header.N_THREADS] = n_threads
            layout, n_placed = self.executable.layout, self.executable.n_placed
            self._values[n_placed : n_placed + len(self.executable.names)] = [dims[n] for n in self.executable.names]
            if offsets is not None:
                self._values[:n_placed] = offsets
            check_status(self._evaluate())
            arena_bytes, scratch_bytes = (int(self._values[place]) for place in layout.extra)
            if arena_bytes > self._arena.n_bytes:
                if not self._is_shared:
                    self._arena.release()
                self._arena, self._is_shared = Buffer(0), False  # which stays where there is no memory for more
                self._arena = Buffer(arena_bytes)
            # Each thread has pages of its own, which it is the first to touch (rule UNTOUCHED of buffers).
            stride = -(-scratch_bytes // PAGE_BYTES) * PAGE_BYTES
            if stride * n_threads > self._scratch.n_bytes:
                self._scratch.release()
                self._scratch = Buffer(0)
                self._scratch = Buffer(stride * n_threads, by_page=self.executable.n_threads > 1)
            self._frame[Frame.ARENA] = self._arena.address
            self._fill()
            self._words[Header.SCRATCH] = self._scratch.address
            self._words[Header.SCRATCH_STRIDE] = stride
            self._dims, self._offsets = dict(dims), offsets

    def hand_out(self, words: Sequence[int]) -> None:
        """Puts a word into the scratch of each thread, behind the notes of kernels, where it stays."""
        stride = int(self._words[Header.SCRATCH_STRIDE])
        for thread, word in enumerate(words):
            self._scratch.view(np.int64, (1,), thread * stride + NOTES_BYTES)[0] = word

    def run(self, inputs: Sequence[int], outputs: Sequence[int] = ()) -> None:
        """Runs the program once on the memory at these addresses; `inputs` may hold those of the outputs as well.

        Raises: whatever a `Call` step raised; InternalError when the context is in use or not bound.
        """
        self._addresses[:] = [*inputs, *outputs]
        self._run(())

    def run_arrays(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """`run` on the memory of these arrays: all inputs, then all outputs."""
        if not data_is_first:
            self.run([a.ctypes.data for a in arrays])
            return
        self._run(arrays)

    def _run(self, places: Sequence[object]) -> None:
        if not self._lock.acquire(False):
            raise InternalError("the context is in use by another run", hint="a context per concurrent run")
        try:
            if self._dims is None:
                raise InternalError("the context is not bound to dims", expected="bind before run")
            while status := self._enter(*places):
                if status != Status.NEEDS_WORKERS:
                    self._raise_failure()
                self._words[Header.N_THREADS] = self._pool.ensure(self.n_threads)
        finally:
            self._lock.release()

    def record(self, n_chunks: int) -> None:
        """From now on keep the times of the last `n_chunks` chunks; 0 stops."""
        with _Exclusive(self._lock):
            self._ring = Buffer(8 * (Ring.RECORDS + Record.SIZE * n_chunks)) if n_chunks else None
            self._words[Header.RING] = self._ring.address if self._ring else 0
            if self._ring:
                self._ring.view(np.int64, (Ring.RECORDS,))[Ring.CAPACITY] = n_chunks

    def chunks(self) -> Iterator[Chunk]:
        """The recorded chunks, oldest first; they are forgotten."""
        if self._ring is None:
            return
        head = self._ring.view(np.int64, (Ring.RECORDS,))
        n, capacity = int(head[Ring.CURSOR]), int(head[Ring.CAPACITY])
        table = self._ring.view(np.int64, (capacity, Record.SIZE), 8 * Ring.RECORDS)
        rows = [table[i % capacity].tolist() for i in range(max(0, n - capacity), n)]
        head[Ring.CURSOR] = 0
        clock = self._pool.clock()
        for part, thread, start, stop, begin, end in rows:
            step = self.executable.layout.step_of_part[part - self._base]
            start_ns, stop_ns = clock(start), clock(stop)
            yield Chunk(step, thread, start_ns, stop_ns - start_ns, begin, end)

    def _write_words(self) -> None:
        layout, words = self.executable.layout, self._words
        words[:] = layout.words
        words[layout.own] += self._base
        for (position, *_), trampoline in zip(layout.calls, self._trampolines, strict=True):
            words[position] = ctypes.cast(trampoline, ctypes.c_void_p).value or 0
        words[Header.TEAM_CELL] = self._pool.cell_address
        words[Header.PROGRAM] = self._base + 8 * layout.program
        words[Header.PATCHES] = self._base + 8 * layout.patches
        words[Header.N_PATCHES] = layout.n_patches
        words[Header.IO] = ctypes.addressof(self._places)
        words[Header.FIELD] = DATA_FIELD

    def _trampoline(self, call: tuple[int, int, int, int]) -> Any:
        _, step, position, n_args = call
        function = self.executable.steps[step]
        assert isinstance(function, Call)
        args = self._words[position : position + n_args]

        def enter(_: int) -> int:
            try:
                function.function(args.tolist())
            except BaseException as e:
                self._failure = e
                return 1
            return 0

        return _Trampoline(enter)

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is None:
            raise InternalError("the program ended with an unknown status")
        raise failure


class _Exclusive:
    """Holds a lock, or is an error at once where it is taken (rule ONE RUN)."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(False):
            raise InternalError("the context is in use by another run", hint="a context per concurrent run")

    def __exit__(self, *_: object) -> None:
        self._lock.release()
