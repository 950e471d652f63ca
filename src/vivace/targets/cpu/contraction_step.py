"""One step of the innermost tap in each arithmetic (`lower/arithmetic.py`): how a row of a panel and a group of A are
loaded, and the instructions that multiply and add them.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.machine import Isa
from vivace.lower.arithmetic import Arithmetic
from vivace.targets.cpu.contraction_text import Text
from vivace.targets.cpu.contraction_vector import load, vector_type

_SIGNS = "splat (i32 -2139062144)"  # 0x80808080: added to four i8, it makes u8 of them
_UPPER_HALF = "splat (i32 -65536)"


def multiply_add(t: Text, isa: Isa, a: str, b: str, c: str) -> str:
    """`a * b + c` per lane of f32; one rounding where the instruction set has it."""
    kind, w = vector_type(isa), isa.n_f32_lanes
    if isa.has_fma:
        t.declare(f"llvm.fma.v{w}f32", f"{kind} @llvm.fma.v{w}f32({kind}, {kind}, {kind})")
        return t.op(f"call {kind} @llvm.fma.v{w}f32({kind} {a}, {kind} {b}, {kind} {c})")
    product = t.op(f"fmul {kind} {a}, {b}")
    return t.op(f"fadd {kind} {c}, {product}")


def multiply_pairs(t: Text, isa: Isa, a: str, b: str, c: str) -> str:
    """Adds the products of two neighbouring i16 to each lane of i32. No sum of two overflows but that of four -2**15,
    which widened bytes do not reach.
    """
    w = isa.n_f32_lanes
    name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[w]
    pairs, kind = f"<{2 * w} x i16>", vector_type(isa, "i32")
    t.declare(f"llvm.x86.{name}", f"{kind} @llvm.x86.{name}({pairs}, {pairs})")
    product = t.op(f"call {kind} @llvm.x86.{name}({pairs} {a}, {pairs} {b})")
    return t.op(f"add {kind} {c}, {product}")


def splat(t: Text, isa: Isa, scalar: str, element: str) -> str:
    """One number in every lane."""
    kind = vector_type(isa, element)
    first = t.op(f"insertelement {kind} poison, {element} {scalar}, i64 0")
    return t.op(f"shufflevector {kind} {first}, {kind} poison, <{isa.n_f32_lanes} x i32> zeroinitializer")


def widened(t: Text, isa: Isa, bits: str) -> str:
    """A vector of f16, given as its bits, in f32."""
    w, kind, wide = isa.n_f32_lanes, vector_type(isa), vector_type(isa, "i32")
    if "+f16c" in isa.features:
        half = t.op(f"bitcast {vector_type(isa, 'i16')} {bits} to <{w} x half>")
        return t.op(f"fpext <{w} x half> {half} to {kind}")
    # Shifted into place and rescaled by 2**112: exact for normals and denormals alike (`memory.from_memory`).
    number = t.op(f"zext {vector_type(isa, 'i16')} {bits} to {wide}")
    sign = t.op(f"shl {wide} {t.op(f'and {wide} {number}, splat (i32 32768)')}, splat (i32 16)")
    magnitude = t.op(f"shl {wide} {t.op(f'and {wide} {number}, splat (i32 32767)')}, splat (i32 13)")
    scaled = t.op(f"fmul {kind} {t.op(f'bitcast {wide} {magnitude} to {kind}')}, splat (float 0x46F0000000000000)")
    is_special = t.op(f"icmp ugt {wide} {magnitude}, splat (i32 {0xF7FFFFF})")
    special = t.op(f"or {wide} {magnitude}, splat (i32 {0x7F800000})")
    finite = t.op(f"bitcast {kind} {scaled} to {wide}")
    chosen = t.op(f"select <{w} x i1> {is_special}, {wide} {special}, {wide} {finite}")
    return t.op(f"bitcast {wide} {t.op(f'or {wide} {chosen}, {sign}')} to {kind}")


@dataclass(frozen=True, slots=True)
class Step:
    """Loads and multiply-adds of one arithmetic.

    `is_signed` tells how 8-bit A is widened; `flips` that A is i8 to which 128 is added. A step has `n_halves`: where
    a group is not summed by one instruction, each half loads its operands anew, which keeps them out of registers.
    """

    t: Text
    isa: Isa
    ar: Arithmetic
    is_signed: bool = False
    flips: bool = False

    @property
    def n_halves(self) -> int:
        return 2 if self.ar.kind == "split16" else 1

    @property
    def acc_element(self) -> str:
        return "i32" if self.ar.acc.is_int else "float"

    def column(self, pointer: str, mask: str | None, half: int = 0) -> str:
        """One vector of a row of B."""
        t, isa, w = self.t, self.isa, self.isa.n_f32_lanes
        match self.ar.kind:
            case "f32":
                return load(t, isa, pointer, mask)
            case "wide8":
                narrow = t.op(f"load <{2 * w} x i8>, ptr {pointer}, align 1")
                return t.op(f"sext <{2 * w} x i8> {narrow} to <{2 * w} x i16>")
            case "split16":
                return self._half(load(t, isa, pointer, mask, "i32"), half)
            case "wide16":
                return widened(t, isa, load(t, isa, pointer, mask, "i16"))
            case _:
                return load(t, isa, pointer, mask, "i32")

    def broadcast(self, pointer: str, n_present: int, half: int = 0) -> str:
        """A group of A in every lane. Only `n_present` elements of it exist; the others are 0 (times 0)."""
        t, isa, w = self.t, self.isa, self.isa.n_f32_lanes
        if self.ar.kind == "f32":
            return splat(t, isa, t.op(f"load float, ptr {pointer}, align 4"), "float")
        if self.ar.kind == "wide16":
            return widened(t, isa, splat(t, isa, t.op(f"load i16, ptr {pointer}, align 2"), "i16"))
        if self.ar.kind == "wide8":
            pair = self._scalar(pointer, n_present, "i16")
            if self.flips:
                pair = t.op(f"xor i16 {pair}, -32640")
            narrow = t.op(f"bitcast {vector_type(isa, 'i16')} {splat(t, isa, pair, 'i16')} to <{2 * w} x i8>")
            return t.op(f"{'sext' if self.is_signed else 'zext'} <{2 * w} x i8> {narrow} to <{2 * w} x i16>")
        x = splat(t, isa, self._scalar(pointer, n_present, "i32"), "i32")
        if self.ar.kind == "split16":
            return self._half(x, half)
        return t.op(f"xor {vector_type(isa, 'i32')} {x}, {_SIGNS}") if self.flips else x

    def multiply_add(self, a: str, b: str, c: str) -> str:
        t, isa, w = self.t, self.isa, self.isa.n_f32_lanes
        match self.ar.kind:
            case "dot8":
                name, kind, part = f"llvm.x86.avx512.vpdpbusd.{32 * w}", vector_type(isa, "i32"), f"<{4 * w} x i8>"
            case "dot16":
                name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * w}"
                kind, part = vector_type(isa), f"<{2 * w} x bfloat>"
            case "wide8":
                return multiply_pairs(t, isa, a, b, c)
            case _:
                return multiply_add(t, isa, a, b, c)
        t.declare(name, f"{kind} @{name}({kind}, {part}, {part})")
        x, y = (t.op(f"bitcast {vector_type(isa, 'i32')} {v} to {part}") for v in (a, b))
        return t.op(f"call {kind} @{name}({kind} {c}, {part} {x}, {part} {y})")

    def _half(self, pair: str, half: int) -> str:
        """The first or second bf16 of each lane as f32."""
        kind = vector_type(self.isa, "i32")
        operation = f"and {kind} {pair}, {_UPPER_HALF}" if half else f"shl {kind} {pair}, splat (i32 16)"
        return self.t.op(f"bitcast {kind} {self.t.op(operation)} to {vector_type(self.isa)}")

    def _scalar(self, pointer: str, n_present: int, whole: str) -> str:
        """A group of A as one integer, without reading beyond the elements that exist."""
        t, n_bytes = self.t, n_present * self.ar.a_bytes
        if n_present == self.ar.group:
            return t.op(f"load {whole}, ptr {pointer}, align 1")
        total, at = "0", 0
        for size in (2, 1):
            if n_bytes - at >= size:
                part = t.op(f"load i{8 * size}, ptr {t.at(pointer, at)}, align 1")
                wide = part if whole == f"i{8 * size}" else t.op(f"zext i{8 * size} {part} to {whole}")
                moved = wide if not at else t.op(f"shl {whole} {wide}, {8 * at}")
                total, at = t.op(f"or {whole} {total}, {moved}") if at else moved, at + size
        return total
