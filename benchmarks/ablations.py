"""What each fusion brings: time, kernels and bytes of a model with it and without it.

    python -m benchmarks.ablations                            # all models and all fusions where it changes something
    python -m benchmarks.ablations resnet50 --only winograd epilogues --threads 2 --seconds 4

A fusion is left out by its name in `disable=`: of a choice of the lowering (OPTIONS in `lower/lowering.py`) or of the
rules that make the fused operator (docs/rules.md). Bytes are those of the kernels' operands, each once per kernel: what
a fusion keeps in registers or near caches is not in them. Outputs with and without agree, or the line says DIFFERS.

Rules:
* SIDE BY SIDE: both engines take turns in one process; times are medians, `time` is without over with: above 1, the
  fusion pays.
* RESUMABLE: each line is a record of its own; the table is made from all records.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from benchmarks.models import MODELS, ModelUnavailable, inputs, materialise
from benchmarks.times import ROOT, versions

import vivace
from vivace.base.machine import host
from vivace.measure.compare import Tolerance, compare

RECORDS = ROOT / "benchmarks" / "out" / "ablations"
RESULTS = ROOT / "benchmarks" / "results"

_NORMS = ("fuse_layer_norm", "fuse_rms_norm", "scale_into_norm", "bias_into_norm")
_ATTENTION = ("fuse_attention", "group_queries", "scale_into_attention", "causal_mask")
_ACTIVATIONS = ("fuse_gelu", "fuse_gelu_halves", "fuse_gelu_tanh", "fuse_sigmoid", "fuse_silu", "fuse_hard_swish",
                "fuse_hard_sigmoid", "fuse_affine_hard_sigmoid")  # fmt: skip
_WEIGHTS = ("scale_into_conv", "bias_into_conv", "scale_before_conv", "bias_before_conv", "scale_into_matmul",
            "scale_past_bias", "scale_before_matmul")  # fmt: skip
ABLATIONS: dict[str, tuple[str, ...]] = {
    "winograd": ("winograd",),
    "epilogues": ("epilogues",),
    "trees": ("trees",),
    "placement": ("placement",),
    "strips": ("strips",),
    "in_place": ("in_place",),
    "attention": _ATTENTION,
    "norms": _NORMS,
    "activations": _ACTIVATIONS,
    "weights": _WEIGHTS,
    "channels_last": ("put_channels_last",),
}

Record = dict[str, Any]
Arrays = Mapping[str, np.ndarray]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    RECORDS.mkdir(parents=True, exist_ok=True)
    for name in options.names or [m.name for m in MODELS if m.variant_of is None]:
        try:
            measure_model(name, options)
        except ModelUnavailable as missing:
            print(f"{name}: {missing}")
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    (RESULTS / "ablations.json").write_text(json.dumps(records, indent=1) + "\n")
    (RESULTS / "ablations.md").write_text(markdown(records))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL")
    parser.add_argument("--only", nargs="+", choices=list(ABLATIONS), default=list(ABLATIONS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing per line")
    parser.add_argument("--again", action="store_true", help="measure anew what is already there")
    return parser


def measure_model(name: str, options: argparse.Namespace) -> None:
    """All lines of a model that are not there yet."""
    wanted = []
    for ablation in options.only:
        path = RECORDS / f"{name}-{ablation}-{options.threads}.json"
        if options.again or not path.exists() or json.loads(path.read_text())["versions"] != versions():
            wanted.append((ablation, path))
    if not wanted:
        return
    model, arrays = materialise(name), dict(inputs(name))
    whole = _engine(model, arrays, options.threads, ())
    for ablation, path in wanted:
        cut = _engine(model, arrays, options.threads, ABLATIONS[ablation])
        record = compare_engines(whole, cut, arrays, options.seconds)
        record |= {"model": name, "ablation": ablation, "threads": options.threads, "versions": versions()}
        record["cpu"] = host().model
        path.write_text(json.dumps(record))
        print(_line(record), flush=True)


def _engine(model: Any, arrays: Arrays, threads: int, disable: tuple[str, ...]) -> Any:
    return vivace.compile(model, threads=threads, shapes={k: v.shape for k, v in arrays.items()}, disable=disable)


def compare_engines(whole: Any, cut: Any, arrays: Arrays, seconds: float) -> Record:
    """Kernels, bytes and times (seconds) with and without; only counts where nothing changed."""
    counts = [_counts(engine, arrays) for engine in (whole, cut)]
    outputs = [engine.run(arrays) for engine in (whole, cut)]
    agrees = all(d.agrees for d in compare(outputs[1], outputs[0], Tolerance()))
    record: Record = {"kernels": [n for n, _ in counts], "bytes": [b for _, b in counts], "agrees": agrees}
    record["seconds"] = None
    if counts[0] != counts[1]:
        times: tuple[list[float], list[float]] = ([], [])
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[0]) < 3:
            for engine, into in zip((whole, cut), times, strict=True):
                engine.run(arrays)  # brings its data back into the caches
                start = time.perf_counter()
                engine.run(arrays)
                into.append(time.perf_counter() - start)
        record["seconds"] = [median(t) for t in times]
    return record


def _counts(engine: Any, arrays: Arrays) -> tuple[int, int]:
    """Kernels that run, and bytes of their operands."""
    events = {event.kernel: event.bytes for event in engine.profile(arrays)}
    return len(events), sum(events.values())


def _line(record: Record) -> str:
    kernels, moved = record["kernels"], [b / 1e6 for b in record["bytes"]]
    text = f"{record['model']:24} {record['ablation']:14} {record['threads']}T kernels {kernels[0]} / {kernels[1]}"
    text += f"  MB {moved[0]:.2f} / {moved[1]:.2f}"
    if record["seconds"]:
        with_it, without = record["seconds"]
        text += f"  ms {with_it * 1e3:.3f} / {without * 1e3:.3f}  time x{without / with_it:.3f}"
    else:
        text += "  nothing changes"
    return text + ("" if record["agrees"] else "  DIFFERS")


_HEAD = """# What each fusion brings

Made by `python -m benchmarks.ablations`; f32, batch 1. Each pair is with / without.
"""
_MEANS = """
| fusion | threads | models | time without / with, geometric mean | bytes likewise |
|---|---|---|---|---|"""
_ROWS = """
| model | fusion | threads | kernels | MB | ms | time without / with |
|---|---|---|---|---|---|---|"""


def markdown(records: Sequence[Record]) -> str:
    """The table of all lines where something changes, and the means of each fusion over its models."""
    lines = [_HEAD, *(f"{cpu}." for cpu in sorted({r["cpu"] for r in records})), _MEANS]
    changed = [r for r in records if r["seconds"]]
    for ablation in ABLATIONS:
        for threads in sorted({r["threads"] for r in changed}):
            found = [r for r in changed if (r["ablation"], r["threads"]) == (ablation, threads)]
            if found:
                means = [_mean([r[what][1] / r[what][0] for r in found]) for what in ("seconds", "bytes")]
                lines.append(f"| {ablation} | {threads} | {len(found)} | {means[0]:.2f} | {means[1]:.2f} |")
    lines.append(_ROWS)
    for r in changed:
        moved, ms = (" / ".join(f"{v * k:.4g}" for v in r[what]) for what, k in (("bytes", 1e-6), ("seconds", 1e3)))
        kernels, ratio = " / ".join(map(str, r["kernels"])), r["seconds"][1] / r["seconds"][0]
        lines.append(
            f"| {r['model']} | {r['ablation']} | {r['threads']} | {kernels} | {moved} | {ms} | {ratio:.2f}"
            f"{'' if r['agrees'] else ' DIFFERS'} |"
        )
    return "\n".join([*lines, ""])


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


if __name__ == "__main__":
    sys.exit(main())
