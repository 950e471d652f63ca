"""The f32 micro-kernel: one tile of rows x vectors of accumulators, summed over all taps in registers, then finished and stored.

It knows nothing of tiles around it: the driver (`contraction`) calls it with the addresses of its corner in A, B and out.
Rows are byte offsets from the A pointer. With known strides they are immediates of the broadcasting instructions, so that one register
addresses all of A. B rows are whole vectors, contiguous in a panel or a run-time stride apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vivace.base.machine import Isa
from vivace.loops.contraction import Axis
from vivace.targets.cpu.contraction_text import Int, Text

F32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Operands:
    """Where the taps lie: axes outermost first, strides in elements. In a panel, B steps by `lanes` in the taps' order.

    `masks` are of the vectors of a B row: a panel is padded and needs none.
    """

    taps: tuple[Axis, ...]
    panel: bool
    lanes: int
    masks: list[str | None]


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows as (outer, inner) steps from the tile's corner, and vectors of columns."""

    rows: tuple[tuple[int, int], ...]
    vectors: int
    unroll: int


def vector_type(isa: Isa) -> str:
    return f"<{isa.n_f32_lanes} x float>"


def multiply_add(t: Text, isa: Isa, a: str, b: str, c: str) -> str:
    """`a * b + c` per lane; one rounding where the instruction set has it."""
    kind, w = vector_type(isa), isa.n_f32_lanes
    if isa.has_fma:
        t.declare(f"llvm.fma.v{w}f32", f"{kind} @llvm.fma.v{w}f32({kind}, {kind}, {kind})")
        return t.op(f"call {kind} @llvm.fma.v{w}f32({kind} {a}, {kind} {b}, {kind} {c})")
    product = t.op(f"fmul {kind} {a}, {b}")
    return t.op(f"fadd {kind} {c}, {product}")


def broadcast(t: Text, isa: Isa, pointer: str) -> str:
    """One f32 of memory in every lane."""
    kind = vector_type(isa)
    scalar = t.op(f"load float, ptr {pointer}, align 4")
    first = t.op(f"insertelement {kind} poison, float {scalar}, i64 0")
    return t.op(f"shufflevector {kind} {first}, {kind} poison, <{isa.n_f32_lanes} x i32> zeroinitializer")


def accumulate(
    t: Text,
    isa: Isa,
    shape: Shape,
    operands: Operands,
    a: str,
    b: str,
    row_offsets: list[Int],
    dims: Mapping[str, Int],
    start: list[list[str]] | None = None,
) -> list[list[str]]:
    """Sums over all taps, onto `start` if there is one. Returns accumulators by row and vector."""
    kind = vector_type(isa)
    zero = start or [["zeroinitializer"] * shape.vectors for _ in shape.rows]
    if any(tap.extent == 0 for tap in operands.taps):
        return zero
    *outer, channel = operands.taps or (Axis("k", 1, 1, operands.lanes),)
    step_a = t.mul(t.dim(channel.a, dims), F32_BYTES)
    step_b = operands.lanes * F32_BYTES if operands.panel else t.mul(t.dim(channel.b, dims), F32_BYTES)
    extent = t.dim(channel.extent, dims)

    def one_step(ap: str, bp: str, acc: list[list[str]], u: int) -> list[list[str]]:
        columns = [
            load(t, isa, t.at(bp, t.add(t.mul(step_b, u), j * isa.vector_bits // 8)), mask)
            for j, mask in enumerate(operands.masks)
        ]
        result = []
        for offset, row in zip(row_offsets, acc):
            x = broadcast(t, isa, t.at(t.at(ap, t.mul(step_a, u)), offset))
            result.append([multiply_add(t, isa, x, y, s) for y, s in zip(columns, row)])
        return result

    def steps(ap: str, bp: str, acc: list[list[str]], n: int) -> tuple[str, str, list[list[str]]]:
        for u in range(n):
            acc = one_step(ap, bp, acc, u)
            acc = _grid(t.pin(kind, _flat(acc)), shape.vectors)
        return t.at(ap, t.mul(step_a, n)), t.at(bp, t.mul(step_b, n)), acc

    def run(times: Int, ap: str, bp: str, acc: list[list[str]], n: int) -> tuple[str, str, list[list[str]]]:
        """`times` rounds of `n` steps."""
        if times == 0:
            return ap, bp, acc
        if times == 1:
            return steps(ap, bp, acc, n)

        def body(_: str, carried: list[str]) -> list[str]:
            p, q, grid = steps(carried[0], carried[1], _grid(carried[2:], shape.vectors), n)
            return [p, q, *_flat(grid)]

        out = t.reduce_loop(times, [("ptr", ap), ("ptr", bp), *((kind, x) for x in _flat(acc))], body)
        return out[0], out[1], _grid(out[2:], shape.vectors)

    def maybe(times: Int, ap: str, bp: str, acc: list[list[str]], n: int) -> tuple[str, str, list[list[str]]]:
        """`run`, where `times` may turn out to be 0."""
        enter, done = t.label(), t.label()
        before = t.block
        t.branch(t.less(0, times), enter, done)
        t.start(enter)
        p, q, grid = run(times, ap, bp, acc, n)
        t.jump(done)
        last = t.block
        t.start(done)
        ap, bp = (t.op(f"phi ptr [ {x}, %{before} ], [ {y}, %{last} ]") for x, y in ((ap, p), (bp, q)))
        pairs = zip(_flat(acc), _flat(grid))
        joined = [t.op(f"phi {kind} [ {x}, %{before} ], [ {y}, %{last} ]") for x, y in pairs]
        return ap, bp, _grid(joined, shape.vectors)

    def channels(ap: str, bp: str, acc: list[list[str]]) -> tuple[str, list[list[str]]]:
        if isinstance(extent, int):
            times, rest = divmod(extent, shape.unroll)
            ap, bp, acc = run(times, ap, bp, acc, shape.unroll)
            _, bp, acc = steps(ap, bp, acc, rest)
            return bp, acc
        whole, rest = t.divmod(extent, shape.unroll)
        ap, bp, acc = maybe(whole, ap, bp, acc, shape.unroll)
        _, bp, acc = maybe(rest, ap, bp, acc, 1)
        return bp, acc

    if not outer:
        return channels(a, b, acc=zero)[1]
    counts = [t.dim(x.extent, dims) for x in outer]
    total: Int = 1
    for count in counts:
        total = t.mul(total, count)

    def tap(i: str, carried: list[str]) -> list[str]:
        offset_a: Int = 0
        offset_b: Int = 0
        rest: Int = i
        for depth, axis in reversed(list(enumerate(outer))):
            rest, at = t.divmod(rest, counts[depth]) if depth else (0, rest)
            offset_a = t.add(offset_a, t.mul(at, t.mul(t.dim(axis.a, dims), F32_BYTES)))
            offset_b = t.add(offset_b, t.mul(at, t.mul(t.dim(axis.b, dims), F32_BYTES)))
        bp = carried[0] if operands.panel else t.at(b, offset_b)
        bp, acc = channels(t.at(a, offset_a), bp, _grid(carried[1:], shape.vectors))
        return [bp, *_flat(acc)]

    return _grid(t.reduce_loop(total, [("ptr", b), *((kind, x) for x in _flat(zero))], tap)[1:], shape.vectors)


def _flat(grid: list[list[str]]) -> list[str]:
    return [x for row in grid for x in row]


def _grid(flat: list[str], width: int) -> list[list[str]]:
    return [flat[i : i + width] for i in range(0, len(flat), width)]


def mask_text(t: Text, isa: Isa, columns: Int) -> str | None:
    """Which lanes of a vector are real when `columns` are left; None for all of them."""
    w = isa.n_f32_lanes
    if isinstance(columns, int):
        if columns >= w:
            return None
        return "<" + ", ".join(f"i1 {'true' if i < columns else 'false'}" for i in range(w)) + ">"
    lanes = "<" + ", ".join(f"i64 {i}" for i in range(w)) + ">"
    first = t.op(f"insertelement <{w} x i64> poison, i64 {columns}, i64 0")
    wide = t.op(f"shufflevector <{w} x i64> {first}, <{w} x i64> poison, <{w} x i32> zeroinitializer")
    return t.op(f"icmp slt <{w} x i64> {lanes}, {wide}")


def store(t: Text, isa: Isa, value: str, pointer: str, mask: str | None) -> None:
    kind, w = vector_type(isa), isa.n_f32_lanes
    if mask is None:
        t.put(f"store {kind} {value}, ptr {pointer}, align 4")
        return
    t.declare(f"llvm.masked.store.v{w}f32.p0", f"void @llvm.masked.store.v{w}f32.p0({kind}, ptr, <{w} x i1>)")
    t.put(f"call void @llvm.masked.store.v{w}f32.p0({kind} {value}, ptr align 4 {pointer}, <{w} x i1> {mask})")


def load(t: Text, isa: Isa, pointer: str, mask: str | None) -> str:
    """A vector of memory; lanes outside the mask are 0 and not touched."""
    kind, w = vector_type(isa), isa.n_f32_lanes
    if mask is None:
        return t.op(f"load {kind}, ptr {pointer}, align 4")
    t.declare(f"llvm.masked.load.v{w}f32.p0", f"{kind} @llvm.masked.load.v{w}f32.p0(ptr, <{w} x i1>, {kind})")
    return t.op(
        f"call {kind} @llvm.masked.load.v{w}f32.p0(ptr align 4 {pointer}, <{w} x i1> {mask}, {kind} zeroinitializer)"
    )
