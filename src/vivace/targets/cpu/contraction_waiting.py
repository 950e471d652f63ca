"""The sums of one tile that wait to be finished while those of the next are made: products keep the matrix unit busy
and leave the vector units idle, and an epilogue the other way round.

    words of the driver      shape of the tile registers, kind of the tile that waits (0: none waits), its number of
                             rows, its out, its n, its place on each axis
    behind them              its sums, row by row

Rules:
* ONE: at most one tile waits. A micro-kernel finishes a tile of its own kind in parts, one per chunk of its products,
  before it stores its own sums there; a tile of another kind it finishes first. The driver finishes the last one.
* KIND: tiles are of one kind where one code finishes them, whatever the number of their rows.
* LONGER: sums wait where products take longer than finishing does. Vector instructions of 512 bits that stand among
  loads, products or stores of tiles are issued one a cycle, in a stretch of their own two (400 of them with 9 loads, 4
  products and 4 stores: 144 ns spread, 149 ns apart, 72 alone; Emerald Rapids). So T cycles of tiles and V instructions
  take the larger of T and V, or T + V / 2. With 64 steps of bytes and a residual, sums that wait take 1.1 of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vivace.base.dims import Dim, prod
from vivace.loops.kernel import Binary, Cast, Expr, Fma, Load, Lookup, Select, Unary, walk
from vivace.lower.arithmetic import chunk_bytes
from vivace.targets.cpu.builder import Value
from vivace.targets.cpu.contraction_epilogue import Epilogue, makes_bytes, split_start
from vivace.targets.cpu.contraction_plan import Plan, base_of, load_dims, plan_of_rows, variants
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import ACC_BYTES, LINE_BYTES, mask_text

# Where the words are; the first is the shape's.
_KIND, _ROWS, _OUT, _N, _PLACES = 8, 16, 24, 32, 40

Kind = tuple[int, bool]  # rows of the inner axis where a tile has several of the outer one, else 0; tail panel


def stores_sums(p: Plan, outer: int, tail: bool) -> bool:
    """Whether tile registers are stored where the results belong, because nothing is left to do with them."""
    is_whole = not tail or (isinstance(p.c.n, int) and p.c.n % p.isa.n_f32_lanes == 0)
    return p.c.epilogue is None and p.c.out.dtype is p.ar.acc and outer == 1 and not p.tile.pitch and is_whole


def split_panel(p: Plan, tail: bool) -> tuple[Load | None, Expr | None]:
    """What the sums of whole panels start from, loaded into every row of the tile registers, and what is left to do.
    There may be less of it than the last panel is wide."""
    return (None, p.c.epilogue) if tail or waits(p) else split_start(p.c, "n", p.ar.acc)


def row_of(t: Text, inner: int, row: Int) -> tuple[Int, Int]:
    """How far a row of the tile is from its corner on the last two row axes; `inner` is as in `Kind`."""
    return t.divmod(row, inner) if inner else (0, row)


def begin(t: Text, p: Plan) -> None:
    """Makes the words of a driver: no shape is set, and nobody waits."""
    n_bytes = _sums_at(p) + p.tile_rows * p.tile.lanes * ACC_BYTES
    t.put(f"%tiles = alloca [{n_bytes} x i8], align {LINE_BYTES}")
    t.put("store <2 x i64> zeroinitializer, ptr %tiles, align 16")


def sums(t: Text, p: Plan) -> str:
    return t.at("%tiles", _sums_at(p))


def _sums_at(p: Plan) -> int:
    return -(-(_PLACES + 8 * len(p.axes())) // LINE_BYTES) * LINE_BYTES


def _kind(outer: int, inner: int, tail: bool) -> Kind:
    return (inner if outer > 1 else 0, tail)


def _kinds(p: Plan) -> dict[Kind, int]:
    """Those that wait, in the order of their numbers, from 1 on, and the rows of the largest tile of each."""
    found: dict[Kind, int] = {}
    for outer, inner, tail in variants(p):
        if plan_of_rows(p, outer * inner).ar.is_tile and not stores_sums(p, outer, tail) and waits(p):
            kind = _kind(outer, inner, tail)
            found[kind] = max(outer * inner, found.get(kind, 0))
    return found


def n_chunks(p: Plan) -> Dim:
    """Of a row of A, in all taps."""
    return prod([*(x.extent for x in p.c.taps[:-1]), p.run_bytes // chunk_bytes(p.run_bytes)])


def waits(p: Plan) -> bool:
    """Rule LONGER: a chunk is 64 cycles of products, what an operation of the epilogue takes for 32 rows about 26."""
    kinds = (Unary, Binary, Fma, Select, Cast, Lookup)
    n = sum(isinstance(e, kinds) for e in walk(p.c.epilogue)) if p.c.epilogue else 0
    chunks = n_chunks(p)
    return not isinstance(chunks, int) or 64 * chunks >= 26 * n


def finish_at_once(t: Text, p: Plan, outer: int, inner: int, tail: bool) -> None:
    """Finishes this tile, whose sums have been stored."""
    places = [f"%x{i}" for i in range(len(p.axes()))]
    _Rows(t, p, _kind(outer, inner, tail), "%out", "%n", *places).finish(0, outer * inner)


def finish_before(
    t: Text, p: Plan, outer: int, inner: int, tail: bool
) -> tuple[Callable[[Int], None], Callable[[], None]]:
    """Finishes what waits, unless it is of the kind of this tile. Returns what finishes a part of it in chunk `k`, and
    what lets this tile wait, after all parts.
    """
    kind, kinds = _kind(outer, inner, tail), _kinds(p)
    number, most = 1 + list(kinds).index(kind), kinds[kind]
    is_same = t.op(f"icmp eq i64 {_load(t, _KIND)}, {number}")
    rows = _Rows(t, p, kind, *_read(t, p))
    chunks = t.dim(n_chunks(p), rows.dims)
    if not isinstance(chunks, int) or chunks == 0:  # of no chunk there is no part
        is_same = t.op(f"and i1 {is_same}, {t.less(0, chunks)}")
    other, ready = t.label(), t.label()
    t.branch(is_same, ready, other)
    t.start(other)
    finish(t, p)
    t.jump(ready)
    t.start(ready)
    end = t.op(f"select i1 {is_same}, i64 {_load(t, _ROWS)}, i64 0")
    some = t.maximum(chunks, 1)
    each = rows.n_together
    n_each = t.mul(t.divmod(t.add(some, -(-most // each) - 1), some)[0], each)

    def part(k: Int) -> None:
        first = t.mul(k, n_each)
        rows.finish(first, t.minimum(t.add(first, n_each), end))

    return part, lambda: _write(t, p, number, outer * inner)


def _write(t: Text, p: Plan, number: int, n_rows: int) -> None:
    """Notes which tile the sums are of."""
    places = [f"i64 %x{i}" for i in range(len(p.axes()))]
    for i, value in enumerate((f"i64 {number}", f"i64 {n_rows}", "ptr %out", "i64 %n", *places)):
        t.put(f"store {value}, ptr {t.at('%tiles', _KIND + 8 * i)}, align 8")


def _read(t: Text, p: Plan) -> list[str]:
    """Where the results of the tile that waits belong, its n, and its place on each axis."""
    out = t.op(f"load ptr, ptr {t.at('%tiles', _OUT)}, align 8")
    return [out, *(_load(t, _N + 8 * i) for i in range(1 + len(p.axes())))]


def finish(t: Text, p: Plan) -> None:
    """Finishes whatever waits."""
    kinds = _kinds(p)
    if not kinds:
        return
    done, labels = t.label(), [t.label() for _ in kinds]
    cases = " ".join(f"i64 {1 + i}, label %{label}" for i, label in enumerate(labels))
    t.put(f"switch i64 {_load(t, _KIND)}, label %{done} [{cases}]")
    for i, label in enumerate(labels):
        t.start(label)
        t.put(f"call void @{p.name}.finish{i}(ptr %args, ptr %tiles)")
        t.jump(done)
    t.start(done)


def finishers(p: Plan) -> Iterator[tuple[str, dict[str, str]]]:
    """The texts of the functions that finish a tile of each kind at once, and what they declare."""
    for i, kind in enumerate(_kinds(p)):
        t = Text()
        _Rows(t, p, kind, *_read(t, p)).finish(0, _load(t, _ROWS))
        t.put("ret void")
        head = f"define internal void @{p.name}.finish{i}(ptr %args, ptr %tiles) noinline #0 {{"
        yield "\n".join([head, "entry:", *t.lines, "}"]), t.declares


class _Rows:
    """Brings rows of stored sums through the epilogue. What does not depend on the row is computed here."""

    def __init__(self, t: Text, p: Plan, kind: Kind, out: str, n: str, *places: str) -> None:
        self._t, self._p = t, p
        self._out, self._n, self._places = out, n, places
        self._inner, tail = kind
        _, self._epilogue = split_panel(p, tail)
        self.dims = load_dims(t, p)
        width, columns = p.isa.n_f32_lanes, t.dim(p.c.n, self.dims)
        left: Int = columns % p.tile.lanes if isinstance(columns, int) else t.sub(columns, n)
        vectors = p.tail_vectors if tail else p.tile.nv
        self._masks = [mask_text(t, p.isa, t.sub(left, j * width)) if tail else None for j in range(vectors)]
        self._buffers = {x: base_of(t, p, x) for x in dict.fromkeys(p.c.extra)}
        self._steps = [t.mul(t.dim(x.out, self.dims), p.out_bytes) for x in (p.outer, p.inner)]
        self._sums = sums(t, p)

    @property
    def n_together(self) -> int:
        """Rows that are finished at a time: two where they make bytes and have no gaps."""
        p, e = self._p, self._epilogue
        has_gaps = p.tile.pitch != 0 and p.tile.pitch != p.inner.extent
        makes = p.isa.vector_bits == 512 and e is not None and makes_bytes(e)
        return 2 if makes and not has_gaps and self._masks == [None, None] else 1

    def finish(self, first: Int, last: Int) -> None:
        """Those from `first` on before `last`."""
        t = self._t
        with t.loop(first, last, self.n_together) as row:
            if self.n_together == 2:  # the last one of an odd number once more
                self._finish_two([row, t.minimum(t.add(row, 1), t.sub(last, 1))])
            else:
                self._finish_one(row)

    def _finish_one(self, row: Int) -> None:
        t, p = self._t, self._p
        out, symbols = self._place(row)
        there, absent = t.label(), t.label()
        if p.tile.pitch:
            t.branch(t.less(symbols[p.inner.name], t.dim(p.inner.extent, self.dims)), there, absent)
            t.start(there)
        epilogue = Epilogue(t, p.isa, "n", symbols, self._buffers)
        epilogue.store_row(self._epilogue, self._totals(row), {}, p.c.out, out, 0, self._masks)
        epilogue.close()
        if p.tile.pitch:
            t.jump(absent)
            t.start(absent)

    def _place(self, row: Int) -> tuple[str, dict[str, Int]]:
        """Where a row is stored, and its place on the axes."""
        t, p = self._t, self._p
        symbols: dict[str, Int] = {**self.dims, **dict(zip((x.name for x in p.axes()), self._places)), "n": self._n}
        o, i = row_of(t, self._inner, row)
        if p.tile.pitch:  # where it is, not how far from the corner
            o, i = t.divmod(t.add(symbols[p.inner.name], row), p.tile.pitch)
            symbols |= {p.outer.name: o, p.inner.name: i}
        else:
            for axis, by in ((p.outer, o), (p.inner, i)):
                if axis.name:
                    symbols[axis.name] = t.add(symbols[axis.name], by)
        return t.at(self._out, t.add(t.mul(o, self._steps[0]), t.mul(i, self._steps[1]))), symbols

    def _finish_two(self, rows: list[Int]) -> None:
        t, p = self._t, self._p
        assert self._epilogue is not None
        totals = [total for row in rows for total in self._totals(row)]
        outs, symbols = zip(*(self._place(row) for row in rows))
        epilogue = Epilogue(t, p.isa, "n", symbols[0], self._buffers)
        epilogue.store_two_rows(self._epilogue, totals, symbols, outs)
        epilogue.close()

    def _totals(self, row: Int) -> list[Value]:
        """The sums of a row."""
        t, p, width = self._t, self._p, self._p.isa.n_f32_lanes
        element = "i32" if p.ar.acc.is_int else "float"
        of_row = t.at(self._sums, t.mul(row, p.tile.lanes * ACC_BYTES))
        return [
            Value(t.op(f"load <{width} x {element}>, ptr {t.at(of_row, at)}, align {LINE_BYTES}"), element, width)
            for at in range(0, len(self._masks) * width * ACC_BYTES, width * ACC_BYTES)
        ]


def _load(t: Text, where: int) -> str:
    return t.op(f"load i64, ptr {t.at('%tiles', where)}, align 8")
