"""Loads and multiply-adds of depthwise convolutions: one channel per lane, narrow elements widened as they are loaded.

f32   as it is             multiply-add
bf16  shifted to f32       multiply-add
8-bit widened to i32       vpdpwssd, or vpmaddwd and an addition: exact, since a byte fits the lower i16 of its lane
                           and the upper i16 of every weight is 0
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.base.machine import Isa
from vivace.loops.contraction import Depthwise
from vivace.targets.cpu.contraction_step import multiply_add, multiply_pairs
from vivace.targets.cpu.contraction_text import Text
from vivace.targets.cpu.contraction_vector import load, vector_type

_BYTES = (DType.u8, DType.i8)


@dataclass(frozen=True, slots=True)
class ChannelStep:
    """The arithmetic of one depthwise convolution. Raises: UnsupportedError for element types that have none."""

    d: Depthwise
    isa: Isa

    def __post_init__(self) -> None:
        a, b = self.d.a.dtype, self.d.b.dtype
        if not ((a is b and a in (DType.f32, DType.bf16)) or (a in _BYTES and b in _BYTES)):
            raise UnsupportedError(
                f"depthwise products of {a} and {b}", where=self.d.name, expected="both f32, both bf16, or 8-bit"
            )

    @property
    def acc_element(self) -> str:
        return "i32" if self.d.a.dtype.is_int else "float"

    @property
    def acc_type(self) -> str:
        return vector_type(self.isa, self.acc_element)

    def values(self, t: Text, pointer: str, mask: str | None) -> str:
        """Neighbouring channels of A."""
        return self._load(t, pointer, mask, self.d.a.dtype)

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

    def _load(self, t: Text, pointer: str, mask: str | None, dtype: DType) -> str:
        isa = self.isa
        wide = vector_type(isa, "i32")
        match dtype:
            case DType.f32:
                return load(t, isa, pointer, mask)
            case DType.bf16:
                bits = t.op(f"zext {vector_type(isa, 'i16')} {load(t, isa, pointer, mask, 'i16')} to {wide}")
                return t.op(f"bitcast {wide} {t.op(f'shl {wide} {bits}, splat (i32 16)')} to {vector_type(isa)}")
            case _:
                narrow, half = load(t, isa, pointer, mask, "i8"), vector_type(isa, "i16")
                if dtype is DType.u8:
                    return t.op(f"zext {vector_type(isa, 'i8')} {narrow} to {wide}")
                extended = t.op(f"sext {vector_type(isa, 'i8')} {narrow} to {half}")
                return t.op(f"zext {half} {extended} to {wide}")
