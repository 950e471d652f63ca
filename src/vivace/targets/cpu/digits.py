"""The code of `Digits`: a unit is one row."""

from __future__ import annotations

from collections.abc import Sequence

from vivace.base.dtypes import DType
from vivace.base.machine import Isa
from vivace.loops.digits import LONG_AT, RECORD_BYTES, SUM_AT, TOTAL_AT, UNIT_AT, Digits
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.contraction_step import splat
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import vector_type
from vivace.targets.cpu.isa import kernel_attributes

_LEAST_BITS, _INFINITE = 40 << 23, 255 << 23  # as the bits of f32: 2**-87; 2**128
_MOST_SMALL = 8  # rule EVEN
_TOP = 127  # of the first digit


def emit_digits(s: Digits, isa: Isa) -> KernelCode:
    """The kernel."""
    t = Text()
    env: dict[str, Int] = {
        d: t.op(f"load i64, ptr {t.at('%args', 8 * (2 + i))}, align 8") for i, d in enumerate(s.dims)
    }
    a, digits = (t.op(f"load ptr, ptr {t.at('%args', 8 * i)}, align 8") for i in range(2))
    step, records = t.mul(t.dim(s.step, env), s.a.dtype.size_bytes), t.at(digits, s.layout.records_at(s.most))
    with t.loop("%begin", "%end") as row:
        record = t.at(records, t.mul(row, s.layout.record_row_bytes))
        good = _row(t, s, isa, t.at(a, t.mul(row, step)), t.at(digits, t.mul(row, s.layout.row_bytes)), record)
        there, absent = t.label(), t.label()
        t.branch(good, there, absent)
        t.start(absent)
        t.put(f"store i32 -1, ptr {t.at(record, LONG_AT)}, align 4")
        t.jump(there)
        t.start(there)
    t.put("ret void")
    head = f"define void @{s.name}(ptr %args, i64 %begin, i64 %end, ptr %scratch) #0 {{"
    text = "\n".join(
        [head, "entry:", *t.lines, "}", *t.declares.values(), f"attributes #0 = {{ {kernel_attributes(isa)} }}", ""]
    )
    return KernelCode(s.name, text, s.params, s.dims, s.units, 1, 0, "light")


def _row(t: Text, s: Digits, isa: Isa, a: str, digits: str, records: str) -> str:
    """The digits and records of one row; returns an i1 that tells whether they keep the rules."""
    whole, left = divmod(s.k, s.block)
    good = "true"
    if whole:
        (good,) = t.reduce_loop(
            whole,
            [("i1", good)],
            lambda i, c: [t.op(f"and i1 {c[0]}, {_block(t, s, isa, a, digits, records, i, s.block)}")],
        )
    if left:
        good = t.op(f"and i1 {good}, {_block(t, s, isa, a, digits, records, whole, left)}")
    return good


def _block(t: Text, s: Digits, isa: Isa, a: str, digits: str, records: str, i: Int, n_steps: int) -> str:
    width, n = isa.n_f32_lanes, s.layout.n_digits
    kind, wide, half = vector_type(isa), vector_type(isa, "i32"), f"<{2 * width} x i16>"
    source = t.at(a, t.mul(i, s.block * s.a.dtype.size_bytes))
    parts = range(0, s.block, width)
    values = [_load_a(t, s, isa, source, j, n_steps - j) for j in parts]
    most, sizes = "zeroinitializer", []
    t.declare(f"llvm.umax.v{width}i32", f"{wide} @llvm.umax.v{width}i32({wide}, {wide})")
    for x in values:
        size = t.op(f"and {wide} {t.op(f'bitcast {kind} {x} to {wide}')}, splat (i32 {0x7FFFFFFF})")
        most = t.op(f"call {wide} @llvm.umax.v{width}i32({wide} {most}, {wide} {size})")
        sizes.append(size)
    largest = _reduced(t, isa, "umax", most)
    below, above = t.op(f"icmp ult i32 {largest}, {_LEAST_BITS}"), t.op(f"icmp uge i32 {largest}, {_INFINITE}")
    is_small = t.op(f"and i1 {below}, {t.op(f'icmp ne i32 {largest}, 0')}")
    odd, is_long = t.op(f"or i1 {is_small}, {above}"), "false"
    if s.layout.few < n:
        is_long, uneven = (_is_uneven(t, isa, sizes, largest, s.layout.small_bits(x)) for x in (n - 1, n))
        odd = t.op(f"or i1 {odd}, {uneven}")
    good = t.op(f"xor i1 {odd}, true")
    unit, factor = _unit(t, n, t.op(f"select i1 {below}, i32 {127 << 23}, i32 {largest}"))
    factors = splat(t, isa, factor, "float")
    added, mask = (
        splat(t, isa, t.op(f"select i1 {is_long}, i32 {x}, i32 {y}"), "i32") for x, y in ((0, 128), (-1, -256))
    )
    pairs = ["zeroinitializer"] * 2  # sums of the even and of the odd bytes
    signs = sum(128 << 8 * i for i in range(n - 1))
    for j, x in zip(parts, values):
        v = _rounded(t, isa, t.op(f"fmul {kind} {x}, {factors}"))
        if s.layout.few < n:  # rounded to the digits before the last
            v = t.op(f"and {wide} {t.op(f'add {wide} {v}, {added}')}, {mask}")
        # Carried upwards, bytes of -128 to 127 are bytes of 0 to 255 less 128.
        moved = t.op(f"xor {wide} {t.op(f'add {wide} {v}, splat (i32 {signs})')}, splat (i32 {signs})")
        for d, plane in enumerate(_planes(t, isa, moved)[:n][::-1]):
            place = t.at(digits, t.add(t.mul(i, s.block), d * s.layout.plane_bytes + j))
            t.put(f"store {vector_type(isa, 'i8')} {plane}, ptr {place}, align 1")
        both = t.op(f"bitcast {wide} {moved} to {half}")
        low = t.op(f"ashr {half} {t.op(f'shl {half} {both}, splat (i16 8)')}, splat (i16 8)")
        high = t.op(f"ashr {half} {both}, splat (i16 8)")
        pairs = [t.op(f"add {half} {total}, {x}") for total, x in zip(pairs, (low, high))]
    totals = _totals(t, width, n, pairs)
    record = t.at(records, t.mul(i, RECORD_BYTES))
    t.put(f"store <4 x i32> {t.op(f'mul <4 x i32> {totals}, splat (i32 {-s.center})')}, ptr {record}, align 4")
    powers = ", ".join(f"float {float(256 ** (n - 1 - d)) if d < n else 0.0}" for d in range(4))
    terms = t.op(f"fmul <4 x float> {t.op(f'sitofp <4 x i32> {totals} to <4 x float>')}, <{powers}>")
    t.declare("llvm.vector.reduce.fadd.v4f32", "float @llvm.vector.reduce.fadd.v4f32(float, <4 x float>)")
    number = t.op(f"call reassoc float @llvm.vector.reduce.fadd.v4f32(float 0.0, <4 x float> {terms})")
    for offset, x in ((UNIT_AT, unit), (SUM_AT, number), (TOTAL_AT, t.op(f"fmul float {number}, {unit}"))):
        t.put(f"store float {x}, ptr {t.at(record, offset)}, align 4")
    t.put(f"store i32 {t.op(f'zext i1 {is_long} to i32')}, ptr {t.at(record, LONG_AT)}, align 4")
    return good


def _unit(t: Text, n: int, largest: str) -> tuple[str, str]:
    """The unit of a block whose largest magnitude has these bits, and one over it."""
    if n == 1:
        real = t.op(f"bitcast i32 {largest} to float")
        return t.op(f"fdiv float {real}, {float(_TOP)}"), t.op(f"fdiv float {float(_TOP)}, {real}")
    # A mantissa of 127 / 64 or more takes the next exponent, so that the first digit is at most 127.
    up = t.op(f"add i32 {largest}, {(128 - _TOP) << 17}")
    bits = t.op(f"sub i32 {t.op(f'and i32 {up}, {255 << 23}')}, {(8 * n - 2) << 23}")
    over = t.op(f"sub i32 {254 << 23}, {bits}")
    return t.op(f"bitcast i32 {bits} to float"), t.op(f"bitcast i32 {over} to float")


def _planes(t: Text, isa: Isa, words: str) -> list[str]:
    """The lowest bytes of all words, those above, and so on: first among four words, then by words."""
    width, wide = isa.n_f32_lanes, vector_type(isa, "i32")
    kind = f"<{4 * width} x i8>"
    fours = [16 * group + 4 * word + byte for group in range(width // 4) for byte in range(4) for word in range(4)]
    mixed = t.op(f"shufflevector {kind} {t.op(f'bitcast {wide} {words} to {kind}')}, {kind} poison, {_places(fours)}")
    order = [4 * group + byte for byte in range(4) for group in range(width // 4)]
    by_byte = t.op(f"bitcast {kind} {mixed} to {wide}")
    ordered = t.op(f"shufflevector {wide} {by_byte}, {wide} poison, {_places(order)}")
    whole = t.op(f"bitcast {wide} {ordered} to {kind}")
    ranges = [range(byte * width, (byte + 1) * width) for byte in range(4)]
    return [t.op(f"shufflevector {kind} {whole}, {kind} poison, {_places(x)}") for x in ranges]


def _totals(t: Text, width: int, n: int, pairs: list[str]) -> str:
    """The sum of each digit as <4 x i32>, of sums by pairs of bytes; 256 bytes of a digit fit into 16 bits."""
    words = [i for lane in range(width) for i in (2 * lane, 2 * lane + 1, 2 * (width + lane), 2 * (width + lane) + 1)]
    size = 2 * width
    kind = f"<{size} x i16>"
    ends = words[:size], words[size:]
    mixed = [t.op(f"shufflevector {kind} {pairs[0]}, {kind} {pairs[1]}, {_places(x)}") for x in ends]
    total = t.op(f"add {kind} {mixed[0]}, {mixed[1]}")
    while size > 4:
        size //= 2
        ends = list(range(size)), list(range(size, 2 * size))
        halves = [t.op(f"shufflevector {kind} {total}, {kind} poison, {_places(x)}") for x in ends]
        kind = f"<{size} x i16>"
        total = t.op(f"add {kind} {halves[0]}, {halves[1]}")
    order = [(0, 2, 1, 3)[byte] for byte in reversed(range(n))]
    numbers = t.op(f"sext <4 x i16> {total} to <4 x i32>")
    return t.op(f"shufflevector <4 x i32> {numbers}, <4 x i32> poison, {_places([*order, 3, 3, 3][:4])}")


def _places(indices: Sequence[int]) -> str:
    return f"<{len(indices)} x i32> <{', '.join(f'i32 {i}' for i in indices)}>"


def _is_uneven(t: Text, isa: Isa, sizes: list[str], largest: str, small_bits: int) -> str:
    """Whether too many elements, given as the bits of their magnitudes, are small (rule EVEN)."""
    least = splat(t, isa, t.op(f"sub i32 {largest}, {small_bits << 23}"), "i32")
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


def _load_a(t: Text, s: Digits, isa: Isa, source: str, at: int, left: int) -> str:
    """A vector of A as f32; elements beyond the last are 0 and not touched."""
    n, size = isa.n_f32_lanes, s.a.dtype.size_bytes
    if left <= 0:
        return "zeroinitializer"
    element = "float" if s.a.dtype is DType.f32 else "i16"
    pointer, narrow = t.at(source, at * size), f"<{n} x {element}>"
    if left >= n:
        x = t.op(f"load {narrow}, ptr {pointer}, align 1")
    else:
        x = "zeroinitializer"
        for lane in range(left):
            one = t.op(f"load {element}, ptr {t.at(pointer, lane * size)}, align 1")
            x = t.op(f"insertelement {narrow} {x}, {element} {one}, i64 {lane}")
    if s.a.dtype is DType.f32:
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
    kind, wide, n = vector_type(isa), vector_type(isa, "i32"), isa.n_f32_lanes
    name = f"llvm.lrint.v{n}i32.v{n}f32"
    t.declare(name, f"{wide} @{name}({kind})")
    return t.op(f"call {wide} @{name}({kind} {x})")
