"""The tables of low precision are made from the records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import lowprecision
from benchmarks.records import versions


def test_a_table_from_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    times = (("vivace", 2.0), ("vivace f32", 9.0), ("openvino", 4.0), ("onnxruntime", 8.0))
    engines = {name: {"median": ms / 1e3, "snr_db": 30.0, "failure": None} for name, ms in times}
    for threads in (1, 2):
        record = {"model": "resnet50-qdq", "threads": threads, "engines": engines, "versions": versions(),
                  "machine": {}, "foreign_cores": 0.0, "measured_at": "now", "limit_seconds": 1e-3}  # fmt: skip
        (tmp_path / f"resnet50-qdq-{threads}.json").write_text(json.dumps(record))
    monkeypatch.setattr(lowprecision, "_records", lambda form: tmp_path)
    summary = lowprecision.summarise("int8")
    assert [row["ratio"] for row in summary["rows"]] == [0.5, 0.5]
    assert summary["rows"][0]["times_faster_than_f32"] == 4.5
    assert summary["ratio_over_best_peer"]["1"]["geometric_mean"] == pytest.approx(0.5)
    assert "| resnet50-qdq | 1 | 2 | 8 | 4 | 0.50 | 4.50 | 50% | 30.0 |" in lowprecision.markdown(summary)
    assert "* 2 thread(s): at the limit they would be 2.00 times as fast" in lowprecision.markdown(summary)
    assert "torch" not in lowprecision.markdown(summary)


def test_both_tables_have_models() -> None:
    assert {name.rsplit("-", 1)[1] for name in lowprecision.names_of("int8")} == {"qdq"}
    assert "resnet50" in lowprecision.names_of("bf16")
