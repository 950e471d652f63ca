"""The cheapest way to split things into two sides: a minimum cut, found as a maximum flow (Dinic's algorithm).

`Cut.edge(a, b, w)` says: it costs `w` when `a` is on side 1 and `b` on side 0. `force(a, side)` pins a thing.
`solve()` gives the side of each.
Weights are whole numbers, so that the result does not depend on rounding. Of several cheapest splits, the one
with most things on side 0, or on side 1 when asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

FOREVER = 1 << 60


class Cut:
    """A network between side 1 (the source) and side 0 (the sink)."""

    def __init__(self) -> None:
        self.index: dict[Hashable, int] = {}
        self.heads: list[list[int]] = [[], []]
        self.to: list[int] = []
        self.room: list[int] = []

    def _node(self, thing: Hashable) -> int:
        if thing not in self.index:
            self.index[thing] = len(self.heads)
            self.heads.append([])
        return self.index[thing]

    def _arc(self, a: int, b: int, weight: int) -> None:
        for x, y, w in ((a, b, weight), (b, a, 0)):
            self.heads[x].append(len(self.to))
            self.to.append(y)
            self.room.append(w)

    def edge(self, one: Hashable, zero: Hashable, weight: int) -> None:
        """Costs `weight` when `one` is on side 1 while `zero` is on side 0."""
        if weight > 0:
            self._arc(self._node(one), self._node(zero), weight)

    def price(self, thing: Hashable, side: int, weight: int) -> None:
        """Costs `weight` when `thing` is on `side`."""
        if weight > 0:
            a = self._node(thing)
            self._arc(*((a, 1) if side else (0, a)), weight)

    def force(self, thing: Hashable, side: int) -> None:
        self.price(thing, 1 - side, FOREVER)

    def solve(self, most_on_1: bool = False) -> dict[Hashable, int]:
        """The side of each thing in a cheapest split. Cost: far below the bound O(V^2 E) on graphs of models."""
        while (level := self._levels()) is not None:
            cursor = [0] * len(self.heads)
            while self._push(level, cursor):
                pass
        if most_on_1:
            from_sink = self._reached(1, backwards=True)
            return {thing: int(i not in from_sink) for thing, i in self.index.items()}
        from_source = self._reached(0, backwards=False)
        return {thing: int(i in from_source) for thing, i in self.index.items()}

    def _reached(self, start: int, backwards: bool) -> set[int]:
        """What has room left on a way from the source, or to the sink."""
        found = {start}
        queue = deque([start])
        while queue:
            a = queue.popleft()
            for e in self.heads[a]:
                if self.room[e ^ 1 if backwards else e] and self.to[e] not in found:
                    found.add(self.to[e])
                    queue.append(self.to[e])
        return found

    def _levels(self) -> list[int] | None:
        level = [-1] * len(self.heads)
        level[0] = 0
        queue = deque([0])
        while queue:
            a = queue.popleft()
            for e in self.heads[a]:
                b = self.to[e]
                if self.room[e] and level[b] < 0:
                    level[b] = level[a] + 1
                    queue.append(b)
        return level if level[1] >= 0 else None

    def _push(self, level: list[int], cursor: list[int]) -> int:
        """One augmenting path in the level graph, found by depth-first search without recursion."""
        path: list[int] = []
        a = 0
        while a != 1:
            e = -1
            while cursor[a] < len(self.heads[a]):
                e = self.heads[a][cursor[a]]
                if self.room[e] and level[self.to[e]] == level[a] + 1:
                    break
                cursor[a] += 1
            else:
                if not path:
                    return 0
                back = path.pop()
                a = self.to[back ^ 1]
                cursor[a] += 1
                continue
            path.append(e)
            a = self.to[e]
        flow = min(self.room[e] for e in path)
        for e in path:
            self.room[e] -= flow
            self.room[e ^ 1] += flow
        return flow
