"""Graphs in which the pattern of a rule stands, and which it must leave alone: what `test_refusals*.py` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vivace.graph.graph import Value
from vivace.graph.rewrite import Example, Log, rewrite
from vivace.optimize.pipeline import PIPELINE

F32 = np.float32
RULES = {r.name: r for p in PIPELINE for r in p.rules}
USED = "is used elsewhere too"
WINDOW: dict[str, Any] = {"strides": (1, 1), "dilations": (1, 1), "layout": "NCHW"}
NONE: dict[str, Any] = {**WINDOW, "before": (0, 0), "after": (0, 0)}
Case = tuple[str, str | None, Callable[[Example], Any]]
"""A rule, a part of the reason that it gives (None where it has nothing to say), and the graph."""


def names(cases: list[Case]) -> list[str]:
    return [f"{name}-{i}" for i, (name, _, _) in enumerate(cases)]


def leaves_alone(name: str, reason: str | None, make: Callable[[Example], Any]) -> None:
    """The rule does not fire, and says why."""
    graph = Example().graph(make)
    log = Log(explain=(name,))
    assert rewrite(graph, [RULES[name]], log) is graph, log.notes
    assert any(reason in note for note in log.notes) if reason else not log.notes, log.notes


def full(e: Example, value: float, *shape: int) -> Value:
    return e.const(np.full(shape, value, F32))


def conv(e: Example, x: Value | None = None, w: Value | None = None, pad: int = 0) -> Value:
    x = e.x("f32[1,4,5,5]") if x is None else x
    pads = {"before": (pad, pad), "after": (pad, pad)}
    return e.conv(x, e.w("f32[6,4,3,3]") if w is None else w, group=1, **WINDOW, **pads)
