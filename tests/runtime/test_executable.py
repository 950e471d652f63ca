"""What programs compute: steps, dims, memory, callbacks."""

import ctypes
import random
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from vivace.base.dims import floordiv, symbol
from vivace.base.errors import InternalError
from vivace.runtime import executable as of_contexts
from vivace.runtime.buffer import PAGE_BYTES, Buffer
from vivace.runtime.executable import Executable
from vivace.targets.cpu.program_layout import Header
from vivace.targets.cpu.steps import (
    Arena,
    Call,
    Constant,
    Count,
    Input,
    Jump,
    Kernel,
    Less,
    Output,
    Set,
    Step,
    Unless,
    Value,
)

Address = Callable[[object], int]


def chain(address: Address, n: int, n_steps: int, *, units: int, grain: int = 1, serial_every: int = 0) -> list[Step]:
    """Steps of which each reads everything that the one before it wrote: a missing barrier shows in the result."""
    places = (Arena(0), Arena(8 * n))
    steps: list[Step] = [Kernel(address("mirror"), (Input(0), places[0], Value(n), Value(0)), units)]
    for i in range(n_steps):
        args = (places[i % 2], places[(i + 1) % 2], Value(n), Value(i * 97))
        steps.append(Kernel(address("mirror"), args, units, grain, serial=bool(serial_every) and i % serial_every == 0))
    steps.append(Kernel(address("mirror"), (places[n_steps % 2], Output(0), Value(n), Value(1)), units))
    return steps


@pytest.mark.parametrize("n_threads", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("n", "grain", "serial_every"), [(1, 1, 0), (2, 1, 3), (61, 1, 0), (64, 7, 2), (100, 1000, 0)])
def test_every_unit_runs_once_and_steps_follow_each_other(
    address: Address, n_threads: int, n: int, grain: int, serial_every: int
) -> None:
    n_steps = 40
    steps = chain(address, n, n_steps, units=n, grain=grain, serial_every=serial_every)
    executable = Executable(steps, n_inputs=1, n_outputs=1, arena_bytes=16 * n, scratch_bytes=8, n_threads=n_threads)
    context = executable.context()
    x, y = np.arange(n, dtype=np.int64), np.empty(n, np.int64)
    for _ in range(10):
        y[:] = -1
        context.run([address(x)], [address(y)])
        np.testing.assert_array_equal(y, (x if n_steps % 2 == 0 else x[::-1]) + n_steps + 2)


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_steps_beside_each_other_share_one_barrier(address: Address, n_threads: int) -> None:
    rng = random.Random(1)
    sizes = [rng.choice([0, 1, 5, 33]) for _ in range(9)]
    buffers = [np.zeros(max(1, n), np.int64) for n in sizes]
    steps: list[Step] = []
    for _ in range(6):
        for i, (n, b) in enumerate(zip(sizes, buffers, strict=True)):
            steps.append(Kernel(address("add_one"), (Constant(address(b)),), n, rng.choice([1, 4]), beside=i > 0))
    executable = Executable(steps, n_threads=n_threads)
    assert len(set(executable.layout.parts[:, 1])) == 6
    context = executable.context()
    for _ in range(50):
        context.run([], [])
    for n, b in zip(sizes, buffers, strict=True):
        assert (b[:n] == 300).all()
        assert (b[n:] == 0).all()


def test_a_step_that_is_jumped_to_starts_its_own_group(address: Address) -> None:
    a, b = np.zeros(4, np.int64), np.zeros(4, np.int64)
    steps: list[Step] = [
        Unless(Input(0), 2),
        Kernel(address("add_one"), (Constant(address(a)),), 4),
        Kernel(address("add_one"), (Constant(address(b)),), 4, beside=True),
    ]
    context = Executable(steps, n_inputs=1, n_threads=2).context()
    context.run([address(np.array([False]))], [])
    assert (a.sum(), b.sum()) == (0, 4)
    context.run([address(np.array([True]))], [])
    assert (a.sum(), b.sum()) == (4, 8)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("trips", [0, 1, 7])
def test_loops_and_branches(address: Address, n_threads: int, trips: int) -> None:
    # i = 0; while i < trips: a += 1; if flag: b += 1 else: c += 1; i += 1
    add = address("add_one")
    steps: list[Step] = [
        Set(Arena(0), 0),
        Less(Arena(0), Input(0), 9),
        Kernel(add, (Output(0),), 10),
        Unless(Input(1), 6),
        Kernel(add, (Output(0, 80),), 10),
        Jump(7),
        Kernel(add, (Output(0, 160),), 10, serial=True),
        Count(Arena(0)),
        Jump(1),
    ]
    context = Executable(steps, n_inputs=2, n_outputs=1, arena_bytes=8, n_threads=n_threads).context()
    limit = np.array([trips], np.int64)
    for flag in (True, False):
        y = np.zeros((3, 10), np.int64)
        context.run([address(limit), address(np.array([flag]))], [address(y)])
        expected = [trips, trips if flag else 0, 0 if flag else trips]
        np.testing.assert_array_equal(y, np.repeat(np.array(expected)[:, None], 10, 1))


def test_a_wide_flag_is_read_whole(address: Address) -> None:
    a = np.zeros(1, np.int64)
    steps: list[Step] = [Unless(Input(0), 2, width=8), Kernel(address("add_one"), (Constant(address(a)),))]
    context = Executable(steps, n_inputs=1).context()
    context.run([address(np.array([1 << 40]))], [])
    assert a[0] == 1
    context.run([address(np.array([0]))], [])
    assert a[0] == 1


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_calls_run_on_the_callers_thread_with_resolved_args(address: Address, n_threads: int) -> None:
    seen: list[tuple[list[int], int]] = []

    def call(args: Sequence[int]) -> None:
        ctypes.c_int64.from_address(args[0]).value += 1000
        seen.append((list(args[1:]), threading.get_ident()))

    y = np.zeros(64, np.int64)
    work = Kernel(address("mirror"), (Output(0), Arena(0), Value(64), Value(5)), 64)
    back = Kernel(address("mirror"), (Arena(0), Output(0), Value(64), Value(9)), 64)
    n = symbol("n")
    steps: list[Step] = [work, back, Call(call, (Output(0), Value(2 * n))), work, back]
    executable = Executable(steps, n_outputs=1, arena_bytes=512, scratch_bytes=8, n_threads=n_threads)
    context = executable.context()
    context.bind({"n": 21})
    for _ in range(50):
        y[:] = 0
        context.run([], [address(y)])
        assert y[0] == 1004
        assert (y[1:] == 4).all()
    assert seen == [([42], threading.get_ident())] * 50


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_an_exception_in_a_call_ends_the_run_and_reaches_the_caller(
    address: Address, n_threads: int, error: BaseException
) -> None:
    errors: list[BaseException] = [error]

    def call(_: Sequence[int]) -> None:
        if errors:
            raise errors.pop()

    y = np.zeros(32, np.int64)
    add = Kernel(address("add_one"), (Output(0),), 32)
    context = Executable([add, Call(call), add], n_outputs=1, n_threads=n_threads).context()
    with pytest.raises(type(error)) as caught:
        context.run([], [address(y)])
    assert caught.value is error
    assert (y == 1).all()
    context.run([], [address(y)])
    assert (y == 3).all()


def test_dims_change_words_only(address: Address) -> None:
    n, m = symbol("batch.size", 1), symbol("sequence length", 0)
    total = n * m + 1
    steps: list[Step] = [
        Kernel(address("mirror"), (Input(0), Arena(64 * n), Value(total), Value(0)), total, floordiv(total, 4)),
        Kernel(address("mirror"), (Arena(64 * n), Output(0, 8 * m), Value(total), Value(0)), total),
    ]
    arena_bytes = 64 * n + 8 * total
    executable = Executable(steps, n_inputs=1, n_outputs=1, arena_bytes=arena_bytes, scratch_bytes=8, n_threads=2)
    context = executable.context()
    with pytest.raises(InternalError, match="not bound"):
        context.run([0], [0])
    for dims in ({"batch.size": 3, "sequence length": 50}, {"batch.size": 1, "sequence length": 0},
                 {"batch.size": 40, "sequence length": 11}):  # fmt: skip
        context.bind(dims)
        rows, columns = dims.values()
        count = rows * columns + 1
        x, y = np.arange(count), np.zeros(count + columns, np.int64)
        context.run([address(x)], [address(y)])
        np.testing.assert_array_equal(y[columns:], x + 2)
        assert not y[:columns].any()
        assert context.arena.n_bytes >= 64 * rows + 8 * count
    with pytest.raises(KeyError):
        context.bind({"batch.size": 3})
    with pytest.raises(InternalError, match="not bound"):
        context.run([0], [0])


def test_huge_unit_counts_are_cut_into_few_grains(address: Address) -> None:
    n = 5_000_000
    y = np.zeros(n, np.int64)
    context = Executable([Kernel(address("add_one"), (Output(0),), n)], n_outputs=1, n_threads=2).context()
    context.run([], [address(y)])
    assert (y == 1).all()


def test_huge_unit_counts_side_by_side_are_cut_into_few_grains(address: Address) -> None:
    n = 70_000
    ys = [np.zeros(n, np.int64) for _ in range(3)]
    steps = [Kernel(address("add_one"), (Output(i),), n, beside=i > 0) for i in range(3)]
    context = Executable(steps, n_outputs=3, n_threads=2).context()
    context.run([], [address(y) for y in ys])
    assert all((y == 1).all() for y in ys)


def test_threads_begin_with_halves_of_their_own(address: Address) -> None:
    n = 50
    steps = chain(address, n, 6, units=n)
    context = Executable(steps, n_inputs=1, n_outputs=1, arena_bytes=16 * n, scratch_bytes=8, n_threads=3).context()
    x, y = np.zeros(n, np.int64), np.zeros(n, np.int64)
    context.record(1000)
    n_shared = 0
    until = time.monotonic() + 60
    while time.monotonic() < until:  # threads met often enough
        context.run([address(x)], [address(y)])
        chunks = list(context.chunks())
        for step in range(len(steps)):
            ours = sorted((c for c in chunks if c.step == step), key=lambda c: c.start_ns)
            for thread in range(3):
                claims = [((c.begin >= n // 2) != thread % 2, c.begin) for c in ours if c.thread == thread]
                assert claims == sorted(claims)  # first those of its own half, in either half onwards
                n_shared += thread == 1 and bool(claims) and not claims[0][0]
        if n_shared > 20:
            break
    assert n_shared > 20


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_notes_last_while_a_thread_goes_on(address: Address, n_threads: int) -> None:
    """They are zero when it begins a step, or another part of one."""
    n = 40
    ys = [np.zeros(n, np.int64) for _ in range(4)]
    steps = [Kernel(address("note"), (Output(i),), n, beside=i in (2, 3)) for i in range(4)]
    context = Executable(steps, n_outputs=4, scratch_bytes=128, n_threads=n_threads).context()
    context.record(1000)
    n_kept = 0
    for _ in range(50):
        context.run([], [address(y) for y in ys])
        last: dict[int, tuple[int, int]] = {}  # of each thread, the step that it ran and the note that it left
        for chunk in sorted(context.chunks(), key=lambda c: c.start_ns):
            step, note = last.get(chunk.thread, (-1, 0))
            found = ys[chunk.step][chunk.begin]
            assert found in (0, note) if step == chunk.step else found == 0  # 0: it gave way in between
            last[chunk.thread] = chunk.step, found + 1
            n_kept += bool(found)
    assert n_kept or n_threads == 1  # which runs each step in one piece


@pytest.mark.parametrize("limit", [0, 1])
def test_a_context_stays_whole_where_memory_runs_out(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none for a larger arena, or for more scratch memory."""
    context = Executable([], arena_bytes=symbol("n"), scratch_bytes=symbol("n")).context()
    context.bind({"n": 1 << 16})
    sizes: list[int] = []

    def some_memory(n_bytes: int, by_page: bool = False) -> Buffer:
        sizes.extend([n_bytes] * (n_bytes > 0))
        if len(sizes) > limit:
            raise MemoryError
        return Buffer(n_bytes, by_page)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(of_contexts, "Buffer", some_memory)
        context.bind({"n": 1 << 18})
    assert len(sizes) == limit + 1
    context.bind({"n": 1 << 16})
    assert min(context.arena.bytes.size, context._scratch.bytes.size) >= 1 << 16


def test_a_jump_out_of_the_program_is_refused() -> None:
    with pytest.raises(InternalError, match="jump"):
        Executable([Jump(3)])


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_recorded_chunks_cover_every_unit_once(address: Address, n_threads: int) -> None:
    n = 50
    steps = chain(address, n, 6, units=n, serial_every=4)
    executable = Executable(steps, n_inputs=1, n_outputs=1, arena_bytes=16 * n, scratch_bytes=8, n_threads=n_threads)
    context = executable.context()
    x, y = np.zeros(n, np.int64), np.zeros(n, np.int64)
    assert list(context.chunks()) == []
    context.record(1000)
    context.run([address(x)], [address(y)])
    chunks = list(context.chunks())
    for step in range(len(steps)):
        units = sorted(u for c in chunks if c.step == step for u in range(c.begin, c.end))
        assert units == list(range(n))
    assert all(c.duration_ns >= 0 and 0 <= c.thread < n_threads for c in chunks)
    last_stop = [max(c.start_ns + c.duration_ns for c in chunks if c.step == s) for s in range(len(steps))]
    first_start = [min(c.start_ns for c in chunks if c.step == s) for s in range(len(steps))]
    assert all(stop <= start for stop, start in zip(last_stop, first_start[1:], strict=False))
    context.record(5)
    context.run([address(x)], [address(y)])
    assert [c.step for c in context.chunks()][-1] == len(steps) - 1
    context.record(0)
    context.run([address(x)], [address(y)])
    assert list(context.chunks()) == []


@pytest.mark.parametrize("n_threads", [1, 2])
def test_the_callers_floating_point_mode_neither_matters_nor_changes(
    kernels: object, address: Address, n_threads: int
) -> None:
    set_mode = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address("set_mxcsr"))
    get_mode = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address("get_mxcsr"))
    flush, normal, seen = (np.array([v], np.uint32) for v in (0x9FC0, 0x1F80, 0))
    a, b, c = np.full(256, 1e-38, np.float32), np.full(256, 0.25, np.float32), np.zeros(256, np.float32)
    step = Kernel(address("multiply"), (Input(0), Input(1), Output(0)), 256)
    context = Executable([step], n_inputs=2, n_outputs=1, n_threads=n_threads).context()
    set_mode(address(flush))
    try:
        context.run([address(a), address(b)], [address(c)])
        get_mode(address(seen))
    finally:
        set_mode(address(normal))
    np.testing.assert_array_equal(c, a * b)
    assert (c > 0).all()
    assert int(seen[0]) & ~0x3F == int(flush[0]) & ~0x3F


@pytest.mark.parametrize("n_threads", [2, 5])
def test_threads_share_no_page_of_scratch(address: Address, n_threads: int) -> None:
    step = Kernel(address("mirror"), (Input(0), Output(0), Value(4), Value(0)), 4)
    context = Executable([step], n_inputs=1, n_outputs=1, scratch_bytes=5000, n_threads=n_threads).context()
    assert context._words[Header.SCRATCH] % PAGE_BYTES == 0
    assert context._words[Header.SCRATCH_STRIDE] == 2 * PAGE_BYTES
