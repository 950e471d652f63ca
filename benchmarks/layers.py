"""How near each layer of each model comes to this machine's limit: time that its work needs at the measured peaks over
the time that it takes.

    python -m benchmarks.layers                     # all models on one thread; takes up where it was stopped
    python -m benchmarks.layers resnet50 --again --threads 2
    python -m benchmarks.layers --form qdq          # the versions in 8-bit integers
    python -m benchmarks.layers --precision bf16

A layer is a step of our program with all that was fused into it. Its limit is the larger of its operations at the peak
of the precision, and its bytes from the nearest caches that could hold them. What lies between limit and time,
summed over a model, says where work on kernels would pay most.

Rules:
* MEDIAN: times are medians of profiled runs; a profile costs two clock reads per piece of work.
* RESUMABLE: each model is a record of its own; the tables are made from all records.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.models import MODELS, ModelUnavailable, inputs, materialise
from benchmarks.models.quantized import QUANTIZED, materialise_quantized
from benchmarks.records import ROOT, kept, versions

import vivace
from vivace.base.machine import host
from vivace.cli.kernels import KernelTable
from vivace.measure.peaks import machine_peaks
from vivace.runtime.engine import Engine

RECORDS = ROOT / "benchmarks" / "out" / "layers"
RESULTS = ROOT / "benchmarks" / "results"
N_WORST = 8

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    RECORDS.mkdir(parents=True, exist_ok=True)
    bases = [q.base for q in QUANTIZED if q.form == options.form] if options.form else _names()
    for name in options.names or bases:
        path = (
            RECORDS / f"{name}{'-' + options.form if options.form else ''}-{options.precision}-{options.threads}.json"
        )
        if not options.again and kept(path):
            continue
        try:
            record = measure(name, options.form, options.precision, options.threads)
        except ModelUnavailable as missing:
            print(f"{name}: {missing}")
            continue
        path.write_text(json.dumps(record))
        print(
            f"{path.stem:40} {record['seconds'] * 1e3:9.3f} ms in layers, {record['share_of_limit']:.0%} of the limit"
        )
    records = [r for path in sorted(RECORDS.glob("*.json")) if (r := kept(path))]
    (RESULTS / "layers.json").write_text(json.dumps(records, separators=(",", ":")) + "\n")
    (RESULTS / "layers.md").write_text(markdown(records))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--form", default="", help="a quantized form, such as qdq")
    parser.add_argument("--again", action="store_true", help="measure anew what is already there")
    return parser


def _names() -> list[str]:
    return [model.name for model in MODELS if model.variant_of is None]


def measure(name: str, form: str, precision: str, threads: int) -> Record:
    """Profiles one model. Raises: ModelUnavailable."""
    path = materialise_quantized(name, form) if form else materialise(name)
    arrays = inputs(name)
    shapes = {key: array.shape for key, array in arrays.items()}
    try:
        engine = vivace.compile(path, threads=threads, precision=precision, shapes=shapes)
    except vivace.VivaceError as refusal:
        raise ModelUnavailable(str(refusal)) from refusal
    if not isinstance(engine, Engine):
        raise ModelUnavailable(f"{name} does not run natively")
    arithmetic = "i8" if form else precision
    rows = KernelTable.of(engine, arrays, machine_peaks(), threads, arithmetic).to_dicts()
    seconds = sum(row["seconds"] for row in rows)
    return {
        "model": name, "form": form, "precision": precision, "threads": threads, "seconds": seconds,
        "share_of_limit": sum(row["limit_seconds"] for row in rows) / seconds if seconds else 0.0,
        "isa": engine.image.isa, "machine": host().model, "versions": versions(),
        "rows": [_compact(row) for row in rows],
    }  # fmt: skip


def _compact(row: Record) -> Record:
    return {
        "kernel": row["kernel"], "node": (row["nodes"] or ["-"])[0], "us": round(row["seconds"] * 1e6, 2),
        "limit_us": round(row["limit_seconds"] * 1e6, 2), "flops": row["flops"], "bytes": row["bytes"],
    }  # fmt: skip


def markdown(records: Sequence[Record]) -> str:
    """A table of models, and for each its layers that lose most."""
    lines = ["# Layers against the limit", "", _about(records), ""]
    lines += ["| model | form | precision | threads | layers | ms | of limit |", "|---|---|---|---|---|---|---|"]
    for r in records:
        cells = (r["model"], r["form"] or "-", r["precision"], r["threads"], len(r["rows"]))
        lines.append(f"| {' | '.join(map(str, cells))} | {r['seconds'] * 1e3:.3g} | {r['share_of_limit']:.0%} |")
    for r in records:
        title = " ".join(filter(None, (r["model"], r["form"], r["precision"], f"{r['threads']} thread(s)")))
        lines += ["", f"## {title}", "", "| layer | first ONNX node | us | GOP/s | bytes | of limit | lost us |"]
        lines.append("|---|---|---|---|---|---|---|")
        for row in sorted(r["rows"], key=_lost_us, reverse=True)[:N_WORST]:
            node, us = row["node"], row["us"] or 0.01  # the least that is kept
            node = node if len(node) <= 60 else "..." + node[-57:]
            speed, share = row["flops"] / us / 1e3, row["limit_us"] / us
            lines.append(
                f"| {row['kernel']} | {node} | {us:.1f} | {speed:.0f} | {row['bytes']} | {share:.0%}"
                f" | {_lost_us(row):.1f} |"
            )
    return "\n".join([*lines, ""])


def _lost_us(row: Record) -> float:
    return max(0.0, float(row["us"] - row["limit_us"]))


def _about(records: Sequence[Record]) -> str:
    machines = sorted({f"{r['machine']}, {r['isa']}" for r in records})
    return (
        f"{'; '.join(machines)}. Made by `python -m benchmarks.layers`. Operations are those of the kernel (Winograd's "
        "are fewer than the direct way's), bytes come from the nearest caches that could hold them. "
        "Trees count as read whole, of which each row reads a few paths: their share says nothing."
    )


if __name__ == "__main__":
    sys.exit(main())
