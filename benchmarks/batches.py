"""Throughput at batches of 1, 4, 16 and 64: ours, ONNX Runtime's, OpenVINO's, and torch.compile's with --torch.

    python -m benchmarks.batches            # ResNet-50 and MiniLM in f32, bf16 and int8; takes up where it was stopped
    python -m benchmarks.batches resnet50 --threads 1 --precision bf16 --batches 4 16
    python -m benchmarks.batches --cycles   # measures anew only where the cycles go, of rows below 1.3 (`cycles.py`)

All engines take turns in one process with equal threads and inputs (`vivace.measure.bench`), each told the shapes; what
is shown is the batch over the median time of a call. MiniLM reads sentences of 128 tokens. int8 runs the quantized
(QDQ) versions.

Rules:
* APART, RESUMABLE: each batch is a process and a record of its own.
* SHORT TURNS, MANY ROUNDS: a turn on a large batch is one call after one that is not counted, and there are at least
  `LEAST_ROUNDS` rounds, however long they take.
* PAIRED: the gain over a peer is the median over the rounds of its time over ours in that round, so that a machine that
  runs several times slower for some seconds slows both. So is our share of the peak, which takes turns too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from benchmarks import cycles
from benchmarks.compiled_torch import torch_contestant, why_not
from benchmarks.models import find, materialise
from benchmarks.models.quantized import materialise_quantized
from benchmarks.peak import beside_engines, long_peak
from benchmarks.records import PROVIDERS, ROOT, kept, output_names, versions
from benchmarks.tile_work import PRODUCTS

from vivace.base.machine import host

if TYPE_CHECKING:
    from vivace.cli.contestants import Job

RECORDS = ROOT / "benchmarks" / "out" / "batches"
RESULTS = ROOT / "benchmarks" / "results"
NAMES = ("resnet50", "minilm-l6")
# onnxruntime's quantizer knows attention only where it is written out plainly.
QUANTIZED = {"minilm-l6": "minilm-l6-eager"}
BATCHES = (1, 4, 16, 64)
PRECISIONS = ("f32", "bf16", "int8")
LEAST_ROUNDS = 8
ENGINES = ("vivace", "onnxruntime", "openvino", "torch")
CYCLES_AT = (4, 16)

LIMIT = """\
"of peak": the operations of all products, as the model defines them, in our time, as a share of what a loop of nothing
but products in registers does in the same rounds. "at the peak": what "over the best peer" would be if we took no
longer than that loop. Winograd, in f32, needs 3/4 of the operations of ResNet-50.
"""

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.one:
        one = (options.names[0], options.precision[0], options.threads[0], options.batches[0])
        print(json.dumps((measure_cycles if options.cycles else measure_one)(*one, options)))
        return 0
    RECORDS.mkdir(parents=True, exist_ok=True)
    jobs = () if options.cycles else itertools.product(
        options.names, options.precision, options.threads, options.batches
    )  # fmt: skip
    for job in jobs:
        name, precision, threads, batch = job
        key = f"{name}-{precision}-{threads}-{batch:03}"
        path = RECORDS / f"{key}.json"
        if not options.again and kept(path, "rounds", "peak_seconds"):
            continue
        if _in_child(job, path, options):
            print(f"{key:32} {describe(json.loads(path.read_text()))}", flush=True)
    records = [r for path in sorted(RECORDS.glob("*.json")) if (r := kept(path, "rounds"))]
    kernels: list[Record] = []
    for job in _slow(records):
        path = RECORDS / f"cycles-{job[0]}-{job[1]}.json"
        found, is_wanted = kept(path, "rows"), job[0] in options.names and job[1] in options.precision
        if is_wanted and (options.cycles or found is None or found["batch"] != job[3]):
            print(f"cycles of {job[0]} in {job[1]}, batch {job[3]}", flush=True)
            found = kept(path) if _in_child(job, path, options, "--cycles") else None
        kernels += [found] if found else []
    (RESULTS / "batches.json").write_text(json.dumps(records, indent=1) + "\n")
    (RESULTS / "batches-cycles.json").write_text(json.dumps(kernels, indent=1) + "\n")
    (RESULTS / "batches.md").write_text(markdown(records, kernels))
    return 0


def _in_child(job: tuple[str, str, int, int], path: Path, options: argparse.Namespace, *more: str) -> bool:
    """Whether a child process measured and left its record (rule APART)."""
    name, precision, threads, batch = job
    command = [sys.executable, "-m", "benchmarks.batches", name, "--one", "--threads", str(threads), *more]
    command += ["--batches", str(batch), "--precision", precision]
    command += ["--budget", str(options.budget), *(["--torch"] if options.torch else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        print(f"{path.stem}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        return False
    path.write_text(done.stdout.strip().splitlines()[-1] + "\n")
    return True


def _slow(records: Sequence[Record]) -> list[tuple[str, str, int, int]]:
    """For each model and precision with rows on one thread below what is wanted, the batch, of 4 and 16, that is
    slowest against its peers."""
    worst: dict[tuple[str, str], tuple[float, int]] = {}
    below = {(r["model"], r["precision"]) for r in records if (_gain(r) or cycles.WANTED) < cycles.WANTED}
    for r in records:
        key = r["model"], r["precision"]
        if key in below and r["threads"] == 1 and r["batch"] in CYCLES_AT and (gain := _gain(r)):
            worst[key] = min(worst.get(key, (gain, r["batch"])), (gain, r["batch"]))
    return [(model, precision, 1, batch) for (model, precision), (_, batch) in sorted(worst.items())]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batches", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL", default=list(NAMES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of timing per batch")
    parser.add_argument("--torch", action="store_true", help="time torch.compile too (extra `torch`, a C++ compiler)")
    parser.add_argument("--again", action="store_true", help="measure anew what is already there")
    parser.add_argument("--cycles", action="store_true", help="measure anew where the cycles go, and nothing else")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser


def measure_cycles(name: str, precision: str, threads: int, batch: int, options: argparse.Namespace) -> Record:
    """Times the kernels of one batch in this process."""
    path, arrays = _model_and_inputs(name, precision, batch)
    found = cycles.measure(path, arrays, precision, 2 * options.budget)
    return {"model": name, "precision": precision, "versions": versions(), **found}


def _model_and_inputs(name: str, precision: str, batch: int) -> tuple[Path, dict[str, np.ndarray]]:
    path = materialise_quantized(QUANTIZED.get(name, name), "qdq") if precision == "int8" else materialise(name)
    model = find(name)
    return path, model.generate((batch, *model.cases[0].shape[1:]), 0)


def measure_one(name: str, precision: str, threads: int, batch: int, options: argparse.Namespace) -> Record:
    """Times one batch in this process."""
    from vivace.cli.bench import gather_inputs
    from vivace.cli.contestants import Job, contestant, open_engine
    from vivace.measure.bench import Settings, bench
    from vivace.measure.compare import LEAST_SNR_DB, Tolerance

    is_quantized = precision == "int8"
    path, arrays = _model_and_inputs(name, precision, batch)
    _, job = gather_inputs(Job(path, threads, shapes={k: v.shape for k, v in arrays.items()}), (), 0)
    arrays = {key: arrays[key] for key in job.shapes}
    reference = open_engine("onnxruntime", job).run(arrays)
    job = replace(job, precision="f32" if is_quantized else precision)
    peak = long_peak(precision, threads)
    contestants = [*(contestant(provider, job) for provider in PROVIDERS), beside_engines(peak, reference)]
    if options.torch and not is_quantized and not why_not(name):
        contestants.append(torch_contestant(name, threads, output_names(path), precision))
    settings = Settings(budget_seconds=options.budget, least_rounds=LEAST_ROUNDS, least_calls=1)
    tolerance = Tolerance(1e-3, 1e-3, None if precision == "f32" else LEAST_SNR_DB)
    found = bench(contestants, arrays, settings, reference=reference, tolerance=tolerance)
    engines = {e.name: e for e in found.engines}
    rounds = {n: [statistics.median(r) for r in e.calls] for n, e in engines.items() if not e.failure}
    del engines["peak"]
    scale = operations(job) / peak.n_operations
    return {
        "model": name, "batch": batch, "threads": threads, "precision": precision,
        "medians": {n: e.median if not e.failure else None for n, e in engines.items()},
        "peak_seconds": [seconds * scale for seconds in rounds.pop("peak")], "rounds": rounds,
        "failures": {n: e.failure for n, e in engines.items() if e.failure},
        "agrees": {n: e.agrees for n, e in engines.items()},
        "foreign_cores": found.noise.foreign_cores,
        "machine": host().model, "versions": versions(),
    }  # fmt: skip


def operations(job: Job) -> int:
    """Of all products of a model, by their definition."""
    from vivace.compilation import load_graph
    from vivace.measure.roofline import layers
    from vivace.optimize.pipeline import optimize

    work = layers(optimize(load_graph(job.model, job.shapes)), job.sizes, job.precision)
    return sum(layer.flops for layer in work if layer.op in PRODUCTS)


def describe(record: Record) -> str:
    """One line on a batch."""
    rates = (f"{name} {record['batch'] / m:.1f}/s" for name, m in record["medians"].items() if m)
    return "  ".join([*rates, f"{_gain(record):.2f}x the best peer" if _gain(record) else ""])


def _gain(record: Record, ours: Sequence[float] = ()) -> float | None:
    """Our throughput over that of the best peer, or that which `ours` in each round would be (rule PAIRED)."""
    rounds = record["rounds"]
    if "vivace" not in rounds or len(rounds) < 2:
        return None
    peers = (found for name, found in rounds.items() if name != "vivace")
    return min(statistics.median(t / own for t, own in zip(found, ours or rounds["vivace"])) for found in peers)


def _limit_cells(record: Record) -> list[str]:
    """The share of the peak, and the gain at the peak; a record of before has none."""
    at_peak, own = record.get("peak_seconds"), record["rounds"].get("vivace")
    if not at_peak or not own:
        return ["-", "-"]
    gain = _gain(record, at_peak)
    share = statistics.median(least / t for least, t in zip(at_peak, own))
    return [f"{share:.0%}", f"{gain:.2f}" if gain else "-"]


def markdown(records: Sequence[Record], kernels: Sequence[Record] = ()) -> str:
    """The table: inferences per second; and where the cycles go, where that was measured."""
    machines = "; ".join(sorted({r["machine"] for r in records}))
    shown = [name for name in ENGINES if any(r["medians"].get(name) for r in records)]
    lines = [
        "# Throughput by batch",
        "",
        f"{machines}. Made by `python -m benchmarks.batches`; inferences a second.",
        "",
        LIMIT,
    ]
    head = ["model", "precision", "threads", "batch", *shown, "over the best peer", "of peak", "at the peak", "notes"]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for r in sorted(records, key=lambda r: (r["model"], r["precision"], r["threads"], r["batch"])):
        rates = [f"{r['batch'] / m:.4g}" if (m := r["medians"].get(name)) else "-" for name in shown]
        gain = _gain(r)
        apart = [name for name, agrees in r["agrees"].items() if agrees is False]
        notes = [f"differ from onnxruntime: {' and '.join(apart)}"] if apart else []
        notes += ["not quiet"] if r["foreign_cores"] >= 0.1 else []
        cells = [r["model"], r["precision"], str(r["threads"]), str(r["batch"]), *rates]
        cells += [f"{gain:.2f}" if gain else "-", *_limit_cells(r), ", ".join(notes)]
        lines.append(f"| {' | '.join(cells)} |")
    gains = {(r["model"], r["precision"], r["batch"]): _gain(r) for r in records if r["threads"] == 1}
    sections = {
        f"{r['model']}, {r['precision']}, batch {r['batch']}": (r, gain)
        for r in kernels
        if (gain := gains.get((r["model"], r["precision"], r["batch"])))
    }
    return "\n".join([*lines, "", *(cycles.section(sections) if sections else [])])


if __name__ == "__main__":
    sys.exit(main())
