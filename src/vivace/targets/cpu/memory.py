"""Loads and stores of typed elements: contiguous, broadcast, strided and gathered, with masks, never outside the
buffer.

A vector access is planned from what one lane adds to the address: 0 is one scalar access, 1 a vector access, -1 a
reversed one, 2 to 4 whole vectors and shuffles, everything else a gather or scatter. Conditions that are equal in all
lanes redirect a load to a block of fill values, which needs no branch and no mask; conditions that vary become the mask
of the access.

Elements in memory and in registers: f16, bf16 and narrower floats are computed in f32; bool is a byte in memory and i1
in registers.
"""

from __future__ import annotations

import numpy as np

from vivace.base.dims import Dim, bounds
from vivace.base.dtypes import NARROW_FLOATS, DType
from vivace.base.errors import UnsupportedError
from vivace.loops.kernel import Buffer, Inside, Load
from vivace.targets.cpu.builder import Builder, Value, literal, type_bits, type_text
from vivace.targets.cpu.env import Env, as_vector, is_uniform, lane_stride, per_lane, scalar, sorted_terms
from vivace.targets.cpu.narrow_floats import narrowed, widened
from vivace.targets.cpu.shuffles import every_nth

_MEMORY = {
    DType.f32: "float", DType.f64: "double", DType.f16: "i16", DType.bf16: "i16", DType.bool: "i8",
    DType.i8: "i8", DType.u8: "i8", DType.i4: "i8", DType.u4: "i8", DType.i16: "i16", DType.u16: "i16",
    DType.i32: "i32", DType.u32: "i32", DType.i64: "i64", DType.u64: "i64",
} | dict.fromkeys(NARROW_FLOATS, "i8")  # fmt: skip
_REGISTER = _MEMORY | dict.fromkeys((DType.f16, DType.bf16, *NARROW_FLOATS), "float") | {DType.bool: "i1"}
_FILL_BYTES = 1024
_NEAR = 4  # strides up to this are read as whole vectors: a gather costs more than so many loads and shuffles


def memory_type(t: DType) -> str:
    """The LLVM type of an element in a buffer, of any type but strings."""
    return _MEMORY[t]


def register_type(t: DType) -> str:
    """The LLVM type that an element is computed in."""
    return _REGISTER[t]


def from_memory(b: Builder, v: Value, t: DType) -> Value:
    """The element as it is computed with."""
    if t is DType.bf16:
        return b.bitcast(b.op("shl", b.convert("zext", v, "i32"), literal(16, "i32")), "float")
    if t is DType.f16:
        return _half_to_float(b, v)
    if t in NARROW_FLOATS:
        return widened(b, v, t)
    if t is DType.bool:
        return b.compare("icmp ne", v, literal(0, "i8"))
    return four_bits(b, v, t) if t in (DType.i4, DType.u4) else v


def four_bits(b: Builder, v: Value, t: DType) -> Value:
    """A byte whose low four bits are an i4 or u4, as the number: what memory and numbers that wrap have above them
    does not count."""
    four = literal(4, v.type)
    return b.op("ashr" if t.is_signed else "lshr", b.op("shl", v, four), four)


def to_memory(b: Builder, v: Value, t: DType) -> Value:
    """The element as it is stored, rounded to nearest even; AVX512-BF16 takes denormals as 0."""
    if t is DType.bf16:
        if b.isa.has("avx512_bf16") and v.lanes in (4, 8, 16):
            half = b.inst(f"fptrunc {v} to <{v.lanes} x bfloat>", "half", v.lanes, v)
            return b.inst(f"bitcast <{v.lanes} x bfloat> {half.text} to <{v.lanes} x i16>", "i16", v.lanes, half)
        if b.isa.has("avx512_bf16") and b.isa.vector_bits == 512 and v.lanes in (32, 64):
            return b.per_part(32, lambda part: _pair_to_halves(b, part), v)
        bits = b.bitcast(v, "i32")
        odd = b.op("and", b.op("lshr", bits, literal(16, "i32")), literal(1, "i32"))
        rounded = b.op("add", bits, b.op("add", odd, literal(0x7FFF, "i32")))
        quiet = b.op("or", bits, literal(0x400000, "i32"))
        bits = b.select(b.compare("fcmp uno", v, v), quiet, rounded)
        return b.convert("trunc", b.op("lshr", bits, literal(16, "i32")), "i16")
    if t is DType.f16:
        return _float_to_half(b, v)
    if t in NARROW_FLOATS:
        return narrowed(b, v, t)
    if t in (DType.i4, DType.u4):
        return b.op("and", v, literal(15, v.type))  # as NumPy's types have them
    return b.convert("zext", v, "i8") if t is DType.bool else v


def _pair_to_halves(b: Builder, v: Value) -> Value:
    """32 lanes as bf16 by one instruction."""
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    b.declare(f"<32 x bfloat> @{name}(<16 x float>, <16 x float>)", name)
    low, high = b.part(v, 0, 16), b.part(v, 16, 16)
    half = b.inst(f"call <32 x bfloat> @{name}({high}, {low})", "bfloat", 32, high, low)
    return b.inst(f"bitcast {half.full} {half.text} to <32 x i16>", "i16", 32, half)


def _half_to_float(b: Builder, v: Value) -> Value:
    if "+f16c" in b.isa.features:
        return b.convert("fpext", b.bitcast(v, "half"), "float")
    # Shift exponent and mantissa into place and rescale by 2**112: exact for normals and denormals alike.
    wide = b.convert("zext", v, "i32")
    sign = b.op("shl", b.op("and", wide, literal(0x8000, "i32")), literal(16, "i32"))
    magnitude = b.op("shl", b.op("and", wide, literal(0x7FFF, "i32")), literal(13, "i32"))
    number = b.bitcast(b.op("fmul", b.bitcast(magnitude, "float"), literal(2.0**112, "float")), "i32")
    special = b.compare("icmp ugt", magnitude, literal(0xF7FFFFF, "i32"))
    number = b.select(special, b.op("or", magnitude, literal(0x7F800000, "i32")), number)
    return b.bitcast(b.op("or", number, sign), "float")


def _float_to_half(b: Builder, v: Value) -> Value:
    if "+f16c" in b.isa.features:
        return _float_to_half_by_instruction(b, v)
    bits = b.bitcast(v, "i32")
    sign = b.op("and", b.op("lshr", bits, literal(16, "i32")), literal(0x8000, "i32"))
    x = b.op("and", bits, literal(0x7FFFFFFF, "i32"))
    # Normal results: rebias, then round to nearest even on the 13 bits that go.
    odd = b.op("and", b.op("lshr", x, literal(13, "i32")), literal(1, "i32"))
    normal = b.op("lshr", b.op("add", b.op("add", x, literal(0xFFF - (112 << 23), "i32")), odd), literal(13, "i32"))
    # Denormal results: adding 0.5 lets the addition do the rounding.
    half = literal(0.5, "float")
    denormal = b.op("sub", b.bitcast(b.op("fadd", b.bitcast(x, "float"), half), "i32"), literal(0x3F000000, "i32"))
    result = b.select(b.compare("icmp ult", x, literal(0x38800000, "i32")), denormal, normal)
    result = b.select(b.compare("icmp uge", x, literal(0x477FF000, "i32")), literal(0x7C00, "i32"), result)
    result = b.select(b.compare("icmp ugt", x, literal(0x7F800000, "i32")), literal(0x7E00, "i32"), result)
    return b.convert("trunc", b.op("or", result, sign), "i16")


def _float_to_half_by_instruction(b: Builder, v: Value) -> Value:
    """By name: LLVM makes a `fptrunc` that follows one from f64 a single conversion, and that is a call."""
    lanes, width = v.lanes, min(max(v.lanes, 4), b.isa.vector_bits // 32)
    if lanes < 4:
        full = f"<{max(lanes, 1)} x float>"
        if not lanes:
            v = b.inst(f"insertelement {full} poison, {v}, i64 0", "float", 1, v)
        order = ", ".join(f"i32 {k % max(lanes, 1)}" for k in range(4))
        v = b.inst(f"shufflevector {v}, {full} poison, <4 x i32> <{order}>", "float", 4, v)
    out = max(width, 8)
    name = "llvm.x86.avx512.mask.vcvtps2ph.512" if width == 16 else f"llvm.x86.vcvtps2ph.{width * 32}"
    extra = (f", <{out} x i16>", ", i16") if width == 16 else ("", "")
    b.declare(f"<{out} x i16> @{name}(<{width} x float>, i32{''.join(extra)})", name)

    def one(x: Value) -> Value:
        rest = f", <{out} x i16> poison, i16 -1" if width == 16 else ""
        half = b.inst(f"call <{out} x i16> @{name}({x}, i32 0{rest})", "i16", out, x)
        return b.part(half, 0, width) if out > width else half

    half = b.per_part(width, one, v)
    if lanes >= 4:
        return half
    return b.part(half, 0, lanes) if lanes else b.inst(f"extractelement {half}, i64 0", "i16", 0, half)


def flat_index(buffer: Buffer, index: tuple[Dim, ...]) -> Dim:
    """The address in elements: the dot product of index and strides (rule FLAT)."""
    total: Dim = 0
    for i, s in zip(index, buffer.strides, strict=True):
        total = total + i * s
    return total


def pointer(env: Env, buffer: Buffer, flat: Dim) -> Value:
    """The address of an element (of the first lane), built outermost part first."""
    b = env.b
    p, t = env.buffers[buffer], memory_type(buffer.dtype)
    pending: list[tuple[int, Value]] = sorted_terms(env, flat)
    while pending:
        level = pending[0][0]
        offset = literal(0, "i64")
        while pending and pending[0][0] == level:
            offset = b.iadd(offset, pending.pop(0)[1])
        if offset.const != 0:
            p = b.inst(f"getelementptr {t}, {p}, {offset}", "ptr", 0, p, offset)
    return p


def _at_least(d: Dim, n: int) -> bool:
    lo = bounds(d)[0]
    return lo is not None and lo >= n


def _conditions(env: Env, inside: tuple[Inside, ...]) -> tuple[Value | None, Value | None]:
    """The part of the conditions that is equal in all lanes (i1), and the part that varies (a mask)."""
    b = env.b
    uniform: Value | None = None
    varying: Value | None = None
    for c in inside:
        low_known, high_known = _at_least(c.dim - c.lo, 0), _at_least(c.hi - c.dim, 1)
        if low_known and high_known:
            continue
        if is_uniform(env, c.dim) and is_uniform(env, c.lo) and is_uniform(env, c.hi):
            test = b.compare("icmp ult", scalar(env, c.dim - c.lo), scalar(env, c.hi - c.lo))
            # An empty range has hi - lo < 0, which is huge as an unsigned number.
            if not _at_least(c.hi - c.lo, 0):
                test = b.op("and", test, b.compare("icmp sgt", scalar(env, c.hi - c.lo), literal(0, "i64")))
            uniform = test if uniform is None else b.op("and", uniform, test)
            continue
        x = per_lane(env, c.dim)
        for known, limit, opcode in ((low_known, c.lo, "sge"), (high_known, c.hi, "slt")):
            if known:
                continue
            if x.vector is not None and x.vector.type == "i32" and is_uniform(env, limit):
                gap = b.op("sub nsw", scalar(env, limit), x.base)
                gap = b.call("llvm.smin", b.call("llvm.smax", gap, literal(-(1 << 30), "i64")), literal(1 << 30, "i64"))
                test = b.compare(f"icmp {opcode}", x.vector, b.convert("trunc", gap, "i32"))
            else:
                test = b.compare(f"icmp {opcode}", as_vector(env, x), as_vector(env, per_lane(env, limit)))
            varying = test if varying is None else b.op("and", varying, test)
    return uniform, varying


def _fill(t: DType, fill: int | float) -> Value:
    """What takes the place of an element outside, as it would stand in memory."""
    kind = memory_type(t)
    if t in (DType.f16, DType.bf16):
        fill = int(np.asarray(fill).astype(t.numpy).view(np.uint16))
    return literal(fill, kind)


def _fill_block(env: Env, fill: Value) -> Value:
    """The address of memory full of the same element, long enough for any vector."""
    if fill.const == 0 and not fill.text.startswith("0x8"):
        return env.b.global_constant("zeros", f"[{_FILL_BYTES} x i8] zeroinitializer")
    name = f"fill_{fill.type}_{fill.text.replace('-', 'm')}"
    count = _FILL_BYTES // (fill.bits // 8)
    return env.b.global_constant(name, f"[{count} x {fill.type}] [{', '.join([f'{fill.type} {fill.text}'] * count)}]")


def load(env: Env, e: Load) -> Value:
    """The element, or the fill where a condition fails; a vector if the index varies over the lanes."""
    b, buffer, t = env.b, e.buffer, memory_type(e.buffer.dtype)
    flat, fill = flat_index(buffer, e.index), _fill(buffer.dtype, e.fill)
    uniform, varying = _conditions(env, e.inside)
    stride = lane_stride(env, flat) if env.lane is not None else 0
    if stride == 0:
        return _load_scalar(env, buffer, flat, fill, uniform, varying)
    mask = env.mask
    if varying is not None:
        mask = varying if mask is None else b.op("and", mask, varying)
    if stride in (1, -1):
        p = pointer(env, buffer, flat if stride == 1 else flat - (env.lanes - 1))
        if uniform is not None:
            p = b.select(uniform, p, _fill_block(env, fill))
        v = _read(env, buffer, p, t, env.lanes, mask if stride == 1 or mask is None else _reverse(env, mask), fill)
        v = v if stride == 1 else _reverse(env, v)
    elif isinstance(stride, int) and 1 < stride <= _NEAR and mask is None and uniform is None and fill.bits == 32:
        v = _read_strided(env, buffer, flat, t, stride)
    else:
        if uniform is not None:
            mask = b.widen(uniform, env.lanes) if mask is None else b.op("and", mask, uniform)
        v = _gather(env, buffer, flat, t, mask, fill)
    return from_memory(b, v, buffer.dtype)


def _read_strided(env: Env, buffer: Buffer, flat: Dim, t: str, stride: int) -> Value:
    """Every second, third or fourth element: whole vectors, the last ending with the last element that is wanted."""
    n = env.lanes
    vectors = [_read(env, buffer, pointer(env, buffer, flat + k * n), t, n) for k in range(stride - 1)]
    vectors.append(_read(env, buffer, pointer(env, buffer, flat + (stride - 1) * (n - 1)), t, n))
    late = (stride - 1) * n  # from here on elements stand in the last vector, which is `stride - 1` early
    positions = [k * stride + (stride - 1 if k * stride >= late else 0) for k in range(n)]
    return every_nth(env.b, vectors, positions)


def _load_scalar(
    env: Env, buffer: Buffer, flat: Dim, fill: Value, uniform: Value | None, varying: Value | None
) -> Value:
    """An element that is the same in all lanes, but not needed or not inside in some."""
    b = env.b
    p = pointer(env, buffer, flat)
    if varying is not None and env.lanes:
        # Some lane is inside or none is: the address is only good in the first case.
        some = _any(env, varying if env.mask is None else b.op("and", varying, env.mask))
        uniform = some if uniform is None else b.op("and", uniform, some)
    if uniform is not None:
        p = b.select(uniform, p, _fill_block(env, fill))
    v = from_memory(b, _read(env, buffer, p, fill.type, 0), buffer.dtype)
    return v if varying is None else b.select(varying, v, from_memory(b, fill, buffer.dtype))


def _any(env: Env, mask: Value) -> Value:
    return env.b.call("llvm.vector.reduce.or", env.b.widen(mask, env.lanes), t="i1")


def _reverse(env: Env, v: Value) -> Value:
    order = ", ".join(f"i32 {k}" for k in reversed(range(v.lanes)))
    return env.b.inst(f"shufflevector {v}, {v.full} poison, <{v.lanes} x i32> <{order}>", v.type, v.lanes, v)


def _read(
    env: Env, buffer: Buffer, p: Value, t: str, lanes: int, mask: Value | None = None, fill: Value | None = None
) -> Value:
    b = env.b
    align = type_bits(t) // 8
    full = type_text(t, lanes)
    operands: tuple[Value, ...] = (p,)
    if mask is None or not lanes:
        text = f"load {full}, {p}, align {align}"
    else:
        mask = b.widen(mask, lanes)
        assert fill is not None
        name = f"llvm.masked.load.v{lanes}{ {'float': 'f32', 'double': 'f64'}.get(t, t) }.p0"
        b.declare(f"{full} @{name}(ptr, <{lanes} x i1>, {full})", name)
        text = f"call {full} @{name}(ptr align {align} {p.text}, {mask}, {b.widen(fill, lanes)})"
        operands = (p, mask)
    if buffer in env.invariant:
        return b.hoisted(text + (", !invariant.load !0" if mask is None or not lanes else ""), t, lanes, *operands)
    return b.effect(text, t, lanes)


def _lane_pointers(env: Env, buffer: Buffer, flat: Dim) -> Value:
    b, t = env.b, memory_type(buffer.dtype)
    x = per_lane(env, flat)
    assert x.vector is not None
    base = env.buffers[buffer]
    if x.base.const != 0:
        base = b.inst(f"getelementptr {t}, {base}, {x.base}", "ptr", 0, base, x.base)
    return b.inst(f"getelementptr {t}, {base}, {x.vector}", "ptr", env.lanes, base, x.vector)


def _gather(env: Env, buffer: Buffer, flat: Dim, t: str, mask: Value | None, fill: Value) -> Value:
    b, n = env.b, env.lanes
    pointers = _lane_pointers(env, buffer, flat)
    mask = b.widen(mask if mask is not None else literal(True, "i1"), n)
    full = type_text(t, n)
    name = f"llvm.masked.gather.v{n}{ {'float': 'f32', 'double': 'f64'}.get(t, t) }.v{n}p0"
    b.declare(f"{full} @{name}(<{n} x ptr>, <{n} x i1>, {full})", name)
    pointer_text = f"<{n} x ptr> align {type_bits(t) // 8} {pointers.text}"
    text = f"call {full} @{name}({pointer_text}, {mask}, {b.widen(fill, n)})"
    if buffer in env.invariant:
        return b.hoisted(text, t, n, pointers, mask)
    return b.effect(text, t, n)


def _write(env: Env, p: Value, value: Value, mask: Value | None, align: int) -> None:
    b, n = env.b, value.lanes
    if mask is None:
        b.effect(f"store {value}, {p}, align {align}")
        return
    name = f"llvm.masked.store.v{n}{ {'float': 'f32', 'double': 'f64'}.get(value.type, value.type) }.p0"
    b.declare(f"void @{name}({value.full}, ptr, <{n} x i1>)", name)
    b.effect(f"call void @{name}({value}, ptr align {align} {p.text}, {mask})")


def write_vector(env: Env, buffer: Buffer, flat: Dim, value: Value, mask: Value | None) -> None:
    """Write consecutive elements from address `flat` on, whose lanes need not be those of the context."""
    value = to_memory(env.b, value, buffer.dtype)
    _write(env, pointer(env, buffer, flat), value, mask, value.bits // 8)


def fetch(env: Env, buffer: Buffer, index: tuple[Dim, ...], level: int) -> None:
    """Ask for the cache line of an element, of the first of several lanes."""
    where = pointer(env, buffer, flat_index(buffer, index))
    env.b.declare("void @llvm.prefetch.p0(ptr, i32, i32, i32)", "llvm.prefetch.p0")
    env.b.effect(f"call void @llvm.prefetch.p0({where}, i32 0, i32 {4 - level}, i32 1)")


def store(env: Env, buffer: Buffer, index: tuple[Dim, ...], value: Value) -> None:
    """Write the element, in all lanes of the mask."""
    b, t = env.b, memory_type(buffer.dtype)
    flat = flat_index(buffer, index)
    value = to_memory(b, value, buffer.dtype)
    align = type_bits(t) // 8
    if env.lane is None:
        b.effect(f"store {value}, {pointer(env, buffer, flat)}, align {align}")
        return
    value = b.widen(value, env.lanes)
    stride, n, mask = lane_stride(env, flat), env.lanes, env.mask
    if stride in (1, -1):
        p = pointer(env, buffer, flat if stride == 1 else flat - (n - 1))
        if stride == -1:
            value, mask = _reverse(env, value), None if mask is None else _reverse(env, mask)
        _write(env, p, value, mask, align)
        return
    if stride == 0:
        raise UnsupportedError(f"all lanes of {env.lane} store to one element of {buffer}", where=b.name)
    pointers = _lane_pointers(env, buffer, flat)
    mask = b.widen(mask if mask is not None else literal(True, "i1"), n)
    name = f"llvm.masked.scatter.v{n}{ {'float': 'f32', 'double': 'f64'}.get(t, t) }.v{n}p0"
    b.declare(f"void @{name}({value.full}, <{n} x ptr>, <{n} x i1>)", name)
    b.effect(f"call void @{name}({value}, <{n} x ptr> align {align} {pointers.text}, {mask})")
