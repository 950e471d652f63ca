"""The native functions that CPython calls: methods of the kind METH_FASTCALL, whose `self` is a context's address.

Rules:
* ENTRY: `vivace_enter` runs the program; its arguments are the places `io` of inputs and outputs, none for those in the
  context's own table. The GIL is released during the run.
* MATCH: `vivace_match` compares its arguments with the first entries of the table of its frame
  (`vivace.targets.cpu.matching`), as many as there are, and returns a `Likeness`. It keeps the GIL.
* FRAME: of `vivace_evaluate` and `vivace_fill`, `self` is the address of a frame (`vivace.targets.cpu.formulas`), and
  there are no arguments. Both keep the GIL; the first returns a status, the second 0.
"""

from __future__ import annotations

from vivace.targets.cpu.program_layout import Header

PYTHON_CALLS = ("PyLong_AsVoidPtr", "PyEval_SaveThread", "PyEval_RestoreThread", "PyLong_FromLong")
"""What they call; `vivace_bind` is told the addresses once."""

_ANSWER = """  %from.long.p = getelementptr ptr, ptr @python, i64 3
  %from.long = load ptr, ptr %from.long.p
  %result = call ptr %from.long(i64 %status)
  ret ptr %result
}
"""


def _of_frame(name: str, status: str) -> str:
    """A method whose `self` is the address of a frame; it keeps the GIL, and returns a `status`."""
    return f"""
define ptr @{name}(ptr %self, ptr %places, i64 %n) {{
  %as.pointer = load ptr, ptr @python
  %frame = call ptr %as.pointer(ptr %self)
  %status = {status}
{_ANSWER}"""


METHODS = (
    f"""
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
{_ANSWER}
"""
    + _of_frame("vivace_match", "call i64 @match(ptr %frame, ptr %places, i64 %n)")
    + _of_frame("vivace_evaluate", "call i64 @evaluate(ptr %frame)")
    + _of_frame("vivace_fill", "call i64 @fill(ptr %frame)")
)
