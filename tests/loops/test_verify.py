"""What the verifier of the loop IR refuses, and how kernels are printed."""

from __future__ import annotations

import pytest

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.errors import GraphError
from vivace.loops.kernel import (
    Alloc,
    Binary,
    Buffer,
    Cast,
    Const,
    Fetch,
    Fma,
    For,
    Guard,
    Index,
    Inside,
    Kernel,
    Let,
    Load,
    Read,
    Reduce,
    Select,
    Store,
    Unary,
)
from vivace.loops.text import expr_text, kernel_text
from vivace.loops.verify import verify_expr, verify_kernel

f32, i64, flag = DType.f32, DType.i64, DType.bool
N, i, j, k = symbol("N"), symbol("i"), symbol("j"), symbol("k")
X = Buffer("x", f32, (N, 4), (4, 1))
OUT = Buffer("out", f32, (N, 4), (4, 1), True)
ONE = Const(1.0, f32)


def kernel(*body, params=(X, OUT)) -> Kernel:
    return Kernel("example", params, body)


def vector(*body) -> For:
    return For("j", 4, body, "vector")


PUT = Store(OUT, (0, j), ONE)
REFUSED = {
    "out is stored to|x is stored to": vector(Store(X, (0, j), ONE)),
    "is not known here": vector(Store(OUT, (0, j), Load(Buffer("y", f32, (4,), (1,)), (j,)))),
    "indexed by 1 dims": vector(Store(OUT, (j,), ONE)),
    "x: f32.* is indexed by 1 dims": vector(Fetch(X, (j,))),
    "i64 1:i64 is stored to": vector(Store(OUT, (0, j), Const(1, i64))),
    "operands .* are f32 and i64": vector(Store(OUT, (0, j), Binary("add", ONE, Const(1, i64)))),
    "condition 1.0 is f32": vector(Guard(ONE, (PUT,))),
    "unknown function sinc": vector(Store(OUT, (0, j), Unary("sinc", ONE))),
    "unknown function plus": vector(Store(OUT, (0, j), Binary("plus", ONE, ONE))),
    "unknown reduction mean": vector(Store(OUT, (0, j), Reduce("mean", "k", 3, ONE))),
    "exp of i64": vector(Let("y", Unary("exp", Const(1, i64)))),
    "neg of bool": vector(Let("y", Unary("neg", Const(True, flag)))),
    "and of f32": vector(Let("y", Binary("and", ONE, ONE))),
    "bitand of f32": vector(Let("y", Binary("bitand", ONE, ONE))),
    "add of bool": vector(Let("y", Binary("add", Const(True, flag), Const(True, flag)))),
    "parallel loop j is not at the top": For("i", 3, (For("j", 4, (PUT,), "parallel"),)),
    "cannot be written out": For("j", N, (PUT,), "unroll"),
    "bound twice": For("j", 4, (For("j", 4, (PUT,)),)),
    "y is read as f32": vector(Store(OUT, (0, j), Read("y", f32))),
    "has no static size": Alloc(Buffer("t", f32, (N,), (1,))),
    "stands inside vector loop": vector(Alloc(Buffer("t", f32, (3,), (1,)))),
    "store to one element": vector(Store(OUT, (0, 1), ONE)),
    "extent of loop i varies": vector(For("i", j, (PUT,))),
    "extent j of reduction k varies": vector(Store(OUT, (0, j), Reduce("add", "k", j, ONE))),
    "y is f32 and stands in index y": vector(Let("y", ONE), Store(OUT, (0, symbol("y")), ONE)),
    "strides": Alloc(Buffer("t", f32, (3,), (1, 1))),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_breaks_a_rule_is_refused(message: str) -> None:
    with pytest.raises(GraphError, match=message) as e:
        verify_kernel(kernel(REFUSED[message]))
    assert "kernel example" in str(e.value)


def test_two_parameters_of_one_name_are_refused() -> None:
    with pytest.raises(GraphError, match="two parameters have one name"):
        verify_kernel(kernel(PUT, params=(X, Buffer("x", f32, (1,), (1,)))))


def test_a_let_ends_with_its_block() -> None:
    with pytest.raises(GraphError, match="y is read as f32"):
        verify_kernel(kernel(For("i", 2, (Let("y", ONE),)), vector(Store(OUT, (0, j), Read("y", f32)))))


def test_names_may_be_used_again_in_another_block() -> None:
    block = (Let("y", ONE), vector(Store(OUT, (0, j), Read("y", f32))))
    verify_kernel(kernel(For("i", 2, block), For("i", 2, block)))


def test_an_epilogue_reads_its_accumulator() -> None:
    e = Binary("max", Binary("add", Read("acc", f32), Load(X, (0, symbol("n")))), Const(0.0, f32))
    assert verify_expr(e, (X,), {"acc": f32}, "epilogue") is f32
    with pytest.raises(GraphError, match="acc is read"):
        verify_expr(e, (X,), {}, "epilogue")


def test_multiply_adds_are_of_f32() -> None:
    assert verify_expr(Fma(ONE, ONE, ONE), (), {}, "epilogue") is f32
    with pytest.raises(GraphError, match="is i64"):
        verify_expr(Fma(ONE, ONE, Const(2, i64)), (), {}, "epilogue")
    assert expr_text(Fma(ONE, Unary("neg", ONE), ONE)) == "fma(1.0, neg(1.0), 1.0)"


def test_kernels_are_printed_as_they_are_read() -> None:
    ids = Buffer("ids", i64, (N,), (1,))
    local = Buffer("local", f32, (4,), (1,))
    inside = Load(X, (symbol("row"), j - 1), (Inside(j - 1, 0, 4),), -1.0)
    body = (
        Alloc(local),
        Let("row", Load(ids, (i,))),
        Let("top", Reduce("max", "k", 4, Load(X, (symbol("row"), k)))),
        vector(Store(local, (j,), Binary("mul", Unary("exp", Binary("sub", inside, Read("top", f32))), ONE))),
        Guard(
            Binary("lt", Read("row", i64), Const(2, i64)),
            (
                For(
                    "j",
                    4,
                    (Store(OUT, (i, j), Select(Const(True, flag), Load(local, (j,)), Cast(f32, Index(i)))),),
                    "unroll",
                ),
            ),
        ),
    )
    example = kernel(For("i", N, body, "parallel"), params=(X, ids, OUT))
    verify_kernel(example)
    assert (
        kernel_text(example)
        == """\
kernel example(x: f32[N,4], ids: i64[N], out out: f32[N,4])
  parallel i in N:
    alloc local: f32[4]
    let row = ids[i]
    let top = max(k in 4: x[row, k])
    vector j in 4:
      local[j] = exp((x[row, j-1] if 0 <= j-1 < 4 else -1.0) - top) * 1.0
    if row < 2:i64:
      unroll j in 4:
        out[i, j] = local[j] if True else f32(i64(i))
"""
    )


def test_strides_are_printed_where_they_are_unusual() -> None:
    assert "strides (1, N)" in kernel_text(kernel(params=(Buffer("t", f32, (N, 4), (1, N)),)))
    assert expr_text(Binary("pow", ONE, Unary("neg", ONE))) == "pow(1.0, neg(1.0))"
