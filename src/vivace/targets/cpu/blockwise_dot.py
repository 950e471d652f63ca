"""Few rows of A against block-wise weights in integers: vpdpbusd reads the packed bytes as they are.

A block of a row becomes v * unit, where unit is a power of two and v signed digits of 8 bits: four for f32, so that
|v| < 2**30, and three for bf16, |v| < 2**22. The products of q and each digit are summed in i32, exactly, and put
together in f32:

    v = (d0 * 256 + d1) * 256 + ..
    sum over the block of a * q = unit * ((dot(d0, q) * 256 + dot(d1, q)) * 256 + ..)

Error: an element of A is off by at most 2**-30 of the largest in its block and row (2**-22 where A is bf16, whose
elements are themselves off by 2**-9). That shows only in columns where the largest elements meet weights of 0.

Rules:
* FINITE: infinities and NaN have no digits, nor has a block whose unit would be no normal number.
* EVEN: of the elements of a block that are not 0, at most one in eight is 2**-14 of the largest or smaller. With
  elements 10**6 times as large as the others of their blocks, and weights of 0 for them, the error would be 7e-5 of
  sum(|a * w|); f32 sums lose 1e-6.

`prepare` finds the rows that break them, and the driver then takes the f32 way (`blockwise_floats.py`).

Scratch: for each row, planes of digits [digit][k], k filled up to whole blocks with zeros; then for each row and block
a record: what the sums start from (-center * the sum of the digits), unit, the sums of v and of v * unit.
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

RECORD_BYTES = 32
_UNIT, _SUM, _TOTAL = 16, 20, 24  # offsets in a record, behind the starts
_LEAST_BITS, _INFINITE = 40 << 23, 255 << 23  # as the bits of f32: 2**-87; 2**128
_FETCH_AHEAD = 4096  # bytes: what memory delivers in the time that it takes to answer, and some more
_LINE = 64
_SMALL, _MOST_SMALL = 14, 8  # rule EVEN
_LARGEST_BLOCK = 256  # sums of digits times q are exact in f32
_MOST_UNROLLED = 4


def has_dot(w: BlockwiseProduct, isa: Isa) -> bool:
    """Whether the instruction set has the dot product, and blocks are whole vectors and not too long."""
    return (
        (isa.has("avx512_vnni") or isa.has("avx_vnni")) and w.block % isa.n_f32_lanes == 0 and w.block <= _LARGEST_BLOCK
    )


def n_digits(w: BlockwiseProduct) -> int:
    return 4 if w.a.dtype is DType.f32 else 3


def fetch(t: Text, weights: str) -> None:
    """Asks for what a panel starts with, so that memory works while A is prepared."""
    for line in range(0, _FETCH_AHEAD, _LINE):
        t.fetch(t.at(weights, line))


def row_bytes(w: BlockwiseProduct) -> int:
    """Scratch for the digits of one row."""
    return n_digits(w) * w.n_blocks * w.block


def record_row_bytes(w: BlockwiseProduct) -> int:
    return w.n_blocks * RECORD_BYTES


def prepare(t: Text, w: BlockwiseProduct, p: Plan, a: str, digits: str, records: str) -> str:
    """The digits and records of one row; returns an i1 that tells whether it may have them."""
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
    isa, width, digits_each = p.isa, p.isa.n_f32_lanes, n_digits(w)
    most_bit = 8 * digits_each - 3  # the largest element of a block has it in v
    kind, wide = vector_type(isa), vector_type(isa, "i32")
    source = t.at(a, t.mul(i, w.block * w.a.dtype.size_bytes))
    parts = range(0, w.block, width)
    values = [_load_a(t, w, isa, source, j, n_steps - j) for j in parts]
    most, sizes = "zeroinitializer", []
    t.declare(f"llvm.umax.v{width}i32", f"{wide} @llvm.umax.v{width}i32({wide}, {wide})")
    for x in values:
        size = t.op(f"and {wide} {t.op(f'bitcast {kind} {x} to {wide}')}, splat (i32 {0x7FFFFFFF})")
        most = t.op(f"call {wide} @llvm.umax.v{width}i32({wide} {most}, {wide} {size})")
        sizes.append(size)
    largest = _reduced(t, isa, "umax", most)
    below, above = t.op(f"icmp ult i32 {largest}, {_LEAST_BITS}"), t.op(f"icmp uge i32 {largest}, {_INFINITE}")
    is_small = t.op(f"and i1 {below}, {t.op(f'icmp ne i32 {largest}, 0')}")
    odd = t.op(f"or i1 {t.op(f'or i1 {is_small}, {above}')}, {_is_uneven(t, isa, sizes, largest)}")
    good = t.op(f"xor i1 {odd}, true")
    exponent = t.op(f"select i1 {below}, i32 {127 << 23}, i32 {t.op(f'and i32 {largest}, {255 << 23}')}")
    unit = t.op(f"sub i32 {exponent}, {most_bit << 23}")  # 2**(e - most_bit)
    factor = t.op(f"bitcast i32 {t.op(f'sub i32 {254 << 23}, {unit}')} to float")  # 1 / unit
    factors = splat(t, isa, factor, "float")
    sums = ["zeroinitializer"] * digits_each
    for j, x in zip(parts, values):
        v = _rounded(t, isa, t.op(f"fmul {kind} {x}, {factors}"))
        rest = v
        for d in reversed(range(digits_each)):
            digit = t.op(f"ashr {wide} {t.op(f'shl {wide} {rest}, splat (i32 24)')}, splat (i32 24)")
            narrow = t.op(f"trunc {wide} {digit} to {vector_type(isa, 'i8')}")
            place = t.at(digits, t.add(t.mul(i, w.block), d * w.n_blocks * w.block + j))
            t.put(f"store {vector_type(isa, 'i8')} {narrow}, ptr {place}, align 1")
            sums[d] = t.op(f"add {wide} {sums[d]}, {digit}")
            if d:
                rest = t.op(f"ashr {wide} {t.op(f'sub {wide} {rest}, {digit}')}, splat (i32 8)")
    record = t.at(records, t.mul(i, RECORD_BYTES))
    number = "0.0"
    for d in range(digits_each):
        total = _reduced(t, isa, "add", sums[d])
        start = t.op(f"mul i32 {total}, {-w.center}") if w.center else "0"
        t.put(f"store i32 {start}, ptr {t.at(record, 4 * d)}, align 4")
        shifted = t.op(f"fmul float {number}, 256.0")
        number = t.op(f"fadd float {shifted}, {t.op(f'sitofp i32 {total} to float')}")
    real = t.op(f"bitcast i32 {unit} to float")
    for offset, x in ((_UNIT, real), (_SUM, number), (_TOTAL, t.op(f"fmul float {number}, {real}"))):
        t.put(f"store float {x}, ptr {t.at(record, offset)}, align 4")
    return good


def _is_uneven(t: Text, isa: Isa, sizes: list[str], largest: str) -> str:
    """Whether too many elements, given as the bits of their magnitudes, are small (rule EVEN)."""
    least = splat(t, isa, t.op(f"sub i32 {largest}, {_SMALL << 23}"), "i32")
    n_other = _counted(t, isa, [("ne", x, "zeroinitializer") for x in sizes])
    n_large = _counted(t, isa, [("ugt", x, least) for x in sizes])
    n_small = t.op(f"sub i32 {n_other}, {n_large}")
    return t.op(f"icmp sgt i32 {t.op(f'mul i32 {n_small}, {_MOST_SMALL}')}, {n_other}")


def _counted(t: Text, isa: Isa, comparisons: list[tuple[str, str, str]]) -> str:
    """How many lanes of all comparisons hold."""
    n, wide = isa.n_f32_lanes, vector_type(isa, "i32")
    t.declare(f"llvm.ctpop.i{n}", f"i{n} @llvm.ctpop.i{n}(i{n})")
    total = "0"
    for condition, x, y in comparisons:
        lanes = t.op(f"bitcast <{n} x i1> {t.op(f'icmp {condition} {wide} {x}, {y}')} to i{n}")
        count = t.op(f"call i{n} @llvm.ctpop.i{n}(i{n} {lanes})")
        total = t.op(f"add i32 {total}, {t.op(f'zext i{n} {count} to i32')}")
    return total


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
    """To the nearest integer."""
    kind, n = vector_type(isa), isa.n_f32_lanes
    t.declare(f"llvm.roundeven.v{n}f32", f"{kind} @llvm.roundeven.v{n}f32({kind})")
    whole = t.op(f"call {kind} @llvm.roundeven.v{n}f32({kind} {x})")
    return t.op(f"fptosi {kind} {whole} to {vector_type(isa, 'i32')}")


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
    kind, wide, digits_each = vector_type(isa), vector_type(isa, "i32"), n_digits(w)
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
        for d in range(digits_each)
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
                for d in range(digits_each):
                    place = t.at(places, (r * digits_each + d) * w.n_blocks * w.block + 4 * h)
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
