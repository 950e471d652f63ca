"""Our portable optimizer against onnxslim and ONNX Runtime's basic level, on every real model.

    python -m benchmarks.optimizers [model ...]

For each model: nodes and bytes moved that each tool leaves (both counted by us, on the file that the tool writes), and whether
ONNX Runtime computes equal outputs from our file. Exit status 1 when we leave more nodes than the better of the two, or an output differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.models import MODELS, cache_dir, inputs
from vivace.base.errors import VivaceError
from vivace.onnx.exporter import export, save
from vivace.onnx.importer import import_model
from vivace.optimize.pipeline import Level, optimize
from vivace.optimize.report import Report, moved_bytes


@dataclass(slots=True)
class Row:
    """What the tools leave of one model; None where a tool fails."""

    model: str
    before: int
    ours: int | None = None
    extended: int | None = None
    onnxslim: int | None = None
    ort: int | None = None
    megabytes: tuple[float, float] = (0.0, 0.0)
    peers_megabytes: tuple[float | None, float | None] = (None, None)
    error: float = 0.0
    seconds: float = 0.0
    note: str = ""

    @property
    def is_best(self) -> bool:
        peers = [n for n in (self.onnxslim, self.ort) if n is not None]
        return self.ours is not None and (not peers or self.ours <= min(peers)) and not self.note


def count_nodes(graph: onnx.GraphProto) -> int:
    """Operators, those of nested graphs included; constants are not operators."""
    total = 0
    for n in graph.node:
        total += n.op_type != "Constant"
        for a in n.attribute:
            total += count_nodes(a.g) if a.type == onnx.AttributeProto.GRAPH else 0
    return total


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


def megabytes(path: Path) -> float | None:
    try:
        return moved_bytes(import_model(path)) / 1e6
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
    row = Row(name, count_nodes(onnx.load(str(path), load_external_data=False).graph))
    graph = import_model(path)
    start = time.perf_counter()
    report = Report()
    best = optimize(graph, Level.EXTENDED, report=report)
    row.seconds = time.perf_counter() - start
    save(export(best), folder / "ours.onnx")
    row.ours = count_nodes(onnx.load(str(folder / "ours.onnx"), load_external_data=False).graph)
    row.megabytes = (report.bytes_before / 1e6, moved_bytes(import_model(folder / "ours.onnx")) / 1e6)
    feeds = inputs(name)
    row.error = difference(run_ort(path, feeds), run_ort(folder / "ours.onnx", feeds))
    if row.error > 2e-3:
        row.note = "outputs differ"
    if peers:
        for key, tool in (("onnxslim", slim), ("ort", ort_basic)):
            try:
                out = tool(path, folder / f"{key}.onnx")
            except Exception as e:  # a peer that fails loses its place, not the benchmark
                row.note += f"{key}: {type(e).__name__}; "
                continue
            setattr(row, key, count_nodes(onnx.load(str(out), load_external_data=False).graph))
            row.peers_megabytes = (*row.peers_megabytes[:1], megabytes(out)) if key == "ort" else (megabytes(out), None)
    return row


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| model | nodes | ours | onnxslim | ORT basic | MB moved, imported -> ours (onnxslim; ORT) | largest error | optimizer s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        peers = "; ".join("-" if m is None else f"{m:.1f}" for m in r.peers_megabytes)
        shown = ["-" if n is None else str(n) for n in (r.ours, r.onnxslim, r.ort)]
        lines.append(
            f"| {r.model} | {r.before} | {' | '.join(shown)} | {r.megabytes[0]:.1f} -> {r.megabytes[1]:.1f} ({peers}) "
            f"| {r.error:.1e} | {r.seconds:.2f} |{'' if r.is_best else ' ' + (r.note or 'worse')}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="*")
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
                rows.append(Row(model.name, 0, note=f"{type(e).__name__}: {e}"[:200]))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    return 0 if all(r.is_best for r in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
