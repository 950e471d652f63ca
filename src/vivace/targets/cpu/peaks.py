"""Kernels that do nothing useful as fast as the core can: their speed is the roof that real kernels are held against.

Each is one function `void name(ptr buffer, i64 repeats, i64 bytes)`, called through ctypes, which releases the GIL:

    arithmetic   acc[i] = acc[i] * a + b  (or the dot product of the type)   for i < 12 and repeats times, in registers
    read         sum += buffer[j]                                           over all bytes, repeats times
    copy         buffer[j + bytes/2] = buffer[j]                            over half of the bytes, repeats times

Rules:
* CHAINS: 12 independent accumulators cover a latency of 4 to 5 cycles at 2 operations per cycle, and fit into 16
  registers.
* KEPT: results reach memory, so that LLVM removes nothing; floats are not re-associated, so that it shortens nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from vivace.base.machine import Isa, host
from vivace.targets.cpu.isa import kernel_attributes
from vivace.targets.cpu.jit import Library, compile_text, load

Native = Callable[[int, int, int], None]

_N_CHAINS = 12
_UNROLL = 4
_LINE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """One kind of arithmetic: `step` is LLVM text that makes %next of %acc; a multiply-add counts as two operations."""

    dtype: str
    symbol: str
    n_operations: int  # per call of the step
    accumulator: str  # LLVM type
    operand: str
    step: str
    declaration: str
    features: tuple[str, ...] = ()  # of LLVM, beyond those of the instruction set


def arithmetics(isa: Isa) -> tuple[Arithmetic, ...]:
    """The kinds of arithmetic that this process's CPU and the instruction set have."""
    kinds = [_multiply_add("f32", "float", 32, isa), _multiply_add("f64", "double", 64, isa)]
    flags = host().flags
    if isa.has("amx_bf16"):
        kinds.append(_tiles("bf16", "tdpbf16ps", 2, "+amx-bf16"))
    elif isa.vector_bits == 512 and "avx512_bf16" in flags:
        kinds.append(_dot("bf16", "bfloat", "float", "avx512bf16.dpbf16ps", isa, "+avx512bf16"))
    if isa.has("amx_int8"):
        kinds.append(_tiles("i8", "tdpbssd", 4, "+amx-int8"))
    elif isa.vector_bits == 512 and "avx512_vnni" in flags:
        kinds.append(_dot("i8", "i8", "i32", "avx512.vpdpbusd", isa, "+avx512vnni"))
    elif isa.vector_bits == 256 and "avx_vnni" in flags:
        kinds.append(_dot("i8", "i8", "i32", "avx512.vpdpbusd", isa, "+avxvnni"))
    return tuple(kinds)


def _multiply_add(dtype: str, scalar: str, bits: int, isa: Isa) -> Arithmetic:
    lanes = isa.vector_bits // bits
    vector = f"<{lanes} x {scalar}>"
    if isa.has_fma:
        function = f"llvm.fma.v{lanes}f{bits}"
        step = f"%next = call {vector} @{function}({vector} %acc, {vector} %a, {vector} %b)"
        declaration = f"declare {vector} @{function}({vector}, {vector}, {vector})"
    else:
        step = f"%product = fmul {vector} %acc, %a\n%next = fadd {vector} %product, %b"
        declaration = ""
    return Arithmetic(dtype, f"peak_{dtype}", 2 * lanes, vector, vector, step, declaration)


def _dot(dtype: str, element: str, total: str, name: str, isa: Isa, feature: str) -> Arithmetic:
    group, lanes = 4 if element == "i8" else 2, isa.n_f32_lanes
    operand, accumulator = f"<{group * lanes} x {element}>", f"<{lanes} x {total}>"
    n_operations = 2 * group * lanes
    function = f"llvm.x86.{name}.{isa.vector_bits}"
    step = f"%next = call {accumulator} @{function}({accumulator} %acc, {operand} %a, {operand} %b)"
    declaration = f"declare {accumulator} @{function}({accumulator}, {operand}, {operand})"
    return Arithmetic(dtype, f"peak_{dtype}", n_operations, accumulator, operand, step, declaration, (feature,))


def _tiles(dtype: str, name: str, group: int, feature: str) -> Arithmetic:
    """A product of whole tile registers, 16 by 16 by 16 groups; the number of the accumulator stands for %acc."""
    step, features = f"call void @llvm.x86.{name}(i8 %acc, i8 4, i8 6)", ("+amx-tile", feature)
    declaration = f"declare void @llvm.x86.{name}(i8, i8, i8)"
    return Arithmetic(dtype, f"peak_{dtype}", 2 * 16 * 16 * 16 * group, "tile", "tile", step, declaration, features)


def _tile_text(kind: Arithmetic, isa: Isa) -> str:
    """Four accumulators take turns, which covers the latency of a product."""
    shapes = bytearray(_LINE_BYTES)
    shapes[0] = 1
    shapes[16:32], shapes[48:56] = bytes([64, 0]) * 8, bytes([16]) * 8
    constant = "".join(f"\\{byte:02x}" for byte in shapes)
    body = [kind.step.replace("%acc", str(i % 4)) for i in range(_N_CHAINS * _UNROLL)]
    return "\n".join(
        [
            kind.declaration,
            "declare void @llvm.x86.ldtilecfg(ptr)",
            "declare void @llvm.x86.tilezero(i8)",
            "declare void @llvm.x86.tilerelease()",
            f'@{kind.symbol}.shapes = private constant [{_LINE_BYTES} x i8] c"{constant}", align {_LINE_BYTES}',
            f"define void @{kind.symbol}(ptr %buffer, i64 %repeats, i64 %bytes) {kernel_attributes(isa)} {{",
            "entry:",
            f"call void @llvm.x86.ldtilecfg(ptr @{kind.symbol}.shapes)",
            *(f"call void @llvm.x86.tilezero(i8 {i})" for i in range(8)),
            "br label %loop",
            "loop:",
            "%n = phi i64 [ 0, %entry ], [ %n1, %loop ]",
            *body,
            "%n1 = add i64 %n, 1",
            "%more = icmp slt i64 %n1, %repeats",
            "br i1 %more, label %loop, label %done",
            "done:",
            "call void @llvm.x86.tilerelease()",
            "ret void",
            "}",
        ]
    )


def arithmetic_text(kind: Arithmetic, isa: Isa) -> str:
    """The LLVM text of one arithmetic kernel; a repeat is `_N_CHAINS * _UNROLL` steps."""
    if kind.accumulator == "tile":
        return _tile_text(kind, isa)
    accumulator, operand = kind.accumulator, kind.operand
    body = []
    for u in range(_UNROLL):
        for i in range(_N_CHAINS):
            names = {"%acc": f"%s{u}_{i}", "%next": f"%s{u + 1}_{i}", "%product": f"%p{u}_{i}"}
            text = kind.step
            for name, unique in names.items():
                text = text.replace(name, unique)
            body.append(text)
    loads = [f"%q{i} = getelementptr i8, ptr %buffer, i64 {(2 + i) * _LINE_BYTES}" for i in range(_N_CHAINS)]
    loads += [f"%v{i} = load {accumulator}, ptr %q{i}" for i in range(_N_CHAINS)]
    phis = [f"%s0_{i} = phi {accumulator} [ %v{i}, %entry ], [ %s{_UNROLL}_{i}, %loop ]" for i in range(_N_CHAINS)]
    stores = [f"store {accumulator} %s{_UNROLL}_{i}, ptr %q{i}" for i in range(_N_CHAINS)]
    return "\n".join(
        [
            kind.declaration,
            f"define void @{kind.symbol}(ptr %buffer, i64 %repeats, i64 %bytes) {kernel_attributes(isa)} {{",
            "entry:",
            f"%a = load {operand}, ptr %buffer",
            f"%pb = getelementptr i8, ptr %buffer, i64 {_LINE_BYTES}",
            f"%b = load {operand}, ptr %pb",
            *loads,
            "br label %loop",
            "loop:",
            "%n = phi i64 [ 0, %entry ], [ %n1, %loop ]",
            *phis,
            *body,
            "%n1 = add i64 %n, 1",
            "%more = icmp slt i64 %n1, %repeats",
            "br i1 %more, label %loop, label %done",
            "done:",
            *stores,
            "ret void",
            "}",
        ]
    )


def n_operations(kind: Arithmetic, repeats: int) -> int:
    """What a call with so many repeats computes."""
    return kind.n_operations * _N_CHAINS * _UNROLL * repeats


def stream_text(symbol: str, isa: Isa, *, is_copy: bool) -> str:
    """The LLVM text of the read or the copy kernel: blocks of eight vectors, `bytes` a multiple of two blocks."""
    lanes = isa.vector_bits // 32
    vector = f"<{lanes} x i32>"
    vector_bytes, n = isa.vector_bits // 8, 8
    body, carried = [], []
    for i in range(n):
        body.append(f"%p{i} = getelementptr i8, ptr %base, i64 {i * vector_bytes}")
        body.append(f"%x{i} = load {vector}, ptr %p{i}, align {vector_bytes}")
        if is_copy:
            body.append(f"%t{i} = getelementptr i8, ptr %p{i}, i64 %half")
            body.append(f"store {vector} %x{i}, ptr %t{i}, align {vector_bytes}")
        else:
            body.append(f"%y{i} = add {vector} %s{i}, %x{i}")
            carried.append(f"%s{i} = phi {vector} [ %r{i}, %outer ], [ %y{i}, %loop ]")
    outer = [] if is_copy else [f"%r{i} = phi {vector} [ zeroinitializer, %entry ], [ %y{i}, %next ]" for i in range(n)]
    kept = [] if is_copy else [f"%k{i} = getelementptr i8, ptr %buffer, i64 {i * vector_bytes}" for i in range(n)]
    kept += [] if is_copy else [f"store {vector} %y{i}, ptr %k{i}" for i in range(n)]
    return "\n".join(
        [
            f"define void @{symbol}(ptr %buffer, i64 %repeats, i64 %bytes) {kernel_attributes(isa)} {{",
            "entry:",
            "%half = lshr i64 %bytes, 1",
            f"%end = add i64 {'%half' if is_copy else '%bytes'}, 0",
            "br label %outer",
            "outer:",
            "%n = phi i64 [ 0, %entry ], [ %n1, %next ]",
            *outer,
            "br label %loop",
            "loop:",
            "%j = phi i64 [ 0, %outer ], [ %j1, %loop ]",
            *carried,
            "%base = getelementptr i8, ptr %buffer, i64 %j",
            *body,
            f"%j1 = add i64 %j, {n * vector_bytes}",
            "%inside = icmp slt i64 %j1, %end",
            "br i1 %inside, label %loop, label %next",
            "next:",
            "%n1 = add i64 %n, 1",
            "%more = icmp slt i64 %n1, %repeats",
            "br i1 %more, label %outer, label %done",
            "done:",
            *kept,
            "ret void",
            "}",
        ]
    )


@dataclass(frozen=True, slots=True)
class PeakKernels:
    """The loaded kernels; `_library` keeps their code alive."""

    arithmetic: tuple[tuple[Arithmetic, Native], ...]
    read: Native
    copy: Native
    _library: Library


@cache
def peak_kernels(isa: Isa) -> PeakKernels:
    """Generates, compiles and loads the kernels for an instruction set that this CPU has."""
    kinds = arithmetics(isa)
    texts = [(arithmetic_text(kind, isa), replace(isa, features=(*isa.features, *kind.features))) for kind in kinds]
    texts += [(stream_text("peak_read", isa, is_copy=False), isa), (stream_text("peak_copy", isa, is_copy=True), isa)]
    # "none": the text is final, and LLVM must not see that a loop repeats itself.
    library = load([compile_text(text, wide, "none", "peaks") for text, wide in texts])
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return PeakKernels(
        tuple((kind, prototype(library.address(kind.symbol))) for kind in kinds),
        prototype(library.address("peak_read")),
        prototype(library.address("peak_copy")),
        library,
    )
