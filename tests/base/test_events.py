"""Sinks hear what is emitted while they are registered."""

from __future__ import annotations

import logging

import pytest

from vivace.base import events
from vivace.base.events import Event, Notice

EVENT = Event(kernel="conv", start_ns=5, duration_ns=2, bytes=64, flops=128, thread=1)


def test_nobody_listens_at_first() -> None:
    assert not events.has_sinks()
    events.emit(EVENT)


def test_collecting_hears_only_inside_its_block() -> None:
    with events.collecting() as outer:
        events.emit(EVENT)
        with events.collecting() as inner:
            assert events.has_sinks()
            events.emit(EVENT)
    events.emit(EVENT)
    assert (outer, inner) == ([EVENT, EVENT], [EVENT])
    assert not events.has_sinks()


def test_a_sink_registered_twice_is_removed_once_each() -> None:
    records: list[events.Record] = []
    removes = [events.add_sink(records.append), events.add_sink(records.append)]
    removes[0]()
    removes[0]()
    events.emit(EVENT)
    removes[1]()
    events.emit(EVENT)
    assert records == [EVENT]


def test_a_notice_goes_to_the_log_too(caplog: pytest.LogCaptureFixture) -> None:
    with events.collecting() as records, caplog.at_level(logging.INFO, logger="vivace"):
        events.warn("cache", "no room")
        events.emit(Notice("info", "tune", "3 of 9"))
    assert records == [Notice("warning", "cache", "no room"), Notice("info", "tune", "3 of 9")]
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "cache: no room"),
        ("INFO", "tune: 3 of 9"),
    ]
