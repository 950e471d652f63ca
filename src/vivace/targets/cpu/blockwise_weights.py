"""Reading block-wise weights (`loops/blockwise.py`): words of a panel as f32, scales and shifts, whole panels turned
into what the micro-kernels of contractions read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vivace.base.dtypes import DType
from vivace.base.machine import Isa
from vivace.loops.blockwise import BlockwiseProduct
from vivace.loops.kernel import Buffer
from vivace.lower.arithmetic import Arithmetic
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import load, store, vector_type

_WORD_BYTES = 4


@dataclass(frozen=True, slots=True)
class Panel:
    """Addresses of a panel's weights, scales and shifts, moved on by blocks."""

    b: str
    scales: str
    shifts: str

    def block(self, t: Text, w: BlockwiseProduct, i: Int) -> Panel:
        scales = t.at(self.scales, t.mul(i, w.lanes * w.scales.dtype.size_bytes))
        if w.shifts is None:
            return Panel(t.at(self.b, t.mul(i, w.block_bytes)), scales, "null")
        shifts = t.at(self.shifts, t.mul(i, w.lanes * w.shifts.dtype.size_bytes))
        return Panel(t.at(self.b, t.mul(i, w.block_bytes)), scales, shifts)


@dataclass(frozen=True, slots=True)
class Weights:
    """Unpacks one panel."""

    w: BlockwiseProduct
    isa: Isa

    @property
    def group_bytes(self) -> int:
        """A row of words: `w.steps` steps of all columns."""
        return self.w.lanes * _WORD_BYTES

    def words(self, t: Text, pointer: str, vector: int) -> str:
        return load(t, self.isa, t.at(pointer, vector * self.isa.n_f32_lanes * _WORD_BYTES), None, "i32")

    def levels(self, t: Text, pointer: str, vector: int) -> Callable[[int], str]:
        """A row of words of one vector of columns: what gives q - center of one step as f32."""
        isa, center = self.isa, self.w.center
        wide, kind = vector_type(isa, "i32"), vector_type(isa)
        words = self.words(t, pointer, vector)
        if self.w.bits == 4 and isa.n_f32_lanes == 16:
            name = "llvm.x86.avx512.permvar.sf.512"
            t.declare(name, f"{kind} @{name}({kind}, {wide})")
            table = ", ".join(f"float {float(v - center)}" for v in range(16))

            def looked_up(step: int) -> str:
                """A look-up takes the low four bits of each lane."""
                by = _bit_of(step, 4)
                moved = words if by == 0 else t.op(f"lshr {wide} {words}, splat (i32 {by})")
                return t.op(f"call {kind} @{name}({kind} <{table}>, {wide} {moved})")

            return looked_up
        upper = t.op(f"lshr {wide} {words}, splat (i32 16)")
        mask = (1 << self.w.bits) - 1

        def in_mantissa(step: int) -> str:
            """Or-ed into the mantissa of a power of two whose last place is 1, the bits add their value to it."""
            at = _bit_of(step, self.w.bits)
            source, at = (words, at) if at < 16 else (upper, at - 16)
            power = 23 - at
            kept = t.op(f"and {wide} {source}, splat (i32 {mask << at})")
            bits = t.op(f"or {wide} {kept}, splat (i32 {(127 + power) << 23})")
            number = t.op(f"bitcast {wide} {bits} to {kind}")
            return t.op(f"fsub {kind} {number}, splat (float {float(2**power + center)})")

        return in_mantissa

    def scale(self, t: Text, pointer: str, vector: int) -> str:
        return self._numbers(t, self.w.scales, pointer, vector)

    def shift(self, t: Text, pointer: str, vector: int) -> str:
        """A vector of shifts, or nothing where there are none."""
        return "" if self.w.shifts is None else self._numbers(t, self.w.shifts, pointer, vector)

    def _numbers(self, t: Text, buffer: Buffer, pointer: str, vector: int) -> str:
        isa, kind = self.isa, vector_type(self.isa)
        there = t.at(pointer, vector * isa.n_f32_lanes * buffer.dtype.size_bytes)
        if buffer.dtype is DType.f32:
            return load(t, isa, there, None)
        if buffer.dtype is DType.f16:
            half = t.op(f"load {vector_type(isa, 'half')}, ptr {there}, align 2")
            return t.op(f"fpext {vector_type(isa, 'half')} {half} to {kind}")
        wide = t.op(f"sext {vector_type(isa, 'i8')} {load(t, isa, there, None, 'i8')} to {vector_type(isa, 'i32')}")
        return t.op(f"sitofp {vector_type(isa, 'i32')} {wide} to {kind}")


def _bit_of(step: int, bits: int) -> int:
    """Where a step begins in its word."""
    return 8 * (step % 4) + 4 * (step // 4) if bits == 4 else 8 * step


def dequantize(
    t: Text, w: BlockwiseProduct, isa: Isa, ar: Arithmetic, lanes: int, panel: Panel, is_scaled: bool = True
) -> None:
    """Makes the panel in scratch as an arithmetic wants it, f32 or pairs of bf16, `lanes` columns after the other.
    Unless `is_scaled`, what scales multiply: q - zero point.
    """
    weights, kind = Weights(w, isa), vector_type(isa)
    width, group = isa.n_f32_lanes, ar.group
    row_bytes, per_panel = lanes * ar.lane_bytes, lanes // isa.n_f32_lanes
    panel_bytes = w.n_blocks * w.block // group * row_bytes
    vectors = w.lanes // width
    with t.loop(0, w.n_blocks) as i:
        at = panel.block(t, w, i)
        to = t.at("%scratch", t.mul(i, w.block // group * row_bytes))
        scales = [weights.scale(t, at.scales, v) if is_scaled else "" for v in range(vectors)]
        shifts = [weights.shift(t, at.shifts, v) for v in range(vectors)]
        with t.loop(0, w.block // w.steps) as g:
            b, rows = t.at(at.b, t.mul(g, weights.group_bytes)), t.at(to, t.mul(g, w.steps // group * row_bytes))
            for v in range(vectors):
                level = weights.levels(t, b, v)
                place = t.at(rows, v // per_panel * panel_bytes + v % per_panel * width * ar.lane_bytes)
                made = [_weight(t, kind, w, level(s), scales[v], shifts[v]) for s in range(w.steps)]
                for s in range(0, w.steps, group):
                    value = made[s] if group == 1 else _pair(t, isa, made[s], made[s + 1])
                    store(t, isa, value, t.at(place, s // group * row_bytes), None, "float" if group == 1 else "i32")


def _weight(t: Text, kind: str, w: BlockwiseProduct, level: str, scale: str, shift: str) -> str:
    """A weight, or without a scale the integer that it multiplies."""
    if w.shifts is not None and w.shifts.dtype.is_float:
        return t.op(f"fadd {kind} {t.op(f'fmul {kind} {level}, {scale}')}, {shift}") if scale else level
    moved = level if w.shifts is None else t.op(f"fadd {kind} {level}, {shift}")
    return t.op(f"fmul {kind} {moved}, {scale}") if scale else moved


def _pair(t: Text, isa: Isa, low: str, high: str) -> str:
    """Two f32 of each lane, rounded to bf16, in one word."""
    n, wide = isa.n_f32_lanes, vector_type(isa, "i32")
    if n == 16 and isa.has("avx512_bf16"):
        name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
        t.declare(name, f"<16 x bfloat> @{name}(<16 x float>)")
        halves = [t.op(f"call <16 x bfloat> @{name}(<16 x float> {x})") for x in (low, high)]
        words = [t.op(f"zext <16 x i16> {t.op(f'bitcast <16 x bfloat> {x} to <16 x i16>')} to {wide}") for x in halves]
    else:
        words = [_rounded(t, isa, x) for x in (low, high)]
    return t.op(f"or {wide} {words[0]}, {t.op(f'shl {wide} {words[1]}, splat (i32 16)')}")


def _rounded(t: Text, isa: Isa, x: str) -> str:
    """f32 rounded to bf16, half to even, in the low half of a word; weights are finite."""
    wide = vector_type(isa, "i32")
    bits = t.op(f"bitcast {vector_type(isa)} {x} to {wide}")
    odd = t.op(f"and {wide} {t.op(f'lshr {wide} {bits}, splat (i32 16)')}, splat (i32 1)")
    up = t.op(f"add {wide} {t.op(f'add {wide} {bits}, splat (i32 32767)')}, {odd}")
    return t.op(f"lshr {wide} {up}, splat (i32 16)")
