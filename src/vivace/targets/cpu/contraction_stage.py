"""Copies of operands into scratch: rows of A a better distance apart, panels of a run-time B, transposed where it
lies as [n][k].
"""

from __future__ import annotations

from vivace.base.machine import Isa
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import F32_BYTES, load, mask_text, store, vector_type


def clear(t: Text, isa: Isa, to: str, n_bytes: Int) -> None:
    """Zeroes memory, a whole number of vectors."""
    with t.loop(0, n_bytes, isa.vector_bits // 8) as i:
        store(t, isa, "zeroinitializer", t.at(to, i), None)


def copy_row(t: Text, isa: Isa, source: str, to: str, n_bytes: Int) -> None:
    """Copies neighbouring bytes: whole vectors, then words, then what is left."""
    begin: Int = 0
    for size, kind in ((isa.vector_bits // 8, vector_type(isa)), (F32_BYTES, "i32"), (1, "i8")):
        end = t.mul(t.divmod(n_bytes, size)[0], size)
        if begin == end:
            continue
        with t.loop(begin, end, size) as i:
            value = t.op(f"load {kind}, ptr {t.at(source, i)}, align 1")
            t.put(f"store {kind} {value}, ptr {t.at(to, i)}, align 1")
        begin = end


def copy_panel(t: Text, isa: Isa, source: str, step: Int, to: str, lanes: int, count: Int, columns: Int | None) -> None:
    """Copies `count` rows of a panel, `step` bytes apart. `columns` of it exist (None: all); the others become 0."""
    width, w = isa.vector_bits // 8, isa.n_f32_lanes
    vectors = range(lanes // w)
    masks = [None if columns is None else mask_text(t, isa, t.sub(columns, j * w)) for j in vectors]
    with t.loop(0, count) as k:
        row, packed = t.at(source, t.mul(k, step)), t.at(to, t.mul(k, lanes * F32_BYTES))
        for j, mask in zip(vectors, masks):
            store(t, isa, load(t, isa, t.at(row, j * width), mask), t.at(packed, j * width), None)


def transpose_panel(
    t: Text, isa: Isa, source: str, step: Int, to: str, lanes: int, count: Int, columns: Int | None
) -> None:
    """Turns columns that lie as rows, `step` bytes apart and `count` long, into a panel of `count` rows.

    Whole blocks are written, so `to` must have room for `count` rounded up to the vector. Columns beyond `columns`
    repeat the last one.
    """
    w = isa.n_f32_lanes
    with t.loop(0, count, w) as k:
        mask = None if isinstance(count, int) and count % w == 0 else mask_text(t, isa, t.sub(count, k))
        for j in range(0, lanes, w):
            rows = []
            for i in range(w):
                column = j + i if columns is None else t.minimum(j + i, t.sub(columns, 1))
                rows.append(load(t, isa, t.at(t.at(source, t.mul(column, step)), t.mul(k, F32_BYTES)), mask))
            packed = t.at(to, t.add(t.mul(k, lanes * F32_BYTES), j * F32_BYTES))
            for i, row in enumerate(transpose(t, isa, rows)):
                store(t, isa, row, t.at(packed, i * lanes * F32_BYTES), None)


def transpose(t: Text, isa: Isa, rows: list[str], element: str = "float") -> list[str]:
    """A square of as many rows as lanes, mirrored: blocks off the diagonal change places, at each power of two."""
    kind, w = vector_type(isa, element), isa.n_f32_lanes
    d = w // 2
    while d:
        low = ", ".join(f"i32 {j if not j & d else w + j - d}" for j in range(w))
        high = ", ".join(f"i32 {j + d if not j & d else w + j}" for j in range(w))
        for i in range(w):
            if not i & d:
                pair = f"{kind} {rows[i]}, {kind} {rows[i + d]}, <{w} x i32>"
                rows[i], rows[i + d] = t.op(f"shufflevector {pair} <{low}>"), t.op(f"shufflevector {pair} <{high}>")
        d //= 2
    return rows
