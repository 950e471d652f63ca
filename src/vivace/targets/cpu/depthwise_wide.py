"""Depthwise convolutions of u8 (or i8 plus 128) by i8 on AVX512-VNNI, 64 channels at once, with results that are bytes.

Four rows of the kernel stand side by side in each channel, so that vpdpbusd sums a column of it. 64 channels of four
rows are interleaved by unpacking bytes, then words, within quarters of a register: vector `v` of the sums then holds
channels 4v..4v+3 of every quarter. Nothing undoes that order but the packing of sums to i16 and to bytes, which works
within quarters as well; what the epilogue reads per channel is brought into the order of the sums once per row.

Only where all that varies in the epilogue are constants per channel; `depthwise` does what is left over.
"""

from __future__ import annotations

from collections.abc import Callable

from vivace.base.dims import Dim, linear, prod, symbols
from vivace.base.dtypes import DType
from vivace.base.machine import Isa
from vivace.graph.ops.quantized import BYTES
from vivace.loops.contraction import Depthwise
from vivace.loops.kernel import Expr, Load, walk
from vivace.targets.cpu.builder import Value
from vivace.targets.cpu.contraction_epilogue import makes_bytes
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.depthwise_step import turn_signs
from vivace.targets.cpu.memory import flat_index

WIDTH = 64
COLUMNS = 6  # of four sums each; a column of the input and what packs results take the other registers
AT_ONCE = 4
_MOST_ROWS = 8
_FULL, _SUM = "<64 x i8>", "<16 x i32>"


def is_wide(d: Depthwise, isa: Isa) -> bool:
    """Whether 64 channels can be computed at once."""
    fits = isa.vector_bits == 512 and isa.has("avx512_vnni") and isinstance(d.channels, int) and d.channels >= WIDTH
    if not fits or not (d.a.dtype is DType.u8 or d.a_offset) or d.b.dtype is not DType.i8 or d.out.dtype not in BYTES:
        return False
    extents = [x.extent for x in d.taps]
    if not extents or not all(isinstance(x, int) and x > 0 for x in extents):
        return False
    if prod(extents[:-1]) > _MOST_ROWS or extents[-1] > _MOST_ROWS:  # type: ignore[operator]
        return False
    e = d.epilogue
    return e is not None and makes_bytes(e) and all(map(is_per_channel(d), walk(e)))  # type: ignore[arg-type]


def is_per_channel(d: Depthwise) -> Callable[[Expr], bool]:
    """Whether a part of the epilogue is a constant per channel, or no load at all."""
    rows = {x.name for x in d.rows}

    def check(e: Expr) -> bool:
        if not isinstance(e, Load):
            return True
        parts = linear(flat_index(e.buffer, e.index), "c")
        if parts is None or e.inside or any(s.name in rows for s in symbols(parts[1])):
            return False
        return parts[0] == 0 or (parts[0] == 1 and e.buffer.dtype in (DType.f32, DType.i32))

    return check


def in_order_of_sums(t: Text, kind: str, at: str) -> list[str]:
    """What stands at `at` for 64 channels, 4 bytes each, as four vectors in the order of the sums."""
    x = [t.op(f"load <16 x {kind}>, ptr {t.at(at, 64 * k)}, align 1") for k in range(4)]
    made = []
    for v in range(4):
        halves = []
        for pair in (0, 2):
            order = ", ".join(f"i32 {first + 4 * v + k}" for first in (0, 16) for k in range(4))
            halves.append(
                t.op(f"shufflevector <16 x {kind}> {x[pair]}, <16 x {kind}> {x[pair + 1]}, <8 x i32> <{order}>")
            )
        order = ", ".join(f"i32 {k}" for k in range(16))
        made.append(t.op(f"shufflevector <8 x {kind}> {halves[0]}, <8 x {kind}> {halves[1]}, <16 x i32> <{order}>"))
    return made


def quads(t: Text, pointers: list[str], has_signs: bool = False) -> list[str]:
    """64 channels of up to four rows, those of one channel side by side, as four vectors."""
    loaded = [t.op(f"load {_FULL}, ptr {x}, align 1") for x in pointers]
    rows = [turn_signs(t, _FULL, x) if has_signs else x for x in loaded] + ["zeroinitializer"] * (
        AT_ONCE - len(pointers)
    )
    made = []
    for side in ("low", "high"):
        words = []
        for k in (0, 2):
            raw = _unpacked(t, _FULL, rows[k], rows[k + 1], 16, side)
            words.append(t.op(f"bitcast {_FULL} {raw} to <32 x i16>"))
        for half in ("low", "high"):
            pairs = _unpacked(t, "<32 x i16>", words[0], words[1], 8, half)
            made.append(t.op(f"bitcast <32 x i16> {pairs} to {_FULL}"))
    return made


def _unpacked(t: Text, kind: str, x: str, y: str, per_quarter: int, side: str) -> str:
    """Elements of the low or high half of every quarter of two vectors, in turns."""
    n, half = 4 * per_quarter, per_quarter // 2
    first = 0 if side == "low" else half
    order = [q * per_quarter + first + k + other for q in range(4) for k in range(half) for other in (0, n)]
    return t.op(f"shufflevector {kind} {x}, {kind} {y}, <{n} x i32> <{', '.join(f'i32 {i}' for i in order)}>")


def multiply(t: Text, acc: str, value: str, weight: str) -> str:
    name = "llvm.x86.avx512.vpdpbusd.512"
    t.declare(name, f"{_SUM} @{name}({_SUM}, {_FULL}, {_FULL})")
    return t.op(f"call {_SUM} @{name}({_SUM} {acc}, {_FULL} {value}, {_FULL} {weight})")


class WideSums:
    """The taps of one kernel: weights are interleaved once, then each tile of columns is summed."""

    def __init__(self, t: Text, d: Depthwise, offsets: Callable[[int], tuple[Int, Int]], dims: dict[str, Int]) -> None:
        self.t, self.dims, self.has_signs = t, dims, d.a_offset != 0
        *outer, self.last = d.taps
        total = prod([x.extent for x in outer])
        assert isinstance(total, int) and isinstance(self.last.extent, int)
        rows = [offsets(i) for i in range(total)]
        self.rows = [rows[k : k + AT_ONCE] for k in range(0, total, AT_ONCE)]
        self.weights = [
            [quads(t, [t.at("%b", t.add(in_b, t.mul(t.dim(self.last.b, dims), k))) for _, in_b in group])
             for k in range(self.last.extent)]
            for group in self.rows
        ]  # fmt: skip

    def sum(
        self, a: str, start: list[str], columns: list[tuple[Dim, list[tuple[int, int]]]], size: int
    ) -> list[list[str]]:
        """Four sums for each of `size` columns; `columns` of the input, with the results and taps that they serve."""
        t = self.t
        acc = [list(start) for _ in range(size)]
        for group, weights in zip(self.rows, self.weights, strict=True):
            for where, pairs in columns:
                x = quads(t, [t.at(a, t.add(in_a, t.dim(where, self.dims))) for in_a, _ in group], self.has_signs)
                for j, k in pairs:
                    acc[j] = [multiply(t, s, v, w) for s, v, w in zip(acc[j], x, weights[k], strict=True)]
        return acc


def per_channel(
    t: Text, e: Expr | None, bases: Callable[[Load], str], ordered: Callable[[Text, str, str], list[str]], n: int
) -> list[dict[Expr, Value]]:
    """What the epilogue reads per channel, for each of the `n` vectors of sums, in the order that `ordered` gives."""
    given: list[dict[Expr, Value]] = [{} for _ in range(n)]
    for load in dict.fromkeys(x for x in walk(e) if isinstance(x, Load)) if e is not None else ():
        parts = linear(flat_index(load.buffer, load.index), "c")
        if parts is None or parts[0] == 0:
            continue
        kind = "float" if load.buffer.dtype is DType.f32 else "i32"
        for known, text in zip(given, ordered(t, kind, bases(load)), strict=True):
            known[load] = Value(text, kind, 16)
    return given
