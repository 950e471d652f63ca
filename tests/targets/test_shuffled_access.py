"""Operands that lie across the vector: transposed squares, interleaved stores, short strides, scattered stores."""

from __future__ import annotations

import numpy as np
import pytest

from vivace.base.dims import Dim, ceildiv, minimum, symbol
from vivace.base.dtypes import DType
from vivace.loops.kernel import (
    Binary,
    Buffer,
    Cast,
    Const,
    Expr,
    For,
    Kernel,
    Load,
    Reduce,
    Store,
    Unary,
    dense_strides,
)

f32, i32, f16 = DType.f32, DType.i32, DType.f16
R, C, b, u, v = symbol("R"), symbol("C"), symbol("b"), symbol("u"), symbol("v")
SIZES = ((32, 32), (1, 1), (0, 5), (5, 0), (3, 40), (40, 3), (16, 17), (33, 31), (70, 100))


def buffer(name: str, dtype: DType, shape: tuple[Dim, ...], strides: tuple[Dim, ...], out: bool = False) -> Buffer:
    return Buffer(name, dtype, shape, strides, out)


def turned(n: Dim, value: Expr, y: Buffer, params: tuple[Buffer, ...], side: int = 32) -> Kernel:
    store = Store(y, (b * side + u, v), value)
    inner = For("v", y.shape[1], (store,), "vector")
    rows = For("u", minimum(side, n - b * side), (inner,), "serial")
    return Kernel("turn", (*params, y), (For("b", ceildiv(n, side), (rows,), "parallel"),))


@pytest.mark.parametrize("static", [False, True], ids=["symbolic", "static"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_transposed_operands_meet_plain_ones(each_isa, compile_kernel, size, static) -> None:
    n, m = size if static else (R, C)
    x = buffer("x", f32, (n, m), (1, n))
    z = buffer("z", f32, (n, m), (m, 1))
    w = buffer("w", i32, (n, m), (1, n))
    y = buffer("y", f32, (n, m), (m, 1), out=True)
    at = (b * 32 + u, v)
    value = Binary("sub", Binary("mul", Load(x, at), Load(z, at)), Cast(f32, Load(w, at)))
    code = compile_kernel(turned(n, value, y, (x, z, w)), each_isa)
    rng = np.random.default_rng(1)
    xs, zs = rng.standard_normal(size[::-1], np.float32), rng.standard_normal(size, np.float32)
    ws = rng.integers(-9, 9, size[::-1], np.int32)
    ys = np.full(size, 7, np.float32)
    code.run([xs, zs, ws, ys], {} if static else {"R": size[0], "C": size[1]}, n_parts=2)
    np.testing.assert_array_equal(ys, xs.T * zs - ws.T.astype(np.float32))


def test_transposed_halves_are_widened(each_isa, compile_kernel) -> None:
    x, y = buffer("x", f16, (37, 21), (1, 37)), buffer("y", f32, (37, 21), (21, 1), out=True)
    code = compile_kernel(turned(37, Cast(f32, Load(x, (b * 32 + u, v))), y, (x,)), each_isa)
    xs, ys = np.arange(37 * 21, dtype=np.float16).reshape(21, 37), np.zeros((37, 21), np.float32)
    code.run([xs, ys])
    np.testing.assert_array_equal(ys, xs.T.astype(np.float32))


@pytest.mark.parametrize("parts", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 50])
def test_parts_are_interleaved(each_isa, compile_kernel, parts, n) -> None:
    x, y = buffer("x", f32, (R, parts), (1, R)), buffer("y", f32, (R, parts), (parts, 1), out=True)
    store = Store(y, (u, v), Unary("neg", Load(x, (u, v))))
    loops = For("u", R, (For("v", parts, (store,), "unroll"),), "vector")
    code = compile_kernel(Kernel("turn", (x, y), (For("b", 1, (loops,), "parallel"),)), each_isa)
    xs = np.arange(n * parts, dtype=np.float32).reshape(parts, n)
    ys = np.full((n, parts), 7, np.float32)
    code.run([xs, ys], {"R": n})
    np.testing.assert_array_equal(ys, -xs.T)


@pytest.mark.parametrize("dtype", [f32, DType.bf16, f16], ids=str)
@pytest.mark.parametrize(("parts", "width"), [(3, 4), (2, 4), (3, 8), (5, 7), (3, 9)])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 50])
def test_parts_of_wider_pixels_leave_the_rest_alone(each_isa, compile_kernel, dtype, parts, width, n) -> None:
    x, y = buffer("x", f32, (R, parts), (1, R)), buffer("y", dtype, (R, parts), (width, 1), out=True)
    value = Unary("neg", Load(x, (u, v)))
    store = Store(y, (u, v), value if dtype is f32 else Cast(dtype, value))
    loops = For("u", R, (For("v", parts, (store,), "unroll"),), "vector")
    code = compile_kernel(Kernel("turn", (x, y), (For("b", 1, (loops,), "parallel"),)), each_isa)
    xs = np.arange(n * parts, dtype=np.float32).reshape(parts, n)
    ys = np.full((n, width), 7, dtype.numpy)
    code.run([xs, ys], {"R": n})
    np.testing.assert_array_equal(ys[:, :parts].astype(np.float32), -xs.T)
    assert (ys[:, parts:] == 7).all()


@pytest.mark.parametrize("dtype", [f32, i32], ids=str)
@pytest.mark.parametrize("stride", [2, 3, 4, 5])
@pytest.mark.parametrize("n", [0, 1, 16, 67])
def test_every_nth_element_is_read_and_nothing_beyond_the_last(each_isa, compile_kernel, dtype, stride, n) -> None:
    x, y = buffer("x", dtype, (R,), (stride,)), buffer("y", dtype, (R,), (1,), out=True)
    store = Store(y, (u,), Binary("add", Load(x, (u,)), Const(1, dtype)))
    code = compile_kernel(Kernel("pick", (x, y), (For("u", R, (store,), "vector"),)), each_isa)
    xs = np.arange(max((n - 1) * stride + 1, 0)).astype(dtype.numpy)  # ends with the last element that is read
    ys = np.zeros(n, dtype.numpy)
    code.run([xs, ys], {"R": n})
    np.testing.assert_array_equal(ys, xs[::stride] + 1)


@pytest.mark.parametrize("n", [0, 3, 4, 67])
def test_scattered_stores_leave_the_gaps_alone(each_isa, compile_kernel, n) -> None:
    x, y = buffer("x", f32, (R,), (1,)), buffer("y", f32, (R,), (7,), out=True)
    store = Store(y, (u,), Binary("mul", Load(x, (u,)), Const(2.0, f32)))
    code = compile_kernel(Kernel("spread", (x, y), (For("u", R, (store,), "vector"),)), each_isa)
    xs, ys = np.arange(n, dtype=np.float32), np.full(n * 7, -1, np.float32)
    code.run([xs, ys], {"R": n})
    want = np.full(n * 7, -1, np.float32)
    want[::7] = xs * 2
    np.testing.assert_array_equal(ys, want)


def test_pairs_are_reduced_across_the_vector(each_isa, compile_kernel) -> None:
    x, y = buffer("x", f32, (R, 2), dense_strides((R, 2))), buffer("y", f32, (R,), (1,), out=True)
    store = Store(y, (u,), Unary("sqrt", Reduce("add", "v", 2, Load(x, (u, v)))))
    code = compile_kernel(Kernel("norm", (x, y), (For("u", R, (store,), "vector"),)), each_isa)
    xs, ys = np.random.default_rng(0).random((45, 2), np.float32), np.zeros(45, np.float32)
    code.run([xs, ys], {"R": 45})
    np.testing.assert_allclose(ys, np.sqrt(xs[:, 0] + xs[:, 1]), rtol=1e-6)


@pytest.mark.parametrize("n, stride", [(1, 1), (9, 3)])
def test_scalar_iterations_run_once(each_isa, compile_kernel, n, stride) -> None:
    """What is added to memory in place is added once, also where a loop is too short or too scattered for vectors."""
    y = buffer("y", f32, (n,), (stride,), out=True)
    store = Store(y, (u,), Binary("add", Load(y, (u,)), Const(1.0, f32)))
    code = compile_kernel(
        Kernel("grow", (y,), (For("b", 1, (For("u", n, (store,), "vector"),), "parallel"),)), each_isa
    )
    ys = np.zeros(n * stride, np.float32)
    code.run([ys])
    np.testing.assert_array_equal(ys[::stride], np.ones(n, np.float32))
