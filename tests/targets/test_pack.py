"""Packing a run-time operand: the same bits as packing it at compile time, whatever its layout, type and tails."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from tests.targets.low_precision import at_page_end, buffer, isas, run_code

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.base.machine import Isa
from vivace.loops.contraction import Axis
from vivace.loops.kernel import Buffer
from vivace.loops.pack import Pack
from vivace.lower.pack import pack_groups
from vivace.targets.cpu.pack import emit_pack

each_isa = pytest.mark.parametrize("target", isas("sse", "avx2", "avx512", "avx512+avx512_bf16"))
bf16 = ml_dtypes.bfloat16
SIZES = [(2, 16, 32), (32, 64, 32), (31, 33, 32), (64, 7, 16), (1, 1, 16), (40, 100, 32), (197, 50, 32), (0, 5, 16)]


def numbers(*shape: int, dtype: type) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape, dtype=np.float32).astype(dtype)


def packed(x: np.ndarray, lanes: int, multiple: int, block: int) -> np.ndarray:
    """What the layout says, from [batch, k, n]."""
    batch, k, n = x.shape
    rows = -(-k // multiple) * multiple
    whole = np.zeros((batch, rows, n), bf16)
    whole[:, :k] = x.astype(bf16)
    parts = [whole[:, i : i + (block or rows)] for i in range(0, rows, block or max(rows, 1))]
    flat = [pack_groups(part, lanes, 2, part.shape[1]).reshape(batch, -1) for part in parts]
    return np.concatenate([*flat, np.zeros((batch, 0), bf16)], axis=1)


def run(x: np.ndarray, turned: bool, lanes: int, target: Isa, multiple: int, block: int, symbolic: bool) -> None:
    batch, k, n = x.shape
    laid = at_page_end(np.ascontiguousarray(x.transpose(0, 2, 1)) if turned else x)
    dim_k = symbol("K") if symbolic and not turned else k
    dim_n = symbol("N") if symbolic else n
    k_stride, n_stride = (1, k) if turned else (dim_n, 1)
    want = packed(x, lanes, multiple, block)
    out = np.zeros(want.size, bf16)
    source, result = buffer("b", laid), Buffer("out", DType.bf16, (out.size,), (1,), True)
    pack = Pack("pack", (Axis("h", batch, 0, dim_k * dim_n),), dim_k, dim_n, k_stride, n_stride, source, result, lanes)
    pack = replace(pack, multiple=multiple, block=block)
    run_code(emit_pack(pack, target), target, {source: laid, result: out}, {"K": k, "N": n})
    got = out.reshape(want.shape)
    is_real = packed(np.ones_like(x), lanes, multiple, block) != 0
    if turned:  # columns beyond n hold anything, but the second of a pair beyond k is 0
        is_real = is_real | (packed(np.ones((batch, k, -(-n // lanes) * lanes)), lanes, multiple, block) == 0)
    np.testing.assert_array_equal(got.view(np.uint16)[is_real], want.view(np.uint16)[is_real])
    assert turned or (got[~is_real] == 0).all()


@each_isa
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, bf16])
@pytest.mark.parametrize(("k", "n", "lanes"), SIZES)
def test_layout(target: Isa, k: int, n: int, lanes: int, dtype: type, turned: bool, symbolic: bool) -> None:
    run(numbers(2, k, n, dtype=dtype), turned, lanes, target, 2, 0, symbolic)


@each_isa
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize(("k", "n"), [(64, 33), (65, 64), (100, 20), (31, 40), (257, 64)])
def test_blocks_of_rows_filled_up(target: Isa, k: int, n: int, symbolic: bool) -> None:
    run(numbers(2, k, n, dtype=bf16), False, 32, target, 32, 64, symbolic)


def test_special_values_and_rounding() -> None:
    x = np.array([[[np.nan, np.inf, -np.inf, 1 + 2**-9, 1 + 3 * 2**-9, 3.4e38, -0.0, 2.0]]], np.float32)
    for p in isas("sse", "avx512+avx512_bf16"):
        if not p.marks[0].args[0]:  # type: ignore[attr-defined]
            with np.errstate(over="ignore"):
                run(x, False, 16, p.values[0], 2, 0, False)  # type: ignore[attr-defined]


def test_gaps_in_both_axes_are_refused() -> None:
    b, out = Buffer("b", DType.bf16, (4, 4), (8, 2)), Buffer("out", DType.bf16, (64,), (1,), True)
    with pytest.raises(UnsupportedError, match="side by side"):
        emit_pack(Pack("pack", (), 4, 4, 8, 2, b, out, 16), next(iter(isas("sse"))).values[0])  # type: ignore[attr-defined]
