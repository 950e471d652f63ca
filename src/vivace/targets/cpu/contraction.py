"""Kernels of matrix products and convolutions in f32.

A kernel is one exported function (`contraction_driver`) and internal micro-kernels (`contraction_body`), one per shape of tile: most
row counts split into tiles of one or two sizes, and the last panel may be narrower.
"""

from __future__ import annotations

from dataclasses import replace

from vivace.base.dims import Dim, ceildiv, prod
from vivace.base.machine import Isa
from vivace.loops.contraction import Contraction, contraction_dims, contraction_params, merge_axes
from vivace.lower.tile import Tile, choose_tile, staged_stride
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.contraction_body import F32_BYTES, Operands, Shape, accumulate, load, mask_text, store
from vivace.targets.cpu.contraction_driver import driver
from vivace.targets.cpu.contraction_epilogue import Epilogue
from vivace.targets.cpu.contraction_plan import Plan, base_of, load_dims, symbol_of, variants
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.isa import kernel_attributes


def emit_contraction(c: Contraction, isa: Isa, tile: Tile | None = None) -> KernelCode:
    """The kernel of a contraction."""
    merged = merge_axes(c)
    tile = tile or choose_tile(merged, isa)
    plan = Plan(c.name, merged, isa, tile, contraction_params(c), contraction_dims(c))
    functions: list[str] = []
    declares: dict[str, str] = {}
    for text, declared in (driver(plan), *(micro_kernel(plan, *v) for v in variants(plan))):
        functions.append(text)
        declares |= declared
    units = (
        prod([x.extent for x in merged.batch])
        * ceildiv(plan.n_tiles, tile.tiles_per_unit)
        * ceildiv(plan.n_panels, tile.panels_per_unit)
    )
    llvm_text = "\n".join([*functions, *declares.values(), "!0 = !{}", f"attributes #0 = {{ {kernel_attributes(isa)} }}", ""])
    return KernelCode(c.name, llvm_text, plan.params, plan.dims, units, 1, plan.scratch_bytes)


def micro_kernel(p: Plan, outer: int, inner: int, tail: bool) -> tuple[str, dict[str, str]]:
    t = Text()
    isa, width = p.isa, p.isa.n_f32_lanes
    dims = load_dims(t, p)
    rows = tuple((o, i) for o in range(outer) for i in range(inner))
    vectors = p.tail_vectors if tail else p.tile.nv

    def offsets(per_outer: Dim, per_inner: Dim) -> list[Int]:
        """Byte offset of each row of the tile."""
        step_o, step_i = t.mul(t.dim(per_outer, dims), F32_BYTES), t.mul(t.dim(per_inner, dims), F32_BYTES)
        return [t.add(t.mul(step_o, o), t.mul(step_i, i)) for o, i in rows]

    n = t.dim(p.c.n, dims)
    left: Int = n % p.tile.lanes if isinstance(n, int) else t.sub(n, "%n")
    masks = [mask_text(t, isa, t.sub(left, j * width)) if tail else None for j in range(vectors)]
    row_offsets = offsets(p.outer.a, p.inner.a)
    if p.tile.stage_a:
        staged = t.mul(t.dim(staged_stride(p.k), dims), F32_BYTES)
        row_offsets = [t.mul(staged, r) for r in range(len(rows))]
    taps = p.c.taps if not p.tile.k_block else (replace(p.c.taps[0], extent=p.tile.k_block),)
    operands = Operands(taps, p.in_panels, p.tile.lanes, [None] * vectors if p.in_panels else masks)
    start = _waiting(t, p, len(rows), vectors) if p.tile.k_block else None
    acc = accumulate(t, isa, Shape(rows, vectors, p.tile.unroll), operands, "%a", "%b", row_offsets, dims, start)
    if p.tile.k_block:
        _wait_unless_last(t, p, acc)
    symbols: dict[str, Int] = {**dims, **{x.name: f"%x{i}" for i, x in enumerate(p.axes())}, "n": "%n"}
    out_offsets = offsets(p.outer.out, p.inner.out)
    buffers = {x: base_of(t, p, x) for x in dict.fromkeys(p.c.extra)}
    epilogue = Epilogue(t, isa, "n", symbols, buffers)
    for (o, i), offset, row in zip(rows, out_offsets, acc):
        for j, value in enumerate(row):
            moved = {p.outer.name: o, p.inner.name: i, "n": j * width}
            moved.pop("", None)
            epilogue.store(p.c.epilogue, value, moved, p.c.out, "%out", t.add(offset, j * isa.vector_bits // 8), masks[j])
    epilogue.close()
    t.put("ret void")
    between = ", ptr %waiting, i1 %last" if p.tile.k_block else ""
    axes = "".join(f", i64 %x{i}" for i in range(len(p.axes())))
    head = f"define internal void @{symbol_of(p, outer, inner, tail)}(ptr %args, ptr %a, ptr %b, ptr %out, i64 %n{axes}{between})"
    return "\n".join([f"{head} noinline #0 {{", "entry:", *t.lines, "}"]), t.declares


def _waiting_places(t: Text, p: Plan, rows: int, vectors: int) -> list[list[str]]:
    row_bytes, vector_bytes = p.tile.lanes * F32_BYTES, p.isa.vector_bits // 8
    return [[t.at("%waiting", r * row_bytes + j * vector_bytes) for j in range(vectors)] for r in range(rows)]


def _waiting(t: Text, p: Plan, rows: int, vectors: int) -> list[list[str]]:
    """Accumulators from the pass before."""
    return [[load(t, p.isa, x, None) for x in row] for row in _waiting_places(t, p, rows, vectors)]


def _wait_unless_last(t: Text, p: Plan, acc: list[list[str]]) -> None:
    """Returns with the accumulators in scratch, but goes on in the last pass."""
    early, finish = t.label(), t.label()
    t.branch("%last", finish, early)
    t.start(early)
    for places, values in zip(_waiting_places(t, p, len(acc), len(acc[0])), acc):
        for place, value in zip(places, values):
            store(t, p.isa, value, place, None)
    t.put("ret void")
    t.start(finish)
