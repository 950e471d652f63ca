"""The peak of one kind of arithmetic, a loop of nothing but products in registers, taken in turns with what is held
against it, so that both meet the same phases of the machine.

    peak = Peak("bf16", threads=2)
    peak.time_ns()                          # of `peak.n_operations` operations
    beside_engines(long_peak("f32", 1), answer)     # a contestant of `vivace.measure.bench`
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vivace.lower.pack import aligned_zeros
from vivace.measure.bench import Contestant
from vivace.targets.cpu.amx import host_isa
from vivace.targets.cpu.peaks import n_operations, peak_kernels

_REPEATS = 200  # about 60 us
_LONG_NS = 5e6  # to wake a thread takes some 20 us


class Peak:
    """`repeats` turns of the loop in each thread; of f32 where the CPU has no such products."""

    def __init__(self, dtype: str, threads: int = 1, repeats: int = _REPEATS) -> None:
        wanted = "i8" if dtype == "int8" else dtype
        kinds = {kind.dtype: (kind, call) for kind, call in peak_kernels(host_isa()).arithmetic}
        kind, self._call = kinds.get(wanted, kinds["f32"])
        self._buffers = [aligned_zeros((4096,)) for _ in range(threads)]
        self._repeats, self.n_operations = repeats, threads * n_operations(kind, repeats)
        self._others = ThreadPoolExecutor(threads - 1) if threads > 1 else None

    def run(self) -> None:
        """Returns when every thread is done."""
        first, *more = self._buffers
        waiting = [self._others.submit(self._turn, b) for b in more] if self._others else []
        self._turn(first)
        for other in waiting:
            other.result()

    def time_ns(self) -> float:
        start = time.perf_counter_ns()
        self.run()
        return time.perf_counter_ns() - start

    def __call__(self) -> float:
        """Operations a ns; the first turns of the matrix unit after other work are slower."""
        self.time_ns()
        return self.n_operations / self.time_ns()

    def _turn(self, buffer: np.ndarray) -> None:
        self._call(buffer.ctypes.data, self._repeats, 0)


def long_peak(dtype: str, threads: int) -> Peak:
    """Turns that take some milliseconds."""
    short = Peak(dtype)
    return Peak(dtype, threads, round(_REPEATS * _LONG_NS / min(short.time_ns() for _ in range(5))))


def beside_engines(peak: Peak, answer: Mapping[str, np.ndarray]) -> Contestant:
    """The loop as a contestant, which has to give an answer."""

    def run(_: object) -> Mapping[str, np.ndarray]:
        peak.run()
        return answer

    return Contestant("peak", "", lambda: run)
