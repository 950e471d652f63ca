"""Runs one generated kernel on NumPy arrays, and says which instruction sets this machine has."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np

from vivace.base.dims import evaluate
from vivace.base.machine import ISAS, Isa, host, missing_flags
from vivace.loops.kernel import Kernel
from vivace.targets.cpu import jit
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.llvm import emit_kernel

HERE = [name for name, isa in ISAS.items() if not missing_flags(host(), isa)]
_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


def run_code(
    code: KernelCode, isa: Isa, arrays: Sequence[np.ndarray], dims: Mapping[str, int] | None = None, n_parts: int = 1
) -> None:
    """Compile, load and call; the units are handed out in `n_parts` ranges."""
    values = dict(dims or {})
    library = jit.load(jit.compile_objects([code], isa))
    call = _ENTRY(library.address(code.name))
    words = [a.ctypes.data for a in arrays] + [values[name] for name in code.dims]
    args = np.array(words, np.int64)
    scratch = np.zeros(evaluate(code.scratch_bytes, values) + 128, np.uint8)
    aligned = scratch.ctypes.data + -scratch.ctypes.data % 64
    units = evaluate(code.units, values)
    edges = [units * k // n_parts for k in range(n_parts + 1)]
    for begin, end in zip(edges, edges[1:]):
        call(args.ctypes.data, begin, end, aligned)


def run_native(
    kernel: Kernel, isa: Isa, arrays: Sequence[np.ndarray], dims: Mapping[str, int] | None = None, n_parts: int = 1
) -> None:
    """Generate a loop kernel and run it."""
    run_code(emit_kernel(kernel, isa), isa, arrays, dims, n_parts)
