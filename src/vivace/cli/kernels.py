"""The kernels of one of our engines, for `vivace bench --layers` and `--html`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vivace.measure.peaks import Peaks
from vivace.measure.report import KernelRow, kernel_rows, to_html

_N_RUNS = 20


@dataclass(frozen=True, slots=True)
class KernelTable:
    """Rows in the order of execution, with the peaks that they are held against."""

    rows: tuple[KernelRow, ...]
    peaks: Peaks
    threads: int

    @staticmethod
    def of(engine: Any, arrays: Mapping[str, Any], peaks: Peaks, threads: int, dtype: str = "f32") -> KernelTable:
        """Profiles some runs of the engine; its products are in `dtype`."""
        nodes: dict[str, list[str]] = {}
        for place in engine.placement:
            nodes.setdefault(place.kernel, []).append(place.node)
        for _ in range(3):
            engine.run(arrays)
        runs = [engine.profile(arrays) for _ in range(_N_RUNS)]
        return KernelTable(kernel_rows(runs, nodes, peaks, threads, dtype), peaks, threads)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as JSON holds them."""
        from vivace.cli.console import plain

        return [
            {**plain(row), "operations_per_second": row.operations_per_second, "share_of_limit": row.share_of_limit}
            for row in self.rows
        ]

    def print(self) -> None:
        """The table for people."""
        from vivace.cli.console import amount, print_table, size

        total = sum(row.seconds for row in self.rows) or 1.0
        rows = [
            [
                row.kernel,
                _shorten(", ".join(row.nodes)),
                f"{row.seconds * 1e6:.1f}",
                f"{row.seconds / total:.1%}",
                amount(row.operations_per_second) if row.flops else "-",
                size(row.bytes),
                f"{row.share_of_limit:.0%}",
            ]
            for row in self.rows
        ]
        print_table("kernels", ["kernel", "ONNX nodes", "us", "of total", "FLOP/s", "bytes", "of limit"], rows, left=2)

    def write_html(self, path: Path, title: str) -> None:
        """Writes the page as a whole or not at all."""
        from vivace.base.cache import write_atomic

        write_atomic(path, [to_html(title, self.rows, self.peaks, self.threads).encode()])


def _shorten(text: str, width: int = 70) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
