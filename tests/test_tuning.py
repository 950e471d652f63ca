"""Tuning of whole models: versions are built and run, what is found is kept, and later compiles measure nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.lower.test_choices import ISA, graph_of

import vivace
from vivace import tuning
from vivace.base.errors import InputError
from vivace.base.events import collecting
from vivace.base.knobs import knobs
from vivace.graph import reference
from vivace.lower.candidates import Rates
from vivace.lower.choices import Choice, Choices
from vivace.lower.tune import Run
from vivace.runtime.executable import Chunk

RATES = Rates({"f32": 300.0, "bf16": 600.0, "i8": 1200.0}, 100.0, 30.0, 2)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that are not measured, and few rounds."""
    monkeypatch.setattr(tuning, "_rates", lambda threads: RATES)
    monkeypatch.setattr(tuning, "_ROUND_SECONDS", 0.0)
    monkeypatch.setattr("vivace.lower.tune.SEARCH_ROUNDS", 2)
    monkeypatch.setattr("vivace.lower.tune.CONFIRM_ROUNDS", 2)


def prefer_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are built and run, but what they took is made up: each further version of a turn is twice as fast as the
    one before, at every site. So the last candidate is chosen, whatever the machine."""
    real = tuning._Bench.measure

    def measure(
        bench: tuning._Bench, assignments: Sequence[Mapping[str, Choice]], n_rounds: int, until_ns: float = math.inf
    ) -> list[list[Run]]:
        found = real(bench, assignments, n_rounds, until_ns)
        return [[dict.fromkeys(run, 1000.0 / 2**i) for run in runs] for i, runs in enumerate(found)]

    monkeypatch.setattr(tuning._Bench, "measure", measure)


@pytest.mark.parametrize("name", ["winograd", "matmul", "depthwise"])
def test_a_tuned_model_computes_the_same_and_the_second_compile_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    prefer_the_last(monkeypatch)
    graph, x = graph_of(name)
    want = reference.evaluate(graph, [x])[0]
    with knobs.scope(cache_dir=tmp_path):
        told: list[str] = []
        engine = vivace.compile(graph, threads=2, tune="fast", progress=lambda stage, done, total: told.append(stage))
        facts = engine.stats["tuning"]
        assert isinstance(facts, dict) and facts["n_measured"] > 0 and "tune" in told
        assert facts["n_changed"] == len(facts["changes"]) > 0 and facts["whole_ratio"] == 0.5
        np.testing.assert_allclose(engine(x), want, rtol=1e-4, atol=1e-4)
        again = vivace.compile(graph, threads=2, tune="fast")
        known = again.stats["tuning"]
        assert isinstance(known, dict) and known["n_measured"] == 0 and known["changes"] == facts["changes"]
        np.testing.assert_array_equal(again(x), engine(x))
        other = vivace.compile(graph, threads=1, tune="fast", tune_budget=60.0)  # measured by itself
        assert isinstance(other.stats["tuning"], dict) and other.stats["tuning"]["n_measured"] > 0
        assert "tuning" not in vivace.compile(graph, threads=2).stats


def test_a_file_takes_tuning_to_another_cache(tmp_path: Path) -> None:
    graph, _ = graph_of("matmul")
    file = tmp_path / "timings.jsonl"
    with knobs.scope(cache_dir=tmp_path / "one"):
        vivace.compile(graph, threads=2, tune="fast", timing_cache=file)
    with knobs.scope(cache_dir=tmp_path / "two"):
        facts = vivace.compile(graph, threads=2, tune="fast", timing_cache=file).stats["tuning"]
        assert isinstance(facts, dict) and facts["n_measured"] == 0
        facts = vivace.compile(graph, threads=2, tune="fast").stats["tuning"]
        assert isinstance(facts, dict) and facts["n_measured"] > 0
    saved = tmp_path / "m.vivace"
    engine = vivace.compile(graph, threads=2, tune="fast", timing_cache=file, cache=False)
    engine.save(saved)
    assert vivace.load(saved).stats["tuning"] == engine.stats["tuning"]


def test_without_tuning_a_file_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_the_last(monkeypatch)
    graph, x = graph_of("matmul")
    file = tmp_path / "timings.jsonl"
    with knobs.scope(cache_dir=tmp_path / "one"):
        tuned = vivace.compile(graph, threads=2, tune="fast", timing_cache=file)
    held = file.read_bytes()
    monkeypatch.setattr(tuning, "_Bench", None)  # nothing is measured
    with knobs.scope(cache_dir=tmp_path / "two"), collecting() as records:
        engine = vivace.compile(graph, threads=2, timing_cache=file)
        facts, want = engine.stats["tuning"], tuned.stats["tuning"]
        assert isinstance(facts, dict) and isinstance(want, dict)
        assert facts["changes"] == want["changes"] != [] and facts["n_measured"] == 0
        np.testing.assert_array_equal(engine(x), tuned(x))
        assert not records and file.read_bytes() == held and not tuning.own_file().exists()
        other = vivace.compile(graph, threads=1, timing_cache=file).stats["tuning"]
        assert isinstance(other, dict) and not other["changes"] and "nothing for this machine" in str(records)


def test_a_budget_of_0_leaves_everything_as_it_is(tmp_path: Path) -> None:
    graph, _ = graph_of("matmul")
    with knobs.scope(cache_dir=tmp_path):
        facts = vivace.compile(graph, threads=2, tune="fast", tune_budget=0.0).stats["tuning"]
        assert isinstance(facts, dict) and facts["n_measured"] == 0
        assert not facts["is_complete"] and not facts["changes"]
        facts = vivace.compile(graph, threads=2, tune="fast").stats["tuning"]  # nothing is decided yet
        assert isinstance(facts, dict) and facts["n_measured"] > 0


@pytest.mark.parametrize("found", [{}, {"a": Choice(rows=3)}])
def test_the_plan_is_made_with_the_choices_that_are_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Choice]
) -> None:
    """Also where a search that goes on confirms what it knew and measures no new way."""
    choices = Choices(found)
    monkeypatch.setattr(tuning, "tune", lambda *_: (choices, {"n_measured": 0}))
    made: list[Choices] = []

    def plan(choices: Choices) -> Any:
        made.append(choices)
        return choices

    shop = tuning.Workshop(graph_of("matmul")[0], ISA, 1, plan, lambda *_: None, lambda _: None)  # type: ignore[arg-type, return-value]
    got, _, _ = tuning.tuned(shop, tuning.Tune("fast", file=tmp_path / "t.jsonl", keeps=False), None)
    assert made[-1] is got and dict(made[-1].by_key) == found and len(made) == 1 + bool(found)


def test_bad_options() -> None:
    graph, _ = graph_of("matmul")
    for options in (
        {"tune": "hard"}, {"tune": "fast", "tune_budget": -1.0}, {"tune_budget": float("nan")}, {"tune_budget": 5.0},
        {"timing_cache": "/no/such/file"}, {"tune": "fast", "providers": ("onnxruntime",)},
    ):  # fmt: skip
        with pytest.raises(InputError):
            vivace.compile(graph, **options)  # type: ignore[arg-type]


def test_times_of_pieces_are_laid_out_anew() -> None:
    def chunk(step: int, thread: int, start: int, ns: int, units: int = 1) -> Chunk:
        return Chunk(step, thread, start, ns, 0, units)

    even = [chunk(0, i % 2, 10 * i, 10) for i in range(6)]
    kept_waiting = [*even[:5], chunk(0, 1, 50, 5000)]
    apart = [chunk(0, 0, 0, 40, 4), chunk(0, 1, 0, 10)]
    for pieces, ns in ((even, 30.0), (kept_waiting, 30.0), (apart, 40.0)):
        assert tuning.site_times(pieces, ["a"], [False]) == {"a": ns, "": ns}
    both = [chunk(0, 0, 0, 10), chunk(1, 0, 20, 30), chunk(0, 1, 5, 10), chunk(2, 0, 60, 7)]
    assert tuning.site_times(both, ["a", "", "a"], [True, False, False]) == {"a": 27.0, "": 57.0}


def test_what_cannot_be_tuned_is_compiled_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise InputError("no inputs")

    monkeypatch.setattr("vivace.measure.inputs.generate", fail)
    graph, x = graph_of("matmul")
    with knobs.scope(cache_dir=tmp_path), collecting() as records:
        engine = vivace.compile(graph, threads=1, tune="fast")
    np.testing.assert_allclose(engine(x), reference.evaluate(graph, [x])[0], rtol=1e-4, atol=1e-4)
    assert any("no inputs" in str(r) for r in records)
