"""The program that looks for races: it runs everything once, in a changing order, and shows a step that races."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tests.runtime.test_executable import chain

from vivace.base.knobs import knobs
from vivace.runtime.executable import Context, Executable
from vivace.runtime.pool import pool
from vivace.targets.cpu.program import program_text
from vivace.targets.cpu.shuffled import PRIMES
from vivace.targets.cpu.steps import Input, Kernel, Output, Step, Value

Address = Callable[[object], int]


def shuffled(steps: list[Step], n_threads: int, **sizes: int) -> Context:
    with knobs.scope(shuffle=True):
        return Executable(steps, n_inputs=1, n_outputs=1, n_threads=n_threads, **sizes).context()


@pytest.mark.parametrize("n_threads", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("n", "grain", "serial_every"), [(1, 1, 0), (2, 1, 3), (61, 1, 0), (64, 7, 2), (100, 1000, 0)])
def test_every_unit_runs_once_and_steps_follow_each_other(
    address: Address, n_threads: int, n: int, grain: int, serial_every: int
) -> None:
    steps = chain(address, n, 20, units=n, grain=grain, serial_every=serial_every)
    context = shuffled(steps, n_threads, arena_bytes=16 * n, scratch_bytes=8)
    x, y = np.arange(n, dtype=np.int64), np.empty(n, np.int64)
    for _ in range(5):
        y[:] = -1
        context.run([address(x)], [address(y)])
        np.testing.assert_array_equal(y, x + 22)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_order_changes_from_run_to_run(address: Address, n_threads: int) -> None:
    step = Kernel(address("mirror"), (Input(0), Output(0), Value(30), Value(0)), 30)
    context = shuffled([step], n_threads, scratch_bytes=8)
    context.record(100)
    x, y = np.arange(30), np.empty(30, np.int64)
    orders = []
    for _ in range(4):
        context.run([address(x)], [address(y)])
        chunks = sorted(context.chunks(), key=lambda c: c.start_ns)
        assert all(c.end == c.begin + 1 for c in chunks)
        orders.append(tuple(c.begin for c in chunks))
        assert sorted(orders[-1]) == list(range(30))
    assert len(set(orders)) > 1


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_step_that_reads_what_it_writes_is_found(address: Address, n_threads: int) -> None:
    """`y[i] = y[29 - i] + 1` in place: in order, the second half sees what the first wrote."""
    step = Kernel(address("mirror"), (Output(0), Output(0), Value(30), Value(0)), 30)
    want = np.arange(30)
    Executable([step], n_outputs=1, scratch_bytes=8).context().run([], [address(want)])
    context = shuffled([step], n_threads, scratch_bytes=8)
    got = []
    for _ in range(4):
        y = np.arange(30)
        context.run([0], [address(y)])
        got.append((y == want).all())
    assert not all(got)


def test_engines_do_not_run_that_program() -> None:
    plain, other = program_text(), program_text(is_shuffled=True)
    assert "@delay" not in plain and "@primes" not in plain
    assert "@delay" in other
    with knobs.scope(shuffle=True):
        assert pool() is not POOL
    assert pool() is POOL


POOL = pool()


def test_the_primes_are_prime_and_beyond_every_total() -> None:
    assert all(p > 2**31 and all(p % d for d in range(3, 46_400, 2)) and p % 2 for p in PRIMES)
