"""The calling convention of generated kernels, and the record that a code generator returns.

Every kernel is one function `void name(ptr args, i64 begin, i64 end, ptr scratch)`:
* `args` points to 64-bit words: the address of element 0 of each parameter buffer in the order of `params`, then the
  value of each run-time dim in the order of `dims`;
* `[begin, end)` is the range of parallel units to compute; ranges of one step are independent and may run on any
  thread;
* `scratch` is this thread's private memory, 64-byte aligned, at least `scratch_bytes` long.
A kernel calls nothing outside its module and allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vivace.base.dims import Dim

if TYPE_CHECKING:  # the loop IR is not needed to load code
    from vivace.loops.kernel import Buffer


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
