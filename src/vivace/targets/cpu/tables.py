"""Functions of one byte as tables of 256: bytes looked up in registers.

With AVX512-VBMI a table is four vectors: vpermi2b looks 64 bytes up in two of them by their lower seven bits, and the
eighth bit chooses between the halves. Without it each lane is a load of its own.
"""

from __future__ import annotations

from zlib import crc32

from vivace.targets.cpu.builder import Builder, Value, literal

_REGISTER = 64


def look_up(b: Builder, table: bytes, v: Value) -> Value:
    """Entry `v`, taken as u8, of the table; in each lane."""
    entries = ", ".join(f"i8 {x}" for x in table)
    place = b.global_constant(f"table_{crc32(table):08x}", f"[{len(table)} x i8] [{entries}]")
    if not v.lanes or not b.isa.has("avx512vbmi"):
        return b.lookup(place, b.convert("zext", v, "i64" if not v.lanes else "i32"), "i8")
    if v.lanes >= _REGISTER:
        return b.per_part(_REGISTER, lambda part: _permute(b, place, part), v)
    order = ", ".join(f"i32 {k}" if k < v.lanes else "i32 poison" for k in range(_REGISTER))
    text = f"shufflevector {v}, {v.full} poison, <{_REGISTER} x i32> <{order}>"
    return b.part(_permute(b, place, b.inst(text, "i8", _REGISTER, v)), 0, v.lanes)


def _permute(b: Builder, place: Value, v: Value) -> Value:
    full, name = f"<{_REGISTER} x i8>", "llvm.x86.avx512.vpermi2var.qi.512"
    b.declare(f"{full} @{name}({full}, {full}, {full})", name)
    parts = []
    for at in range(0, 4 * _REGISTER, _REGISTER):
        p = b.inst(f"getelementptr i8, {place}, i64 {at}", "ptr", 0)
        parts.append(b.inst(f"load {full}, {p}, align 64, !invariant.load !0", "i8", _REGISTER, p))
    low, high = (b.inst(f"call {full} @{name}({parts[k]}, {v}, {parts[k + 1]})", "i8", _REGISTER, v) for k in (0, 2))
    return b.select(b.compare("icmp slt", v, literal(0, "i8")), high, low)
