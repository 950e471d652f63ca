"""Where the words of programs, contexts and rings of records are (see `vivace.targets.cpu.program`)."""

from __future__ import annotations

from enum import IntEnum


class Op(IntEnum):
    """Operation codes: the first word of each step."""

    SERIAL = 0
    PARALLEL = 1
    JUMP = 2
    UNLESS = 3
    SET = 4
    COUNT = 5
    LESS = 6
    CALL = 7
    END = 8


N_WORDS = {Op.SERIAL: 4, Op.JUMP: 2, Op.UNLESS: 4, Op.SET: 3, Op.COUNT: 2, Op.LESS: 4, Op.CALL: 4, Op.END: 1}
PARALLEL_HEAD_WORDS = 3
PART_WORDS = 5


class Status(IntEnum):
    """What a run returns."""

    OK = 0
    CALL_FAILED = 1
    NEEDS_WORKERS = 2  # the team has fewer threads than the context wants; nothing was run


class Header(IntEnum):
    """Words at the head of a context."""

    TEAM_CELL = 0  # address of the word that holds the team's address
    N_THREADS = 1
    PROGRAM = 2
    PATCHES = 3
    N_PATCHES = 4
    SCRATCH = 5
    SCRATCH_STRIDE = 6
    RING = 7  # 0: nothing is recorded
    STATUS = 8
    IO = 9  # address of a table of places, one per input and output
    FIELD = 10  # bytes from a place to the word that holds the address of the data
    SIZE = 16


class Ring(IntEnum):
    """Words at the head of a ring of records, and the words of a record."""

    CURSOR = 0
    CAPACITY = 1
    RECORDS = 8


class Record(IntEnum):
    """One chunk that one thread ran. Times are in cycles of `vivace_cycles`."""

    PART = 0  # the address of the words `fn, args, ...`
    THREAD = 1
    START = 2
    STOP = 3
    BEGIN = 4
    END = 5
    SIZE = 6
