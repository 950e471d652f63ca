"""Few rows of A against block-wise weights in integers: vpdpbusd reads the packed bytes as they are.

The rows of A are there as digits (`loops/digits.py`). The products of q and each digit are summed in i32, exactly, and
put together in f32:

    sum over the block of a * q = unit * ((dot(d0, q) * 256 + dot(d1, q)) * 256 + ..)

Blocks that have a digit fewer leave it out, in code of their own: whether one has is the same for every panel.
An error of A shows only in columns where the largest elements of a block meet weights of 0. Rows that have no digits
go the f32 way (`blockwise_floats.py`).
"""

from __future__ import annotations

from vivace.base.machine import Isa
from vivace.loops.blockwise import BlockwiseProduct
from vivace.loops.digits import LONG_AT, RECORD_BYTES, SUM_AT, TOTAL_AT, UNIT_AT, DigitRows
from vivace.targets.cpu.blockwise_store import store_rows
from vivace.targets.cpu.blockwise_weights import Panel, Weights
from vivace.targets.cpu.contraction_plan import Plan, load_dims
from vivace.targets.cpu.contraction_step import multiply_add, splat
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import mask_text, vector_type

# Bytes: what memory delivers in the time that it takes to answer, and some more. Asked for row by row and into the
# second-level cache; for all of a block at once, and 4096 ahead, a token of SmolLM2-135M takes 1.12 of the time with 8
# bits and 1.05 with 4, at 1 thread (Emerald Rapids).
_FETCH_AHEAD = 8192
_LINE = 64
_MOST_UNROLLED = 8


def fetch(t: Text, weights: str) -> None:
    """Asks for what a panel starts with; each row of words asks for one that comes this much later."""
    for line in range(0, _FETCH_AHEAD, _LINE):
        t.fetch(t.at(weights, line))


def have_digits(t: Text, rows: DigitRows, records: str, n_rows: Int) -> str:
    """An i1 that tells whether all of the first rows have digits."""

    def both(row: str, so_far: list[str]) -> list[str]:
        return [t.op(f"or i32 {so_far[0]}, {_flag(t, t.at(records, t.mul(row, rows.record_row_bytes)))}")]

    return t.op(f"icmp sge i32 {t.reduce_loop(n_rows, [('i32', '0')], both)[0]}, 0")


def _flag(t: Text, record: str) -> str:
    return t.op(f"load i32, ptr {t.at(record, LONG_AT)}, align 4")


def dot_symbol(w: BlockwiseProduct, rows: int, tail: bool) -> str:
    return f"{w.name}.dot{rows}{'.tail' if tail else ''}"


def dot_function(w: BlockwiseProduct, p: Plan, rows: int, tail: bool) -> tuple[str, dict[str, str]]:
    """The function for `rows` rows of digits and one panel."""
    t, isa = Text(), p.isa
    width = isa.n_f32_lanes
    vectors = -(-(w.n % w.lanes) // width) if tail else w.lanes // width
    dims = load_dims(t, p)
    kind = vector_type(isa)
    totals = t.reduce_loop(
        w.n_blocks,
        [(kind, "zeroinitializer")] * (rows * vectors),
        lambda i, c: _block(t, w, isa, i, rows, vectors, list(c)),
    )
    masks = [mask_text(t, isa, w.n % w.lanes - v * width) if tail else None for v in range(vectors)]
    store_rows(t, w, p, dims, [totals[r * vectors : (r + 1) * vectors] for r in range(rows)], masks)
    parameters = "ptr %args, ptr %digits, ptr %records, ptr %b, ptr %scales, ptr %shifts, ptr %out, i64 %n, i64 %m"
    head = f"define internal void @{dot_symbol(w, rows, tail)}({parameters}) noinline #0 {{"
    return "\n".join([head, "entry:", *t.lines, "}"]), t.declares


def _block(t: Text, w: BlockwiseProduct, isa: Isa, i: str, rows: int, vectors: int, totals: list[str]) -> list[str]:
    """One block added to the totals, with as many digits as its rows have."""
    layout = w.digit_rows
    if layout.few == layout.n_digits:
        return _sums(t, w, isa, i, rows, vectors, layout.few, totals)
    flag, kind = "0", vector_type(isa)
    for r in range(rows):
        record = t.at("%records", t.add(t.mul(i, RECORD_BYTES), r * layout.record_row_bytes))
        flag = t.op(f"or i32 {flag}, {_flag(t, record)}")
    few, many, done = t.label(), t.label(), t.label()
    t.branch(t.op(f"icmp sle i32 {flag}, 0"), few, many)
    ways = []
    for label, n_digits in ((few, layout.few), (many, layout.n_digits)):
        t.start(label)
        ways.append((_sums(t, w, isa, i, rows, vectors, n_digits, list(totals)), t.block))
        t.jump(done)
    t.start(done)
    (short, from_short), (long, from_long) = ways
    return [t.op(f"phi {kind} [ {x}, %{from_short} ], [ {y}, %{from_long} ]") for x, y in zip(short, long)]


def _sums(
    t: Text, w: BlockwiseProduct, isa: Isa, i: str, rows: int, vectors: int, digits_each: int, totals: list[str]
) -> list[str]:
    """One block of rows with so many digits added to the totals."""
    kind, wide, layout = vector_type(isa), vector_type(isa, "i32"), w.digit_rows
    left_out = 256.0 ** (layout.n_digits - digits_each)
    at, weights = Panel("%b", "%scales", "%shifts").block(t, w, i), Weights(w, isa)
    records = [t.at("%records", t.add(t.mul(i, RECORD_BYTES), r * layout.record_row_bytes)) for r in range(rows)]
    digits = t.at("%digits", t.mul(i, w.block))

    def number(r: int, offset: int, factor: float = 1.0) -> str:
        x = t.op(f"load float, ptr {t.at(records[r], offset)}, align 4")
        return splat(t, isa, x if factor == 1.0 else t.op(f"fmul float {x}, {factor}"), "float")

    starts = [
        splat(t, isa, t.op(f"load i32, ptr {t.at(records[r], 4 * d)}, align 4"), "i32")
        if w.center
        else "zeroinitializer"
        for r in range(rows)
        for d in range(digits_each)
    ]
    acc = [x for x in starts for _ in range(vectors)]
    n_words = w.block // w.steps
    for numbers, buffer in ((at.scales, w.scales), (at.shifts, w.shifts)):
        n_bytes = 0 if buffer is None else w.lanes * buffer.dtype.size_bytes
        for line in range(0, n_bytes, _LINE):
            t.fetch(t.at(numbers, -(-_FETCH_AHEAD // w.block_bytes) * n_bytes + line))

    def word(g: Int, acc: list[str]) -> list[str]:
        """A row of words times the digits of its steps."""
        row, places = t.at(at.b, t.mul(g, weights.group_bytes)), t.at(digits, t.mul(g, w.steps))
        for line in range(0, weights.group_bytes, _LINE):
            t.fetch(t.at(row, _FETCH_AHEAD + line), 2)
        halves = [_bytes(t, w, isa, weights.words(t, row, v)) for v in range(vectors)]
        for h in range(len(halves[0])):
            for r in range(rows):
                for d in range(digits_each):
                    place = t.at(places, (r * layout.n_digits + d) * layout.plane_bytes + 4 * h)
                    four = splat(t, isa, t.op(f"load i32, ptr {place}, align 4"), "i32")
                    for v in range(vectors):
                        k = (r * digits_each + d) * vectors + v
                        acc[k] = _dot(t, isa, acc[k], halves[v][h], four)
        return acc

    per_round = next(u for u in range(_MOST_UNROLLED, 0, -1) if n_words % u == 0)
    if n_words == per_round:
        for g in range(n_words):
            acc = word(g, acc)
    else:

        def several(g: str, carried: list[str]) -> list[str]:
            carried = list(carried)
            for u in range(per_round):
                carried = word(t.add(t.mul(g, per_round), u), carried)
            return carried

        acc = t.reduce_loop(n_words // per_round, [(wide, x) for x in acc], several)
    for v in range(vectors):
        scale, shift = weights.scale(t, at.scales, v), weights.shift(t, at.shifts, v)
        for r in range(rows):
            first = r * digits_each * vectors + v
            dots = [t.op(f"sitofp {wide} {acc[first + d * vectors]} to {kind}") for d in range(digits_each)]
            total = dots[0]
            for dot in dots[1:]:
                total = multiply_add(t, isa, total, "splat (float 256.0)", dot)
            k = r * vectors + v
            if w.shifts is not None and not w.shifts.dtype.is_float:
                total = multiply_add(t, isa, number(r, SUM_AT, 1 / left_out), shift, total)
            factor = t.op(f"fmul {kind} {scale}, {number(r, UNIT_AT, left_out)}")
            totals[k] = multiply_add(t, isa, total, factor, totals[k])
            if w.shifts is not None and w.shifts.dtype.is_float:
                totals[k] = multiply_add(t, isa, number(r, TOTAL_AT), shift, totals[k])
    return totals


def _bytes(t: Text, w: BlockwiseProduct, isa: Isa, words: str) -> list[str]:
    """Words as bytes: four steps in a row each."""
    if w.bits == 8:
        return [words]
    wide, low = vector_type(isa, "i32"), f"splat (i32 {0x0F0F0F0F})"
    upper = t.op(f"lshr {wide} {words}, splat (i32 4)")
    return [t.op(f"and {wide} {x}, {low}") for x in (words, upper)]


def _dot(t: Text, isa: Isa, acc: str, q: str, digits: str) -> str:
    name, wide = f"llvm.x86.avx512.vpdpbusd.{32 * isa.n_f32_lanes}", vector_type(isa, "i32")
    part = f"<{4 * isa.n_f32_lanes} x i8>"
    t.declare(name, f"{wide} @{name}({wide}, {part}, {part})")
    x, y = (t.op(f"bitcast {wide} {v} to {part}") for v in (q, digits))
    return t.op(f"call {wide} @{name}({wide} {acc}, {part} {x}, {part} {y})")
