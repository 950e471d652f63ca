"""Many rows of f32 against block-wise weights on matrix units: as exact as f32, whatever stands in a row."""

from __future__ import annotations

import numpy as np
import pytest
from tests.targets.low_precision import UNTOUCHED, at_page_end, buffer, run_code
from tests.targets.test_contraction_amx import TILES, lacks_amx

from vivace.base.dims import Dim, evaluate, symbol
from vivace.base.dtypes import DType
from vivace.base.machine import isa
from vivace.loops.blockwise import MOST_DIRECT_ROWS, BlockwiseProduct
from vivace.loops.contraction import Axis
from vivace.loops.kernel import Binary, Buffer, Load, Read
from vivace.loops.split import Split, split_sizes
from vivace.lower.pack_blockwise import blockwise_lanes, pack_blockwise
from vivace.targets.cpu.blockwise import emit_blockwise
from vivace.targets.cpu.split import emit_split

TARGET = isa(f"{TILES.name}+avx512_bf16+avx512_vnni")
pytestmark = lacks_amx
LEAST = MOST_DIRECT_ROWS + 1


def split(a: np.ndarray, filled: int, has_sums: bool = True) -> tuple[np.ndarray, np.ndarray]:
    m, k = a.shape
    sizes = [evaluate(n, {}) for n in split_sizes(m, filled, has_sums)]
    parts, sums = (np.full(n, 9, t) for n, t in zip(sizes, (np.uint16, np.float32)))
    buffers = [buffer("a", a), Buffer("parts", DType.bf16, parts.shape, (1,), True), buffer("sums", sums, True)]
    code = emit_split(Split("split", m, k, k, filled, LEAST, has_sums, *buffers), TARGET)
    run_code(code, TARGET, dict(zip(buffers, (a, parts, sums))), {})
    return parts, sums


def product(
    a: np.ndarray, n: int, bits: int, block: int, zeros: str, symbolic: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The result for rows of A, and the weights."""
    (m, k), random = a.shape, np.random.default_rng(5)
    n_blocks = -(-k // block)
    q = random.integers(0, 1 << bits, (k, n)).astype(np.uint8)
    scales = random.uniform(0.5, 2, (n_blocks, n)).astype(np.float16)
    points = {
        "none": None,
        "whole": random.integers(0, 1 << bits, (n_blocks, n)).astype(np.float32),
        "real": random.uniform(0, 1 << bits, (n_blocks, n)).astype(np.float32),
    }[zeros]
    packed = pack_blockwise(q, scales, points, bits, block, TARGET)
    parts, sums = split(a, n_blocks * block, packed.shifts is not None and packed.shifts.dtype.kind == "f")
    bias, out = random.standard_normal(n, dtype=np.float32), np.full((m, n + 3), UNTOUCHED, np.float32)
    arrays = {"a": a, "b": packed.b, "scales": packed.scales, "out": out, "bias": bias, "sums": sums}
    buffers = {name: buffer(name, x, name == "out") for name, x in arrays.items()}
    buffers["parts"] = Buffer("parts", DType.bf16, parts.shape, (1,))
    arrays["parts"] = parts
    if packed.shifts is not None:
        arrays["shifts"], buffers["shifts"] = packed.shifts, buffer("shifts", packed.shifts)
    rows: Dim = symbol("M") if symbolic else m
    w = BlockwiseProduct(
        "blocks", Axis("m", rows, k, 0, n + 3), k, n, bits, block, blockwise_lanes(TARGET), buffers["a"], buffers["b"],
        buffers["scales"], buffers.get("shifts"), buffers["out"],
        Binary("add", Read("acc", DType.f32), Load(buffers["bias"], (symbol("n"),))), (buffers["bias"],),
        buffers["parts"], buffers["sums"],
    )  # fmt: skip
    code = emit_blockwise(w, TARGET)
    assert "tdpbf16ps" in code.llvm_text
    run_code(code, TARGET, {buffers[name]: x for name, x in arrays.items()}, {"M": m} if symbolic else {})
    assert (out[:, n:] == UNTOUCHED).all()
    center = np.float64(1 << (bits - 1)) if points is None else np.repeat(points.astype(np.float64), block, 0)[:k]
    weights = (q.astype(np.float64) - center) * np.repeat(scales.astype(np.float64), block, 0)[:k]
    return out[:, :n] - bias, weights


def numbers(m: int, k: int) -> np.ndarray:
    random = np.random.default_rng(m * k)
    return at_page_end((random.standard_normal((m, k)) * np.exp(random.normal(0, 3, (m, k)))).astype(np.float32))


def check(a: np.ndarray, got: np.ndarray, weights: np.ndarray, bits: int, scale: float = 2) -> None:
    """Within some roundings to f32 of the sizes of what is summed: a times levels and zero points with their scales."""
    a = a.astype(np.float64)
    size = np.abs(a) @ (np.abs(weights) + scale * (1 << bits))
    assert (np.abs(got - a @ weights) <= size * 2.0**-22 + 1e-6).all()


@pytest.mark.parametrize("zeros", ["none", "whole", "real"])
@pytest.mark.parametrize("bits, block", [(4, 32), (4, 128), (8, 32), (8, 64)])
def test_rows_of_any_number(bits: int, block: int, zeros: str) -> None:
    for m, k, n in ((5, 96, 64), (33, 77, 130), (100, 288, 40)):
        a = numbers(m, k)
        check(a, *product(a, n, bits, block, zeros), bits)


def test_the_number_of_rows_may_be_symbolic() -> None:
    for m in (0, 1, 4, 5, 16, 17, 50):
        a = numbers(m, 128)
        check(a, *product(a, 70, 4, 32, "real", symbolic=True), 4)


@pytest.mark.parametrize("zeros", ["none", "whole", "real"])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, 3e38, 1e-40])
def test_special_numbers_stay_in_their_rows(special: float, zeros: str) -> None:
    a = numbers(20, 64)
    a[3, 40], a[17, 0] = special, -special
    got, weights = product(a, 70, 8, 32, zeros)
    usual = [i for i in range(20) if i not in (3, 17)]
    check(a[usual], got[usual], weights, 8)
    with np.errstate(all="ignore"):
        want = (a[[3, 17], :, None] * weights).sum(1) if special == special else np.full((2, 70), np.nan)
    is_finite = np.isfinite(want) & (np.abs(want) < 3e38)
    assert np.array_equal(np.isnan(got[[3, 17]]), np.isnan(want))
    assert np.allclose(got[[3, 17]][is_finite], want[is_finite], rtol=1e-4, atol=1e-3 * np.abs(a[usual]).max())


def test_parts_make_up_the_row() -> None:
    a = numbers(21, 77)
    a[2, 3] = np.float32(np.inf)
    parts, sums = split(a, 128)
    assert split(a, 128, has_sums=False)[1].size == sums.size // 5  # marks only
    rows = (parts.astype(np.uint32) << 16).view(np.float32).reshape(2, 4, 3, 16, 32)
    with np.errstate(invalid="ignore"):
        whole = rows.sum(2, dtype=np.float64).transpose(0, 2, 1, 3).reshape(32, 128)[:21]
    is_finite = np.isfinite(a)
    assert np.array_equal(whole[:, :77][is_finite], a[is_finite]) and not whole[:, 77:].any()
    sums = sums.reshape(2, 5, 16).transpose(0, 2, 1).reshape(32, 5)[:21]
    assert (sums[:, 4] != 0).tolist() == [i == 2 for i in range(21)]
    want = np.pad(a, ((0, 0), (0, 51))).reshape(21, 4, 32).sum(2, dtype=np.float64)
    assert np.allclose(sums[3:, :4], want[3:], rtol=1e-5, atol=1e-5 * np.abs(a[3:]).max())
