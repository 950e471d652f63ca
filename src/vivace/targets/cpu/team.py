"""The memory that the threads of a process share, and the native text of waiting and waking.

There is one team per process: memory that is never freed (`Team`), with a seat for each thread (`Seat`). Seat 0
belongs to the thread that called `run`, the others to worker threads.

Rules:
* PARK: a thread that finds nothing to claim spins for `SPIN_NS`, then sleeps in a futex on its own gate. Spinning
  longer than a hand-over takes buys nothing, and it holds a core that the kernel could give to a descheduled member
  of the team.
* STEER: a worker that slept for want of work is woken on a CPU where nobody of the team is awake, by narrowing its
  affinity until it has woken. Left alone, the kernels of virtual machines may wake it on the CPU of the thread that
  woke it, which then stands still (measured: 103 of 110 wake-ups after 2 ms of sleep, while the other CPU was idle).
  A thread that slept because another one lost its core is left to the kernel: steered, it would land on the core that
  is taken.
  The caller's affinity is never touched.

Not handled: more than 64 threads (one bit each in the parked mask). Without a futex (not Linux) parked threads poll
once in 100 us, and nothing is steered.
"""

from __future__ import annotations

from enum import IntEnum

MAX_THREADS = 64

# A hand-over between running threads takes 0.1 us, waking a sleeping one costs the leader 15 us and comes 35 us
# later, so spinning bridges short serial steps and the Python between two runs. With one of two cores kept busy by
# another process, a program of 60 steps took 1.00, 1.01, 1.02 and 1.07 times its undisturbed single-thread time when
# spinning 2, 15, 50 and 200 us.
SPIN_NS = 30_000


class Team(IntEnum):
    """Byte offsets in the team's memory. Words that different threads write at the same time are on different cache
    lines.
    """

    CLAIM = 0
    # The published step; written by the leader while nothing can be claimed.
    MEMBERS = 64  # bit i: thread i may claim
    TOTAL = 72
    PARTS = 80
    N_PARTS = 88
    CONTEXT = 96
    DIVISOR = 104
    AT = 112  # where the program goes on
    N_THREADS = 120
    PENDING = 128  # grains not yet done
    PARKED = 192  # bit i: thread i sleeps, or is about to
    OWNER = 256
    SOLO = 320  # runs that found the team busy and go on alone
    # Set once, read often.
    N_WORKERS = 384
    SPIN_CYCLES = 392
    SYSCALL = 400  # libc's syscall, or 0 where there is no futex
    FUTEX = 408  # its number
    USLEEP = 416
    GETCPU = 424  # libc's sched_getcpu
    GET_AFFINITY = 432  # syscall numbers
    SET_AFFINITY = 440
    GET_TID = 448
    SEATS = 512  # one per thread
    SIZE = 512 + 256 * MAX_THREADS


class Seat(IntEnum):
    """Byte offsets in the memory of one thread of the team."""

    GATE = 0  # 1 while it sleeps
    TID = 8
    CPU = 16  # where it was last seen, -1 while it sleeps
    IDLE = 32  # 1 when it went to sleep because there was no work at all
    STEERED = 24  # length of the affinity mask that it must restore, or 0
    SAVED = 64  # that mask
    SIZE = 256


def waiting_text(cycle_counter: str) -> str:
    """LLVM functions `wait`, for a thread without work, and `wake`, for the leader."""
    t, s = Team, Seat
    return f"""
; Whether thread %id may claim something now. Reads may be stale: the claim itself decides (rule WORD).
define internal i1 @has_work(ptr %team, i64 %id) alwaysinline {{
  %claim = getelementptr i8, ptr %team, i64 {t.CLAIM}
  %word = load atomic i64, ptr %claim acquire, align 8
  %remaining = and i64 %word, 4294967295
  %some = icmp ne i64 %remaining, 0
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
  %pending.p = getelementptr i8, ptr %team, i64 {t.PENDING}
  %pending = load atomic i64, ptr %pending.p monotonic, align 8
  %workless = icmp eq i64 %pending, 0
  %workless.wide = zext i1 %workless to i64
  %idle.p = getelementptr i8, ptr %gate, i64 {s.IDLE}
  store atomic i64 %workless.wide, ptr %idle.p monotonic, align 8
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
  %free = icmp eq i64 %steered, 0
  br i1 %free, label %note, label %restore
restore:
  %syscall.p = getelementptr i8, ptr %team, i64 {t.SYSCALL}
  %syscall = load ptr, ptr %syscall.p
  %set.p = getelementptr i8, ptr %team, i64 {t.SET_AFFINITY}
  %set = load i64, ptr %set.p
  %saved = getelementptr i8, ptr %gate, i64 {s.SAVED}
  %restored = call i64 (i64, ...) %syscall(i64 %set, i64 0, i64 %steered, ptr %saved)
  store atomic i64 0, ptr %steered.p release, align 8
  br label %note
note:
  call void @note_cpu(ptr %team, ptr %gate)
  br label %start
leave:
  call void @note_cpu(ptr %team, ptr %gate)
  %seen3 = atomicrmw and ptr %parked, i64 %others seq_cst
  store atomic i32 0, ptr %gate monotonic, align 4
  br label %done
done:
  ret void
}}

; Sleeps while the gate holds 1; may return early.
define internal void @sleep(ptr %team, ptr %gate) {{
  %syscall.p = getelementptr i8, ptr %team, i64 {t.SYSCALL}
  %syscall = load ptr, ptr %syscall.p
  %none = icmp eq ptr %syscall, null
  br i1 %none, label %poll, label %futex
futex:
  %futex.p = getelementptr i8, ptr %team, i64 {t.FUTEX}
  %number = load i64, ptr %futex.p
  %r = call i64 (i64, ...) %syscall(i64 %number, ptr %gate, i64 128, i64 1, ptr null, ptr null, i64 0)
  ret void
poll:
  %usleep.p = getelementptr i8, ptr %team, i64 {t.USLEEP}
  %usleep = load ptr, ptr %usleep.p
  %r2 = call i32 %usleep(i32 100)
  ret void
}}

define internal ptr @seat(ptr %team, i64 %id) alwaysinline {{
  %at = mul i64 %id, {s.SIZE}
  %seats = getelementptr i8, ptr %team, i64 {t.SEATS}
  %seat = getelementptr i8, ptr %seats, i64 %at
  ret ptr %seat
}}

; Writes down which system thread sits in a seat.
define internal void @note_thread(ptr %team, ptr %seat) {{
  %syscall.p = getelementptr i8, ptr %team, i64 {t.SYSCALL}
  %syscall = load ptr, ptr %syscall.p
  %none = icmp eq ptr %syscall, null
  br i1 %none, label %done, label %ask
ask:
  %number.p = getelementptr i8, ptr %team, i64 {t.GET_TID}
  %number = load i64, ptr %number.p
  %tid = call i64 (i64, ...) %syscall(i64 %number)
  %tid.p = getelementptr i8, ptr %seat, i64 {s.TID}
  store atomic i64 %tid, ptr %tid.p monotonic, align 8
  br label %done
done:
  ret void
}}

; Writes down the CPU that the calling thread is on.
define internal void @note_cpu(ptr %team, ptr %seat) {{
  %getcpu.p = getelementptr i8, ptr %team, i64 {t.GETCPU}
  %getcpu = load ptr, ptr %getcpu.p
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
  %getcpu.p = getelementptr i8, ptr %team, i64 {t.GETCPU}
  %getcpu = load ptr, ptr %getcpu.p
  %none = icmp eq ptr %getcpu, null
  br i1 %none, label %done, label %supported
supported:
  %steered.p = getelementptr i8, ptr %seat, i64 {s.STEERED}
  %steered = load atomic i64, ptr %steered.p acquire, align 8
  %pending = icmp ne i64 %steered, 0
  %idle.p = getelementptr i8, ptr %seat, i64 {s.IDLE}
  %idle = load atomic i64, ptr %idle.p monotonic, align 8
  %waited = icmp eq i64 %idle, 0
  %is.caller = icmp eq i64 %id, 0
  %no.1 = or i1 %pending, %waited
  %no.2 = or i1 %no.1, %is.caller
  br i1 %no.2, label %done, label %ask
ask:
  %syscall.p = getelementptr i8, ptr %team, i64 {t.SYSCALL}
  %syscall = load ptr, ptr %syscall.p
  %get.p = getelementptr i8, ptr %team, i64 {t.GET_AFFINITY}
  %get = load i64, ptr %get.p
  %set.p = getelementptr i8, ptr %team, i64 {t.SET_AFFINITY}
  %set = load i64, ptr %set.p
  %tid.p = getelementptr i8, ptr %seat, i64 {s.TID}
  %tid = load atomic i64, ptr %tid.p monotonic, align 8
  %saved = getelementptr i8, ptr %seat, i64 {s.SAVED}
  %n_bytes = call i64 (i64, ...) %syscall(i64 %get, i64 %tid, i64 128, ptr %saved)
  %known = icmp sgt i64 %n_bytes, 0
  br i1 %known, label %copy, label %done
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
  br i1 %useful, label %apply, label %done
apply:
  %failed = call i64 (i64, ...) %syscall(i64 %set, i64 %tid, i64 %n_bytes, ptr %mask)
  %fine = icmp eq i64 %failed, 0
  br i1 %fine, label %remember, label %done
remember:
  store atomic i64 %n_bytes, ptr %steered.p release, align 8
  br label %done
done:
  ret void
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
  %syscall.p = getelementptr i8, ptr %team, i64 {t.SYSCALL}
  %syscall = load ptr, ptr %syscall.p
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
