"""Rearranging whole vectors: transposing a square of them, interleaving and picking out strided elements.

All work on elements of 32 bits in vectors of 4, 8 or 16 lanes and compile to one instruction per step.
"""

from __future__ import annotations

from collections.abc import Sequence

from vivace.targets.cpu.builder import Builder, Value

_QUAD = 4  # lanes of 128 bits: shuffles within them are the cheap ones


def shuffle(b: Builder, x: Value, y: Value, order: Sequence[int]) -> Value:
    """Lanes of x, then of y, in the given order."""
    text = ", ".join(f"i32 {k}" for k in order)
    return b.inst(f"shufflevector {x}, {y}, <{len(order)} x i32> <{text}>", x.type, len(order), x, y)


def transpose(b: Builder, rows: Sequence[Value]) -> list[Value]:
    """Row j, lane k of the result is row k, lane j of `rows`; as many rows as lanes: 4, 8 or 16.

    First 4x4 squares within 128-bit lanes, then the squares themselves.
    """
    n = len(rows)
    quads = n // _QUAD
    squares = [_transpose_quads(b, rows[4 * g : 4 * g + 4]) for g in range(quads)]
    result: list[Value] = [rows[0]] * n
    for k in range(_QUAD):
        for q, row in enumerate(_transpose_lanes(b, [square[k] for square in squares])):
            result[_QUAD * q + k] = row
    return result


def _transpose_quads(b: Builder, rows: Sequence[Value]) -> list[Value]:
    """Transpose the 4x4 square in each 128-bit lane of four vectors."""
    n = rows[0].lanes

    def low_high(x: Value, y: Value, width: int) -> tuple[Value, Value]:
        """Groups of `width` elements of x and y in turn: from the lower, then from the upper half of each quad."""
        halves = []
        for half in (0, 2):
            order = []
            for quad in range(0, n, _QUAD):
                for at in range(0, 2, width):
                    order += [quad + half + at + i for i in range(width)]
                    order += [n + quad + half + at + i for i in range(width)]
            halves.append(shuffle(b, x, y, order))
        return halves[0], halves[1]

    a0, a1 = low_high(rows[0], rows[1], 1)
    c0, c1 = low_high(rows[2], rows[3], 1)
    return [*low_high(a0, c0, 2), *low_high(a1, c1, 2)]


def _transpose_lanes(b: Builder, rows: list[Value]) -> list[Value]:
    """Transpose a square of 128-bit lanes: row i, quad j to row j, quad i."""
    if len(rows) == 1:
        return rows

    def every_second(x: Value, y: Value, first: int) -> Value:
        quads = x.lanes // _QUAD
        picked = [q for q in range(2 * quads) if q % 2 == first]
        return shuffle(b, x, y, [_QUAD * q + i for q in picked for i in range(_QUAD)])

    if len(rows) == 2:
        return [every_second(rows[0], rows[1], k) for k in (0, 1)]
    pairs = [[every_second(rows[0], rows[1], k), every_second(rows[2], rows[3], k)] for k in (0, 1)]
    return [every_second(pairs[q % 2][0], pairs[q % 2][1], q // 2) for q in range(4)]


def interleave(b: Builder, parts: Sequence[Value]) -> list[Value]:
    """x0 y0 z0 x1 y1 z1 .. as consecutive vectors, as many as there are parts."""
    s, n = len(parts), parts[0].lanes
    made = []
    for j in range(s):
        here = [(at % s, at // s) for at in range(j * n, (j + 1) * n)]  # part and lane of each element
        value = parts[0]
        for p in range(1, s):
            # Elements of the parts so far stand where they belong already, except those of part 0 at first.
            order = []
            for lane, (part, source) in enumerate(here):
                if part == p:
                    order.append(n + source)
                elif part == 0 and p == 1:
                    order.append(source)
                else:
                    order.append(lane)
            value = shuffle(b, value, parts[p], order)
        made.append(value)
    return made


def every_nth(b: Builder, vectors: Sequence[Value], positions: Sequence[int]) -> Value:
    """The elements at increasing `positions` in the vectors laid end to end."""
    n = vectors[0].lanes
    value, have = vectors[0], [p if p < n else 0 for p in positions]
    if len(vectors) == 1:
        return shuffle(b, value, value, have)
    for j in range(1, len(vectors)):
        order = []
        for lane, p in enumerate(positions):
            if j * n <= p < (j + 1) * n:
                order.append(n + p - j * n)
            else:
                order.append(have[lane] if j == 1 else lane)
        value = shuffle(b, value, vectors[j], order)
    return value
