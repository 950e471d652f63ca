"""Products with block-wise weights of 4 and 8 bits, in registers and through f32 panels, against NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from benchmarks import block_products
from tests import tolerance
from tests.targets.low_precision import UNTOUCHED, at_page_end, buffer, isas, run_code

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.base.machine import Isa, isa
from vivace.loops.blockwise import MOST_DIRECT_ROWS, BlockwiseProduct
from vivace.loops.contraction import Axis
from vivace.loops.digits import LONG_AT, Digits
from vivace.loops.kernel import Binary, Buffer, Load, Read
from vivace.lower.pack_blockwise import blockwise_lanes, pack_blockwise
from vivace.targets.cpu.blockwise import emit_blockwise
from vivace.targets.cpu.digits import emit_digits

each_isa = pytest.mark.parametrize("target", isas("sse", "avx2", "avx2+avx_vnni", "avx512", "avx512+avx512_vnni"))


def run(w: BlockwiseProduct, target: Isa, arrays: dict[Buffer, np.ndarray], dims: dict[str, int]) -> np.ndarray:
    """The product, after the digits of its rows where the instruction set has their dot product; returns these."""
    digits = np.empty(0, np.uint8)
    if "_vnni" in target.name and w.block % target.n_f32_lanes == 0:
        digits = np.full(w.digit_rows.n_bytes(MOST_DIRECT_ROWS), 85, np.uint8)
        made = buffer("digits", digits, True)
        rounded = w.digit_rows.rounded
        step = Digits("digits", w.m.extent, w.m.a, w.k, w.block, w.center, MOST_DIRECT_ROWS, rounded, w.a, made)
        run_code(emit_digits(step, target), target, {w.a: arrays[w.a], made: digits}, dims)
        w = replace(w, digits=buffer("digits", digits))
        assert w.digits is not None
        arrays = arrays | {w.digits: digits}
    run_code(emit_blockwise(w, target), target, arrays, dims)
    return digits


def check(
    target: Isa, m: int, k: int, n: int, bits: int, block: int, zero_points: bool, symbolic: bool = False,
    scale_dtype: type = np.float32,
) -> None:  # fmt: skip
    random = np.random.default_rng(m * k * n)
    n_blocks, lanes = -(-k // block), blockwise_lanes(target)
    q = random.integers(0, 1 << bits, (k, n)).astype(np.uint8)
    scales = random.standard_normal((n_blocks, n)).astype(scale_dtype)
    points = random.integers(0, 1 << bits, (n_blocks, n)).astype(np.uint8) if zero_points else None
    packed = pack_blockwise(q, scales, points, bits, block, target)
    a = at_page_end(random.standard_normal((m, k), dtype=np.float32))
    bias, out = random.standard_normal(n, dtype=np.float32), np.full((m, n + 3), UNTOUCHED, np.float32)
    dim_m: Dim = symbol("M") if symbolic else m
    buffers = [buffer("a", a), buffer("b", packed.b), buffer("scales", packed.scales), buffer("bias", bias)]
    shifts = None if packed.shifts is None else buffer("shifts", packed.shifts)
    a_buffer, b_buffer, scale_buffer, bias_buffer = buffers
    out_buffer = buffer("out", out, True)
    e = Binary("add", Read("acc", DType.f32), Load(bias_buffer, (symbol("n"),)))
    w = BlockwiseProduct(
        "blocks", Axis("m", dim_m, k, 0, n + 3), k, n, bits, block, lanes, a_buffer, b_buffer, scale_buffer, shifts,
        out_buffer, e, (bias_buffer,),
    )  # fmt: skip
    arrays = dict(zip(buffers, (a, packed.b, packed.scales, bias))) | {out_buffer: out}
    if shifts is not None:
        arrays[shifts] = packed.shifts  # type: ignore[assignment]
    run(w, target, arrays, {"M": m} if symbolic else {})
    center = (1 << (bits - 1)) if points is None else np.repeat(points.astype(np.float64), block, 0)[:k]
    weights = (q.astype(np.float64) - center) * np.repeat(scales.astype(np.float64), block, 0)[:k]
    expected = a.astype(np.float64) @ weights + bias
    size = np.abs(a).astype(np.float64) @ (
        np.abs(weights) + np.repeat(np.abs(scales.astype(np.float64)), block, 0)[:k] * (1 << bits)
    )
    assert (np.abs(out[:, :n] - expected) <= size * 2e-6 + 1e-5).all()
    assert (out[:, n:] == UNTOUCHED).all()


@each_isa
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("m, k, n, block", [(1, 64, 64, 32), (1, 96, 130, 32), (2, 256, 70, 128), (3, 77, 33, 16)])
def test_few_rows(target: Isa, bits: int, zero_points: bool, m: int, k: int, n: int, block: int) -> None:
    check(target, m, k, n, bits, block, zero_points)


@each_isa
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("m, k, n, block", [(5, 64, 64, 32), (33, 77, 130, 16)])
def test_many_rows(target: Isa, bits: int, zero_points: bool, m: int, k: int, n: int, block: int) -> None:
    check(target, m, k, n, bits, block, zero_points)


@each_isa
def test_rows_at_run_time(target: Isa) -> None:
    for m in (0, 1, 2, 4, 5, 40):
        check(target, m, 64, 150, 4, 32, True, symbolic=True)


@each_isa
@pytest.mark.parametrize("outlier", [1e3, 1e4, -3e6])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_outlier_does_not_hide_its_neighbours(target: Isa, outlier: float, bits: int) -> None:
    """Where the weight of an element that is much larger than its block's others is 0, these are summed as in f32."""
    k, n, block, lanes, center = 512, 64, 32, blockwise_lanes(target), 1 << (bits - 1)
    random = np.random.default_rng(0)
    q = random.integers(0, 1 << bits, (k, n)).astype(np.uint8)
    scales = random.uniform(0.5, 1.5, (k // block, n)).astype(np.float32)
    a = random.standard_normal((1, k), dtype=np.float32)
    a[:, 7::block], q[7::block] = outlier, center
    packed, out = pack_blockwise(q, scales, None, bits, block, target), np.empty((1, n), np.float32)
    arrays = {"a": a, "b": packed.b, "scales": packed.scales, "out": out}
    buffers = {name: buffer(name, x, name == "out") for name, x in arrays.items()}
    w = BlockwiseProduct("blocks", Axis("m", 1, k, 0, n), k, n, bits, block, lanes, buffers["a"], buffers["b"],
                         buffers["scales"], None, buffers["out"])  # fmt: skip
    run(w, target, {buffers[name]: x for name, x in arrays.items()}, {})
    weights = (q.astype(np.float64) - center) * np.repeat(scales.astype(np.float64), block, 0)
    error = np.abs(out - a.astype(np.float64) @ weights) / (np.abs(a) @ np.abs(weights))
    assert error.max() < 2e-6


def test_most_blocks_have_few_digits() -> None:
    """A block of elements of many sizes has one more, and a row that this is not enough for has none."""
    target, k, n, block = isa("avx512+avx512_vnni"), 576, 64, 32
    random = np.random.default_rng(0)
    a = random.standard_normal((4, k), dtype=np.float32)
    a[1, :16] *= 2.0**-10
    a[2, :16] *= 2.0**-18
    a[3] *= np.exp(random.standard_normal(k) * 3).astype(np.float32)
    q = random.integers(0, 16, (k, n)).astype(np.uint8)
    scales = random.uniform(0.5, 1.5, (k // block, n)).astype(np.float32)
    weights = (q.astype(np.float64) - 8) * np.repeat(scales.astype(np.float64), block, 0)
    packed, out = pack_blockwise(q, scales, None, 4, block, target), np.empty((4, n), np.float32)
    arrays = {"a": a, "b": packed.b, "scales": packed.scales, "out": out}
    buffers = {name: buffer(name, x, name == "out") for name, x in arrays.items()}
    w = BlockwiseProduct("blocks", Axis("m", 4, k, 0, n), k, n, 4, block, 64, buffers["a"], buffers["b"],
                         buffers["scales"], None, buffers["out"])  # fmt: skip
    digits = run(w, target, {buffers[name]: x for name, x in arrays.items()}, {})
    flags = digits[w.digit_rows.records_at(MOST_DIRECT_ROWS) :].view(np.int32).reshape(4, -1, 8)[..., LONG_AT // 4]
    assert [list(row[:2]) for row in flags[:3]] == [[0, 0], [1, 0], [-1, 0]]
    assert 0 < flags[3].mean() < 1
    bound = tolerance.of_block_product(a, weights, w.digit_rows)
    assert not tolerance.agree(out, a.astype(np.float64) @ weights, bound)


@pytest.mark.parametrize("rounded", [DType.f32, DType.f16, DType.bf16, DType.i8])
@pytest.mark.parametrize("bits, points", [(4, True), (8, False)])
def test_rows_are_rounded_no_further_than_they_may_be(rounded: DType, bits: int, points: bool) -> None:
    target, m, k, n, block = isa("avx512+avx512_vnni"), 3, 300, 70, 32
    random, n_blocks = np.random.default_rng(bits), -(-300 // 32)
    a = (random.standard_normal((m, k)) * np.exp(random.standard_normal((m, k)))).astype(np.float32)
    q = random.integers(0, 1 << bits, (k, n)).astype(np.uint8)
    scales = random.uniform(0.5, 1.5, (n_blocks, n)).astype(np.float32)
    zero = random.integers(0, 1 << bits, (n_blocks, n)) if points else np.full((n_blocks, n), 1 << (bits - 1))
    spread = [np.repeat(x.astype(np.float64), block, 0)[:k] for x in (zero, scales)]
    weights = (q - spread[0]) * spread[1]
    packed = pack_blockwise(q, scales, zero.astype(np.float32), bits, block, target)
    arrays = {"a": a, "b": packed.b, "scales": packed.scales, "out": np.empty((m, n), np.float32)}
    if packed.shifts is not None:
        arrays["shifts"] = packed.shifts
    buffers = {name: buffer(name, x, name == "out") for name, x in arrays.items()}
    w = BlockwiseProduct("blocks", Axis("m", m, k, 0, n), k, n, bits, block, 64, buffers["a"], buffers["b"],
                         buffers["scales"], buffers.get("shifts"), buffers["out"], rounded=rounded)  # fmt: skip
    run(w, target, {buffers[name]: x for name, x in arrays.items()}, {})
    bound = tolerance.of_block_product(a, weights, w.digit_rows)
    assert not tolerance.agree(arrays["out"], a.astype(np.float64) @ weights, bound)


@pytest.mark.parametrize("target", isas("avx2", "avx512"))
def test_half_scales(target: Isa) -> None:
    check(target, 1, 96, 70, 4, 32, True, scale_dtype=np.float16)
    check(target, 9, 96, 70, 8, 32, False, scale_dtype=np.float16)


def test_odd_formats_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="3 bits"):
        pack_blockwise(np.zeros((32, 4), np.uint8), np.zeros((1, 4), np.float32), None, 3, 32, isa("sse"))


@pytest.mark.parametrize("a, rounded, few", [("f32", "f32", 3), ("bf16", "f32", 2), ("f32", "i8", 1)])
def test_a_block_takes_one_dot_product_for_each_digit_of_four_steps(a: str, rounded: str, few: int) -> None:
    w = block_products.product(4, True, DType(a), DType(rounded))
    code = block_products.block_code(w, isa("avx512+avx512_vnni"))
    assert sum("vpdpbusd" in line for line in code) == few * 4 * 32 // 4  # four vectors of columns, 32 steps


def test_weights_are_asked_for_row_by_row() -> None:
    """A row of words of 64 columns is four lines, for which the code that reads one such row asks."""
    target, lines = isa("avx512+avx512_vnni"), 4
    a, b, scales, out, digits = (
        Buffer(name, dtype, (1,), (1,), name == "out")
        for name, dtype in zip(
            ("a", "b", "scales", "out", "digits"), (DType.f32, DType.u8, DType.f32, DType.f32, DType.u8)
        )
    )
    w = BlockwiseProduct("blocks", Axis("m", 1, 64, 0, 64), 64, 64, 4, 32, 64, a, b, scales, None, out, digits=digits)
    text = emit_blockwise(w, target).llvm_text.split("@blocks.dot1(ptr %args, ptr %digits")[1].split("\n}")[0]
    rows = text.count("lshr <16 x i32>") // (64 // 16)
    assert rows and text.count("i32 0, i32 2, i32 1)") == rows * lines
