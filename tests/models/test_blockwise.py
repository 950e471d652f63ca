"""SmolLM2 with packed weights: 4 bits hold its own numbers, so that the answers are those of the f32 model."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.models import ModelUnavailable, inputs, is_ready, materialise
from benchmarks.models.blockwise import BASE, materialise_blockwise

import vivace
from vivace.measure.compare import Tolerance, compare_arrays
from vivace.runtime.engine import Engine

LEAST_DB = {"int4": 90.0, "int8": 20.0}
PRODUCTS = 211  # seven a layer, and the last


@pytest.mark.slow
@pytest.mark.parametrize("form", LEAST_DB)
def test_packed_decoder(form: str) -> None:
    if not is_ready(BASE):
        pytest.skip(f"{BASE} is not in the cache; make it with: python -m benchmarks.models get {BASE}")
    try:
        path = materialise_blockwise(form)
    except ModelUnavailable as e:
        pytest.skip(str(e))
    packed = vivace.compile(path, providers=("native",))
    plain = vivace.compile(materialise(BASE), providers=("native",))
    assert isinstance(packed, Engine)
    assert sum(line.label == "matmul_blocks" for line in packed.image.lines) == PRODUCTS
    for case in ("decode-past127", "prefill-64", "append-5-past16-batch2"):
        feeds = inputs(BASE, case)
        (name, got), *_ = packed.run(feeds).items()
        want = plain.run(feeds)[name]
        found = compare_arrays(name, got, want, Tolerance(0, 0))
        assert found.snr_db >= LEAST_DB[form], f"{case}: {found.snr_db:.1f} dB"
        assert (np.argmax(got, -1) == np.argmax(want, -1)).mean() >= 0.95
    check_in_place(packed, feeds)


def check_in_place(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    """The same bits with caches in arrays with room for more."""
    want, caches, mine = engine.run(feeds), {}, {}
    for present, past in engine.appended.items():
        before = feeds[past]
        batch, heads, n, depth = before.shape
        cache = np.full((batch, heads, n + 9, depth), np.nan, np.float32)
        cache[:, :, :n] = before
        caches[past], mine[present] = cache[:, :, :n], cache[:, :, : want[present].shape[2]]
    assert len(caches) == 60
    got = engine.run(feeds | caches, mine)
    assert all(np.array_equal(got[name], a) for name, a in want.items())
