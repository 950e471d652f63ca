"""The measured limits of this machine: arithmetic per element type, bandwidth per cache level and of memory.

    peaks = machine_peaks()
    peaks.operations("f32", threads=1)       # operations per second
    peaks.read_bandwidth("L2", threads=1)    # bytes per second

Rules:
* BEST: a disturbance only ever slows a kernel, so a peak is the best of several short runs spread over the measurement.
* OWN: each thread works on its own buffer; the shared last level is divided among the threads.
* NEAREST: a large shared cache may be sliced among strangers, and reads of much of it come from memory: it is measured
  by a few times what the second level holds (Sapphire Rapids, 300 MiB said: 25 GB/s up to 48 MiB, 15 from 75 MiB on).
* CACHED: peaks are kept on disk by machine and thread counts, because measuring them takes seconds.

Not handled: NUMA (buffers lie where the first touch puts them), clocks that drop after minutes of load.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vivace.base.cache import Cache, default_cache
from vivace.base.errors import InputError
from vivace.base.events import warn
from vivace.base.machine import Isa, Machine, host
from vivace.targets.cpu.amx import host_isa
from vivace.targets.cpu.peaks import Native, n_operations, peak_kernels

_FORMAT = 5
_BLOCK_BYTES = 1 << 12  # sizes are whole pages
_N_RUNS = 16
_N_MORE_RUNS = 48  # where the machine is not quiet, as many as begin within
_MORE_SECONDS = 8.0  # which a whole measurement takes where it is quiet: somebody waits for a compile or a bench
_RUN_SECONDS = 0.003  # longer than a thread takes to start, shorter than a time slice
_MEMORY_BYTES = 256 << 20

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Peak:
    """One limit. `what` is `arithmetic`, `read` or `copy`; `of` an element type or a level; `rate` per second."""

    what: str
    of: str
    threads: int
    rate: float


@dataclass(frozen=True, slots=True)
class Peaks:
    """All limits of a machine."""

    fingerprint: str
    isa: str
    levels: tuple[tuple[str, int], ...]  # cache levels by name, with the bytes of one instance, then ("memory", 0)
    peaks: tuple[Peak, ...]
    is_disturbed: bool = False

    def operations(self, dtype: str, threads: int) -> float:
        """Arithmetic operations per second; a multiply-add counts as two."""
        return self._rate("arithmetic", dtype, threads)

    def read_bandwidth(self, level: str, threads: int) -> float:
        """Bytes read per second from a cache level, or from `memory`, by all threads together."""
        return self._rate("read", level, threads)

    def read_seconds(self, n_bytes: float, threads: int) -> float:
        """The least time to read so many bytes once: from each level as many as it holds, from the nearest on. Private
        caches of several threads add up.
        """
        seconds, left = 0.0, n_bytes
        for name, size_bytes in self.levels:
            held = size_bytes * (threads if name in ("L1", "L2") else 1)
            here = left if name == "memory" else min(left, held)
            if here:
                seconds += here / self.read_bandwidth(name, threads)
            left -= here
        return seconds

    def _rate(self, what: str, of: str, threads: int) -> float:
        found = {p.threads: p.rate for p in self.peaks if (p.what, p.of) == (what, of)}
        if not found:
            raise InputError(f"no measured peak for {what} {of}", expected="a type and a level that this machine has")
        best = max(
            found.values()
        )  # more threads than cores add nothing, and a disturbed measurement takes nothing away
        least = min(found)
        return found[threads] if found.get(threads) == best else min(found[least] * threads / least, best)

    def to_json(self) -> str:
        rows = [[p.what, p.of, p.threads, p.rate] for p in self.peaks]
        return json.dumps({"format": _FORMAT, "fingerprint": self.fingerprint, "isa": self.isa,
                           "levels": self.levels, "peaks": rows})  # fmt: skip

    @staticmethod
    def from_json(text: str) -> Peaks:
        data = json.loads(text)
        return Peaks(
            data["fingerprint"],
            data["isa"],
            tuple((str(name), int(size)) for name, size in data["levels"]),
            tuple(Peak(str(w), str(o), int(n), float(r)) for w, o, n, r in data["peaks"]),
        )


def machine_peaks(
    threads: int | None = None, *, renew: bool = False, store: Cache | None = None, progress: Progress | None = None
) -> Peaks:
    """The peaks for one thread and for `threads` (by default all usable cores), measured once (CACHED)."""
    machine, store = host(), store or default_cache()
    n_threads = threads or machine.n_compute_threads
    isa = host_isa()
    key = f"{_FORMAT} {machine.fingerprint()} {isa.name} {n_threads}"
    cached = None if renew else store.get("peaks", key)
    if cached is not None:
        return Peaks.from_json(cached.decode())
    peaks = measure_peaks(machine, isa, n_threads, progress)
    if peaks.is_disturbed:
        warn(
            "peaks", f"other processes kept the cores busy: the peaks at {n_threads} threads are too low, and not kept"
        )
    else:
        store.put("peaks", key, peaks.to_json().encode())
    return peaks


def measure_peaks(machine: Machine, isa: Isa, n_threads: int, progress: Progress | None = None) -> Peaks:
    """Measures every kernel at one and at `n_threads` threads. Takes some seconds."""
    kernels = peak_kernels(isa)
    levels = _levels(machine)
    tasks: list[_Task] = []
    for n in sorted({1, n_threads}):
        for kind, call in kernels.arithmetic:
            tasks.append(_Task("arithmetic", kind.dtype, n, call, _BLOCK_BYTES, n_operations(kind, 1)))
        for name, size_bytes in levels:
            bytes_each = _working_bytes(machine, name, size_bytes, n)
            tasks.append(_Task("read", name, n, kernels.read, bytes_each, bytes_each))
            tasks.append(_Task("copy", name, n, kernels.copy, bytes_each, bytes_each))
    buffers = _Buffers()
    repeats = [_repeats(task, buffers) for task in tasks]
    best = [0.0] * len(tasks)
    started = time.perf_counter()
    for sweep in range(_N_RUNS + _N_MORE_RUNS):  # BEST: all in turn, so that a burst of noise hits none in every run
        is_late = time.perf_counter() - started > _MORE_SECONDS
        if sweep >= _N_RUNS and (is_late or not any(_is_disturbed(tasks, best))):
            break
        if progress:
            progress("measuring peaks", sweep, _N_RUNS + _N_MORE_RUNS)
        for i, task in enumerate(tasks):
            seconds = _elapsed(task, task.threads, repeats[i], buffers)
            best[i] = max(best[i], task.threads * task.work * repeats[i] / seconds)
    found = tuple(Peak(task.what, task.of, task.threads, rate) for task, rate in zip(tasks, best))
    return Peaks(machine.fingerprint(), isa.name, levels, found, is_disturbed=any(_is_disturbed(tasks, best)))


def _is_disturbed(tasks: Sequence[_Task], best: Sequence[float]) -> Iterator[bool]:
    """Arithmetic units are private to a core: several cores do as many times what one does. Less tells that others used
    the cores then, more that they used the one core when it was measured alone.
    """
    single = {task.of: rate for task, rate in zip(tasks, best) if task.what == "arithmetic" and task.threads == 1}
    for task, rate in zip(tasks, best):
        if task.what == "arithmetic" and task.threads > 1:
            alone = task.threads * single[task.of]
            yield not 0.9 * alone <= rate <= 1.1 * alone


@dataclass(frozen=True, slots=True)
class _Task:
    """A kernel on a buffer of `n_bytes` in each thread; `work` is what one repeat does, in operations or bytes."""

    what: str
    of: str
    threads: int
    call: Native
    n_bytes: int
    work: int


def _levels(machine: Machine) -> tuple[tuple[str, int], ...]:
    sizes = [(f"L{n}", machine.cache_bytes(n)) for n in (1, 2, 3) if machine.data_cache(n) or n < 3]
    return (*sizes, ("memory", 0))


def _working_bytes(machine: Machine, name: str, size_bytes: int, n_threads: int) -> int:
    """Bytes per thread that lie in one level and not in the one above, with room for what else lies there."""
    if name == "memory":
        wanted = max(_MEMORY_BYTES, 4 * machine.cache_bytes(3))
        wanted = min(wanted, machine.usable_memory_bytes // 8) // n_threads
    elif name == "L3":
        wanted = min(4 * machine.cache_bytes(2), size_bytes // 2 // n_threads)  # NEAREST
    else:
        wanted = size_bytes // 2
    return max(_BLOCK_BYTES, wanted // _BLOCK_BYTES * _BLOCK_BYTES)


def _repeats(task: _Task, buffers: _Buffers) -> int:
    """How often to repeat the task so that a run takes `_RUN_SECONDS`."""
    n = 1
    while n < 1 << 40:
        seconds = _elapsed(task, 1, n, buffers)
        if seconds * 4 > _RUN_SECONDS:
            return max(1, round(n * _RUN_SECONDS / seconds))
        n *= 4
    return n


class _Buffers:
    """Page-aligned buffers, touched once, one for each thread and size."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], np.ndarray] = {}

    def address(self, thread: int, n_bytes: int) -> int:
        array = self._kept.get((thread, n_bytes))
        if array is None:
            array = self._kept[thread, n_bytes] = np.zeros(n_bytes + _BLOCK_BYTES, np.uint8)
            array[::64] = 0
        return -(-array.ctypes.data // _BLOCK_BYTES) * _BLOCK_BYTES


def _elapsed(task: _Task, n_threads: int, repeats: int, buffers: _Buffers) -> float:
    """Seconds from the first start to the last end of threads that begin together, after one run to warm up."""
    addresses = [buffers.address(i, task.n_bytes) for i in range(n_threads)]
    gate = threading.Barrier(n_threads)
    spans: list[tuple[float, float]] = [(0.0, 0.0)] * n_threads

    def work(i: int) -> None:
        task.call(addresses[i], 1, task.n_bytes)
        gate.wait()
        start = time.perf_counter()
        task.call(addresses[i], repeats, task.n_bytes)
        spans[i] = (start, time.perf_counter())

    workers = [threading.Thread(target=work, args=(i,)) for i in range(1, n_threads)]
    for worker in workers:
        worker.start()
    work(0)
    for worker in workers:
        worker.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)
