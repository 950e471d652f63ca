"""Tiny kernels in LLVM text, and what the tests of programs share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from vivace.base.machine import isa
from vivace.targets.cpu import jit

_TEXT = """
; args: p; adds 1 to p[unit]
define void @add_one(ptr %args, i64 %begin, i64 %end, ptr %scratch) {
entry:
  %p = load ptr, ptr %args
  br label %test
test:
  %i = phi i64 [%begin, %entry], [%next, %body]
  %more = icmp slt i64 %i, %end
  br i1 %more, label %body, label %done
body:
  %q = getelementptr i64, ptr %p, i64 %i
  %v = load i64, ptr %q
  %w = add i64 %v, 1
  store i64 %w, ptr %q
  %next = add i64 %i, 1
  br label %test
done:
  ret void
}

; args: p; p[begin] = the first note, which then is one more; waits a while
define void @note(ptr %args, i64 %begin, i64 %end, ptr %scratch) {
entry:
  %p = load ptr, ptr %args
  %q = getelementptr i64, ptr %p, i64 %begin
  %v = load i64, ptr %scratch
  store i64 %v, ptr %q
  %w = add i64 %v, 1
  store i64 %w, ptr %scratch
  %more.p = getelementptr i64, ptr %scratch, i64 8
  br label %delay
delay:
  %k = phi i64 [0, %entry], [%k.next, %delay]
  store volatile i64 %k, ptr %more.p
  %k.next = add i64 %k, 1
  %waiting = icmp ult i64 %k, 2000
  br i1 %waiting, label %delay, label %done
done:
  ret void
}

; args: from, to, n, salt; waits for a pseudo-random while, then to[unit] = from[n - 1 - unit] + 1
define void @mirror(ptr %args, i64 %begin, i64 %end, ptr %scratch) {
entry:
  %from = load ptr, ptr %args
  %to.p = getelementptr i64, ptr %args, i64 1
  %to = load ptr, ptr %to.p
  %n.p = getelementptr i64, ptr %args, i64 2
  %n = load i64, ptr %n.p
  %salt.p = getelementptr i64, ptr %args, i64 3
  %salt = load i64, ptr %salt.p
  br label %test
test:
  %i = phi i64 [%begin, %entry], [%next, %store]
  %more = icmp slt i64 %i, %end
  br i1 %more, label %body, label %done
body:
  %seed = add i64 %i, %salt
  %mixed = mul i64 %seed, -7046029254386353131
  %rounds = lshr i64 %mixed, 53
  br label %delay
delay:
  %k = phi i64 [0, %body], [%k.next, %delay]
  store volatile i64 %k, ptr %scratch
  %k.next = add i64 %k, 1
  %waiting = icmp ult i64 %k, %rounds
  br i1 %waiting, label %delay, label %store
store:
  %r0 = sub i64 %n, 1
  %r = sub i64 %r0, %i
  %q = getelementptr i64, ptr %from, i64 %r
  %v = load i64, ptr %q
  %w = add i64 %v, 1
  %t = getelementptr i64, ptr %to, i64 %i
  store i64 %w, ptr %t
  %next = add i64 %i, 1
  br label %test
done:
  ret void
}

; args: a, b, c of f32; c[unit] = a[unit] * b[unit]
define void @multiply(ptr %args, i64 %begin, i64 %end, ptr %scratch) {
entry:
  %a = load ptr, ptr %args
  %b.p = getelementptr i64, ptr %args, i64 1
  %b = load ptr, ptr %b.p
  %c.p = getelementptr i64, ptr %args, i64 2
  %c = load ptr, ptr %c.p
  br label %test
test:
  %i = phi i64 [%begin, %entry], [%next, %body]
  %more = icmp slt i64 %i, %end
  br i1 %more, label %body, label %done
body:
  %pa = getelementptr float, ptr %a, i64 %i
  %pb = getelementptr float, ptr %b, i64 %i
  %pc = getelementptr float, ptr %c, i64 %i
  %x = load float, ptr %pa
  %y = load float, ptr %pb
  %z = fmul float %x, %y
  store float %z, ptr %pc
  %next = add i64 %i, 1
  br label %test
done:
  ret void
}

declare void @llvm.x86.sse.ldmxcsr(ptr)
declare void @llvm.x86.sse.stmxcsr(ptr)
define void @set_mxcsr(ptr %p) {
  call void @llvm.x86.sse.ldmxcsr(ptr %p)
  ret void
}
define void @get_mxcsr(ptr %p) {
  call void @llvm.x86.sse.stmxcsr(ptr %p)
  ret void
}
"""


@pytest.fixture(scope="session")
def kernels() -> jit.Library:
    return jit.load([jit.compile_text(_TEXT, isa("sse"))])


@pytest.fixture
def address(kernels: jit.Library) -> Iterator[object]:
    """The address of a kernel by name; of an array's memory for arrays."""

    def find(of: str | np.ndarray) -> int:
        return kernels.address(of) if isinstance(of, str) else of.ctypes.data

    yield find
