"""The micro-kernel of AMX: up to 32 rows by 32 columns of accumulators in four tile registers.

    tiles 0 1    accumulators of the first rows, by columns        4    A
    tiles 2 3    accumulators of the second rows                   5    B

Rows of one tile register lie a fixed stride apart: they come from one row axis. A chunk is what one tile register holds
of a run of A, at most 64 bytes; chunks divide the run evenly, so nothing is read beyond it and nothing is filled up.
Sums go through memory to the epilogue, which works row by row.

Rules:
* FEW: as few tile registers as possible hold something. A core has some twenty of them, which hold what the program
  sees and all results under way; two threads of a core have half each, and then what a program holds leaves few to
  work with. So B is loaded once more rather than held. Nanoseconds per product, operands in the first-level cache
  (Emerald Rapids, a virtual machine that does not see the other thread of its core):

      registers held                    8       7       6       4 (2 accumulators)
      the core for itself               6.6     6.4     6.4     6.4
      the other thread awake           27.9    19.3    16.4    12.8

* SPREAD: what is fetched stands evenly between the products. The next chunk of B is asked into the first-level cache,
  so that loads of tiles do not hold registers while they wait; panels to come into the second. 8 lines from the
  third-level cache per 4 products then cost nothing (20 GB/s), where products after all fetches of a round wait for
  them as long as they take. So do rows of what the epilogue reads and writes, which often lies further away than B: a
  product of 1024 x 1024 x 1024 takes 6 to 9 % less time so, ResNet-50's kernels in bf16 3 %.
* EVEN: the rows of both registers of A are as many, so that one shape serves both. Where a piece is odd, they share
  a row, which is summed twice and stored once.

How many rows and columns the tile registers have is set per thread, before the first micro-kernel of a shape runs: the
driver's `%tiles` remembers for which shape that was done, and the driver releases the registers at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vivace.base.dims import Dim, prod
from vivace.base.dtypes import DType
from vivace.lower.arithmetic import chunk_bytes
from vivace.targets.cpu.builder import Value
from vivace.targets.cpu.contraction_epilogue import Epilogue
from vivace.targets.cpu.contraction_fetch import Destination, destinations
from vivace.targets.cpu.contraction_plan import Plan, base_of, load_dims, symbol_of, variants
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import mask_text

_TILE_ROWS = 16
_LINE = 64
_ACC_BYTES = 4
_A, _B = 4, 5


def tile_kernel(p: Plan, outer: int, inner: int, tail: bool) -> tuple[str, dict[str, str]]:
    """The text of the micro-kernel for one shape of tile, and what it declares."""
    t = Text()
    vectors = p.tail_vectors if tail else p.tile.nv
    chunk = chunk_bytes(p.run_bytes)
    dims = load_dims(t, p)
    if _stores_sums(p, outer, tail):
        _configure(t, p, outer, inner, chunk)
        _sum(t, p, dims, outer, inner, vectors, chunk, "%out", t.mul(t.dim(p.inner.out, dims), p.out_bytes))
    else:
        row_bytes = p.tile.lanes * _ACC_BYTES
        t.put(f"%sums = alloca [{outer * inner * row_bytes} x i8], align {_LINE}")
        _configure(t, p, outer, inner, chunk)
        _sum(t, p, dims, outer, inner, vectors, chunk, "%sums", row_bytes)
        _finish(t, p, dims, outer, inner, vectors, tail)
    t.put("ret void")
    axes = "".join(f", i64 %x{i}" for i in range(len(p.axes())))
    parameters = (
        f"ptr %args, ptr %a, ptr %b, ptr %out, i64 %n{axes}, ptr %tiles{', ptr %ahead' if p.fetches_ahead else ''}"
    )
    head = f"define internal void @{symbol_of(p, outer, inner, tail)}({parameters})"
    return "\n".join([f"{head} noinline #0 {{", "entry:", *t.lines, "}"]), t.declares


def _stores_sums(p: Plan, outer: int, tail: bool) -> bool:
    """Whether tile registers are stored where the results belong, because nothing is left to do with them."""
    is_whole = not tail or (isinstance(p.c.n, int) and p.c.n % p.isa.n_f32_lanes == 0)
    return p.c.epilogue is None and p.c.out.dtype is p.ar.acc and outer == 1 and not p.tile.pitch and is_whole


def _finish(
    t: Text, p: Plan, dims: Mapping[str, Int], outer: int, inner: int, vectors: int, tail: bool
) -> None:  # fmt: skip
    """Brings sums through the epilogue, row by row."""
    isa, width = p.isa, p.isa.n_f32_lanes
    n = t.dim(p.c.n, dims)
    left: Int = n % p.tile.lanes if isinstance(n, int) else t.sub(n, "%n")
    masks = [mask_text(t, isa, t.sub(left, j * width)) if tail else None for j in range(vectors)]
    element = "i32" if p.ar.acc.is_int else "float"
    buffers = {x: base_of(t, p, x) for x in dict.fromkeys(p.c.extra)}
    steps = [t.mul(t.dim(x.out, dims), p.out_bytes) for x in (p.outer, p.inner)]
    with t.loop(0, outer * inner) as row:
        symbols: dict[str, Int] = {**dims, **{x.name: f"%x{k}" for k, x in enumerate(p.axes())}, "n": "%n"}
        there, absent = t.label(), t.label()
        o, i = _row(t, p, outer, inner, row)
        if p.tile.pitch:
            symbols |= {p.outer.name: o, p.inner.name: i}
            t.branch(t.less(i, t.dim(p.inner.extent, dims)), there, absent)
            t.start(there)
        else:
            for axis, by in ((p.outer, o), (p.inner, i)):
                if axis.name:
                    symbols[axis.name] = t.add(symbols[axis.name], by)
        out = t.at("%out", t.add(t.mul(o, steps[0]), t.mul(i, steps[1])))
        sums = t.at("%sums", t.mul(row, p.tile.lanes * _ACC_BYTES))
        loaded = [
            t.op(f"load <{width} x {element}>, ptr {t.at(sums, j * width * _ACC_BYTES)}, align {_LINE}")
            for j in range(vectors)
        ]
        epilogue = Epilogue(t, isa, "n", symbols, buffers)
        totals = [Value(value, element, width) for value in loaded]
        epilogue.store_row(p.c.epilogue, totals, {}, p.c.out, out, 0, masks)
        epilogue.close()
        if p.tile.pitch:
            t.jump(absent)
            t.start(absent)


def _row(t: Text, p: Plan, outer: int, inner: int, row: Int) -> tuple[Int, Int]:
    """How far a row of the tile is from its corner on the last two row axes; with a pitch, where it is on them."""
    if p.tile.pitch:
        return t.divmod(t.add(f"%x{p.axes().index(p.inner)}", row), p.tile.pitch)
    return t.divmod(row, inner) if outer > 1 else (0, row)


def release(t: Text) -> None:
    """Gives the tile registers back, so that a switch of threads need not save them."""
    t.declare("llvm.x86.tilerelease", "void @llvm.x86.tilerelease()")
    t.put("call void @llvm.x86.tilerelease()")


def _registers(outer: int, inner: int) -> tuple[int, list[int]]:
    """Rows of a tile register of A, and the rows of the tile that registers begin with (rule EVEN)."""
    if outer > 1:
        return inner, [o * inner for o in range(outer)]
    height = inner if inner <= _TILE_ROWS else -(-inner // 2)
    return height, list(dict.fromkeys((0, inner - height)))


def _configure(t: Text, p: Plan, outer: int, inner: int, chunk: int) -> None:
    """Sets the shapes of the tile registers, unless they are set."""
    shapes = sorted({(o, i) for o, i, _ in variants(p)})
    number = 1 + shapes.index((outer, inner))
    height, _ = _registers(outer, inner)
    rows = [*[height] * 4, height, chunk // 4]
    columns = [*[_LINE] * 4, chunk, _LINE]
    raw = bytearray(_LINE)
    raw[0] = 1
    for k, (n_columns, n_rows) in enumerate(zip(columns, rows)):
        raw[16 + 2 * k], raw[48 + k] = n_columns, n_rows
    name = f"{p.name}.shapes{outer}x{inner}"
    text = "".join(f"\\{byte:02x}" for byte in raw)
    t.declares[name] = f'@{name} = private constant [{_LINE} x i8] c"{text}", align {_LINE}'
    known = t.op("load i64, ptr %tiles, align 8")
    stale, ready = t.label(), t.label()
    t.branch(t.op(f"icmp eq i64 {known}, {number}"), ready, stale)
    t.start(stale)
    t.declare("llvm.x86.ldtilecfg", "void @llvm.x86.ldtilecfg(ptr)")
    t.put(f"call void @llvm.x86.ldtilecfg(ptr @{name})")
    t.put(f"store i64 {number}, ptr %tiles, align 8")
    t.jump(ready)
    t.start(ready)


def _sum(
    t: Text, p: Plan, dims: Mapping[str, Int], outer: int, inner: int, vectors: int, chunk: int, to: str, row_bytes: Int
) -> None:
    """Sums all taps in tile registers and stores them row by row at `to`."""
    _, firsts = _registers(outer, inner)
    pairs = [(r, v) for r in range(len(firsts)) for v in range(vectors)]
    t.declare("llvm.x86.tilezero", "void @llvm.x86.tilezero(i8)")
    for r, v in pairs:
        t.put(f"call void @llvm.x86.tilezero(i8 {2 * r + v})")
    a_stride = t.mul(t.dim(p.inner.a, dims), p.ar.a_bytes)
    between = t.mul(t.dim(p.outer.a, dims), p.ar.a_bytes) if outer > 1 else t.mul(a_stride, firsts[-1])
    if not any(x.extent == 0 for x in p.c.taps):
        soon = _Soon(destinations(t, p, dims), outer, inner, vectors * p.isa.n_f32_lanes, _n_chunks(p, chunk))

        def multiply(a: str, b: str, k: Int) -> None:
            _chunk(t, p, a, b, k, a_stride, between, len(firsts), vectors, soon.lines(t, p, dims, k))

        _taps(t, p, dims, multiply, chunk)
    t.declare("llvm.x86.tilestored64", "void @llvm.x86.tilestored64(i8, ptr, i64)")
    for r, v in pairs:
        place = t.at(to, t.add(t.mul(row_bytes, firsts[r]), v * _LINE))
        t.put(f"call void @llvm.x86.tilestored64(i8 {2 * r + v}, ptr {place}, i64 {row_bytes})")


def _n_chunks(p: Plan, chunk: int) -> Dim:
    return prod([*(x.extent for x in p.c.taps[:-1]), p.run_bytes // chunk])


@dataclass(frozen=True, slots=True)
class _Soon:
    """What the epilogue of a tile reads and writes, to be fetched in parts, one per chunk."""

    destinations: list[Destination]
    outer: int
    inner: int
    n_elements: int
    n_chunks: Dim

    def lines(self, t: Text, p: Plan, dims: Mapping[str, Int], k: Int) -> list[str]:
        """The part of chunk `k`: as many rows as bring all of them, the last one again after that."""
        n_rows = self.outer * self.inner
        n_each = -(-n_rows // self.n_chunks) if isinstance(self.n_chunks, int) else 1
        rows = [t.minimum(t.add(t.mul(k, n_each), i), n_rows - 1) for i in range(n_each)]
        places = [_row(t, p, self.outer, self.inner, row) for row in rows]
        return [x for d in self.destinations for o, i in places for x in d.lines(t, o, i, self.n_elements, dims)]


def _taps(t: Text, p: Plan, dims: Mapping[str, Int], one: Callable[[str, str, Int], None], chunk: int) -> None:
    """Calls `one` with the addresses of A and B and the number of every chunk of every tap."""
    outer = p.c.taps[:-1]
    n_chunks = t.dim(p.run_bytes // chunk, dims)
    b_chunk = chunk // (p.ar.group * p.ar.a_bytes) * p.row_bytes
    counts = [t.dim(x.extent, dims) for x in outer]
    total: Int = 1
    for count in counts:
        total = t.mul(total, count)
    with t.times(total) as tap:
        rest: Int = tap
        in_a: Int = 0
        for depth, axis in reversed(list(enumerate(outer))):
            rest, at = t.divmod(rest, counts[depth]) if depth else (0, rest)
            in_a = t.add(in_a, t.mul(at, t.mul(t.dim(axis.a, dims), p.ar.a_bytes)))
        a, b = t.at("%a", in_a), t.at("%b", t.mul(tap, t.mul(n_chunks, b_chunk)))
        with t.times(n_chunks) as k:
            one(t.at(a, t.mul(k, chunk)), t.at(b, t.mul(k, b_chunk)), t.add(t.mul(tap, n_chunks), k))


def _chunk(
    t: Text, p: Plan, a: str, b: str, k: Int, a_stride: Int, between: Int, n_registers: int, vectors: int,
    soon: list[str],
) -> None:  # fmt: skip
    """Multiplies one chunk of every row with one of every column; columns to and fro, so that B is loaded less often
    (rule FEW).
    """
    name = f"llvm.x86.{_product(p)}"
    t.declare(name, f"void @{name}(i8, i8, i8)")
    t.declare("llvm.x86.tileloadd64", "void @llvm.x86.tileloadd64(i8, ptr, i64)")
    b_chunk = p.round_rows * p.row_bytes
    fetches = [(t.at(b, b_chunk + line), 1) for line in range(0, b_chunk, _LINE)]
    if p.fetches_ahead:
        ahead = t.at("%ahead", t.mul(k, p.ahead_lines * _LINE))
        fetches += [(t.at(ahead, line * _LINE), 2) for line in range(p.ahead_lines)]
    fetches += [(line, 1) for line in soon]
    n_products, held = n_registers * vectors, -1

    def load(tile: int, pointer: str, stride: Int) -> None:
        t.put(f"call void @llvm.x86.tileloadd64(i8 {tile}, ptr {pointer}, i64 {stride})")

    for r in range(n_registers):
        load(_A, t.at(a, t.mul(between, r)), a_stride)
        for j, v in enumerate(range(vectors) if r % 2 == 0 else reversed(range(vectors))):
            if v != held:
                load(_B, t.at(b, v * _LINE), p.row_bytes)
            held = v
            t.put(f"call void @{name}(i8 {2 * r + v}, i8 {_A}, i8 {_B})")
            for place, level in fetches[r * vectors + j :: n_products]:
                t.fetch(place, level)


def _product(p: Plan) -> str:
    if p.ar.kind == "tile16":
        return "tdpbf16ps"
    return "tdpbssd" if p.c.a.dtype is DType.i8 else "tdpbusd"
