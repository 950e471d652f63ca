"""The table of results is made from the records, and README's table from the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from benchmarks import overhead, times_table
from benchmarks.compiled_torch import torch_contestant, why_not
from benchmarks.times import SUMMARY

import vivace
from vivace.base.errors import ProviderError
from vivace.runtime.engine import Engine


def _record(model: str, threads: int, medians: dict[str, float | None], disturbed: bool = False) -> dict[str, Any]:
    ours = medians["vivace"]
    engines = [
        {
            "name": name,
            "median": median,
            "failure": None if median else "refused",
            "agrees": True if median else None,
            "ours_over_this": None
            if name == "vivace" or not (median and ours)
            else {
                "value": ours / median,
                "low": ours / median - 0.01,
                "high": ours / median + 0.01,
                "confidence": 0.95,
            },
            "share_of_limit": 0.5 if median else None,
            "cold_start": {"peak_bytes": 100 << 20, "load_seconds": 0.1} if median else None,
        }
        for name, median in medians.items()
    ]
    return {
        "model": model,
        "threads": threads,
        "disturbed": disturbed,
        "engines": engines,
        "noise": {"foreign_cores": 0.0},
        "limit": {"flops": 8_000_000_000},
        "f32_peak": 100e9,
        "measured_at": "2026-11-23T00:00:00Z",
        "versions": {"vivace": "0.1.0", "onnxruntime": "1.32.0", "openvino": "2026.4.1"},
        "machine": {"cpu": "a CPU", "cores": 2, "used_instruction_set": "avx512"},
        "tolerance": {},
        "overhead_seconds": 4e-6 if ours and ours < 0.002 else None,
    }


@pytest.fixture
def summary() -> dict[str, Any]:
    return times_table.summarise(
        [
            _record("silero-vad", 1, {"vivace": 50e-6, "onnxruntime": 100e-6, "openvino": None}),
            _record("resnet50", 1, {"vivace": 0.1, "onnxruntime": 0.11, "openvino": 0.125}),
            _record("resnet50", 2, {"vivace": 0.05, "onnxruntime": 0.05, "openvino": 0.04}),
            _record("resnet50", 2, {"vivace": 0.105, "onnxruntime": 0.3, "openvino": 0.2}, disturbed=True),
            _record("magika", 2, {"vivace": None, "onnxruntime": 0.05, "openvino": 0.04}),
        ]
    )


def test_summary(summary: dict[str, Any]) -> None:
    ratios = {(row["model"], row["threads"]): row["ratio"] for row in summary["rows"]}
    assert ratios["silero-vad", 1] == pytest.approx(0.5)
    assert ratios["resnet50", 2] == pytest.approx(1.25)  # the best peer is openvino there
    assert ratios["magika", 2] is None
    one = summary["ratio_over_best_peer"]["1"]
    assert one["geometric_mean"] == pytest.approx((0.5 * 0.1 / 0.11) ** 0.5)
    assert one["n_models"] == 2
    assert summary["ratio_over_best_peer"]["2"]["worst"] == pytest.approx(1.25)
    assert summary["resnet50"]["share_of_peak"] == pytest.approx(0.8)
    assert summary["resnet50"]["scaling"] == pytest.approx(2.0)
    assert summary["disturbed"][0]["over_one_thread"]["vivace"] == pytest.approx(1.05)


def test_tables(summary: dict[str, Any], tmp_path: Path) -> None:
    text = times_table.markdown(summary)
    assert "| resnet50 | 2 | 50 | 50 | 40 | 1.25 [1.24, 1.26] | 50% |" in text
    assert "80.0% of the measured f32 peak" in text
    assert "4.0" in next(line for line in text.splitlines() if line.startswith("| silero-vad"))
    page = tmp_path / "README.md"
    page.write_text(f"before\n{times_table._BEGIN}\nold\n{times_table._END}\nafter\n")
    times_table.update_readme(page, summary)
    once = page.read_text()
    assert "old" not in once and "| silero-vad | 1 | 0.05 | 0.1 | - | 0.50 | 50% |" in once
    assert once.startswith("before\n") and once.endswith("after\n")
    times_table.update_readme(page, summary)
    assert page.read_text() == once
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="lacks the marks"):
        times_table.update_readme(page, summary)


def test_readme_shows_the_measured_table(repository: Path) -> None:
    readme = repository / "README.md"
    if not SUMMARY.exists() or not readme.exists():
        pytest.skip("nothing is measured yet")
    assert times_table.readme_table(json.loads(SUMMARY.read_text())) in readme.read_text()


def test_torch_has_a_column_where_it_was_timed(summary: dict[str, Any]) -> None:
    assert not any("torch" in line for line in times_table.table(summary["rows"]))
    more = times_table.summarise(
        [_record("resnet50", 1, {"vivace": 0.1, "onnxruntime": 0.11, "openvino": 0.125, "torch": 0.09})]
    )
    heads, _, row = times_table.table(more["rows"])
    assert "| torch ms |" in heads and "| 90 |" in row
    assert more["rows"][0]["best_peer"] == "torch"


def test_torch_runs_what_came_from_it_only() -> None:
    assert why_not("silero-vad")
    with pytest.raises(ProviderError):
        torch_contestant("silero-vad", 1, ["output"]).load()


def test_an_engine_without_kernels_goes_the_same_way() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 17]>
        sums (float[4] x) => (float[4] y, float[1] z) { y = Add(x, x)  z = ReduceSum(y) }
    """)
    engine = vivace.compile(model, threads=1)
    assert isinstance(engine, Engine)
    emptied = overhead.without_kernels(engine)
    assert emptied.image.lines == engine.image.lines
    results = {"y": np.full(4, 5.0, np.float32), "z": np.full(1, 5.0, np.float32)}
    emptied.run({"x": np.ones(4, np.float32)}, results)
    assert all((r == 5.0).all() for r in results.values())
    assert engine.run({"x": np.ones(4, np.float32)})["z"] == 8.0


@pytest.mark.parametrize("flag", [False, True])
def test_an_engine_without_kernels_takes_the_same_branch(flag: bool) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 17]>
        choice (float[4] x, int64 n) => (float[4] y)
        <int64 one = {1}> {
            c = Equal(n, one)
            y = If(c) <then_branch = left () => (float[4] a) { a = Exp(x) },
                       else_branch = right () => (float[4] b) { b = Tanh(x) }>
        }
    """)
    engine = vivace.compile(model, threads=1)
    assert isinstance(engine, Engine)
    inputs = {"x": np.ones(4, np.float32), "n": np.array(int(flag))}
    ran = [event.kernel for event in engine.profile(inputs)]
    assert [event.kernel for event in overhead.without_kernels(engine).profile(inputs)] == ran
    assert any("exp" in kernel for kernel in ran) == flag
