"""The micro-kernel of AMX: up to 32 rows by 32 columns of accumulators in four tile registers.

    tiles 0 1    accumulators of the first rows, by columns        4    A
    tiles 2 3    accumulators of the second rows                   5    B

Rows of one tile register lie a fixed stride apart: they come from one row axis. A chunk is what one tile register holds
of a run of A, at most 64 bytes; chunks divide the run evenly, so nothing is read beyond it and nothing is filled up.
Sums go through memory to the epilogue, which works row by row while the next tile is multiplied
(`contraction_waiting`).

Sums start from the bias where the epilogue begins with it: a load of a tile register whose rows lie no bytes apart.

Rules:
* FEW: as few tile registers as possible hold something. A core has some twenty of them, which hold what the program
  sees and all results under way; two threads of a core have half each, and then what a program holds leaves few to
  work with. So B is loaded once more rather than held. Nanoseconds per product, operands in the first-level cache
  (Emerald Rapids, a virtual machine that does not see the other thread of its core):

      registers held                    8       7       6       4 (2 accumulators)
      the core for itself               6.6     6.4     6.4     6.4
      the other thread awake           27.9    19.3    16.4    12.8

* SPREAD: what is fetched stands evenly between the products. The next chunk of B is asked into the first-level cache,
  so that loads of tiles do not hold registers while they wait; panels to come into the second, or rows to come
  (`Plan.fetches_rows`). 8 lines from the third-level cache per 4 products then cost nothing (20 GB/s), where products
  after all fetches of a round wait for them as long as they take. So do rows of what the epilogue reads and writes,
  which often lies further away than B: a product of 1024 x 1024 x 1024 takes 6 to 9 % less time so, ResNet-50's
  kernels in bf16 3 %.
* EVEN: the rows of both registers of A are as many, so that one shape serves both. Where a piece is odd, they share
  a row, which is summed twice and stored once.

How many rows and columns the tile registers have is set per thread, before the first micro-kernel of a shape runs: the
driver's `%tiles` remembers for which that was done, and the driver releases the registers at its end. Pieces whose
registers have as many rows share a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vivace.base.dims import Dim
from vivace.base.dtypes import DType
from vivace.lower.arithmetic import chunk_bytes
from vivace.targets.cpu.contraction_fetch import Destination, destinations
from vivace.targets.cpu.contraction_plan import Plan, base_of, load_dims, symbol_of, variants
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import ACC_BYTES
from vivace.targets.cpu.contraction_waiting import (
    finish_at_once,
    finish_before,
    n_chunks,
    row_of,
    split_panel,
    stores_sums,
    sums,
    waits,
)
from vivace.targets.cpu.memory import flat_index

_TILE_ROWS = 16
_LINE = 64
_A, _B = 4, 5


def tile_kernel(p: Plan, outer: int, inner: int, tail: bool) -> tuple[str, dict[str, str]]:
    """The text of the micro-kernel for one shape of tile, and what it declares."""
    t = Text()
    vectors = p.tail_vectors if tail else p.tile.nv
    chunk = chunk_bytes(p.run_bytes)
    dims = load_dims(t, p)
    _configure(t, p, outer, inner, chunk)
    if stores_sums(p, outer, tail):
        _sum(t, p, dims, outer, inner, tail, chunk, lambda k: None)
        _store(t, outer, inner, vectors, "%out", t.mul(t.dim(p.inner.out, dims), p.out_bytes))
    elif not waits(p):
        _sum(t, p, dims, outer, inner, tail, chunk, lambda k: None)
        _store(t, outer, inner, vectors, sums(t, p), p.tile.lanes * ACC_BYTES)
        finish_at_once(t, p, outer, inner, tail)
    else:
        meanwhile, wait = finish_before(t, p, outer, inner, tail)
        _sum(t, p, dims, outer, inner, tail, chunk, meanwhile)
        wait()
        _store(t, outer, inner, vectors, sums(t, p), p.tile.lanes * ACC_BYTES)
    t.put("ret void")
    axes = "".join(f", i64 %x{i}" for i in range(len(p.axes())))
    ahead = ", ptr %ahead" if p.fetches_ahead or p.fetches_rows else ""
    parameters = f"ptr %args, ptr %a, ptr %b, ptr %out, i64 %n{axes}, ptr %tiles{ahead}"
    head = f"define internal void @{symbol_of(p, outer, inner, tail)}({parameters})"
    return "\n".join([f"{head} noinline #0 {{", "entry:", *t.lines, "}"]), t.declares


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
    height, _ = _registers(outer, inner)
    number = 1 + sorted({_registers(o, i)[0] for o, i, _ in variants(p)}).index(height)
    rows = [*[height] * 4, height, chunk // 4]
    columns = [*[_LINE] * 4, chunk, _LINE]
    raw = bytearray(_LINE)
    raw[0] = 1
    for k, (n_columns, n_rows) in enumerate(zip(columns, rows)):
        raw[16 + 2 * k], raw[48 + k] = n_columns, n_rows
    name = f"{p.name}.shapes{height}"
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
    t: Text, p: Plan, dims: Mapping[str, Int], outer: int, inner: int, tail: bool, chunk: int,
    meanwhile: Callable[[Int], None],
) -> None:  # fmt: skip
    """Sums all taps in tile registers; `meanwhile` writes what is done besides in each chunk."""
    vectors = p.tail_vectors if tail else p.tile.nv
    _, firsts = _registers(outer, inner)
    start, _ = split_panel(p, tail)
    if start is None:
        t.declare("llvm.x86.tilezero", "void @llvm.x86.tilezero(i8)")
        for r, v in _accumulators(firsts, vectors):
            t.put(f"call void @llvm.x86.tilezero(i8 {2 * r + v})")
    else:
        at = {**dims, **{x.name: f"%x{i}" for i, x in enumerate(p.axes())}, "n": "%n"}
        bias = t.at(base_of(t, p, start.buffer), t.mul(t.dim(flat_index(start.buffer, start.index), at), ACC_BYTES))
        for r, v in _accumulators(firsts, vectors):
            _load(t, 2 * r + v, t.at(bias, v * _LINE), 0)
    a_stride = t.mul(t.dim(p.inner.a, dims), p.ar.a_bytes)
    between = t.mul(t.dim(p.outer.a, dims), p.ar.a_bytes) if outer > 1 else t.mul(a_stride, firsts[-1])
    if any(x.extent == 0 for x in p.c.taps):
        return
    corner = t.divmod(f"%x{p.axes().index(p.inner)}", p.tile.pitch) if p.tile.pitch else (0, 0)
    soon = _Soon(destinations(t, p, dims), corner, outer, inner, vectors * p.isa.n_f32_lanes, n_chunks(p))

    def multiply(a: str, b: str, k: Int) -> None:
        _chunk(t, p, a, b, k, a_stride, between, len(firsts), vectors, soon.lines(t, p, dims, k))
        meanwhile(k)

    _taps(t, p, dims, multiply, chunk)


def _store(t: Text, outer: int, inner: int, vectors: int, to: str, row_bytes: Int) -> None:
    """Stores the sums row by row."""
    t.declare("llvm.x86.tilestored64", "void @llvm.x86.tilestored64(i8, ptr, i64)")
    _, firsts = _registers(outer, inner)
    for r, v in _accumulators(firsts, vectors):
        place = t.at(to, t.add(t.mul(row_bytes, firsts[r]), v * _LINE))
        t.put(f"call void @llvm.x86.tilestored64(i8 {2 * r + v}, ptr {place}, i64 {row_bytes})")


def _load(t: Text, tile: int, pointer: str, stride: Int, passes_by: bool = False) -> None:
    name = "llvm.x86.tileloaddt164" if passes_by else "llvm.x86.tileloadd64"
    t.declare(name, f"void @{name}(i8, ptr, i64)")
    t.put(f"call void @{name}(i8 {tile}, ptr {pointer}, i64 {stride})")


def _accumulators(firsts: Sequence[int], vectors: int) -> list[tuple[int, int]]:
    return [(r, v) for r in range(len(firsts)) for v in range(vectors)]


@dataclass(frozen=True, slots=True)
class _Soon:
    """What the epilogue of a tile reads and writes, to be fetched in parts, one per chunk. `corner` is where the tile
    begins on the last two row axes, with a pitch."""

    destinations: list[Destination]
    corner: tuple[Int, Int]
    outer: int
    inner: int
    n_elements: int
    n_chunks: Dim

    def lines(self, t: Text, p: Plan, dims: Mapping[str, Int], k: Int) -> list[str]:
        """The part of chunk `k`: as many rows as bring all of them, the last one again after that."""
        n_rows = self.outer * self.inner
        n_each = -(-n_rows // self.n_chunks) if isinstance(self.n_chunks, int) else 1
        rows = [t.minimum(t.add(t.mul(k, n_each), i), n_rows - 1) for i in range(n_each)]
        places = [row_of(t, self.inner if self.outer > 1 else 0, row) for row in rows]
        if p.tile.pitch:  # as if all were in one line: what is a few places beside its own comes soon too
            places = [(self.corner[0], t.add(self.corner[1], row)) for row in rows]
        return [x for d in self.destinations for o, i in places for x in d.lines(t, o, i, self.n_elements, dims)]


def _taps(t: Text, p: Plan, dims: Mapping[str, Int], one: Callable[[str, str, Int], None], chunk: int) -> None:
    """Calls `one` with the addresses of A and B and the number of every chunk of every tap."""
    outer = p.c.taps[:-1]
    chunks = t.dim(p.run_bytes // chunk, dims)
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
        a, b = t.at("%a", in_a), t.at("%b", t.mul(tap, t.mul(chunks, b_chunk)))
        with t.times(chunks) as k:
            one(t.at(a, t.mul(k, chunk)), t.at(b, t.mul(k, b_chunk)), t.add(t.mul(tap, chunks), k))


def _chunk(
    t: Text, p: Plan, a: str, b: str, k: Int, a_stride: Int, between: Int, n_registers: int, vectors: int,
    soon: list[str],
) -> None:  # fmt: skip
    """Multiplies one chunk of every row with one of every column; columns to and fro, so that B is loaded less often
    (rule FEW).
    """
    name = f"llvm.x86.{_product(p)}"
    t.declare(name, f"void @{name}(i8, i8, i8)")
    b_chunk = p.round_rows * p.row_bytes
    fetches = [(t.at(b, b_chunk + line), 1) for line in range(0, b_chunk, _LINE)]
    if p.fetches_ahead or p.fetches_rows:
        ahead = t.at("%ahead", t.mul(k, p.ahead_lines * _LINE))
        fetches += [(t.at(ahead, line * _LINE), p.ahead_level) for line in range(p.ahead_lines)]
    fetches += [(line, 1) for line in soon]
    n_products, held = n_registers * vectors, -1

    for r in range(n_registers):
        _load(t, _A, t.at(a, t.mul(between, r)), a_stride, p.passes_by == "a")
        for j, v in enumerate(range(vectors) if r % 2 == 0 else reversed(range(vectors))):
            if v != held:
                _load(t, _B, t.at(b, v * _LINE), p.row_bytes, p.passes_by == "b")
            held = v
            t.put(f"call void @{name}(i8 {2 * r + v}, i8 {_A}, i8 {_B})")
            for place, level in fetches[r * vectors + j :: n_products]:
                t.fetch(place, level)


def _product(p: Plan) -> str:
    if p.ar.kind == "tile16":
        return "tdpbf16ps"
    return "tdpbssd" if p.c.a.dtype is DType.i8 else "tdpbusd"
