"""The calling convention of generated kernels, and the record that a code generator returns.

Every kernel is one function `void name(ptr args, i64 begin, i64 end, ptr scratch)`:
* `args` points to 64-bit words: the address of element 0 of each parameter buffer in the order of `params`, then the
  value of each run-time dim in the order of `dims`;
* `[begin, end)` is the range of parallel units to compute; ranges of one step are independent and may run on any
  thread;
* `scratch` is this thread's private memory, 64-byte aligned, at least `scratch_bytes` long. Its first `NOTES_BYTES`,
  the notes, are zero when a thread first runs the kernel in a step; all of it stays as the kernel left it until the
  thread runs another one, gives its core away, or the step ends. So what a range of units prepared, the next need not:
  two threads claim a step in a dozen ranges, and ResNet-50 in f32 took 1.04 of the time where each staged its rows.
A kernel calls nothing outside its module and allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vivace.base.dims import Dim

if TYPE_CHECKING:  # the loop IR is not needed to load code
    from vivace.loops.kernel import Buffer


# The notes of a kernel at the head of its scratch memory, a whole line. Who uses scratch has room for them.
NOTES_BYTES = 64

# `none`: the text is final, only instruction selection and register allocation follow. `light`: peepholes and dead
# code.
# `full`: LLVM's -O2 without its vectorizers and unroller, which know less about the loops than the generators do.
Optimize = Literal["none", "light", "full"]


@dataclass(frozen=True, slots=True)
class KernelCode:
    """A kernel as LLVM text for one instruction set, not yet compiled.

    `units` is the extent of its parallel space (a dim, evaluated for each new set of shapes); `grain` the least number
    of units worth handing to a thread at once; `scratch_bytes` what it needs per thread. `name` is the symbol in
    `llvm_text`, which is compiled with the passes of `optimize`.
    """

    name: str
    llvm_text: str
    params: tuple[Buffer, ...]
    dims: tuple[str, ...]
    units: Dim = 1
    grain: Dim = 1
    scratch_bytes: Dim = 0
    optimize: Optimize = "full"
