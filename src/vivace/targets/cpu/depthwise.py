"""Depthwise convolutions: every channel by itself, so vectors run along channels.

A tile is a few neighbouring output columns of one vector of channels. Each input column is loaded once per tile row
and serves all taps that touch it. A unit is a block of output rows times a block of channels; channels are the outer
loop in it, so that the input rows that neighbouring output rows share are still in the first-level cache.

Wide vectors of bytes (`depthwise_wide`) and of bf16 (`depthwise_pairs`) come first, single vectors compute what is left
of the channels. Tiles of halves roll down the rows (`depthwise_roll`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vivace.base.dims import Dim, bounds, ceildiv, prod
from vivace.base.machine import Isa
from vivace.loops.contraction import Axis, Depthwise, contraction_dims, contraction_params, substitute_expr
from vivace.loops.kernel import Load
from vivace.lower.choices import DEFAULT, Choice
from vivace.lower.tile import split_axis
from vivace.targets.cpu.builder import Value
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.contraction_epilogue import Epilogue, split_start
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import load, mask_text
from vivace.targets.cpu.depthwise_pairs import CHANNELS, PairTile, even_and_odd, is_paired
from vivace.targets.cpu.depthwise_plan import NONE, Plan, at_tile, columns_read, head_of, move
from vivace.targets.cpu.depthwise_roll import Tile, pairs_in_flight, roll, room, rows_in_flight
from vivace.targets.cpu.depthwise_wide import COLUMNS as WIDE_COLUMNS
from vivace.targets.cpu.depthwise_wide import WIDTH, WideSums, in_order_of_sums, is_wide, per_channel
from vivace.targets.cpu.isa import kernel_attributes
from vivace.targets.cpu.memory import flat_index

_COLUMNS = 7  # widths of images are mostly multiples of 7; with 5 weights and the input it fits 16 registers
MOST_COLUMNS = 16
_ROWS_PER_UNIT = 8
_ROWS_TO_ROLL = 28  # per unit: the first ones read rows above them again, the last ones begin sums that nobody wants
_UNIT_FLOPS = 500_000  # about 15 us: depthwise kernels run at the speed of the caches
_UNROLLED_TAPS = 5


def emit_depthwise(d: Depthwise, isa: Isa, choice: Choice = DEFAULT) -> KernelCode:
    """The kernel of a depthwise convolution. Of `choice` count `rows`, `tiles` and `panels`."""
    params, dims = contraction_params(d), contraction_dims(d)
    ones: dict[str, Dim] = {x.name: 0 for x in d.rows if x.extent == 1}
    epilogue = None if d.epilogue is None else substitute_expr(d.epilogue, ones)
    rows, taps = (tuple(x for x in axes if x.extent != 1) for axes in (d.rows, d.taps))
    d = replace(d, rows=rows, taps=taps, epilogue=epilogue)
    inner, outer = (rows[-1].extent if rows else 1), (rows[-2].extent if len(rows) > 1 else 1)
    flops_per_vector = 2 * isa.n_f32_lanes * _guess(inner) * _guess(prod([x.extent for x in taps]))
    in_flight = rows_in_flight(d, isa)
    most_rows, most_columns = _ROWS_PER_UNIT, MOST_COLUMNS
    if in_flight:
        most_rows, most_columns = -(-_guess(outer) // -(-_guess(outer) // _ROWS_TO_ROLL)), room(isa) // in_flight
    rows_per_unit = min(choice.tiles or most_rows, max(1, _guess(outer)))
    vectors_per_unit = choice.panels or max(1, _UNIT_FLOPS // max(1, flops_per_vector * rows_per_unit))
    wide_channels = WIDTH if is_wide(d, isa) else CHANNELS if is_paired(d, isa) else 0
    n_wide = d.channels // wide_channels if wide_channels and isinstance(d.channels, int) else 0
    columns = split_axis(inner, min(choice.rows or _COLUMNS, most_columns))
    most_wide = WIDE_COLUMNS
    if wide_channels == CHANNELS:
        most_wide = min(_COLUMNS, (room(isa) - 2) // (2 * pairs_in_flight(d, isa)))
    wide_columns = split_axis(inner, most_wide) if n_wide else ()
    p = Plan(d, isa, params, dims, columns, wide_columns, n_wide, wide_channels, rows_per_unit, vectors_per_unit)
    functions: list[str] = []
    needed: dict[str, str] = {}
    sizes = dict.fromkeys(size for count, size in p.columns if bounds(count)[1] != 0)
    tails = [tail for tail, there in ((False, p.has_full), (True, p.has_tail)) if there]
    wide_sizes = dict.fromkeys(size for count, size in p.wide_columns if bounds(count)[1] != 0)
    wide = _pair_columns if wide_channels == CHANNELS else _wide_columns
    parts = [_columns(p, size, tail) for size in sizes for tail in tails]
    for text, declared in (_driver(p), *parts, *(wide(p, size) for size in wide_sizes)):
        functions.append(text)
        needed |= declared
    units = (
        prod([x.extent for x in p.above])
        * ceildiv(p.outer.extent, rows_per_unit)
        * ceildiv(p.n_vectors, vectors_per_unit)
    )
    attributes = f"attributes #0 = {{ {kernel_attributes(isa)} }}"
    text = "\n".join([*functions, *needed.values(), "!0 = !{}", attributes, ""])
    return KernelCode(d.name, text, params, dims, units, optimize="light")


def _guess(d: Dim) -> int:
    return d if isinstance(d, int) else 32


def _columns(p: Plan, size: int, tail: bool) -> tuple[str, dict[str, str]]:
    """The function that computes `%count` tiles of `size` columns of `%rows` rows and one vector of channels."""
    t, isa, d = Text(), p.isa, p.d
    dims = p.load_dims(t)
    names = [x.name for x in d.rows]
    mask = mask_text(t, isa, _left(t, p, dims)) if tail else None
    buffers = {x: p.base(t, x) for x in dict.fromkeys(d.extra)}
    start, finish = "zeroinitializer", d.epilogue
    if p.step.acc_element == "i32":
        first, finish = split_start(d, "c")
        if first is not None:
            at: dict[str, Int] = {**dims, **{name: f"%x{i}" for i, name in enumerate(names)}, "c": "%c"}
            index = t.mul(t.dim(flat_index(first.buffer, first.index), at), 4)
            start = load(t, isa, t.at(buffers[first.buffer], index), mask, "i32")
    tile = Tile(t, p, dims, size, mask, finish, buffers)
    if in_flight := rows_in_flight(d, isa):
        roll(tile, [start], in_flight)
    else:
        with t.loop(0, "%rows") as row, t.loop(0, "%count") as piece:
            a, _ = move(t, p, (p.outer, p.inner), at_tile(t, p, row, piece, size), dims, "%a", "%out")
            tile.store([[x] for x in _taps(t, p, dims, [start] * size, a, mask)], row, piece)
    t.put("ret void")
    return "\n".join([f"{head_of(p, p.symbol(size, tail))} noinline #0 {{", "entry:", *t.lines, "}"]), t.declares


def _wide_columns(p: Plan, size: int) -> tuple[str, dict[str, str]]:
    """The function that computes `%count` tiles of `size` columns of `%rows` rows and 64 channels."""
    t, d = Text(), p.d
    dims = p.load_dims(t)
    # All that the epilogue reads are constants per channel, wherever in the image.
    symbols: dict[str, Int] = {x.name: f"%x{i}" for i, x in enumerate(d.rows)} | dims | {"c": "%c"}
    buffers = {x: p.base(t, x) for x in dict.fromkeys(d.extra)}

    def place(e: Load) -> str:
        return t.at(buffers[e.buffer], t.mul(t.dim(flat_index(e.buffer, e.index), symbols), 4))

    first, finish = split_start(d, "c")
    assert finish is not None
    start = ["zeroinitializer"] * 4 if first is None else in_order_of_sums(t, "i32", place(first))
    given = per_channel(t, finish, place, in_order_of_sums, 4)
    sums = WideSums(t, d, lambda i: _tap_offsets(t, p, dims, i), dims)
    with t.loop(0, "%rows") as row, t.loop(0, "%count") as piece:
        a, out = move(t, p, (p.outer, p.inner), at_tile(t, p, row, piece, size), dims, "%a", "%out")
        acc = sums.sum(a, start, columns_read(p, sums.last, size), size)
        epilogue = Epilogue(t, p.isa, "c", symbols, buffers)
        for j, column in enumerate(acc):
            totals = [Value(x, "i32", p.isa.n_f32_lanes) for x in column]
            epilogue.store_packed(finish, totals, given, out, t.mul(t.dim(p.inner.out, dims), j))
        epilogue.close()
    t.put("ret void")
    return "\n".join([f"{head_of(p, p.wide_symbol(size))} noinline #0 {{", "entry:", *t.lines, "}"]), t.declares


def _pair_columns(p: Plan, size: int) -> tuple[str, dict[str, str]]:
    """The function that computes `%count` tiles of `size` columns of `%rows` rows and 32 channels."""
    t, d = Text(), p.d
    dims = p.load_dims(t)
    symbols: dict[str, Int] = {x.name: f"%x{i}" for i, x in enumerate(d.rows)} | dims | {"c": "%c"}
    buffers = {x: p.base(t, x) for x in dict.fromkeys(d.extra)}

    def place(e: Load) -> str:
        return t.at(buffers[e.buffer], t.mul(t.dim(flat_index(e.buffer, e.index), symbols), 4))

    given = per_channel(t, d.epilogue, place, even_and_odd, 2)
    roll(PairTile(t, p, dims, size, given), ["zeroinitializer"] * 2, pairs_in_flight(d, p.isa))
    t.put("ret void")
    return "\n".join([f"{head_of(p, p.wide_symbol(size))} noinline #0 {{", "entry:", *t.lines, "}"]), t.declares


def _left(t: Text, p: Plan, dims: Mapping[str, Int]) -> Int:
    """Channels in the last vector."""
    if isinstance(p.d.channels, int):
        return p.d.channels % p.isa.n_f32_lanes
    return t.sub(t.dim(p.d.channels, dims), "%c")


def _taps(t: Text, p: Plan, dims: Mapping[str, Int], zero: list[str], a: str, mask: str | None) -> list[str]:
    """Accumulators of as many columns as `zero` has, summed onto it over all taps."""
    kind = p.step.acc_type
    if any(x.extent == 0 for x in p.d.taps):
        return zero
    *outer, last = p.d.taps or (NONE,)
    total = prod([x.extent for x in outer])

    def kernel_row(i: Int, acc: list[str]) -> list[str]:
        in_a, in_b = _tap_offsets(t, p, dims, i)
        return _kernel_row(t, p, dims, last, t.at(a, in_a), t.at("%b", in_b), acc, mask)

    at_once = p.step.rows_at_once
    if at_once > 1 and isinstance(total, int) and total <= 2 * at_once and isinstance(last.extent, int):
        acc = zero
        for first in range(0, total, at_once):
            rows = [_tap_offsets(t, p, dims, i) for i in range(first, min(first + at_once, total))]
            acc = _kernel_rows(
                t, p, dims, last, [t.at(a, x) for x, _ in rows], [t.at("%b", y) for _, y in rows], acc, mask
            )
        return acc
    if isinstance(total, int) and total <= _UNROLLED_TAPS:
        acc = zero
        for i in range(total):
            acc = kernel_row(i, acc)
        return acc
    return t.reduce_loop(t.dim(total, dims), [(kind, x) for x in zero], kernel_row)


def _tap_offsets(t: Text, p: Plan, dims: Mapping[str, Int], i: Int) -> tuple[Int, Int]:
    """Byte offsets in A and B of a step of all taps but the last."""
    outer = p.d.taps[:-1]
    in_a: Int = 0
    in_b: Int = 0
    for axis in reversed(outer):
        i, at = t.divmod(i, t.dim(axis.extent, dims)) if axis is not outer[0] else (0, i)
        in_a = t.add(in_a, t.mul(at, t.mul(t.dim(axis.a, dims), p.a_bytes)))
        in_b = t.add(in_b, t.mul(at, t.mul(t.dim(axis.b, dims), p.b_bytes)))
    return in_a, in_b


def _kernel_row(
    t: Text, p: Plan, dims: Mapping[str, Int], tap: Axis, a: str, b: str, acc: list[str], mask: str | None
) -> list[str]:
    """Adds one row of the kernel."""
    s, b_bytes = p.step, p.b_bytes
    if not isinstance(tap.extent, int) or tap.extent * len(acc) > 64:

        def step(i: str, carried: list[str]) -> list[str]:
            x = t.at(a, t.mul(i, t.mul(t.dim(tap.a, dims), p.a_bytes)))
            w = s.weights(t, t.at(b, t.mul(i, t.mul(t.dim(tap.b, dims), b_bytes))), mask)
            column = t.mul(t.dim(p.inner.a, dims), p.a_bytes)
            values = [s.values(t, t.at(x, t.mul(column, j)), mask) for j in range(len(acc))]
            return [s.multiply_add(t, v, w, total) for v, total in zip(values, carried)]

        return t.reduce_loop(t.dim(tap.extent, dims), [(s.acc_type, x) for x in acc], step)
    weights = [s.weights(t, t.at(b, t.mul(t.dim(tap.b * k, dims), b_bytes)), mask) for k in range(tap.extent)]
    acc = list(acc)
    for where, pairs in columns_read(p, tap, len(acc)):
        x = s.values(t, t.at(a, t.mul(t.dim(where, dims), p.a_bytes)), mask)
        for j, k in pairs:
            acc[j] = s.multiply_add(t, x, weights[k], acc[j])
    return acc


def _kernel_rows(
    t: Text, p: Plan, dims: Mapping[str, Int], tap: Axis, a: list[str], b: list[str], acc: list[str], mask: str | None
) -> list[str]:
    """Adds several rows of the kernel, interleaved."""
    assert isinstance(tap.extent, int)
    s, acc = p.step, list(acc)

    def at(pointers: list[str], where: Dim, size: int, of_a: bool) -> str:
        return s.quads(t, [t.at(x, t.mul(t.dim(where, dims), size)) for x in pointers], mask, of_a)

    weights = [at(b, tap.b * k, p.b_bytes, False) for k in range(tap.extent)]
    for where, pairs in columns_read(p, tap, len(acc)):
        x = at(a, where, p.a_bytes, True)
        for j, k in pairs:
            acc[j] = s.multiply_quads(t, x, weights[k], acc[j])
    return acc


def _driver(p: Plan) -> tuple[str, dict[str, str]]:
    """The exported function: units, then vectors of channels, and the segments of their rows."""
    t, d, width = Text(), p.d, p.isa.n_f32_lanes
    dims = p.load_dims(t)
    a, b, out = (p.base(t, x) for x in (d.a, d.b, d.out))
    n_vectors, n_rows = t.dim(p.n_vectors, dims), t.dim(p.outer.extent, dims)
    vector_blocks = t.dim(ceildiv(p.n_vectors, p.vectors_per_unit), dims)
    row_blocks = t.dim(ceildiv(p.outer.extent, p.rows_per_unit), dims)
    with t.loop("%begin", "%end") as unit:
        rest, vector_block = t.divmod(unit, vector_blocks)
        rest, row_block = t.divmod(rest, row_blocks)
        at: dict[str, Int] = {}
        for axis in reversed(p.above):
            rest, at[axis.name] = t.divmod(rest, t.dim(axis.extent, dims)) if axis is not p.above[0] else (0, rest)
        a_image, out_image = move(t, p, p.above, at, dims, a, out)
        first_vector, first_row = t.mul(vector_block, p.vectors_per_unit), t.mul(row_block, p.rows_per_unit)
        vector_end = t.minimum(t.add(first_vector, p.vectors_per_unit), n_vectors)
        row_end = t.minimum(t.add(first_row, p.rows_per_unit), n_rows)
        rows = t.sub(row_end, first_row)
        with t.loop(first_vector, vector_end) as vector:
            c = t.add(
                t.mul(vector, width), t.mul(t.minimum(vector, p.n_wide), p.wide_channels - width) if p.n_wide else 0
            )
            at[p.outer.name] = first_row
            a_row, out_row = move(t, p, (p.outer,), at, dims, a_image, out_image)
            sized = ((a_row, p.a_bytes), (b, p.b_bytes), (out_row, p.out_bytes))
            a_row, b_row, out_row = (t.at(x, t.mul(c, size)) for x, size in sized)
            if p.n_wide:
                wide, narrow, done = t.label(), t.label(), t.label()
                t.branch(t.less(vector, p.n_wide), wide, narrow)
                for label, is_wide_row in ((wide, True), (narrow, False)):
                    t.start(label)
                    _rows(t, p, dims, at, rows, c, a_row, b_row, out_row, is_wide_row)
                    t.jump(done)
                t.start(done)
            else:
                _rows(t, p, dims, at, rows, c, a_row, b_row, out_row)
    t.put("ret void")
    head = f"define void @{d.name}(ptr %args, i64 %begin, i64 %end, ptr %scratch) #0 {{"
    return "\n".join([head, "entry:", *t.lines, "}"]), t.declares


def _rows(
    t: Text, p: Plan, dims: Mapping[str, Int], at: Mapping[str, Int], rows: Int, c: Int, a: str, b: str, out: str,
    wide: bool = False,
) -> None:  # fmt: skip
    """Calls the columns of some output rows, segment by segment."""
    start: Int = 0
    for count, size in p.wide_columns if wide else p.columns:
        if bounds(count)[1] == 0 or not (wide or p.has_full or p.has_tail):
            continue
        n = t.dim(count, dims)
        place = {**at, p.inner.name: start}
        a_part, out_part = move(t, p, (p.inner,), place, dims, a, out)
        axes = "".join(f", i64 {place[x.name]}" for x in p.d.rows)
        arguments = f"ptr %args, ptr {a_part}, ptr {b}, ptr {out_part}, i64 {n}, i64 {rows}, i64 {c}{axes}"
        if wide:
            t.put(f"call void @{p.wide_symbol(size)}({arguments})")
        elif p.has_full and p.has_tail:
            full, tail, done = t.label(), t.label(), t.label()
            end = t.add(c, p.isa.n_f32_lanes)
            t.branch(t.op(f"icmp sle i64 {end}, {t.dim(p.d.channels, dims)}"), full, tail)
            for label, is_tail in ((full, False), (tail, True)):
                t.start(label)
                t.put(f"call void @{p.symbol(size, is_tail)}({arguments})")
                t.jump(done)
            t.start(done)
        else:
            t.put(f"call void @{p.symbol(size, p.has_tail)}({arguments})")
        start = t.add(start, t.mul(n, size))
