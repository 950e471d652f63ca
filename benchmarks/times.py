"""The table of measured results: every model, at one and two threads, on our engine, ONNX Runtime and OpenVINO.

    python -m benchmarks.times                       # all models; takes up where it was stopped
    python -m benchmarks.times resnet50 --again      # one of them, anew
    python -m benchmarks.times --torch               # torch.compile as well, on the models that come from PyTorch
    python -m benchmarks.times --readme              # puts the table into README.md

Rules:
* SIDE BY SIDE: the three engines run interleaved in one process with equal threads and inputs (`measure.bench`).
* APART: each model and thread count has a process of its own, so that one that fails stops no other.
* RESUMABLE: a finished measurement is a file; it is taken again only with --again, under other versions of packages,
  or where our engine failed.
* TRUTH: README's table is made from the JSON by `readme_table`, and a test holds them together.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.compiled_torch import torch_contestant, why_not
from benchmarks.models import MODELS, ModelUnavailable, find, inputs, materialise
from benchmarks.overhead import call_overhead
from benchmarks.records import PROVIDERS, RESULTS, ROOT, Record, output_names, versions, write
from benchmarks.times_table import SCHEMA_VERSION, describe, markdown, summarise, update_readme

RECORDS = ROOT / "benchmarks" / "out" / "times"
SUMMARY = RESULTS / "times.json"
TABLE = RESULTS / "times.md"
SMALL_SECONDS = 0.002


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.readme:
        update_readme(ROOT / "README.md", json.loads(SUMMARY.read_text()))
        return 0
    if options.one:
        print(
            json.dumps(measure_one(options.one, options.threads[0], options.budget, options.disturbed, options.torch))
        )
        return 0
    RESULTS.mkdir(parents=True, exist_ok=True)
    names = options.names or [model.name for model in MODELS if model.variant_of is None]
    jobs = [(find(name).name, threads, False) for name in names for threads in options.threads]
    jobs += [("resnet50", 2, True)] if not options.names and 2 in options.threads else []
    n_failed = 0
    for i, (name, threads, is_disturbed) in enumerate(jobs, 1):
        print(f"[{i}/{len(jobs)}] {_key(name, threads, is_disturbed):28}", end=" ", flush=True)
        start = time.monotonic()
        record = _measured(name, threads, is_disturbed, options)
        n_failed += "failure" in record
        print(f"{describe(record)}  ({time.monotonic() - start:.0f} s)", flush=True)
    summary = summarise(read_records())
    write(SUMMARY, json.dumps(summary, indent=1) + "\n")
    write(TABLE, markdown(summary))
    print(f"\n{markdown(summary)}\nwritten to {SUMMARY} and {TABLE}")
    return 1 if n_failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.times", description="Times every model, side by side.")
    parser.add_argument("names", nargs="*", metavar="MODEL")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of timing per model and thread count")
    parser.add_argument("--again", action="store_true", help="measure anew what is already there")
    parser.add_argument("--readme", action="store_true", help="only put the table into README.md")
    parser.add_argument("--torch", action="store_true", help="time torch.compile too (extra `torch`, a C++ compiler)")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--disturbed", action="store_true", help=argparse.SUPPRESS)
    return parser


def _key(name: str, threads: int, is_disturbed: bool) -> str:
    return f"{name}-{threads}{'-disturbed' if is_disturbed else ''}"


def _measured(name: str, threads: int, is_disturbed: bool, options: argparse.Namespace) -> Record:
    """The record of one measurement: read where it is finished, else taken in a process of its own (APART)."""
    path = RECORDS / f"{_key(name, threads, is_disturbed)}.json"
    if path.exists() and not options.again:
        record: Record = json.loads(path.read_text())
        has_torch = record.get("torch") or not options.torch
        if record.get("versions") == versions() and has_torch and not record["engines"][0]["failure"]:
            return record
    command = [sys.executable, "-m", "benchmarks.times", "--one", name, "--threads", str(threads)]
    command += ["--budget", str(options.budget), *(["--disturbed"] if is_disturbed else [])]
    command += ["--torch"] if options.torch else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        complaint = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"failure": complaint}
    record = json.loads(done.stdout.strip().splitlines()[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(record, indent=1) + "\n")
    return record


def measure_one(name: str, threads: int, budget: float, is_disturbed: bool, with_torch: bool = False) -> Record:
    """Times one model at one thread count; with a busy process on the last core where `is_disturbed`.

    Raises: ModelUnavailable when the model cannot be had here.
    """
    from vivace.cli.bench import Wanted, gather_inputs, measure
    from vivace.cli.contestants import Job
    from vivace.measure.bench import Settings
    from vivace.measure.compare import Tolerance

    try:
        job = Job(materialise(name), threads)
        arrays = dict(inputs(name))
    except ModelUnavailable as missing:
        raise SystemExit(str(missing)) from missing
    shapes = {key: tuple(value.shape) for key, value in arrays.items()}
    _, job = gather_inputs(Job(job.model, threads, shapes=shapes), (), 0)
    arrays = {key: arrays[key] for key in job.shapes}
    settings, more = Settings(budget_seconds=budget), ()
    if with_torch and not why_not(name):
        more = (torch_contestant(name, threads, output_names(job.model)),)
    wanted = Wanted(PROVIDERS, settings, Tolerance(), memory=not is_disturbed, more=more)
    busy = _start_busy_process() if is_disturbed else None
    try:
        report = measure(job, arrays, wanted)
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()
    record = report.to_dict()
    record |= {"schema_version": SCHEMA_VERSION, "model": name, "disturbed": is_disturbed, "versions": versions()}
    record["torch"] = why_not(name) or engine_version(report, "torch") if with_torch else ""
    record["commit"] = _commit()
    record["measured_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record["f32_peak"] = report.peaks.operations("f32", threads) if report.peaks else None
    if not is_disturbed:
        record["overhead_seconds"] = (
            call_overhead(job, arrays) if report.bench.engines[0].median < SMALL_SECONDS else None
        )
    return record


def engine_version(report: Any, name: str) -> str:
    """The version of one of the engines of a report."""
    return next((engine.version for engine in report.bench.engines if engine.name == name), "")


def _commit() -> str:
    """The commit of the checkout, with a mark where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _start_busy_process() -> subprocess.Popen[bytes]:
    """A process that does nothing but occupy the last core that this one may use."""
    import os

    core = max(os.sched_getaffinity(0))
    text = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    return subprocess.Popen([sys.executable, "-c", text])


def read_records() -> list[Record]:
    """All finished measurements, in the order of the catalogue."""
    order = {model.name: i for i, model in enumerate(MODELS)}
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    return sorted(records, key=lambda r: (order.get(r["model"], len(order)), r["disturbed"], r["threads"]))


if __name__ == "__main__":
    sys.exit(main())
