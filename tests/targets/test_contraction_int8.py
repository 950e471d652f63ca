"""Products and convolutions of bytes: equal to the reference to the last bit, on extreme values, with every
instruction set and extra that this CPU has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.targets.low_precision import Case, buffer, convolution, depthwise, isas, product, run_code

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.errors import InternalError, UnsupportedError
from vivace.base.machine import ISAS, Isa, isa
from vivace.graph.ops.quantized import RANGES
from vivace.loops.contraction import Contraction, Packing
from vivace.loops.kernel import Binary, Cast, Const, Expr, For, Kernel, Load, Lookup, Store
from vivace.lower.arithmetic import activation_offset, choose_arithmetic, depthwise_offset
from vivace.lower.pack import pack_groups
from vivace.lower.requantize import ACC, requantize
from vivace.lower.tile import choose_tile
from vivace.targets.cpu.contraction_epilogue import makes_bytes
from vivace.targets.cpu.llvm import emit_kernel

each_isa = pytest.mark.parametrize(
    "target", isas("sse", "avx2", "avx2+avx_vnni", "avx512", "avx512+avx512_vnni", "avx512+avx512_vnni+avx512vbmi")
)
SIGNED, UNSIGNED = np.int8, np.uint8


def numbers(seed: int, dtype: type, *shape: int) -> np.ndarray:
    """Random bytes, half of them extreme."""
    random = np.random.default_rng(seed)
    limits = np.iinfo(dtype)
    anything = random.integers(limits.min, limits.max + 1, shape)
    extremes = random.choice([limits.min, limits.max], shape)
    return np.where(random.random(shape) < 0.5, anything, extremes).astype(dtype)


def check(case: Case, target: Isa) -> None:
    np.testing.assert_array_equal(case.run(target), case.expected)


def wanted_offset(a: np.ndarray, b: np.ndarray, target: Isa) -> int:
    c = product(a, b, np.int32, isa("sse")).c
    assert isinstance(c, Contraction)
    return activation_offset(c, target)


@each_isa
@pytest.mark.parametrize("a_dtype", [UNSIGNED, SIGNED])
@pytest.mark.parametrize("offset", [0, 128])
@pytest.mark.parametrize(
    "m, k, n",
    [(1, 1, 1), (1, 64, 96), (3, 17, 33), (14, 16, 32), (29, 42, 48), (49, 35, 100), (61, 128, 16), (5, 3, 7)],
)
def test_product(target: Isa, a_dtype: type, offset: int, m: int, k: int, n: int) -> None:
    if a_dtype is UNSIGNED and offset:
        pytest.skip("only i8 takes an offset")
    check(product(numbers(1, a_dtype, 2, m, k), numbers(2, SIGNED, 2, k, n), np.int32, target, offset), target)


@each_isa
@pytest.mark.parametrize("a, b", [(0, -128), (255, -128), (255, 127), (-128, -128), (-128, 127), (127, -128)])
def test_extremes_do_not_saturate(target: Isa, a: int, b: int) -> None:
    a_dtype = SIGNED if a in (-128, 127) else UNSIGNED
    left, right = np.full((1, 20, 515), a, a_dtype), np.full((1, 515, 40), b, SIGNED)
    check(product(left, right, np.int32, target), target)
    if a_dtype is SIGNED:
        check(product(left, right, np.int32, target, wanted_offset(left, right, target)), target)


@each_isa
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize(
    "size, ci, co, k, stride",
    [(9, 8, 32, 3, 1), (7, 16, 48, 1, 1), (15, 3, 33, 7, 2), (9, 5, 1, 3, 1), (30, 3, 20, 3, 2)],
)
def test_convolution(target: Isa, symbolic: bool, size: int, ci: int, co: int, k: int, stride: int) -> None:
    x, w = numbers(3, UNSIGNED, 2, size, size, ci), numbers(4, SIGNED, k, k, ci, co)
    check(convolution(x, w, stride, np.int32, target, symbolic=symbolic), target)


@each_isa
def test_rows_at_run_time(target: Isa) -> None:
    for m in (1, 2, 31, 75):
        a, b = numbers(m, SIGNED, 2, m, 30), numbers(5, SIGNED, 2, 30, 70)
        check(product(a, b, np.int32, target, wanted_offset(a, b, target), symbolic=True), target)


@each_isa
def test_passes_and_staged_rows(target: Isa) -> None:
    case = product(numbers(1, UNSIGNED, 1, 45, 96), numbers(2, SIGNED, 1, 96, 70), np.int32, target)
    for tiles, panels, k_block in ((2, 1, 16), (1, 3, 48), (100, 100, 32)):
        plan = choose_tile(case.c, target)  # type: ignore[arg-type]
        case.tile = replace(plan, k_block=k_block, tiles_per_unit=tiles, panels_per_unit=panels)
        check(case, target)
    case = product(numbers(1, UNSIGNED, 1, 45, 99), numbers(2, SIGNED, 1, 99, 70), np.int32, target)
    case.tile = replace(choose_tile(case.c, target), stage_a=True, rows_outer=True)  # type: ignore[arg-type]
    check(case, target)


def quantized(case: Case, out: DType, zero_point: int, per_channel: bool, is_bounded: bool = False) -> np.ndarray:
    """Gives the case a requantizing epilogue with bias and the output that ONNX defines."""
    n = case.expected.shape[-1]
    random = np.random.default_rng(n)
    bias = random.integers(-(2**20), 2**20, n, dtype=np.int32)
    scale = (random.random(n if per_channel else 1) * 2e-3).astype(np.float32)
    bias_buffer, scale_buffer = buffer("bias", bias), buffer("scale", scale)
    at = symbol("n")
    total = Binary("add", ACC, Load(bias_buffer, (at,)))
    e = requantize(total, Load(scale_buffer, (at if per_channel else 0,)), zero_point, out, is_bounded=is_bounded)
    case.c = replace(case.c, epilogue=e, extra=(bias_buffer, scale_buffer))
    case.arrays |= {bias_buffer: bias, scale_buffer: scale}
    limits = np.iinfo(out.numpy)
    scaled = (case.expected.astype(np.int32) + bias).astype(np.float32) * scale
    return np.clip(np.round(scaled) + np.float32(zero_point), limits.min, limits.max).astype(out.numpy)


@each_isa
@pytest.mark.parametrize("per_channel, is_bounded", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("out, zero_point", [(DType.u8, 0), (DType.u8, 131), (DType.i8, 0), (DType.i8, -77)])
def test_requantization_is_exact(target: Isa, per_channel: bool, is_bounded: bool, out: DType, zero_point: int) -> None:
    a, b = numbers(1, UNSIGNED, 2, 37, 64), numbers(2, SIGNED, 2, 64, 75)
    case = product(a, b, out.numpy.type, target)
    expected = quantized(case, out, zero_point, per_channel, is_bounded)
    np.testing.assert_array_equal(case.run(target), expected)
    case.tile = replace(choose_tile(case.c, target), k_block=16)  # type: ignore[arg-type]
    np.testing.assert_array_equal(case.run(target), expected)


@each_isa
def test_halves_round_to_even_and_huge_sums_saturate(target: Isa) -> None:
    a = np.arange(-128, 128).astype(SIGNED).reshape(1, 256, 1)
    case = product(a, np.ones((1, 1, 8), SIGNED), np.uint8, target)
    case.c = replace(case.c, epilogue=requantize(ACC, Load(_scale(case, 0.5), (0,)), 3, DType.u8), extra=(_last(case),))
    expected = np.clip(np.round(a[..., 0] * np.float32(0.5)) + 3, 0, 255).astype(UNSIGNED)
    np.testing.assert_array_equal(case.run(target), np.repeat(expected[..., None], 8, -1))
    case = product(a, np.ones((1, 1, 8), SIGNED), np.int8, target)
    case.c = replace(
        case.c, epilogue=requantize(ACC, Load(_scale(case, 1e30), (0,)), 3, DType.i8), extra=(_last(case),)
    )
    expected = np.where(a[..., 0] > 0, 127, np.where(a[..., 0] < 0, -128, 3)).astype(SIGNED)
    np.testing.assert_array_equal(case.run(target), np.repeat(expected[..., None], 8, -1))


def _scale(case: Case, value: float) -> object:
    scale = np.full(1, value, np.float32)
    case.arrays[buffer("scale", scale)] = scale
    return _last(case)


def _last(case: Case) -> object:
    return list(case.arrays)[-1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 80), st.sampled_from([SIGNED, UNSIGNED]), st.data())
def test_random_shapes(m: int, k: int, n: int, a_dtype: type, data: st.DataObject) -> None:
    target = data.draw(
        st.sampled_from([p.values[0] for p in isas(*ISAS, "avx512+avx512_vnni") if not p.marks[0].args[0]])
    )  # type: ignore[attr-defined]
    a, b = numbers(m, a_dtype, 1, m, k), numbers(n, SIGNED, 1, k, n)
    check(product(a, b, np.int32, target, wanted_offset(a, b, target)), target)


def test_runs_are_filled_up_to_whole_groups() -> None:
    b = numbers(6, SIGNED, 2, 6, 5)
    packed = pack_groups(b, 4, 4, 3)
    assert packed.shape == (2, 2, 2, 4, 4) and packed.ctypes.data % 64 == 0
    for run in range(2):
        np.testing.assert_array_equal(packed[:, 0, run, :, :3], b[:, run * 3 : run * 3 + 3, :4].transpose(0, 2, 1))
    assert (packed[..., 3] == 0).all() and (packed[:, 1, :, 1:] == 0).all()


def test_the_arithmetic_follows_the_instruction_set() -> None:
    def kind(name: str, offset: int = 0) -> str:
        return choose_arithmetic(DType.i8, DType.i8, isa(name), offset).kind

    assert [kind("avx2"), kind("avx512+avx512_vnni"), kind("avx512+avx512_vnni", 128)] == ["wide8", "wide8", "dot8"]
    assert kind("avx512+amx_int8+amx_tile") == "tile8"
    a, b, few = numbers(1, SIGNED, 1, 20, 64), numbers(2, SIGNED, 1, 64, 32), numbers(3, SIGNED, 1, 3, 64)
    assert [wanted_offset(a, b, isa(x)) for x in ("avx2", "avx2+avx_vnni")] == [0, 128]
    tiles = isa("avx512+amx_int8+amx_tile+avx512_vnni")
    assert [wanted_offset(x, b, tiles) for x in (a, few)] == [0, 128]  # too few rows for tiles


def test_what_has_no_kernel_is_refused() -> None:
    case = product(numbers(1, UNSIGNED, 1, 4, 8), numbers(2, SIGNED, 1, 8, 8), np.int32, isa("avx2"))
    with pytest.raises(UnsupportedError, match="as it lies"):
        replace(case, c=replace(case.c, packing=Packing("plain"))).code(isa("avx2"))
    with pytest.raises(InternalError, match="offset"):
        replace(case, c=replace(case.c, a_offset=128)).code(isa("avx2"))
    with pytest.raises(UnsupportedError, match="products of i16"):
        choose_arithmetic(DType.i16, DType.i8, isa("avx2"))


@each_isa
@pytest.mark.parametrize("a_dtype, b_dtype", [(UNSIGNED, SIGNED), (SIGNED, SIGNED), (UNSIGNED, UNSIGNED)])
@pytest.mark.parametrize("size, channels, k, stride", [(9, 32, 3, 1), (10, 33, 3, 2), (12, 7, 5, 1), (14, 20, 9, 1)])
def test_depthwise(target: Isa, a_dtype: type, b_dtype: type, size: int, channels: int, k: int, stride: int) -> None:
    x, w = numbers(7, a_dtype, 2, size, size, channels), numbers(8, b_dtype, k, k, channels)
    check(depthwise(x, w, stride, np.int32), target)


@each_isa
@pytest.mark.parametrize("a_dtype", [SIGNED, UNSIGNED])
@pytest.mark.parametrize(
    "size, channels, k, stride, out, is_bounded",
    [
        (9, 45, 3, 1, DType.u8, False),
        (9, 64, 3, 1, DType.u8, True),
        (12, 150, 3, 2, DType.i8, True),
        (15, 192, 5, 1, DType.u8, False),
        (17, 131, 5, 2, DType.u8, True),
        (14, 80, 8, 1, DType.i8, False),
        (12, 64, 9, 1, DType.u8, True),
    ],
)
@pytest.mark.parametrize("has_table", [False, True])
def test_depthwise_requantizes(
    target: Isa, a_dtype: type, size: int, channels: int, k: int, stride: int, out: DType, is_bounded: bool,
    has_table: bool,
) -> None:  # fmt: skip
    x, w = numbers(7, a_dtype, 1, size, size, channels), numbers(8, SIGNED, k, k, channels)
    case = depthwise(x, w, stride, out.numpy, depthwise_offset(DType.of(np.dtype(a_dtype)), target))
    random = np.random.default_rng(0)
    scale, bias = random.random(channels).astype(np.float32) / 100, random.integers(-(2**15), 2**15, channels)
    bias = bias.astype(np.int32)
    scale_buffer, bias_buffer = buffer("scale", scale), buffer("bias", bias)
    case.arrays |= {scale_buffer: scale, bias_buffer: bias}
    total = Binary("add", Load(bias_buffer, (symbol("c"),)), ACC)
    zero = 99 if out is DType.u8 else -20
    e: Expr = requantize(total, Load(scale_buffer, (symbol("c"),)), zero, out, is_bounded=is_bounded)
    table = random.integers(0, 256, 256).astype(np.uint8)
    if has_table:
        e = Lookup(table.tobytes(), out, e)
    case.c = replace(case.c, epilogue=e, extra=(scale_buffer, bias_buffer))
    sums = (case.expected + bias).astype(np.float32)
    low, high = RANGES[out]
    expected = np.clip(np.round(sums * scale) + zero, low, high).astype(out.numpy)
    if has_table:
        expected = table.view(out.numpy)[expected.astype(np.uint8)]
    np.testing.assert_array_equal(case.run(target), expected)


@each_isa
@pytest.mark.parametrize("a, b", [(0, -128), (255, -128), (255, 127)])
def test_depthwise_extremes_do_not_saturate(target: Isa, a: int, b: int) -> None:
    x, w = np.full((1, 9, 9, 96), a, UNSIGNED), np.full((5, 5, 96), b, SIGNED)
    case = depthwise(x, w, 1, UNSIGNED)
    e = requantize(ACC, Const(0.0005, DType.f32), 3, DType.u8, is_bounded=True)
    case.c = replace(case.c, epilogue=e)
    expected = np.clip(np.round(case.expected.astype(np.float32) * np.float32(0.0005)) + 3, 0, 255).astype(UNSIGNED)
    np.testing.assert_array_equal(case.run(target), expected)


@each_isa
@pytest.mark.parametrize("dtype", [UNSIGNED, SIGNED])
@pytest.mark.parametrize("n", [1, 15, 64, 100, 1000])
def test_tables_look_bytes_up(target: Isa, dtype: type, n: int) -> None:
    x, table = numbers(3, dtype, n), np.random.default_rng(n).integers(0, 256, 256).astype(np.uint8)
    a, out = buffer("a", x), buffer("out", np.zeros(n, UNSIGNED), True)
    value = Lookup(
        table.tobytes(), DType.u8, Lookup(table.tobytes(), DType.of(np.dtype(dtype)), Load(a, (symbol("i"),)))
    )
    loop = For("b", 1, (For("i", n, (Store(out, (symbol("i"),), value),), "vector"),), "parallel")
    kernel = Kernel("look_up", (a, out), (loop,))
    arrays = {a: x, out: np.zeros(n, UNSIGNED)}
    run_code(emit_kernel(kernel, target), target, arrays, {})
    np.testing.assert_array_equal(arrays[out], table[table[x.view(np.uint8)]])


@pytest.mark.parametrize("dtype", [DType.u8, DType.i8])
@pytest.mark.parametrize("is_bounded", [False, True])
@pytest.mark.parametrize("narrower", [False, True])
def test_only_limited_sums_are_packed(dtype: DType, is_bounded: bool, narrower: bool) -> None:
    """Packing saturates: it makes the bytes of what is clipped to their limits or less, and of no other cast."""
    lo, hi = (3, 90) if narrower else (None, None)
    assert makes_bytes(requantize(ACC, Const(0.1, DType.f32), 7, dtype, lo, hi, is_bounded))
    other = DType.i8 if dtype is DType.u8 else DType.u8
    assert not makes_bytes(Cast(dtype, ACC))
    wrong = requantize(ACC, Const(0.1, DType.f32), 7, other, None, None, True)
    assert isinstance(wrong, Cast) and not makes_bytes(Cast(dtype, wrong.x))
