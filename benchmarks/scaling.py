"""How each model would be shared out among 4 to 128 threads, and how well the simulation fits one and two threads here.

    python -m benchmarks.scaling [model ...] [--again]

For each model: the stages between hand-overs, the predicted efficiency (`vivace.measure.scaling`), and the measured
medians on one and two threads beside the simulated ones. The fit says what the simulation leaves out here.

Cores of a shared machine are not equally fast at a time, so one round takes in turn: one thread on each of two cores,
two engines of one thread at once, and one engine of two threads. One thread counts as the mean of both cores; what two
engines at once lose is the machine's (memory, caches, clocks), what one of two threads loses beyond is ours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from statistics import harmonic_mean, mean, median, quantiles
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
_SECONDS, _LEAST_ROUNDS = 15.0, 5

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL")
    parser.add_argument("--again", action="store_true", help="measure anew what is already there")
    options = parser.parse_args(arguments)
    RECORDS.mkdir(parents=True, exist_ok=True)
    for name in options.names or [model.name for model in MODELS if model.variant_of is None]:
        path = RECORDS / f"{name}.json"
        if not options.again and kept(path, "rounds"):
            continue
        try:
            record = measure(name)
        except ModelUnavailable as missing:
            print(f"{name}: {missing}")
            continue
        path.write_text(json.dumps(record))
        print(f"{name:26} {', '.join(f'{t}: {p:.1f}x' for t, p in speed_ups(record).items())}", flush=True)
    order = {model.name: i for i, model in enumerate(MODELS)}
    records = [r for path in RECORDS.glob("*.json") if (r := kept(path, "rounds"))]
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
    rounds, foreign_cores = take_turns(one, arrays)
    found = examine(one, arrays, (*CHECKED, *THREADS))
    return {
        "model": name, "scaling": plain(found), "rounds": rounds,
        "foreign_cores": foreign_cores, "machine": host().model, "versions": versions(),
    }  # fmt: skip


def take_turns(one: Engine, arrays: Any) -> tuple[list[dict[str, list[float]]], float]:
    """Rounds of mean seconds: `alone` and `at once` for each of two cores, and `shared` between them; and how many
    cores others used meanwhile.
    """
    cores = sorted(os.sched_getaffinity(0))[: CHECKED[1]]
    copies = [Engine(one.image, 1, one.placement) for _ in cores]
    two = Engine(one.image, CHECKED[1], one.placement)

    def seconds(engine: Engine) -> float:
        engine.run(arrays)
        times: list[float] = []
        while len(times) < 2 or (sum(times) < 0.05 and len(times) < 200):
            start = time.perf_counter()
            engine.run(arrays)
            times.append(time.perf_counter() - start)
        return mean(times)

    def on_cores(which: Sequence[int]) -> list[float]:
        found = dict.fromkeys(which, 0.0)

        def work(i: int) -> None:
            os.sched_setaffinity(0, {cores[i]})  # of this thread
            found[i] = seconds(copies[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in which]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return list(found.values())

    rounds: list[dict[str, list[float]]] = []
    start_of_noise, began = snapshot(), time.perf_counter()
    while len(rounds) < _LEAST_ROUNDS or time.perf_counter() - began < _SECONDS:
        alone = [t for i in range(len(cores)) for t in on_cores([i])]
        rounds.append({"alone": alone, "at once": on_cores(range(len(cores))), "shared": [seconds(two)]})
    return rounds, noise_since(start_of_noise).foreign_cores


def factors(record: Record, kind: str) -> list[float]:
    """By round, how many times as much as one thread two do: as engines of their own (`at once`), or in one
    (`shared`).
    """
    ratios = [harmonic_mean(r["alone"]) / harmonic_mean(r[kind]) for r in record["rounds"]]
    return [x * CHECKED[1] for x in ratios] if kind == "at once" else ratios


def _spread(values: Sequence[float]) -> str:
    """Median and middle half."""
    low, middle, high = quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def speed_ups(record: Record) -> dict[int, float]:
    return {p["threads"]: p["speed_up"] for p in record["scaling"]["predictions"]}


def markdown(records: Sequence[Record]) -> str:
    """Two tables: the fit on this machine, and the predicted efficiency."""
    machines = "; ".join(sorted({r["machine"] for r in records}))
    lines = ["# Many cores, on paper", "", f"{machines}. Made by `python -m benchmarks.scaling`.", ""]
    lines += ["## Two threads against one", ""]
    lines.append("Medians of rounds, with the middle half; how many times as much two threads do as one.")
    lines += ["", "| model | 1 thread ms, by core | 2 threads ms | two engines at once | one engine | notes |"]
    lines.append(f"|{'---|' * 6}")
    for r in records:
        alone = "; ".join(f"{median(t) * 1e3:.3g}" for t in zip(*(x["alone"] for x in r["rounds"])))
        shared = median(x["shared"][0] for x in r["rounds"]) * 1e3
        one_engine = "stays on one" if r["scaling"]["stays_on_one"] else _spread(factors(r, "shared"))
        noise = f"others used {r['foreign_cores']:.1f} cores" if r["foreign_cores"] >= 0.1 else ""
        engines = _spread(factors(r, "at once"))
        lines.append(f"| {r['model']} | {alone} | {shared:.3g} | {engines} | {one_engine} | {noise} |")
    lines += ["", "## The simulation against this machine", ""]
    lines.append("| model | stages | shared out | 1 thread ms (simulated; measured) | 2 threads ms | times faster |")
    lines.append(f"|{'---|' * 6}")
    for r in records:
        s = r["scaling"]
        measured = {
            1: median(harmonic_mean(x["alone"]) for x in r["rounds"]) * 1e3,
            2: median(x["shared"][0] for x in r["rounds"]) * 1e3,
        }
        simulated = {p["threads"]: p["seconds"] * 1e3 for p in s["predictions"]}
        pairs = " | ".join(f"{simulated[n]:.3g}; {measured[n]:.3g}" for n in CHECKED)
        gains = f"{simulated[1] / simulated[2]:.2f}; {median(factors(r, 'shared')):.2f}"
        gains = "stays on one" if s["stays_on_one"] else gains
        lines.append(f"| {r['model']} | {s['n_stages']} | {s['n_barriers']} | {pairs} | {gains} |")
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
