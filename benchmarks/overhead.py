"""What a Python call of a small model takes beside its kernels."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.records import PROVIDERS

from vivace.base.machine import isa
from vivace.runtime.engine import Engine
from vivace.targets.cpu import jit

_SECONDS, _WARM = 2.0, 50
_NOTHING = "nothing"  # the kernel that returns at once


def call_overhead(job: Any, arrays: Any) -> float:
    """Seconds of a Python call in which no kernel runs: the median time of an engine whose kernels do nothing, each
    call after one of the engine as it is, so that it finds the caches as that leaves them.

    Unlike the difference between a call and its kernels, it does not hang on how fast kernels are at a moment. Left out
    is that they push what the interpreter of the program reads out of the first-level cache between two steps.
    """
    from vivace.cli.contestants import open_engine

    engine: Any = open_engine(PROVIDERS[0], job)
    emptied = without_kernels(engine)
    times: list[int] = []
    until = time.perf_counter() + _SECONDS
    while len(times) < 2 * _WARM or time.perf_counter() < until:
        engine.run(arrays)
        start = time.perf_counter_ns()
        emptied.run(arrays)
        times.append(time.perf_counter_ns() - start)
    return median(times[_WARM:]) / 1e9


def without_kernels(engine: Engine) -> Engine:
    """The same engine with kernels that return at once, but for those that tell which branch runs and how often."""
    image = engine.image
    told = {s for line in image.lines if line.kind in ("unless", "less") for s, _ in line.operands}
    kept = {line.kernel for line in image.lines if line.kind == "run" and told & {s for s, _ in line.operands}}
    nothing = f"define void @{_NOTHING}(ptr %args, i64 %begin, i64 %end, ptr %scratch) {{\n  ret void\n}}"
    kernels = tuple(k if i in kept else replace(k, symbol=_NOTHING) for i, k in enumerate(image.kernels))
    objects = (*image.objects, jit.compile_text(nothing, isa(image.isa)))
    return Engine(replace(image, kernels=kernels, objects=objects), engine.threads, engine.placement)
