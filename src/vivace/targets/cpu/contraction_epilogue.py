"""What happens to accumulators before they are stored: the epilogue's expression over vectors along `n`, and the
store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vivace.base.dims import linear, symbols
from vivace.base.dtypes import DType
from vivace.base.errors import InternalError
from vivace.base.machine import Isa
from vivace.graph.ops.quantized import BYTES, RANGES
from vivace.loops.contraction import Contraction, Depthwise
from vivace.loops.kernel import (
    Binary,
    Buffer,
    Cast,
    Const,
    Expr,
    Fma,
    Load,
    Lookup,
    Read,
    Select,
    Unary,
    dtype_of,
    walk,
)
from vivace.targets.cpu.builder import Builder, Value, literal
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.env import Env
from vivace.targets.cpu.expr import emit, emit_stored
from vivace.targets.cpu.memory import flat_index, register_type, to_memory
from vivace.targets.cpu.tables import look_up

_PACK_BYTES = {DType.u8: "packuswb", DType.i8: "packsswb"}


class Epilogue:
    """Finishes the accumulators of one tile. The text goes behind that of the function so far, in order of the calls.

    `symbols` are the values of the axes at the tile's corner and of the run-time dims. Loads may be shared and moved:
    a buffer that lies where `out` does is read at the element that is stored, and no element is stored twice.
    """

    def __init__(self, t: Text, isa: Isa, lane: str, symbols: Mapping[str, Int], buffers: Mapping[Buffer, str]) -> None:
        self._t, self._lane, self._lanes = t, lane, isa.n_f32_lanes
        self._b = Builder("epilogue", isa)
        self._b.continue_from(t.block)
        values = {name: _integer(v) for name, v in symbols.items()}
        known = {buffer: Value(text, "ptr") for buffer, text in buffers.items()}
        self._env = Env(self._b, values, {}, known, frozenset(known), lane, self._lanes)

    def store(
        self,
        e: Expr | None,
        acc: Value,
        moved: Mapping[str, int],
        out: Buffer,
        pointer: str,
        offset: Int,
        mask: str | None,
    ) -> None:
        """Stores the finished accumulator at `pointer` + `offset` bytes; `moved` is how far from the corner it
        stands on each axis.
        """
        b, lanes = self._b, self._lanes
        known = None if mask is None else Value(mask, "i1", lanes)
        symbols = {name: b.iadd(self._env.symbols[name], literal(by, "i64")) for name, by in moved.items() if by}
        env = self._env.at(symbols, lane=self._lane, lanes=lanes, mask=known)
        env.names["acc"] = acc
        value = self._stored(acc if e is None else b.widen(emit_stored(env, e, out.dtype), lanes), out)
        there = pointer if offset == 0 else b.inst(f"getelementptr i8, ptr {pointer}, i64 {offset}", "ptr", 0).text
        align = value.bits // 8
        if known is None:
            b.effect(f"store {value}, ptr {there}, align {align}")
            return
        if mask is not None and mask.count("true") == 1:
            # LLVM 22 makes a scalar store of such a mask, of the width that the value had before it was truncated.
            only = b.inst(f"extractelement {value}, i64 0", value.type, 0, value)
            b.effect(f"store {only}, ptr {there}, align {align}")
            return
        name = f"llvm.masked.store.v{lanes}{'f32' if value.type == 'float' else value.type}.p0"
        b.declare(f"void @{name}({value.full}, ptr, <{lanes} x i1>)", name)
        b.effect(f"call void @{name}({value}, ptr align {align} {there}, {known})")

    def store_row(
        self, e: Expr | None, accs: list[Value], moved: Mapping[str, int], out: Buffer, pointer: str, offset: Int,
        masks: list[str | None],
    ) -> None:  # fmt: skip
        """Stores neighbouring vectors of finished accumulators, the first at `offset`; two at a time where they make
        bytes."""
        step = self._lanes * out.dtype.size_bytes
        j = 0
        while j < len(accs):
            here = {**moved, self._lane: moved.get(self._lane, 0) + j * self._lanes}
            place = self._t.add(offset, j * step)
            if masks[j : j + 2] == [None, None] and e is not None and self._b.isa.vector_bits == 512 and makes_bytes(e):
                self._store_pair(e, accs[j : j + 2], here, pointer, place)
                j += 2
            else:
                self.store(e, accs[j], here, out, pointer, place, masks[j])
                j += 1

    def end_row(self) -> None:
        """What follows in the text is computed after the row that was stored. No instruction comes of it. It keeps
        LLVM's scheduler from beginning all rows before it ends one, with an accumulator spilled for each vector: MiniLM
        takes 0.98 of the time.
        """
        self._b.effect('call void asm sideeffect "", "~{memory}"()')

    def _store_pair(self, e: Expr, accs: list[Value], moved: Mapping[str, int], pointer: str, offset: Int) -> None:
        """32 bytes of two vectors of sums."""
        b, whole = self._b, []
        narrow, tables = _peeled(e)
        for k, acc in enumerate(accs):
            by = {**moved, self._lane: moved[self._lane] + k * self._lanes}
            symbols = {name: b.iadd(self._env.symbols[name], literal(n, "i64")) for name, n in by.items() if n}
            env = self._env.at(symbols, lane=self._lane, lanes=acc.lanes)
            env.names["acc"] = acc
            whole.append(b.widen(emit(env, _unclipped(narrow)), acc.lanes))
        words = _pack(b, "packssdw", "i16", *whole)
        mixed = _pack(b, _PACK_BYTES[narrow.dtype], "i8", words, words)
        order = ", ".join(f"i32 {16 * q + 4 * k + i}" for k in range(2) for q in range(4) for i in range(4))
        packed = b.inst(f"shufflevector {mixed}, {mixed.full} poison, <32 x i32> <{order}>", "i8", 32, mixed)
        self._look_up_and_store(packed, tables, pointer, offset)

    def store_two_rows(
        self, e: Expr, accs: list[Value], rows: Sequence[Mapping[str, Int]], pointers: Sequence[str]
    ) -> None:
        """Stores 32 bytes of each of two rows, made of two vectors of sums each. `rows` are the values of axes."""
        b, whole = self._b, []
        narrow, tables = _peeled(e)
        for k, acc in enumerate(accs):
            env = self._at_row(rows[k // 2], k % 2 * acc.lanes, acc.lanes)
            env.names["acc"] = acc
            whole.append(b.widen(emit(env, _unclipped(narrow)), acc.lanes))
        words = [_pack(b, "packssdw", "i16", whole[k], whole[k + 1]) for k in (0, 2)]
        mixed = _pack(b, _PACK_BYTES[narrow.dtype], "i8", *words)
        # 4 bytes of each vector in each quarter, those of the first row first
        places = [
            16 * q + 8 * row + 4 * k + i for row in range(2) for k in range(2) for q in range(4) for i in range(4)
        ]
        order = ", ".join(f"i32 {at}" for at in places)
        n = len(places)
        packed = b.inst(f"shufflevector {mixed}, {mixed.full} poison, <{n} x i32> <{order}>", "i8", n, mixed)
        for table in tables:
            packed = look_up(b, table, packed)
        for k, pointer in enumerate(pointers):
            b.effect(f"store {b.part(packed, k * n // 2, n // 2)}, ptr {pointer}, align 1")

    def _at_row(self, row: Mapping[str, Int], moved: int, lanes: int) -> Env:
        """The context of neighbouring results of one row, the first moved so far along the lanes."""
        b, values = self._b, {name: _integer(v) for name, v in row.items()}
        values[self._lane] = b.iadd(values[self._lane], literal(moved, "i64"))
        return self._env.at(values, lane=self._lane, lanes=lanes)

    def _look_up_and_store(self, packed: Value, tables: list[bytes], pointer: str, offset: Int) -> None:
        b = self._b
        for table in tables:
            packed = look_up(b, table, packed)
        there = pointer if offset == 0 else b.inst(f"getelementptr i8, ptr {pointer}, i64 {offset}", "ptr", 0).text
        b.effect(f"store {packed}, ptr {there}, align 1")

    def store_packed(
        self, e: Expr, accs: list[Value], given: list[dict[Expr, Value]], pointer: str, offset: Int
    ) -> None:
        """Stores 64 bytes made of four vectors of sums, which lie as packing within quarters of a register wants them
        (`depthwise_wide`). `e` casts to bytes, and may look them up; `given` are the values of loads per vector.
        """
        b, whole = self._b, []
        narrow, tables = _peeled(e)
        for acc, known in zip(accs, given, strict=True):
            env = replace(self._env.at({}, lane=self._lane, lanes=acc.lanes), given=dict(known))
            env.names["acc"] = acc
            whole.append(b.widen(emit(env, _unclipped(narrow)), acc.lanes))
        words = [_pack(b, "packssdw", "i16", whole[k], whole[k + 1]) for k in (0, 2)]
        self._look_up_and_store(_pack(b, _PACK_BYTES[narrow.dtype], "i8", *words), tables, pointer, offset)

    def store_in_turn(
        self, e: Cast, accs: list[Value], given: list[dict[Expr, Value]], pointer: str, offset: Int
    ) -> None:
        """Stores 32 halves made of two vectors of sums, which lie in turn (`depthwise_pairs`). `e` casts to bf16."""
        b, whole = self._b, []
        for acc, known in zip(accs, given, strict=True):
            env = replace(self._env.at({}, lane=self._lane, lanes=acc.lanes), given=dict(known))
            env.names["acc"] = acc
            whole.append(b.widen(emit(env, e.x), acc.lanes))
        name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
        b.declare(f"<32 x bfloat> @{name}(<16 x float>, <16 x float>)", name)
        halves = b.inst(f"call <32 x bfloat> @{name}({whole[1]}, {whole[0]})", "bfloat", 32, *whole)
        bits = b.inst(f"bitcast {halves.full} {halves.text} to <32 x i16>", "i16", 32, halves)
        order = ", ".join(f"i32 {k + 16 * part}" for k in range(16) for part in range(2))
        packed = b.inst(f"shufflevector {bits}, {bits.full} poison, <32 x i32> <{order}>", "i16", 32, bits)
        there = pointer if offset == 0 else b.inst(f"getelementptr i8, ptr {pointer}, i64 {offset}", "ptr", 0).text
        b.effect(f"store {packed}, ptr {there}, align 1")

    def _stored(self, v: Value, out: Buffer) -> Value:
        """The value as `out` holds it. The conversion of AVX512-BF16 takes denormals as 0, as its products do."""
        b = self._b
        if v.type != register_type(out.dtype):
            raise InternalError(f"{v.type} results for {out}", where=b.name, expected="an epilogue that casts them")
        if out.dtype is not DType.bf16 or v.lanes != 16 or not b.isa.has("avx512_bf16"):
            return to_memory(b, v, out.dtype)
        name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
        b.declare(f"<16 x bfloat> @{name}(<16 x float>)", name)
        rounded = b.inst(f"call <16 x bfloat> @{name}({v})", "bfloat", 16, v)
        return b.inst(f"bitcast {rounded.full} {rounded.text} to <16 x i16>", "i16", 16, rounded)

    def close(self) -> None:
        """Appends the text."""
        lines, self._t.block, needed = self._b.fragment()
        self._t.lines += lines
        self._t.declares |= needed


def makes_bytes(e: Expr) -> bool:
    """Whether an epilogue ends with i32 within the limits of bytes cast to them, which may be looked up then. Casts of
    anything else wrap, where packing would saturate."""
    while isinstance(e, Lookup):
        e = e.x
    if not isinstance(e, Cast) or e.dtype not in BYTES or dtype_of(e.x) is not DType.i32:
        return False
    limits = _limits(e.x)
    low, high = RANGES[e.dtype]
    return limits is not None and low <= limits[0] and limits[1] <= high


def _limits(e: Expr) -> tuple[float, float] | None:
    """Between what a clip keeps a number, also one that is then rounded and moved (`lower.requantize.quantize`)."""
    match e:
        case Binary(fn="min", a=Binary(fn="max", b=Const(value=low)), b=Const(value=high)) if low <= high:
            return low, high
        case Binary(fn="add", a=x, b=Const(value=by, dtype=DType.i32)):
            found = _limits(x)
            return None if found is None else (found[0] + by, found[1] + by)
        case Cast(dtype=DType.i32, x=x) | Unary(fn="round", x=x):
            return _limits(x)
    return None


def _peeled(e: Expr) -> tuple[Cast, list[bytes]]:
    """The cast to bytes, and the tables that they go through, the first first."""
    tables: list[bytes] = []
    while isinstance(e, Lookup):
        tables.insert(0, e.table)
        e = e.x
    assert isinstance(e, Cast)
    return e, tables


def _unclipped(e: Cast) -> Expr:
    """The i32 that a cast to bytes narrows, without limits that saturation keeps anyway."""
    low, high = RANGES[e.dtype]
    match e.x:
        case Binary(fn="min", a=Binary(fn="max", a=x, b=Const(value=lo)), b=Const(value=hi)) if (lo, hi) == (low, high):
            return x
    return e.x


def _pack(b: Builder, name: str, to: str, x: Value, y: Value) -> Value:
    """Two vectors as one of half as wide elements, saturated, quarter by quarter."""
    name, n = f"llvm.x86.avx512.{name}.512", 2 * x.lanes
    b.declare(f"<{n} x {to}> @{name}({x.full}, {y.full})", name)
    return b.inst(f"call <{n} x {to}> @{name}({x}, {y})", to, n, x, y)


def split_start(c: Contraction | Depthwise, lane: str, acc: DType = DType.i32) -> tuple[Load | None, Expr | None]:
    """What accumulators may start from instead of 0, and the epilogue without it.

    Before/After: epilogue max(acc + bias[n], 0) -> start bias[n], epilogue max(acc, 0)
    """
    e, total = c.epilogue, Read("acc", acc)
    inner = {x.name for x in c.rows}
    sums = (
        [x for x in walk(e) if isinstance(x, Binary) and x.fn == "add" and total in (x.a, x.b)] if e is not None else []
    )
    if len(sums) != 1 or sum(x == total for x in walk(e)) != 1:  # type: ignore[arg-type]
        return None, e
    start = sums[0].b if sums[0].a == total else sums[0].a
    if not isinstance(start, Load) or start.buffer is c.out or start.inside or start.buffer.dtype is not acc:
        return None, e
    parts = linear(flat_index(start.buffer, start.index), lane)
    if parts is None or parts[0] != 1 or any(s.name in inner for s in symbols(parts[1])):
        return None, e
    return start, _replaced(e, sums[0], total)  # type: ignore[arg-type]


def _replaced(e: Expr, old: Expr, by: Expr) -> Expr:
    if e is old:
        return by
    match e:
        case Unary(x=x) | Cast(x=x) | Lookup(x=x):
            return replace(e, x=_replaced(x, old, by))
        case Binary(a=a, b=b):
            return replace(e, a=_replaced(a, old, by), b=_replaced(b, old, by))
        case Fma(a=a, b=b, c=c):
            return Fma(*(_replaced(x, old, by) for x in (a, b, c)))
        case Select(cond=cond, a=a, b=b):
            return Select(*(_replaced(x, old, by) for x in (cond, a, b)))
        case _:
            return e


def _integer(v: Int) -> Value:
    return literal(v, "i64") if isinstance(v, int) else Value(v, "i64")
