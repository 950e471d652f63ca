"""Asking early for what an epilogue will read and write row by row, so that it comes while the taps are summed.

Kernels in vector registers ask only for what is read: they store a few vectors of results per row, and what a store
misses comes while others go on. Asking for 3136 x 256 results took 4 % of the time of 3136x64 @ 64x256, for 12544 x 96
of 16 channels 20 %; not asking for the residual that is there takes 10 % (Emerald Rapids).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vivace.base.dims import Dim, linear, symbols
from vivace.loops.kernel import Load, walk
from vivace.targets.cpu.contraction_plan import Plan, base_of
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import LINE_BYTES
from vivace.targets.cpu.memory import flat_index


@dataclass(frozen=True, slots=True)
class Destination:
    """Elements that lie as those of a tile do: where its corner is, and how far apart rows are."""

    corner: str
    per_outer: Dim
    per_inner: Dim
    element_bytes: int

    def lines(self, t: Text, outer: Int, inner: Int, n_elements: int, dims: Mapping[str, Int]) -> list[str]:
        """Where the cache lines of one row are."""
        steps = [t.mul(t.dim(step, dims), self.element_bytes) for step in (self.per_outer, self.per_inner)]
        row = t.at(self.corner, t.add(t.mul(outer, steps[0]), t.mul(inner, steps[1])))
        return [t.at(row, line) for line in range(0, n_elements * self.element_bytes, LINE_BYTES)]


def destinations(t: Text, p: Plan, dims: Mapping[str, Int]) -> list[Destination]:
    """The results, and what the epilogue reads of every row."""
    results = Destination("%out", p.outer.out, p.inner.out, p.out_bytes)
    return list(dict.fromkeys([results, *read_by_rows(t, p, dims)]))


def read_by_rows(t: Text, p: Plan, dims: Mapping[str, Int]) -> list[Destination]:
    """What the epilogue reads of every row, except single elements."""
    at: dict[str, Int] = {**dims, **{x.name: f"%x{i}" for i, x in enumerate(p.axes())}, "n": "%n"}
    moving = {p.outer.name, p.inner.name} - {""}
    if p.tile.pitch:  # rows are counted from the start of both axes
        at |= dict.fromkeys(moving, 0)
    read = [e for e in walk(p.c.epilogue) if isinstance(e, Load)] if p.c.epilogue is not None else []
    found: list[Destination] = []
    for e in read:
        flat, size = flat_index(e.buffer, e.index), e.buffer.dtype.size_bytes
        steps = [linear(flat, name) if name else (0, flat) for name in (p.outer.name, p.inner.name)]
        known = [step[0] for step in steps if step is not None]
        names = {s.name for s in symbols(flat)}
        if len(known) == 2 and not e.inside and names & moving and "n" in names:
            corner = t.at(base_of(t, p, e.buffer), t.mul(t.dim(flat, at), size))
            found.append(Destination(corner, known[0], known[1], size))
    return list(dict.fromkeys(found))
