"""The end of a panel of few rows: the epilogue on each row's totals, and the store."""

from __future__ import annotations

from collections.abc import Mapping

from vivace.loops.blockwise import BlockwiseProduct
from vivace.targets.cpu.builder import Value
from vivace.targets.cpu.contraction_epilogue import Epilogue
from vivace.targets.cpu.contraction_plan import Plan, base_of
from vivace.targets.cpu.contraction_text import Int, Text


def store_rows(
    t: Text, w: BlockwiseProduct, p: Plan, dims: Mapping[str, Int], totals: list[list[str]], masks: list[str | None]
) -> None:
    """Finishes `totals[row][vector]` of the rows from %m on and the columns from %n on, at %out."""
    width = p.isa.n_f32_lanes
    symbols: dict[str, Int] = {**dims, "n": "%n", w.m.name: "%m"}
    epilogue = Epilogue(t, p.isa, "n", symbols, {x: base_of(t, p, x) for x in dict.fromkeys(w.extra)})
    out_row = t.mul(t.dim(w.m.out, dims), p.out_bytes)
    places = [t.mul(out_row, r) for r in range(len(totals))]
    for r, row in enumerate(totals):
        for v, total in enumerate(row):
            offset = t.add(places[r], v * width * p.out_bytes)
            moved = {w.m.name: r, "n": v * width}
            epilogue.store(w.epilogue, Value(total, "float", width), moved, w.out, "%out", offset, masks[v])
    epilogue.close()
    t.put("ret void")
