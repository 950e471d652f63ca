"""Loads and multiply-adds of depthwise convolutions: one channel per lane, narrow elements widened as they are loaded.

    f32         as it is           multiply-add
    bf16        shifted to f32     multiply-add, by weights in f32: they are few, and rounding them would save nothing
    f16         converted to f32   multiply-add, likewise
    8-bit       widened to i32     vpdpwssd, or vpmaddwd and an addition: exact, since a byte fits the lower i16 of its
                                   lane and the upper i16 of every weight is 0
    u8 by i8    rows interleaved   vpdpbusd, where AVX512-VNNI has it: up to four kernel rows stand side by side in each
                                   channel, so that one instruction sums a column of the kernel

i8 with an offset of 128 is u8 with the sign bit turned over.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.base.machine import Isa
from vivace.loops.contraction import Depthwise
from vivace.targets.cpu.contraction_step import multiply_add, multiply_pairs, widened
from vivace.targets.cpu.contraction_text import Text
from vivace.targets.cpu.contraction_vector import load, vector_type

_BYTES = (DType.u8, DType.i8)
_FLOATS = (DType.f32, DType.bf16, DType.f16)


def turn_signs(t: Text, kind: str, value: str) -> str:
    """i8 plus 128, as u8."""
    return t.op(f"xor {kind} {value}, splat (i8 -128)")


@dataclass(frozen=True, slots=True)
class ChannelStep:
    """The arithmetic of one depthwise convolution. Raises: UnsupportedError for element types that have none."""

    d: Depthwise
    isa: Isa

    def __post_init__(self) -> None:
        a, b = self.d.a.dtype, self.d.b.dtype
        if not ((a in _FLOATS and b is DType.f32) or (a in _BYTES and b in _BYTES)):
            raise UnsupportedError(
                f"depthwise products of {a} and {b}", where=self.d.name, expected="f32, bf16 or f16 by f32, or 8-bit"
            )

    @property
    def acc_element(self) -> str:
        return "i32" if self.d.a.dtype.is_int else "float"

    @property
    def acc_type(self) -> str:
        return vector_type(self.isa, self.acc_element)

    @property
    def a_dtype(self) -> DType:
        """Of A as it is multiplied."""
        return DType.u8 if self.d.a_offset else self.d.a.dtype

    @property
    def rows_at_once(self) -> int:
        """Kernel rows that `quads` interleaves for one multiply-add; 1 where nothing is interleaved."""
        quads = self.a_dtype is DType.u8 and self.d.b.dtype is DType.i8 and self.isa.vector_bits == 512
        return 4 if quads and self.isa.has("avx512_vnni") else 1

    def quads(self, t: Text, pointers: list[str], mask: str | None, of_a: bool) -> str:
        """The same channels of up to four rows, those of one channel side by side; rows that do not exist are 0."""
        half, full = "<32 x i8>", "<64 x i8>"
        rows = [self._bytes(t, x, mask, of_a) for x in pointers] + ["zeroinitializer"] * (4 - len(pointers))
        both = ", ".join(f"i32 {k}" for k in range(32))
        low, high = (
            t.op(f"shufflevector <16 x i8> {rows[i]}, <16 x i8> {rows[i + 1]}, <32 x i32> <{both}>") for i in (0, 2)
        )
        every = ", ".join(f"i32 {k}" for k in range(64))
        joined = t.op(f"shufflevector {half} {low}, {half} {high}, <64 x i32> <{every}>")
        # First the fours of each row to their quarter, then bytes within quarters: two cheap steps, or one with VBMI.
        words = t.op(f"bitcast {full} {joined} to <16 x i32>")
        fours = ", ".join(f"i32 {4 * row + quarter}" for quarter in range(4) for row in range(4))
        moved = t.op(f"shufflevector <16 x i32> {words}, <16 x i32> poison, <16 x i32> <{fours}>")
        order = ", ".join(f"i32 {16 * q + 4 * row + c}" for q in range(4) for c in range(4) for row in range(4))
        raw = t.op(f"bitcast <16 x i32> {moved} to {full}")
        return t.op(f"shufflevector {full} {raw}, {full} poison, <64 x i32> <{order}>")

    def multiply_quads(self, t: Text, value: str, weight: str, acc: str) -> str:
        name = "llvm.x86.avx512.vpdpbusd.512"
        t.declare(name, f"<16 x i32> @{name}(<16 x i32>, <64 x i8>, <64 x i8>)")
        return t.op(f"call <16 x i32> @{name}(<16 x i32> {acc}, <64 x i8> {value}, <64 x i8> {weight})")

    def values(self, t: Text, pointer: str, mask: str | None) -> str:
        """Neighbouring channels of A."""
        return self._load(t, pointer, mask, self.a_dtype, of_a=True)

    def weights(self, t: Text, pointer: str, mask: str | None) -> str:
        """Neighbouring channels of B."""
        return self._load(t, pointer, mask, self.d.b.dtype)

    def multiply_add(self, t: Text, value: str, weight: str, acc: str) -> str:
        isa, w = self.isa, self.isa.n_f32_lanes
        if self.d.a.dtype.is_float:
            return multiply_add(t, isa, value, weight, acc)
        kind, pairs = vector_type(isa, "i32"), f"<{2 * w} x i16>"
        x, y = (t.op(f"bitcast {kind} {v} to {pairs}") for v in (value, weight))
        if not (isa.has("avx512_vnni") or isa.has("avx_vnni")):
            return multiply_pairs(t, isa, x, y, acc)
        name = f"llvm.x86.avx512.vpdpwssd.{32 * w}"
        t.declare(name, f"{kind} @{name}({kind}, {pairs}, {pairs})")
        return t.op(f"call {kind} @{name}({kind} {acc}, {pairs} {x}, {pairs} {y})")

    def _bytes(self, t: Text, pointer: str, mask: str | None, of_a: bool) -> str:
        loaded = load(t, self.isa, pointer, mask, "i8")
        return turn_signs(t, vector_type(self.isa, "i8"), loaded) if of_a and self.d.a_offset else loaded

    def _load(self, t: Text, pointer: str, mask: str | None, dtype: DType, of_a: bool = False) -> str:
        isa = self.isa
        wide = vector_type(isa, "i32")
        match dtype:
            case DType.f32:
                return load(t, isa, pointer, mask)
            case DType.bf16:
                bits = t.op(f"zext {vector_type(isa, 'i16')} {load(t, isa, pointer, mask, 'i16')} to {wide}")
                return t.op(f"bitcast {wide} {t.op(f'shl {wide} {bits}, splat (i32 16)')} to {vector_type(isa)}")
            case DType.f16:
                return widened(t, isa, load(t, isa, pointer, mask, "i16"))
            case _:
                narrow, half = self._bytes(t, pointer, mask, of_a), vector_type(isa, "i16")
                if dtype is DType.u8:
                    return t.op(f"zext {vector_type(isa, 'i8')} {narrow} to {wide}")
                extended = t.op(f"sext {vector_type(isa, 'i8')} {narrow} to {half}")
                return t.op(f"zext {half} {extended} to {wide}")
