"""Our portable optimizer against onnxslim and ONNX Runtime's basic level, on every real model.

    python -m benchmarks.optimizers [model ...]

For each model: nodes and bytes moved that each tool leaves (both counted by us, on the file that the tool writes), and
whether ONNX Runtime computes equal outputs from our file. Exit status 1 when we leave more nodes than the better of the
two, or an output differs.
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
import onnxruntime as ort
from benchmarks.models import MODELS, cache_dir, inputs

from vivace.base.errors import VivaceError
from vivace.graph.graph import substitute_dims
from vivace.graph.reference import bind
from vivace.onnx.exporter import DEFAULT, NEWEST, count_operators, export, opset_of, save
from vivace.onnx.importer import import_model
from vivace.optimize.pipeline import Level, optimize
from vivace.optimize.report import moved_bytes


@dataclass(slots=True)
class Row:
    """What the tools leave of one model; None where a tool fails."""

    model: str
    before: int
    ours: int | None = None
    onnxslim: int | None = None
    ort: int | None = None
    megabytes: tuple[float, float] = (0.0, 0.0)
    peers_megabytes: tuple[float | None, float | None] = (None, None)
    error: float = 0.0
    seconds: float = 0.0
    note: str = ""

    @property
    def is_best(self) -> bool:
        nodes = [n for n in (self.onnxslim, self.ort) if n is not None]
        moved = [m for m in self.peers_megabytes if m is not None]
        is_fewest = self.ours is not None and self.ours <= min(nodes, default=self.ours)
        return is_fewest and self.megabytes[1] <= min(moved, default=self.megabytes[1]) and not self.note


def count_nodes(path: Path) -> int:
    return count_operators(path).total()


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
    row = Row(name, count_nodes(path))
    graph = import_model(path)
    start = time.perf_counter()
    best = optimize(graph, Level.EXTENDED)
    row.seconds = time.perf_counter() - start
    save(export(best, min(max(DEFAULT, opset_of(path)), NEWEST)), folder / "ours.onnx")
    row.ours = count_nodes(folder / "ours.onnx")
    feeds = inputs(name)
    row.megabytes = (megabytes(path, feeds) or 0.0, megabytes(folder / "ours.onnx", feeds) or 0.0)
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
            setattr(row, key, count_nodes(out))
            row.peers_megabytes = (
                (*row.peers_megabytes[:1], megabytes(out, feeds)) if key == "ort" else (megabytes(out, feeds), None)
            )
    return row


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| model | nodes | ours | onnxslim | ORT basic | MB moved, imported -> ours (onnxslim; ORT) | error | s |",
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
