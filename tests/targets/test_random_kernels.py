"""Random expressions over random layouts: generated code and the reference agree on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vivace.base.dims import Dim, floordiv, minimum, mod, symbol
from vivace.base.dtypes import DType
from vivace.loops import reference
from vivace.loops.kernel import (
    Binary,
    Buffer,
    Cast,
    Const,
    Expr,
    For,
    Index,
    Inside,
    Kernel,
    Load,
    Reduce,
    Select,
    Store,
    Unary,
)

f32, i32, flag = DType.f32, DType.i32, DType.bool
N, M, i, j = symbol("N"), symbol("M"), symbol("i"), symbol("j")
X = Buffer("x", f32, (400,), (1,))
Y = Buffer("y", i32, (400,), (1,))
OUTSIDE = st.sampled_from([0.0, 1.5])


def positions() -> st.SearchStrategy[Dim]:
    """Addresses that stay within 400 for i < 6, j < 40."""
    leaf = st.sampled_from(
        [i, j, 3 * i, 2 * j, 5, 39 - j, 40 * i + j, j + 7, floordiv(j, 3), mod(j, 4), minimum(j, i + 3)]
    )
    return st.builds(lambda a, b: a + b, leaf, st.sampled_from([0, 1, i]))


def conditions() -> st.SearchStrategy[tuple[Inside, ...]]:
    one = st.builds(Inside, positions(), st.integers(0, 9), st.sampled_from([8, 20, N, M, 60]))
    return st.lists(one, max_size=2).map(tuple)


def loads(buffer: Buffer) -> st.SearchStrategy[Expr]:
    return st.builds(Load, st.just(buffer), positions().map(lambda d: (d,)), conditions(), st.sampled_from([0, 3]))


def reduced(fn: str, var: str, e: Expr) -> Expr:
    return Reduce(fn, var, 5, Binary("sub", e, Load(X, (symbol(var) + 2 * j,))))


def floats(depth: int) -> st.SearchStrategy[Expr]:
    leaves = [loads(X), st.builds(Const, st.sampled_from([0.0, -1.25, 3.0]), st.just(f32))]
    leaves.append(st.builds(Index, positions(), st.just(f32)))
    if not depth:
        return st.one_of(leaves)
    x = st.deferred(lambda: floats(depth - 1))
    return st.one_of(
        *leaves,
        st.builds(Binary, st.sampled_from(["add", "sub", "mul", "max", "min"]), x, x),
        st.builds(Unary, st.sampled_from(["neg", "abs", "floor", "round", "sign"]), x),
        st.builds(Select, truths(depth - 1), x, x),
        st.builds(lambda e: Cast(f32, e), integers(depth - 1)),
        st.builds(reduced, st.sampled_from(["max", "min"]), st.just(f"k{depth}"), x),
    )


def integers(depth: int) -> st.SearchStrategy[Expr]:
    leaves = [loads(Y), st.builds(Const, st.integers(-5, 5), st.just(i32)), st.builds(Index, positions(), st.just(i32))]
    if not depth:
        return st.one_of(leaves)
    x = st.deferred(lambda: integers(depth - 1))
    names = ["add", "sub", "mul", "div", "mod", "max", "min", "bitand", "bitxor"]
    return st.one_of(
        *leaves, st.builds(Binary, st.sampled_from(names), x, x), st.builds(Select, truths(depth - 1), x, x)
    )


def truths(depth: int) -> st.SearchStrategy[Expr]:
    compare = st.sampled_from(["lt", "le", "eq", "ne"])
    one = st.one_of(
        st.builds(Binary, compare, floats(0), floats(0)), st.builds(Binary, compare, integers(0), integers(0))
    )
    if not depth:
        return one
    x = st.deferred(lambda: truths(depth - 1))
    return st.one_of(
        one, st.builds(Binary, st.sampled_from(["and", "or", "xor"]), x, x), st.builds(lambda e: Unary("not", e), x)
    )


@given(
    e=floats(3), rows=st.integers(1, 6), columns=st.integers(1, 40), is_static=st.booleans(), seed=st.integers(0, 99)
)
def test_random_expressions(
    compile_kernel: Callable, each_isa, e: Expr, rows: int, columns: int, is_static: bool, seed: int
) -> None:
    n, m = (rows, columns) if is_static else (N, M)
    out = Buffer("out", f32, (n, m), (m, 1), True)
    loop = For("i", n, (For("j", m, (Store(out, (i, j), e),), "vector"),), "parallel")
    kernel = Kernel("random", (X, Y, out), (loop,))
    rng = np.random.default_rng(seed)
    # Multiples of 1/4 of moderate size: no sum or product of a few of them is rounded, in any order.
    x, y = (rng.integers(-40, 40, 400) / 4).astype(np.float32), rng.integers(-9, 9, 400).astype(np.int32)
    expected, actual = np.zeros(rows * columns, np.float32), np.zeros(rows * columns, np.float32)
    dims = {"N": rows, "M": columns}
    reference.run(kernel, [x, y, expected], dims)
    compile_kernel(kernel, each_isa).run([x, y, actual], dims, n_parts=2)
    np.testing.assert_array_equal(actual, expected)
