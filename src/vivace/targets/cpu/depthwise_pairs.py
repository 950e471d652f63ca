"""Depthwise convolutions of bf16, 32 channels at once.

A load brings 32 channels. Shifted up, those with even numbers are a vector of f32; masked, those with odd ones: one
instruction each, where widening 16 neighbours takes two. Sums stay in that order: weights and what the epilogue reads
per channel are brought into it once for all rows, and one permutation of packed results undoes it.

Only where all that varies in the epilogue are constants per channel; `depthwise` does what is left over. Loads of
pixels that straddle cache lines cost twice, which only many taps outweigh: 16x56x144 by 3x3 takes 1.2 times as long as
by single vectors, 6x80x240 by 5x5 0.85 (Emerald Rapids; 14x14x384 by 3x3 0.95, 14x14x480 by 5x5 0.82).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vivace.base.dtypes import DType
from vivace.base.machine import Isa
from vivace.loops.contraction import Depthwise
from vivace.loops.kernel import Cast, Expr, walk
from vivace.targets.cpu.builder import Value
from vivace.targets.cpu.contraction_epilogue import Epilogue
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.depthwise_plan import Plan, at_tile, move
from vivace.targets.cpu.depthwise_wide import is_per_channel

CHANNELS = 32
MOST_TAPS = 49
_MANY_TAPS = 25
_SUM, _BITS = "<16 x float>", "<16 x i32>"


def is_paired(d: Depthwise, isa: Isa) -> bool:
    """Whether 32 channels can be computed at once."""
    fits = isa.vector_bits == 512 and isa.has("avx512_bf16") and isinstance(d.channels, int) and d.channels >= CHANNELS
    if not fits or d.a.dtype is not DType.bf16 or d.out.dtype is not DType.bf16 or len(d.taps) != 2 or not d.rows:
        return False
    n_down, n_across = (x.extent for x in d.taps)
    if not isinstance(n_down, int) or not isinstance(n_across, int) or not 0 < n_down * n_across <= MOST_TAPS:
        return False
    pixels = [x for r in d.rows[-1:] for x in (r.a, r.out)]
    if n_down * n_across < _MANY_TAPS and any(not isinstance(x, int) or x % CHANNELS for x in pixels):
        return False
    e = d.epilogue
    return isinstance(e, Cast) and all(map(is_per_channel(d), walk(e)))  # type: ignore[arg-type]


def even_and_odd(t: Text, kind: str, at: str) -> list[str]:
    """32 elements of 4 bytes: those with even numbers, those with odd ones."""
    low, high = (t.op(f"load <16 x {kind}>, ptr {t.at(at, 64 * k)}, align 1") for k in range(2))
    orders = [", ".join(f"i32 {2 * k + odd}" for k in range(16)) for odd in range(2)]
    return [t.op(f"shufflevector <16 x {kind}> {low}, <16 x {kind}> {high}, <16 x i32> <{order}>") for order in orders]


@dataclass(frozen=True, slots=True)
class PairTile:
    """A tile of 32 channels, in two parts."""

    t: Text
    p: Plan
    dims: Mapping[str, Int]
    size: int
    given: list[dict[Expr, Value]]

    def values(self, pointer: str) -> list[str]:
        t = self.t
        both = t.op(f"load {_BITS}, ptr {pointer}, align 1")
        even, odd = t.op(f"shl {_BITS} {both}, splat (i32 16)"), t.op(f"and {_BITS} {both}, splat (i32 -65536)")
        return [t.op(f"bitcast {_BITS} {x} to {_SUM}") for x in (even, odd)]

    def weights(self, pointer: str) -> list[str]:
        return even_and_odd(self.t, "float", pointer)

    def store(self, acc: list[list[str]], row: Int, piece: Int) -> None:
        t, p = self.t, self.p
        # All that the epilogue reads are constants per channel, wherever in the image.
        symbols: dict[str, Int] = {x.name: f"%x{i}" for i, x in enumerate(p.d.rows)} | dict(self.dims) | {"c": "%c"}
        place = at_tile(t, p, row, piece, self.size)
        _, out = move(t, p, (p.outer, p.inner), place, self.dims, "%a", "%out")
        epilogue, e = Epilogue(t, p.isa, "c", symbols, {}), p.d.epilogue
        assert isinstance(e, Cast)
        for j, parts in enumerate(acc):
            totals = [Value(x, "float", 16) for x in parts]
            epilogue.store_in_turn(e, totals, self.given, out, t.mul(t.dim(p.inner.out, self.dims), j * p.out_bytes))
        epilogue.close()
