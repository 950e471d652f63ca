"""Work shared out on paper: bounds that hold for any stages, stages read from an engine, and the verb's option."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.images import build_image
from tests.runtime.test_concurrency import GRAPH, example

from vivace.base.errors import InputError
from vivace.cli.scaling import thread_counts
from vivace.measure.scaling import Costs, Piece, Stage, examine, hand_over_costs, predict, simulate, stages_of
from vivace.options import choose_isa
from vivace.runtime.engine import Engine
from vivace.targets.cpu.threads import claim_divisor

FREE = Costs(0.0, 0.0, 0.0)
PIECES = st.builds(Piece, st.just(0), st.integers(1, 90), st.sampled_from([10.0, 200.0, 3000.0]))
STAGES = st.lists(
    st.builds(Stage, st.lists(PIECES, min_size=1, max_size=4).map(tuple), st.booleans()), min_size=1, max_size=6
)


@given(STAGES, st.integers(1, 128))
def test_time_lies_between_the_bounds(stages: list[Stage], n: int) -> None:
    """Never below the work over the threads, or the longest piece; with greedy claims never above that sum."""
    taken = simulate(stages, n, FREE)
    work = sum(s.work_ns for s in stages)
    serial = sum(s.work_ns for s in stages if s.is_serial or s.n_grains < 2)
    assert taken >= work / n - 1e-6
    assert taken >= serial - 1e-6
    # A claim is a part of what is left: the last to end began while others still had work.
    shared = [(s, claim_divisor(s.n_grains, n)) for s in stages if not s.is_serial]
    longest = sum(max(p.grain_ns for p in s.pieces) + s.work_ns / divisor for s, divisor in shared)
    slack = sum(max(p.grain_ns for p in s.pieces) / min(p.grain_ns for p in s.pieces) for s in stages)
    assert taken <= work / n + serial + longest * max(1.0, slack) + 1e-6
    assert simulate(stages, n, Costs(300.0, 80.0, 50.0)) >= taken


def test_one_thread_does_all_the_work() -> None:
    stages = [Stage((Piece(0, 5, 10.0), Piece(1, 2, 7.0)), False), Stage((Piece(2, 1, 4.0),), True)]
    assert simulate(stages, 1, FREE) == 68.0
    (alone,) = predict(stages, (1,), FREE)
    assert (alone.speed_up, alone.efficiency, alone.unshared, alone.handing_over) == (1.0, 1.0, 0.0, 0.0)


def test_equal_pieces_are_shared_out_evenly() -> None:
    stage = Stage((Piece(0, 64, 10.0),), False)
    assert simulate([stage], 4, FREE) == 160.0
    assert simulate([stage], 64, FREE) == simulate([stage], 128, FREE) == 10.0


def test_claims_stand_in_line() -> None:
    """Pieces without work take as long as the claims of all of them, and the counting down of those who worked."""
    stage = Stage((Piece(0, 8, 0.0),), False)
    assert simulate([stage], 8, Costs(0.0, 100.0, 0.0)) >= 8 * 100.0


def test_stages_of_an_engine() -> None:
    engine = Engine(build_image(GRAPH, choose_isa("host"), True), 1)
    x = example(500)
    stages = stages_of(engine, {"x": x}, n_runs=2)
    ran = [p.line for s in stages for p in s.pieces]
    assert ran == [i for i, line in enumerate(engine.image.lines) if line.kind == "run"]
    assert all(p.grain_ns > 0 for s in stages for p in s.pieces)
    assert any(s.n_grains > 1 for s in stages if not s.is_serial)
    found = examine(engine, {"x": x}, (1, 4))
    assert [p.threads for p in found.predictions] == [1, 4]
    assert found.n_stages == len(stages)


def test_costs_are_those_of_a_hand_over() -> None:
    costs = hand_over_costs()
    assert all(np.isfinite([costs.see_ns, costs.claim_ns, costs.step_ns]))
    assert costs.step_ns > 0


def test_counts_are_read() -> None:
    assert thread_counts("4, 8,128") == (4, 8, 128)
    assert thread_counts("") == ()
    for text in ("0", "4,x", "-1"):
        with pytest.raises(InputError, match="--threads"):
            thread_counts(text)
