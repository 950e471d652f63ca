"""The conversions of layout and format that each model keeps as steps of their own, and what each costs.

    python -m benchmarks.conversions_left            # all models of the cache in f32, bf16 and 8-bit integers

Counted in plans, so that no kernel is made and nothing is timed: a step costs what a pass over as many elements was
measured to take on one core (`python -m benchmarks.conversions`; `vivace/base/conversions.py`). What other kernels do
as they load and store is only counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import MODELS, ModelUnavailable, inputs, is_ready, materialise
from benchmarks.models.quantized import QUANTIZED, materialise_quantized
from benchmarks.records import RESULTS, write

from vivace.building import apply_precision, make_plan, optimize_for_native
from vivace.compilation import load_graph
from vivace.lower.conversions import report
from vivace.options import choose_isa

SHOWN_US = 5.0


@dataclass(frozen=True, slots=True)
class Row:
    """A model in a form, with the steps that are left and how many conversions are none, by kind."""

    model: str
    form: str
    left: tuple[dict[str, Any], ...]
    fused: dict[str, int]

    @property
    def us(self) -> float:
        return sum(float(step["cost_us"]) for step in self.left)


def row_of(model: str, form: str, path: Path, precision: str) -> Row:
    """At the shapes of the model's first case."""
    isa = choose_isa("host")
    graph = load_graph(path, {name: array.shape for name, array in inputs(model).items()})
    graph, _ = apply_precision(optimize_for_native(graph), precision, isa)
    found = report(make_plan(graph, isa, ("native", "onnxruntime")), {})
    return Row(model, form, tuple(found["conversions"]), dict(found["conversions_fused"]))  # type: ignore[call-overload]


def rows() -> Iterator[Row]:
    for model in MODELS:
        if model.variant_of is None and is_ready(model.name):
            for precision in ("f32", "bf16"):
                yield row_of(model.name, precision, materialise(model.name), precision)
    for q in QUANTIZED:
        if q.form == "qdq" and is_ready(q.base):
            try:
                yield row_of(q.base, "qdq", materialise_quantized(q.base, "qdq"), "f32")
            except ModelUnavailable as missing:
                print(f"{q.name}: {missing}")


def page(found: Sequence[Row]) -> str:
    """The counts of each model, and every step that costs more than next to nothing."""
    lines = [
        "# Conversions that are left",
        "",
        "Made by `python -m benchmarks.conversions_left`: steps that only change the order or the format of a value,",
        "at the shapes of each model's first case. us: what passes over as many elements were measured to take on one",
        "core. Done on the way: casts and quantizations that other kernels do as they load and store.",
        "",
        "| model | form | steps left | us | done on the way |",
        "|---|---|---|---|---|",
    ]
    for r in found:
        fused = ", ".join(f"{n} {kind}" for kind, n in r.fused.items()) or "-"
        lines.append(f"| {r.model} | {r.form} | {len(r.left)} | {r.us:.1f} | {fused} |")
    lines += ["", f"## Those of {SHOWN_US:g} us and more", "", "| model | form | step | from | to | us | because |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in found:
        for s in sorted(r.left, key=lambda s: -s["cost_us"]):
            if s["cost_us"] >= SHOWN_US:
                cells = [r.model, r.form, s["step"], s["before"], s["after"], f"{s['cost_us']:.1f}", s["why"]]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> int:
    found = []
    for row in rows():
        found.append(row)
        print(f"{row.model:28} {row.form:5} {len(row.left):3} steps {row.us:8.1f} us", flush=True)
    write(RESULTS / "conversions.md", page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
