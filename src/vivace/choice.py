"""`providers="auto"`: every installed provider runs the model, interleaved on the same inputs, and the fastest is kept.

Not handled: choosing per subgraph; a model goes to one provider as a whole (besides nodes that we have no kernel for).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from vivace.base.errors import VivaceError
from vivace.measure.inputs import choose_shapes, generate
from vivace.providers.provider import KNOWN, LoadOptions, availability
from vivace.runtime.hosted import HostedEngine

if TYPE_CHECKING:
    from vivace.runtime.engine import Engine

N_ROUNDS, BUDGET_SECONDS = 15, 3.0
MARGIN = 0.97  # another provider must win by more than the noise of a median of 15


def fastest(
    native: Callable[[], Engine], source: object, shapes: Mapping[str, Sequence[int]] | None, threads: int
) -> Engine | HostedEngine:
    """Our engine, unless an installed provider measures faster on this machine. The times are in `stats["auto_ms"]`.

    Providers read paths and bytes; for other sources our engine is returned unmeasured.
    """
    ours = native()
    if not isinstance(source, (str, bytes)) and not hasattr(source, "__fspath__"):
        return ours
    fixed = {k: tuple(v) for k, v in (shapes or {}).items()}
    concrete, _ = choose_shapes(ours.inputs, fixed)
    inputs = generate(ours.inputs, concrete)
    engines: dict[str, Engine | HostedEngine] = {"native": ours}
    refused: dict[str, str] = {}
    for name in KNOWN:
        if not availability(name).is_available:
            continue
        try:
            engines[name] = HostedEngine(name, source, LoadOptions(threads=threads, shapes=fixed), "measured fastest")  # type: ignore[arg-type]
            engines[name].run(inputs)
        except VivaceError as e:
            engines.pop(name, None)
            refused[name] = str(e)
    times = _interleave({name: e.run for name, e in engines.items()}, inputs)
    best = min(times, key=lambda name: times[name] * (MARGIN if name == "native" else 1.0))
    milliseconds = {name: round(1e3 * t, 4) for name, t in times.items()}
    engines[best].facts.update(auto_ms=milliseconds, auto_refused=refused)
    return engines[best]


def _interleave(
    runs: Mapping[str, Callable[[Mapping[str, np.ndarray]], object]], inputs: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Median seconds of each, run in turn so that a change of the machine's speed meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for i in range(N_ROUNDS):
        for name, run in runs.items():
            t = time.perf_counter()
            run(inputs)
            times[name].append(time.perf_counter() - t)
        if i >= 2 and time.perf_counter() - started > BUDGET_SECONDS:
            break
    return {name: median(t) for name, t in times.items()}
