"""Writes the pages that are made from the source: `make docs`. A test fails while one of them is out of date."""

from __future__ import annotations

from pathlib import Path

from vivace.base.knobs import render_knobs
from vivace.optimize.rulebook import render_rules

PAGES = {"knobs.md": render_knobs, "rules.md": render_rules}

if __name__ == "__main__":
    for name, render in PAGES.items():
        (Path(__file__).parent / name).write_text(render(), encoding="utf-8")
