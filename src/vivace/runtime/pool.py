"""The threads of the process: one team that all engines share.

Workers are plain native threads: they hold no Python state, never take the GIL, and sleep in the kernel when there is
nothing to do. They are made when a run first wants them and stay for the life of the process; they end with it.

Rules:
* GROW: the team has as many workers as the largest run ever wanted, less the caller, who works too.
* INHERIT: a worker has the affinity of the thread that first needed it, and takes no signals.
* FORK: a child of `fork` has no workers. It gets a fresh team, and makes workers when it first needs them.
* FOREVER: team memory and machine code are never freed, because a thread may be just leaving them.

Not handled: shrinking; NUMA; a change of the process's affinity after the workers were made (`taskset -p` does not
reach them, `taskset -a -p` does).
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import cast

from vivace.base.cache import default_cache
from vivace.base.errors import InternalError
from vivace.base.events import warn
from vivace.base.knobs import knobs
from vivace.base.machine import isa
from vivace.runtime.buffer import Buffer
from vivace.targets.cpu import jit
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.elf import Library
from vivace.targets.cpu.methods import PYTHON_CALLS
from vivace.targets.cpu.program import program_text
from vivace.targets.cpu.team import MAX_THREADS, Seat, Team
from vivace.targets.cpu.waiting import SPIN_NS, TURN_NS

# Linux's system calls by machine: futex, sched_getaffinity, sched_setaffinity, gettid, sched_yield.
_CALL_NUMBERS = {"x86_64": (202, 204, 203, 186, 24), "aarch64": (98, 123, 122, 178, 124)}


class Native:
    """The compiled program interpreter."""

    def __init__(self, is_shuffled: bool) -> None:
        library = jit.load([_program_object(is_shuffled)])
        _immortal(library)
        self.worker_address = library.address("vivace_worker")
        self.slices_address = library.address("vivace_slices")
        calls = (ctypes.c_int64 * len(PYTHON_CALLS))(*(_symbol(ctypes.pythonapi, name) for name in PYTHON_CALLS))
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(library.address("vivace_bind"))(ctypes.addressof(calls))
        self._run = _method(library, b"enter", b"One inference.")
        self._match = _method(library, b"match", b"Compares arrays.")
        self._evaluate = _method(library, b"evaluate", b"Evaluates formulas.")
        self._fill = _method(library, b"fill", b"Writes what formulas gave into a program.")
        self.cycles = ctypes.CFUNCTYPE(ctypes.c_int64)(library.address("vivace_cycles"))

    def entry(self, context: int) -> Callable[..., int]:
        """The function that runs the program of the context at this address (rule ENTRY of `methods`)."""
        return cast("Callable[..., int]", _new_function(ctypes.byref(self._run), context, None))

    def matching(self, frame: int) -> Callable[..., int]:
        """The function that compares arrays with the entries of the frame at this address (rule MATCH of `methods`)."""
        return cast("Callable[..., int]", _new_function(ctypes.byref(self._match), frame, None))

    def evaluation(self, frame: int) -> Callable[[], int]:
        """The function that evaluates the formulas of the frame at this address (rule FRAME of `methods`)."""
        return cast("Callable[[], int]", _new_function(ctypes.byref(self._evaluate), frame, None))

    def filling(self, frame: int) -> Callable[[], int]:
        """The function that fills the program of that frame."""
        return cast("Callable[[], int]", _new_function(ctypes.byref(self._fill), frame, None))


class _MethodDef(ctypes.Structure):
    """PyMethodDef of CPython's methodobject.h."""

    _fields_ = (
        ("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p)
    )  # fmt: skip


def _method(library: Library, name: bytes, doc: bytes) -> _MethodDef:
    return _MethodDef(name, library.address(f"vivace_{name.decode()}"), _METH_FASTCALL, doc)


_METH_FASTCALL = 0x0080
_new_function = ctypes.pythonapi.PyCFunction_NewEx
_new_function.restype = ctypes.py_object
_new_function.argtypes = (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)


class Pool:
    """The team's memory, its workers, and the clock that its times are in."""

    def __init__(self, is_shuffled: bool = False) -> None:
        self.native = Native(is_shuffled)
        self._libc = ctypes.CDLL(None)
        self._origin = self._sample()
        self._cell = Buffer(8)
        _immortal(self._cell)
        self._lock = threading.Lock()
        self._start_team()

    @property
    def cell_address(self) -> int:
        """Where native code finds the address of the current team."""
        return self._cell.address

    @property
    def n_workers(self) -> int:
        return int(self._team.view("int64", (Team.SIZE // 8,))[Team.N_WORKERS // 8])

    def ensure(self, n_threads: int) -> int:
        """Makes workers until a run of `n_threads` has them, and returns how many threads a run can have."""
        wanted = min(n_threads, MAX_THREADS) - 1
        with self._lock:
            words = self._team.view("int64", (Team.SIZE // 8,))
            while self.n_workers < wanted:
                if not self._start_worker(self.n_workers + 1):
                    warn("threads", f"the system allows only {self.n_workers} worker threads; {wanted} were wanted")
                    break
                words[Team.N_WORKERS // 8] += 1
            return min(n_threads, self.n_workers + 1)

    def clock(self) -> Callable[[int], int]:
        """The function from times of `vivace_cycles` to the clock of `time.perf_counter_ns`."""
        c0, t0 = self._origin
        c1, t1 = self._sample()
        ns_per_cycle = (t1 - t0) / max(1, c1 - c0)
        return lambda cycles: t0 + round((cycles - c0) * ns_per_cycle)

    def restart_in_child(self) -> None:
        """Rule FORK."""
        self._lock = threading.Lock()
        self._start_team()

    def _start_team(self) -> None:
        self._team = Buffer(Team.SIZE)
        _immortal(self._team)
        words = self._team.view("int64", (Team.SIZE // 8,))
        numbers = _CALL_NUMBERS.get(platform.machine()) if sys.platform == "linux" else None
        if numbers:
            words[Team.SYSCALL // 8] = _symbol(self._libc, "syscall")
            words[Team.GETCPU // 8] = _symbol(self._libc, "sched_getcpu")
            places = (Team.FUTEX, Team.GET_AFFINITY, Team.SET_AFFINITY, Team.GET_TID, Team.YIELD)
            words[[place // 8 for place in places]] = numbers
        words[[(Team.SEATS + Seat.SIZE * i + Seat.CPU) // 8 for i in range(MAX_THREADS)]] = -1
        words[Team.USLEEP // 8] = _symbol(self._libc, "usleep")
        words[Team.SPIN_CYCLES // 8] = self._cycles(SPIN_NS)
        words[Team.TURN_CYCLES // 8] = self._cycles(TURN_NS)
        self._cell.view("int64", (1,))[0] = self._team.address

    def _start_worker(self, number: int) -> bool:
        slot = Buffer(16)
        _immortal(slot)
        slot.view("int64", (2,))[:] = self._team.address, number
        thread = ctypes.c_ulong()
        # A new thread inherits the mask: signals stay with the threads that Python knows (rule INHERIT).
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            failed = self._libc.pthread_create(
                ctypes.byref(thread), None, ctypes.c_void_p(self.native.worker_address), ctypes.c_void_p(slot.address)
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if failed:
            return False
        self._libc.pthread_detach(thread)
        if hasattr(self._libc, "pthread_setname_np"):
            self._libc.pthread_setname_np(thread, f"vivace-{number}".encode())
        return True

    def _sample(self) -> tuple[int, int]:
        return self.native.cycles(), time.perf_counter_ns()

    def _cycles(self, ns: int) -> int:
        c0, t0 = self._origin
        c1, t1 = self._sample()
        while t1 - t0 < 200_000:  # long enough for 1 % with a clock call of 0.1 us on either side
            c1, t1 = self._sample()
        return max(1, (c1 - c0) * ns // (t1 - t0))


def _program_object(is_shuffled: bool) -> bytes:
    """The interpreter's machine code; any x86-64 CPU runs it.

    Cost: 65 ms the first time, 2 ms from the cache.
    """
    code, plainest = KernelCode("vivace_enter", program_text(is_shuffled), (), ()), isa("sse")
    key = jit.object_key(code, plainest)
    cache = default_cache()
    found = cache.get("code", key)
    if found is None:
        (found,) = jit.compile_objects([code], plainest)
        cache.put("code", key, found)
    return found


_kept_for_ever: list[object] = []


def _immortal(thing: object) -> None:
    """Keeps an object until the process is gone, also through the shutdown of the interpreter (rule FOREVER)."""
    _kept_for_ever.append(thing)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _symbol(library: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    if address is None:
        raise InternalError(f"the C library has no {name}")
    return address


_one_at_a_time = threading.Lock()


def pool() -> Pool:
    """The pool of this process; with the knob `shuffle` one of its own, which looks for races."""
    with _one_at_a_time:  # two threads that ask first would make two teams, which fight for the cores
        return _pool(knobs.shuffle)


@cache
def _pool(is_shuffled: bool) -> Pool:
    made = Pool(is_shuffled)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=made.restart_in_child)
    return made
