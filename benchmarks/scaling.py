"""How each model would be shared out among 4 to 128 threads, and how well the simulation fits one and two threads here.

    python -m benchmarks.scaling [model ...] [--again]

For each model: the stages between hand-overs, the predicted efficiency (`vivace.measure.scaling`), and the measured
medians on one and two threads beside the simulated ones, the two engines in turns in one process. The fit says what the
simulation leaves out here: memory and caches that two threads share.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.models import MODELS, ModelUnavailable, inputs, materialise
from benchmarks.records import ROOT, kept, versions

import vivace
from vivace.base.machine import host
from vivace.cli.console import plain
from vivace.measure.noise import noise_since, snapshot
from vivace.measure.scaling import examine
from vivace.runtime.engine import Engine

RECORDS = ROOT / "benchmarks" / "out" / "scaling"
RESULTS = ROOT / "benchmarks" / "results"
THREADS = (4, 8, 16, 32, 64, 128)
CHECKED = (1, 2)  # thread counts that are also measured
_ROUNDS = 5

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL")
    parser.add_argument("--again", action="store_true", help="measure anew what is already there")
    options = parser.parse_args(arguments)
    RECORDS.mkdir(parents=True, exist_ok=True)
    for name in options.names or [model.name for model in MODELS if model.variant_of is None]:
        path = RECORDS / f"{name}.json"
        if not options.again and kept(path):
            continue
        try:
            record = measure(name)
        except ModelUnavailable as missing:
            print(f"{name}: {missing}")
            continue
        path.write_text(json.dumps(record))
        print(f"{name:26} {', '.join(f'{t}: {p:.1f}x' for t, p in speed_ups(record).items())}", flush=True)
    order = {model.name: i for i, model in enumerate(MODELS)}
    records = [r for path in RECORDS.glob("*.json") if (r := kept(path))]
    records.sort(key=lambda r: order.get(r["model"], 0))
    (RESULTS / "scaling.json").write_text(json.dumps(records, separators=(",", ":")) + "\n")
    (RESULTS / "scaling.md").write_text(markdown(records))
    return 0


def measure(name: str) -> Record:
    """One model. Raises: ModelUnavailable."""
    arrays = inputs(name)
    one = vivace.compile(materialise(name), threads=1, shapes={key: a.shape for key, a in arrays.items()})
    if not isinstance(one, Engine):
        raise ModelUnavailable(f"{name} does not run natively")
    two = Engine(one.image, CHECKED[1], one.placement)
    times: dict[int, list[int]] = {n: [] for n in CHECKED}
    for engine in (one, two):
        engine.run(arrays)
    start_of_noise = snapshot()
    for _ in range(_ROUNDS):
        for engine in (one, two):
            engine.run(arrays)
            began, n_calls = time.perf_counter(), 0
            while n_calls < 2 or (time.perf_counter() - began < 0.05 and n_calls < 200):
                start = time.perf_counter_ns()
                engine.run(arrays)
                times[engine.threads].append(time.perf_counter_ns() - start)
                n_calls += 1
    foreign_cores = noise_since(start_of_noise).foreign_cores
    found = examine(one, arrays, (*CHECKED, *THREADS))
    return {
        "model": name, "scaling": plain(found), "measured_seconds": {n: median(t) / 1e9 for n, t in times.items()},
        "foreign_cores": foreign_cores, "machine": host().model, "versions": versions(),
    }  # fmt: skip


def speed_ups(record: Record) -> dict[int, float]:
    return {p["threads"]: p["speed_up"] for p in record["scaling"]["predictions"]}


def markdown(records: Sequence[Record]) -> str:
    """Two tables: the fit on this machine, and the predicted efficiency."""
    machines = "; ".join(sorted({r["machine"] for r in records}))
    lines = ["# Many cores, on paper", "", f"{machines}. Made by `python -m benchmarks.scaling`.", ""]
    lines += ["## The simulation against this machine", ""]
    heads = [
        "model",
        "stages",
        "shared out",
        "1 thread ms (simulated; measured)",
        "2 threads ms",
        "times faster",
        "notes",
    ]
    lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for r in records:
        s, measured = r["scaling"], {int(n): t * 1e3 for n, t in r["measured_seconds"].items()}
        simulated = {p["threads"]: p["seconds"] * 1e3 for p in s["predictions"]}
        pairs = " | ".join(f"{simulated[n]:.3g}; {measured[n]:.3g}" for n in CHECKED)
        gains = f"{simulated[1] / simulated[2]:.2f}; {measured[1] / measured[2]:.2f}"
        gains = "stays on one" if s["stays_on_one"] else gains
        noise = f"others used {r['foreign_cores']:.1f} cores" if r["foreign_cores"] >= 0.1 else ""
        lines.append(f"| {r['model']} | {s['n_stages']} | {s['n_barriers']} | {pairs} | {gains} | {noise} |")
    lines += ["", "## Predicted efficiency", ""]
    lines.append("Work over the time of all threads; in brackets how many times faster than one thread.")
    lines += ["", f"| model | one piece only | {' | '.join(map(str, THREADS))} |", f"|{'---|' * (2 + len(THREADS))}"]
    for r in records:
        s = r["scaling"]
        found = {p["threads"]: p for p in s["predictions"]}
        cells = [f"{found[n]['efficiency']:.0%} ({found[n]['speed_up']:.3g}x)" for n in THREADS]
        lines.append(f"| {r['model']} | {s['serial_share']:.1%} | {' | '.join(cells)} |")
    lines += ["", "## Where the time of 32 threads goes", "", "| model | work | no piece to take | handing over |"]
    lines.append("|---|---|---|---|")
    for r in records:
        p = next(p for p in r["scaling"]["predictions"] if p["threads"] == 32)
        lines.append(f"| {r['model']} | {p['efficiency']:.0%} | {p['unshared']:.0%} | {p['handing_over']:.0%} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
