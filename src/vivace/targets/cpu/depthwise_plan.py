"""What the parts of a depthwise convolution's code share: how it is cut, and where its tiles lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vivace.base.dims import Dim, ceildiv
from vivace.base.machine import Isa
from vivace.loops.contraction import Axis, Depthwise
from vivace.loops.kernel import Buffer
from vivace.lower.tile import Segment
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.depthwise_step import ChannelStep

NONE = Axis("", 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """A convolution without axes of one step, and how it is cut: `n_wide` vectors of `wide_channels`, then others."""

    d: Depthwise
    isa: Isa
    params: tuple[Buffer, ...]
    dims: tuple[str, ...]
    columns: tuple[Segment, ...]
    wide_columns: tuple[Segment, ...]
    n_wide: int
    wide_channels: int
    rows_per_unit: int
    vectors_per_unit: int

    @property
    def step(self) -> ChannelStep:
        return ChannelStep(self.d, self.isa)

    @property
    def a_bytes(self) -> int:
        return self.d.a.dtype.size_bytes

    @property
    def b_bytes(self) -> int:
        return self.d.b.dtype.size_bytes

    @property
    def out_bytes(self) -> int:
        return self.d.out.dtype.size_bytes

    @property
    def inner(self) -> Axis:
        return self.d.rows[-1] if self.d.rows else NONE

    @property
    def outer(self) -> Axis:
        return self.d.rows[-2] if len(self.d.rows) > 1 else NONE

    @property
    def above(self) -> tuple[Axis, ...]:
        return self.d.rows[:-2]

    @property
    def n_vectors(self) -> Dim:
        """Wide ones first."""
        return self.n_wide + ceildiv(self.d.channels - self.n_wide * self.wide_channels, self.isa.n_f32_lanes)

    @property
    def has_full(self) -> bool:
        left = self.d.channels - self.n_wide * self.wide_channels
        return not isinstance(left, int) or left >= self.isa.n_f32_lanes

    @property
    def has_tail(self) -> bool:
        return not isinstance(self.d.channels, int) or self.d.channels % self.isa.n_f32_lanes != 0

    def load_dims(self, t: Text) -> dict[str, Int]:
        first = len(self.params)
        return {x: t.op(f"load i64, ptr {t.at('%args', 8 * (first + i))}, align 8") for i, x in enumerate(self.dims)}

    def base(self, t: Text, buffer: Buffer) -> str:
        return t.op(f"load ptr, ptr {t.at('%args', 8 * self.params.index(buffer))}, align 8")

    def wide_symbol(self, size: int) -> str:
        return f"{self.d.name}.columns{size}.wide"

    def symbol(self, size: int, tail: bool) -> str:
        return f"{self.d.name}.columns{size}{'.tail' if tail else ''}"


def head_of(p: Plan, name: str) -> str:
    """The head of a function that computes `%count` tiles of `%rows` rows."""
    axes = "".join(f", i64 %x{i}" for i in range(len(p.d.rows)))
    return f"define internal void @{name}(ptr %args, ptr %a, ptr %b, ptr %out, i64 %count, i64 %rows, i64 %c{axes})"


def at_tile(t: Text, p: Plan, row: Int, piece: Int, size: int) -> dict[str, Int]:
    """How far a tile of `size` columns stands from where a function began."""
    return {p.outer.name: row, p.inner.name: t.mul(piece, size)}


def move(
    t: Text, p: Plan, axes: tuple[Axis, ...], at: Mapping[str, Int], dims: Mapping[str, Int], a: str, out: str
) -> tuple[str, str]:
    """Pointers into A and the result, moved to a place on some axes."""
    for axis in axes:
        a = t.at(a, t.mul(at[axis.name], t.mul(t.dim(axis.a, dims), p.a_bytes)))
        out = t.at(out, t.mul(at[axis.name], t.mul(t.dim(axis.out, dims), p.out_bytes)))
    return a, out


def columns_read(p: Plan, tap: Axis, size: int) -> list[tuple[Dim, list[tuple[int, int]]]]:
    """Offsets of input columns in order, each with the output columns and taps that it serves."""
    assert isinstance(tap.extent, int)
    users: dict[Dim, list[tuple[int, int]]] = {}
    for j in range(size):
        for k in range(tap.extent):
            users.setdefault(p.inner.a * j + tap.a * k, []).append((j, k))
    return [(x, users[x]) for x in sorted(users, key=lambda x: x if isinstance(x, int) else 0)]
