"""Rows that are stored and reduced in one pass."""

from __future__ import annotations

import numpy as np
import pytest

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.loops.kernel import Binary, Buffer, Cast, Const, For, Kernel, Let, Load, Read, Reduce, Stmt, Store, Unary
from vivace.targets.cpu.llvm import emit_kernel

f32 = DType.f32
R, C = symbol("R"), symbol("C")


@pytest.mark.parametrize("fn", ["add", "max"])
@pytest.mark.parametrize("columns", [0, 1, 5, 16, 70, 257])
def test_a_stored_row_is_reduced(each_isa, compile_kernel, columns, fn) -> None:
    """The row, the reduction of the row, and a second use of both."""
    x = Buffer("x", f32, (R, C), (C, 1))
    y, z = Buffer("y", f32, (R, C), (C, 1), True), Buffer("z", f32, (R,), (1,), True)
    at = (symbol("r"), symbol("c"))
    body: tuple[Stmt, ...] = (
        For("c", C, (Store(y, at, Binary("mul", Load(x, at), Load(x, at))),), "vector"),
        Let("s", Binary("add", Reduce(fn, "c", C, Load(y, at)), Const(1.0, f32))),
        Store(z, at[:1], Read("s", f32)),
        For("c", C, (Store(y, at, Binary("sub", Load(y, at), Read("s", f32))),), "vector"),
    )
    code = compile_kernel(Kernel("rows", (x, y, z), (For("r", R, body, "parallel"),)), each_isa)
    xs = np.random.default_rng(3).standard_normal((3, columns), np.float32)
    ys, zs = np.zeros_like(xs), np.zeros(3, np.float32)
    code.run([xs, ys, zs], {"R": 3, "C": columns})
    square = xs * xs
    want = (square.sum(1) if fn == "add" else square.max(1, initial=-np.inf)) + 1
    np.testing.assert_allclose(zs, want, rtol=1e-5)
    np.testing.assert_allclose(ys, square - want[:, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [0, 1, 5, 16, 70, 257])
def test_what_a_row_rounds_is_reduced(each_isa, compile_kernel, columns) -> None:
    """The sum of numbers that are stored as bf16 is that of the numbers before they are rounded."""
    x, y = Buffer("x", f32, (R, C), (C, 1)), Buffer("y", DType.bf16, (R, C), (C, 1), True)
    z = Buffer("z", f32, (R,), (1,), True)
    at = (symbol("r"), symbol("c"))
    square = Binary("mul", Load(x, at), Load(x, at))
    body: tuple[Stmt, ...] = (
        For("c", C, (Store(y, at, Cast(DType.bf16, square)),), "vector"),
        Let("s", Reduce("add", "c", C, square)),
        Store(z, at[:1], Read("s", f32)),
    )
    code = compile_kernel(Kernel("rows", (x, y, z), (For("r", R, body, "parallel"),)), each_isa)
    xs = np.random.default_rng(3).standard_normal((3, columns), np.float32)
    ys, zs = np.zeros(xs.shape, DType.bf16.numpy), np.zeros(3, np.float32)
    code.run([xs, ys, zs], {"R": 3, "C": columns})
    np.testing.assert_allclose(zs, (xs * xs).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(ys.astype(np.float32), (xs * xs).astype(DType.bf16.numpy).astype(np.float32))


@pytest.mark.parametrize("rows", [3, 16, 70])
def test_columns_are_summed_as_they_are_stored(each_isa, compile_kernel, rows) -> None:
    """Down the columns, one per lane: the loop that stores is the one that sums."""
    x, y = Buffer("x", f32, (C, R), (R, 1)), Buffer("y", f32, (C, R), (R, 1), True)
    z = Buffer("z", f32, (R,), (1,), True)
    at = (symbol("c"), symbol("r"))
    body: tuple[Stmt, ...] = (
        For("c", C, (Store(y, at, Binary("mul", Load(x, at), Load(x, at))),)),
        Let("s", Reduce("add", "c", C, Load(y, at))),
        Store(z, at[1:], Read("s", f32)),
    )
    kernel = Kernel("columns", (x, y, z), (For("r", rows, body, "vector"),))
    loads = [line for line in emit_kernel(kernel, each_isa).llvm_text.splitlines() if " = load <" in line]
    assert loads and all("!invariant" in line for line in loads), "vectors that were stored are loaded again"
    xs = np.random.default_rng(3).standard_normal((9, rows), np.float32)
    ys, zs = np.zeros_like(xs), np.zeros(rows, np.float32)
    compile_kernel(kernel, each_isa).run([xs, ys, zs], {"R": rows, "C": 9})
    np.testing.assert_allclose(zs, (xs * xs).sum(0), rtol=1e-5)
    np.testing.assert_array_equal(ys, xs * xs)


def test_softmax_takes_three_passes(each_isa, compile_kernel) -> None:
    """One pass less than there are loops: the sum is taken while the exponentials are stored."""
    x, y = Buffer("x", f32, (R, 40), (40, 1)), Buffer("y", f32, (R, 40), (40, 1), True)
    at = (symbol("r"), symbol("c"))
    body: tuple[Stmt, ...] = (
        Let("top", Reduce("max", "c", 40, Load(x, at))),
        For("c", 40, (Store(y, at, Unary("exp", Binary("sub", Load(x, at), Read("top", f32)))),), "vector"),
        Let("scale", Binary("div", Const(1.0, f32), Reduce("add", "c", 40, Load(y, at)))),
        For("c", 40, (Store(y, at, Binary("mul", Load(y, at), Read("scale", f32))),), "vector"),
    )
    code = compile_kernel(Kernel("softmax", (x, y), (For("r", R, body, "parallel"),)), each_isa)
    xs, ys = np.random.default_rng(4).standard_normal((5, 40), np.float32), np.zeros((5, 40), np.float32)
    code.run([xs, ys], {"R": 5})
    e = np.exp(xs - xs.max(1, keepdims=True))
    np.testing.assert_allclose(ys, e / e.sum(1, keepdims=True), rtol=1e-6)
