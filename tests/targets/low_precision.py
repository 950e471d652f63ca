"""Runs contraction kernels on low-precision arrays that end where readable memory ends; builds products and
convolutions with packed weights."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest

from vivace.base.dims import Dim, evaluate, symbol
from vivace.base.dtypes import DType
from vivace.base.machine import Isa, host, isa, missing_flags
from vivace.loops.contraction import Axis, Contraction, Depthwise, Packing
from vivace.loops.kernel import Buffer
from vivace.lower.arithmetic import arithmetic_of
from vivace.lower.pack import contiguous_run, pack_groups
from vivace.lower.tile import Tile, panel_lanes
from vivace.targets.cpu import jit
from vivace.targets.cpu.code import NOTES_BYTES, KernelCode
from vivace.targets.cpu.contraction import emit_contraction
from vivace.targets.cpu.depthwise import emit_depthwise

PAGE = mmap.PAGESIZE
UNTOUCHED = 77
_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


def isas(*names: str) -> list[object]:
    """Instruction sets with extras as test parameters, those that this CPU lacks as skipped."""
    found = []
    for name in names:
        missing = missing_flags(host(), isa(name))
        skip = pytest.mark.skipif(bool(missing), reason=f"the CPU lacks {', '.join(missing)}")
        found.append(pytest.param(isa(name), id=name, marks=skip))
    return found


def at_page_end(values: np.ndarray) -> np.ndarray:
    """A copy that ends where readable memory ends: a kernel that reads beyond it is stopped by the hardware."""
    pages = max(1, -(-values.nbytes // PAGE))
    area = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(start + pages * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    copy = np.frombuffer(area, values.dtype, values.size, pages * PAGE - values.nbytes).reshape(values.shape)
    copy[...] = values
    return copy


def buffer(name: str, values: np.ndarray, writable: bool = False) -> Buffer:
    strides = tuple(s // values.itemsize for s in values.strides)
    return Buffer(name, DType.of(values.dtype), values.shape, strides, writable)


@dataclass
class Case:
    """A contraction or a depthwise convolution with its arrays; `expected` is the sum, before the epilogue."""

    c: Contraction | Depthwise
    arrays: dict[Buffer, np.ndarray]
    expected: np.ndarray
    dims: dict[str, int] = field(default_factory=dict)
    tile: Tile | None = None

    def code(self, target: Isa) -> KernelCode:
        if isinstance(self.c, Depthwise):
            return emit_depthwise(self.c, target)
        return emit_contraction(self.c, target, self.tile)

    def run(self, target: Isa, n_ranges: int = 3) -> np.ndarray:
        """The out buffer after running all units in some ranges; what stands beyond the results is untouched."""
        code = self.code(target)
        library = jit.load([jit.compile_kernel(code, target)])
        self.call(code, library.address(code.name), n_ranges)
        out, n = self.arrays[self.c.out], self.expected.shape[-1]
        assert (out[..., n:] == UNTOUCHED).all()
        return out[..., :n]

    def call(self, code: KernelCode, address: int, n_ranges: int) -> None:
        call(code, address, self.arrays, self.dims, n_ranges)


def call(
    code: KernelCode, address: int, arrays: Mapping[Buffer, np.ndarray], dims: Mapping[str, int], n_ranges: int = 3
) -> None:
    """Runs all units of a loaded kernel in some ranges; nothing is written beyond its scratch."""
    words = [arrays[p].ctypes.data for p in code.params] + [dims[d] for d in code.dims]
    args = np.array(words, np.int64)
    n_bytes = evaluate(code.scratch_bytes, dims)
    raw = np.full(n_bytes + 192, 0xA5, np.uint8)
    skip = -raw.ctypes.data % 64
    raw[skip : skip + min(n_bytes, NOTES_BYTES)] = 0
    units = evaluate(code.units, dims)
    for begin, end in pairwise(units * i // n_ranges for i in range(n_ranges + 1)):
        _ENTRY(address)(args.ctypes.data, begin, end, raw.ctypes.data + skip)
    assert (raw[skip + n_bytes :] == 0xA5).all()


def run_code(code: KernelCode, target: Isa, arrays: Mapping[Buffer, np.ndarray], dims: Mapping[str, int]) -> None:
    library = jit.load([jit.compile_kernel(code, target)])
    call(code, library.address(code.name), arrays, dims)


def _with_panels(c: Contraction, b: np.ndarray, target: Isa) -> tuple[Contraction, dict[Buffer, np.ndarray]]:
    ar = arithmetic_of(c, target)
    lanes = panel_lanes(c.n, target, ar)
    panels = pack_groups(b, lanes, ar.group, contiguous_run(c))
    c = replace(c, b=buffer("b", panels), packing=Packing("panels", lanes))
    return c, {c.b: panels}


def exact(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int64 if x.dtype.kind in "iu" else np.float64)


def product(a: np.ndarray, b: np.ndarray, out: type, target: Isa, offset: int = 0, symbolic: bool = False) -> Case:
    """`out[h, m, n] = a[h, m, k] @ b[h, k, n]`, each row of `out` three elements apart from the next."""
    heads, m, k = a.shape
    n = b.shape[-1]
    dim_m: Dim = symbol("M") if symbolic else m
    a = at_page_end(a)
    result = np.full((heads, m, n + 3), UNTOUCHED, out)
    c = Contraction(
        "product",
        (Axis("h", heads, dim_m * k, 1, dim_m * (n + 3)),),
        (Axis("m", dim_m, k, 0, n + 3),),
        (Axis("k", k, 1),),
        n,
        buffer("a", a),
        buffer("b", b),
        buffer("out", result, True),
        Packing("panels"),
        a_offset=offset,
        acc_dtype=DType.f32 if exact(b).dtype == np.float64 else DType.i32,
    )
    c, arrays = _with_panels(c, b, target)
    with np.errstate(invalid="ignore"):
        total = (exact(a) + offset) @ exact(b)
    return Case(c, {**arrays, c.a: a, c.out: result}, total, {"M": m} if symbolic else {})


def convolution(
    x: np.ndarray, w: np.ndarray, stride: int, out: type, target: Isa, offset: int = 0, symbolic: bool = False
) -> Case:
    """`x[image, h, w, ci]` under `w[kh, kw, ci, co]`, without padding."""
    images, height, width, ci = x.shape
    k, _, _, co = w.shape
    oh, ow = (height - k) // stride + 1, (width - k) // stride + 1
    x = at_page_end(x)
    result = np.full((images, oh, ow, co + 3), UNTOUCHED, out)
    row: Dim = (symbol("W", k) if symbolic else width) * ci
    dim_ow: Dim = (symbol("W", k) - k) // stride + 1 if symbolic else ow
    step = co + 3
    c = Contraction(
        "conv",
        (),
        (
            Axis("image", images, height * row, 0, oh * dim_ow * step),
            Axis("oh", oh, stride * row, 0, dim_ow * step),
            Axis("ow", dim_ow, stride * ci, 0, step),
        ),
        (Axis("kh", k, row), Axis("kw", k, ci), Axis("channel", ci, 1)),
        co,
        buffer("a", x),
        buffer("b", w),
        buffer("out", result, True),
        Packing("panels"),
        a_offset=offset,
        acc_dtype=DType.f32 if exact(w).dtype == np.float64 else DType.i32,
    )
    c, arrays = _with_panels(c, w.reshape(1, k * k * ci, co), target)
    total = np.zeros((images, oh, ow, co), exact(w).dtype)
    for i in range(k):
        for j in range(k):
            part = x[:, i : i + stride * (oh - 1) + 1 : stride, j : j + stride * (ow - 1) + 1 : stride]
            total += (exact(part) + offset) @ exact(w[i, j])
    return Case(c, {**arrays, c.a: x, c.out: result}, total, {"W": width} if symbolic else {})


def depthwise(x: np.ndarray, w: np.ndarray, stride: int, out: type, offset: int = 0) -> Case:
    """`x[image, h, w, c]` under `w[kh, kw, c]`, without padding."""
    images, height, width, channels = x.shape
    k = w.shape[0]
    oh, ow = (height - k) // stride + 1, (width - k) // stride + 1
    x, w = at_page_end(x), at_page_end(w)
    result = np.full((images, oh, ow, channels + 3), UNTOUCHED, out)
    step, row = channels + 3, width * channels
    d = Depthwise(
        "depthwise",
        (
            Axis("image", images, height * row, 0, oh * ow * step),
            Axis("oh", oh, stride * row, 0, ow * step),
            Axis("ow", ow, stride * channels, 0, step),
        ),
        (Axis("kh", k, row, k * channels), Axis("kw", k, channels, channels)),
        channels,
        buffer("a", x),
        buffer("b", w),
        buffer("out", result, True),
        a_offset=offset,
    )
    total = np.zeros((images, oh, ow, channels), exact(w).dtype)
    for i in range(k):
        for j in range(k):
            part = x[:, i : i + stride * (oh - 1) + 1 : stride, j : j + stride * (ow - 1) + 1 : stride]
            total += (exact(part) + offset) * exact(w[i, j])
    return Case(d, {d.a: x, d.b: w, d.out: result}, total)
