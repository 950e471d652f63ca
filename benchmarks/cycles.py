"""Where the cycles of a model go, for the rows of `benchmarks.batches` that are not `WANTED` times the best peer.

`measure` times the kernels of one model, precision and batch on one thread (`tile_work`); `section` is what the page
says of it. Kernels of one name (what they compute, with rows, steps and columns) are one row.

Rules:
* LIMIT: a kernel needs the time of its operations at the peak that took turns with it, or that of its bytes from the
  nearest caches that could hold them, whichever is longer.
* MOST: kernels are shown until they make `SHOWN` of the time; the others are one row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.peak import long_peak
from benchmarks.tile_work import OPERATIONS, Work, least_ns, measure_model

from vivace.base.machine import host
from vivace.measure.peaks import machine_peaks

WANTED = 1.3
SHOWN = 0.9

ABOUT = """\
For each model and precision with a row below 1.3, on one thread: at the lowest 10 % of their times, the kernels that
make 90 % of the time, those of equal rows, steps and columns together. GOP are the operations of the kernel (Winograd's
are fewer than those of the definition, by which the table above counts), bytes those of its operands, each once. "of
limit" is what the kernel needs at least, its operations at the peak or its bytes from the nearest caches that could
hold them, over what it takes. "instructions" are those for one product, of two tile registers or, in f32, one
multiply-add of a vector: all that its micro-kernels execute, or one turn of the innermost loop, the product included.
"of least" is the time that these need at least on matrix units, as in [gemm.md](gemm.md), over what the kernel takes.
"""
HEAD = ("kernel", "calls", "of time", "GOP", "of peak", "MB read", "MB written", "GB/s", "of limit", "instructions",
        "of least")  # fmt: skip
_SUMS = ("calls", "ns", "flops", "bytes", "written", "limit_ns", "least_ns")

Record = dict[str, Any]


def measure(path: Path, arrays: Mapping[str, np.ndarray], precision: str, seconds: float) -> Record:
    """The kernels of a model with their limits (rule LIMIT)."""
    found = measure_model(path, arrays, precision, long_peak(precision, 1), seconds)
    peaks = machine_peaks()
    for row in found["rows"]:
        n_bytes = row["bytes"] / row["calls"]
        row["least_ns"] = least_ns(row, found["peak"], OPERATIONS[precision]) if row["work"] else row["ns"]
        row["limit_ns"] = max(row["flops"] / found["peak"], row["calls"] * peaks.read_seconds(n_bytes, 1) * 1e9)
    return {**found, "machine": host().model}


def merged(rows: Sequence[Record]) -> list[Record]:
    """Kernels of one name as one, the longest first; `instructions` and `products` are sums over all calls."""
    found: dict[str, Record] = {}
    for r in rows:
        row = found.setdefault(r["kernel"], defaultdict(float, kernel=r["kernel"]))
        for key in _SUMS:
            row[key] += r[key]
        if r["work"]:
            work = Work(**r["work"])
            row["products"] += r["calls"] * work.products
            row["instructions"] += r["calls"] * sum(r["work"].values())
        elif r["turn"]:  # of so many multiply-adds and instructions, told apart by their share of the operations
            row["products"] += r["flops"]
            row["instructions"] += r["flops"] * r["turn"][1] / r["turn"][0]
    return sorted(found.values(), key=lambda row: -row["ns"])


def section(records: Mapping[str, tuple[Record, float]]) -> list[str]:
    """Lines of the page, from records by title, each with the throughput over the best peer's at that batch."""
    lines = ["## Where the cycles go", "", ABOUT]
    for title, (record, gain) in records.items():
        lines += [f"### {title}", "", *_sentences(record, gain), "", *_table(record), ""]
    return lines


def _sentences(record: Record, gain: float) -> list[str]:
    total, limit, least = (sum(row[key] for row in record["rows"]) for key in ("ns", "limit_ns", "least_ns"))
    slices = f", {record['each']} at a time" if record["each"] != record["batch"] else ""
    lost = sorted(merged(record["rows"]), key=lambda row: row["limit_ns"] - row["ns"])[:3]
    named = ", ".join(f"{row['kernel']} ({(row['ns'] - row['limit_ns']) / total:.0%})" for row in lost)
    needed = f"{WANTED} times needs {1 - gain / WANTED:.0%} less time" if gain < WANTED else f"{WANTED} is reached"
    tiles = f"; as fast as its instructions on tiles allow, {gain * total / least:.2f} times" if least < total else ""
    return [
        f"{record['batch']} rows{slices}: {total / 1e6:.4g} ms in kernels, {record['ns'] / 1e6:.4g} ms in all; peak",
        f"{record['peak']:.0f} GOP/s. {gain:.2f} times the best peer; {needed}. With every kernel at its limit it",
        f"would take {limit / total:.0%} of the time, {gain * total / limit:.2f} times the best peer{tiles}. Most is",
        f"lost in {named}.",
    ]


def _table(record: Record) -> list[str]:
    rows, total = merged(record["rows"]), sum(row["ns"] for row in record["rows"])
    shown, time = 0, 0.0
    while shown < len(rows) and time < SHOWN * total:
        time += rows[shown]["ns"]
        shown += 1
    table = [_cells(row, total, record["peak"]) for row in rows[:shown]]
    if rest := rows[shown:]:
        other: Record = {"kernel": f"{len(rest)} others"}
        for key in _SUMS:
            other[key] = sum(row[key] for row in rest)
        table.append(_cells(other, total, record["peak"]))
    return [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}", *(f"| {' | '.join(cells)} |" for cells in table)]


def _cells(r: Record, total: float, peak: float) -> list[str]:
    each = r["instructions"] / r["products"] if r.get("products") else 0.0
    return [
        r["kernel"], f"{r['calls']:.0f}", f"{r['ns'] / total:.1%}", f"{r['flops'] / 1e9:.3g}",
        f"{r['flops'] / r['ns'] / peak:.0%}", f"{(r['bytes'] - r['written']) / 1e6:.1f}", f"{r['written'] / 1e6:.1f}",
        f"{r['bytes'] / r['ns']:.1f}", f"{r['limit_ns'] / r['ns']:.0%}",
        f"{each:.{0 if each >= 10 else 2}f}" if each else "-",
        f"{r['least_ns'] / r['ns']:.0%}" if r["least_ns"] < r["ns"] else "-",
    ]  # fmt: skip
