"""`precision="auto"` on a real model, with real times and errors: the tolerance holds, and the engine tells of each
layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from benchmarks.models import ModelUnavailable, inputs, materialise

import vivace
from vivace.base.knobs import knobs
from vivace.cli import app
from vivace.formats import drop


def test_the_tolerance_holds_and_each_layer_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vivace.formats.MOST_LAYERS", 6)  # for few compiles; what they are cut into is tested elsewhere
    try:
        model = materialise("ppocr-cls")
    except ModelUnavailable as e:
        pytest.skip(str(e))
    samples = [inputs("ppocr-cls", seed=seed) for seed in range(2)]
    shapes = {name: a.shape for name, a in samples[0].items()}
    with knobs.scope(emulate=True):  # on a CPU without products of halves all stays f32, for the right reason
        engine = vivace.compile(model, precision="auto", max_drop=0.01, calibration=samples, threads=1, shapes=shapes)
        f32 = vivace.compile(model, threads=1, shapes=shapes)
        assert max(drop("relative", engine.run(s), f32.run(s)) for s in samples) <= 0.01
    layers = cast(list[dict[str, Any]], engine.stats["layers"])
    assert len(layers) == 6 and all(x["format"] != "f32" or x["reason"] for x in layers)
    assert all(x["saved_ms"] > 0 and x["error"] <= 0.01 for x in layers if x["format"] != "f32")
    assert cast(float, engine.stats["auto_ms"]) <= cast(float, engine.stats["f32_ms"])
    engine.save(tmp_path / "m.vivace")
    assert app.run(["inspect", str(tmp_path / "m.vivace")]) == 0
    shown = capsys.readouterr().out
    assert "precision by layer" in shown and all(x["layer"] in shown for x in layers)
