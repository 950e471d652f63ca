"""Masks of the last, incomplete vector of a loop."""

from __future__ import annotations

from vivace.targets.cpu.builder import Builder, Value, literal


def tail_mask(b: Builder, i: Value, n: Value, lanes: int) -> Value:
    """Which of the lanes i, i+1, ... are below n, where i < n."""
    left = b.op("sub nsw", n, i)
    if isinstance(n.const, int) and isinstance(i.const, int):
        left = literal(n.const - i.const, "i64")
    left = b.call("llvm.smin", left, literal(lanes, "i64"))
    # `left` ones, built in a scalar register: one shift and one move to a mask register.
    ones = b.op("lshr", literal(-1, "i64"), b.op("sub", literal(64, "i64"), left))
    bits = ones if lanes == 64 else b.convert("trunc", ones, f"i{lanes}")
    return b.inst(f"bitcast {bits} to <{lanes} x i1>", "i1", lanes, bits)
