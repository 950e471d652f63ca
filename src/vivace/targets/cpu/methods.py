"""The native functions that CPython calls: methods of the kind METH_FASTCALL, whose `self` is a context's address.

Rules:
* ENTRY: `vivace_enter` runs the program; its arguments are the places `io` of inputs and outputs, none for those in the
  context's own table. The GIL is released during the run.
* LIKE: `vivace_is_like` tells whether its arguments begin with arrays as the context's table of likeness describes them
  (`vivace.runtime.likeness`). It keeps the GIL, and there are as many arguments as the table has arrays.
* FRAME: of `vivace_evaluate` and `vivace_fill`, `self` is the address of a frame (`vivace.targets.cpu.formulas`), and
  there are no arguments. Both keep the GIL; the first returns a status, the second 0.
"""

from __future__ import annotations

from enum import IntEnum

from vivace.targets.cpu.program_layout import Header


class ArrayField(IntEnum):
    """Bytes from the word that holds the address of an array's data to other fields of the array object."""

    TYPE = -8
    RANK = 8  # 4 bytes
    SHAPE = 16  # the address of the sizes
    DTYPE = 40
    FLAGS = 48  # 4 bytes; bit 0: C-contiguous


PYTHON_CALLS = ("PyLong_AsVoidPtr", "PyEval_SaveThread", "PyEval_RestoreThread", "PyLong_FromLong")
"""What they call; `vivace_bind` is told the addresses once."""

METHODS = f"""
@python = internal global [{len(PYTHON_CALLS)} x ptr] zeroinitializer

define void @vivace_bind(ptr %calls) {{
  %all = load [{len(PYTHON_CALLS)} x ptr], ptr %calls
  store [{len(PYTHON_CALLS)} x ptr] %all, ptr @python
  ret void
}}

define ptr @vivace_enter(ptr %self, ptr %places, i64 %n) {{
  %as.pointer = load ptr, ptr @python
  %ctx = call ptr %as.pointer(ptr %self)
  %own.p = getelementptr i64, ptr %ctx, i64 {Header.IO:d}
  %own = load ptr, ptr %own.p
  %is.own = icmp eq i64 %n, 0
  %io = select i1 %is.own, ptr %own, ptr %places
  %save.p = getelementptr ptr, ptr @python, i64 1
  %save = load ptr, ptr %save.p
  %state = call ptr %save()
  %status = call i64 @run(ptr %ctx, ptr %io)
  %restore.p = getelementptr ptr, ptr @python, i64 2
  %restore = load ptr, ptr %restore.p
  call void %restore(ptr %state)
  %from.long.p = getelementptr ptr, ptr @python, i64 3
  %from.long = load ptr, ptr %from.long.p
  %result = call ptr %from.long(i64 %status)
  ret ptr %result
}}

define ptr @vivace_is_like(ptr %self, ptr %places, i64 %n) {{
entry:
  %as.pointer = load ptr, ptr @python
  %ctx = call ptr %as.pointer(ptr %self)
  %field.p = getelementptr i64, ptr %ctx, i64 {Header.FIELD:d}
  %field = load i64, ptr %field.p
  %table.p = getelementptr i64, ptr %ctx, i64 {Header.LIKENESS:d}
  %table = load ptr, ptr %table.p
  br label %array
array:
  %like = phi ptr [%table, %entry], [%like.next, %array.next]
  %place.p = phi ptr [%places, %entry], [%place.next, %array.next]
  %type = load i64, ptr %like
  %all.alike = icmp eq i64 %type, 0
  br i1 %all.alike, label %answer, label %look
look:
  %place = load ptr, ptr %place.p
  %data.p = getelementptr i8, ptr %place, i64 %field
  %its.type.p = getelementptr i8, ptr %data.p, i64 {ArrayField.TYPE:d}
  %its.type = load i64, ptr %its.type.p
  %is.array = icmp eq i64 %its.type, %type
  br i1 %is.array, label %inside, label %answer
inside:
  %dtype.p = getelementptr i64, ptr %like, i64 1
  %dtype = load i64, ptr %dtype.p
  %its.dtype.p = getelementptr i8, ptr %data.p, i64 {ArrayField.DTYPE:d}
  %its.dtype = load i64, ptr %its.dtype.p
  %same.dtype = icmp eq i64 %its.dtype, %dtype
  %flags.p = getelementptr i8, ptr %data.p, i64 {ArrayField.FLAGS:d}
  %flags = load i32, ptr %flags.p
  %is.dense = trunc i32 %flags to i1
  %rank.p = getelementptr i64, ptr %like, i64 2
  %rank = load i64, ptr %rank.p
  %its.rank.p = getelementptr i8, ptr %data.p, i64 {ArrayField.RANK:d}
  %its.rank.4 = load i32, ptr %its.rank.p
  %its.rank = sext i32 %its.rank.4 to i64
  %same.rank = icmp eq i64 %its.rank, %rank
  %shape.p = getelementptr i8, ptr %data.p, i64 {ArrayField.SHAPE:d}
  %shape = load ptr, ptr %shape.p
  %sizes = getelementptr i64, ptr %like, i64 3
  %same.kind = and i1 %same.dtype, %is.dense
  %comparable = and i1 %same.kind, %same.rank
  br i1 %comparable, label %axis, label %answer
axis:
  %i = phi i64 [0, %inside], [%i.next, %size]
  %no.more = icmp eq i64 %i, %rank
  br i1 %no.more, label %array.next, label %size
size:
  %size.p = getelementptr i64, ptr %sizes, i64 %i
  %wanted = load i64, ptr %size.p
  %its.size.p = getelementptr i64, ptr %shape, i64 %i
  %its.size = load i64, ptr %its.size.p
  %i.next = add i64 %i, 1
  %same.size = icmp eq i64 %its.size, %wanted
  br i1 %same.size, label %axis, label %answer
array.next:
  %like.next = getelementptr i64, ptr %sizes, i64 %rank
  %place.next = getelementptr ptr, ptr %place.p, i64 1
  br label %array
answer:
  %is.like = phi i64 [1, %array], [0, %look], [0, %inside], [0, %size]
  %from.long.p = getelementptr ptr, ptr @python, i64 3
  %from.long = load ptr, ptr %from.long.p
  %result = call ptr %from.long(i64 %is.like)
  ret ptr %result
}}

define ptr @vivace_evaluate(ptr %self, ptr %none, i64 %n) {{
  %as.pointer = load ptr, ptr @python
  %frame = call ptr %as.pointer(ptr %self)
  %status = call i64 @evaluate(ptr %frame)
  %from.long.p = getelementptr ptr, ptr @python, i64 3
  %from.long = load ptr, ptr %from.long.p
  %result = call ptr %from.long(i64 %status)
  ret ptr %result
}}

define ptr @vivace_fill(ptr %self, ptr %none, i64 %n) {{
  %as.pointer = load ptr, ptr @python
  %frame = call ptr %as.pointer(ptr %self)
  call void @fill(ptr %frame)
  %from.long.p = getelementptr ptr, ptr @python, i64 3
  %from.long = load ptr, ptr %from.long.p
  %result = call ptr %from.long(i64 0)
  ret ptr %result
}}
"""
