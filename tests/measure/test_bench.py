"""The order, counts and verdicts of an interleaved benchmark, on engines that only count their calls."""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import pytest

from vivace.base.errors import InputError, ProviderError
from vivace.measure.bench import Contestant, Runner, Settings, bench
from vivace.measure.compare import Tolerance
from vivace.measure.noise import noise_since, snapshot

X = {"x": np.arange(4, dtype=np.float32)}
SETTINGS = Settings(budget_seconds=0.0, least_rounds=6, turn_seconds=0.0, least_calls=3)


def _engine(name: str, log: list[str], error: float = 0.0) -> Contestant:
    def load() -> Runner:
        def run(inputs):  # type: ignore[no-untyped-def]
            log.append(name)
            return {"y": inputs["x"] + np.float32(error)}

        return run

    return Contestant(name, "1", load)


def test_turns_are_interleaved() -> None:
    log: list[str] = []
    found = bench([_engine("a", log), _engine("b", log)], X, SETTINGS)
    assert found.n_rounds == 6
    assert [engine.calls.shape for engine in found.engines] == [(6, 3), (6, 3)]
    rest = log[-6 * 2 * 4 :]  # a turn is one uncounted call and three counted ones
    turns = ["".join(rest[i : i + 4]) for i in range(0, len(rest), 4)]
    assert set(turns) == {"aaaa", "bbbb"}
    rounds = {"".join(sorted(t[0] for t in turns[i : i + 2])) for i in range(0, len(turns), 2)}
    assert rounds == {"ab"}
    assert len({turns[i] for i in range(0, len(turns), 2)}) == 2  # not always the same one first
    assert found.engines[1].ratio is not None and found.engines[0].ratio is None


def test_a_turn_begins_when_all_threads_are_idle() -> None:
    """Those of the engine before, too, which may spin after its runs."""
    spinning: list[threading.Thread] = []
    met: list[bool] = []

    def spin() -> None:
        hashlib.sha256(bytes(20_000_000))  # which needs no lock of Python

    def spins(inputs):  # type: ignore[no-untyped-def]
        spinning.append(threading.Thread(target=spin))
        spinning[-1].start()
        return {}

    def meets(inputs):  # type: ignore[no-untyped-def]
        met.append(any(thread.is_alive() for thread in spinning))
        return {}

    settings = Settings(budget_seconds=0.0, least_rounds=3, turn_seconds=0.0, least_calls=1)
    bench([Contestant("spins", "1", lambda: spins), Contestant("meets", "1", lambda: meets)], X, settings)
    assert not any(met[1:])  # the first is of the loading


def test_outputs_are_checked() -> None:
    log: list[str] = []
    contestants = [_engine("right", log), _engine("wrong", log, error=1.0)]
    found = bench(contestants, X, SETTINGS, reference={"y": X["x"]}, tolerance=Tolerance(0.1, 0.0))
    right, wrong = found.engines
    assert right.agrees is True
    assert wrong.agrees is False
    assert wrong.differences[0].n_over == 4
    assert bench([_engine("a", log)], X, SETTINGS).engines[0].agrees is None


def test_failures_are_reported() -> None:
    def refuse() -> Runner:
        raise ProviderError("refuses the model", where="b")

    def crash() -> Runner:
        raise ZeroDivisionError("oops")

    log: list[str] = []
    found = bench([_engine("a", log), Contestant("b", "1", refuse), Contestant("c", "1", crash)], X, SETTINGS)
    assert [engine.failure for engine in found.engines] == ["", "b: refuses the model.", "ZeroDivisionError: oops"]
    assert np.isnan(found.engines[1].median)
    alone = bench([Contestant("b", "1", refuse), _engine("a", log)], X, SETTINGS)
    assert alone.engines[1].ratio is None and alone.engines[1].calls.size == 18


def test_no_engine() -> None:
    with pytest.raises(InputError):
        bench([], X)


def test_stops_when_the_ratio_is_known() -> None:
    log: list[str] = []
    settings = Settings(budget_seconds=60.0, half_width=10.0, least_rounds=6, turn_seconds=0.0)
    assert bench([_engine("a", log), _engine("b", log)], X, settings).n_rounds <= 100


def test_noise_is_counted(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "proc").mkdir()
    stat = tmp_path / "proc/stat"
    stat.write_text("cpu  100 0 100 1000 0 0 0 0 0 0\n")
    start = snapshot(tmp_path)
    stat.write_text("cpu  100 0 100 1000 0 0 0 0 0 0\n")
    assert noise_since(start, tmp_path).foreign_cores == 0.0
    stat.write_text("cpu  100000 0 100 1000 0 0 0 500000 0 0\n")
    noise = noise_since(start, tmp_path)
    assert noise.foreign_cores > 1
    assert noise.steal > 0
    assert not noise.is_quiet
    assert noise_since(snapshot(tmp_path / "nowhere"), tmp_path / "nowhere").foreign_cores == 0.0
