"""The table of measured results in low precision: quantized models, and bf16, on our engine and the two others.

    python -m benchmarks.lowprecision int8                     # every QDQ model; takes up where it was stopped
    python -m benchmarks.lowprecision int8 resnet50-qdq --again
    python -m benchmarks.lowprecision bf16 --threads 1
    python -m benchmarks.lowprecision bf16 --torch             # torch.compile as well, where models come from PyTorch

`int8` runs each engine on the same file with integers in it, what the file leaves in f32 in f32. `bf16` asks our engine
for precision="bf16" and OpenVINO for INFERENCE_PRECISION_HINT bf16; ONNX Runtime has no such mode. Beside them runs
our engine on the f32 model, which tells what the format brings.

Rules:
* SIDE BY SIDE, APART, RESUMABLE: as in `benchmarks.times`.
* ERROR: the signal-to-noise ratio of each engine's outputs against those of the f32 model in ONNX Runtime, the worst
  output of a model. An engine that is fast because it is wrong shows.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.compiled_torch import torch_contestant, why_not
from benchmarks.limits import limit_line, mean_line
from benchmarks.models import MODELS, ModelUnavailable, inputs, materialise
from benchmarks.models.quantized import QUANTIZED, materialise_quantized
from benchmarks.records import RESULTS, ROOT, kept, output_names, versions

from vivace.measure.statistics import geometric_mean

PEERS = ("onnxruntime", "openvino", "torch")
BASE = "vivace f32"

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.one:
        print(
            json.dumps(measure_one(options.format, options.names[0], options.threads[0], options.budget, options.torch))
        )
        return 0
    names = options.names or names_of(options.format)
    jobs = [(name, threads) for name in names for threads in options.threads]
    n_failed = 0
    for i, (name, threads) in enumerate(jobs, 1):
        print(f"[{i}/{len(jobs)}] {name:28} {threads}", end=" ", flush=True)
        record = _measured(options, name, threads)
        n_failed += "failure" in record
        print(record.get("failure") or " ".join(f"{k} {_ms(v['median'])}" for k, v in record["engines"].items()))
    summary = summarise(options.format)
    RESULTS.mkdir(parents=True, exist_ok=True)
    _write(RESULTS / f"{options.format}.json", json.dumps(summary, indent=1) + "\n")
    _write(RESULTS / f"{options.format}.md", markdown(summary))
    print(f"\n{markdown(summary)}")
    return 1 if n_failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lowprecision", description="Times low precision.")
    parser.add_argument("format", choices=("int8", "bf16"))
    parser.add_argument("names", nargs="*", metavar="MODEL")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of timing per model and thread count")
    parser.add_argument("--again", action="store_true", help="measure anew what is already there")
    parser.add_argument("--torch", action="store_true", help="time torch.compile too, in bf16 (extra `torch`)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser


def names_of(form: str) -> list[str]:
    """The models of a table."""
    if form == "int8":
        return [q.name for q in QUANTIZED if q.form == "qdq"]
    return [model.name for model in MODELS if model.variant_of is None]


def _records(form: str) -> Path:
    return ROOT / "benchmarks" / "out" / form


def _measured(options: argparse.Namespace, name: str, threads: int) -> Record:
    """The record of one measurement: read where it is finished, else taken in a process of its own."""
    path = _records(options.format) / f"{name}-{threads}.json"
    record = kept(path, "limit_seconds") if not options.again else None
    if record and (record.get("torch") or not options.torch):
        return record
    command = [sys.executable, "-m", "benchmarks.lowprecision", options.format, name, "--one"]
    command += ["--threads", str(threads), "--budget", str(options.budget)]
    command += ["--torch"] if options.torch else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        return {"failure": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    record = json.loads(done.stdout.strip().splitlines()[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(record, indent=1) + "\n")
    return record


def measure_one(form: str, name: str, threads: int, budget: float, with_torch: bool = False) -> Record:
    """Times one model in one format at one thread count.

    Raises: SystemExit when the model cannot be had here.
    """
    from vivace.base.machine import host
    from vivace.cli.contestants import Job, open_engine, version_of
    from vivace.cli.system import machine_facts
    from vivace.compilation import load_graph
    from vivace.measure.bench import Contestant, Settings, bench
    from vivace.measure.compare import compare
    from vivace.measure.peaks import machine_peaks
    from vivace.measure.roofline import total
    from vivace.optimize.pipeline import optimize

    quantized = next((q for q in QUANTIZED if q.name == name), None)
    base = quantized.base if quantized else name
    try:
        f32 = materialise(base)
        path = materialise_quantized(quantized.base, quantized.form) if quantized else f32
        arrays = dict(inputs(base))
    except ModelUnavailable as missing:
        raise SystemExit(str(missing)) from missing
    shapes = {key: tuple(value.shape) for key, value in arrays.items()}
    precision = "f32" if form == "int8" else form
    plain, narrow = Job(f32, threads, "f32", shapes), Job(path, threads, precision, shapes)
    jobs = {"vivace": ("native", narrow), BASE: ("native", plain), "openvino": ("openvino", narrow)}
    if form == "int8":
        jobs["onnxruntime"] = ("onnxruntime", narrow)
    reference = open_engine("onnxruntime", plain).run(arrays)
    runners: dict[str, Any] = {}

    def load(engine: str) -> Any:
        provider, job = jobs[engine]
        runners[engine] = open_engine(provider, job).run
        return runners[engine]

    contestants = [
        Contestant(engine, version_of(jobs[engine][0]), lambda engine=engine: load(engine))  # type: ignore[misc]
        for engine in jobs
    ]
    settings = Settings(budget_seconds=budget)
    no_torch = why_not(name) if form == "bf16" else "torch.compile reads no QDQ models"
    if with_torch and not no_torch:
        torch = torch_contestant(name, threads, output_names(path), form)
        contestants.append(replace(torch, load=lambda: runners.setdefault("torch", torch.load())))
    found = bench(contestants, arrays, settings)
    engines = {}
    for times in found.engines:
        failed = bool(times.failure)
        snr = None if failed else min(d.snr_db for d in compare(runners[times.name](arrays), reference))
        engines[times.name] = {
            "median": None if failed else times.median,
            "snr_db": None if snr is None or math.isinf(snr) else snr,
            "failure": times.failure or None,
        }
    limit = None  # of a model that we cannot compile, it is not known either
    if not engines["vivace"]["failure"]:
        limit = total(optimize(load_graph(path, shapes)), {}, machine_peaks(), threads, precision).seconds
    return {
        "model": name, "threads": threads, "engines": engines, "versions": versions(),
        "limit_seconds": limit,
        "torch": (no_torch or version("torch")) if with_torch else "",
        "machine": machine_facts(host()), "foreign_cores": found.noise.foreign_cores,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def summarise(form: str) -> Record:
    """The figures of the table, from all finished records; times in seconds."""
    order = {name: i for i, name in enumerate(names_of(form))}
    records = [r for path in sorted(_records(form).glob("*.json")) if (r := kept(path, "limit_seconds"))]
    records.sort(key=lambda r: (order.get(r["model"], len(order)), r["model"], r["threads"]))
    rows = [_row(record) for record in records]
    means = {}
    for threads in sorted({row["threads"] for row in rows}):
        ratios = [row["ratio"] for row in rows if row["threads"] == threads and row["ratio"]]
        if ratios:
            means[str(threads)] = {"geometric_mean": geometric_mean(ratios),
                                   "worst": max(ratios), "n_models": len(ratios)}  # fmt: skip
    first = records[0] if records else {}
    return {"format": form, "versions": first.get("versions", {}), "machine": first.get("machine", {}),
            "measured_at": max((r["measured_at"] for r in records), default=""), "rows": rows,
            "ratio_over_best_peer": means}  # fmt: skip


def _row(record: Record) -> Record:
    engines = record["engines"]
    medians = {name: engine["median"] for name, engine in engines.items() if engine["median"]}
    best = min((name for name in PEERS if name in medians), key=medians.__getitem__, default=None)
    ours = medians.get("vivace")
    return {
        "model": record["model"],
        "threads": record["threads"],
        "medians": medians,
        "snr_db": {name: engine["snr_db"] for name, engine in engines.items()},
        "ratio": ours / medians[best] if ours and best else None,
        "times_faster_than_f32": medians[BASE] / ours if ours and BASE in medians else None,
        "share_of_limit": record["limit_seconds"] / ours if ours and record.get("limit_seconds") else None,
        "is_quiet": record["foreign_cores"] < 0.1,
        "failure": engines["vivace"]["failure"],
    }


def markdown(summary: Record) -> str:
    """The table for people."""
    has_torch = any("torch" in row["medians"] for row in summary["rows"])
    names = ("vivace", *(name for name in PEERS if name != "torch" or has_torch))
    heads = ["model", "threads", *(f"{name} ms" for name in names), "ratio to best", "our f32 / this", "of limit"]
    heads += [f"{name} dB" for name in names] + ["notes"]
    lines = [f"# {summary['format']}", ""]
    lines += [f"{summary['machine'].get('cpu', '?')}, {summary['machine'].get('used_instruction_set', '?')}; "
              + ", ".join(f"{k} {v}" for k, v in summary["versions"].items()) + f"; {summary['measured_at']}.", "",
              "Batch 1, engines interleaved in one process; median per call from Python. Below 1, vivace is faster. dB:"
              " outputs against those of the f32 model, more is nearer.", "",
              f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]  # fmt: skip
    for row in summary["rows"]:
        cells = [row["model"], str(row["threads"]), *(_ms(row["medians"].get(name)) for name in names)]
        cells += [_figure(row["ratio"], ".2f"), _figure(row["times_faster_than_f32"], ".2f")]
        cells.append(_figure(row["share_of_limit"], ".0%"))
        cells += [_figure(row["snr_db"].get(name), ".1f") for name in names]
        cells.append(row["failure"] or ("" if row["is_quiet"] else "not quiet"))
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for threads, mean in summary["ratio_over_best_peer"].items():
        lines.append(mean_line(threads, mean))
        said = limit_line(
            (row["model"], row["medians"]["vivace"], row["share_of_limit"])
            for row in summary["rows"]
            if row["threads"] == int(threads) and "vivace" in row["medians"]
        )
        lines += [f"* {threads} thread(s): {said}"] if said else []
    return "\n".join([*lines, ""])


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g}"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
