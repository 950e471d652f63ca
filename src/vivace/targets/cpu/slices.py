"""A batch as a program of one step, whose units are slices: each is a run of another program, on one thread.

    args: n, then n addresses of inputs and outputs, then n strides: how far apart the slices lie in each

Rules:
* OWN CONTEXT: the scratch of a thread holds, behind its notes, the address of the context that it computes slices in.
* NO CALLS: that program calls no Python, so any thread may run it to its end, and alone: its steps meet nobody.
"""

from __future__ import annotations

from vivace.targets.cpu.code import NOTES_BYTES
from vivace.targets.cpu.program_layout import Header


def slices_text(delay: str = "") -> str:
    """The LLVM function `vivace_slices`, a kernel; it calls `patch` and `lead` of `program_text`. `delay` is a line of
    text that stands where one thread may overtake another."""
    return f"""
define void @vivace_slices(ptr %args, i64 %begin, i64 %end, ptr %scratch) {{
entry:
  %ctx.p = getelementptr i8, ptr %scratch, i64 {NOTES_BYTES}
  %ctx = load ptr, ptr %ctx.p
  %io.p = getelementptr i64, ptr %ctx, i64 {Header.IO:d}
  %io = load ptr, ptr %io.p
  %field.p = getelementptr i64, ptr %ctx, i64 {Header.FIELD:d}
  %field = load i64, ptr %field.p
  %program.p = getelementptr i64, ptr %ctx, i64 {Header.PROGRAM:d}
  %program = load ptr, ptr %program.p
  %n = load i64, ptr %args
  %bases = getelementptr i64, ptr %args, i64 1
  %strides = getelementptr i64, ptr %bases, i64 %n
  br label %slice.test
slice.test:
  %s = phi i64 [%begin, %entry], [%s.next, %run]
  %more = icmp ult i64 %s, %end
  br i1 %more, label %place.test, label %done
place.test:
  %i = phi i64 [0, %slice.test], [%i.next, %place]
  %placed = icmp eq i64 %i, %n
  br i1 %placed, label %run, label %place
place:
  %base.p = getelementptr i64, ptr %bases, i64 %i
  %base = load i64, ptr %base.p
  %stride.p = getelementptr i64, ptr %strides, i64 %i
  %stride = load i64, ptr %stride.p
  %far = mul i64 %stride, %s
  %address = add i64 %base, %far
  %place.p = getelementptr i64, ptr %io, i64 %i
  %place.at = load ptr, ptr %place.p
  %word.p = getelementptr i8, ptr %place.at, i64 %field
  store i64 %address, ptr %word.p
  %i.next = add i64 %i, 1
  br label %place.test
run:
{delay}
  call void @patch(ptr %ctx, ptr %io)
  %ended = call i1 @lead(ptr null, ptr %ctx, ptr %program, i64 0, i64 1)
  %s.next = add i64 %s, 1
  br label %slice.test
done:
  ret void
}}
"""
