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
    """The same engine with kernels that return at once."""
    text = "\n".join(
        f"define void @{name}(ptr %args, i64 %begin, i64 %end, ptr %scratch) {{\n  ret void\n}}"
        for name in sorted({kernel.symbol for kernel in engine.image.kernels})
    )
    image = replace(engine.image, objects=(jit.compile_text(text, isa(engine.image.isa)),))
    return Engine(image, engine.threads, engine.placement)
