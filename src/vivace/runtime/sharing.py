"""How many threads a run takes: all of the engine's, or the calling one alone.

Threads that share a step out bring at most `work * (1 - 1 / threads)`. They cost a meeting at each shared step, after
which what a thread reads lies in another core's cache, and that is slower than memory (measured: 3 to 7 GB/s for what
the other core had just written, where memory gives 14); and the waking of those that slept.

Rules:
* ROUGH: times are those of `estimate_ns`, two to three times too high for what the caches hold; so are the costs.
* SHAPES: decided for each set of shapes anew; a small image stays on one thread, a batch of them is shared out.
* ONE PIECE: steps side by side that make one piece together meet nobody: the thread that leads runs them. A decoder has
  more of them than others.

Not handled: runs that would take some of the threads, or share some of their steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from vivace.base.dims import Dim
from vivace.lower.image import KernelEntry, LineEntry, estimate_ns
from vivace.runtime.evaluation import Evaluation

# Waking a sleeping worker takes 30 to 50 us: two threads broke even with one near 100 us of shared work.
WAKE_NS = 50_000

# By the estimated work per shared step, two threads took of the time of one: 20 us 1.58 (classifier of text angles,
# batch 1) and 1.02 (text detector, 64 x 64), 40 us 1.01 (the classifier, batch 2), 49 us 0.79, 66 us 0.71, 79 us 0.90,
# 156 us and more 0.6.
MEETING_NS = 15_000


class Sharing:
    """How runs of a program's lines are shared out."""

    def __init__(self, lines: Sequence[LineEntry], kernels: Sequence[KernelEntry]) -> None:
        groups: list[tuple[Dim, ...]] = []  # operations, bytes, units and grain of each step
        for line in lines:
            if line.kind == "run" and not line.serial:
                kernel = kernels[line.kernel]
                step = (line.flops, line.n_bytes, kernel.units, kernel.grain)
                groups.append(groups.pop() + step if line.beside and groups else step)
        self._counts = Counter(groups)  # layers are alike
        self._sizes = Evaluation([size for sizes in self._counts for size in sizes])

    def threads(self, dims: Mapping[str, int], most: int) -> int:
        """How many of `most` threads a run takes."""
        if most == 1:
            return 1
        sizes, at, gain_ns = self._sizes(dims).tolist(), 0, 0.0
        for group, count in self._counts.items():
            own, at = sizes[at : at + len(group)], at + len(group)
            if sum(-(-units // max(grain, 1)) for units, grain in zip(own[2::4], own[3::4], strict=True)) > 1:
                work_ns = sum(map(estimate_ns, own[::4], own[1::4]))
                gain_ns += count * (work_ns * (1 - 1 / most) - MEETING_NS)
        return most if gain_ns >= WAKE_NS else 1
