"""Where bytes are slower than f32: the regions of quantized models, in integers, in f32 with the values as quantized,
and in the f32 model.

    python -m benchmarks.regions                      # every QDQ model, one thread
    python -m benchmarks.regions ppocr-cls --threads 2

Three engines run in turns, profiled: of the QDQ file as it is compiled (`i8`), of the same file without products of
integers (`undone`), and of the f32 model (`f32`). A region is the least set of ONNX nodes that all three compute in
whole steps; steps that stand for no node belong to the region before them. Time by region is the lower quintile of the
runs. Lists the regions in which bytes lose against either, by more than `LEAST`: against `undone`, which has the same
results, nothing should be listed beyond noise; against `f32`, which has no quantizations to compute, islands of f32
between integers are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from benchmarks.models import ModelUnavailable, inputs, materialise
from benchmarks.models.quantized import QUANTIZED, materialise_quantized
from benchmarks.records import RESULTS, versions

import vivace
from vivace.base.machine import host
from vivace.onnx.importer import import_model
from vivace.runtime.engine import Engine

LEAST, LEAST_US = 0.05, 1.0  # of a region's time, and of the clock
Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of timing per model")
    options = parser.parse_args(arguments)
    records: list[Record] = []
    for name in options.names or [q.base for q in QUANTIZED if q.form == "qdq"]:
        try:
            records.append(measure(name, options.threads, options.budget))
        except ModelUnavailable as missing:
            print(f"{name}: {missing}")
            continue
        print(_lines([records[-1]]), flush=True)
    if not options.names:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "regions.json").write_text(json.dumps(records, indent=1) + "\n")
        (RESULTS / "regions.md").write_text(markdown(records))
    return 0


def measure(name: str, threads: int, budget: float) -> Record:
    """Times one model. Raises: ModelUnavailable."""
    arrays = inputs(name)
    shapes = {key: a.shape for key, a in arrays.items()}
    files = (materialise_quantized(name), materialise(name))
    without = ("conv_in_integers", "matmul_in_integers")
    engines = {
        "i8": vivace.compile(files[0], threads=threads, shapes=shapes),
        "undone": vivace.compile(files[0], threads=threads, shapes=shapes, disable=without),
        "f32": vivace.compile(files[1], threads=threads, shapes=shapes),
    }
    if not all(isinstance(e, Engine) for e in engines.values()):
        raise ModelUnavailable(f"{name} does not run natively")
    names = [{o for n in import_model(f).walk() for o in n.origin} for f in files]
    region = regions({k: e for k, e in engines.items() if isinstance(e, Engine)}, names[0] & names[1])
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    end = time.perf_counter() + budget
    while time.perf_counter() < end:
        for k, e in engines.items():
            spent: dict[str, float] = defaultdict(float)
            for event in e.profile(arrays):
                spent[region[k][int(event.kernel.partition(":")[0])]] += event.duration_ns * 1e-3
            for r, us in spent.items():
                times[k, r].append(us)
    us = {key: float(np.quantile(found, 0.2)) for key, found in times.items()}
    rows = [
        {"region": r, **{k: round(us.get((k, r), 0.0), 2) for k in engines}} for r in dict.fromkeys(region["i8"]) if r
    ]
    return {"model": name, "threads": threads, "machine": host().model, "versions": versions(), "rows": rows}


def regions(engines: dict[str, Engine], known: set[str]) -> dict[str, list[str]]:
    """For each engine the region of every line: nodes of `known` that share a line in any engine are one."""
    above: dict[str, str] = {}

    def first(x: str) -> str:
        while x in above:
            x = above[x]
        return x

    lines: dict[str, list[str]] = {}
    for k, e in engines.items():
        lines[k], last = [], ""
        for line in e.image.lines:
            mine = [first(n) for n in line.nodes if n in known]
            for n in mine[1:]:
                if first(n) != first(mine[0]):
                    above[first(n)] = first(mine[0])
            last = mine[0] if mine else last
            lines[k].append(last)
    return {k: [first(x) for x in found] for k, found in lines.items()}


def losers(rows: Sequence[Record], against: str) -> list[Record]:
    """Regions in which bytes take longer, the worst first."""
    found = [r for r in rows if r["i8"] > r[against] * (1 + LEAST) + LEAST_US and r[against] > 0]
    return sorted(found, key=lambda r: r[against] - r["i8"])


def markdown(records: Sequence[Record]) -> str:
    """The tables for people."""
    about = f"{records[0]['machine']}, {records[0]['threads']} thread(s)" if records else "nothing was measured"
    return f"# Regions of quantized models\n\n{about}. Made by `python -m benchmarks.regions`; us.\n\n{_lines(records)}"


def _lines(records: Sequence[Record]) -> str:
    lines = ["| model | region | i8 | undone | f32 | slower than |", "|---|---|---|---|---|---|"]
    for record in records:
        rows, total = record["rows"], {k: sum(r[k] for r in record["rows"]) for k in ("i8", "undone", "f32")}
        lines.append(
            f"| {record['model']} | whole | {total['i8']:.0f} | {total['undone']:.0f} | {total['f32']:.0f} | |"
        )
        undone = losers(rows, "undone")
        for r in [*undone, *(r for r in losers(rows, "f32") if r not in undone)]:
            slower = "undone" if r in undone else "f32"
            lines.append(f"| | {r['region']} | {r['i8']:.1f} | {r['undone']:.1f} | {r['f32']:.1f} | {slower} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
