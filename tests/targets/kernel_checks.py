"""Small loop kernels, numbers to run them on, and the comparison of generated code with the reference interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.loops import reference
from vivace.loops.kernel import (
    Buffer,
    For,
    Kernel,
    Load,
    Stmt,
    Store,
    dense_strides,
)

f32, f64, i64, i32, i8, u8, flag = (DType.f32, DType.f64, DType.i64, DType.i32, DType.i8, DType.u8, DType.bool)
INTEGERS = (DType.i8, DType.u8, DType.i16, DType.u16, DType.i32, DType.u32, DType.i64, DType.u64)
SOME_INTEGERS = (DType.i8, DType.u16, DType.i32, DType.u32, DType.i64)
FLOATS = (DType.f32, DType.f64, DType.f16, DType.bf16)
N, i, j, k = symbol("N"), symbol("i"), symbol("j"), symbol("k")
SIZES = (0, 1, 4, 7, 16, 17, 33, 130)


def buffer(
    name: str, dtype: DType, shape: Sequence[Dim], strides: Sequence[Dim] | None = None, out: bool = False
) -> Buffer:
    return Buffer(
        name, dtype, tuple(shape), tuple(strides) if strides is not None else dense_strides(tuple(shape)), out
    )


def vector(var: str, extent: Dim, *body: Stmt) -> For:
    return For(var, extent, tuple(body), "vector")


def parallel(var: str, extent: Dim, *body: Stmt) -> For:
    return For(var, extent, tuple(body), "parallel")


def samples(dtype: DType, n: int, seed: int = 0) -> np.ndarray:
    """Numbers of every size, with the special ones of the type in between."""
    rng = np.random.default_rng(seed)
    if dtype is flag:
        return rng.random(n) < 0.5
    if dtype.is_int:
        info = np.iinfo(dtype.numpy)
        values = rng.integers(-20, 20, n).clip(info.min, info.max).astype(dtype.numpy)
        special = np.array([info.min, info.max, 0, 1, info.max // 3], dtype.numpy)
    else:
        values = (rng.normal(size=n) * 10.0 ** rng.integers(-3, 3, n)).astype(dtype.numpy)
        special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e-40]).astype(dtype.numpy)
    places = rng.random(n) < 0.2
    values[places] = rng.choice(special, int(places.sum()))
    return values


def assert_close(actual: np.ndarray, expected: np.ndarray, ulps: float, what: object = "") -> None:
    """Equal, both NaN, or within so many units in the last place of the element type."""
    assert actual.dtype == expected.dtype
    if actual.dtype.kind not in "fV" and actual.dtype != DType.bf16.numpy:
        np.testing.assert_array_equal(actual, expected, err_msg=str(what))
        return
    precision = {DType.bf16.numpy: 8, DType.f16.numpy: 11, DType.f32.numpy: 24, DType.f64.numpy: 53}[expected.dtype]
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    least = {
        DType.bf16.numpy: 2.0**-133,
        DType.f16.numpy: 2.0**-24,
        DType.f32.numpy: 2.0**-149,
        DType.f64.numpy: 5e-324,
    }
    with np.errstate(all="ignore"):
        unit = np.maximum(2.0 ** (np.floor(np.log2(np.abs(e))) + 1 - precision), least[expected.dtype])
        good = (a == e) | (np.isnan(a) & np.isnan(e)) | (np.abs(a - e) <= ulps * unit)
    bad = np.flatnonzero(~good)
    assert not len(bad), f"{what}: at {bad[:5]}: {actual[bad[:5]]}, expected {expected[bad[:5]]}"


def check(compile_kernel, isa, kernel, inputs, outputs, dims=None, ulps=0.0, n_parts=1) -> list[np.ndarray]:
    """Run a kernel on both; `outputs` are the initial contents of the written buffers."""
    expected, actual = [o.copy() for o in outputs], [o.copy() for o in outputs]
    reference.run(kernel, [*inputs, *expected], dims)
    compile_kernel(kernel, isa).run([*inputs, *actual], dims, n_parts)
    for a, e in zip(actual, expected):
        assert_close(a, e, ulps, dims)
    return actual


def elementwise(e_of, sources: Sequence[DType], target: DType) -> Kernel:
    """out[i] = e(x0[i], x1[i], ...)"""
    ins = [buffer(f"x{n}", t, (N,)) for n, t in enumerate(sources)]
    out = buffer("out", target, (N,), out=True)
    return Kernel("elementwise", (*ins, out), (vector("i", N, Store(out, (i,), e_of(*(Load(b, (i,)) for b in ins)))),))


def check_elementwise(compile_kernel, isa, e_of, sources, target, ulps=0.0) -> None:
    kernel = elementwise(e_of, sources, target)
    loaded = compile_kernel(kernel, isa)
    for n in SIZES:
        ins = [samples(t, n, seed) for seed, t in enumerate(sources)]
        expected = np.full(n + 3, 1).astype(target.numpy)
        actual = expected.copy()
        reference.run(kernel, [*ins, expected], {"N": n})
        loaded.run([*ins, actual], {"N": n})
        assert_close(actual, expected, ulps, n)
