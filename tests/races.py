"""Looking for races: engines run with their work in a changing order and with delays (`knobs.shuffle`), on more threads
than the machine has cores, and must give one thread's results bit by bit.

Kernels keep that promise because a unit's arithmetic never depends on who runs it or on what runs with it: the sums of
one result are all taken inside one unit. No kernel of ours adds up what different units computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest import mock

import numpy as np

from vivace.base.knobs import knobs
from vivace.lower import schedule
from vivace.lower.image import Image
from vivace.runtime import sharing
from vivace.runtime.engine import Engine, MakeForeign

THREADS = (1, 2, 3, 4, 5)


@contextmanager
def sharing_all() -> Iterator[None]:
    """Programs that are linked, and runs that are bound, in here share out even what is too small to pay for it."""
    with (
        mock.patch.object(schedule, "SERIAL_NS", 0),
        mock.patch.multiple(sharing, WAKE_NS=0, MEETING_NS=0),
    ):
        yield


def check(
    image: Image,
    feeds: Mapping[str, np.ndarray],
    threads: Sequence[int] = THREADS,
    repeats: int = 3,
    make_foreign: MakeForeign | None = None,
) -> None:
    """Run an image, linked in `sharing_all`, at all thread counts; memory that a run should not read holds garbage."""
    want = Engine(image, 1, (), make_foreign).run(feeds)
    for n in threads:
        engine = Engine(image, n, (), make_foreign)
        for i in range(repeats):
            with knobs.scope(shuffle=True), sharing_all():
                got = engine.run(feeds)
            for name, array in want.items():
                where = f"output {name} in run {i} on {n} threads"
                assert got[name].tobytes() == array.tobytes(), f"{where} is not that of one thread"
            spoil(engine)


def spoil(engine: Engine) -> None:
    """Fill the memory between runs with bytes that are NaN as floats and large as integers."""
    for first, last in engine._idle:
        for context in last.crew.contexts if last.crew else (first,):
            context.arena.bytes[:] = 0x7F
            context._scratch.bytes[:] = 0x7F
