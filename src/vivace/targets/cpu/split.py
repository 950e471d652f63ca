"""The code of a `Split`: a unit is one group of rows, which become the rows of tile registers."""

from __future__ import annotations

from vivace.base.errors import UnsupportedError
from vivace.base.machine import Isa
from vivace.loops.split import LIMIT_BITS, N_PARTS, TILE_BYTES, TILE_ROWS, TILE_STEPS, Split, n_sums
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import F32_BYTES, load, mask_text, vector_type
from vivace.targets.cpu.isa import kernel_attributes

_CHUNK_BYTES = N_PARTS * TILE_BYTES
_LINE = 2 * TILE_STEPS


def emit_split(s: Split, isa: Isa) -> KernelCode:
    """The kernel.

    Raises: UnsupportedError where vectors have other than 16 lanes.
    """
    if 2 * isa.n_f32_lanes != TILE_STEPS:
        raise UnsupportedError("parts of f32 in tiles", where=s.name, expected="AVX-512")
    t = Text()
    env: dict[str, Int] = {
        d: t.op(f"load i64, ptr {t.at('%args', 8 * (3 + i))}, align 8") for i, d in enumerate(s.dims)
    }
    a, parts, sums = (t.op(f"load ptr, ptr {t.at('%args', 8 * i)}, align 8") for i in range(3))
    rows, step, n_chunks = t.dim(s.rows, env), t.mul(t.dim(s.step, env), F32_BYTES), s.filled // TILE_STEPS
    with t.loop("%begin", "%end") as unit:
        first = t.mul(unit, TILE_ROWS)
        lines = t.at(parts, t.mul(unit, n_chunks * _CHUNK_BYTES))
        totals = t.at(sums, t.mul(unit, n_sums(s.filled, s.has_sums) * TILE_ROWS * F32_BYTES))
        with t.loop(0, t.minimum(t.sub(rows, first), TILE_ROWS)) as row:
            source = t.at(a, t.mul(t.add(first, row), step))
            _Row(t, s, isa, source, t.at(lines, t.mul(row, _LINE)), t.at(totals, t.mul(row, F32_BYTES))).emit()
    t.put("ret void")
    head = f"define void @{s.name}(ptr %args, i64 %begin, i64 %end, ptr %scratch) #0 {{"
    text = "\n".join(
        [head, "entry:", *t.lines, "}", *t.declares.values(), f"attributes #0 = {{ {kernel_attributes(isa)} }}", ""]
    )
    return KernelCode(s.name, text, s.params, s.dims, s.units, 1, 0, "light")


class _Row:
    """Writes the code of one row, at `source`, whose first line goes to `lines` and first sum to `sums`."""

    def __init__(self, t: Text, s: Split, isa: Isa, source: str, lines: str, sums: str) -> None:
        self.t, self.s, self.isa = t, s, isa
        self.source, self.lines, self.sums = source, lines, sums
        self.kind, self.wide = vector_type(isa), vector_type(isa, "i32")
        w = isa.n_f32_lanes
        t.declare(f"llvm.umax.v{w}i32", f"{self.wide} @llvm.umax.v{w}i32({self.wide}, {self.wide})")
        t.declare(f"llvm.vector.reduce.umax.v{w}i32", f"i32 @llvm.vector.reduce.umax.v{w}i32({self.wide})")
        t.declare(f"llvm.vector.reduce.fadd.v{w}f32", f"float @llvm.vector.reduce.fadd.v{w}f32(float, {self.kind})")

    def emit(self) -> None:
        t, w, n_chunks = self.t, self.isa.n_f32_lanes, self.s.filled // TILE_STEPS
        whole, left = divmod(self.s.k, TILE_STEPS)
        most = "zeroinitializer"
        if whole:
            (most,) = t.reduce_loop(whole, [(self.wide, most)], lambda i, c: [self._chunk(i, TILE_STEPS, c[0])])
        if left:
            most = self._chunk(whole, left, most)
        for chunk in range(whole + (left > 0), n_chunks):
            most = self._chunk(chunk, 0, most)
        largest = t.op(f"call i32 @llvm.vector.reduce.umax.v{w}i32({self.wide} {most})")
        is_odd = t.op(f"icmp uge i32 {largest}, {LIMIT_BITS}")
        mark = t.op(f"select i1 {is_odd}, float 1.0, float 0.0")
        t.put(f"store float {mark}, ptr {self._sum(n_sums(self.s.filled, self.s.has_sums) - 1)}, align 4")

    def _sum(self, chunk: Int) -> str:
        return self.t.at(self.sums, self.t.mul(chunk, TILE_ROWS * F32_BYTES))

    def _chunk(self, chunk: Int, n: int, most: str) -> str:
        """Up to 32 elements as lines of their parts; what lies beyond `n` becomes 0 and is not touched. Returns the
        largest magnitudes, as the bits of f32."""
        t, w = self.t, self.isa.n_f32_lanes
        source = t.at(self.source, t.mul(chunk, TILE_STEPS * F32_BYTES))
        halves = [
            load(t, self.isa, t.at(source, first * F32_BYTES), mask_text(t, self.isa, n - first))
            if n > first
            else "zeroinitializer"
            for first in (0, w)
        ]
        if self.s.has_sums:
            both = t.op(f"fadd {self.kind} {halves[0]}, {halves[1]}")
            total = t.op(f"call reassoc float @llvm.vector.reduce.fadd.v{w}f32(float 0.0, {self.kind} {both})")
            t.put(f"store float {total}, ptr {self._sum(chunk)}, align 4")
        odd = ", ".join(f"i32 {2 * i + 1}" for i in range(2 * w))
        to = t.at(self.lines, t.mul(chunk, _CHUNK_BYTES))
        for part, pair in enumerate(zip(*map(self._parts, halves))):
            low, high = (f"<{2 * w} x i16> {t.op(f'bitcast {self.wide} {x} to <{2 * w} x i16>')}" for x in pair)
            line = t.op(f"shufflevector {low}, {high}, <{2 * w} x i32> <{odd}>")
            t.put(f"store <{2 * w} x i16> {line}, ptr {t.at(to, part * TILE_BYTES)}, align 1")
        for x in halves:
            size = t.op(f"and {self.wide} {t.op(f'bitcast {self.kind} {x} to {self.wide}')}, splat (i32 {0x7FFFFFFF})")
            most = t.op(f"call {self.wide} @llvm.umax.v{w}i32({self.wide} {most}, {self.wide} {size})")
        return most

    def _parts(self, x: str) -> list[str]:
        """The parts of a vector, each in the upper halves of its words."""
        t, parts = self.t, []
        for part in range(N_PARTS):
            bits = t.op(f"bitcast {self.kind} {x} to {self.wide}")
            parts.append(bits)
            if part < N_PARTS - 1:
                upper = t.op(f"and {self.wide} {bits}, splat (i32 {0xFFFF0000})")
                x = t.op(f"fsub {self.kind} {x}, {t.op(f'bitcast {self.wide} {upper} to {self.kind}')}")
        return parts
