"""The memory plan: an offset in one arena for every storage, by lifetimes.

Source: greedy by size with best fit, Pisarchyk and Lee, "Efficient memory management for deep neural net inference"
(2020); several orders are tried and the smallest arena kept. The lower bound is the largest sum of sizes alive at one
moment.
"""

from __future__ import annotations

from bisect import insort
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
    """Place every lifetime so that none that overlap in time overlap in memory. Cost: O(n^2) for n lifetimes, tens of
    ms for 1000."""
    sizes = [-(-t.n_bytes // ALIGNMENT) * ALIGNMENT for t in lifetimes]
    order = range(len(lifetimes))
    bound = lower_bound(lifetimes)
    best: tuple[int, list[int]] | None = None
    keys = (
        lambda i: (-sizes[i], lifetimes[i].first),
        lambda i: (lifetimes[i].first, -sizes[i]),
        lambda i: (-sizes[i] * (lifetimes[i].last - lifetimes[i].first + 1), lifetimes[i].first),
        lambda i: (lifetimes[i].first - lifetimes[i].last, -sizes[i]),
    )
    for key in keys:
        offsets, peak = _place(lifetimes, sizes, sorted(order, key=key))
        if best is None or peak < best[0]:
            best = (peak, offsets)
        if peak <= bound:
            break
    assert best is not None
    return MemoryPlan(tuple(best[1]), best[0], bound)


def _place(lifetimes: Sequence[Lifetime], sizes: list[int], order: list[int]) -> tuple[list[int], int]:
    offsets = [0] * len(sizes)
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last; sorted by offset
    peak = 0
    for i in order:
        size, t = sizes[i], lifetimes[i]
        if size == 0:
            continue
        best_offset, best_gap, cursor = -1, -1, 0
        for offset, end, first, last in placed:
            if last < t.first or first > t.last:
                continue
            gap = offset - cursor
            if gap >= size and (best_gap < 0 or gap < best_gap):
                best_offset, best_gap = cursor, gap
            if end > cursor:
                cursor = end
        if best_gap < 0:
            best_offset = cursor
        offsets[i] = best_offset
        entry = (best_offset, best_offset + size, t.first, t.last)
        insort(placed, entry)
        peak = max(peak, best_offset + size)
    return offsets, peak


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
