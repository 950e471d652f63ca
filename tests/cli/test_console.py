"""Tables on narrow terminals, and progress."""

from __future__ import annotations

import sys
import threading

import pytest
from rich.console import Console

from vivace.cli import console

COLUMNS = ["engine", "median", "least", "ours / this", "of limit", "first run", "answer"]
ROWS = [
    ["vivace 0.1.0", "327 us", "301 us", "", "33%", "2.76 ms", "equal (6e-08)"],
    ["onnxruntime 1.32.0", "863 us", "646 us", "0.378 [0.363, 0.418]", "13%", "1.40 ms", "equal (0e+00)"],
]


@pytest.mark.parametrize(("width", "is_turned"), [(200, False), (80, True)])
def test_a_wide_table_is_turned(
    width: int, is_turned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "console", lambda: Console(highlight=False, width=width))
    console.print_table("times", COLUMNS, ROWS)
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    heads = [line[0].strip() for line in lines]
    assert ("median" in heads) is is_turned
    assert ("vivace 0.1.0" in heads) is not is_turned
    cells = {cell.strip() for line in lines for cell in line}
    assert {cell for row in ROWS for cell in row if cell} <= cells  # none is broken


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("[red]m.onnx  x[a]:1", ["[b]name", "n"], [["y[/b]", "1"]])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[red]m.onnx  x[a]:1", "[b]name", "y[/b]"))


class _Terminal:
    """Standard error of somebody who watches."""

    def __init__(self) -> None:
        self.text, self.is_shown = "", threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        if "reading" in self.text:
            self.is_shown.set()
        return len(text)

    def flush(self) -> None:
        pass


def test_progress_shows_though_nothing_more_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(console, "_PATIENCE_SECONDS", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    with console.progress() as show:
        assert show is not None
        show("reading", 0, 1)
        assert terminal.is_shown.wait(30)
    n = len(terminal.text)
    with console.progress():  # where nothing is told, nothing is shown
        pass
    assert len(terminal.text) == n
