"""The micro-kernel: one tile of rows x vectors of accumulators, summed over all taps in registers, then finished
and stored.

It knows nothing of tiles around it: the driver (`contraction`) calls it with the addresses of its corner in A, B and
out. Rows are byte offsets from the A pointer. With known strides they are immediates of the broadcasting
instructions, so that one register addresses all of A. B rows are whole vectors, contiguous in a panel or a run-time
stride apart. Which elements one step multiplies, and how, is the arithmetic's affair (`contraction_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vivace.base.dims import Dim
from vivace.base.machine import Isa
from vivace.loops.contraction import Axis
from vivace.targets.cpu.contraction_step import Step
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import LINE_BYTES, vector_type


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

    step: Step
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
    def t(self) -> Text:
        return self.step.t

    @property
    def isa(self) -> Isa:
        return self.step.isa

    @property
    def _acc_type(self) -> str:
        return vector_type(self.isa, self.step.acc_element)

    @property
    def _taps(self) -> tuple[Axis, ...]:
        return self.operands.taps or (Axis("k", 1, 1, self.operands.lanes),)

    def _bytes_a(self, elements: Dim) -> Int:
        return self.t.mul(self.t.dim(elements, self.dims), self.step.ar.a_bytes)

    def _bytes_b(self, elements: Dim) -> Int:
        return self.t.mul(self.t.dim(elements, self.dims), self.step.ar.b_bytes)

    @property
    def _step_a(self) -> Int:
        return self.t.mul(self._bytes_a(self._taps[-1].a), self.step.ar.group)

    @property
    def _step_b(self) -> Int:
        if self.operands.panel:
            return self.operands.lanes * self.step.ar.lane_bytes
        return self._bytes_b(self._taps[-1].b)

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
                in_a = t.add(in_a, t.mul(at, self._bytes_a(axis.a)))
                in_b = t.add(in_b, t.mul(at, self._bytes_b(axis.b)))
            inside.pointers[0] = t.at(a, in_a)
            if not self.operands.panel:
                inside.pointers[1] = t.at(b, in_b)
            return self._channels(inside)

        return self._loop(total, state, tap)

    def _channels(self, state: _State) -> _State:
        extent, unroll = self._taps[-1].extent, self.shape.unroll
        if isinstance(extent, int):
            groups, left_over = divmod(extent, self.step.ar.group)
            times, rest = divmod(groups, unroll)
            state = self._steps(self._run(times, state, unroll), rest)
            return self._steps(state, 1, left_over) if left_over else state
        whole, left = self.t.divmod(self.t.dim(extent // self.step.ar.group, self.dims), unroll)
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
        t, kind = self.t, self._acc_type
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
        kind, n = self._acc_type, len(state.pointers)

        def flat_body(i: str, carried: list[str]) -> list[str]:
            after = body(i, _State(carried[:n], _grid(carried[n:], self.shape.vectors)))
            return [*after.pointers, *_flat(after.acc)]

        carried = [("ptr", x) for x in state.pointers] + [(kind, x) for x in _flat(state.acc)]
        out = self.t.reduce_loop(times, carried, flat_body)
        return _State(out[:n], _grid(out[n:], self.shape.vectors))

    def _steps(self, state: _State, n: int, n_present: int = 0) -> _State:
        """`n` steps of the channel, each of a whole group or of `n_present` elements."""
        t, step_a, step_b = self.t, self._step_a, self._step_b
        n_present = n_present or self.step.ar.group
        acc = state.acc
        for u in range(n):
            for half in range(self.step.n_halves):
                acc = self._multiply(state.pointers, acc, t.mul(step_a, u), t.mul(step_b, u), n_present, half)
            if u == 0 and len(state.pointers) > 2 and n == self.shape.unroll and n_present == self.step.ar.group:
                for line in range(self.ahead_lines):
                    t.fetch(t.at(state.pointers[2], line * LINE_BYTES), level=2)
        moves = (t.mul(step_a, n), t.mul(step_b, n), self.ahead_lines * LINE_BYTES)
        return _State([t.at(x, move) for x, move in zip(state.pointers, moves)], acc)

    def _multiply(
        self, pointers: list[str], acc: list[list[str]], in_a: Int, in_b: Int, n_present: int, half: int
    ) -> list[list[str]]:
        """Adds one step to all accumulators."""
        t, isa, step = self.t, self.isa, self.step
        width = isa.n_f32_lanes * step.ar.lane_bytes
        row_b = t.at(pointers[1], in_b)
        columns = [step.column(t.at(row_b, j * width), mask, half) for j, mask in enumerate(self.operands.masks)]
        register = "v" if isa.n_vector_registers > 16 else "x"
        result = []
        for offset, row in zip(self.rows, acc):
            x = step.broadcast(t.at(t.at(pointers[0], in_a), offset), n_present, half)
            sums = [step.multiply_add(x, y, s) for y, s in zip(columns, row)]
            result.append(t.pin(self._acc_type, sums, register))
        return result


def _flat(grid: list[list[str]]) -> list[str]:
    return [x for row in grid for x in row]


def _grid(flat: list[str], width: int) -> list[list[str]]:
    return [flat[i : i + width] for i in range(0, len(flat), width)]
