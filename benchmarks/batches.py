"""Throughput at batches of 1, 4, 16 and 64: ours, ONNX Runtime's, OpenVINO's, and torch.compile's with --torch.

    python -m benchmarks.batches                            # ResNet-50 and MiniLM; takes up where it was stopped
    python -m benchmarks.batches resnet50 --threads 1 2 --precision bf16
    python -m benchmarks.batches --form qdq                 # the versions in 8-bit integers

All engines take turns in one process with equal threads and inputs (`vivace.measure.bench`), each told the shapes; what
is shown is the batch over the median time of a call. MiniLM reads sentences of 128 tokens.

Rules:
* APART, RESUMABLE: each batch is a process and a record of its own.
* SHORT: a large batch gets few calls: its median is over seconds of work anyway.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.compiled_torch import PAUSE_SECONDS, torch_contestant, why_not
from benchmarks.models import find, materialise
from benchmarks.models.quantized import materialise_quantized
from benchmarks.times import PROVIDERS, ROOT, output_names, versions

from vivace.base.machine import host

RECORDS = ROOT / "benchmarks" / "out" / "batches"
RESULTS = ROOT / "benchmarks" / "results"
NAMES = ("resnet50", "minilm-l6")
# onnxruntime's quantizer knows attention only where it is written out plainly.
QUANTIZED = {"minilm-l6": "minilm-l6-eager"}
BATCHES = (1, 4, 16, 64)
ENGINES = ("vivace", "onnxruntime", "openvino", "torch")

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.one:
        print(json.dumps(measure_one(options.names[0], options.batches[0], options.threads[0], options)))
        return 0
    RECORDS.mkdir(parents=True, exist_ok=True)
    jobs = [(n, t, b) for n in options.names for t in options.threads for b in options.batches]
    for name, threads, batch in jobs:
        key = f"{name}-{options.form or options.precision}-{threads}-{batch:03}"
        path = RECORDS / f"{key}.json"
        if path.exists() and not options.again and json.loads(path.read_text())["versions"] == versions():
            continue
        command = [sys.executable, "-m", "benchmarks.batches", name, "--one", "--threads", str(threads)]
        command += ["--batches", str(batch), "--precision", options.precision, "--form", options.form]
        command += ["--budget", str(options.budget), *(["--torch"] if options.torch else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode != 0:
            print(f"{key}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
            continue
        path.write_text(done.stdout.strip().splitlines()[-1] + "\n")
        print(f"{key:32} {describe(json.loads(path.read_text()))}", flush=True)
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    (RESULTS / "batches.json").write_text(json.dumps(records, indent=1) + "\n")
    (RESULTS / "batches.md").write_text(markdown(records))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batches", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL", default=list(NAMES))
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--form", default="", help="a quantized form, such as qdq")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of timing per batch")
    parser.add_argument("--torch", action="store_true", help="time torch.compile too (extra `torch`, a C++ compiler)")
    parser.add_argument("--again", action="store_true", help="measure anew what is already there")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser


def measure_one(name: str, batch: int, threads: int, options: argparse.Namespace) -> Record:
    """Times one batch in this process."""
    from vivace.cli.bench import Wanted, gather_inputs, measure
    from vivace.cli.contestants import Job
    from vivace.measure.bench import Settings
    from vivace.measure.compare import LEAST_SNR_DB, Tolerance

    model = find(name)
    path = materialise_quantized(QUANTIZED.get(name, name), options.form) if options.form else materialise(name)
    arrays = model.generate((batch, *model.cases[0].shape[1:]), 0)
    _, job = gather_inputs(Job(path, threads, shapes={k: v.shape for k, v in arrays.items()}), (), 0)
    arrays = {key: arrays[key] for key in job.shapes}
    job = replace(job, precision=options.precision)
    settings = Settings(budget_seconds=options.budget, least_rounds=3, least_calls=1)
    more = ()
    if options.torch and not options.form and not why_not(name):
        more = (torch_contestant(name, threads, output_names(path), options.precision),)
        settings = replace(settings, pause_seconds=PAUSE_SECONDS)
    is_exact = options.precision == "f32" and not options.form
    tolerance = Tolerance(1e-3, 1e-3, None if is_exact else LEAST_SNR_DB)
    report = measure(job, arrays, Wanted(PROVIDERS, settings, tolerance, memory=False, limit=False, more=more))
    engines = {e.name: e for e in report.bench.engines}
    return {
        "model": name, "batch": batch, "threads": threads, "precision": options.form or options.precision,
        "medians": {n: e.median if not e.failure else None for n, e in engines.items()},
        "failures": {n: e.failure for n, e in engines.items() if e.failure},
        "agrees": {n: e.agrees for n, e in engines.items()},
        "foreign_cores": report.bench.noise.foreign_cores,
        "machine": host().model, "versions": versions(),
    }  # fmt: skip


def describe(record: Record) -> str:
    """One line on a batch."""
    rates = (f"{name} {record['batch'] / m:.1f}/s" for name, m in record["medians"].items() if m)
    return "  ".join([*rates, f"{_gain(record):.2f}x the best peer" if _gain(record) else ""])


def _gain(record: Record) -> float | None:
    """Our throughput over that of the best peer."""
    medians = record["medians"]
    peers = [m for name, m in medians.items() if name != "vivace" and m]
    return min(peers) / medians["vivace"] if peers and medians["vivace"] else None


def markdown(records: Sequence[Record]) -> str:
    """The table: inferences per second."""
    machines = "; ".join(sorted({r["machine"] for r in records}))
    shown = [name for name in ENGINES if any(r["medians"].get(name) for r in records)]
    lines = [
        "# Throughput by batch",
        "",
        f"{machines}. Made by `python -m benchmarks.batches`; inferences a second.",
        "",
    ]
    lines.append(f"| model | precision | threads | batch | {' | '.join(shown)} | over the best peer | notes |")
    lines.append(f"|{'---|' * (6 + len(shown))}")
    for r in sorted(records, key=lambda r: (r["model"], r["precision"], r["threads"], r["batch"])):
        rates = [f"{r['batch'] / m:.4g}" if (m := r["medians"].get(name)) else "-" for name in shown]
        gain = _gain(r)
        notes = ["DIFFERS"] if r["agrees"].get("vivace") is False else []
        notes += ["not quiet"] if r["foreign_cores"] >= 0.1 else []
        cells = [r["model"], r["precision"], str(r["threads"]), str(r["batch"]), *rates]
        lines.append(f"| {' | '.join(cells)} | {f'{gain:.2f}' if gain else '-'} | {', '.join(notes)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
