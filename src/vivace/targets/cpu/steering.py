"""The native text that keeps the threads of a team on CPUs of their own.

Rule STEER: a worker that sleeps is woken on a CPU where nobody of the team is awake, by narrowing its affinity until
it has woken. Left alone, the kernels of virtual machines may wake it on the CPU of the thread that woke it, which then
stands still (measured: 103 of 110 wake-ups after 2 ms of sleep, while the other CPU was idle), and where another
process keeps a core busy, both threads may share the other one (measured: half of the time). The caller's affinity is
never touched. Whoever steers claims the seat first: of two at once, the second would save the affinity that the first
had narrowed.
"""

from __future__ import annotations

from vivace.targets.cpu.team import Seat, Team, held


def steering_text() -> str:
    """LLVM functions `steer`, for who wakes a worker, and `note_thread` and `note_cpu`, which it builds on."""
    t, s = Team, Seat
    return f"""
; Writes down which system thread sits in a seat.
define internal void @note_thread(ptr %team, ptr %seat) {{
{held("syscall", t.SYSCALL, "ptr")}
  %none = icmp eq ptr %syscall, null
  br i1 %none, label %done, label %ask
ask:
{held("number", t.GET_TID)}
  %tid = call i64 (i64, ...) %syscall(i64 %number)
  %tid.p = getelementptr i8, ptr %seat, i64 {s.TID}
  store atomic i64 %tid, ptr %tid.p monotonic, align 8
  br label %done
done:
  ret void
}}

; Writes down the CPU that the calling thread is on.
define internal void @note_cpu(ptr %team, ptr %seat) {{
{held("getcpu", t.GETCPU, "ptr")}
  %none = icmp eq ptr %getcpu, null
  br i1 %none, label %done, label %ask
ask:
  %cpu = call i32 %getcpu()
  %cpu.wide = sext i32 %cpu to i64
  %cpu.p = getelementptr i8, ptr %seat, i64 {s.CPU}
  store atomic i64 %cpu.wide, ptr %cpu.p monotonic, align 8
  br label %done
done:
  ret void
}}

; Forbids the sleeping thread %id the CPUs on which others of the team are awake; it restores its affinity when it
; wakes (rule STEER).
define internal void @steer(ptr %team, i64 %id) noinline "no-builtins" {{
entry:
  %mask = alloca [16 x i64], align 8
  %seat = call ptr @seat(ptr %team, i64 %id)
{held("getcpu", t.GETCPU, "ptr")}
  %none = icmp eq ptr %getcpu, null
  br i1 %none, label %done, label %supported
supported:
  %is.caller = icmp eq i64 %id, 0
  br i1 %is.caller, label %done, label %begin
begin:
  %steered.p = getelementptr i8, ptr %seat, i64 {s.STEERED}
  %claimed = cmpxchg ptr %steered.p, i64 0, i64 -1 acquire monotonic, align 8
  %mine = extractvalue {{ i64, i1 }} %claimed, 1
  br i1 %mine, label %ask, label %done
ask:
{held("syscall", t.SYSCALL, "ptr")}
{held("get", t.GET_AFFINITY)}
{held("set", t.SET_AFFINITY)}
  %tid.p = getelementptr i8, ptr %seat, i64 {s.TID}
  %tid = load atomic i64, ptr %tid.p monotonic, align 8
  %saved = getelementptr i8, ptr %seat, i64 {s.SAVED}
  %n_bytes = call i64 (i64, ...) %syscall(i64 %get, i64 %tid, i64 128, ptr %saved)
  %known = icmp sgt i64 %n_bytes, 0
  br i1 %known, label %copy, label %leave
copy:
  %k = phi i64 [0, %ask], [%k.next, %copy]
  %from.p = getelementptr i8, ptr %saved, i64 %k
  %to.p = getelementptr i8, ptr %mask, i64 %k
  %word = load i64, ptr %from.p
  store i64 %word, ptr %to.p
  %k.next = add i64 %k, 8
  %copying = icmp ult i64 %k.next, %n_bytes
  br i1 %copying, label %copy, label %others
others:
  %n_bits = shl i64 %n_bytes, 3
  %workers.p = getelementptr i8, ptr %team, i64 {t.N_WORKERS}
  %workers = load atomic i64, ptr %workers.p monotonic, align 8
  br label %other
other:
  %j = phi i64 [0, %others], [%j.next, %other.next]
  %seat.j = call ptr @seat(ptr %team, i64 %j)
  %cpu.p = getelementptr i8, ptr %seat.j, i64 {s.CPU}
  %cpu = load atomic i64, ptr %cpu.p monotonic, align 8
  %is.self = icmp eq i64 %j, %id
  %is.out = icmp uge i64 %cpu, %n_bits
  %skip = or i1 %is.self, %is.out
  br i1 %skip, label %other.next, label %strike
strike:
  %byte = lshr i64 %cpu, 3
  %bit.at = and i64 %cpu, 7
  %bit.at.8 = trunc i64 %bit.at to i8
  %bit = shl i8 1, %bit.at.8
  %rest = xor i8 %bit, -1
  %byte.p = getelementptr i8, ptr %mask, i64 %byte
  %old = load i8, ptr %byte.p
  %new = and i8 %old, %rest
  store i8 %new, ptr %byte.p
  br label %other.next
other.next:
  %j.next = add i64 %j, 1
  %more = icmp ule i64 %j.next, %workers
  br i1 %more, label %other, label %compare
compare:
  %c = phi i64 [0, %other.next], [%c.next, %compare]
  %any = phi i64 [0, %other.next], [%any.next, %compare]
  %struck = phi i64 [0, %other.next], [%struck.next, %compare]
  %was.p = getelementptr i8, ptr %saved, i64 %c
  %is.p = getelementptr i8, ptr %mask, i64 %c
  %was = load i64, ptr %was.p
  %is = load i64, ptr %is.p
  %differs = xor i64 %was, %is
  %any.next = or i64 %any, %is
  %struck.next = or i64 %struck, %differs
  %c.next = add i64 %c, 8
  %comparing = icmp ult i64 %c.next, %n_bytes
  br i1 %comparing, label %compare, label %decide
decide:
  %left = icmp ne i64 %any.next, 0
  %changed = icmp ne i64 %struck.next, 0
  %useful = and i1 %left, %changed
  br i1 %useful, label %apply, label %leave
apply:
  %failed = call i64 (i64, ...) %syscall(i64 %set, i64 %tid, i64 %n_bytes, ptr %mask)
  %fine = icmp eq i64 %failed, 0
  br i1 %fine, label %remember, label %leave
remember:
  store atomic i64 %n_bytes, ptr %steered.p release, align 8
  br label %done
leave:
  store atomic i64 0, ptr %steered.p release, align 8
  br label %done
done:
  ret void
}}
"""
