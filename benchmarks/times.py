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
import math
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compiled_torch import PAUSE_SECONDS, torch_contestant, why_not
from benchmarks.limits import limit_line
from benchmarks.models import MODELS, ModelUnavailable, find, inputs, materialise

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECORDS = ROOT / "benchmarks" / "out" / "times"
SUMMARY = RESULTS / "times.json"
TABLE = RESULTS / "times.md"
PROVIDERS = ("native,onnxruntime", "onnxruntime", "openvino")
PEERS = ("onnxruntime", "openvino", "torch")
SCHEMA_VERSION = 1
SMALL_SECONDS = 0.002
CLOCK_NS = 18  # a recorded kernel that does nothing lasts 20 ns, its call and return 2
_BEGIN, _END = "<!-- times: made by `python -m benchmarks.times --readme` -->", "<!-- end of times -->"

Record = dict[str, Any]


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
    _write(SUMMARY, json.dumps(summary, indent=1) + "\n")
    _write(TABLE, markdown(summary))
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
    _write(path, json.dumps(record, indent=1) + "\n")
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
        settings = Settings(budget_seconds=budget, pause_seconds=PAUSE_SECONDS)
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


def output_names(model: Path) -> list[str]:
    """The outputs of an ONNX model, in order."""
    import onnx

    return [value.name for value in onnx.load(model, load_external_data=False).graph.output]


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


def call_overhead(job: Any, arrays: Any) -> float:
    """Seconds of a Python call in which no kernel runs: the median, over many calls, of a call's time less the time
    that some thread spent in kernels, as a recorded call soon after it tells.

    Both calls are made in the same context, by which they use the same memory, and each follows some of its kind, so
    that it finds the caches as such calls leave them. The clock that is read around each kernel is no part of it.
    """
    from statistics import median

    from vivace.cli.contestants import open_engine

    engine: Any = open_engine(PROVIDERS[0], job)

    def timed() -> tuple[int, int]:
        for _ in range(6):
            start = time.perf_counter_ns()
            engine.run(arrays)
            stop = time.perf_counter_ns()
        return start, stop

    spare = []
    for _ in range(400):
        start, stop = timed()
        context, _ = engine._idle[-1]
        context.record(1 << 12)
        begin, _ = timed()
        chunks = [chunk for chunk in context.chunks() if chunk.start_ns >= begin]
        context.record(0)
        spans = [(chunk.start_ns, chunk.start_ns + max(0, chunk.duration_ns - CLOCK_NS)) for chunk in chunks]
        spare.append(stop - start - covered_ns(spans))
    return median(spare[50:]) / 1e9


def covered_ns(spans: Sequence[tuple[int, int]]) -> int:
    """How long at least one of these spans of time lasted."""
    total, reached = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def versions() -> dict[str, str]:
    """What the times depend on beside the machine."""
    from importlib.metadata import version

    packages = ("vivace", "onnxruntime", "openvino", "numpy", "llvmlite")
    return {**{name: version(name) for name in packages}, "python": platform.python_version()}


def kept(path: Path, *keys: str) -> Record | None:
    """A record that was taken before, where it is of these versions and has these keys, as this form of it does."""
    record: Record = json.loads(path.read_text()) if path.exists() else {}
    return record if record.get("versions") == versions() and record.keys() >= set(keys) else None


def read_records() -> list[Record]:
    """All finished measurements, in the order of the catalogue."""
    order = {model.name: i for i, model in enumerate(MODELS)}
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    return sorted(records, key=lambda r: (order.get(r["model"], len(order)), r["disturbed"], r["threads"]))


def summarise(records: Sequence[Record]) -> Record:
    """The figures of the table, from the records; times in seconds."""
    rows = [_row(record) for record in records if not record["disturbed"]]
    counts = sorted({row["threads"] for row in rows})
    means = {}
    for threads in counts:
        ratios = [row["ratio"] for row in rows if row["threads"] == threads and row["ratio"]]
        means[str(threads)] = {
            "geometric_mean": math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None,
            "worst": max(ratios, default=None),
            "n_models": len(ratios),
        }
    first = records[0] if records else {}
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": first.get("versions", {}),
        "machine": first.get("machine", {}),
        "commits": sorted({record.get("commit", "unknown") for record in records}),
        "measured_at": max((record["measured_at"] for record in records), default=""),
        "tolerance": first.get("tolerance", {}),
        "torch": max((r.get("torch", "") for r in records if _was_timed(r, "torch")), default=""),
        "rows": rows,
        "ratio_over_best_peer": means,
        "resnet50": _resnet(records),
        "disturbed": [_disturbed(record, rows) for record in records if record["disturbed"]],
    }


def _was_timed(record: Record, name: str) -> bool:
    return any(engine["name"] == name and engine["median"] for engine in record["engines"])


def _row(record: Record) -> Record:
    engines = {engine["name"]: engine for engine in record["engines"]}
    ours = engines["vivace"]
    medians = {name: engines[name]["median"] for name in PEERS if name in engines and engines[name]["median"]}
    best = min(medians, key=medians.__getitem__) if medians else None
    is_ready = ours["median"] is not None and best is not None
    cold = {name: (engine["cold_start"] or {}).get("peak_bytes") for name, engine in engines.items()}
    return {
        "model": record["model"],
        "threads": record["threads"],
        "medians": {"vivace": ours["median"], **medians},
        "best_peer": best,
        "ratio": ours["median"] / medians[best] if is_ready and best else None,
        "ratio_interval": _interval(engines[best]) if best else None,
        "share_of_limit": ours["share_of_limit"],
        "peak_bytes": cold,
        "load_seconds": {name: (engine["cold_start"] or {}).get("load_seconds") for name, engine in engines.items()},
        "agrees": ours["agrees"],
        "overhead_seconds": record.get("overhead_seconds"),
        "is_quiet": record["noise"]["foreign_cores"] < 0.1,
        "failure": ours["failure"],
    }


def _interval(engine: Record) -> list[float] | None:
    ratio = engine["ours_over_this"]
    return [ratio["low"], ratio["high"]] if ratio and ratio["low"] is not None else None


def _resnet(records: Sequence[Record]) -> Record:
    """How near ResNet-50 is to the arithmetic peak on one thread, and what the second thread brings."""
    found = {r["threads"]: r for r in records if r["model"] == "resnet50" and not r["disturbed"]}
    medians = {n: r["engines"][0]["median"] for n, r in found.items() if r["engines"][0]["median"]}
    one = found.get(1)
    share = None
    if one and 1 in medians and one["limit"] and one["f32_peak"]:
        share = one["limit"]["flops"] / medians[1] / one["f32_peak"]
    return {"share_of_peak": share, "scaling": medians[1] / medians[2] if 1 in medians and 2 in medians else None}


def _disturbed(record: Record, rows: Sequence[Record]) -> Record:
    """Medians with one core kept busy, over the undisturbed medians on one thread."""
    quiet = next((row for row in rows if (row["model"], row["threads"]) == (record["model"], 1)), None)
    medians = {engine["name"]: engine["median"] for engine in record["engines"]}
    base = quiet["medians"] if quiet else {}
    over = {name: m / base[name] for name, m in medians.items() if m and base.get(name)}
    return {"model": record["model"], "threads": record["threads"], "medians": medians, "over_one_thread": over}


def describe(record: Record) -> str:
    """One line on a measurement."""
    if "failure" in record:
        return f"failed: {record['failure'][:200]}"
    row = _row(record)
    ms = "  ".join(f"{name} {1e3 * m:.3f} ms" for name, m in row["medians"].items() if m)
    ratio = f"{row['ratio']:.3f} of {row['best_peer']}" if row["ratio"] else f"failed: {row['failure']}"
    return f"{ms}  ratio {ratio}{'  DIFFERS' if row['agrees'] is False else ''}"


def markdown(summary: Record) -> str:
    """The whole report."""
    machine, named = summary["machine"], summary["versions"]
    lines = [
        "# Times",
        "",
        f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores, {machine.get('used_instruction_set', '?')}; "
        + ", ".join(f"{name} {version}" for name, version in named.items())
        + f"; {summary['measured_at']}.",
        "",
        "f32, batch 1, engines interleaved in one process; median per call from Python. Below 1, vivace is faster.",
        "",
        *table(summary["rows"], is_full=True),
        "",
    ]
    for threads, mean in summary["ratio_over_best_peer"].items():
        if mean["geometric_mean"]:
            lines.append(
                f"* {threads} thread(s): our median over the best peer's: geometric mean {mean['geometric_mean']:.3f}, "
                f"worst {mean['worst']:.3f}, over {mean['n_models']} models"
            )
        said = limit_line(
            (row["model"], row["medians"]["vivace"], row["share_of_limit"])
            for row in summary["rows"]
            if row["threads"] == int(threads) and row["medians"]["vivace"]
        )
        lines += [f"* {threads} thread(s): {said}"] if said else []
    resnet = summary["resnet50"]
    if resnet["share_of_peak"]:
        share = f"{resnet['share_of_peak']:.1%} of the measured f32 peak"
        lines.append(f"* ResNet-50 on 1 thread: {share}, by the operations of direct convolutions")
    if resnet["scaling"]:
        lines.append(f"* ResNet-50: 2 threads are {resnet['scaling']:.2f} times as fast as 1")
    for found in summary["disturbed"]:
        over = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found["over_one_thread"].items())
        lines.append(
            f"* {found['model']} at {found['threads']} threads with one core kept busy by another process, "
            f"over its own quiet time on 1 thread: {over}"
        )
    return "\n".join([*lines, ""])


def table(rows: Sequence[Record], is_full: bool = False) -> list[str]:
    """Rows as Markdown."""
    peers = [name for name in PEERS if any(name in row["medians"] for row in rows) or name != "torch"]
    heads = ["model", "threads", "vivace ms", *(f"{name} ms" for name in peers), "ratio to best", "of limit"]
    heads += ["memory MiB (vivace; onnxruntime; openvino)", "overhead us", "notes"] if is_full else []
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        cells = [row["model"], str(row["threads"])]
        cells += [_ms(row["medians"].get(name)) for name in ("vivace", *peers)]
        interval = row["ratio_interval"] if is_full else None
        cells.append(
            "-"
            if not row["ratio"]
            else f"{row['ratio']:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
        )
        cells.append(f"{row['share_of_limit']:.0%}" if row["share_of_limit"] else "-")
        if is_full:
            cells.append("; ".join(_mib(row["peak_bytes"].get(name)) for name in ("vivace", "onnxruntime", "openvino")))
            cells.append(f"{row['overhead_seconds'] * 1e6:.1f}" if row["overhead_seconds"] is not None else "")
            notes = [] if row["agrees"] else ["DIFFERS"] if row["agrees"] is False else ["failed"]
            cells.append(", ".join(notes + ([] if row["is_quiet"] else ["not quiet"])))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _mib(n_bytes: int | None) -> str:
    return "-" if not n_bytes else f"{n_bytes / (1 << 20):.0f}"


def readme_table(summary: Record) -> str:
    """What README.md shows: the table, the machine, and the means."""
    machine = summary["machine"]
    means = ", ".join(
        f"{mean['geometric_mean']:.2f} at {threads} thread{'s' if threads != '1' else ''}"
        for threads, mean in summary["ratio_over_best_peer"].items()
        if mean["geometric_mean"]
    )
    about = (
        f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores, {machine.get('used_instruction_set', '?')}; "
        f"f32, batch 1; onnxruntime {summary['versions'].get('onnxruntime')}, "
        f"openvino {summary['versions'].get('openvino')}{_torch(summary)}; "
        f"{summary['measured_at'][:10]}. The geometric mean of our median over that of the fastest other is {means}."
    )
    return "\n".join([*table(summary["rows"]), "", about])


def _torch(summary: Record) -> str:
    """What is said of PyTorch where it was timed."""
    return f", torch {summary['torch']} compiled" if summary.get("torch") else ""


def update_readme(path: Path, summary: Record) -> None:
    """Puts the table between the two marks. Raises: SystemExit where a mark is missing."""
    text = path.read_text()
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise SystemExit(f"{path} lacks the marks {_BEGIN!r} and {_END!r}")
    _write(path, f"{before}{begin}\n{readme_table(summary)}\n{end}{after}")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
