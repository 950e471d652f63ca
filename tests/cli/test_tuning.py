"""--tune and `vivace timings`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vivace import tuning
from vivace.base.knobs import knobs
from vivace.lower.candidates import Rates


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates({"f32": 300.0, "bf16": 600.0, "i8": 1200.0}, 100.0, 30.0, 2)
    monkeypatch.setattr(tuning, "_rates", lambda threads: rates)
    monkeypatch.setattr(tuning, "_ROUND_SECONDS", 0.0)


def test_a_shipped_file_saves_tuning(cli, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file, engine = tmp_path / "timings.jsonl", tmp_path / "small.vivace"
    tune = ("--tune", "fast", "--tune-budget", 5, "--timing-cache", file, "--threads", 1)
    with knobs.scope(cache_dir=tmp_path / "here"):
        result = cli("compile", model, "-o", engine, *tune)
        assert result.code == 0, result.err
        assert "  tuning   measured " in result.out
        assert "tuning" in cli("inspect", engine).out
    with knobs.scope(cache_dir=tmp_path / "there"):
        result = cli("compile", model, "-o", engine, *tune)
        assert result.code == 0 and "  tuning   took all from the cache" in result.out
        assert cli("run", model, *tune).code == 0
        facts = json.loads(cli("compile", model, "-o", engine, *tune, "--json").out)["tuning"]
        assert facts["n_measured"] == 0 and facts["n_sites"] > 0
    merged = tmp_path / "all.jsonl"
    own = next((tmp_path / "here" / "timing").iterdir())
    shown = cli("timings", file, own, "-o", merged, "--json")
    assert shown.code == 0, shown.err
    (row,) = json.loads(shown.out)["timings"]
    assert row["decided"] == facts["n_sites"] and row["threads"] == 1
    assert merged.read_text().splitlines() and "(this one)" in cli("timings", merged).out


def test_where_nothing_was_measured(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with knobs.scope(cache_dir=tmp_path):
        shown = cli("timings")
        assert (shown.code, json.loads(cli("timings", "--json").out)["timings"]) == (0, [])
    assert shown.out.startswith("nothing was measured yet in ") and "machine" not in shown.out


def test_bad_input_of_tuning(cli, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for arguments in (
        ("compile", model, "-o", tmp_path / "x.vivace", "--tune", "hard"),
        ("run", model, "--tune", "fast", "--tune-budget", "-3"),
        ("compile", model, "-o", tmp_path / "x.vivace", "--timing-cache", tmp_path / "no" / "file.jsonl"),
        ("timings", tmp_path / "nowhere.jsonl"),
        ("timings", "-o", tmp_path),
    ):
        result = cli(*arguments)
        assert result.code == 2 and result.err.startswith("error: ") and result.err.count("\n") == 1


def test_only_timing_caches_grow(cli, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    other = tmp_path / "other.onnx"
    other.write_bytes(model.read_bytes())
    tuning = ("--tune", "fast", "--timing-cache", other)
    for arguments in (
        ("compile", model, *tuning),
        ("run", model, *tuning),
        ("bench", model, *tuning),
        ("timings", other),
    ):
        result = cli(*arguments)
        assert result.code == 2 and "other.onnx: is no timing cache" in result.err, arguments
    assert other.read_bytes() == model.read_bytes()
