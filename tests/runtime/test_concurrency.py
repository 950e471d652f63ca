"""What holds while an engine runs: no Python per operator, nothing allocated; other threads go on, several callers at
once, children, and memory given back."""

from __future__ import annotations

import gc
import os
import sys
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests import races
from tests.images import build_image

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type
from vivace.graph.reference import evaluate
from vivace.options import choose_isa
from vivace.runtime.engine import Engine

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def network() -> Graph:
    """Products, a softmax and element-wise steps over a batch of any size."""
    rng = np.random.default_rng(0)
    b = Builder()
    x = b.input("x", Type(DType.f32, (symbol("N"), 64)))
    for _ in range(4):
        w = b.const((rng.standard_normal((64, 64)) / 8).astype(np.float32))
        x = b.softmax(b.tanh(b.matmul(x, w)), axis=1)
    return b.finish([x, b.reduce_max(x, axes=(1,), keepdims=True)])


GRAPH = network()


def engine_of(threads: int) -> Engine:
    return Engine(build_image(GRAPH, choose_isa("host"), True), threads)


def example(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, 64)).astype(np.float32)


def check(engine: Engine, x: np.ndarray) -> None:
    for got, want in zip(engine(x), evaluate(GRAPH, [x]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_no_python_runs_per_operator(threads: int) -> None:
    engine, frames = engine_of(threads), []
    few, many = example(3), example(200)
    for x in (few, many, few):
        engine(x)

    def calls(x: np.ndarray) -> int:
        frames.clear()
        sys.setprofile(lambda frame, event, arg: frames.append(frame.f_code.co_name) if event == "call" else None)
        try:
            engine(x)
        finally:
            sys.setprofile(None)
        return len(frames)

    engine(many)
    n_many = calls(many)
    steps = sum(line.kind == "run" for line in engine.image.lines)
    assert steps >= 8
    assert n_many <= 8 + steps // 4, frames
    inside = frames.index("run") if "run" in frames else len(frames)
    assert not [name for name in frames[inside + 1 :] if name.startswith("_trampoline")]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_into_given_arrays_allocates_nothing_that_stays(threads: int) -> None:
    engine = engine_of(threads)
    x = example(500)
    outputs = engine.run({"x": x})
    gc.collect()
    for _ in range(200):  # which fills the interpreter's lists of free objects too
        engine.run({"x": x}, outputs=outputs)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1000):
            engine.run({"x": x}, outputs=outputs)
        kept, peak = (n - before for n in tracemalloc.get_traced_memory())
    finally:
        tracemalloc.stop()
    assert kept < 4096
    assert peak < 64 * 1024  # far below one activation of 128 KB


@linux
def test_memory_of_the_process_is_steady() -> None:
    engine = engine_of(2)
    xs = [example(n) for n in (1, 7, 300, 40)]

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for i in range(200):
        engine(xs[i % 4])
    before = resident()
    for i in range(1000):
        engine(xs[i % 4])
    assert resident() - before < 4 << 20


@pytest.mark.parametrize("threads", [1, 2])
def test_other_threads_run_meanwhile(threads: int) -> None:
    """The interpreter's lock is free during a run: a thread that wakes often moves on within one call of tens of ms."""
    engine, x = engine_of(threads), example(60_000)
    engine(x)
    stop, counted = threading.Event(), [0]

    def count() -> None:
        while not stop.wait(0.0002):
            counted[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    try:
        moved = []
        while len(moved) < 20 and max(moved, default=0) < 5:
            begin = counted[0]
            engine(x)
            moved.append(counted[0] - begin)
    finally:
        stop.set()
        counter.join()
    assert max(moved) >= 5


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_from_several_threads_with_different_shapes(threads: int) -> None:
    engine = engine_of(threads)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            rng = np.random.default_rng(seed)
            for _ in range(25):
                check(engine, example(int(rng.integers(0, 400))))
        except BaseException as e:
            failures.append(e)

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    assert not failures, failures[0]


@linux
def test_an_engine_that_is_dropped_gives_its_memory_back() -> None:
    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    x = example(20_000)  # arenas of 10 MB
    for _ in range(2):
        check(engine_of(1), x)
    before = resident()
    for _ in range(10):
        engine_of(1)(x)
    assert resident() - before < 16 << 20


def test_results_may_be_written_over_an_input() -> None:
    b = Builder()
    x = b.input("x", Type(DType.f32, (symbol("N"), 64)))
    halves = [b.slice(x, starts=(0, at), sizes=(symbol("N"), 32), steps=(1, 1)) for at in (32, 0)]
    y = b.concat(*halves, axis=1)
    graph = b.finish([y])
    engine = Engine(build_image(graph, choose_isa("host"), True), 1)
    a = example(9)
    want = evaluate(graph, [a])[0]
    (name,) = (s.name for s in engine.outputs)
    assert engine.run({"x": a}, outputs={name: a})[name] is a
    np.testing.assert_array_equal(a, want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_an_engine_goes_on_in_a_forked_child() -> None:
    engine, x = engine_of(2), example(3000)
    check(engine, x)
    pid = os.fork()
    if pid == 0:
        try:
            check(engine, x)
            check(engine, example(100))
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    check(engine, x)


def test_an_engine_does_not_race() -> None:
    with races.sharing_all():
        image = build_image(GRAPH, choose_isa("host"), True)
    for n in (1, 45, 300):
        races.check(image, {"x": example(n)})


@pytest.mark.parametrize("threads", [1, 2])
def test_a_missing_hand_over_is_found(threads: int) -> None:
    """The same engine with all steps beside each other."""
    with races.sharing_all():
        image = build_image(GRAPH, choose_isa("host"), True)
    lines = tuple(replace(line, beside=line.kind == "run") for line in image.lines)
    with pytest.raises(AssertionError, match="not that of one thread"):
        races.check(replace(image, lines=lines), {"x": example(300)}, threads=(threads,))
