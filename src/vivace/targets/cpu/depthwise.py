"""Depthwise convolutions: every channel by itself, so vectors run along channels.

A tile is a few neighbouring output columns of one vector of channels. Each input column is loaded once per tile row
and serves all taps that touch it; the weights of one kernel row stay in registers. A unit is a block of output rows
times a block of channels; channels are the outer loop in it, so that the input rows that neighbouring output rows
share are still in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vivace.base.dims import Dim, bounds, ceildiv, prod
from vivace.base.machine import Isa
from vivace.loops.contraction import Axis, Depthwise, contraction_dims, contraction_params, substitute_expr
from vivace.loops.kernel import Buffer, Load
from vivace.lower.choices import DEFAULT, Choice
from vivace.lower.tile import Segment, split_axis
from vivace.targets.cpu.builder import Value
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.contraction_epilogue import Epilogue, split_start
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import load, mask_text
from vivace.targets.cpu.depthwise_step import ChannelStep
from vivace.targets.cpu.depthwise_wide import COLUMNS as WIDE_COLUMNS
from vivace.targets.cpu.depthwise_wide import WIDTH, WideSums, in_order_of_sums, is_wide, per_channel
from vivace.targets.cpu.isa import kernel_attributes
from vivace.targets.cpu.memory import flat_index

_COLUMNS = 7  # widths of images are mostly multiples of 7; with 5 weights and the input it fits 16 registers
MOST_COLUMNS = 16
_ROWS_PER_UNIT = 8
_UNIT_FLOPS = 500_000  # about 15 us: depthwise kernels run at the speed of the caches
_UNROLLED_TAPS = 5
_NONE = Axis("", 1)


@dataclass(frozen=True, slots=True)
class _Plan:
    d: Depthwise
    isa: Isa
    params: tuple[Buffer, ...]
    dims: tuple[str, ...]
    columns: tuple[Segment, ...]
    wide_columns: tuple[Segment, ...]
    n_wide: int
    rows_per_unit: int
    vectors_per_unit: int

    @property
    def step(self) -> ChannelStep:
        return ChannelStep(self.d, self.isa)

    @property
    def a_bytes(self) -> int:
        return self.d.a.dtype.size_bytes

    @property
    def b_bytes(self) -> int:
        return self.d.b.dtype.size_bytes

    @property
    def out_bytes(self) -> int:
        return self.d.out.dtype.size_bytes

    @property
    def inner(self) -> Axis:
        return self.d.rows[-1] if self.d.rows else _NONE

    @property
    def outer(self) -> Axis:
        return self.d.rows[-2] if len(self.d.rows) > 1 else _NONE

    @property
    def above(self) -> tuple[Axis, ...]:
        return self.d.rows[:-2]

    @property
    def n_vectors(self) -> Dim:
        """Wide ones first."""
        return self.n_wide + ceildiv(self.d.channels - self.n_wide * WIDTH, self.isa.n_f32_lanes)

    @property
    def has_full(self) -> bool:
        left = self.d.channels - self.n_wide * WIDTH
        return not isinstance(left, int) or left >= self.isa.n_f32_lanes

    @property
    def has_tail(self) -> bool:
        return not isinstance(self.d.channels, int) or self.d.channels % self.isa.n_f32_lanes != 0

    def load_dims(self, t: Text) -> dict[str, Int]:
        first = len(self.params)
        return {x: t.op(f"load i64, ptr {t.at('%args', 8 * (first + i))}, align 8") for i, x in enumerate(self.dims)}

    def base(self, t: Text, buffer: Buffer) -> str:
        return t.op(f"load ptr, ptr {t.at('%args', 8 * self.params.index(buffer))}, align 8")

    def wide_symbol(self, size: int) -> str:
        return f"{self.d.name}.columns{size}.wide"

    def symbol(self, size: int, tail: bool) -> str:
        return f"{self.d.name}.columns{size}{'.tail' if tail else ''}"


def emit_depthwise(d: Depthwise, isa: Isa, choice: Choice = DEFAULT) -> KernelCode:
    """The kernel of a depthwise convolution. Of `choice` count `rows`, `tiles` and `panels`."""
    params, dims = contraction_params(d), contraction_dims(d)
    ones: dict[str, Dim] = {x.name: 0 for x in d.rows if x.extent == 1}
    epilogue = None if d.epilogue is None else substitute_expr(d.epilogue, ones)
    rows, taps = (tuple(x for x in axes if x.extent != 1) for axes in (d.rows, d.taps))
    d = replace(d, rows=rows, taps=taps, epilogue=epilogue)
    inner, outer = (rows[-1].extent if rows else 1), (rows[-2].extent if len(rows) > 1 else 1)
    flops_per_vector = 2 * isa.n_f32_lanes * _guess(inner) * _guess(prod([x.extent for x in taps]))
    rows_per_unit = min(choice.tiles or _ROWS_PER_UNIT, max(1, _guess(outer)))
    vectors_per_unit = choice.panels or max(1, _UNIT_FLOPS // max(1, flops_per_vector * rows_per_unit))
    n_wide = d.channels // WIDTH if is_wide(d, isa) and isinstance(d.channels, int) else 0
    columns = split_axis(inner, min(choice.rows or _COLUMNS, MOST_COLUMNS))
    wide_columns = split_axis(inner, WIDE_COLUMNS) if n_wide else ()
    p = _Plan(d, isa, params, dims, columns, wide_columns, n_wide, rows_per_unit, vectors_per_unit)
    functions: list[str] = []
    needed: dict[str, str] = {}
    sizes = dict.fromkeys(size for count, size in p.columns if bounds(count)[1] != 0)
    tails = [tail for tail, there in ((False, p.has_full), (True, p.has_tail)) if there]
    wide_sizes = dict.fromkeys(size for count, size in p.wide_columns if bounds(count)[1] != 0)
    parts = [_columns(p, size, tail) for size in sizes for tail in tails]
    for text, declared in (_driver(p), *parts, *(_wide_columns(p, size) for size in wide_sizes)):
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


def _columns(p: _Plan, size: int, tail: bool) -> tuple[str, dict[str, str]]:
    """The function that computes `%count` tiles of `size` columns of one row and one vector of channels."""
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
    with t.loop(0, "%count") as piece:
        steps = [t.mul(t.dim(x, dims), n * size) for x, n in ((p.inner.a, p.a_bytes), (p.inner.out, p.out_bytes))]
        a, out = (t.at(f"%{x}", t.mul(piece, step)) for x, step in zip(("a", "out"), steps))
        acc = _taps(t, p, dims, [start] * size, a, mask)
        symbols: dict[str, Int] = {name: f"%x{i}" for i, name in enumerate(names)} | dims | {"c": "%c"}
        if p.inner.name:
            symbols[p.inner.name] = t.add(symbols[p.inner.name], t.mul(piece, size))
        step = t.mul(t.dim(p.inner.out, dims), p.out_bytes)
        offsets = [t.mul(step, j) for j in range(size)]
        epilogue = Epilogue(t, isa, "c", symbols, buffers)
        for j, (value, offset) in enumerate(zip(acc, offsets)):
            total = Value(value, p.step.acc_element, isa.n_f32_lanes)
            epilogue.store(finish, total, {p.inner.name: j} if p.inner.name else {}, d.out, out, offset, mask)
        epilogue.close()
    t.put("ret void")
    axes = "".join(f", i64 %x{i}" for i in range(len(names)))
    head = (
        f"define internal void @{p.symbol(size, tail)}(ptr %args, ptr %a, ptr %b, ptr %out, i64 %count, i64 %c{axes})"
    )
    return "\n".join([f"{head} noinline #0 {{", "entry:", *t.lines, "}"]), t.declares


def _wide_columns(p: _Plan, size: int) -> tuple[str, dict[str, str]]:
    """The function that computes `%count` tiles of `size` columns of one row and 64 channels."""
    t, d = Text(), p.d
    dims = p.load_dims(t)
    symbols: dict[str, Int] = {x.name: f"%x{i}" for i, x in enumerate(d.rows)} | dims | {"c": "%c"}
    buffers = {x: p.base(t, x) for x in dict.fromkeys(d.extra)}

    def place(e: Load) -> str:
        return t.at(buffers[e.buffer], t.mul(t.dim(flat_index(e.buffer, e.index), symbols), 4))

    first, finish = split_start(d, "c")
    assert finish is not None
    start = ["zeroinitializer"] * 4 if first is None else in_order_of_sums(t, "i32", place(first))
    given = per_channel(t, finish, place)
    sums = WideSums(t, d, lambda i: _tap_offsets(t, p, dims, i), dims)
    with t.loop(0, "%count") as piece:
        a, out = (
            t.at(f"%{x}", t.mul(piece, t.mul(t.dim(step, dims), size)))
            for x, step in (("a", p.inner.a), ("out", p.inner.out))
        )
        acc = sums.sum(a, start, _columns_read(p, sums.last, size), size)
        epilogue = Epilogue(t, p.isa, "c", symbols, buffers)
        for j, column in enumerate(acc):
            totals = [Value(x, "i32", p.isa.n_f32_lanes) for x in column]
            epilogue.store_packed(finish, totals, given, out, t.mul(t.dim(p.inner.out, dims), j))
        epilogue.close()
    t.put("ret void")
    axes = "".join(f", i64 %x{i}" for i in range(len(d.rows)))
    head = f"define internal void @{p.wide_symbol(size)}(ptr %args, ptr %a, ptr %b, ptr %out, i64 %count, i64 %c{axes})"
    return "\n".join([f"{head} noinline #0 {{", "entry:", *t.lines, "}"]), t.declares


def _left(t: Text, p: _Plan, dims: Mapping[str, Int]) -> Int:
    """Channels in the last vector."""
    if isinstance(p.d.channels, int):
        return p.d.channels % p.isa.n_f32_lanes
    return t.sub(t.dim(p.d.channels, dims), "%c")


def _taps(t: Text, p: _Plan, dims: Mapping[str, Int], zero: list[str], a: str, mask: str | None) -> list[str]:
    """Accumulators of as many columns as `zero` has, summed onto it over all taps."""
    kind = p.step.acc_type
    if any(x.extent == 0 for x in p.d.taps):
        return zero
    *outer, last = p.d.taps or (_NONE,)
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


def _tap_offsets(t: Text, p: _Plan, dims: Mapping[str, Int], i: Int) -> tuple[Int, Int]:
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
    t: Text, p: _Plan, dims: Mapping[str, Int], tap: Axis, a: str, b: str, acc: list[str], mask: str | None
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
    for where, pairs in _columns_read(p, tap, len(acc)):
        x = s.values(t, t.at(a, t.mul(t.dim(where, dims), p.a_bytes)), mask)
        for j, k in pairs:
            acc[j] = s.multiply_add(t, x, weights[k], acc[j])
    return acc


def _columns_read(p: _Plan, tap: Axis, size: int) -> list[tuple[Dim, list[tuple[int, int]]]]:
    """Offsets of input columns in order, each with the output columns and taps that it serves."""
    assert isinstance(tap.extent, int)
    users: dict[Dim, list[tuple[int, int]]] = {}
    for j in range(size):
        for k in range(tap.extent):
            users.setdefault(p.inner.a * j + tap.a * k, []).append((j, k))
    return [(x, users[x]) for x in sorted(users, key=lambda x: x if isinstance(x, int) else 0)]


def _kernel_rows(
    t: Text, p: _Plan, dims: Mapping[str, Int], tap: Axis, a: list[str], b: list[str], acc: list[str], mask: str | None
) -> list[str]:
    """Adds several rows of the kernel, interleaved."""
    assert isinstance(tap.extent, int)
    s, acc = p.step, list(acc)

    def at(pointers: list[str], where: Dim, size: int, of_a: bool) -> str:
        return s.quads(t, [t.at(x, t.mul(t.dim(where, dims), size)) for x in pointers], mask, of_a)

    weights = [at(b, tap.b * k, p.b_bytes, False) for k in range(tap.extent)]
    for where, pairs in _columns_read(p, tap, len(acc)):
        x = at(a, where, p.a_bytes, True)
        for j, k in pairs:
            acc[j] = s.multiply_quads(t, x, weights[k], acc[j])
    return acc


def _driver(p: _Plan) -> tuple[str, dict[str, str]]:
    """The exported function: units, then vectors of channels, rows, and the segments of a row."""
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
        a_image, out_image = _move(t, p, p.above, at, dims, a, out)
        first_vector, first_row = t.mul(vector_block, p.vectors_per_unit), t.mul(row_block, p.rows_per_unit)
        vector_end = t.minimum(t.add(first_vector, p.vectors_per_unit), n_vectors)
        row_end = t.minimum(t.add(first_row, p.rows_per_unit), n_rows)
        with t.loop(first_vector, vector_end) as vector, t.loop(first_row, row_end) as row:
            c = t.add(t.mul(vector, width), t.mul(t.minimum(vector, p.n_wide), WIDTH - width) if p.n_wide else 0)
            at[p.outer.name] = row
            a_row, out_row = _move(t, p, (p.outer,), at, dims, a_image, out_image)
            sized = ((a_row, p.a_bytes), (b, p.b_bytes), (out_row, p.out_bytes))
            a_row, b_row, out_row = (t.at(x, t.mul(c, size)) for x, size in sized)
            if p.n_wide:
                wide, narrow, done = t.label(), t.label(), t.label()
                t.branch(t.less(vector, p.n_wide), wide, narrow)
                for label, is_wide_row in ((wide, True), (narrow, False)):
                    t.start(label)
                    _row(t, p, dims, at, c, a_row, b_row, out_row, is_wide_row)
                    t.jump(done)
                t.start(done)
            else:
                _row(t, p, dims, at, c, a_row, b_row, out_row)
    t.put("ret void")
    head = f"define void @{d.name}(ptr %args, i64 %begin, i64 %end, ptr %scratch) #0 {{"
    return "\n".join([head, "entry:", *t.lines, "}"]), t.declares


def _move(
    t: Text, p: _Plan, axes: tuple[Axis, ...], at: Mapping[str, Int], dims: Mapping[str, Int], a: str, out: str
) -> tuple[str, str]:
    for axis in axes:
        a = t.at(a, t.mul(at[axis.name], t.mul(t.dim(axis.a, dims), p.a_bytes)))
        out = t.at(out, t.mul(at[axis.name], t.mul(t.dim(axis.out, dims), p.out_bytes)))
    return a, out


def _row(
    t: Text, p: _Plan, dims: Mapping[str, Int], at: Mapping[str, Int], c: Int, a: str, b: str, out: str,
    wide: bool = False,
) -> None:  # fmt: skip
    """Calls the columns of one output row, segment by segment."""
    start: Int = 0
    for count, size in p.wide_columns if wide else p.columns:
        if bounds(count)[1] == 0 or not (wide or p.has_full or p.has_tail):
            continue
        n = t.dim(count, dims)
        place = {**at, p.inner.name: start}
        a_part, out_part = _move(t, p, (p.inner,), place, dims, a, out)
        axes = "".join(f", i64 {place[x.name]}" for x in p.d.rows)
        arguments = f"ptr %args, ptr {a_part}, ptr {b}, ptr {out_part}, i64 {n}, i64 {c}{axes}"
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
