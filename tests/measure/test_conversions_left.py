"""The page of conversions that are left."""

from __future__ import annotations

from benchmarks.conversions_left import Row, page


def test_the_page_counts_all_and_shows_those_that_cost() -> None:
    def step(us: float) -> dict[str, object]:
        return {"value": "x", "step": "copy", "before": "f32", "after": "u8", "cost_us": us, "bytes": 8, "why": "so"}

    text = page([Row("net", "qdq", (step(1.5), step(20.0)), {"cast": 3}), Row("other", "f32", (), {})])
    assert "| net | qdq | 2 | 21.5 | 3 cast |" in text and "| other | f32 | 0 | 0.0 | - |" in text
    assert text.count("| net | qdq | copy | f32 | u8 |") == 1 and "| 20.0 | so |" in text
