"""The f32 micro-kernel: one tile of rows x vectors of accumulators, summed over all taps in registers, then finished
and stored.

It knows nothing of tiles around it: the driver (`contraction`) calls it with the addresses of its corner in A, B and
out. Rows are byte offsets from the A pointer. With known strides they are immediates of the broadcasting
instructions, so that one register addresses all of A. B rows are whole vectors, contiguous in a panel or a run-time
stride apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vivace.base.dims import Dim
from vivace.base.machine import Isa
from vivace.loops.contraction import Axis
from vivace.targets.cpu.contraction_text import Int, Text

F32_BYTES = 4
LINE_BYTES = 64


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


@dataclass(slots=True)
class _State:
    """What moves along the taps: addresses in A, in B, and of what is fetched ahead; accumulators by row and vector."""

    pointers: list[str]
    acc: list[list[str]]


@dataclass(slots=True)
class Sum:
    """Writes the sum over all taps of one tile. `rows` are byte offsets in A; `dims` values of run-time dims.

    `ahead` is memory that will be needed later, a panel of B as a rule: so many cache lines of it are fetched into
    the second-level cache in every round of `unroll` steps.
    """

    t: Text
    isa: Isa
    shape: Shape
    operands: Operands
    rows: list[Int]
    dims: Mapping[str, Int]
    ahead: str | None = None
    ahead_lines: int = 0

    def emit(self, a: str, b: str, start: list[list[str]] | None = None) -> list[list[str]]:
        """Accumulators by row and vector, summed onto `start` if there is one."""
        acc = start or [["zeroinitializer"] * self.shape.vectors for _ in self.shape.rows]
        if any(tap.extent == 0 for tap in self.operands.taps):
            return acc
        *outer, _ = self._taps
        state = _State([a, b] if self.ahead is None else [a, b, self.ahead], acc)
        return (self._outer(outer, state) if outer else self._channels(state)).acc

    @property
    def _taps(self) -> tuple[Axis, ...]:
        return self.operands.taps or (Axis("k", 1, 1, self.operands.lanes),)

    def _bytes(self, elements: Dim) -> Int:
        return self.t.mul(self.t.dim(elements, self.dims), F32_BYTES)

    @property
    def _step_b(self) -> Int:
        return self.operands.lanes * F32_BYTES if self.operands.panel else self._bytes(self._taps[-1].b)

    def _outer(self, outer: list[Axis], state: _State) -> _State:
        """All taps but the channel as one loop."""
        t, b = self.t, state.pointers[1]
        counts = [t.dim(x.extent, self.dims) for x in outer]
        total: Int = 1
        for count in counts:
            total = t.mul(total, count)
        a = state.pointers[0]

        def tap(i: str, inside: _State) -> _State:
            in_a: Int = 0
            in_b: Int = 0
            rest: Int = i
            for depth, axis in reversed(list(enumerate(outer))):
                rest, at = t.divmod(rest, counts[depth]) if depth else (0, rest)
                in_a = t.add(in_a, t.mul(at, self._bytes(axis.a)))
                in_b = t.add(in_b, t.mul(at, self._bytes(axis.b)))
            inside.pointers[0] = t.at(a, in_a)
            if not self.operands.panel:
                inside.pointers[1] = t.at(b, in_b)
            return self._channels(inside)

        return self._loop(total, state, tap)

    def _channels(self, state: _State) -> _State:
        extent, unroll = self.t.dim(self._taps[-1].extent, self.dims), self.shape.unroll
        if isinstance(extent, int):
            times, rest = divmod(extent, unroll)
            return self._steps(self._run(times, state, unroll), rest)
        whole, left = self.t.divmod(extent, unroll)
        return self._maybe(left, self._maybe(whole, state, unroll), 1)

    def _run(self, times: Int, state: _State, n: int) -> _State:
        """`times` rounds of `n` steps."""
        if times == 0:
            return state
        if times == 1:
            return self._steps(state, n)
        return self._loop(times, state, lambda _, inside: self._steps(inside, n))

    def _maybe(self, times: Int, state: _State, n: int) -> _State:
        """`_run`, where `times` may turn out to be 0."""
        t, kind = self.t, vector_type(self.isa)
        enter, done = t.label(), t.label()
        before = t.block
        t.branch(t.less(0, times), enter, done)
        t.start(enter)
        after = self._run(times, state, n)
        t.jump(done)
        last = t.block
        t.start(done)

        def join(type_text: str, x: str, y: str) -> str:
            return t.op(f"phi {type_text} [ {x}, %{before} ], [ {y}, %{last} ]")

        pointers = [join("ptr", x, y) for x, y in zip(state.pointers, after.pointers)]
        acc = [join(kind, x, y) for x, y in zip(_flat(state.acc), _flat(after.acc))]
        return _State(pointers, _grid(acc, self.shape.vectors))

    def _loop(self, times: Int, state: _State, body: Callable[[str, _State], _State]) -> _State:
        kind, n = vector_type(self.isa), len(state.pointers)

        def flat_body(i: str, carried: list[str]) -> list[str]:
            after = body(i, _State(carried[:n], _grid(carried[n:], self.shape.vectors)))
            return [*after.pointers, *_flat(after.acc)]

        carried = [("ptr", x) for x in state.pointers] + [(kind, x) for x in _flat(state.acc)]
        out = self.t.reduce_loop(times, carried, flat_body)
        return _State(out[:n], _grid(out[n:], self.shape.vectors))

    def _steps(self, state: _State, n: int) -> _State:
        """`n` steps of the channel."""
        t, step_a, step_b = self.t, self._bytes(self._taps[-1].a), self._step_b
        acc = state.acc
        for u in range(n):
            acc = self._step(state.pointers, acc, t.mul(step_a, u), t.mul(step_b, u))
            if u == 0 and len(state.pointers) > 2 and n == self.shape.unroll:
                for line in range(self.ahead_lines):
                    t.fetch(t.at(state.pointers[2], line * LINE_BYTES), level=2)
        moves = (t.mul(step_a, n), t.mul(step_b, n), self.ahead_lines * LINE_BYTES)
        return _State([t.at(x, move) for x, move in zip(state.pointers, moves)], acc)

    def _step(self, pointers: list[str], acc: list[list[str]], in_a: Int, in_b: Int) -> list[list[str]]:
        t, isa, width = self.t, self.isa, self.isa.vector_bits // 8
        row_b = t.at(pointers[1], in_b)
        columns = [load(t, isa, t.at(row_b, j * width), mask) for j, mask in enumerate(self.operands.masks)]
        result = []
        for offset, row in zip(self.rows, acc):
            x = broadcast(t, isa, t.at(t.at(pointers[0], in_a), offset))
            result.append(t.pin(vector_type(isa), [multiply_add(t, isa, x, y, s) for y, s in zip(columns, row)]))
        return result


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
