"""Where the time of a token goes: the steps of an engine of ours by kind, beside the bare loop.

A kind is a kernel and the bytes that one step of it touches. Kinds that take little are one, "other". What a call takes
beyond its steps is "between steps": Python, handing work over. Profiles, calls and the bare loop take turns; medians
count. With several threads a step takes as long as the thread that worked on it longest.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

TURNS = 15
LEAST_SHARE = 0.02  # of a kind that is shown
OTHER, BETWEEN = "other", "between steps"

Arrays = Mapping[str, np.ndarray]


def kinds_of_steps(
    engine: Any, next_call: Callable[[], tuple[Arrays, Arrays]], bare: Callable[[], float], bare_bytes: int
) -> list[dict[str, Any]]:
    """A record for each kind of step of a call: name, how many, milliseconds, bytes (of kinds that are shown), and the
    bytes per second of the bare loop."""
    first = next_call()
    taken: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    read: list[float] = []
    for _ in range(TURNS):
        by_step: dict[str, tuple[str, int, int]] = {}
        for event in engine.profile(*first):
            longest = max(event.duration_ns, by_step.get(event.kernel, ("", 0, 0))[1])
            by_step[event.kernel] = _kind(event.kernel, event.bytes), longest, event.bytes
        total: dict[str, float] = defaultdict(float)
        counts, sizes = defaultdict(int), defaultdict(int)
        for kind, ns, n_bytes in by_step.values():
            total[kind] += ns * 1e-6
            counts[kind] += 1
            sizes[kind] += n_bytes
        start = time.perf_counter()
        engine.run(*next_call())
        total[BETWEEN] = max(0.0, (time.perf_counter() - start) * 1e3 - sum(total.values()))
        for kind, ms in total.items():
            taken[kind].append(ms)
        read.append(bare())
    ms = {kind: statistics.median(times) for kind, times in taken.items()}
    whole, rate = sum(ms.values()), bare_bytes / statistics.median(read)
    shown = [kind for kind in sorted(ms, key=ms.__getitem__, reverse=True) if ms[kind] >= LEAST_SHARE * whole]
    rows = [
        {"step": k, "count": counts.get(k, 0), "ms": ms[k], "bytes": sizes.get(k, 0), "bare": rate}
        for k in shown
        if k != BETWEEN
    ]
    rest = [kind for kind in ms if kind not in shown and kind != BETWEEN]
    rows.append({"step": OTHER, "count": sum(counts[k] for k in rest), "ms": sum(ms[k] for k in rest), "bytes": 0})
    return [*rows, {"step": BETWEEN, "count": 0, "ms": ms[BETWEEN], "bytes": 0}]


def _kind(kernel: str, n_bytes: int) -> str:
    return f"{kernel.split(':', 1)[1]} {n_bytes / 1e6:.2g} MB"


def table(rows: list[dict[str, Any]], phases: Mapping[str, int]) -> list[str]:
    """The records of all rows that have some, as lines of a table for people."""
    heads = [
        "weights",
        "threads",
        "engine",
        "context",
        "step",
        "number",
        "ms",
        "of the time",
        "MB",
        "GB/s",
        "of bare loop",
    ]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for r in rows:
        for phase, context in phases.items():
            found = r.get(phase, {}).get("steps", [])
            whole = sum(s["ms"] for s in found)
            for s in found:
                rate = s["bytes"] / s["ms"] * 1e3 if s["bytes"] else 0.0
                cells = [r["format"], str(r["threads"]), r["engine"], str(context), s["step"], str(s["count"] or "")]
                cells += [f"{s['ms']:.2f}", f"{s['ms'] / whole:.0%}"]
                cells += (
                    [f"{s['bytes'] / 1e6:.1f}", f"{rate / 1e9:.1f}", f"{rate / s['bare']:.0%}"] if rate else [""] * 3
                )
                lines.append(f"| {' | '.join(cells)} |")
    return lines
