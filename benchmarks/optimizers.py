"""Our portable optimizer against onnxslim and ONNX Runtime's basic level, on every real model.

    python -m benchmarks.optimizers [model ...]

For each model: nodes and bytes moved that each tool leaves (both counted by us, on the file that the tool writes), and
whether ONNX Runtime computes equal outputs from our file. Of all models the table goes to `results/optimizers.md`. Exit
status 1 when we leave more nodes than the better of the two, move more bytes, or an output differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime as ort
from benchmarks.models import MODELS, cache_dir, inputs
from benchmarks.records import RESULTS, versions, write

from vivace.base.errors import VivaceError
from vivace.graph.graph import substitute_dims
from vivace.graph.reference import bind
from vivace.measure.statistics import geometric_mean
from vivace.onnx.exporter import DEFAULT, NEWEST, count_operators, export, opset_of, save
from vivace.onnx.importer import import_model
from vivace.optimize.pipeline import Level, optimize
from vivace.optimize.report import moved_bytes

LARGEST_ERROR = 2e-3  # |got - want| / (1 + |want|) in f32, over models whose deepest sums have thousands of terms
TOOLS = ("onnxslim", "ort")


@dataclass(slots=True)
class Row:
    """What the tools leave of one model: nodes and megabytes moved by tool, without those of a tool that fails."""

    model: str
    nodes: dict[str, int] = field(default_factory=dict)  # as imported, then by tool
    megabytes: dict[str, float] = field(default_factory=dict)
    error: float = 0.0
    seconds: float = 0.0
    note: str = ""

    @property
    def is_best(self) -> bool:
        """Whether no tool leaves fewer nodes or moves fewer bytes than ours."""
        return not self.note and all(
            found.get("ours", float("inf")) <= min((found[t] for t in TOOLS if t in found), default=float("inf"))
            for found in (self.nodes, self.megabytes)
        )

    def count(self, tool: str, path: Path, feeds: dict[str, np.ndarray]) -> None:
        """Adds what a tool leaves."""
        self.nodes[tool] = count_operators(path).total()
        moved = megabytes(path, feeds)
        if moved is not None:
            self.megabytes[tool] = moved


def run_ort(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds)))


def ort_basic(path: Path, out: Path) -> Path:
    """The model after ONNX Runtime's basic level."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return out


def slim(path: Path, out: Path) -> Path:
    import onnxslim

    with contextlib.redirect_stdout(io.StringIO()):
        onnxslim.slim(str(path), str(out))
    return out


def megabytes(path: Path, feeds: dict[str, np.ndarray]) -> float | None:
    """Bytes that the nodes of a file move at the sizes of these inputs."""
    try:
        graph = import_model(path)
        env = bind((v, feeds[v.name].shape) for v in graph.inputs)
        return moved_bytes(substitute_dims(graph, dict(env))) / 1e6
    except VivaceError:
        return None


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The largest |got - want| / (1 + |want|) over all outputs."""
    worst = 0.0
    for name, want in a.items():
        got = b[name]
        if want.dtype.kind in "fc":
            with np.errstate(all="ignore"):
                gap = np.abs(got.astype(np.float64) - want) / (1 + np.abs(want))
            worst = max(worst, float(np.max(np.nan_to_num(gap, nan=0.0))) if gap.size else 0.0)
            if not np.array_equal(np.isnan(got), np.isnan(want)):
                return float("inf")
        elif want.shape != np.shape(got) or np.mean(np.asarray(got) != want) > 1e-3:
            return float("inf")
    return worst


def measure(name: str, path: Path, folder: Path, peers: bool = True) -> Row:
    row, feeds = Row(name), inputs(name)
    row.count("imported", path, feeds)
    graph = import_model(path)
    start = time.perf_counter()
    best = optimize(graph, Level.EXTENDED)
    row.seconds = time.perf_counter() - start
    ours = folder / "ours.onnx"
    save(export(best, min(max(DEFAULT, opset_of(path)), NEWEST)), ours)
    row.count("ours", ours, feeds)
    row.error = difference(run_ort(path, feeds), run_ort(ours, feeds))
    notes = ["outputs differ"] if row.error > LARGEST_ERROR else []
    for tool, rewrite in zip(TOOLS, (slim, ort_basic)) if peers else ():
        try:
            row.count(tool, rewrite(path, folder / f"{tool}.onnx"), feeds)
        except Exception as e:  # a peer that fails loses its place, not the benchmark
            notes.append(f"{tool}: {type(e).__name__}")
    row.note = "; ".join(notes)
    return row


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| model | nodes | ours | onnxslim | ORT basic | MB moved: imported -> ours (onnxslim; ORT) | error | s"
        " | notes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        nodes = " | ".join(str(r.nodes.get(t, "-")) for t in ("imported", "ours", *TOOLS))
        moved = {t: f"{r.megabytes[t]:.1f}" if t in r.megabytes else "-" for t in ("imported", "ours", *TOOLS)}
        lines.append(
            f"| {r.model} | {nodes} | {moved['imported']} -> {moved['ours']} ({moved['onnxslim']}; {moved['ort']})"
            f" | {r.error:.1e} | {r.seconds:.2f} | {'' if r.is_best else r.note or 'worse'} |"
        )
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """The table for people, and what it comes to."""
    tools = {**versions(), "onnxslim": version("onnxslim")}
    about = ", ".join(f"{k} {tools[k]}" for k in ("vivace", "onnxslim", "onnxruntime"))
    both = [r for r in rows if {"ours", *TOOLS} <= r.nodes.keys()]
    left = [geometric_mean([r.nodes["ours"] / r.nodes[t] for r in both]) for t in TOOLS]
    return (
        f"# Optimizers\n\nMade by `python -m benchmarks.optimizers`; {about}.\n\n"
        "Level `extended`, written as ONNX. Nodes that each tool leaves of the file, and bytes that they move at the"
        " sizes of the first example input, each node counted alone. Error: outputs of our file in ONNX Runtime against"
        f" those of the model itself. s: our time.\n\n{table(rows)}\n\n* We leave {left[0]:.2f} of onnxslim's nodes and"
        f" {left[1]:.2f} of those of ONNX Runtime's basic level (geometric means over {len(both)} models).\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optimizers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--alone", action="store_true", help="leave the peers out")
    chosen = parser.parse_args(arguments)
    rows: list[Row] = []
    for model in MODELS:
        path = cache_dir() / model.file_name
        if (chosen.models and model.name not in chosen.models) or not path.exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows.append(measure(model.name, path, Path(folder), not chosen.alone))
            except VivaceError as e:
                rows.append(Row(model.name, note=f"{type(e).__name__}: {e}"[:200]))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    if not chosen.models and not chosen.alone:
        RESULTS.mkdir(parents=True, exist_ok=True)
        write(RESULTS / "optimizers.json", json.dumps([asdict(r) for r in rows], indent=1) + "\n")
        write(RESULTS / "optimizers.md", markdown(rows))
    return 0 if all(r.is_best for r in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
