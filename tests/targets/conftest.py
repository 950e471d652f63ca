"""Runs generated kernels on NumPy arrays that end where readable memory ends, on every instruction set that this CPU
has."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import pytest

from vivace.base.dims import evaluate
from vivace.base.machine import ISAS, Isa, host, missing_flags
from vivace.loops.kernel import Kernel
from vivace.loops.verify import verify_kernel
from vivace.targets.cpu import jit
from vivace.targets.cpu.code import NOTES_BYTES, KernelCode
from vivace.targets.cpu.llvm import emit_kernel

PAGE = mmap.PAGESIZE
_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `each_isa` run once per instruction set; those that the CPU lacks are skipped with the reason."""
    if "each_isa" in metafunc.fixturenames:
        sets = []
        for name, isa in ISAS.items():
            missing = missing_flags(host(), isa)
            skip = pytest.mark.skipif(bool(missing), reason=f"the CPU lacks {', '.join(missing)}")
            sets.append(pytest.param(isa, id=name, marks=skip))
        metafunc.parametrize("each_isa", sets)


def _fenced(values: np.ndarray) -> np.ndarray:
    """A copy between two pages that may not be touched, at the end of its own."""
    n_pages = max(1, -(-values.nbytes // PAGE))
    area = mmap.mmap(-1, (n_pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (0, n_pages + 1):
        assert protect(ctypes.c_void_p(start + page * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    copy = np.frombuffer(area, values.dtype, values.size, (n_pages + 1) * PAGE - values.nbytes)
    copy[...] = values.reshape(-1)
    return copy


class Loaded:
    """A compiled kernel."""

    def __init__(self, code: KernelCode, isa: Isa) -> None:
        self.code = code
        self._library = jit.load(jit.compile_objects([code], isa))
        self._call = _ENTRY(self._library.address(code.name))

    def run(self, arrays: Sequence[np.ndarray], dims: Mapping[str, int] | None = None, n_parts: int = 1) -> None:
        """Call it on fenced copies; what it wrote is copied back. The units are handed out in `n_parts` ranges."""
        values = dict(dims or {})
        copies = [_fenced(a) for a in arrays]
        words = np.array([a.ctypes.data for a in copies] + [values[name] for name in self.code.dims], np.int64)
        scratch = np.full(evaluate(self.code.scratch_bytes, values) + 128, 0xAB, np.uint8)
        aligned = scratch.ctypes.data + -scratch.ctypes.data % 64
        scratch[: -scratch.ctypes.data % 64 + NOTES_BYTES] = 0
        units = evaluate(self.code.units, values)
        edges = [units * k // n_parts for k in range(n_parts + 1)]
        for begin, end in pairwise(edges):
            self._call(words.ctypes.data, begin, end, aligned)
        for array, copy in zip(arrays, copies):
            array.reshape(-1)[...] = copy


@pytest.fixture
def compile_kernel() -> Callable[[Kernel, Isa], Loaded]:
    """Verify, generate, compile and load a loop kernel."""

    def compile_one(kernel: Kernel, isa: Isa) -> Loaded:
        verify_kernel(kernel)
        return Loaded(emit_kernel(kernel, isa), isa)

    return compile_one
