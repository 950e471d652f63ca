"""The memory that the threads of a process share.

There is one team per process: memory that is never freed (`Team`), with a seat for each thread (`Seat`). Seat 0
belongs to the thread that called `run`, the others to worker threads.

Not handled: more than 64 threads (one bit each in the parked mask).
"""

from __future__ import annotations

from enum import IntEnum

MAX_THREADS = 64


class Team(IntEnum):
    """Byte offsets in the team's memory. Words that different threads write at the same time are on different cache
    lines.
    """

    CLAIM = 0
    # The published step; written by the leader while nothing can be claimed.
    MEMBERS = 64  # bit i: thread i may claim
    TOTAL = 72
    PARTS = 80
    N_PARTS = 88
    CONTEXT = 96
    DIVISOR = 104
    AT = 112  # where the program goes on
    N_THREADS = 120
    PENDING = 128  # grains not yet done
    PARKED = 192  # bit i: thread i sleeps, or is about to
    OWNER = 256
    SOLO = 320  # runs that found the team busy and go on alone
    # Set once, read often.
    N_WORKERS = 384
    SPIN_CYCLES = 392
    SYSCALL = 400  # libc's syscall, or 0 where there is no futex
    FUTEX = 408  # its number
    USLEEP = 416
    GETCPU = 424  # libc's sched_getcpu
    GET_AFFINITY = 432  # syscall numbers
    SET_AFFINITY = 440
    GET_TID = 448
    YIELD = 456  # sched_yield's number
    TURN_CYCLES = 464
    SEATS = 512  # one per thread
    SIZE = 512 + 256 * MAX_THREADS


class Seat(IntEnum):
    """Byte offsets in the memory of one thread of the team."""

    GATE = 0  # 1 while it sleeps
    TID = 8
    CPU = 16  # where it was last seen, -1 while it sleeps
    STEERED = 24  # length of the affinity mask that it must restore, 0, or -1 while another thread narrows it
    SINCE = 32  # cycles when it last gave way or woke (rule WAY)
    SAVED = 64  # that mask
    SIZE = 256


def held(name: str, at: Team, type: str = "i64") -> str:
    """LLVM text that loads what the team holds since it was made, as `%name`."""
    return f"""\
  %{name}.p = getelementptr i8, ptr %team, i64 {at}
  %{name} = load {type}, ptr %{name}.p"""
