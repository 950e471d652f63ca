"""Few rows of A against block-wise weights in integers: vpdpbusd reads the packed bytes as they are.

A block of a row becomes v * unit, where unit is the power of two for which |v| < 2**22, and v three signed digits of 8
bits: v = (d0 * 256 + d1) * 256 + d2. The products of q and each digit are summed in i32, exactly, and put together in
f32:

    sum over the block of a * q = unit * ((dot(d0, q) * 256 + dot(d1, q)) * 256 + dot(d2, q))

Error: an element of A is off by at most 2**-22 of the largest in its block and row. Sums of f32 lose as much in the
columns where the largest counts; where its weight is 0 they do not: with one element 10**4 times as large as the others
of its block the error was 1.6e-5 of sum(|a * w|), against 3e-6 in f32.

Rule FINITE: infinities and NaN have no digits, nor has a block whose unit would be no normal number. `prepare` finds
them, and the driver then takes the f32 way (`blockwise_floats.py`).

Scratch: for each row, three planes of digits [3][k], k filled up to whole blocks with zeros; then for each row and
block a record: what the three sums start from (-center * the sum of the digits), unit, the sums of v and of v * unit.
"""

from __future__ import annotations

from vivace.base.dtypes import DType
from vivace.base.machine import Isa
from vivace.loops.blockwise import BlockwiseProduct
from vivace.targets.cpu.blockwise_store import store_rows
from vivace.targets.cpu.blockwise_weights import Panel, Weights
from vivace.targets.cpu.contraction_plan import Plan, load_dims
from vivace.targets.cpu.contraction_step import multiply_add, splat
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import mask_text, vector_type

N_DIGITS = 3
RECORD_BYTES = 32
_UNIT, _SUM, _TOTAL = 12, 16, 20  # offsets in a record, behind the starts
_EXPONENT = 21  # the largest element of a block is v of 22 bits
_LEAST_BITS, _INFINITE = 40 << 23, 255 << 23  # as the bits of f32: 2**-87; 2**128
_FETCH_AHEAD = 4096  # bytes: what memory delivers in the time that it takes to answer, and some more
_LINE = 64
_LARGEST_BLOCK = 256  # the sum of v fits 32 bits
_MOST_UNROLLED = 4


def has_dot(w: BlockwiseProduct, isa: Isa) -> bool:
    """Whether the instruction set has the dot product, and blocks are whole vectors and not too long."""
    return (
        (isa.has("avx512_vnni") or isa.has("avx_vnni")) and w.block % isa.n_f32_lanes == 0 and w.block <= _LARGEST_BLOCK
    )


def fetch(t: Text, weights: str) -> None:
    """Asks for what a panel starts with, so that memory works while A is prepared."""
    for line in range(0, _FETCH_AHEAD, _LINE):
        t.fetch(t.at(weights, line))


def row_bytes(w: BlockwiseProduct) -> int:
    """Scratch for the digits of one row."""
    return N_DIGITS * w.n_blocks * w.block


def record_row_bytes(w: BlockwiseProduct) -> int:
    return w.n_blocks * RECORD_BYTES


def prepare(t: Text, w: BlockwiseProduct, p: Plan, a: str, digits: str, records: str) -> str:
    """The digits and records of one row; returns an i1 that tells whether it has them all (rule FINITE)."""
    whole, left = divmod(w.k, w.block)
    good = "true"
    if whole:
        (good,) = t.reduce_loop(
            whole,
            [("i1", good)],
            lambda i, c: [t.op(f"and i1 {c[0]}, {_prepare_block(t, w, p, a, digits, records, i, w.block)}")],
        )
    if left:
        good = t.op(f"and i1 {good}, {_prepare_block(t, w, p, a, digits, records, whole, left)}")
    return good


def _prepare_block(
    t: Text, w: BlockwiseProduct, p: Plan, a: str, digits: str, records: str, i: Int, n_steps: int
) -> str:
    isa, width = p.isa, p.isa.n_f32_lanes
    kind, wide = vector_type(isa), vector_type(isa, "i32")
    source = t.at(a, t.mul(i, w.block * w.a.dtype.size_bytes))
    parts = range(0, w.block, width)
    values = [_load_a(t, w, isa, source, j, n_steps - j) for j in parts]
    most = "zeroinitializer"
    t.declare(f"llvm.umax.v{width}i32", f"{wide} @llvm.umax.v{width}i32({wide}, {wide})")
    for x in values:
        size = t.op(f"and {wide} {t.op(f'bitcast {kind} {x} to {wide}')}, splat (i32 {0x7FFFFFFF})")
        most = t.op(f"call {wide} @llvm.umax.v{width}i32({wide} {most}, {wide} {size})")
    largest = _reduced(t, isa, "umax", most)
    below, above = t.op(f"icmp ult i32 {largest}, {_LEAST_BITS}"), t.op(f"icmp uge i32 {largest}, {_INFINITE}")
    is_small = t.op(f"and i1 {below}, {t.op(f'icmp ne i32 {largest}, 0')}")
    good = t.op(f"xor i1 {t.op(f'or i1 {is_small}, {above}')}, true")
    exponent = t.op(f"select i1 {below}, i32 {127 << 23}, i32 {t.op(f'and i32 {largest}, {255 << 23}')}")
    unit = t.op(f"sub i32 {exponent}, {_EXPONENT << 23}")  # 2**(e - 21)
    factor = t.op(f"bitcast i32 {t.op(f'sub i32 {254 << 23}, {unit}')} to float")  # 1 / unit
    factors = splat(t, isa, factor, "float")
    sums = ["zeroinitializer"] * (N_DIGITS + 1)
    for j, x in zip(parts, values):
        v = _rounded(t, isa, t.op(f"fmul {kind} {x}, {factors}"))
        sums[N_DIGITS] = t.op(f"add {wide} {sums[N_DIGITS]}, {v}")
        rest = v
        for d in reversed(range(N_DIGITS)):
            digit = t.op(f"ashr {wide} {t.op(f'shl {wide} {rest}, splat (i32 24)')}, splat (i32 24)")
            narrow = t.op(f"trunc {wide} {digit} to {vector_type(isa, 'i8')}")
            place = t.at(digits, t.add(t.mul(i, w.block), d * w.n_blocks * w.block + j))
            t.put(f"store {vector_type(isa, 'i8')} {narrow}, ptr {place}, align 1")
            sums[d] = t.op(f"add {wide} {sums[d]}, {digit}")
            if d:
                rest = t.op(f"ashr {wide} {t.op(f'sub {wide} {rest}, {digit}')}, splat (i32 8)")
    record = t.at(records, t.mul(i, RECORD_BYTES))
    for d in range(N_DIGITS):
        start = t.op(f"mul i32 {_reduced(t, isa, 'add', sums[d])}, {-w.center}") if w.center else "0"
        t.put(f"store i32 {start}, ptr {t.at(record, 4 * d)}, align 4")
    number = t.op(f"sitofp i32 {_reduced(t, isa, 'add', sums[N_DIGITS])} to float")
    real = t.op(f"bitcast i32 {unit} to float")
    for offset, x in ((_UNIT, real), (_SUM, number), (_TOTAL, t.op(f"fmul float {number}, {real}"))):
        t.put(f"store float {x}, ptr {t.at(record, offset)}, align 4")
    return good


def _load_a(t: Text, w: BlockwiseProduct, isa: Isa, source: str, at: int, left: int) -> str:
    """A vector of A as f32; elements beyond the last are 0 and not touched."""
    n, size = isa.n_f32_lanes, w.a.dtype.size_bytes
    if left <= 0:
        return "zeroinitializer"
    element = "float" if w.a.dtype is DType.f32 else "i16"
    pointer, narrow = t.at(source, at * size), f"<{n} x {element}>"
    if left >= n:
        x = t.op(f"load {narrow}, ptr {pointer}, align 1")
    else:
        x = "zeroinitializer"
        for lane in range(left):
            one = t.op(f"load {element}, ptr {t.at(pointer, lane * size)}, align 1")
            x = t.op(f"insertelement {narrow} {x}, {element} {one}, i64 {lane}")
    if w.a.dtype is DType.f32:
        return x
    wide = vector_type(isa, "i32")
    upper = t.op(f"shl {wide} {t.op(f'zext {narrow} {x} to {wide}')}, splat (i32 16)")
    return t.op(f"bitcast {wide} {upper} to {vector_type(isa)}")


def _reduced(t: Text, isa: Isa, fn: str, x: str) -> str:
    name, wide = f"llvm.vector.reduce.{fn}.v{isa.n_f32_lanes}i32", vector_type(isa, "i32")
    t.declare(name, f"i32 @{name}({wide})")
    return t.op(f"call i32 @{name}({wide} {x})")


def _rounded(t: Text, isa: Isa, x: str) -> str:
    """To the nearest integer: added to 1.5 * 2**23, its last places are those of the mantissa."""
    kind, wide = vector_type(isa), vector_type(isa, "i32")
    moved = t.op(f"fadd {kind} {x}, splat (float {float(3 << 22)})")
    return t.op(f"sub {wide} {t.op(f'bitcast {kind} {moved} to {wide}')}, splat (i32 {0x4B400000})")


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
    """One block added to the totals."""
    kind, wide = vector_type(isa), vector_type(isa, "i32")
    at, weights = Panel("%b", "%scales", "%shifts").block(t, w, i), Weights(w, isa)
    records = [t.at("%records", t.add(t.mul(i, RECORD_BYTES), r * record_row_bytes(w))) for r in range(rows)]
    digits = t.at("%digits", t.mul(i, w.block))

    def number(r: int, offset: int) -> str:
        return splat(t, isa, t.op(f"load float, ptr {t.at(records[r], offset)}, align 4"), "float")

    starts = [
        splat(t, isa, t.op(f"load i32, ptr {t.at(records[r], 4 * d)}, align 4"), "i32")
        if w.center
        else "zeroinitializer"
        for r in range(rows)
        for d in range(N_DIGITS)
    ]
    acc = [x for x in starts for _ in range(vectors)]
    n_words = w.block // w.steps
    for line in range(0, w.block_bytes, _LINE):
        t.fetch(t.at(at.b, _FETCH_AHEAD + line))

    def word(g: Int, acc: list[str]) -> list[str]:
        """A row of words times the digits of its steps."""
        row, places = t.at(at.b, t.mul(g, weights.group_bytes)), t.at(digits, t.mul(g, w.steps))
        halves = [_bytes(t, w, isa, weights.words(t, row, v)) for v in range(vectors)]
        for h in range(len(halves[0])):
            for r in range(rows):
                for d in range(N_DIGITS):
                    place = t.at(places, (r * N_DIGITS + d) * w.n_blocks * w.block + 4 * h)
                    four = splat(t, isa, t.op(f"load i32, ptr {place}, align 4"), "i32")
                    for v in range(vectors):
                        k = (r * N_DIGITS + d) * vectors + v
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
            dots = [t.op(f"sitofp {wide} {acc[(r * N_DIGITS + d) * vectors + v]} to {kind}") for d in range(N_DIGITS)]
            total = multiply_add(t, isa, dots[0], "splat (float 256.0)", dots[1])
            total = multiply_add(t, isa, total, "splat (float 256.0)", dots[2])
            k = r * vectors + v
            if w.shifts is not None and not w.shifts.dtype.is_float:
                total = multiply_add(t, isa, number(r, _SUM), shift, total)
            factor = t.op(f"fmul {kind} {scale}, {number(r, _UNIT)}")
            totals[k] = multiply_add(t, isa, total, factor, totals[k])
            if w.shifts is not None and w.shifts.dtype.is_float:
                totals[k] = multiply_add(t, isa, number(r, _TOTAL), shift, totals[k])
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
