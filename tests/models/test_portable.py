"""What an engine carries for other machines: the model inside a saved engine, and the file that `vivace optimize`
writes, are read again by our own importer with the same inputs and outputs, compile, and compute what the engine does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from benchmarks.models import BY_NAME, ModelUnavailable, inputs, is_ready, materialise

import vivace
from vivace.onnx.exporter import export
from vivace.onnx.importer import import_model
from vivace.optimize.pipeline import Level, optimize
from vivace.runtime.engine import Engine
from vivace.runtime.saved import SavedEngine

LIGHT: dict[str, str | None] = {
    "ppocr-cls": None,
    "ppocrv4-det": None,
    "ppocrv4-rec": "1x3x48x160",
    "silero-vad": None,
    "silero-vad-16k": None,
    "silero-vad-ifless": None,
    "basic-pitch": None,
    "magika": None,
    "tabular-mlp": None,
    "minilm-l6": "1x16",
    "minilm-l6-op23": "1x16",
    "mobilenetv2-bn": None,
    "efficientnet-lite0-ts": None,
}
"""Models that compile in seconds, and the case to run; None is the first."""


def file_of(name: str) -> Path:
    if not is_ready(name):
        pytest.skip(f"{name} is not in the cache; make it with: python -m benchmarks.models get {name}")
    try:
        return materialise(name)
    except ModelUnavailable as e:
        pytest.skip(str(e))


@cache
def engine_of(name: str) -> Engine:
    engine = vivace.compile(file_of(name), threads=1, providers=("native",))
    assert isinstance(engine, Engine)
    return engine


def saved(name: str, folder: Path) -> bytes:
    """The model inside a saved engine."""
    path = folder / "saved.vivace"
    engine_of(name).save(path)
    return SavedEngine(path).checked_bytes("portable")


def optimized(name: str, folder: Path) -> bytes:
    """The file that `vivace optimize` writes."""
    return export(optimize(import_model(file_of(name)), Level.EXTENDED)).SerializeToString()


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("make", [saved, optimized])
def test_our_own_file_is_read_and_computes_the_same(
    name: str, make: Callable[[str, Path], bytes], tmp_path: Path
) -> None:
    engine = engine_of(name)
    again = vivace.compile(make(name, tmp_path), threads=1, providers=("native",))
    assert list(map(str, again.inputs)) == list(map(str, engine.inputs))
    assert list(map(str, again.outputs)) == list(map(str, engine.outputs))
    feeds = inputs(name, LIGHT[name] or BY_NAME[name].cases[0].name)
    want, got = engine.run(feeds), again.run(feeds)
    for output, y in want.items():
        if y.dtype.kind != "f":
            np.testing.assert_array_equal(got[output], y, err_msg=output)
            continue
        scale = float(np.abs(y).max(initial=0)) or 1.0
        # basic-pitch takes logarithms near silence, where two orders of one sum differ by this much.
        most = 1e-3 if name == "basic-pitch" else 2e-5
        assert float(np.abs(got[output] - y).max(initial=0)) <= most * scale, output
