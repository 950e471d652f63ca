"""Vectors in memory for the contraction generators: masks of incomplete ones, loads and stores under them."""

from __future__ import annotations

from vivace.base.machine import Isa
from vivace.targets.cpu.contraction_text import Int, Text

F32_BYTES = 4
ACC_BYTES = 4  # of a sum, of integers too
LINE_BYTES = 64


def vector_type(isa: Isa, element: str = "float") -> str:
    """A vector of as many elements as f32 fit into a register: the lanes of accumulators."""
    return f"<{isa.n_f32_lanes} x {element}>"


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


def _suffix(element: str) -> str:
    return "f32" if element == "float" else element


def store(t: Text, isa: Isa, value: str, pointer: str, mask: str | None, element: str = "float") -> None:
    kind, w = vector_type(isa, element), isa.n_f32_lanes
    if mask is None:
        t.put(f"store {kind} {value}, ptr {pointer}, align 1")
        return
    name = f"llvm.masked.store.v{w}{_suffix(element)}.p0"
    t.declare(name, f"void @{name}({kind}, ptr, <{w} x i1>)")
    t.put(f"call void @{name}({kind} {value}, ptr align 1 {pointer}, <{w} x i1> {mask})")


def load(t: Text, isa: Isa, pointer: str, mask: str | None, element: str = "float") -> str:
    """A vector of memory; lanes outside the mask are 0 and not touched."""
    kind, w = vector_type(isa, element), isa.n_f32_lanes
    if mask is None:
        return t.op(f"load {kind}, ptr {pointer}, align 1")
    name = f"llvm.masked.load.v{w}{_suffix(element)}.p0"
    t.declare(name, f"{kind} @{name}(ptr, <{w} x i1>, {kind})")
    return t.op(f"call {kind} @{name}(ptr align 1 {pointer}, <{w} x i1> {mask}, {kind} zeroinitializer)")
