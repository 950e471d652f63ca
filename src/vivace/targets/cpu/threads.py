"""How the threads of a process share one program run: the native text of publishing and claiming.

There is one *team* per process: a block of memory that is never freed, and worker threads that serve it for ever. At a
moment at most one run owns the team. In that run one thread is the *leader*: it alone moves through the program
(`vivace.targets.cpu.program`), runs serial steps itself, and publishes a parallel step for everybody. Whoever completes
the last grain of a published step becomes the next leader. So nothing waits for a thread that holds no work: a worker
which sleeps, or whose core was taken, misses steps and joins again at the one that is current when it returns.

Rules:
* WORD: `claim` holds the number of the published step (high 32 bits) and how many of its grains are not yet claimed,
  of the first half (16 bits) and of the second (the low 16 bits). Grains are taken by compare-and-swap of the whole
  word, so a thread that read an old step can never take work of a new one.
* HALVES: threads of even number begin with the first half of a step, those of odd number with the second, each from
  its start on; whose half is taken goes on in the other. So of two threads each works on about the same rows in all
  steps, and finds what it wrote itself in its own caches (measured on 2 cores: MobileNetV2 takes 0.92 to 0.94 of the
  time, EfficientNet-lite0 0.96, MiniLM 0.98), and what a kernel fetches ahead is what its thread reads next.
* ALIVE: before a claim succeeds, a thread reads the team's memory only; the context of the run is alive until all
  claimed grains are done. So contexts can be freed as soon as `run` returns.
* GUIDED: a claim takes `remaining / (2 * threads)` grains, at least one and at most what is left of the half: few
  atomics at the start of a step, small pieces at its end. Of fewer than `FEW_GRAINS` for each thread it takes a third
  more: a step as small as the products of a decoder is paid for in claims (a token of SmolLM2-135M on 2 threads took
  0.97 to 0.99). In all steps that made ResNet-50 on 2 threads 1.05 times as slow with one of two cores kept busy; a
  claim of `remaining / threads` gained no more.
* HANDOFF: a published step without parts is a message to the caller's thread (number 0): "you lead from here". The
  end of the program and host callbacks belong to it.
* FLOAT: every thread computes with the default rounding and with denormals, whatever the calling thread had set.

Waiting and waking are in `vivace.targets.cpu.waiting`.
"""

from __future__ import annotations

from vivace.targets.cpu.team import Team
from vivace.targets.cpu.waiting import waiting_text

FEW_GRAINS = 32  # for each thread (rule GUIDED)


def claim_divisor(total: int, n_threads: int) -> int:
    """What part of the grains left one claim takes, of `total` in all (rule GUIDED)."""
    return (3 if total < FEW_GRAINS * n_threads else 4) * n_threads // 2


def grains_text(name: str = "grains") -> str:
    """The LLVM function that runs grains [first, last) of all parts, in order; it calls `execute` of `program_text`.

    It is told which part this thread ran last in this step, or null, and returns the same for the next call.
    """
    return f"""
define internal ptr @{name}(ptr %ctx, ptr %parts, i64 %total, i64 %first, i64 %last, i64 %id, i64 %salt, ptr %on) {{
entry:
  br label %part
part:
  %from = phi i64 [%first, %entry], [%from.next, %part.next]
  %p = phi ptr [%parts, %entry], [%p.next, %part.next]
  %ran = phi ptr [%on, %entry], [%ran.next, %part.next]
  %begins = phi i64 [0, %entry], [%ends, %part.next]
  %ends.p = getelementptr i8, ptr %p, i64 32
  %ends = load i64, ptr %ends.p
  %to = call i64 @llvm.umin.i64(i64 %ends, i64 %last)
  %nothing = icmp uge i64 %from, %to
  br i1 %nothing, label %part.skip, label %part.run
part.run:
  %units.p = getelementptr i8, ptr %p, i64 16
  %units = load i64, ptr %units.p
  %grain.p = getelementptr i8, ptr %p, i64 24
  %grain = load i64, ptr %grain.p
  %from.grain = sub i64 %from, %begins
  %to.grain = sub i64 %to, %begins
  %from.unit = mul i64 %from.grain, %grain
  %to.unit.0 = mul i64 %to.grain, %grain
  %to.unit = call i64 @llvm.umin.i64(i64 %to.unit.0, i64 %units)
  %is.on = icmp eq ptr %p, %ran
  call void @execute(ptr %ctx, ptr %p, i64 %from.unit, i64 %to.unit, i64 %id, i1 %is.on)
  br label %part.skip
part.skip:
  %ran.next = phi ptr [%ran, %part], [%p, %part.run]
  %p.next = getelementptr i8, ptr %p, i64 40
  %from.next = call i64 @llvm.umax.i64(i64 %from, i64 %to)
  %finished = icmp uge i64 %from.next, %last
  br i1 %finished, label %done, label %part.next
part.next:
  br label %part
done:
  ret ptr %ran.next
}}
"""


def threads_text(cycle_counter: str = "llvm.readcyclecounter", delay: str = "") -> str:
    """LLVM functions `publish`, `serve` and the worker's entry `vivace_worker`.

    They call `execute`, `grains` and `lead` of `program_text`. `delay` is a line of text that stands wherever one
    thread may overtake another.
    """
    t = Team
    return (
        waiting_text(cycle_counter)
        + f"""
declare i64 @{cycle_counter}()
declare i64 @llvm.cttz.i64(i64, i1)
declare i64 @llvm.umax.i64(i64, i64)
declare i64 @llvm.umin.i64(i64, i64)

define i64 @vivace_cycles() {{
  %t = call i64 @{cycle_counter}()
  ret i64 %t
}}

; Makes %total grains of %parts claimable by %members; the program goes on at %at when they are done.
; Only the leader calls this, and it leads no more afterwards. Without parts it is a message (rule HANDOFF).
define internal void @publish(ptr %team, ptr %ctx, ptr %at, ptr %parts, i64 %n_parts, i64 %total,
                               i64 %members, i64 %divisor, i64 %me) {{
  %members.p = getelementptr i8, ptr %team, i64 {t.MEMBERS}
  store atomic i64 %members, ptr %members.p monotonic, align 8
{delay}
  %total.p = getelementptr i8, ptr %team, i64 {t.TOTAL}
  store atomic i64 %total, ptr %total.p monotonic, align 8
  %parts.p = getelementptr i8, ptr %team, i64 {t.PARTS}
  store atomic ptr %parts, ptr %parts.p monotonic, align 8
  %n_parts.p = getelementptr i8, ptr %team, i64 {t.N_PARTS}
  store atomic i64 %n_parts, ptr %n_parts.p monotonic, align 8
  %ctx.p = getelementptr i8, ptr %team, i64 {t.CONTEXT}
  store atomic ptr %ctx, ptr %ctx.p monotonic, align 8
  %divisor.p = getelementptr i8, ptr %team, i64 {t.DIVISOR}
  store atomic i64 %divisor, ptr %divisor.p monotonic, align 8
  %at.p = getelementptr i8, ptr %team, i64 {t.AT}
  store atomic ptr %at, ptr %at.p monotonic, align 8
  %pending.p = getelementptr i8, ptr %team, i64 {t.PENDING}
  store atomic i64 %total, ptr %pending.p monotonic, align 8
  %claim = getelementptr i8, ptr %team, i64 {t.CLAIM}
  %old = load atomic i64, ptr %claim monotonic, align 8
  %number = lshr i64 %old, 32
  %number.next = add i64 %number, 1
  %high = shl i64 %number.next, 32
  %second = lshr i64 %total, 1
  %first = sub i64 %total, %second
  %first.up = shl i64 %first, 16
  %halves = or i64 %first.up, %second
  %word = or i64 %high, %halves
  %swapped = atomicrmw xchg ptr %claim, i64 %word seq_cst
{delay}
  call void @wake(ptr %team, i64 %members, i64 %me)
  ret void
}}

; Claims and runs grains of the published step until none is left. Returns where to lead on, or null for everybody but
; the last.
define internal ptr @serve(ptr %team, i64 %id) {{
entry:
  %claim = getelementptr i8, ptr %team, i64 {t.CLAIM}
  %seat = call ptr @seat(ptr %team, i64 %id)
  br label %retry
retry:
  %done.0 = phi i64 [0, %entry], [%done.0, %contended], [%done.2, %work]
  %on = phi ptr [null, %entry], [%on, %contended], [%ran, %work]
  %word = load atomic i64, ptr %claim acquire, align 8
  %left.up = lshr i64 %word, 16
  %left.first = and i64 %left.up, 65535
  %left.second = and i64 %word, 65535
  %remaining = add i64 %left.first, %left.second
  %none = icmp eq i64 %remaining, 0
  br i1 %none, label %settle, label %ask
ask:
  %members.p = getelementptr i8, ptr %team, i64 {t.MEMBERS}
  %members = load atomic i64, ptr %members.p monotonic, align 8
  %shifted = lshr i64 %members, %id
  %mine = trunc i64 %shifted to i1
  br i1 %mine, label %size, label %settle
size:
  %divisor.p = getelementptr i8, ptr %team, i64 {t.DIVISOR}
  %divisor = load atomic i64, ptr %divisor.p monotonic, align 8
  %divisor.1 = call i64 @llvm.umax.i64(i64 %divisor, i64 1)
  %share = udiv i64 %remaining, %divisor.1
  %some = call i64 @llvm.umax.i64(i64 %share, i64 1)
  %is.odd = trunc i64 %id to i1
  %own = select i1 %is.odd, i64 %left.second, i64 %left.first
  %is.taken = icmp eq i64 %own, 0
  %in.second = xor i1 %is.odd, %is.taken
  %left = select i1 %in.second, i64 %left.second, i64 %left.first
  %chunk = call i64 @llvm.umin.i64(i64 %some, i64 %left)
  %total.p = getelementptr i8, ptr %team, i64 {t.TOTAL}
  %total = load atomic i64, ptr %total.p monotonic, align 8
  %parts.p = getelementptr i8, ptr %team, i64 {t.PARTS}
  %parts = load atomic ptr, ptr %parts.p monotonic, align 8
  %n_parts.p = getelementptr i8, ptr %team, i64 {t.N_PARTS}
  %n_parts = load atomic i64, ptr %n_parts.p monotonic, align 8
  %ctx.p = getelementptr i8, ptr %team, i64 {t.CONTEXT}
  %ctx = load atomic ptr, ptr %ctx.p monotonic, align 8
  %at.p = getelementptr i8, ptr %team, i64 {t.AT}
  %at = load atomic ptr, ptr %at.p monotonic, align 8
  %chunk.up = shl i64 %chunk, 16
  %change = select i1 %in.second, i64 %chunk, i64 %chunk.up
  %word.next = sub i64 %word, %change
{delay}
  %swap = cmpxchg ptr %claim, i64 %word, i64 %word.next acq_rel monotonic
  %won = extractvalue {{i64, i1}} %swap, 1
  br i1 %won, label %claimed, label %contended
contended:
  call void @llvm.x86.sse2.pause()
  br label %retry
claimed:
{delay}
  %message = icmp eq i64 %n_parts, 0
  br i1 %message, label %lead, label %work
work:
  %second.half = lshr i64 %total, 1
  %middle = sub i64 %total, %second.half
  %end = select i1 %in.second, i64 %total, i64 %middle
  %first = sub i64 %end, %left
  %last = add i64 %first, %chunk
  %number = lshr i64 %word, 32
  %ran = call ptr @grains(ptr %ctx, ptr %parts, i64 %total, i64 %first, i64 %last, i64 %id, i64 %number, ptr %on)
  %done.2 = add i64 %done.0, %chunk
  %over = call i1 @is_over(ptr %team, ptr %seat)
  br i1 %over, label %settle, label %retry
settle:
  %done = phi i64 [%done.0, %retry], [%done.0, %ask], [%done.2, %work]
  %idle = icmp eq i64 %done, 0
  br i1 %idle, label %no, label %count
count:
{delay}
  %pending.p = getelementptr i8, ptr %team, i64 {t.PENDING}
  %before = atomicrmw sub ptr %pending.p, i64 %done acq_rel
  %is.last = icmp eq i64 %before, %done
  br i1 %is.last, label %last.one, label %no
last.one:
{delay}
  %at2.p = getelementptr i8, ptr %team, i64 {t.AT}
  %at2 = load atomic ptr, ptr %at2.p monotonic, align 8
  ret ptr %at2
lead:
  %unused = getelementptr i8, ptr %team, i64 {t.PENDING}
  store atomic i64 0, ptr %unused monotonic, align 8
  ret ptr %at
no:
  ret ptr null
}}

; The life of a worker thread; %slot holds the team's address and the thread's number.
define ptr @vivace_worker(ptr %slot) {{
entry:
  %team = load ptr, ptr %slot
  %id.p = getelementptr i8, ptr %slot, i64 8
  %id = load i64, ptr %id.p
  call void @set_float_mode()
  br label %waiting
waiting:
  call void @wait(ptr %team, i64 %id)
  br label %serving
serving:
  %at = call ptr @serve(ptr %team, i64 %id)
  %follower = icmp eq ptr %at, null
  br i1 %follower, label %waiting, label %leading
leading:
  %ctx.p = getelementptr i8, ptr %team, i64 {t.CONTEXT}
  %ctx = load atomic ptr, ptr %ctx.p monotonic, align 8
  %n.p = getelementptr i8, ptr %team, i64 {t.N_THREADS}
  %n = load atomic i64, ptr %n.p monotonic, align 8
  %ended = call i1 @lead(ptr %team, ptr %ctx, ptr %at, i64 %id, i64 %n)
  br label %serving
}}
"""
    )
