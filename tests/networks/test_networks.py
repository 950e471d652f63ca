"""Random models in random ways: strips, row blocks, attention, Winograd's products, slices of a batch, number formats.
`python -m tests.networks.cases 0 1000` tries any number of others.
"""

from __future__ import annotations

import pytest
from tests.networks.cases import check

JOINED = (
    910006, 910009, 910039, 910040, 910041, 910068, 910077, 910078, 910088, 920010, 920025, 920037, 920063, 920067,
    920078, 920096,
)  # fmt: skip
MENDED = (2000021, 2000031)  # pads that no strip meets; Winograd's products of no image


@pytest.mark.parametrize("seed", [*JOINED, *MENDED])
def test_random_models(seed: int) -> None:
    check(seed)
