"""Kernels of products with block-wise weights of 4 or 8 bits.

Few rows of A read the packed weights at the speed of memory: in integers where the CPU has the dot product of bytes
(`blockwise_dot.py`), else in f32 (`blockwise_floats.py`). Many rows: each panel is turned into f32 in scratch once, or
into bf16 where A is bf16, and the micro-kernels of contractions multiply it; an f32 A that there is in parts of bf16
meets it on matrix units (`blockwise_tiles.py`). A unit is one panel, there with as many rows as a cache holds. Where
the number of rows is known at run time only, the kernel holds both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from vivace.base.dims import Dim, bounds, ceildiv
from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.base.machine import Isa, host
from vivace.loops.blockwise import MOST_DIRECT_ROWS, BlockwiseProduct
from vivace.loops.kernel import Buffer
from vivace.loops.split import N_PARTS, TILE_ROWS
from vivace.lower.arithmetic import arithmetic_of
from vivace.lower.tile import Tile, choose_tile
from vivace.targets.cpu.blockwise_dot import (
    dot_function,
    dot_symbol,
    fetch,
    have_digits,
)
from vivace.targets.cpu.blockwise_floats import float_function, float_symbol
from vivace.targets.cpu.blockwise_tiles import (
    GROUPS,
    Rows,
    configure,
    multiply_rows,
    prepare_panel,
    row_function,
    rows_at_once,
    scratch_bytes,
    sums_bytes,
    tiles_function,
)
from vivace.targets.cpu.blockwise_weights import Panel, dequantize
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.contraction import kernel_of_tile
from vivace.targets.cpu.contraction_amx import release
from vivace.targets.cpu.contraction_plan import Plan, base_of, load_dims, symbol_of, variants
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_waiting import begin, finish, finishers
from vivace.targets.cpu.isa import kernel_attributes

_DIRECT_SIZES = (2, 1)  # few rows multiplied at once: as many as have their sums in registers


def emit_blockwise(w: BlockwiseProduct, isa: Isa) -> KernelCode:
    """The kernel of a product with block-wise weights.

    Raises: UnsupportedError for f16 scales or shifts where the CPU cannot convert them.
    """
    numbers = [w.scales, *([w.shifts] if w.shifts is not None else [])]
    if any(b.dtype is DType.f16 for b in numbers) and "+f16c" not in isa.features:
        raise UnsupportedError("f16 scales", where=w.name, expected="f32")
    p = _plan(w, isa)
    most, least = bounds(w.m.extent)[1], bounds(w.m.extent)[0] or 0
    is_direct = least <= MOST_DIRECT_ROWS
    is_staged = most is None or most > MOST_DIRECT_ROWS
    tails = [tail for tail, there in ((False, w.n >= w.lanes), (True, w.n % w.lanes > 0)) if there]
    texts = [_driver(w, p, is_direct, is_staged, tails)]
    if is_direct:
        texts += [float_function(w, p, size, tail) for size in _DIRECT_SIZES for tail in tails]
        if w.digits is not None:
            texts += [dot_function(w, p, size, tail) for size in _DIRECT_SIZES for tail in tails]
    if is_staged and w.parts is not None:
        texts += [tiles_function(w, isa, 1), tiles_function(w, isa, GROUPS)]
        texts += [row_function(w, p, tail) for tail in tails]
        texts += [] if is_direct else [float_function(w, p, 1, tail) for tail in tails]
    elif is_staged:
        texts += [kernel_of_tile(p, *v) for v in variants(p)]
        texts += finishers(p) if p.ar.is_tile else ()
    declares: dict[str, str] = {}
    for _, declared in texts:
        declares |= declared
    attributes = f"attributes #0 = {{ {kernel_attributes(isa)} }}"
    text = "\n".join([*(x for x, _ in texts), *declares.values(), "!0 = !{}", attributes, ""])
    staged = (
        (w.n_blocks * w.block * w.lanes * p.ar.b_bytes if w.parts is None else scratch_bytes(w)) if is_staged else 0
    )
    units: Dim = w.n_panels
    if w.parts is not None:
        units = units * ceildiv(w.m.extent, _block_rows(w))
    return KernelCode(w.name, text, w.params, w.dims, units, 1, staged, "light")


def _block_rows(w: BlockwiseProduct) -> int:
    return rows_at_once(w, host().cache_bytes(2))


def _plan(w: BlockwiseProduct, isa: Isa) -> Plan:
    """How many rows are multiplied: as a contraction whose B lies in the scratch of its thread."""
    c = replace(w.product, b=Buffer("panel", w.a.dtype, (0,), (1,)))
    ar = arithmetic_of(c, isa)
    lanes = 2 * isa.n_f32_lanes
    c = replace(c, packing=replace(c.packing, lanes=lanes))
    tile = choose_tile(c, isa)
    tile = Tile(tile.nv, tile.lanes, tile.outer, tile.inner, tile.unroll, 1, 1, False, False)
    return Plan(w.name, c, isa, ar, tile, w.params, w.dims)


def _driver(
    w: BlockwiseProduct, p: Plan, is_direct: bool, is_staged: bool, tails: list[bool]
) -> tuple[str, dict[str, str]]:
    """The exported function: with few rows or with many."""
    t = Text()
    dims = load_dims(t, p)
    a, b, scales, out = (base_of(t, p, x) for x in (w.a, w.b, w.scales, w.out))
    shifts = "null" if w.shifts is None else base_of(t, p, w.shifts)
    n_rows = t.dim(w.m.extent, dims)
    if is_staged and p.ar.is_tile:
        begin(t, p)
    few, many, done = t.label(), t.label(), t.label()
    if is_direct and is_staged:
        t.branch(t.less(MOST_DIRECT_ROWS, n_rows), many, few)
    else:
        t.jump(few if is_direct else many)
    whole = Panel(b, scales, shifts)
    if is_direct:
        t.start(few)
        _few_rows(t, w, p, dims, n_rows, a, whole, out, tails)
        t.jump(done)
    if is_staged:
        t.start(many)
        if w.parts is not None:
            _many_parts(t, w, p, dims, n_rows, Rows(a, *_split(t, w, p), out), whole, tails)
        else:
            with t.loop("%begin", "%end") as number:
                _many_rows(t, w, p, dims, a, whole.block(t, w, t.mul(number, w.n_blocks)), out, t.mul(number, w.lanes))
        if p.ar.is_tile:
            finish(t, p)
            release(t)
        t.jump(done)
    t.start(done)
    t.put("ret void")
    head = f"define void @{w.name}(ptr %args, i64 %begin, i64 %end, ptr %scratch) #0 {{"
    return "\n".join([head, "entry:", *t.lines, "}"]), t.declares


def _by_panel(t: Text, lanes: int, n: int, column: Int, tails: Sequence[bool], then: Callable[[bool], None]) -> None:
    """Code for whole panels and for the last, where both occur."""
    if len(tails) == 1:
        then(tails[0])
        return
    full, tail, done = t.label(), t.label(), t.label()
    t.branch(t.op(f"icmp sle i64 {t.add(column, lanes)}, {n}"), full, tail)
    for label, is_tail in ((full, False), (tail, True)):
        t.start(label)
        then(is_tail)
        t.jump(done)
    t.start(done)


def _row(t: Text, dims: Mapping[str, Int], base: str, step: Dim, size: int, row: Int) -> str:
    return t.at(base, t.mul(row, t.mul(t.dim(step, dims), size)))


def _few_rows(
    t: Text, w: BlockwiseProduct, p: Plan, dims: Mapping[str, Int], n_rows: Int, a: str, whole: Panel, out: str,
    tails: list[bool],
) -> None:  # fmt: skip
    """All panels of the range, with digits of A where every row has them, else in f32."""
    size = w.a.dtype.size_bytes

    def floats(n: Int, panel: Panel, corner: str, rows: int, row: Int, tail: bool) -> None:
        left = f"ptr %args, ptr {_row(t, dims, a, w.m.a, size, row)}"
        _call(t, p, dims, float_symbol(w, rows, tail), left, panel, corner, w, n, row)

    if w.digits is None:
        _panels(t, w, p, n_rows, whole, out, tails, floats)
        return
    layout, planes = w.digit_rows, base_of(t, p, w.digits)
    records = t.at(planes, layout.records_at(MOST_DIRECT_ROWS))

    def digits(n: Int, panel: Panel, corner: str, rows: int, row: Int, tail: bool) -> None:
        at, record = t.at(planes, t.mul(row, layout.row_bytes)), t.at(records, t.mul(row, layout.record_row_bytes))
        _call(t, p, dims, dot_symbol(w, rows, tail), f"ptr %args, ptr {at}, ptr {record}", panel, corner, w, n, row)

    fetch(t, whole.block(t, w, t.mul("%begin", w.n_blocks)).b)
    yes, no, done = t.label(), t.label(), t.label()
    t.branch(have_digits(t, layout, records, n_rows), yes, no)
    for label, way in ((yes, digits), (no, floats)):
        t.start(label)
        _panels(t, w, p, n_rows, whole, out, tails, way)
        t.jump(done)
    t.start(done)


def _call(
    t: Text, p: Plan, dims: Mapping[str, Int], symbol: str, left: str, panel: Panel, corner: str, w: BlockwiseProduct,
    n: Int, row: Int,
) -> None:  # fmt: skip
    out = _row(t, dims, corner, w.m.out, p.out_bytes, row)
    rest = f"ptr {panel.b}, ptr {panel.scales}, ptr {panel.shifts}, ptr {out}, i64 {n}, i64 {row}"
    t.put(f"call void @{symbol}({left}, {rest})")


def _panels(
    t: Text, w: BlockwiseProduct, p: Plan, n_rows: Int, whole: Panel, out: str, tails: list[bool],
    call: Callable[[Int, Panel, str, int, Int, bool], None],
) -> None:  # fmt: skip
    """Every panel with rows in twos, and the last one."""
    most = _DIRECT_SIZES[0]
    pairs, left = t.divmod(n_rows, most)
    even = t.mul(pairs, most)
    with t.loop("%begin", "%end") as number:
        n = t.mul(number, w.lanes)
        panel, corner = whole.block(t, w, t.mul(number, w.n_blocks)), t.at(out, t.mul(n, p.out_bytes))

        def rows(tail: bool) -> None:
            with t.loop(0, even, most) as row:
                call(n, panel, corner, most, row, tail)
            with t.loop(0, left) as row:
                call(n, panel, corner, 1, t.add(even, row), tail)

        _by_panel(t, w.lanes, w.n, n, tails, rows)


def _many_rows(
    t: Text, w: BlockwiseProduct, p: Plan, dims: Mapping[str, Int], a: str, panel: Panel, out: str, first: Int
) -> None:
    """One panel: made in scratch as narrower ones, then multiplied with all rows."""
    dequantize(t, w, p.isa, p.ar, p.tile.lanes, panel)
    panel_bytes = w.n_blocks * w.block // p.ar.group * p.row_bytes
    tails = [tail for tail, there in ((False, p.has_full_panel), (True, p.tail_vectors > 0)) if there]
    with t.loop(0, w.lanes // p.tile.lanes) as part:
        n = t.add(first, t.mul(part, p.tile.lanes))
        there, absent = t.label(), t.label()
        t.branch(t.less(n, w.n), there, absent)
        t.start(there)
        b, corner = t.at("%scratch", t.mul(part, panel_bytes)), t.at(out, t.mul(n, p.out_bytes))
        _by_panel(t, p.tile.lanes, w.n, n, tails, lambda tail: _tiles(t, w, p, dims, a, b, corner, n, tail))
        t.jump(absent)
        t.start(absent)


def _split(t: Text, w: BlockwiseProduct, p: Plan) -> tuple[str, str]:
    assert w.parts is not None and w.sums is not None
    return base_of(t, p, w.parts), base_of(t, p, w.sums)


def _many_parts(
    t: Text, w: BlockwiseProduct, p: Plan, dims: Mapping[str, Int], n_rows: Int, rows: Rows, whole: Panel,
    tails: list[bool],
) -> None:  # fmt: skip
    """A range of units on matrix units: blocks of rows, within them panels."""
    configure(t, w)
    most, height = _block_rows(w), GROUPS * TILE_ROWS
    row_bytes = w.n_blocks * w.block * N_PARTS * 2
    with t.loop("%begin", "%end") as unit:
        block, number = t.divmod(unit, w.n_panels)
        n, start = t.mul(number, w.lanes), t.mul(block, most)
        panel = whole.block(t, w, t.mul(number, w.n_blocks))
        prepare_panel(t, w, p.isa, panel)
        with t.loop(start, t.minimum(t.add(start, most), n_rows), height) as row:
            these = Rows(
                _row(t, dims, rows.a, w.m.a, 4, row),
                t.at(rows.parts, t.mul(row, row_bytes)),
                t.at(rows.sums, t.mul(t.divmod(row, TILE_ROWS)[0], sums_bytes(w))),
                t.at(_row(t, dims, rows.out, w.m.out, p.out_bytes, row), t.mul(n, p.out_bytes)),
            )
            left = t.sub(n_rows, row)
            _by_panel(t, w.lanes, w.n, n, tails, lambda tail: multiply_rows(t, w, p, these, panel, n, row, left, tail))
    release(t)


def _tiles(
    t: Text, w: BlockwiseProduct, p: Plan, dims: Mapping[str, Int], a: str, b: str, out: str, n: Int, tail: bool
) -> None:
    start: Int = 0
    more = ", ptr %tiles" if p.ar.is_tile else ""
    for count, size in p.tile.inner:
        if bounds(count)[1] == 0:
            continue
        pieces = t.dim(count, dims)
        with t.loop(0, pieces) as piece:
            row = t.add(start, t.mul(piece, size))
            a_row = _row(t, dims, a, w.m.a, p.ar.a_bytes, row)
            arguments = f"ptr %args, ptr {a_row}, ptr {b}, ptr {_row(t, dims, out, w.m.out, p.out_bytes, row)}"
            t.put(f"call void @{symbol_of(p, 1, size, tail)}({arguments}, i64 {n}, i64 {row}{more})")
        start = t.add(start, t.mul(pieces, size))
