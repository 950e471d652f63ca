"""Kernels of several stages: the stages' code, called one after another for each block, on the thread's scratch.

Each stage has its table of arguments on the stack. What does not change from block to block is written there once for
each call.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

from vivace.base.dims import Dim, bounds, ceildiv, maximum, symbols
from vivace.base.machine import Isa
from vivace.loops.blocked import BLOCK, PART, STEP, Blocked, Stage, blocked_dims, extent_of
from vivace.loops.contraction import Contraction, Depthwise
from vivace.loops.kernel import Buffer, Kernel
from vivace.loops.pack import Pack
from vivace.targets.cpu.code import NOTES_BYTES, KernelCode
from vivace.targets.cpu.contraction import emit_contraction
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.depthwise import emit_depthwise
from vivace.targets.cpu.llvm import emit_kernel
from vivace.targets.cpu.pack import emit_pack

_ALIGN_BYTES = 64


def emit_blocked(k: Blocked, isa: Isa) -> KernelCode:
    """The kernel: a module with one internal function per stage."""
    codes = [_stage_code(replace(s.spec, name=f"{k.name}_{i}"), isa) for i, s in enumerate(k.stages)]
    place: dict[Buffer, Dim] = {}
    local_bytes: Dim = NOTES_BYTES  # the first note is the block that `once` was run for, plus one
    for b in sorted(k.local, key=lambda b: not isinstance(extent_of(b), int)):
        place[b] = local_bytes
        local_bytes = local_bytes + ceildiv(extent_of(b) * b.dtype.size_bytes, _ALIGN_BYTES) * _ALIGN_BYTES
    most: Dim = 0
    for c in codes:
        most = maximum(most, _at_most(c.scratch_bytes))
    main, declares = _main(k, codes, place, local_bytes)
    text = _one_module(
        [*(c.llvm_text.replace(f"define void @{c.name}(", f"define internal void @{c.name}(") for c in codes)], declares
    )
    units = k.blocks * k.parts
    return KernelCode(
        k.name, f"{text}\n{main}\n", k.params, blocked_dims(k), units, k.grain, local_bytes + most, optimize="light"
    )


def _at_most(scratch_bytes: Dim) -> Dim:
    """What a stage needs in any block, part and step."""
    if not {s.name for s in symbols(scratch_bytes)} & {BLOCK, PART, STEP}:
        return scratch_bytes
    most = bounds(scratch_bytes)[1]
    assert most is not None, scratch_bytes
    return most


def _stage_code(spec: Kernel | Contraction | Depthwise | Pack, isa: Isa) -> KernelCode:
    match spec:
        case Kernel():
            return emit_kernel(spec, isa)
        case Contraction():
            return emit_contraction(spec, isa)
        case Depthwise():
            return emit_depthwise(spec, isa)
        case Pack():
            return emit_pack(spec, isa)


def _one_module(texts: list[str], declares: Mapping[str, str]) -> str:
    """The modules' text as one: what several of them declare stands once."""
    seen: set[str] = set()
    lines: list[str] = []
    for line in (x for text in (*texts, *declares.values()) for x in text.splitlines()):
        if line.startswith(("declare", "attributes", "!", "@")):
            if line in seen:
                continue
            seen.add(line)
        lines.append(line)
    return "\n".join(lines)


def _main(
    k: Blocked, codes: list[KernelCode], place: Mapping[Buffer, Dim], local_bytes: Dim
) -> tuple[str, Mapping[str, str]]:
    t = Text()
    names = blocked_dims(k)
    dims: dict[str, Int] = {
        d: t.op(f"load i64, ptr {t.at('%args', 8 * (len(k.params) + i))}, align 8") for i, d in enumerate(names)
    }
    base = {b: t.op(f"load ptr, ptr {t.at('%args', 8 * i)}, align 8") for i, b in enumerate(k.params)}
    base |= {b: t.at("%scratch", t.dim(offset, dims)) for b, offset in place.items()}
    rest = t.at("%scratch", t.dim(local_bytes, dims))
    tables = [t.op(f"alloca [{max(1, len(c.params) + len(c.dims))} x i64], align 16") for c in codes]
    for code, table in zip(codes, tables, strict=True):
        for i, b in enumerate(code.params):
            t.put(f"store ptr {base[b]}, ptr {t.at(table, 8 * i)}, align 8")
        for i, d in enumerate(code.dims):
            if d in dims:
                t.put(f"store i64 {dims[d]}, ptr {t.at(table, 8 * (len(code.params) + i))}, align 8")

    def call(stage: Stage, n: int, at: dict[str, Int]) -> None:
        wanted = t.dim(stage.when, dims | at)
        if isinstance(wanted, int):
            if wanted:
                run(stage, n, at)
            return
        then, after = t.label(), t.label()
        t.branch(t.op(f"icmp ne i64 {wanted}, 0"), then, after)
        t.start(then)
        run(stage, n, at)
        t.jump(after)
        t.start(after)

    def run(stage: Stage, n: int, at: dict[str, Int]) -> None:
        code, table, env = codes[n], tables[n], dims | at
        for b, offset in stage.offsets:
            where = t.at(base[b], t.mul(t.dim(offset, env), b.dtype.size_bytes))
            t.put(f"store ptr {where}, ptr {t.at(table, 8 * code.params.index(b))}, align 8")
        for i, d in enumerate(code.dims):
            if d in at:
                t.put(f"store i64 {at[d]}, ptr {t.at(table, 8 * (len(code.params) + i))}, align 8")
        if code.scratch_bytes != 0:
            t.put(f"store <{NOTES_BYTES} x i8> zeroinitializer, ptr {rest}, align {_ALIGN_BYTES}")
        t.put(f"call void @{code.name}(ptr {table}, i64 0, i64 {t.dim(code.units, env)}, ptr {rest})")

    with t.loop("%begin", "%end") as unit:
        block, part = t.divmod(unit, t.dim(k.parts, dims))
        again, fresh = t.label(), t.label()
        before, note = t.op("load i64, ptr %scratch, align 8"), t.add(block, 1)
        t.branch(t.op(f"icmp eq i64 {before}, {note}"), again, fresh)
        t.start(fresh)
        t.put(f"store i64 {note}, ptr %scratch, align 8")
        for n, s in enumerate(k.once):
            call(s, n, {BLOCK: block})
        t.jump(again)
        t.start(again)
        at = {BLOCK: block, PART: part}
        n_steps = t.dim(k.steps, dims | at)
        with nullcontext(0) if n_steps == 1 else t.loop(0, n_steps) as step:
            for n, s in enumerate(k.each, len(k.once)):
                call(s, n, at | {STEP: step})
        for n, s in enumerate(k.last, len(k.once) + len(k.each)):
            call(s, n, at)
    t.put("ret void")
    head = f"define void @{k.name}(ptr %args, i64 %begin, i64 %end, ptr %scratch) #0 {{"
    return "\n".join([head, "entry:", *t.lines, "}"]), t.declares
