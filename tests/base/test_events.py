"""Sinks hear what is emitted while they are registered."""

from __future__ import annotations

import logging

import pytest

from vivace.base import events
from vivace.base.events import Notice

NOTICE = Notice("warning", "cache", "no room")


def test_collecting_hears_only_inside_its_block() -> None:
    with events.collecting() as outer:
        events.emit(NOTICE)
        with events.collecting() as inner:
            events.emit(NOTICE)
    events.emit(NOTICE)
    assert (outer, inner) == ([NOTICE, NOTICE], [NOTICE])


def test_a_sink_registered_twice_is_removed_once_each() -> None:
    records: list[Notice] = []
    removes = [events.add_sink(records.append), events.add_sink(records.append)]
    removes[0]()
    removes[0]()
    events.emit(NOTICE)
    removes[1]()
    events.emit(NOTICE)
    assert records == [NOTICE]


def test_a_notice_goes_to_the_log_too(caplog: pytest.LogCaptureFixture) -> None:
    with events.collecting() as records, caplog.at_level(logging.INFO, logger="vivace"):
        events.warn("cache", "no room")
        events.emit(Notice("info", "tune", "3 of 9"))
    assert records == [Notice("warning", "cache", "no room"), Notice("info", "tune", "3 of 9")]
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "cache: no room"),
        ("INFO", "tune: 3 of 9"),
    ]
