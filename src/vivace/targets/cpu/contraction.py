"""Kernels of matrix products and convolutions.

A kernel is one exported function (`contraction_driver`) and internal micro-kernels (`contraction_body`), one per
shape of tile: most row counts split into tiles of one or two sizes, and the last panel may be narrower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vivace.base.dims import Dim, ceildiv, prod
from vivace.base.dtypes import DType
from vivace.base.errors import InternalError, UnsupportedError
from vivace.base.machine import Isa
from vivace.loops.contraction import Contraction, contraction_dims, contraction_params, merge_axes
from vivace.loops.kernel import Load
from vivace.lower.arithmetic import SIGN_OFFSET, arithmetic_of
from vivace.lower.pack import contiguous_run
from vivace.lower.tile import Tile, choose_tile
from vivace.targets.cpu.builder import Value
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.contraction_amx import tile_kernel
from vivace.targets.cpu.contraction_body import Operands, Shape, Sum
from vivace.targets.cpu.contraction_driver import driver
from vivace.targets.cpu.contraction_epilogue import Epilogue, split_start
from vivace.targets.cpu.contraction_fetch import read_by_rows
from vivace.targets.cpu.contraction_plan import Plan, base_of, load_dims, plan_of_rows, symbol_of, variants
from vivace.targets.cpu.contraction_step import Step
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import ACC_BYTES, LINE_BYTES, load, mask_text, store
from vivace.targets.cpu.contraction_waiting import finishers
from vivace.targets.cpu.isa import kernel_attributes
from vivace.targets.cpu.memory import flat_index

_SOON_BYTES = 4096  # what memory delivers in the time that it takes to answer, and some more


def emit_contraction(c: Contraction, isa: Isa, tile: Tile | None = None) -> KernelCode:
    """The kernel of a contraction.

    Raises: UnsupportedError for operands that no kernel multiplies, or that lie in a way that low precision does not
    take: B not packed, or a run of A that is not contiguous.
    """
    merged = merge_axes(c)
    ar = arithmetic_of(merged, isa)
    if ar.group > 1:
        _require_packed(c, ar.group)
    tile = tile or choose_tile(merged, isa)
    plan = Plan(c.name, merged, isa, ar, tile, contraction_params(c), contraction_dims(c))
    functions: list[str] = []
    declares: dict[str, str] = {}
    kernels = (kernel_of_tile(plan, *v) for v in variants(plan))
    for text, declared in (driver(plan), *kernels, *(finishers(plan) if ar.is_tile else ())):
        functions.append(text)
        declares |= declared
    units = (
        prod([x.extent for x in merged.batch])
        * ceildiv(plan.n_tiles, tile.tiles_per_unit)
        * ceildiv(plan.n_panels, tile.panels_per_unit)
    )
    llvm_text = "\n".join(
        [*functions, *declares.values(), "!0 = !{}", f"attributes #0 = {{ {kernel_attributes(isa)} }}", ""]
    )
    return KernelCode(c.name, llvm_text, plan.params, plan.dims, units, 1, plan.scratch_bytes, "light")


def _require_packed(c: Contraction, group: int) -> None:
    taps = merge_axes(c).taps
    if not taps or taps[-1].a != 1 or taps[-1].extent % group:  # whole groups need not be counted now
        contiguous_run(c)
    if c.packing.kind != "panels":
        raise UnsupportedError(
            f"B of {c.b.dtype} as it lies", where=c.name, expected="B packed in panels", hint="a `Pack` before it"
        )
    if c.a_offset not in (0, SIGN_OFFSET) or (c.a_offset and c.a.dtype is not DType.i8):
        raise InternalError(f"offset {c.a_offset} of {c.a.dtype}", where=c.name, expected=f"0, or {SIGN_OFFSET} for i8")


def kernel_of_tile(p: Plan, outer: int, inner: int, tail: bool) -> tuple[str, dict[str, str]]:
    """The text of the micro-kernel for one shape of tile, and what it declares."""
    chosen = plan_of_rows(p, outer * inner)
    return (tile_kernel if chosen.ar.is_tile else _vector_kernel)(p, outer, inner, tail)


def _vector_kernel(called: Plan, outer: int, inner: int, tail: bool) -> tuple[str, dict[str, str]]:
    """In vector registers. A tile of few rows among others in tile registers reads panels at the speed of memory, one
    after another, and fetches what comes soon; else what is fetched is a share of the next panel.
    """
    p, is_among_tiles = plan_of_rows(called, outer * inner), called.ar.is_tile
    t = Text()
    isa, width = p.isa, p.isa.n_f32_lanes
    dims = load_dims(t, p)
    rows = tuple((o, i) for o in range(outer) for i in range(inner))
    vectors = p.tail_vectors if tail else p.tile.nv

    def offsets(per_outer: Dim, per_inner: Dim, size: int) -> list[Int]:
        """Byte offset of each row of the tile."""
        step_o, step_i = t.mul(t.dim(per_outer, dims), size), t.mul(t.dim(per_inner, dims), size)
        return [t.add(t.mul(step_o, o), t.mul(step_i, i)) for o, i in rows]

    n = t.dim(p.c.n, dims)
    left: Int = n % p.tile.lanes if isinstance(n, int) else t.sub(n, "%n")
    masks = [mask_text(t, isa, t.sub(left, j * width)) if tail else None for j in range(vectors)]
    row_offsets = offsets(p.outer.a, p.inner.a, p.ar.a_bytes)
    if p.tile.stage_a:
        staged = t.dim(p.staged_row_bytes, dims)
        row_offsets = [t.mul(staged, r) for r in range(len(rows))]
    taps = p.c.taps if not p.tile.k_block else (replace(p.c.taps[0], extent=p.tile.k_block), *p.c.taps[1:])
    operands = Operands(taps, p.in_panels, p.tile.lanes, [None] * vectors if p.in_panels else masks)
    step = Step(t, isa, p.ar, p.c.a.dtype is DType.i8 and not p.c.a_offset, p.c.a_offset != 0)
    symbols: dict[str, Int] = {**dims, **{x.name: f"%x{i}" for i, x in enumerate(p.axes())}, "n": "%n"}
    finish = p.c.epilogue
    start = _waiting(t, p, len(rows), vectors) if p.tile.k_block else None
    if not p.tile.k_block:
        if p.ar.acc is DType.i32:
            first, finish = split_start(p.c, "n")
            start = None if first is None else [_started(t, p, first, symbols, masks)] * len(rows)
        for read in read_by_rows(t, p, dims):
            for line in (line for o, i in rows for line in read.lines(t, o, i, vectors * width, dims)):
                t.fetch(line)
    summed = Sum(step, Shape(rows, vectors, p.tile.unroll), operands, row_offsets, dims)
    if called.fetches_ahead:
        summed.ahead, summed.ahead_lines = "%ahead", p.ahead_lines
    if is_among_tiles:
        summed.ahead, summed.ahead_lines = t.at("%b", _SOON_BYTES), p.tile.unroll * p.row_bytes // LINE_BYTES
    acc = summed.emit("%a", "%b", start)
    if p.tile.k_block:
        _wait_unless_last(t, p, acc)
    out_offsets = offsets(p.outer.out, p.inner.out, p.out_bytes)
    buffers = {x: base_of(t, p, x) for x in dict.fromkeys(p.c.extra)}
    epilogue = Epilogue(t, isa, "n", symbols, buffers)
    for (o, i), offset, row in zip(rows, out_offsets, acc):
        moved = {name: by for name, by in ((p.outer.name, o), (p.inner.name, i)) if name}
        totals = [Value(value, step.acc_element, width) for value in row]
        epilogue.store_row(finish, totals, moved, p.c.out, "%out", offset, masks)
        epilogue.end_row()
    epilogue.close()
    t.put("ret void")
    between = ", ptr %waiting, i1 %last" if p.tile.k_block else ""
    between += ", ptr %tiles" if is_among_tiles else ""
    ahead = ", ptr %ahead" if called.fetches_ahead else ""
    axes = "".join(f", i64 %x{i}" for i in range(len(p.axes())))
    parameters = f"ptr %args, ptr %a, ptr %b, ptr %out, i64 %n{axes}{between}{ahead}"
    head = f"define internal void @{symbol_of(p, outer, inner, tail)}({parameters})"
    return "\n".join([f"{head} noinline #0 {{", "entry:", *t.lines, "}"]), t.declares


def _started(t: Text, p: Plan, e: Load, symbols: Mapping[str, Int], masks: list[str | None]) -> list[str]:
    """The vectors that the accumulators of every row start from."""
    corner = t.at(base_of(t, p, e.buffer), t.mul(t.dim(flat_index(e.buffer, e.index), symbols), ACC_BYTES))
    return [load(t, p.isa, t.at(corner, j * p.isa.vector_bits // 8), mask, "i32") for j, mask in enumerate(masks)]


def _waiting_places(t: Text, p: Plan, rows: int, vectors: int) -> list[list[str]]:
    row_bytes, vector_bytes = p.tile.lanes * ACC_BYTES, p.isa.vector_bits // 8
    return [[t.at("%waiting", r * row_bytes + j * vector_bytes) for j in range(vectors)] for r in range(rows)]


def _waiting(t: Text, p: Plan, rows: int, vectors: int) -> list[list[str]]:
    """Accumulators from the pass before."""
    element = "i32" if p.ar.acc.is_int else "float"
    return [[load(t, p.isa, x, None, element) for x in row] for row in _waiting_places(t, p, rows, vectors)]


def _wait_unless_last(t: Text, p: Plan, acc: list[list[str]]) -> None:
    """Returns with the accumulators in scratch, but goes on in the last pass."""
    early, finish = t.label(), t.label()
    t.branch("%last", finish, early)
    t.start(early)
    for places, values in zip(_waiting_places(t, p, len(acc), len(acc[0])), acc):
        for place, value in zip(places, values):
            store(t, p.isa, value, place, None, "i32" if p.ar.acc.is_int else "float")
    t.put("ret void")
    t.start(finish)
