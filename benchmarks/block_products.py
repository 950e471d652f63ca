"""How many instructions the products of a decoder's one row need for a byte of weights, counted in their machine code.

The loop over blocks of 32 steps and 64 columns, on the way that even blocks take (rule EVEN of `loops/digits.py`). Of
the vector instructions that compute, a core with AVX-512 begins two per cycle: as many GB/s per GHz they allow at most,
where nothing else waits.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable

from vivace.base.dtypes import DType
from vivace.base.machine import Isa, isa
from vivace.loops.blockwise import BlockwiseProduct
from vivace.loops.contraction import Axis
from vivace.loops.kernel import Buffer
from vivace.targets.cpu.blockwise import emit_blockwise
from vivace.targets.cpu.jit import assembly

COLUMNS, BLOCK, _K = 64, 32, 576
_TARGET = "avx512+avx512_vnni"
_VECTORS_PER_CYCLE = 2
_MOVES = re.compile(r"vmov|vpbroadcast|vbroadcast|vxorps|vpxor|prefetch")
# As the products of SmolLM2-135M are: 4 bits with shifts in f16 (Q4_1), 8 bits without.
_KINDS = (("int4", 4, True), ("int8", 8, False))
_ROWS = (("f32", DType.f32, DType.f32), ("bf16", DType.bf16, DType.f32), ("level 4", DType.f32, DType.i8))

Parts = dict[str, list[str]]  # by label, in order


def table() -> list[str]:
    """Lines of a table for people."""
    heads = [
        "weights",
        "rows",
        "digits",
        "instructions",
        "computing vectors",
        "bytes",
        "per byte",
        "GB/s per GHz",
    ]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, bits, has_shifts in _KINDS:
        n_bytes = COLUMNS * (BLOCK * bits // 8 + (4 if has_shifts else 2))
        for rows, a, rounded in _ROWS:
            w = product(bits, has_shifts, a, rounded)
            code = block_code(w, isa(_TARGET))
            n_vector = sum(line.startswith("v") and not _MOVES.match(line) for line in code)
            cells = [name, rows, str(w.digit_rows.few), str(len(code)), str(n_vector), str(n_bytes)]
            cells += [f"{len(code) / n_bytes:.2f}", f"{_VECTORS_PER_CYCLE * n_bytes / n_vector:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def product(bits: int, has_shifts: bool, a: DType, rounded: DType) -> BlockwiseProduct:
    def buffer(name: str, dtype: DType) -> Buffer:
        return Buffer(name, dtype, (1,), (1,), name == "out")

    shifts = buffer("shifts", DType.f16) if has_shifts else None
    return BlockwiseProduct(
        "k", Axis("m", 1, _K, 0, COLUMNS), _K, COLUMNS, bits, BLOCK, COLUMNS, buffer("a", a),
        buffer("b", DType.u8), buffer("scales", DType.f16), shifts, buffer("out", DType.f32),
        digits=buffer("digits", DType.u8), rounded=rounded,
    )  # fmt: skip


def block_code(w: BlockwiseProduct, target: Isa) -> list[str]:
    """The instructions of one block of one row: the shortest way around the loop over blocks."""
    text = assembly(emit_blockwise(w, target).llvm_text, target)
    lines = re.split(r"^k\.dot1:", text, flags=re.M)[1].split(".Lfunc_end")[0].splitlines()
    parts: Parts = {"": []}
    label = ""
    for line in lines:
        if found := re.match(r"(\.LBB\w+):", line):
            label = found[1]
            parts[label] = []
        elif re.match(r"\t[a-z]", line):
            parts[label].append(line.strip())
    after = dict(zip(parts, [*list(parts)[1:], ""]))

    def next_parts(label: str) -> list[str]:
        found = [line.split()[1] for line in parts[label] if line.startswith("j")]
        falls = not parts[label] or not re.match(r"jmp|ret", parts[label][-1])
        return [*found, *([after[label]] if falls and after[label] else [])]

    ways = (way for start in parts if (way := _way_around(start, parts, next_parts)))
    loops = ([line for label in way for line in parts[label]] for way in ways)
    return min((loop for loop in loops if any("vpdpbusd" in line for line in loop)), key=len)


def _way_around(start: str, parts: Parts, next_parts: Callable[[str], list[str]]) -> tuple[str, ...]:
    """The labels of the way from a part back to it that has the fewest instructions; none where there is no way."""
    waiting: list[tuple[int, tuple[str, ...]]] = [(len(parts[start]), (start,))]
    while waiting:
        size, way = heapq.heappop(waiting)
        for label in next_parts(way[-1]):
            if label == start:
                return way
            if label in parts and label not in way:
                heapq.heappush(waiting, (size + len(parts[label]), (*way, label)))
    return ()
