"""The native text of waiting, giving way, and waking.

Rules:
* PARK: a thread that finds nothing to claim spins for `SPIN_NS`, then sleeps in a futex on its own gate. Spinning
  longer than a hand-over takes buys nothing, and it holds a core that the kernel could give to a descheduled member
  of the team.
* WAY: a thread that had its core for `TURN_NS` lets others have it at the next moment at which it holds no grain; what
  the caller did between two runs counts. Where nobody else wants the core that is a call of half a microsecond; where
  another process keeps it busy, the kernel takes it now rather than in the midst of a grain, for which the whole team
  would wait.
* STEER: see `vivace.targets.cpu.steering`.

Not handled: without a futex (not Linux) parked threads poll once in 100 us, nothing is steered, and nobody gives way.
"""

from __future__ import annotations

from vivace.targets.cpu.steering import steering_text
from vivace.targets.cpu.team import Seat, Team, held

# A hand-over between running threads takes 0.1 us, waking a sleeping one costs the leader 15 us and comes 35 us
# later, so spinning bridges short serial steps and the Python between two runs. With one of two cores kept busy by
# another process, a program of 60 steps took 1.00, 1.01, 1.02 and 1.07 times its undisturbed single-thread time when
# spinning 2, 15, 50 and 200 us.
SPIN_NS = 30_000

# Shorter than the slice after which Linux may take a core away (1.4 ms on two cores, then at the next tick of its
# clock). With one of two cores kept busy by another process, ResNet-50 on 2 threads took 1.04 of its undisturbed time
# on 1 thread without giving way, 1.01 with the worker always steered, and 0.80 with both.
TURN_NS = 1_000_000


def waiting_text(cycle_counter: str) -> str:
    """LLVM functions `wait`, for a thread without work, and `wake`, for the leader."""
    t, s = Team, Seat
    text = f"""
; Whether thread %id may claim something now. Reads may be stale: the claim itself decides (rule WORD).
define internal i1 @has_work(ptr %team, i64 %id) alwaysinline {{
  %claim = getelementptr i8, ptr %team, i64 {t.CLAIM}
  %word = load atomic i64, ptr %claim acquire, align 8
  %left = trunc i64 %word to i32
  %some = icmp ne i32 %left, 0
  br i1 %some, label %ask, label %no
ask:
  %members.p = getelementptr i8, ptr %team, i64 {t.MEMBERS}
  %members = load atomic i64, ptr %members.p monotonic, align 8
  %shifted = lshr i64 %members, %id
  %mine = trunc i64 %shifted to i1
  ret i1 %mine
no:
  ret i1 false
}}

; Returns when thread %id may have work: spins, then sleeps (rule PARK).
define internal void @wait(ptr %team, i64 %id) noinline {{
entry:
  %bit = shl i64 1, %id
  %others = xor i64 %bit, -1
  %gate = call ptr @seat(ptr %team, i64 %id)
  %over = call i1 @is_over(ptr %team, ptr %gate)
  br i1 %over, label %way, label %begin
way:
  call void @give_way(ptr %team, ptr %gate)
  br label %begin
begin:
  %cpu.p = getelementptr i8, ptr %gate, i64 {s.CPU}
  %steered.p = getelementptr i8, ptr %gate, i64 {s.STEERED}
  %parked = getelementptr i8, ptr %team, i64 {t.PARKED}
  %spin.p = getelementptr i8, ptr %team, i64 {t.SPIN_CYCLES}
  %spin.cycles = load i64, ptr %spin.p
  br label %start
start:
  %t0 = call i64 @{cycle_counter}()
  br label %round
round:
  br label %look
look:
  %i = phi i64 [0, %round], [%i.next, %pause]
  %ready = call i1 @has_work(ptr %team, i64 %id)
  br i1 %ready, label %done, label %pause
pause:
  call void @llvm.x86.sse2.pause()
  %i.next = add i64 %i, 1
  %again = icmp ult i64 %i.next, 8
  br i1 %again, label %look, label %clock
clock:
  %t1 = call i64 @{cycle_counter}()
  %passed = sub i64 %t1, %t0
  %enough = icmp uge i64 %passed, %spin.cycles
  br i1 %enough, label %park, label %round
park:
  call void @note_thread(ptr %team, ptr %gate)
  store atomic i64 -1, ptr %cpu.p monotonic, align 8
  store atomic i32 1, ptr %gate seq_cst, align 4
  %seen = atomicrmw or ptr %parked, i64 %bit seq_cst
  %late = call i1 @has_work(ptr %team, i64 %id)
  br i1 %late, label %leave, label %sleep
sleep:
  call void @sleep(ptr %team, ptr %gate)
  %g = load atomic i32, ptr %gate acquire, align 4
  %opened = icmp eq i32 %g, 0
  br i1 %opened, label %awake, label %interrupted
interrupted:
  %seen2 = atomicrmw and ptr %parked, i64 %others seq_cst
  br label %awake
awake:
  %steered = load atomic i64, ptr %steered.p acquire, align 8
  %free = icmp sle i64 %steered, 0
  br i1 %free, label %note, label %restore
restore:
{held("syscall", t.SYSCALL, "ptr")}
{held("set", t.SET_AFFINITY)}
  %saved = getelementptr i8, ptr %gate, i64 {s.SAVED}
  %restored = call i64 (i64, ...) %syscall(i64 %set, i64 0, i64 %steered, ptr %saved)
  store atomic i64 0, ptr %steered.p release, align 8
  br label %note
note:
  call void @note_cpu(ptr %team, ptr %gate)
  call void @note_turn(ptr %gate)
  br label %start
leave:
  call void @note_cpu(ptr %team, ptr %gate)
  %seen3 = atomicrmw and ptr %parked, i64 %others seq_cst
  store atomic i32 0, ptr %gate monotonic, align 4
  br label %done
done:
  ret void
}}

; Whether the thread in this seat has had the core for a whole turn (rule WAY).
define internal i1 @is_over(ptr %team, ptr %seat) alwaysinline {{
  %since.p = getelementptr i8, ptr %seat, i64 {s.SINCE}
  %since = load i64, ptr %since.p
{held("turn", t.TURN_CYCLES)}
  %now = call i64 @{cycle_counter}()
  %passed = sub i64 %now, %since
  %over = icmp ugt i64 %passed, %turn
  ret i1 %over
}}

define internal void @note_turn(ptr %seat) alwaysinline {{
  %since.p = getelementptr i8, ptr %seat, i64 {s.SINCE}
  %now = call i64 @{cycle_counter}()
  store i64 %now, ptr %since.p
  ret void
}}

; Lets whoever else wants this core have it.
define internal void @give_way(ptr %team, ptr %seat) noinline {{
{held("syscall", t.SYSCALL, "ptr")}
  %none = icmp eq ptr %syscall, null
  br i1 %none, label %note, label %yield
yield:
  %yield.p = getelementptr i8, ptr %team, i64 {t.YIELD}
  %number = load i64, ptr %yield.p
  %r = call i64 (i64, ...) %syscall(i64 %number)
  br label %note
note:
  call void @note_turn(ptr %seat)
  ret void
}}

; Sleeps while the gate holds 1; may return early.
define internal void @sleep(ptr %team, ptr %gate) {{
{held("syscall", t.SYSCALL, "ptr")}
  %none = icmp eq ptr %syscall, null
  br i1 %none, label %poll, label %futex
futex:
  %futex.p = getelementptr i8, ptr %team, i64 {t.FUTEX}
  %number = load i64, ptr %futex.p
  %r = call i64 (i64, ...) %syscall(i64 %number, ptr %gate, i64 128, i64 1, ptr null, ptr null, i64 0)
  ret void
poll:
{held("usleep", t.USLEEP, "ptr")}
  %r2 = call i32 %usleep(i32 100)
  ret void
}}

define internal ptr @seat(ptr %team, i64 %id) alwaysinline {{
  %at = mul i64 %id, {s.SIZE}
  %seats = getelementptr i8, ptr %team, i64 {t.SEATS}
  %seat = getelementptr i8, ptr %seats, i64 %at
  ret ptr %seat
}}

; Opens the gates of the sleeping threads among %members; %me is the thread that does it.
define internal void @wake(ptr %team, i64 %members, i64 %me) {{
entry:
  %parked = getelementptr i8, ptr %team, i64 {t.PARKED}
  %asleep = load atomic i64, ptr %parked seq_cst, align 8
  %chosen = and i64 %asleep, %members
  %any = icmp ne i64 %chosen, 0
  br i1 %any, label %take, label %done
take:
  %keep = xor i64 %chosen, -1
  %before = atomicrmw and ptr %parked, i64 %keep seq_cst
  %mine = and i64 %before, %chosen
  %my.seat = call ptr @seat(ptr %team, i64 %me)
  call void @note_cpu(ptr %team, ptr %my.seat)
{held("syscall", t.SYSCALL, "ptr")}
  %futex.p = getelementptr i8, ptr %team, i64 {t.FUTEX}
  %number = load i64, ptr %futex.p
  %polled = icmp eq ptr %syscall, null
  br label %next
next:
  %left = phi i64 [%mine, %take], [%rest, %opened]
  %more = icmp ne i64 %left, 0
  br i1 %more, label %open, label %done
open:
  %i = call i64 @llvm.cttz.i64(i64 %left, i1 true)
  %less = sub i64 %left, 1
  %rest = and i64 %left, %less
  %gate = call ptr @seat(ptr %team, i64 %i)
  call void @steer(ptr %team, i64 %i)
  store atomic i32 0, ptr %gate release, align 4
  br i1 %polled, label %opened, label %futex
futex:
  %r = call i64 (i64, ...) %syscall(i64 %number, ptr %gate, i64 129, i64 1, ptr null, ptr null, i64 0)
  br label %opened
opened:
  br label %next
done:
  ret void
}}
"""
    return text + steering_text()
