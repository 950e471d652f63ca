"""What each fusion and each decision brings: time, kernels and bytes of a model with it and without it.

    python -m benchmarks.ablations                            # all on the models named for them, in 15 minutes
    python -m benchmarks.ablations --only bands winograd      # lines of these; the others stay in the table
    python -m benchmarks.ablations resnet50 --only winograd epilogues --threads 2 --seconds 4 --again

What is left out, and how, is in `ablation_cases.py`. Bytes are those of the kernels' operands, each once per kernel:
what a fusion keeps in registers or near caches is not in them. Outputs with and without agree, or the line says
DIFFERS.

Rules:
* SIDE BY SIDE: both sides take turns in one process, and times are medians. `time` is the median of the turns'
  ratios, without over with: above 1, it pays.
* KEPT: `results/ablations.json` holds all lines; each that is measured replaces its own, and the table is made of all.
  A line is measured where there is none of these versions of the engines, or `--again`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from benchmarks.ablation_cases import ABLATIONS, CACHE, DECISIONS, NEUTRAL, SETTLED, SPELLED_OUT, WHAT, Case
from benchmarks.models import ModelUnavailable
from benchmarks.records import RESULTS, versions, write

import vivace
from vivace.base.machine import Isa, host
from vivace.loops.contraction import Contraction
from vivace.lower.choices import Choice, Choices
from vivace.lower.plan import steps_of
from vivace.lower.tile import choose_tile
from vivace.measure.compare import LEAST_SNR_DB, Tolerance, compare
from vivace.measure.statistics import geometric_mean

FILE = RESULTS / "ablations.json"

Record = dict[str, Any]
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Side:
    """An engine, and what its calls get and fill."""

    engine: Any
    inputs: Arrays
    outputs: Arrays | None = None

    def run(self) -> Arrays:
        found: Arrays = self.engine.run(self.inputs, self.outputs)
        return found

    def counts(self) -> dict[str, int]:
        """Kernels that run, bytes of their operands, and of the memory between them."""
        events = {event.kernel: event.bytes for event in self.engine.profile(self.inputs, self.outputs)}
        arena = self.engine.memory({name: a.shape for name, a in self.inputs.items()})["arena_bytes"]
        return {"kernels": len(events), "bytes": sum(events.values()), "arena": arena}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    lines = _Lines(options)
    cases = dict.fromkeys([*(case for a in ABLATIONS.values() for case in a.cases), *SETTLED])
    for case in cases:
        try:
            measure_case(case, lines)
        except ModelUnavailable as missing:
            print(f"{case}: {missing}")
    for name, make in SPELLED_OUT.items():
        if lines.is_due(name, name):
            *models, arrays = make()
            whole, cut = (Side(_engine(model, arrays, options.threads), arrays) for model in models)
            lines.keep(name, name, compare_sides(whole, cut, options.seconds))
    if lines.is_due("smollm2-135m int4", CACHE):
        lines.keep("smollm2-135m int4", CACHE, compare_sides(*cache_sides(options.threads), options.seconds))
    lines.write()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL")
    parser.add_argument("--only", nargs="+", choices=list(WHAT), default=list(WHAT), metavar="LINE", help=str([*WHAT]))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing per line")
    parser.add_argument("--again", action="store_true", help="measure anew what is already there")
    return parser


class _Lines:
    """Rule KEPT."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        records: list[Record] = json.loads(FILE.read_text()) if FILE.exists() else []
        self.records = {(r["model"], r["ablation"], r["threads"]): r for r in records if r["ablation"] in WHAT}

    def is_due(self, model: str, ablation: str) -> bool:
        o = self.options
        if ablation not in o.only or (o.names and not {model, model.split()[0]} & set(o.names)):
            return False
        known = self.records.get((model, ablation, o.threads), {})
        return o.again or known.get("versions") != versions()

    def keep(self, model: str, ablation: str, record: Record) -> None:
        record |= {"model": model, "ablation": ablation, "threads": self.options.threads, "versions": versions()}
        record["cpu"] = host().model
        self.records[model, ablation, self.options.threads] = record
        print(_line(record), flush=True)
        self.write()

    def write(self) -> None:
        order = list(WHAT)
        found = sorted(self.records.values(), key=lambda r: (order.index(r["ablation"]), r["model"], r["threads"]))
        write(FILE, json.dumps(found, indent=1) + "\n")
        write(FILE.with_suffix(".md"), markdown(found))


def measure_case(case: Case, lines: _Lines) -> None:
    """All lines of a model that are due."""
    names = [name for name, a in ABLATIONS.items() if case in a.cases and lines.is_due(str(case), name)]
    settings = [name for name in DECISIONS if case in SETTLED and lines.is_due(str(case), name)]
    if not names and not settings:
        return
    model, arrays = case.load()
    threads, seconds = lines.options.threads, lines.options.seconds
    whole = Side(_engine(model, arrays, threads, case.arithmetic), arrays)
    for name in names:
        cut = _engine(model, arrays, threads, case.arithmetic, ABLATIONS[name].without)
        lines.keep(str(case), name, compare_sides(whole, Side(cut, arrays), seconds, case.precision == "f32"))
    for name in settings:
        cut = settled(model, arrays, threads, DECISIONS[name][1])
        lines.keep(str(case), name, compare_sides(whole, Side(cut, arrays), seconds))


def _engine(
    model: Any, arrays: Arrays, threads: int, precision: str = "f32", disable: tuple[str, ...] = ()
) -> vivace.Engine:
    shapes = {k: v.shape for k, v in arrays.items()}
    engine = vivace.compile(model, threads=threads, shapes=shapes, precision=precision, disable=disable)
    assert isinstance(engine, vivace.Engine)
    return engine


def settled(model: Any, arrays: Arrays, threads: int, choice: Choice) -> Any:
    """An engine whose products and convolutions are made by one choice, where it is not the cost model's."""
    from vivace.building import link_image, make_foreign, make_plan, optimize_for_native
    from vivace.compilation import load_graph
    from vivace.runtime.engine import Engine
    from vivace.targets.cpu.amx import host_isa

    graph, isa = optimize_for_native(load_graph(model, {k: v.shape for k, v in arrays.items()})), host_isa()
    providers = ("native", "onnxruntime")
    steps = steps_of(make_plan(graph, isa, providers, threads=threads).body)
    sites = {step.site.key: step.spec for step in steps if step.site and isinstance(step.spec, Contraction)}
    choices = Choices({key: choice for key, spec in sites.items() if _is_other(spec, choice, isa)})
    plan = make_plan(graph, isa, providers, choices=choices, threads=threads)
    return Engine(link_image(plan, isa, True, None, choices), threads, (), make_foreign(threads))


def _is_other(spec: Contraction, choice: Choice, isa: Isa) -> bool:
    """Whether a setting makes another kernel, or is that of keeping no rows."""
    made = spec
    if choice.lanes and spec.packing.kind == "panels":
        made = replace(spec, packing=replace(spec.packing, lanes=choice.lanes))
    plain = choose_tile(spec, isa, choice=NEUTRAL)
    return plain != (choose_tile(spec, isa) if choice == NEUTRAL else choose_tile(made, isa, choice=choice))


def cache_sides(threads: int) -> tuple[Side, Side]:
    """A decoder with weights in blocks whose call writes one token behind a cache of a thousand, and one whose call
    writes the whole cache."""
    from benchmarks.decode import feeds
    from benchmarks.models.blockwise import materialise_blockwise

    given = feeds()["long"]
    engine: Any = vivace.compile(materialise_blockwise("int4"), threads=threads)
    inputs, outputs = dict(given), {}
    for present, past in engine.appended.items():
        cache = given[past]
        room = np.zeros((*cache.shape[:2], cache.shape[2] + 1, *cache.shape[3:]), cache.dtype)
        room[:, :, :-1] = cache
        inputs[past], outputs[present] = room[:, :, :-1], room
    return Side(engine, inputs, outputs), Side(engine, given)


def compare_sides(whole: Side, cut: Side, seconds: float, is_exact: bool = True) -> Record:
    """Kernels, bytes, bytes of arena and times (seconds) with and without; no times where nothing changed. What is not
    exact, such as bytes that are one quantum apart, agrees as `vivace bench` says of narrow types."""
    counts = [side.counts() for side in (whole, cut)]
    near = Tolerance(least_snr_db=None if is_exact else LEAST_SNR_DB)
    outputs = [{name: y.copy() for name, y in side.run().items()} for side in (whole, cut)]
    agrees = all(d.agrees for d in compare(outputs[1], outputs[0], near))
    record: Record = {name: [c[name] for c in counts] for name in ("kernels", "bytes", "arena")}
    record |= {"agrees": agrees, "seconds": None, "ratio": None}
    is_same = whole.engine is not cut.engine and set(whole.engine.image.objects) == set(cut.engine.image.objects)
    if counts[0] != counts[1] or not is_same:
        times: tuple[list[float], list[float]] = ([], [])
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[0]) < 5:
            for side, into in zip((whole, cut), times, strict=True):
                side.run()  # brings its data back into the caches
                start = time.perf_counter()
                side.run()
                into.append(time.perf_counter() - start)
        record["seconds"] = [median(t) for t in times]
        record["ratio"] = median(b / a for a, b in zip(*times, strict=True))
    return record


def _line(record: Record) -> str:
    texts = [f"{record['model']:28} {record['ablation']:18} {record['threads']}T"]
    texts += [f"kernels {_pair(record['kernels'])}", f"MB {_pair(record['bytes'], 1e-6)}"]
    texts.append(f"arena MB {_pair(record['arena'], 1e-6)}")
    if record["seconds"]:
        texts.append(f"ms {_pair(record['seconds'], 1e3)}  time x{record['ratio']:.3f}")
    else:
        texts.append("nothing changes")
    return "  ".join([*texts, *([] if record["agrees"] else ["DIFFERS"])])


def _pair(values: Sequence[float], scale: float = 1.0) -> str:
    return " / ".join(f"{v * scale:.4g}" for v in values)


_HEAD = """# What each fusion and each decision brings

Made by `python -m benchmarks.ablations`; f32 and batch 1 where nothing else is said. Each pair is with / without. MB
are those of the kernels' operands, of a loop those of one turn, arena MB the memory between kernels. Fusions are left
out by `disable=` (`benchmarks/ablation_cases.py` has the names); what the cost model decides for each product and
convolution is held against one setting for all of them. What measuring (`tune=`) finds beyond these decisions is in
[tuning.md](tuning.md).
"""
_MEANS = """
| line | what | threads | models | time without / with, geometric mean | bytes likewise |
|---|---|---|---|---|---|"""
_ROWS = """
| model | line | threads | kernels | MB | arena MB | ms | time without / with |
|---|---|---|---|---|---|---|---|"""


def markdown(records: Sequence[Record]) -> str:
    """The table of all lines where something changes, and the means of each over its models."""
    lines = [_HEAD, *(f"{cpu}." for cpu in sorted({r["cpu"] for r in records})), _MEANS]
    changed: list[Record] = [r for r in records if r["seconds"]]
    for ablation, what in WHAT.items():
        for threads in sorted({r["threads"] for r in changed}):
            found = [r for r in changed if (r["ablation"], r["threads"]) == (ablation, threads)]
            if found:
                means = [geometric_mean([f(r) for r in found]) for f in (_ratio, _more_bytes)]
                lines.append(f"| {ablation} | {what} | {threads} | {len(found)} | {means[0]:.2f} | {means[1]:.2f} |")
    lines.append(_ROWS)
    for r in changed:
        cells = [r["model"], r["ablation"], str(r["threads"]), _pair(r["kernels"]), _pair(r["bytes"], 1e-6)]
        cells += [_pair(r["arena"], 1e-6), _pair(r["seconds"], 1e3)]
        lines.append(f"| {' | '.join(cells)} | {r['ratio']:.2f}{'' if r['agrees'] else ' DIFFERS'} |")
    same = [f"{r['ablation']} of {r['model']}" for r in records if not r["seconds"]]
    return "\n".join([*lines, "", *([f"Where nothing changes: {', '.join(same)}.", ""] if same else [])])


def _ratio(record: Record) -> float:
    return float(record["ratio"])


def _more_bytes(record: Record) -> float:
    return float(record["bytes"][1] / record["bytes"][0])


if __name__ == "__main__":
    sys.exit(main())
