"""Times of our own engine by kernel: which ONNX nodes, how long, how near to the limit; as rows and as one HTML page.

A row joins the events of several profiled runs with the engine's placement records. The page holds everything inside
itself: a table, and a roofline (arithmetic speed over arithmetic intensity) drawn as SVG.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from vivace.base.events import Event
from vivace.measure.peaks import Peaks


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One step of an engine. `seconds` is from its first start to its last end over all threads, median of the runs."""

    kernel: str
    nodes: tuple[str, ...]
    seconds: float
    flops: int
    bytes: int
    limit_seconds: float

    @property
    def operations_per_second(self) -> float:
        return self.flops / self.seconds if self.seconds else 0.0

    @property
    def share_of_limit(self) -> float:
        return self.limit_seconds / self.seconds if self.seconds else 0.0

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes if self.bytes else 0.0


def kernel_rows(
    runs: Sequence[Iterable[Event]],
    nodes: Mapping[str, Sequence[str]],
    peaks: Peaks,
    threads: int,
    dtype: str = "f32",
) -> tuple[KernelRow, ...]:
    """One row per kernel, in the order of their first start.

    `nodes` gives the ONNX nodes of each kernel. Operations count at the peak of `dtype`, bytes as if the nearest caches
    held as many of them as they can.
    """
    spans: dict[str, list[float]] = {}
    work: dict[str, tuple[int, int]] = {}
    for run in runs:
        ends: dict[str, tuple[int, int]] = {}
        for event in run:
            start, end = ends.get(event.kernel, (event.start_ns, 0))
            ends[event.kernel] = (min(start, event.start_ns), max(end, event.start_ns + event.duration_ns))
            work[event.kernel] = (event.flops, event.bytes)
        for kernel, (start, end) in sorted(ends.items(), key=lambda item: item[1][0]):
            spans.setdefault(kernel, []).append((end - start) / 1e9)
    return tuple(
        KernelRow(
            kernel,
            tuple(nodes.get(kernel, ())),
            median(seconds),
            *work[kernel],
            _limit(*work[kernel], peaks, threads, dtype),
        )
        for kernel, seconds in spans.items()
    )


def _limit(flops: int, n_bytes: int, peaks: Peaks, threads: int, dtype: str) -> float:
    return max(flops / peaks.operations(dtype, threads), peaks.read_seconds(n_bytes, threads))


def to_html(title: str, rows: Sequence[KernelRow], peaks: Peaks, threads: int) -> str:
    """A page with the roofline and the table."""
    total = sum(row.seconds for row in rows) or 1.0
    cells = "\n".join(
        f"<tr><td>{html.escape(row.kernel)}</td><td>{html.escape(', '.join(row.nodes))}</td>"
        f"<td>{row.seconds * 1e6:.1f}</td><td>{row.seconds / total:.1%}</td>"
        f"<td>{row.operations_per_second / 1e9:.1f}</td><td>{row.bytes / 1024:.0f}</td>"
        f"<td>{row.share_of_limit:.0%}</td></tr>"
        for row in rows
    )
    heads = "".join(
        f"<th>{head}</th>" for head in ("kernel", "ONNX nodes", "us", "of total", "GFLOP/s", "KiB", "of limit")
    )
    return _PAGE.format(title=html.escape(title), svg=to_svg(rows, peaks, threads), heads=heads, cells=cells)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px sans-serif; margin: 2em; color: #222; }}
table {{ border-collapse: collapse; }} td, th {{ padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd; }}
td:nth-child(-n+2), th:nth-child(-n+2) {{ text-align: left; max-width: 40em; overflow-wrap: anywhere; }}
</style></head><body><h1>{title}</h1>
{svg}
<table><thead><tr>{heads}</tr></thead><tbody>
{cells}
</tbody></table></body></html>
"""

_WIDTH, _HEIGHT, _MARGIN = 860, 480, 60


def to_svg(rows: Sequence[KernelRow], peaks: Peaks, threads: int) -> str:
    """The roofline: a line per memory level, a dot per kernel whose area is its time."""
    peak = peaks.operations("f32", threads)
    dots = [row for row in rows if row.flops and row.bytes and row.seconds]
    low_x = min([0.1, *(row.intensity for row in dots)])
    high_x = max([1000.0, *(row.intensity for row in dots)])
    low_y = min([peak / 1e3, *(row.operations_per_second for row in dots)])
    x_of = _scale(low_x, high_x, _MARGIN, _WIDTH - 10)
    y_of = _scale(low_y, peak * 1.5, _HEIGHT - _MARGIN, 10)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-size="12" fill="#222">',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 15}" text-anchor="middle">operations per byte</text>',
        f'<text x="15" y="{_HEIGHT / 2}" transform="rotate(-90 15 {_HEIGHT / 2})" text-anchor="middle">GFLOP/s</text>',
    ]
    parts += [_tick_x(x, x_of(x)) for x in _decades(low_x, high_x)]
    parts += [_tick_y(y / 1e9, y_of(y)) for y in _decades(low_y, peak * 1.5)]
    for name, _ in peaks.levels:
        bandwidth = peaks.read_bandwidth(name, threads)
        start, ridge = max(low_x, low_y / bandwidth), peak / bandwidth
        parts.append(_line(x_of(start), y_of(start * bandwidth), x_of(ridge), y_of(peak)))
        parts.append(f'<text x="{x_of(start) + 4:.0f}" y="{y_of(start * bandwidth) - 6:.0f}" fill="#777">{name}</text>')
    fastest = max(peaks.read_bandwidth(name, threads) for name, _ in peaks.levels)
    parts.append(_line(x_of(peak / fastest), y_of(peak), _WIDTH - 10, y_of(peak)))
    longest = max((row.seconds for row in dots), default=1.0)
    for row in sorted(dots, key=lambda row: -row.seconds):
        radius = 2 + 14 * math.sqrt(row.seconds / longest)
        note = html.escape(f"{row.kernel}: {row.seconds * 1e6:.1f} us, {row.share_of_limit:.0%} of the limit")
        parts.append(
            f'<circle cx="{x_of(row.intensity):.1f}" cy="{y_of(row.operations_per_second):.1f}" r="{radius:.1f}"'
            f' fill="#2a6fdb" fill-opacity="0.45"><title>{note}</title></circle>'
        )
    return "\n".join([*parts, "</svg>"])


def _scale(low: float, high: float, start: float, end: float):  # type: ignore[no-untyped-def]
    """A logarithmic axis from pixels `start` to `end`."""
    span = math.log(high / low)
    return lambda value: start + (end - start) * math.log(value / low) / span


def _decades(low: float, high: float) -> list[float]:
    return [10.0**n for n in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#888"/>'


def _tick_x(value: float, x: float) -> str:
    return f'<text x="{x:.0f}" y="{_HEIGHT - _MARGIN + 18}" text-anchor="middle">{value:g}</text>'


def _tick_y(value: float, y: float) -> str:
    return f'<text x="{_MARGIN - 8}" y="{y:.0f}" text-anchor="end">{value:g}</text>'
