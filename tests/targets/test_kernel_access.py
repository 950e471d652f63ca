"""Generated loop kernels against the reference interpreter: how elements are read and written."""

from __future__ import annotations

import numpy as np
import pytest
from tests.targets.kernel_checks import (
    N,
    assert_close,
    buffer,
    check,
    f32,
    flag,
    i,
    i64,
    j,
    parallel,
    samples,
    u8,
    vector,
)

from vivace.base.dims import floordiv, maximum, minimum, mod, symbol
from vivace.base.dtypes import DType
from vivace.loops import reference
from vivace.loops.kernel import (
    Binary,
    Const,
    Inside,
    Kernel,
    Let,
    Load,
    Select,
    Store,
)

INDICES = {
    "contiguous": i,
    "shifted": i + 2,
    "reversed": N - 1 - i,
    "every second": 2 * i,
    "every third backwards": 3 * (N - i),
    "constant": 5 + 0 * i,
    "halved": floordiv(i, 2),
    "divided by three": floordiv(i + 4, 3),
    "modulo five": mod(i, 5),
    "modulo of a run-time dim": mod(i, N + 2),
    "divided by a run-time dim": floordiv(3 * i, N + 1),
    "clamped": minimum(maximum(i - 3, 0), N - 2),
    "triangle": i * i,
}


@pytest.mark.parametrize("pattern", INDICES)
@pytest.mark.parametrize("dtype", [f32, u8, i64, DType.f16])
def test_load_patterns(compile_kernel, each_isa, pattern: str, dtype: DType) -> None:
    x, out = buffer("x", dtype, (N * N + 9,)), buffer("out", dtype, (N,), out=True)
    kernel = Kernel("pattern", (x, out), (vector("i", N, Store(out, (i,), Load(x, (INDICES[pattern],)))),))
    loaded = compile_kernel(kernel, each_isa)
    for n in (2, 5, 16, 37):
        values = np.arange(n * n + 9).astype(dtype.numpy)
        expected, actual = np.zeros(n, dtype.numpy), np.zeros(n, dtype.numpy)
        reference.run(kernel, [values, expected], {"N": n})
        loaded.run([values, actual], {"N": n})
        assert_close(actual, expected, 0, (pattern, n))


@pytest.mark.parametrize(
    "pattern", ["contiguous", "shifted", "reversed", "every second", "every third backwards", "triangle"]
)
@pytest.mark.parametrize("dtype", [f32, u8, i64, DType.f16])
def test_store_patterns(compile_kernel, each_isa, pattern: str, dtype: DType) -> None:
    x, out = buffer("x", dtype, (N,)), buffer("out", dtype, (N * N + 9,), out=True)
    kernel = Kernel("pattern", (x, out), (vector("i", N, Store(out, (INDICES[pattern],), Load(x, (i,)))),))
    loaded = compile_kernel(kernel, each_isa)
    for n in (2, 5, 16, 37):
        values = np.arange(1, n + 1).astype(dtype.numpy)
        expected, actual = np.zeros(n * n + 9, dtype.numpy), np.zeros(n * n + 9, dtype.numpy)
        reference.run(kernel, [values, expected], {"N": n})
        loaded.run([values, actual], {"N": n})
        assert_close(actual, expected, 0, (pattern, n))


CONDITIONS = {
    "shift by a lane": (i - 1, Inside(i - 1, 0, N)),
    "shift to the right": (i + 3, Inside(i + 3, 0, N)),
    "window": (i, Inside(i, 3, N - 4)),
    "strided": (2 * i - 3, Inside(2 * i - 3, 0, N)),
    "reversed": (N - i, Inside(N - i, 0, N)),
    "equal in all lanes, one element": (N - 3, Inside(N - 3, 0, N)),
    "equal in all lanes": (i, Inside(N, 16, 40)),
    "always": (i, Inside(i, 0, 1 << 40)),
    "never": (i, Inside(i, 5, 2)),
    "nonlinear": (floordiv(i, 2) - 2, Inside(floordiv(i, 2) - 2, 0, N)),
    "one element, some lanes": (0 * i, Inside(i, 2, 9)),
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(
    ("dtype", "fill"), [(f32, 0), (f32, float("-inf")), (u8, 7), (DType.f16, 1.5), (i64, -1), (flag, 1)]
)
def test_loads_inside_only(compile_kernel, each_isa, condition: str, dtype: DType, fill: float) -> None:
    index, inside = CONDITIONS[condition]
    x, out = buffer("x", dtype, (N,)), buffer("out", dtype, (N,), out=True)
    kernel = Kernel("inside", (x, out), (vector("i", N, Store(out, (i,), Load(x, (index,), (inside,), fill))),))
    loaded = compile_kernel(kernel, each_isa)
    for n in (0, 2, 16, 37):
        values = (np.arange(n) % 100 + 1).astype(dtype.numpy)
        expected, actual = np.zeros(n, dtype.numpy), np.zeros(n, dtype.numpy)
        reference.run(kernel, [values, expected], {"N": n})
        loaded.run([values, actual], {"N": n})
        assert_close(actual, expected, 0, (condition, n))


def test_broadcast_rows_and_columns(compile_kernel, each_isa) -> None:
    a, b, c = buffer("a", f32, (7, N), (1, 0)), buffer("b", f32, (7, N), (0, 1)), buffer("c", f32, (7, N), (0, 0))
    out = buffer("out", f32, (7, N), out=True)
    total = Binary("add", Binary("mul", Load(a, (i, j)), Load(b, (i, j))), Load(c, (i, j)))
    kernel = Kernel("broadcast", (a, b, c, out), (parallel("i", 7, vector("j", N, Store(out, (i, j), total))),))
    for n in (0, 1, 16, 45):
        ins = [samples(f32, size) for size in (7, n, 1)]
        check(compile_kernel, each_isa, kernel, ins, [np.zeros(7 * n, np.float32)], {"N": n}, n_parts=3)


@pytest.mark.parametrize("dtype", [f32, u8, i64])
def test_transpose(compile_kernel, each_isa, dtype: DType) -> None:
    x, out = buffer("x", dtype, (N, 19)), buffer("out", dtype, (19, N), out=True)
    kernel = Kernel("transpose", (x, out), (parallel("i", 19, vector("j", N, Store(out, (i, j), Load(x, (j, i))))),))
    for n in (1, 16, 37):
        values = np.arange(19 * n).astype(dtype.numpy)
        check(compile_kernel, each_isa, kernel, [values], [np.zeros(19 * n, dtype.numpy)], {"N": n})


@pytest.mark.parametrize("index_type", [i64, DType.i32])
def test_gather(compile_kernel, each_isa, index_type: DType) -> None:
    """Rows chosen by an index (equal in all lanes), and elements chosen by an index in each lane."""
    table, ids = buffer("table", f32, (50, N)), buffer("ids", index_type, (6,))
    out = buffer("out", f32, (6, N), out=True)
    row = symbol("row", None)
    chosen = Select(Binary("lt", Load(ids, (i,)), Const(0, index_type)), Const(50, index_type), Const(0, index_type))
    body = (
        Let("row", Binary("add", Load(ids, (i,)), chosen)),
        vector("j", N, Store(out, (i, j), Load(table, (row, j)))),
    )
    kernel = Kernel("rows", (table, ids, out), (parallel("i", 6, *body),))
    rows = np.array([3, -1, 0, 49, -50, 7]).astype(index_type.numpy)
    for n in (1, 16, 35):
        values = np.arange(50 * n).astype(np.float32)
        check(compile_kernel, each_isa, kernel, [values, rows], [np.zeros(6 * n, np.float32)], {"N": n}, n_parts=2)

    line, ids, out = buffer("line", f32, (50,)), buffer("ids", index_type, (N,)), buffer("out", f32, (N,), out=True)
    body = (Let("row", Load(ids, (i,))), Store(out, (i,), Load(line, (row,))))
    kernel = Kernel("elements", (line, ids, out), (vector("i", N, *body),))
    for n in (0, 1, 16, 35):
        ids_of = np.random.default_rng(n).integers(0, 50, n).astype(index_type.numpy)
        ins = [np.arange(50).astype(np.float32), ids_of]
        check(compile_kernel, each_isa, kernel, ins, [np.zeros(n, np.float32)], {"N": n})


def test_scatter_by_index(compile_kernel, each_isa) -> None:
    x, ids, out = buffer("x", f32, (N,)), buffer("ids", i64, (N,)), buffer("out", f32, (N + 5,), out=True)
    body = (Let("place", Load(ids, (i,))), Store(out, (symbol("place"),), Load(x, (i,))))
    kernel = Kernel("scatter", (x, ids, out), (vector("i", N, *body),))
    for n in (1, 16, 35):
        ins = [samples(f32, n), np.random.default_rng(n).permutation(n + 5)[:n].astype(np.int64)]
        check(compile_kernel, each_isa, kernel, ins, [np.zeros(n + 5, np.float32)], {"N": n})
