"""What happened: times of kernels, and notices for people, sent to whoever listens.

`engine.profile` returns Events. Who emits a Notice never knows who listens: a sink may be registered, and every notice
goes to the standard `logging` logger "vivace".

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


Sink = Callable[[Notice], None]

_sinks: tuple[Sink, ...] = ()  # replaced as a whole under the lock, so that emitting needs none
_lock = threading.Lock()


def emit(notice: Notice) -> None:
    """Hands a notice to every sink and to the log."""
    for sink in _sinks:
        sink(notice)
    logger.log(logging.WARNING if notice.level == "warning" else logging.INFO, "%s: %s", notice.source, notice.text)


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
def collecting() -> Iterator[list[Notice]]:
    """The notices that are emitted inside the `with` block, by any thread."""
    notices: list[Notice] = []
    remove = add_sink(notices.append)
    try:
        yield notices
    finally:
        remove()
