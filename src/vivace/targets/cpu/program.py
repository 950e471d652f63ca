"""The program of an engine: a table of 64-bit words, and the one native function that interprets it.

    SERIAL    fn, args, units             fn(args, 0, units, scratch), by the thread that leads
    PARALLEL  n_parts, grains, n_parts * (fn, args, units, grain, end)
    JUMP      target
    UNLESS    flag, width, target         jump when the flag (1 or 8 bytes wide) is zero
    SET       cell, value
    COUNT     cell                        add one to a 64-bit cell
    LESS      a, b, target                jump unless cell a < cell b
    CALL      fn, args, due               i64 fn(args) on the caller's thread unless due is 0; not 0 ends the run
    END

The parts of one PARALLEL are independent of each other: their grains (`grain` units each; `end` is the part's running
total of grains) form one space that the threads share out; so branches of a graph run side by side without barriers.
Targets are byte offsets from the start of the table; everything else that is an address is absolute. Units, addresses
and dims live in words and never in code, so one program serves every shape, and this function serves every program.

Rules:
* ONE CALL: a run applies the patches (word = *(io[index] + field) + offset), goes to END, and returns a `Status`.
* ALONE: with one thread, or when another run owns the team, the calling thread runs everything itself, without atomics
  on the way; runs never queue for each other. Each such run takes one thread off the team of the run that owns it.
* QUIET: without a ring of records, profiling costs one predictable branch per chunk.

`vivace.targets.cpu.threads` holds the team's side, `vivace.targets.cpu.methods` that of Python.
"""

from __future__ import annotations

from vivace.targets.cpu.code import NOTES_BYTES
from vivace.targets.cpu.formulas import FORMULAS
from vivace.targets.cpu.matching import MATCHING
from vivace.targets.cpu.methods import METHODS
from vivace.targets.cpu.program_layout import N_WORDS, PARALLEL_HEAD_WORDS, PART_WORDS, Header, Op, Record, Ring, Status
from vivace.targets.cpu.shuffled import DELAY, shuffled_grains_text
from vivace.targets.cpu.slices import slices_text
from vivace.targets.cpu.team import Team
from vivace.targets.cpu.threads import FEW_GRAINS, grains_text, threads_text


def program_text(is_shuffled: bool = False) -> str:
    """The complete LLVM module (x86-64): `vivace_enter`, `vivace_match`, `vivace_evaluate`, `vivace_fill`,
    `vivace_bind`, `vivace_worker`, `vivace_cycles`, and the kernel `vivace_slices`.

    With `is_shuffled` grains run in a changing order and threads lose time (see `vivace.targets.cpu.shuffled`).
    """
    threads = threads_text(delay=DELAY) + shuffled_grains_text() if is_shuffled else threads_text() + grains_text()
    slices = slices_text(DELAY if is_shuffled else "")
    return _HEAD + threads + _EXECUTE + _lead_text() + _run_text() + slices + FORMULAS + MATCHING + METHODS


_HEAD = """
target triple = "x86_64-unknown-linux-gnu"
declare void @llvm.x86.sse2.pause()
declare void @llvm.x86.sse.ldmxcsr(ptr)
declare void @llvm.x86.sse.stmxcsr(ptr)

; Rule FLOAT: all exceptions masked, round to nearest, denormals kept.
@float_mode = private constant i32 8064
define internal void @set_float_mode() alwaysinline {
  call void @llvm.x86.sse.ldmxcsr(ptr @float_mode)
  ret void
}
"""

_EXECUTE = f"""
; Runs units [begin, end) of a part, and records it where the context has a ring. The notes of its kernel are cleared
; unless %is.on: this thread has run it before in this step, and nothing since.
define internal void @execute(ptr %ctx, ptr %part, i64 %begin, i64 %end, i64 %id, i1 %is.on) {{
entry:
  %fn = load ptr, ptr %part
  %args.p = getelementptr i8, ptr %part, i64 8
  %args = load ptr, ptr %args.p
  %scratch.p = getelementptr i64, ptr %ctx, i64 {Header.SCRATCH:d}
  %scratch.base = load ptr, ptr %scratch.p
  %stride.p = getelementptr i64, ptr %ctx, i64 {Header.SCRATCH_STRIDE:d}
  %stride = load i64, ptr %stride.p
  %scratch.at = mul i64 %stride, %id
  %scratch = getelementptr i8, ptr %scratch.base, i64 %scratch.at
  %is.without = icmp eq i64 %stride, 0
  %is.kept = or i1 %is.on, %is.without
  br i1 %is.kept, label %noted, label %clear
clear:
  store <{NOTES_BYTES} x i8> zeroinitializer, ptr %scratch, align 64
  br label %noted
noted:
  %ring.p = getelementptr i64, ptr %ctx, i64 {Header.RING:d}
  %ring = load ptr, ptr %ring.p
  %quiet = icmp eq ptr %ring, null
  br i1 %quiet, label %plain, label %timed, !prof !{{!"branch_weights", i32 1000, i32 1}}
plain:
  call void %fn(ptr %args, i64 %begin, i64 %end, ptr %scratch)
  ret void
timed:
  %t0 = call i64 @llvm.readcyclecounter()
  call void %fn(ptr %args, i64 %begin, i64 %end, ptr %scratch)
  %t1 = call i64 @llvm.readcyclecounter()
  %n = atomicrmw add ptr %ring, i64 1 monotonic
  %capacity.p = getelementptr i64, ptr %ring, i64 {Ring.CAPACITY:d}
  %capacity = load i64, ptr %capacity.p
  %slot = urem i64 %n, %capacity
  %slot.at = mul i64 %slot, {Record.SIZE:d}
  %slot.word = add i64 %slot.at, {Ring.RECORDS:d}
  %record = getelementptr i64, ptr %ring, i64 %slot.word
  store ptr %part, ptr %record
  %r1 = getelementptr i64, ptr %record, i64 {Record.THREAD:d}
  store i64 %id, ptr %r1
  %r2 = getelementptr i64, ptr %record, i64 {Record.START:d}
  store i64 %t0, ptr %r2
  %r3 = getelementptr i64, ptr %record, i64 {Record.STOP:d}
  store i64 %t1, ptr %r3
  %r4 = getelementptr i64, ptr %record, i64 {Record.BEGIN:d}
  store i64 %begin, ptr %r4
  %r5 = getelementptr i64, ptr %record, i64 {Record.END:d}
  store i64 %end, ptr %r5
  ret void
}}
"""


def _lead_text() -> str:
    t = Team

    def word(name: str, i: int, kind: str = "i64") -> str:
        return f"  %{name}.p = getelementptr i64, ptr %at, i64 {i}\n  %{name} = load {kind}, ptr %{name}.p"

    cases = " ".join(f"i64 {op:d}, label %{op.name.lower()}" for op in Op)
    return f"""
; Goes on at %start as the leader of %n threads. Returns true at the end of the program (thread 0 only), false when the
; lead was passed on by publishing.
define internal i1 @lead(ptr %team, ptr %ctx, ptr %start, i64 %id, i64 %n) noinline {{
entry:
  %program.p = getelementptr i64, ptr %ctx, i64 {Header.PROGRAM:d}
  %program = load ptr, ptr %program.p
  %is.worker = icmp ne i64 %id, 0
  %is.alone = icmp ult i64 %n, 2
  br label %step
step:
  %at = phi ptr [%start, %entry], [%at.serial, %serial], [%at.jump, %jumps], [%at.set, %set], [%at.count, %count],
            [%at.call, %call.ok], [%at.parallel, %alone]
  %op = load i64, ptr %at
  switch i64 %op, label %end [ {cases} ]
serial:
{word("serial.units", 3)}
  %serial.part = getelementptr i64, ptr %at, i64 1
  call void @execute(ptr %ctx, ptr %serial.part, i64 0, i64 %serial.units, i64 %id, i1 false)
  %at.serial = getelementptr i64, ptr %at, i64 {N_WORDS[Op.SERIAL]}
  br label %step
jump:
{word("jump.target", 1)}
  br label %jumps
unless:
{word("flag", 1, "ptr")}
{word("width", 2)}
{word("unless.target", 3)}
  %is.byte = icmp eq i64 %width, 1
  br i1 %is.byte, label %byte, label %wide
byte:
  %flag.1 = load i8, ptr %flag
  %flag.1w = zext i8 %flag.1 to i64
  br label %test
wide:
  %flag.8 = load i64, ptr %flag
  br label %test
test:
  %value = phi i64 [%flag.1w, %byte], [%flag.8, %wide]
  %is.zero = icmp eq i64 %value, 0
  %unless.next = getelementptr i64, ptr %at, i64 {N_WORDS[Op.UNLESS]}
  %unless.jump = getelementptr i8, ptr %program, i64 %unless.target
  %unless.to = select i1 %is.zero, ptr %unless.jump, ptr %unless.next
  br label %jumps
less:
{word("a", 1, "ptr")}
{word("b", 2, "ptr")}
{word("less.target", 3)}
  %a.value = load i64, ptr %a
  %b.value = load i64, ptr %b
  %is.less = icmp slt i64 %a.value, %b.value
  %less.next = getelementptr i64, ptr %at, i64 {N_WORDS[Op.LESS]}
  %less.jump = getelementptr i8, ptr %program, i64 %less.target
  %less.to = select i1 %is.less, ptr %less.next, ptr %less.jump
  br label %jumps
jumps:
  %offset = phi i64 [%jump.target, %jump], [0, %test], [0, %less]
  %base = phi ptr [%program, %jump], [%unless.to, %test], [%less.to, %less]
  %at.jump = getelementptr i8, ptr %base, i64 %offset
  br label %step
set:
{word("set.cell", 1, "ptr")}
{word("set.value", 2)}
  store i64 %set.value, ptr %set.cell
  %at.set = getelementptr i64, ptr %at, i64 {N_WORDS[Op.SET]}
  br label %step
count:
{word("count.cell", 1, "ptr")}
  %count.old = load i64, ptr %count.cell
  %count.new = add i64 %count.old, 1
  store i64 %count.new, ptr %count.cell
  %at.count = getelementptr i64, ptr %at, i64 {N_WORDS[Op.COUNT]}
  br label %step
call:
{word("due", 3)}
  %at.call = getelementptr i64, ptr %at, i64 {N_WORDS[Op.CALL]}
  %is.due = icmp ne i64 %due, 0
  br i1 %is.due, label %call.due, label %call.ok
call.due:
  br i1 %is.worker, label %handoff, label %call.here
call.here:
{word("call.fn", 1, "ptr")}
{word("call.args", 2, "ptr")}
  %result = call i64 %call.fn(ptr %call.args)
  call void @set_float_mode()
  %call.fine = icmp eq i64 %result, 0
  br i1 %call.fine, label %call.ok, label %call.failed
call.ok:
  br label %step
call.failed:
  %status = getelementptr i64, ptr %ctx, i64 {Header.STATUS:d}
  store i64 {Status.CALL_FAILED:d}, ptr %status
  ret i1 true
parallel:
{word("n_parts", 1)}
{word("total", 2)}
  %parts = getelementptr i64, ptr %at, i64 {PARALLEL_HEAD_WORDS}
  %parts.words = mul i64 %n_parts, {PART_WORDS}
  %at.parallel = getelementptr i64, ptr %parts, i64 %parts.words
  %is.small = icmp ult i64 %total, 2
  %is.lonely = or i1 %is.alone, %is.small
  br i1 %is.lonely, label %alone, label %together
alone:
  %alone.last = call ptr @grains(ptr %ctx, ptr %parts, i64 %total, i64 0, i64 %total, i64 %id, i64 0, ptr null)
  br label %step
together:
  %solo.p = getelementptr i8, ptr %team, i64 {t.SOLO}
  %solo = load atomic i64, ptr %solo.p monotonic, align 8
  %shared.out = icmp sgt i64 %n, %solo
  %n.left = sub i64 %n, %solo
  %n.here = select i1 %shared.out, i64 %n.left, i64 1
  %is.few = icmp ult i64 %n.here, 2
  br i1 %is.few, label %alone, label %share
share:
  %unused = sub i64 64, %n.here
  %members = lshr i64 -1, %unused
  %few = mul i64 %n.here, {FEW_GRAINS}
  %has.few = icmp ult i64 %total, %few
  %halves = select i1 %has.few, i64 3, i64 4
  %twice = mul i64 %n.here, %halves
  %divisor = lshr i64 %twice, 1
  call void @publish(ptr %team, ptr %ctx, ptr %at.parallel, ptr %parts, i64 %n_parts, i64 %total,
                     i64 %members, i64 %divisor, i64 %id)
  ret i1 false
end:
  br i1 %is.worker, label %handoff, label %finish
handoff:
  call void @publish(ptr %team, ptr %ctx, ptr %at, ptr null, i64 0, i64 1, i64 1, i64 1, i64 %id)
  ret i1 false
finish:
  ret i1 true
}}
"""


def _run_text() -> str:
    t = Team
    return f"""
; Writes the addresses of inputs and outputs into the program.
define internal void @patch(ptr %ctx, ptr %io) {{
entry:
  %patches.p = getelementptr i64, ptr %ctx, i64 {Header.PATCHES:d}
  %patches = load ptr, ptr %patches.p
  %n_patches.p = getelementptr i64, ptr %ctx, i64 {Header.N_PATCHES:d}
  %n_patches = load i64, ptr %n_patches.p
  %field.p = getelementptr i64, ptr %ctx, i64 {Header.FIELD:d}
  %field = load i64, ptr %field.p
  br label %patch.test
patch.test:
  %i = phi i64 [0, %entry], [%i.next, %patch.one]
  %patched = icmp eq i64 %i, %n_patches
  br i1 %patched, label %done, label %patch.one
patch.one:
  %entry.at = mul i64 %i, 24
  %entry.p = getelementptr i8, ptr %patches, i64 %entry.at
  %target = load ptr, ptr %entry.p
  %index.p = getelementptr i8, ptr %entry.p, i64 8
  %index = load i64, ptr %index.p
  %offset.p = getelementptr i8, ptr %entry.p, i64 16
  %offset = load i64, ptr %offset.p
  %place.p = getelementptr i64, ptr %io, i64 %index
  %place = load ptr, ptr %place.p
  %word.p = getelementptr i8, ptr %place, i64 %field
  %address = load i64, ptr %word.p
  %moved = add i64 %address, %offset
  store i64 %moved, ptr %target
  %i.next = add i64 %i, 1
  br label %patch.test
done:
  ret void
}}

define internal i64 @run(ptr %ctx, ptr %io) {{
entry:
  %mode = alloca i32
  %status = getelementptr i64, ptr %ctx, i64 {Header.STATUS:d}
  store i64 {Status.OK:d}, ptr %status
  %n.p = getelementptr i64, ptr %ctx, i64 {Header.N_THREADS:d}
  %n = load i64, ptr %n.p
  %cell.p = getelementptr i64, ptr %ctx, i64 {Header.TEAM_CELL:d}
  %cell = load ptr, ptr %cell.p
  %team = load ptr, ptr %cell
  %is.alone = icmp ult i64 %n, 2
  br i1 %is.alone, label %ready, label %look
look:
  %workers.p = getelementptr i8, ptr %team, i64 {t.N_WORKERS}
  %workers = load atomic i64, ptr %workers.p acquire, align 8
  %present = add i64 %workers, 1
  %short = icmp ult i64 %present, %n
  br i1 %short, label %needy, label %ready
needy:
  ret i64 {Status.NEEDS_WORKERS:d}
ready:
  call void @patch(ptr %ctx, ptr %io)
  %program.p = getelementptr i64, ptr %ctx, i64 {Header.PROGRAM:d}
  %program = load ptr, ptr %program.p
  call void @llvm.x86.sse.stmxcsr(ptr %mode)
  call void @set_float_mode()
  br i1 %is.alone, label %alone, label %own
alone:
  %r0 = call i1 @lead(ptr %team, ptr %ctx, ptr %program, i64 0, i64 1)
  br label %finish
own:
  %owner = getelementptr i8, ptr %team, i64 {t.OWNER}
  %swap = cmpxchg ptr %owner, i64 0, i64 1 acquire monotonic
  %won = extractvalue {{i64, i1}} %swap, 1
  br i1 %won, label %team.run, label %solo.run
solo.run:
  %solo = getelementptr i8, ptr %team, i64 {t.SOLO}
  %s0 = atomicrmw add ptr %solo, i64 1 monotonic
  %r1 = call i1 @lead(ptr %team, ptr %ctx, ptr %program, i64 0, i64 1)
  %s1 = atomicrmw sub ptr %solo, i64 1 monotonic
  br label %finish
team.run:
  %team.n = getelementptr i8, ptr %team, i64 {t.N_THREADS}
  store atomic i64 %n, ptr %team.n monotonic, align 8
  br label %leading
leading:
  %at = phi ptr [%program, %team.run], [%next, %serving]
  %ended = call i1 @lead(ptr %team, ptr %ctx, ptr %at, i64 0, i64 %n)
  br i1 %ended, label %release, label %serving
serving:
  %next = call ptr @serve(ptr %team, i64 0)
  %follower = icmp eq ptr %next, null
  br i1 %follower, label %waiting, label %leading
waiting:
  call void @wait(ptr %team, i64 0)
  br label %serving
release:
  store atomic i64 0, ptr %owner release, align 8
  br label %finish
finish:
  call void @llvm.x86.sse.ldmxcsr(ptr %mode)
  %result = load i64, ptr %status
  ret i64 %result
}}
"""
