"""What happened: events of kernels and notices for people, sent to whoever listens.

The runtime emits and never knows who listens; a profiler, the progress of a compile and the tests register a sink.
Without a sink, events cost one test of a tuple and notices go to the standard `logging` logger "vivace".

Not handled: buffering and clocks across processes. A sink is called in the emitting thread and must be quick.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

logger = logging.getLogger("vivace")


@dataclass(frozen=True, slots=True)
class Event:
    """One kernel ran once, on one thread.

    Units: `start_ns` is on the clock of `time.perf_counter_ns`; `bytes` and `flops` are the counted work, not measured.
    """

    kernel: str
    start_ns: int
    duration_ns: int
    bytes: int
    flops: int
    thread: int


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a person may want to know and that stops nothing."""

    level: Literal["info", "warning"]
    source: str
    text: str


Record = Event | Notice
Sink = Callable[[Record], None]

_sinks: tuple[Sink, ...] = ()  # replaced as a whole under the lock, so that emitting needs none
_lock = threading.Lock()


def has_sinks() -> bool:
    """Whether anyone listens; the runtime records kernel times only then."""
    return bool(_sinks)


def emit(record: Record) -> None:
    """Hands a record to every sink; a notice goes to the log too."""
    for sink in _sinks:
        sink(record)
    if isinstance(record, Notice):
        level = logging.WARNING if record.level == "warning" else logging.INFO
        logger.log(level, "%s: %s", record.source, record.text)


def warn(source: str, text: str) -> None:
    """Emits a notice of level warning."""
    emit(Notice("warning", source, text))


def add_sink(sink: Sink) -> Callable[[], None]:
    """Registers a sink and returns the function that removes it (calling that twice is harmless)."""
    global _sinks
    with _lock:
        _sinks = (*_sinks, sink)
    is_present = True

    def remove() -> None:
        nonlocal is_present
        global _sinks
        with _lock:
            if is_present:
                position = next(i for i, registered in enumerate(_sinks) if registered is sink)
                _sinks = _sinks[:position] + _sinks[position + 1 :]
                is_present = False

    return remove


@contextmanager
def collecting() -> Iterator[list[Record]]:
    """The records that are emitted inside the `with` block, by any thread."""
    records: list[Record] = []
    remove = add_sink(records.append)
    try:
        yield records
    finally:
        remove()
