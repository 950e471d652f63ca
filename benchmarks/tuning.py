"""What tuning brings: every model compiled with `tune="off"` and tuned, interleaved in one process.

    python -m benchmarks.tuning                                  # every model in f32 on two threads
    python -m benchmarks.tuning resnet50 resnet50-qdq --threads 1 2 --precision bf16 --tune full --budget 60

Columns: medians of one run, their ratio with the range that the middle half of the rounds spans, seconds that compiling
took untuned, tuned and tuned again from the timing cache, how many sites were measured in how many ways, and how many
changed. Rounds alternate which engine goes first. `--fresh` forgets what this machine's cache knows.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import numpy as np
from benchmarks.models import MODELS, ModelUnavailable, inputs, materialise
from benchmarks.models.quantized import QUANTIZED, materialise_quantized

import vivace
from vivace.base.knobs import knobs
from vivace.runtime.engine import Engine

LEAST_ROUNDS, SECONDS = 20, 6.0
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


def row(name: str, path: Path, threads: int, options: argparse.Namespace) -> str:
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
    if options.changes:
        for c in facts["changes"]:
            print(f"    {c['ratio']:5.2f}  {c['site']:36} {c['choice']}")
    spent = " ".join(f"{s:5.1f}" for s in seconds)
    return (
        f"{name:24} {threads}  {1e3 * median(off):8.3f} {1e3 * median(tuned):8.3f}   {median(ratios):5.3f} "
        f"({low:.2f}..{high:.2f})   {spent}   {facts['n_measured']:4} ways of {facts['n_sites']:3} sites, "
        f"{facts['n_changed']:3} changed"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[m.name for m in MODELS if m.variant_of is None])
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--tune", default="fast", choices=["fast", "full"])
    parser.add_argument("--budget", type=float, default=0.0, help="seconds of tuning; 0 is the usual")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing per model")
    parser.add_argument("--timing-cache", default=None)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--changes", action="store_true", help="show what changed")
    options = parser.parse_args()
    print(f"{'model':24} th   off ms   tuned ms  ratio (middle half)  compile: off, tuned, again (s)")
    with tempfile.TemporaryDirectory() as folder, knobs.scope(**({"cache_dir": Path(folder)} if options.fresh else {})):
        for name in options.models:
            try:
                path = _path(name)
            except ModelUnavailable as e:
                print(f"{name:24} {e}")
                continue
            for threads in options.threads:
                print(row(name, path, threads, options), flush=True)


if __name__ == "__main__":
    main()
