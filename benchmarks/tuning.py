"""What tuning brings: every model compiled with `tune="off"` and tuned, interleaved in one process.

    python -m benchmarks.tuning                                  # some models on one thread; takes up where it was
    python -m benchmarks.tuning resnet50 resnet50-qdq --threads 1 2 --precision bf16 --tune full --budget 60

Columns: medians of one run, their ratio with the range that the middle half of the rounds spans, seconds that compiling
took untuned, tuned and tuned again from the timing cache, how many ways were measured, and how many kernels changed.
Rounds alternate which engine goes first. Tuning starts without what this machine's cache knows, unless with `--known`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
from benchmarks.models import ModelUnavailable, inputs, materialise
from benchmarks.models.quantized import QUANTIZED, materialise_quantized
from benchmarks.records import RESULTS, ROOT, kept, versions

import vivace
from vivace.base.knobs import knobs
from vivace.base.machine import host
from vivace.measure.statistics import geometric_mean
from vivace.runtime.engine import Engine

RECORDS = ROOT / "benchmarks" / "out" / "tuning"
MODELS = ("ppocr-cls", "magika", "mobilenetv2", "minilm-l6", "resnet50", "mobilenetv2-qdq", "resnet50-qdq")
LEAST_ROUNDS, SECONDS = 20, 4.0
Record = dict[str, Any]
_QUANTIZED = {q.name: q for q in QUANTIZED}


def compiled(path: Path, arrays: dict[str, np.ndarray], options: argparse.Namespace, threads: int, tune: str) -> Engine:
    engine = vivace.compile(
        path, threads=threads, precision=options.precision, tune=tune, tune_budget=options.budget or None,
        timing_cache=options.timing_cache, shapes={name: a.shape for name, a in arrays.items()},
    )  # fmt: skip
    assert isinstance(engine, Engine)
    return engine


def interleaved(engines: list[Engine], arrays: dict[str, np.ndarray], seconds: float) -> list[list[float]]:
    """Seconds of each engine's runs, taken in turn."""
    times: list[list[float]] = [[] for _ in engines]
    for e in engines:
        e.run(arrays)
    started = time.perf_counter()
    while len(times[0]) < LEAST_ROUNDS or time.perf_counter() - started < seconds:
        order = range(len(engines)) if len(times[0]) % 2 else reversed(range(len(engines)))
        for i in order:
            start = time.perf_counter()
            engines[i].run(arrays)
            times[i].append(time.perf_counter() - start)
    return times


def _path(name: str) -> Path:
    q = _QUANTIZED.get(name)
    return materialise(name) if q is None else materialise_quantized(q.base, q.form)


def measure(name: str, threads: int, options: argparse.Namespace) -> Record:
    """Compiles one model untuned, tuned and tuned again, and times the first and the last. Raises: ModelUnavailable."""
    path = _path(name)
    arrays = inputs(_QUANTIZED[name].base if name in _QUANTIZED else name)
    engines, seconds = [], []
    for tune in ("off", options.tune, options.tune):
        start = time.perf_counter()
        engines.append(compiled(path, arrays, options, threads, tune))
        seconds.append(time.perf_counter() - start)
    off, tuned = interleaved([engines[0], engines[2]], arrays, options.seconds)
    ratios = [b / a for a, b in zip(off, tuned, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    facts = engines[1].stats["tuning"]
    assert isinstance(facts, dict)
    return {
        "model": name, "threads": threads, "precision": options.precision, "tune": options.tune,
        "off_seconds": median(off), "tuned_seconds": median(tuned), "ratio": median(ratios), "low": low, "high": high,
        "compile_seconds": seconds, "n_measured": facts["n_measured"], "n_sites": facts["n_sites"],
        "changes": facts["changes"], "isa": engines[0].image.isa, "machine": host().model, "versions": versions(),
    }  # fmt: skip


def markdown(records: Sequence[Record]) -> str:
    """The table, and what tuning comes to."""
    machines = sorted({f"{r['machine']}, {r['isa']}" for r in records})
    lines = ["# Tuned and untuned", "", f"{'; '.join(machines)}. Made by `python -m benchmarks.tuning`.", ""]
    lines += [
        "Medians of runs taken in turns; the range is that of the middle half of the rounds. Below 1, tuned is faster.",
        "",
        "| model | threads | precision | untuned ms | tuned ms | ratio | compile s: untuned, tuned, again | measured"
        " ways | kernels changed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        spent = ", ".join(f"{s:.1f}" for s in r["compile_seconds"])
        lines.append(
            f"| {r['model']} | {r['threads']} | {r['precision']} | {1e3 * r['off_seconds']:.3g}"
            f" | {1e3 * r['tuned_seconds']:.3g} | {r['ratio']:.3f} [{r['low']:.2f}, {r['high']:.2f}] | {spent}"
            f" | {r['n_measured']} | {len(r['changes'])} of {r['n_sites']} |"
        )
    mean = geometric_mean([r["ratio"] for r in records])
    changed = sum(len(r["changes"]) for r in records)
    lines += [
        "",
        f"* Geometric mean {mean:.3f} over {len(records)} rows; {changed} of {sum(r['n_sites'] for r in records)}"
        " kernels are made otherwise than the cost model says. What is lacking to the limit (`layers.md`) is not among"
        " the candidates.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--tune", default="fast", choices=["fast", "full"])
    parser.add_argument("--budget", type=float, default=0.0, help="seconds of tuning; 0 is the usual")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing per model")
    parser.add_argument("--timing-cache", default=None)
    parser.add_argument("--known", action="store_true", help="start from what this machine's cache knows")
    parser.add_argument("--again", action="store_true", help="measure anew what is already there")
    options = parser.parse_args()
    RECORDS.mkdir(parents=True, exist_ok=True)
    for name, threads in ((n, t) for n in options.models for t in options.threads):
        path = RECORDS / f"{name}-{options.precision}-{options.tune}-{threads}.json"
        if not options.again and kept(path):
            continue
        with tempfile.TemporaryDirectory() as folder, knobs.scope(**_caches(options.known, Path(folder))):
            try:
                record = measure(name, threads, options)
            except ModelUnavailable as e:
                print(f"{name:24} {e}")
                continue
        path.write_text(json.dumps(record))
        print(markdown([record]).splitlines()[8])
    records = [r for path in sorted(RECORDS.glob("*.json")) if (r := kept(path))]
    if not records:
        return
    (RESULTS / "tuning.json").write_text(json.dumps(records, separators=(",", ":")) + "\n")
    (RESULTS / "tuning.md").write_text(markdown(records))


def _caches(is_known: bool, folder: Path) -> dict[str, Path]:
    """An empty cache that knows this machine's peaks and no timings, unless those that are there shall count."""
    if is_known:
        return {}
    peaks = knobs.cache_dir / "peaks"
    if peaks.is_dir():
        shutil.copytree(peaks, folder / "peaks")
    return {"cache_dir": folder}


if __name__ == "__main__":
    main()
