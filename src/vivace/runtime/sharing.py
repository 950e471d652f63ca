"""How many threads a run takes: all of the engine's, or the calling one alone.

Threads that share a step out bring at most `work * (1 - 1 / threads)`. They cost a meeting at each shared step, after
which what a thread reads lies in another core's cache, and that is slower than memory (measured: 3 to 7 GB/s for what
the other core had just written, where memory gives 14); and the waking of those that slept.

Rules:
* ROUGH: times are those of `estimate_ns`, two to three times too high for what the caches hold; so are the costs.
* SHAPES: decided for each set of shapes anew; a small image stays on one thread, a batch of them is shared out.

Not handled: runs that would take some of the threads, or share some of their steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vivace.base.dims import evaluate
from vivace.lower.image import LineEntry, estimate_ns

# Waking a sleeping worker takes 30 to 50 us: two threads broke even with one near 100 us of shared work.
WAKE_NS = 50_000

# By the estimated work per shared step, two threads took of the time of one: 20 us 1.58 (classifier of text angles,
# batch 1) and 1.02 (text detector, 64 x 64), 40 us 1.01 (the classifier, batch 2), 49 us 0.79, 66 us 0.71, 79 us 0.90,
# 156 us and more 0.6.
MEETING_NS = 15_000


def threads_for(lines: Sequence[LineEntry], dims: Mapping[str, int], threads: int) -> int:
    """How many of `threads` a run of these lines takes."""
    work_ns, n_meetings = 0.0, 0
    for line in lines:
        if line.kind == "run" and not line.serial:
            work_ns += estimate_ns(evaluate(line.flops, dims), evaluate(line.n_bytes, dims))
            n_meetings += not line.beside
    is_worth_it = work_ns * (1 - 1 / threads) >= WAKE_NS + n_meetings * MEETING_NS
    return threads if is_worth_it else 1
