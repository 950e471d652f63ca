"""What a Python call of a small model takes beside its kernels."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.records import PROVIDERS

CLOCK_NS = 18  # a recorded kernel that does nothing lasts 20 ns, its call and return 2


def call_overhead(job: Any, arrays: Any) -> float:
    """Seconds of a Python call in which no kernel runs: the median, over many calls, of a call's time less the time
    that some thread spent in kernels, as a recorded call soon after it tells.

    Both calls are made in the same context, by which they use the same memory, and each follows some of its kind, so
    that it finds the caches as such calls leave them. The clock that is read around each kernel is no part of it.
    """
    from vivace.cli.contestants import open_engine

    engine: Any = open_engine(PROVIDERS[0], job)

    def timed() -> tuple[int, int]:
        for _ in range(6):
            start = time.perf_counter_ns()
            engine.run(arrays)
            stop = time.perf_counter_ns()
        return start, stop

    spare = []
    for _ in range(400):
        start, stop = timed()
        context, _ = engine._idle[-1]
        context.record(1 << 12)
        begin, _ = timed()
        chunks = [chunk for chunk in context.chunks() if chunk.start_ns >= begin]
        context.record(0)
        spans = [(chunk.start_ns, chunk.start_ns + max(0, chunk.duration_ns - CLOCK_NS)) for chunk in chunks]
        spare.append(stop - start - covered_ns(spans))
    return median(spare[50:]) / 1e9


def covered_ns(spans: Sequence[tuple[int, int]]) -> int:
    """How long at least one of these spans of time lasted."""
    total, reached = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, reached))
        reached = max(reached, stop)
    return total
