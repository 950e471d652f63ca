"""How the threads of the process behave: together, idle, in children, at exit."""

import functools
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import vivace.runtime.pool as of_pool
from vivace.base.errors import InternalError
from vivace.runtime.executable import Context, Executable
from vivace.runtime.pool import pool
from vivace.targets.cpu.steps import Arena, Call, Kernel, Output, Step, Value
from vivace.targets.cpu.team import MAX_THREADS, Seat, Team

Address = Callable[[object], int]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def ping_pong(address: Address, n: int, n_steps: int, n_threads: int) -> Context:
    """A program that adds n_steps to every element of its output, back and forth through the arena."""
    there = Kernel(address("mirror"), (Output(0), Arena(0), Value(n), Value(3)), n)
    back = Kernel(address("mirror"), (Arena(0), Output(0), Value(n), Value(7)), n)
    steps = [there, back] * (n_steps // 2)
    return Executable(steps, n_outputs=1, arena_bytes=8 * n, scratch_bytes=8, n_threads=n_threads).context()


@pytest.mark.parametrize("n_threads", [2, 3])
def test_ten_thousand_runs_end(address: Address, n_threads: int) -> None:
    context = ping_pong(address, 4, 2, n_threads)
    y = np.zeros(4, np.int64)
    for _ in range(10_000):
        context.run([], [address(y)])
    assert (y == 20_000).all()


def test_runs_that_find_the_workers_at_any_depth_of_sleep(address: Address) -> None:
    contexts = [ping_pong(address, 16, 4, n) for n in (2, 4, 3)]
    y = np.zeros(16, np.int64)
    rng = random.Random(5)
    for i in range(400):
        contexts[i % 3].run([], [address(y)])
        time.sleep(rng.choice([0, 0, 1e-5, 3e-5, 1e-4, 1e-3]))
    assert (y == 1600).all()


def test_concurrent_runs_from_python_threads(address: Address) -> None:
    failures: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        context = ping_pong(address, 32, 10, 1 + seed % 3)
        y = np.zeros(32, np.int64)
        for i in range(200):
            context.run([], [address(y)])
            if not (y == 10 * (i + 1)).all():
                failures.append(f"thread {seed}, run {i}: {y}")
                return
            if rng.random() < 0.1:
                time.sleep(1e-4)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads)
    assert failures == []


def test_one_context_runs_once_at_a_time(address: Address) -> None:
    inside, leave = threading.Event(), threading.Event()

    def call(_: Sequence[int]) -> None:
        inside.set()
        assert leave.wait(30)

    context = Executable([Call(call)], n_threads=2).context()
    thread = threading.Thread(target=context.run, args=([], []))
    thread.start()
    try:
        assert inside.wait(30)
        with pytest.raises(InternalError, match="in use"):
            context.run([], [])
        with pytest.raises(InternalError, match="in use"):
            context.bind({"n": 1})
    finally:
        leave.set()
        thread.join(30)
    context.run([], [])


def test_a_call_may_run_another_program(address: Address) -> None:
    inner = ping_pong(address, 8, 2, 2)
    y = np.zeros(8, np.int64)
    steps: list[Step] = [
        Kernel(address("add_one"), (Output(0),), 8),
        Call(lambda args: inner.run([], [args[0]]), (Output(0),)),
        Kernel(address("add_one"), (Output(0),), 8),
    ]
    context = Executable(steps, n_outputs=1, n_threads=2).context()
    for _ in range(100):
        context.run([], [address(y)])
    assert (y == 400).all()


def test_contexts_can_be_dropped_while_workers_are_awake(address: Address) -> None:
    y = np.zeros(8, np.int64)
    for _ in range(300):
        ping_pong(address, 8, 2, 3).run([], [address(y)])
    assert (y == 600).all()


def test_the_team_has_a_greatest_size() -> None:
    assert Executable([], n_threads=1000).n_threads == MAX_THREADS


def _worker_stats() -> dict[str, tuple[int, str]]:
    """CPU ticks and state of the worker threads, by thread."""
    stats = {}
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().startswith("vivace-"):
            fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
            stats[task.name] = (int(fields[11]) + int(fields[12]), fields[0])
    return stats


@linux
def test_idle_workers_sleep_and_use_no_cpu(address: Address) -> None:
    context = ping_pong(address, 64, 10, 3)
    y = np.zeros(64, np.int64)
    for _ in range(50):
        context.run([], [address(y)])
    for _ in range(100):  # on a loaded machine a worker gets to its gate late
        time.sleep(0.05)
        before = _worker_stats()
        time.sleep(0.3)
        after = _worker_stats()
        if after == before and {state for _, state in after.values()} == {"S"}:
            break
    else:
        pytest.fail(f"workers went on: {before}, then {after}")
    assert len(after) >= 2


def test_threads_give_way_where_they_hold_no_grain(address: Address) -> None:
    context = ping_pong(address, 64, 10, 2)
    y = np.zeros(64, np.int64)
    context.run([], [address(y)])
    words = pool()._team.view("int64", (Team.SIZE // 8,))
    at = [Team.TURN_CYCLES // 8, Team.SPIN_CYCLES // 8]
    usual = words[at]
    words[at] = 0, 1 << 62  # a turn is over at once, and nobody sleeps, as waking begins a turn too
    try:
        context.run([], [address(y)])
        start = pool().native.cycles()
        for _ in range(200):
            context.run([], [address(y)])
        gave_way = [words[(Team.SEATS + Seat.SIZE * i + Seat.SINCE) // 8] > start for i in (0, 1)]
    finally:
        words[at] = usual
        context.run([], [address(y)])  # those who spin look again
    assert (y == 10 * 203).all()
    assert any(gave_way)


@linux
def test_workers_have_the_affinity_of_the_process_after_being_woken(address: Address) -> None:
    context = ping_pong(address, 64, 10, 3)
    y = np.zeros(64, np.int64)
    for _ in range(20):
        context.run([], [address(y)])
        time.sleep(0.003)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if all(os.sched_getaffinity(int(t)) == os.sched_getaffinity(0) for t in _worker_stats()):
            return
        time.sleep(0.01)
    raise AssertionError({t: os.sched_getaffinity(int(t)) for t in _worker_stats()})


_SCRIPT = """
import os, sys, time
import numpy as np
from vivace.base.machine import isa
from vivace.runtime.executable import Executable
from vivace.runtime.pool import pool
from vivace.targets.cpu import jit
from vivace.targets.cpu.steps import Kernel, Output

text = '''
define void @add_one(ptr %args, i64 %begin, i64 %end, ptr %scratch) {
entry:
  %p = load ptr, ptr %args
  br label %body
body:
  %i = phi i64 [%begin, %entry], [%next, %body]
  %q = getelementptr i64, ptr %p, i64 %i
  %v = load i64, ptr %q
  %w = add i64 %v, 1
  store i64 %w, ptr %q
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %end
  br i1 %more, label %body, label %done
done:
  ret void
}
'''
library = jit.load([jit.compile_text(text, isa("sse"))])
step = Kernel(library.address("add_one"), (Output(0),), 100)
context = Executable([step] * 10, n_outputs=1, n_threads=3, keep=library).context()
y = np.zeros(100, np.int64)

def run(n):
    for _ in range(n):
        context.run([], [y.ctypes.data])
"""


def _run_script(body: str) -> subprocess.CompletedProcess[str]:
    script = _SCRIPT + textwrap.dedent(body)
    command = [sys.executable, "-W", "ignore", "-X", "faulthandler", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_makes_workers_of_its_own() -> None:
    done = _run_script("""
        run(20)
        children = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                assert pool().n_workers == 0
                run(20)
                assert pool().n_workers == 2
                os._exit(0 if (y == 400).all() else 1)
            children.append(pid)
        run(20)
        assert (y == 400).all() and pool().n_workers == 2
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
        print("fine")
    """)
    assert (done.returncode, done.stdout.strip()) == (0, "fine"), done.stderr


@pytest.mark.parametrize("ending", ["run(1)", "run(100); sys.exit(0)", "run(3); time.sleep(0.01)"])
def test_the_process_ends_with_its_workers(ending: str) -> None:
    done = _run_script(ending)
    assert done.returncode == 0, done.stderr


def test_fewer_workers_than_wanted_still_run(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = pool()
    had = shared.n_workers
    monkeypatch.setattr(type(shared), "_start_worker", lambda *_: False)
    context = ping_pong(address, 16, 4, had + 3)
    y = np.zeros(16, np.int64)
    context.run([], [address(y)])
    assert (y == 4).all()
    assert shared.n_workers == had


def test_threads_that_ask_at_once_get_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    class Slow:
        def __init__(self, is_shuffled: bool) -> None:
            made.append(self)
            time.sleep(0.05)

        def restart_in_child(self) -> None: ...

    monkeypatch.setattr(os, "register_at_fork", lambda **_: None)
    monkeypatch.setattr(of_pool, "Pool", Slow)
    monkeypatch.setattr(of_pool, "_pool", functools.cache(of_pool._pool.__wrapped__))
    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(lambda _: of_pool.pool(), range(4)))
    assert found == set(made) and len(made) == 1
