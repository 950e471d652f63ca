"""What the verbs print: tables for people, JSON for programs, progress on standard error while someone watches.

Rules:
* PLAIN: where the output is no terminal there are no escape codes and no wrapping; NO_COLOR is obeyed (by rich).
* NARROW: a table of few rows that is wider than the terminal is turned, so that its figures stay whole.
* QUIET: progress appears on a terminal only, and only once something takes longer than a second.
* ONCE: a notice is a line on standard error, and the same one is told once, however many engines a verb makes.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Progress = Callable[[str, int, int], None]

SCHEMA_VERSION = 1
n_documents = 0  # that `print_json` printed
_WIDE = 200  # columns where nobody's terminal sets a width
_UNBOUNDED = 10_000
_PATIENCE_SECONDS = 1.0


def console() -> Console:
    """Standard output (PLAIN)."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else _WIDE)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Prints a table; the first `left` columns are words, the rest are figures (NARROW)."""
    screen = console()
    table = _table(columns, rows, left)
    wide = screen.options.update(width=_UNBOUNDED)
    if len(rows) < len(columns) and screen.measure(table, options=wide).maximum > screen.width:
        heads = [row[0] for row in rows]
        turned = [[name, *(row[i] for row in rows)] for i, name in enumerate(columns) if i]
        table = _table([columns[0], *heads], turned, 1)
    if title:
        print(title)
    screen.print(table)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(_escape(column), justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(_escape, row))
    return table


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def print_json(data: dict[str, Any]) -> None:
    """One JSON document; NaN and infinities, which JSON lacks, become null."""
    global n_documents
    n_documents += 1
    print(json.dumps({"schema_version": SCHEMA_VERSION, **data}, indent=2, default=str, allow_nan=False))


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def shapes_text(shapes: Mapping[str, Sequence[int]]) -> str:
    """The shapes of arrays on part of a line, as `--shapes` takes them."""
    text = ", ".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return text if len(text) <= 100 else text[:97] + "..."


class _Told(logging.Handler):
    """Notices as lines (ONCE)."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.told:
            self.told.add(text)
            print(f"notice: {text}", file=sys.stderr)


@contextmanager
def notices() -> Iterator[None]:
    """Tells what the logger of notices gets (ONCE)."""
    logger, handler = logging.getLogger("vivace"), _Told()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def progress() -> Iterator[Progress | None]:
    """A function that shows how far something is, or None where nobody watches (QUIET)."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    bar = Bar(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
              TimeElapsedColumn(), console=Console(stderr=True), transient=True)  # fmt: skip
    task = bar.add_task("", total=None)
    later = threading.Timer(_PATIENCE_SECONDS, bar.start)  # also where nothing more is told by then
    later.daemon, is_begun = True, False

    def show(stage: str, done: int, total: int) -> None:
        nonlocal is_begun
        bar.update(task, description=stage, completed=done, total=total)
        if not is_begun:
            later.start()
        is_begun = True

    try:
        yield show
    finally:
        if is_begun:
            later.cancel()
            later.join()
        bar.stop()


def duration(seconds: float) -> str:
    """`12.3 us`, `4.56 ms`, `7.89 s`: three figures."""
    if not math.isfinite(seconds):
        return "-"
    if not seconds:
        return "0 s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{_three(seconds / scale)} {unit}"
    return f"{_three(seconds * 1e9)} ns"


def size(n_bytes: float) -> str:
    """`12.3 MiB`."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n_bytes >= scale:
            return f"{_three(n_bytes / scale)} {unit}"
    return f"{n_bytes:.0f} B"


def amount(value: float) -> str:
    """`4.11 G`: three figures with a decimal prefix."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{_three(value / scale)} {unit}"
    return f"{_three(value)} "


def _three(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}"
