"""Depthwise kernels against NumPy, on every instruction set that this CPU has."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest

from vivace.base.dims import Dim, evaluate, symbol
from vivace.base.dtypes import DType
from vivace.base.machine import ISAS, Isa, host, missing_flags, with_extras
from vivace.loops.contraction import Axis, Depthwise
from vivace.loops.kernel import Binary, Buffer, Cast, Const, Load, Read
from vivace.targets.cpu import jit
from vivace.targets.cpu.depthwise import emit_depthwise
from vivace.targets.cpu.depthwise_pairs import is_paired
from vivace.targets.cpu.depthwise_roll import rows_in_flight

f32 = DType.f32
UNTOUCHED = 5.0


def isas() -> list[object]:
    found = []
    for name, isa in ISAS.items():
        missing = missing_flags(host(), isa)
        found.append(pytest.param(isa, id=name, marks=pytest.mark.skipif(bool(missing), reason=f"CPU lacks {missing}")))
    return found


each_isa = pytest.mark.parametrize("isa", isas())


def rng(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def buffer(name: str, values: np.ndarray, writable: bool = False) -> Buffer:
    dtype = DType.of(values.dtype)
    return Buffer(name, dtype, values.shape, tuple(s // dtype.size_bytes for s in values.strides), writable)


def check(
    h: int,
    w: int,
    c: int,
    kh: int,
    kw: int,
    isa: Isa,
    stride: int = 1,
    dilation: int = 1,
    symbolic: str = "",
    x: np.ndarray | None = None,
    dtype: DType = f32,
    has_residual: bool = True,
) -> np.ndarray:
    """Runs `relu(depthwise(x) + bias[c] + residual)` into a channel slice of a wider buffer and compares with NumPy."""
    oh, ow = ((n - (k - 1) * dilation - 1) // stride + 1 for n, k in ((h, kh), (w, kw)))
    x = (rng(2, h, w, c) if x is None else x).astype(dtype.numpy)
    weights, bias, residual = rng(kh, kw, c), rng(c), rng(2, oh, ow, c) * has_residual
    beside_it = 32 if not has_residual else 9  # whole lines in a pixel of bf16, or not
    wide = np.full((2, oh, ow, c + beside_it), UNTOUCHED, dtype.numpy)
    out = wide[..., 4 : 4 + c]
    dims = {s: v for s, v in (("H", h), ("W", w), ("C", c)) if s in symbolic}
    dim_h: Dim = symbol("H", h) if "H" in dims else h
    dim_w: Dim = symbol("W", w) if "W" in dims else w
    dim_c: Dim = symbol("C") if "C" in dims else c
    dim_oh = (dim_h - (kh - 1) * dilation - 1) // stride + 1
    dim_ow = (dim_w - (kw - 1) * dilation - 1) // stride + 1
    beside = dim_c + beside_it
    image, row, column = symbol("image"), symbol("oh"), symbol("ow")
    extra = Buffer("residual", f32, residual.shape, (dim_oh * dim_ow * dim_c, dim_ow * dim_c, dim_c, 1))
    shift = buffer("bias", bias)
    e = Binary("add", Read("acc", f32), Load(shift, (symbol("c"),)))
    if has_residual:
        e = Binary("add", e, Load(extra, (image, row, column, symbol("c"))))
    result = Binary("max", e, Const(0.0, f32))
    d = Depthwise(
        "depthwise",
        (
            Axis("image", 2, dim_h * dim_w * dim_c, 0, dim_oh * dim_ow * beside),
            Axis("oh", dim_oh, stride * dim_w * dim_c, 0, dim_ow * beside),
            Axis("ow", dim_ow, stride * dim_c, 0, beside),
        ),
        (Axis("kh", kh, dilation * dim_w * dim_c, kw * dim_c), Axis("kw", kw, dilation * dim_c, dim_c)),
        dim_c,
        buffer("a", x),
        buffer("b", weights),
        buffer("out", out, True),
        result if dtype is f32 else Cast(dtype, result),
        (shift, extra) if has_residual else (shift,),
    )
    code = emit_depthwise(d, isa)
    library = jit.load(jit.compile_objects([code], isa, "light"))
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(
        library.address(code.name)
    )
    arrays = {d.a: x, d.b: weights, d.out: out, shift: bias, extra: residual}
    args = np.array([arrays[p].ctypes.data for p in code.params] + [dims[n] for n in code.dims], np.int64)
    units = evaluate(code.units, dims)
    for begin, end in ((0, units // 2), (units // 2, units)):
        kernel(args.ctypes.data, begin, end, None)
    expected = residual.astype(np.float64) + bias
    for i in range(kh):
        for j in range(kw):
            y, z = i * dilation, j * dilation
            part = x[:, y : y + stride * (oh - 1) + 1 : stride, z : z + stride * (ow - 1) + 1 : stride]
            expected += part.astype(np.float64) * weights[i, j]
    rtol = {DType.bf16: 2.0**-8, DType.f16: 2.0**-10}.get(dtype, 1e-5)  # a result is rounded once
    np.testing.assert_allclose(out.astype(np.float64), np.maximum(expected, 0), rtol=rtol, atol=1e-5)
    assert (wide[..., :4] == UNTOUCHED).all()
    assert (wide[..., 4 + c :] == UNTOUCHED).all()
    return out


@each_isa
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("h, w, c, k", [(9, 9, 16, 3), (12, 30, 40, 3), (9, 18, 33, 5), (8, 8, 3, 7), (5, 5, 24, 1)])
def test_depthwise(isa: Isa, h: int, w: int, c: int, k: int, stride: int, dilation: int) -> None:
    if (k - 1) * dilation >= h:
        dilation = 1
    check(h, w, c, k, k, isa, stride, dilation)


@each_isa
@pytest.mark.parametrize("symbolic", ["W", "HW", "HWC"])
def test_run_time_dims(isa: Isa, symbolic: str) -> None:
    for h, w, c in [(3, 3, 1), (10, 17, 20), (7, 26, 48)]:
        check(h, w, c, 3, 3, isa, 1, 1, symbolic)
        check(h, w, c, 3, 3, isa, 2, 1, symbolic)


@each_isa
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("h, w, k", [(9, 9, 3), (40, 17, 3), (11, 18, 5), (4, 8, 3)])
@pytest.mark.parametrize("dtype", [DType.bf16, DType.f16], ids=str)
def test_halves(isa: Isa, dtype: DType, h: int, w: int, k: int, stride: int, dilation: int) -> None:
    if (k - 1) * dilation >= h:
        dilation = 1
    check(h, w, 37, k, k, isa, stride, dilation, dtype=dtype)


@each_isa
@pytest.mark.parametrize("symbolic", ["W", "HW", "HWC"])
def test_halves_of_run_time_dims(isa: Isa, symbolic: str) -> None:
    for h, w, c in [(3, 3, 1), (31, 17, 20), (7, 26, 48)]:
        check(h, w, c, 3, 3, isa, 1, 1, symbolic, dtype=DType.bf16)
        check(h, w, c, 3, 3, isa, 2, 1, symbolic, dtype=DType.bf16)


WITH_BF16 = with_extras(ISAS["avx512"], {"avx512_bf16", "avx512_vnni"})
needs_bf16 = pytest.mark.skipif(bool(missing_flags(host(), WITH_BF16)), reason="CPU lacks AVX512-BF16")


@needs_bf16
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("h, w, k", [(9, 9, 3), (33, 17, 3), (11, 18, 5), (1, 40, 3), (5, 9, 7)])
@pytest.mark.parametrize("c", [32, 64, 101])
def test_32_channels_at_once(h: int, w: int, c: int, k: int, stride: int, dilation: int) -> None:
    if (k - 1) * dilation >= h:
        dilation = 1
    check(h, w, c, min(h, k), k, WITH_BF16, stride, dilation, dtype=DType.bf16, has_residual=False)


@needs_bf16
def test_32_channels_at_once_hand_nan_and_infinity_on() -> None:
    x = rng(2, 9, 9, 64).astype(DType.bf16.numpy)
    x[0, 4, 4, 33], x[1, 2, 3, 40] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        out = check(9, 9, 64, 3, 3, WITH_BF16, x=x, dtype=DType.bf16, has_residual=False)
    assert np.isnan(out[0, 2:5, 2:5, 33].astype(np.float32)).all() and np.isnan(out.astype(np.float32)).sum() == 9


def test_where_32_channels_are_computed_at_once() -> None:
    a, b, out = (Buffer(x, t, (0,), (1,), x == "out") for x, t in (("a", DType.bf16), ("b", f32), ("out", DType.bf16)))

    def plain(c: int, k: int) -> Depthwise:
        rows = (Axis("y", 14, 16 * c, 0, 14 * c), Axis("x", 14, c, 0, c))
        taps = (Axis("u", k, 16 * c, k * c), Axis("v", k, c, c))
        return Depthwise("depthwise", rows, taps, c, a, b, out, Cast(DType.bf16, Read("acc", f32)))

    assert [is_paired(plain(c, 3), WITH_BF16) for c in (32, 96, 144, 16)] == [True, True, False, False]
    assert is_paired(plain(144, 5), WITH_BF16) and not is_paired(plain(144, 5), ISAS["avx512"])
    # A row of 4 columns reads 6 of 32 channels, the two rows above the first as many, each once.
    text = emit_depthwise(plain(96, 3), WITH_BF16).llvm_text
    assert text.count("shl <16 x i32>") == 3 * 6 + 3 * 5 and text.count("cvtne2ps2bf16.512(<16 x float> %") == 4 + 3


def test_where_tiles_roll_each_element_is_converted_once() -> None:
    """14 output rows of 7 columns by 3x3: 9 loads for a row of 16 channels, and 18 for the two rows above the first."""
    a, b, out = (Buffer(x, t, (0,), (1,), x == "out") for x, t in (("a", DType.bf16), ("b", f32), ("out", f32)))
    rows, taps = (Axis("y", 14, 144, 0, 112), Axis("x", 7, 16, 0, 16)), (Axis("u", 3, 144, 48), Axis("v", 3, 16, 16))
    d = Depthwise("depthwise", rows, taps, 16, a, b, out)
    loads = [
        emit_depthwise(x, ISAS["avx512"]).llvm_text.count("zext <16 x i16>")
        for x in (d, replace(d, rows=rows[1:], taps=taps[1:]))
    ]
    assert loads == [9 + 18, 9]
    assert rows_in_flight(d, ISAS["avx512"]) == 3
    far = (replace(taps[0], a=288), taps[1])  # dilated: rows of two kinds, of which each serves every second one
    assert rows_in_flight(replace(d, taps=far), ISAS["avx512"]) == 0


@each_isa
def test_kernels_that_are_not_square(isa: Isa) -> None:
    check(9, 20, 24, 1, 9, isa)
    check(20, 6, 24, 9, 1, isa)
    check(1, 40, 17, 1, 31, isa)


@each_isa
def test_no_channels(isa: Isa) -> None:
    check(5, 5, 0, 3, 3, isa)
    check(5, 5, 0, 3, 3, isa, symbolic="C")


@each_isa
def test_nan_propagates(isa: Isa) -> None:
    x = rng(2, 6, 6, 20)
    clean = check(6, 6, 20, 3, 3, isa, x=x).copy()
    x[0, 2, 2, 7] = np.nan
    out = np.isnan(check_without_comparing(x, isa))
    assert out[0, :3, :3, 7].all()
    assert out.sum() == 9
    assert np.isfinite(clean).all()


def check_without_comparing(x: np.ndarray, isa: Isa) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return check(6, 6, 20, 3, 3, isa, x=x)
