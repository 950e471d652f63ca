"""The reference interpreter itself, against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.errors import InternalError
from vivace.loops import reference
from vivace.loops.contraction import Axis, Contraction, Depthwise, Packing
from vivace.loops.contraction_reference import run_contraction, run_depthwise
from vivace.loops.kernel import (
    Binary,
    Buffer,
    Cast,
    Const,
    Fma,
    For,
    Kernel,
    Load,
    Read,
    Reduce,
    Store,
    Unary,
    dense_strides,
)

f32, i32 = DType.f32, DType.i32
N, i, j, k = symbol("N"), symbol("i"), symbol("j"), symbol("k")
RNG = np.random.default_rng(0)


def buffer(name: str, *shape, out: bool = False) -> Buffer:
    return Buffer(name, f32, shape, dense_strides(shape), out)


def numbers(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def test_a_matrix_product_in_every_loop_kind() -> None:
    a, b, out = buffer("a", 3, N), buffer("b", N, 5), buffer("out", 3, 5, out=True)
    dot = Reduce("add", "k", N, Binary("mul", Load(a, (i, k)), Load(b, (k, j))))
    x, y = numbers(3, 7), numbers(7, 5)
    for outer in ("parallel", "serial"):
        for inner in ("vector", "serial", "unroll"):
            loop = For("i", 3, (For("j", 5, (Store(out, (i, j), dot),), inner),), outer)
            result = np.zeros(15, np.float32)
            reference.run(Kernel("product", (a, b, out), (loop,)), [x.ravel(), y.ravel(), result], {"N": 7})
            np.testing.assert_allclose(result.reshape(3, 5), x @ y, rtol=1e-5)


@pytest.mark.parametrize("index", [i + 1, i - 1])
def test_an_access_outside_is_found(index) -> None:
    x, out = buffer("x", N), buffer("out", N, out=True)
    kernel = Kernel("outside", (x, out), (For("i", N, (Store(out, (i,), Load(x, (index,))),)),))
    with pytest.raises(InternalError, match="is outside axis 0 of x"):
        reference.run(kernel, [numbers(4), numbers(4)], {"N": 4})


def test_integers_divide_as_c_does_and_wrap() -> None:
    a, b = np.array([7, -7, 7, -7, 5, -(2**31)], np.int32), np.array([2, 2, -2, -2, 0, -1], np.int32)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(reference.binary("div", a, b, i32), [3, -3, -3, 3, 0, -(2**31)])
        np.testing.assert_array_equal(reference.binary("mod", a, b, i32), [1, 1, -1, -1, 0, 0])
        np.testing.assert_array_equal(reference.binary("fmod", a, b, i32), [1, -1, 1, -1, 0, 0])


def test_halves_are_rounded_when_cast_and_not_between() -> None:
    x = np.array([1.0], np.float32)
    tiny = Binary("add", Const(1.0, DType.bf16), Const(2.0**-10, DType.bf16))
    value = reference.value_of(Binary("sub", tiny, Const(1.0, DType.bf16)), {}, {})
    assert value == 2.0**-10
    assert reference.value_of(Cast(DType.bf16, tiny), {}, {}) == 1
    assert x.dtype == reference.computed_dtype(DType.bf16)


def test_multiply_add_rounds_once() -> None:
    """1 + 2**-30 as a product; and a sum that f64 would round to just between two numbers of f32."""
    a, b = np.float32(1 + 2**-15), np.float32(1 - 2**-15)
    e = Fma(Read("a", f32), Read("b", f32), Read("c", f32))
    assert reference.value_of(e, {}, {}, {"a": a, "b": b, "c": np.float32(-1)}) == -(2.0**-30)
    tie = {"a": np.float32(2.0**-30), "b": np.float32(2.0**-30), "c": np.float32(1)}
    assert reference.value_of(e, {}, {}, tie) == 1
    above = {"a": np.float32(1 + 2**-23), "b": np.float32(2.0**-24), "c": np.float32(1)}
    assert reference.value_of(e, {}, {}, above) == np.float32(1 + 2**-23)


def test_an_expression_over_index_arrays() -> None:
    x = buffer("x", 4, 5)
    values = numbers(4, 5)
    rows, columns = np.ogrid[:4, :5]
    e = Unary("neg", Binary("add", Load(x, (i, j)), Read("acc", f32)))
    result = reference.value_of(e, {x: values.ravel()}, {"i": rows, "j": columns}, {"acc": np.float32(1)})
    np.testing.assert_array_equal(result, -(values + 1))


@pytest.mark.parametrize("kind", ["panels", "plain", "transposed"])
def test_contraction(kind: str) -> None:
    heads, m, n, depth, lanes = 2, 3, 5, 4, 4
    a, b = numbers(heads, m, depth), numbers(heads, depth, n)
    if kind == "panels":
        padded = np.zeros((heads, depth, 8), np.float32)
        padded[..., :n] = b
        stored = np.ascontiguousarray(padded.reshape(heads, depth, 2, lanes).transpose(0, 2, 1, 3))
        strides, packing = (1, lanes), Packing("panels", lanes)
    elif kind == "plain":
        stored, strides, packing = b, (depth * n, n), Packing("plain")
    else:
        stored = np.ascontiguousarray(b.transpose(0, 2, 1))
        strides, packing = (depth * n, 1), Packing("transposed", 0, depth)
    A, B, bias = buffer("a", *a.shape), buffer("b", *stored.shape), buffer("bias", n)
    out = buffer("out", heads, m, n, out=True)
    c = Contraction(
        "product",
        (Axis("h", heads, m * depth, strides[0], m * n),),
        (Axis("m", m, depth, 0, n),),
        (Axis("k", depth, 1, strides[1], 0),),
        n,
        A,
        B,
        out,
        packing,
        Binary("max", Binary("add", Read("acc", f32), Load(bias, (symbol("n"),))), Const(0.0, f32)),
        (bias,),
    )
    result, add = np.zeros(out.shape, np.float32), numbers(n)
    run_contraction(c, {A: a.ravel(), B: stored.ravel(), bias: add, out: result.ravel()})
    np.testing.assert_allclose(result, np.maximum(a @ b + add, 0), rtol=1e-5, atol=1e-6)


def test_depthwise() -> None:
    height, width, channels = 4, 5, 6
    x, w = numbers(height + 2, width + 2, channels), numbers(3, 3, channels)
    A, B, out = buffer("a", *x.shape), buffer("b", *w.shape), buffer("out", height, width, channels, out=True)
    row = (width + 2) * channels
    d = Depthwise(
        "depthwise",
        (Axis("y", height, row, 0, width * channels), Axis("x", width, channels, 0, channels)),
        (Axis("p", 3, row, 3 * channels), Axis("q", 3, channels, channels)),
        channels,
        A,
        B,
        out,
    )
    result = np.zeros(out.shape, np.float32)
    run_depthwise(d, {A: x.ravel(), B: w.ravel(), out: result.ravel()})
    expected = sum(x[p : p + height, q : q + width] * w[p, q] for p in range(3) for q in range(3))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
