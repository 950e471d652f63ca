"""What each fusion brings: time, kernels and bytes of a model with it and without it.

    python -m benchmarks.ablations                            # every fusion on the models named for it, in 10 minutes
    python -m benchmarks.ablations resnet50 --only winograd epilogues --threads 2 --seconds 4

A fusion is left out by its name in `disable=`: of a choice of the lowering (OPTIONS in `lower/lowering.py`) or of the
rules that make the fused operator (docs/rules.md). What has no such name, a recurrent layer and a tree ensemble as one
kernel, is held against the same function written out in other operators (`spelled_out.py`). Bytes are those of the
kernels' operands, each once per kernel: what a fusion keeps in registers or near caches is not in them. Outputs with
and without agree, or the line says DIFFERS.

Rules:
* SIDE BY SIDE: both engines take turns in one process, and times are medians. `time` is the median of the turns'
  ratios, without over with: above 1, the fusion pays.
* RESUMABLE: each line is a record of its own; the table is made from all records.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import onnx
from benchmarks.models import ModelUnavailable, inputs, materialise
from benchmarks.records import ROOT, kept, versions
from benchmarks.spelled_out import spelled_forest, spelled_lstm, text_head

import vivace
from vivace.base.machine import host
from vivace.measure.compare import Tolerance, compare

RECORDS = ROOT / "benchmarks" / "out" / "ablations"
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, slots=True)
class Case:
    """A model, so many times its usual batch, in a precision."""

    model: str
    batch: int = 1
    precision: str = "f32"

    def __str__(self) -> str:
        text = self.model + (f" x{self.batch}" if self.batch > 1 else "")
        return text if self.precision == "f32" else f"{text} {self.precision}"


RESNET, MOBILENET, EFFICIENTNET = Case("resnet50"), Case("mobilenetv2"), Case("efficientnet-lite0")
DET, REC, CLS, PITCH = Case("ppocrv4-det"), Case("ppocrv4-rec"), Case("ppocr-cls"), Case("basic-pitch")
BERT, MINILM, VIT, SMOLLM = Case("bert-base"), Case("minilm-l6"), Case("vit-b"), Case("smollm2-135m")
WHISPER = Case("whisper-tiny-en-encoder")
_NORMS = ("fuse_layer_norm", "fuse_rms_norm", "scale_into_norm", "bias_into_norm")
_ATTENTION = ("fuse_attention", "group_queries", "scale_into_attention", "causal_mask")
_ACTIVATIONS = ("fuse_gelu", "fuse_gelu_halves", "fuse_gelu_tanh", "fuse_sigmoid", "fuse_silu", "fuse_hard_swish",
                "fuse_hard_sigmoid", "fuse_affine_hard_sigmoid")  # fmt: skip
_WEIGHTS = ("scale_into_conv", "bias_into_conv", "scale_before_conv", "bias_before_conv", "scale_into_matmul",
            "scale_past_bias", "scale_before_matmul")  # fmt: skip
# What is left out, and the models whose lines show it.
ABLATIONS: dict[str, tuple[tuple[str, ...], tuple[Case, ...]]] = {
    "winograd": (("winograd",), (RESNET, DET)),
    "epilogues": (("epilogues",), (RESNET, BERT, REC)),
    "trees": (("trees",), (Case("silero-vad"),)),
    "placement": (("placement",), (DET, PITCH)),
    "strips": (("strips",), (MOBILENET, EFFICIENTNET)),
    "row_blocks": (("row_blocks",), (WHISPER, Case("minilm-l6", 16, "bf16"))),
    "in_place": (("in_place",), (RESNET, MINILM)),
    "slices": (("slices",), (Case("resnet50", 8, "bf16"),)),
    "attention": (_ATTENTION, (BERT, VIT, WHISPER, SMOLLM)),
    "norms": (_NORMS, (REC, SMOLLM)),
    "activations": (_ACTIVATIONS, (BERT, REC)),
    "weights": (_WEIGHTS, (Case("mobilenetv2-bn"), Case("resnet50-bn"))),
    "squeeze_excite": (("gate_into_weights",), (CLS, Case("ppocr-cls", 4))),
    "channels_last": (("put_channels_last",), (RESNET, CLS)),
    "gather_one_hot": (("gather_one_hot",), (Case("magika"),)),
    "argmax_head": (("argmax_before_softmax",), (Case("text_head"),)),
}
MADE: dict[str, Callable[[], tuple[onnx.ModelProto, dict[str, np.ndarray]]]] = {"text_head": text_head}
SPELLED_OUT: dict[str, Callable[[], tuple[onnx.ModelProto, onnx.ModelProto, dict[str, np.ndarray]]]] = {
    "recurrent": spelled_lstm,
    "tree_ensemble": spelled_forest,
}

Record = dict[str, Any]
Arrays = Mapping[str, np.ndarray]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    RECORDS.mkdir(parents=True, exist_ok=True)
    cases = dict.fromkeys(case for _, models in ABLATIONS.values() for case in models)
    for case in cases if not options.names else [c for c in cases if c.model in options.names]:
        try:
            measure_case(case, options)
        except ModelUnavailable as missing:
            print(f"{case}: {missing}")
    for name, make in SPELLED_OUT.items():
        if name in options.only and (not options.names or name in options.names):
            measure_spelled(name, make, options)
    records = [r for path in sorted(RECORDS.glob("*.json")) if (r := kept(path, "ratio"))]
    (RESULTS / "ablations.json").write_text(json.dumps(records, indent=1) + "\n")
    (RESULTS / "ablations.md").write_text(markdown(records))
    return 0


def _parser() -> argparse.ArgumentParser:
    every = [*ABLATIONS, *SPELLED_OUT]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL")
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing per line")
    parser.add_argument("--again", action="store_true", help="measure anew what is already there")
    return parser


def measure_case(case: Case, options: argparse.Namespace) -> None:
    """All lines of a model that are not there yet."""
    wanted = [a for a, (_, models) in ABLATIONS.items() if case in models and a in options.only]
    wanted = [a for a in wanted if _is_due(str(case), a, options)]
    if not wanted:
        return
    made = MADE.get(case.model)
    model, arrays = made() if made else (materialise(case.model), inputs(case.model))
    arrays = {k: np.repeat(v, case.batch, axis=0) if case.batch > 1 else v for k, v in arrays.items()}
    whole = _engine(model, arrays, options.threads, case.precision)
    for ablation in wanted:
        cut = _engine(model, arrays, options.threads, case.precision, ABLATIONS[ablation][0])
        _keep(str(case), ablation, compare_engines(whole, cut, arrays, options.seconds), options)


def measure_spelled(
    name: str, make: Callable[[], tuple[onnx.ModelProto, onnx.ModelProto, dict[str, np.ndarray]]],
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """The line of what has no name in `disable=`."""
    if _is_due(name, name, options):
        *models, arrays = make()
        whole, cut = (_engine(model, arrays, options.threads, "f32") for model in models)
        _keep(name, name, compare_engines(whole, cut, arrays, options.seconds), options)


def _record_file(case: str, ablation: str, options: argparse.Namespace) -> Any:
    return RECORDS / f"{case.replace(' ', '-')}-{ablation}-{options.threads}.json"


def _is_due(case: str, ablation: str, options: argparse.Namespace) -> bool:
    path = _record_file(case, ablation, options)
    return options.again or kept(path, "ratio") is None


def _keep(case: str, ablation: str, record: Record, options: argparse.Namespace) -> None:
    record |= {"model": case, "ablation": ablation, "threads": options.threads, "versions": versions()}
    record["cpu"] = host().model
    _record_file(case, ablation, options).write_text(json.dumps(record))
    print(_line(record), flush=True)


def _engine(model: Any, arrays: Arrays, threads: int, precision: str, disable: tuple[str, ...] = ()) -> Any:
    shapes = {k: v.shape for k, v in arrays.items()}
    return vivace.compile(model, threads=threads, shapes=shapes, precision=precision, disable=disable)


def compare_engines(whole: Any, cut: Any, arrays: Arrays, seconds: float) -> Record:
    """Kernels, bytes, bytes of arena and times (seconds) with and without; no times where nothing changed."""
    counts = [_counts(engine, arrays) for engine in (whole, cut)]
    outputs = [engine.run(arrays) for engine in (whole, cut)]
    agrees = all(d.agrees for d in compare(outputs[1], outputs[0], Tolerance()))
    record: Record = {name: [c[name] for c in counts] for name in ("kernels", "bytes", "arena")}
    record |= {"agrees": agrees, "seconds": None, "ratio": None}
    if counts[0] != counts[1] or set(whole.image.objects) != set(cut.image.objects):
        times: tuple[list[float], list[float]] = ([], [])
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[0]) < 5:
            for engine, into in zip((whole, cut), times, strict=True):
                engine.run(arrays)  # brings its data back into the caches
                start = time.perf_counter()
                engine.run(arrays)
                into.append(time.perf_counter() - start)
        record["seconds"] = [median(t) for t in times]
        record["ratio"] = median(b / a for a, b in zip(*times, strict=True))
    return record


def _counts(engine: Any, arrays: Arrays) -> dict[str, int]:
    """Kernels that run, bytes of their operands, and of the memory between them."""
    events = {event.kernel: event.bytes for event in engine.profile(arrays)}
    arena = engine.memory({name: a.shape for name, a in arrays.items()})["arena_bytes"]
    return {"kernels": len(events), "bytes": sum(events.values()), "arena": arena}


def _line(record: Record) -> str:
    texts = [f"{record['model']:28} {record['ablation']:14} {record['threads']}T"]
    texts += [f"kernels {_pair(record['kernels'])}", f"MB {_pair(record['bytes'], 1e-6)}"]
    texts.append(f"arena MB {_pair(record['arena'], 1e-6)}")
    if record["seconds"]:
        texts.append(f"ms {_pair(record['seconds'], 1e3)}  time x{record['ratio']:.3f}")
    else:
        texts.append("nothing changes")
    return "  ".join([*texts, *([] if record["agrees"] else ["DIFFERS"])])


def _pair(values: Sequence[float], scale: float = 1.0) -> str:
    return " / ".join(f"{v * scale:.4g}" for v in values)


_HEAD = """# What each fusion brings

Made by `python -m benchmarks.ablations`; f32 and batch 1 where nothing else is said. Each pair is with / without. MB
are those of the kernels' operands, arena MB the memory between kernels.
"""
_MEANS = """
| fusion | threads | models | time without / with, geometric mean | bytes likewise |
|---|---|---|---|---|"""
_ROWS = """
| model | fusion | threads | kernels | MB | arena MB | ms | time without / with |
|---|---|---|---|---|---|---|---|"""


def markdown(records: Sequence[Record]) -> str:
    """The table of all lines where something changes, and the means of each fusion over its models."""
    lines = [_HEAD, *(f"{cpu}." for cpu in sorted({r["cpu"] for r in records})), _MEANS]
    changed = [r for r in records if r["seconds"]]
    for ablation in (*ABLATIONS, *SPELLED_OUT):
        for threads in sorted({r["threads"] for r in changed}):
            found = [r for r in changed if (r["ablation"], r["threads"]) == (ablation, threads)]
            if found:
                means = [_mean([r["ratio"] for r in found]), _mean([r["bytes"][1] / r["bytes"][0] for r in found])]
                lines.append(f"| {ablation} | {threads} | {len(found)} | {means[0]:.2f} | {means[1]:.2f} |")
    lines.append(_ROWS)
    for r in changed:
        cells = [r["model"], r["ablation"], str(r["threads"]), _pair(r["kernels"]), _pair(r["bytes"], 1e-6)]
        cells += [_pair(r["arena"], 1e-6), _pair(r["seconds"], 1e3)]
        lines.append(f"| {' | '.join(cells)} | {r['ratio']:.2f}{'' if r['agrees'] else ' DIFFERS'} |")
    return "\n".join([*lines, ""])


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


if __name__ == "__main__":
    sys.exit(main())
