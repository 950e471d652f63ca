"""Generated loop kernels against the reference interpreter: loops, guards, local buffers, and units."""

from __future__ import annotations

import numpy as np
from tests.targets.kernel_checks import (
    N,
    buffer,
    check,
    elementwise,
    f32,
    f64,
    flag,
    i,
    i64,
    j,
    k,
    parallel,
    samples,
    vector,
)

from vivace.base.dims import mod
from vivace.base.dtypes import DType
from vivace.loops.kernel import (
    Alloc,
    Binary,
    Cast,
    Const,
    Fetch,
    For,
    Guard,
    Index,
    Inside,
    Kernel,
    Load,
    Reduce,
    Store,
    Unary,
    dtype_of,
)


def test_guards(compile_kernel, each_isa) -> None:
    """Conditions that are equal in all lanes, that vary, and both; a nested loop and a single element inside."""
    x, out = buffer("x", f32, (N,)), buffer("out", f32, (5, N), out=True)
    positive = Binary("gt", Load(x, (j,)), Const(0.0, f32))
    odd = Binary("eq", Index(mod(i, 2)), Const(1, i64))
    first = Load(x, (N - 1,))
    writes = For("k", 2, (Store(out, (i, j), Binary("add", Load(x, (j,)), Binary("add", first, Index(k, f32)))),))
    body = Guard(odd, (vector("j", N, Guard(positive, (writes,))),))
    kernel = Kernel("guards", (x, out), (parallel("i", 5, body),))
    for n in (0, 1, 16, 35):
        check(compile_kernel, each_isa, kernel, [samples(f32, n)], [np.full(5 * n, 9, np.float32)], {"N": n}, n_parts=2)


def test_fetches_beyond_a_buffer_do_nothing(compile_kernel, each_isa) -> None:
    x, out = buffer("x", f32, (N,)), buffer("out", f32, (N,), out=True)
    ahead = Fetch(x, (i + (1 << 40),), 2)
    kernel = Kernel("fetches", (x, out), (For("i", N, (ahead, Store(out, (i,), Load(x, (i,))))),))
    check(compile_kernel, each_isa, kernel, [samples(f32, 7)], [np.zeros(7, np.float32)], {"N": 7})


def test_local_buffers(compile_kernel, each_isa) -> None:
    x, out = buffer("x", f32, (4, 20)), buffer("out", f32, (4, 20), out=True)
    one, two = buffer("one", f32, (20,)), buffer("two", DType.f64, (3, 20))
    doubled = Binary("mul", Load(one, (19 - j,)), Const(2.0, f32))
    body = (
        Alloc(one),
        vector("j", 20, Store(one, (j,), Load(x, (i, j)))),
        Alloc(two),
        For("k", 3, (vector("j", 20, Store(two, (k, j), Cast(f64, doubled))),)),
        vector("j", 20, Store(out, (i, j), Cast(f32, Reduce("add", "k", 3, Load(two, (k, j)))))),
    )
    kernel = Kernel("local", (x, out), (parallel("i", 4, *body),))
    values = np.arange(80).astype(np.float32)
    check(compile_kernel, each_isa, kernel, [values], [np.zeros(80, np.float32)], n_parts=3)


def test_running_sum(compile_kernel, each_isa) -> None:
    """A serial loop that reads what it wrote before, and an unrolled one."""
    x, out = buffer("x", f32, (N, 7)), buffer("out", f32, (N, 7), out=True)
    before = Load(out, (i - 1, j), (Inside(i - 1, 0, N),))
    step = Store(out, (i, j), Binary("add", before, Load(x, (i, j))))
    for kind in ("serial", "unroll"):
        kernel = Kernel("running", (x, out), (For("i", N, (For("j", 7, (step,), kind),)),))
        check(compile_kernel, each_isa, kernel, [np.ones(70, np.float32)], [np.zeros(70, np.float32)], {"N": 10})
    kernel = Kernel("running", (x, out), (For("i", N, (vector("j", 7, step),)),))
    check(compile_kernel, each_isa, kernel, [np.ones(70, np.float32)], [np.zeros(70, np.float32)], {"N": 10})


def test_in_place(compile_kernel, each_isa) -> None:
    """Input and output are one memory: `alias` keeps loads where they stand."""
    x, out = buffer("x", f32, (N,)), buffer("out", f32, (N,), out=True)
    body = For("k", 3, (vector("i", N, Store(out, (i,), Binary("add", Load(x, (i,)), Load(x, (i,))))),))
    kernel = Kernel("doubled", (x, out), (body,), {"alias": (("x", "out"),)})
    loaded = compile_kernel(kernel, each_isa)
    import ctypes

    from vivace.targets.cpu import jit

    library = jit.load(jit.compile_objects([loaded.code], each_isa))
    for n in (1, 40):
        values = np.ones(n, np.float32)
        words = np.array([values.ctypes.data] * 2 + [n], np.int64)
        entry = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(library.address("doubled"))
        entry(words.ctypes.data, 0, 1, 0)
        np.testing.assert_array_equal(values, 8)


def test_a_lone_vector_loop_is_split_into_units(compile_kernel, each_isa) -> None:
    kernel = elementwise(lambda x: Unary("neg", x), [f32], f32)
    loaded = compile_kernel(kernel, each_isa)
    values = np.arange(20001).astype(np.float32)
    out = np.zeros_like(values)
    loaded.run([values, out], {"N": len(values)}, n_parts=3)
    np.testing.assert_array_equal(out, -values)


def test_parallel_loops_form_one_space(compile_kernel, each_isa) -> None:
    x, out = buffer("x", f32, (3, N, 5)), buffer("out", f32, (3, N, 5), out=True)
    store = Store(out, (i, j, k), Binary("add", Load(x, (i, j, k)), Index(i * 100 + j * 10 + k, f32)))
    kernel = Kernel("space", (x, out), (parallel("i", 3, parallel("j", N, parallel("k", 5, store))),))
    for n in (0, 1, 4):
        values = np.zeros(15 * n, np.float32)
        check(compile_kernel, each_isa, kernel, [values], [values.copy()], {"N": n}, n_parts=4)


def test_dtype_of_what_is_stored() -> None:
    assert dtype_of(Binary("lt", Const(1.0, f32), Const(2.0, f32))) is flag
