"""What happens to accumulators before they are stored: the epilogue's expression over vectors along `n`, and the
store.
"""

from __future__ import annotations

from collections.abc import Mapping

from vivace.base.machine import Isa
from vivace.loops.kernel import Buffer, Expr
from vivace.targets.cpu.builder import Builder, Value, literal
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.env import Env
from vivace.targets.cpu.expr import emit
from vivace.targets.cpu.memory import to_memory


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
        acc: str,
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
        env.names["acc"] = Value(acc, "float", lanes)
        value = to_memory(b, b.widen(emit(env, e), lanes), out.dtype) if e is not None else env.names["acc"]
        there = pointer if offset == 0 else b.inst(f"getelementptr i8, ptr {pointer}, i64 {offset}", "ptr", 0).text
        align = value.bits // 8
        if known is None:
            b.effect(f"store {value}, ptr {there}, align {align}")
            return
        name = f"llvm.masked.store.v{lanes}{'f32' if value.type == 'float' else value.type}.p0"
        b.declare(f"void @{name}({value.full}, ptr, <{lanes} x i1>)", name)
        b.effect(f"call void @{name}({value}, ptr align {align} {there}, {known})")

    def close(self) -> None:
        """Appends the text."""
        lines, needed = self._b.fragment()
        self._t.lines += lines
        self._t.declares |= needed


def _integer(v: Int) -> Value:
    return literal(v, "i64") if isinstance(v, int) else Value(v, "i64")
