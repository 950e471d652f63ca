"""The order of grains and the pace of threads made worse on purpose, so that steps which race are found.

A program promises nothing about the order of the grains of a step. Here they run one by one in another order each
time, and a thread stands still before some of them, and wherever threads hand work to each other. A grain that reads
what another one writes, a step that starts before the one that it reads has ended, scratch memory used by two: each
gives other results than one thread in order, soon, and on few cores too.

Rules:
* PERMUTED: grain `g` stands for grain `(g * prime + offset) mod total`; prime and offset follow from the number of the
  step. The primes exceed every total, so this is a permutation, and all threads agree on it.
* OFF: none of this is in the program that engines run; it is a program of its own (`knobs.shuffle`).
"""

from __future__ import annotations

from vivace.targets.cpu.threads import grains_text

# The first above 2**31; a total has 16 bits.
PRIMES = (2147483659, 2147483693, 2147483713, 2147483743, 2147483777, 2147483783, 2147483813, 2147483857)

DELAY = "  call void @delay()"


def shuffled_grains_text() -> str:
    """`grains` in a changing order (PERMUTED), and `delay`. A salt of 0 is replaced by the clock: the caller runs the
    step alone.
    """
    return (
        grains_text("grains_in_order")
        + f"""
@primes = private constant [{len(PRIMES)} x i64] [{", ".join(f"i64 {p}" for p in PRIMES)}]

; Of 32 calls 21 return at once, 10 stand for up to 2 us, one for up to 50 us (on a CPU that pauses for 40 ns).
define internal void @delay() noinline {{
entry:
  %now = call i64 @llvm.readcyclecounter()
  %mixed = mul i64 %now, -7046029254386353131
  %draw = lshr i64 %mixed, 59
  %some = icmp ult i64 %draw, 11
  br i1 %some, label %choose, label %done
choose:
  %is.long = icmp eq i64 %draw, 0
  %most = select i1 %is.long, i64 1023, i64 63
  %bits = lshr i64 %mixed, 40
  %rounds = and i64 %bits, %most
  br label %round
round:
  %i = phi i64 [0, %choose], [%i.next, %round]
  call void @llvm.x86.sse2.pause()
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i, %rounds
  br i1 %more, label %round, label %done
done:
  ret void
}}

define internal ptr @grains(ptr %ctx, ptr %parts, i64 %total, i64 %first, i64 %last, i64 %id, i64 %salt, ptr %on) {{
entry:
  %clock = call i64 @llvm.readcyclecounter()
  %is.alone = icmp eq i64 %salt, 0
  %seed = select i1 %is.alone, i64 %clock, i64 %salt
  %mixed = mul i64 %seed, -7046029254386353131
  %which = lshr i64 %mixed, 61
  %prime.p = getelementptr [{len(PRIMES)} x i64], ptr @primes, i64 0, i64 %which
  %prime = load i64, ptr %prime.p
  %shifted = lshr i64 %mixed, 30
  %offset = and i64 %shifted, 1073741823
  br label %test
test:
  %g = phi i64 [%first, %entry], [%g.next, %run]
  %ran = phi ptr [%on, %entry], [%ran.next, %run]
  %more = icmp ult i64 %g, %last
  br i1 %more, label %run, label %done
run:
{DELAY}
  %far = mul i64 %g, %prime
  %moved = add i64 %far, %offset
  %from = urem i64 %moved, %total
  %to = add i64 %from, 1
  %ran.next = call ptr @grains_in_order(ptr %ctx, ptr %parts, i64 %total, i64 %from, i64 %to, i64 %id, i64 %salt,
                                        ptr %ran)
  %g.next = add i64 %g, 1
  br label %test
done:
  ret ptr %ran
}}
"""
    )
