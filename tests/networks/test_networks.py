"""Random models in random ways: strips, row blocks, attention, Winograd's products, slices of a batch, number formats;
and wide ones: any operators, in any way that users have; and single operators with any attributes. `python -m
tests.networks.cases 0 1000`, `python -m tests.networks.wide 0 1000` and `python -m tests.networks.single 0 1000` try
any number of others.
"""

from __future__ import annotations

import pytest
from tests.networks import single, wide
from tests.networks.cases import check

from vivace.base.machine import host, isa, missing_flags

# What is joined or chosen in each, where the CPU has all instruction sets that ways are drawn from.
JOINED = {
    910006: "winograd4x4 slices", 910009: "attention", 910039: "strips", 910040: "strips", 910041: "attention",
    910068: "strips slices", 910077: "strips", 910078: "strips", 910088: "strips slices", 920010: "strips",
    920025: "attention", 920037: "winograd4x4", 920063: "attention", 920067: "attention slices", 920078: "row_blocks",
    920096: "attention row_blocks",
}  # fmt: skip
# Pads that no strip meets; Winograd's products of no image; attention of no queries; signed bytes in blocks of 5 rows.
MENDED = {2000021: "strips slices", 2000031: "", 30014: "attention", 30058: "row_blocks"}
HAS_ALL = not missing_flags(host(), isa("avx512+amx_bf16+amx_int8+amx_tile+avx512_bf16+avx512_vnni"))


@pytest.mark.parametrize("seed", [*JOINED, *MENDED])
def test_random_models(seed: int) -> None:
    told = check(seed)
    if HAS_ALL:
        assert told.partition(" sizes: ")[2] == {**JOINED, **MENDED}[seed], told
        assert " 0 sizes" not in told


# Sizes that only show at run time, several callers at once, saved engines, tuned, checked and rewritten ones.
WIDE = (7000009, 7000018, 7000023, 7000026, 7000028, 7000031, 7000037, 7000045, 7000052, 7000054)


@pytest.mark.parametrize("seed", WIDE)
def test_wide_models(seed: int) -> None:
    assert " sizes, " in wide.check(seed)


@pytest.mark.parametrize("family", single.FAMILIES)
def test_single_operators(family: str) -> None:
    for seed in range(3):
        assert single.check(seed, (family,))
