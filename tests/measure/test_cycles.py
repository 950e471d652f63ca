"""Where cycles go: kernels of one name as one, instructions counted from generated code, sentences that add up."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.batches import _slow
from benchmarks.cycles import merged, section
from benchmarks.tile_work import turn_of
from tests.targets.test_contraction import matmul

from vivace.base.machine import ISAS


def row(kernel: str, ns: float, **more: Any) -> dict[str, Any]:
    given = {"kernel": kernel, "calls": 1, "ns": ns, "flops": 1000, "bytes": 64, "written": 16, "work": None}
    return {**given, "turn": None, "limit_ns": ns / 2, "least_ns": ns, **more}


def test_kernels_of_one_name_are_one_row() -> None:
    work = {"products": 4, "loads": 4, "stores": 1, "fetches": 0, "vector": 10, "scalar": 5}
    found = merged([row("a", 30, work=work), row("b", 90, turn=[6, 9]), row("a", 10, work=work, calls=3)])
    assert [(r["kernel"], r["calls"], r["ns"]) for r in found] == [("b", 1, 90), ("a", 4, 40)]
    assert [r["instructions"] / r["products"] for r in found] == [1.5, 6.0]


def test_the_section_says_what_is_needed() -> None:
    rows = [row("matmul", 900, turn=[6, 9]), *(row(f"small{i}", 5) for i in range(20))]
    record = {"batch": 4, "each": 2, "rows": rows, "ns": 1100.0, "peak": 2.0}
    text = "\n".join(section({"net, f32, batch 4": (record, 1.0)}))
    assert "4 rows, 2 at a time: 0.001 ms in kernels" in text and "1.3 times needs 23% less time" in text
    assert "would take 50% of the time, 2.00 times the best peer" in text
    assert "| matmul | 1 | 90.0% |" in text and "| 20 others | 20 | 10.0% |" in text


def test_batches_that_are_slowest_against_their_peers() -> None:
    def measured(batch: int, threads: int, gain: float) -> dict[str, Any]:
        rounds = {"vivace": [1.0], "openvino": [gain]}
        return {"model": "m", "precision": "f32", "batch": batch, "threads": threads, "rounds": rounds}

    fast = [measured(4, 1, 1.5), measured(16, 1, 1.4)]
    assert _slow(fast) == []
    assert _slow([*fast, measured(1, 2, 1.2)]) == [("m", "f32", 1, 16)]


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_instructions_of_a_turn(isa: str) -> None:
    found = turn_of(matmul(28, 64, 64, ISAS[isa]).c, ISAS[isa])
    assert found is not None and 1 < found[1] / found[0] < 2
