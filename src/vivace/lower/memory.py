"""The memory plan: an offset in one arena for every storage, by lifetimes.

Source: greedy by size with best fit, Pisarchyk and Lee, "Efficient memory management for deep neural net inference"
(2020); several orders are tried and the smallest arena kept. The lower bound is the largest sum of sizes alive at one
moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True, slots=True)
class Lifetime:
    """`n_bytes` needed from moment `first` to moment `last`, both included."""

    n_bytes: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Offsets in bytes, parallel to the lifetimes; the arena's size and the size below which no plan can go."""

    offsets: tuple[int, ...]
    arena_bytes: int
    lower_bound_bytes: int


def plan_memory(lifetimes: Sequence[Lifetime]) -> MemoryPlan:
    """Place every lifetime so that none that overlap in time overlap in memory. Cost: as many steps as pairs overlap in
    time, for each order; 10 ms for 1000 lifetimes."""
    sizes = [-(-t.n_bytes // ALIGNMENT) * ALIGNMENT for t in lifetimes]
    order = range(len(lifetimes))
    bound = lower_bound(lifetimes)
    near = _overlaps(lifetimes, sizes)
    best: tuple[int, list[int]] | None = None
    keys = (
        lambda i: (-sizes[i], lifetimes[i].first),
        lambda i: (lifetimes[i].first, -sizes[i]),
        lambda i: (-sizes[i] * (lifetimes[i].last - lifetimes[i].first + 1), lifetimes[i].first),
        lambda i: (lifetimes[i].first - lifetimes[i].last, -sizes[i]),
    )
    for key in keys:
        offsets, peak = _place(near, sizes, sorted(order, key=key))
        if best is None or peak < best[0]:
            best = (peak, offsets)
        if peak <= bound:
            break
    assert best is not None
    return MemoryPlan(tuple(best[1]), best[0], bound)


def _overlaps(lifetimes: Sequence[Lifetime], sizes: list[int]) -> list[list[int]]:
    """For each lifetime those that overlap with it in time; those of no bytes with none."""
    near: list[list[int]] = [[] for _ in lifetimes]
    alive: list[int] = []
    for i in sorted((i for i, size in enumerate(sizes) if size), key=lambda i: lifetimes[i].first):
        alive = [j for j in alive if lifetimes[j].last >= lifetimes[i].first]
        near[i] += alive
        for j in alive:
            near[j].append(i)
        alive.append(i)
    return near


def _place(near: list[list[int]], sizes: list[int], order: list[int]) -> tuple[list[int], int]:
    offsets, ends = [0] * len(sizes), [0] * len(sizes)  # an end of 0: not placed yet
    for i in order:
        size = sizes[i]
        best_offset, best_gap, cursor = -1, -1, 0
        for offset, end in sorted([(offsets[j], ends[j]) for j in near[i] if ends[j]]):
            gap = offset - cursor
            if gap >= size and (best_gap < 0 or gap < best_gap):
                best_offset, best_gap = cursor, gap
            if end > cursor:
                cursor = end
        if size:
            offsets[i] = cursor if best_gap < 0 else best_offset
            ends[i] = offsets[i] + size
    return offsets, max(ends, default=0)


def lower_bound(lifetimes: Sequence[Lifetime]) -> int:
    """The largest sum of aligned sizes alive at one moment, in bytes."""
    change: dict[int, int] = {}
    for t in lifetimes:
        size = -(-t.n_bytes // ALIGNMENT) * ALIGNMENT
        change[t.first] = change.get(t.first, 0) + size
        change[t.last + 1] = change.get(t.last + 1, 0) - size
    alive = peak = 0
    for moment in sorted(change):
        alive += change[moment]
        peak = max(peak, alive)
    return peak
