"""`vivace optimize`: an ONNX file in, a smaller portable one out, checked against the original before it is written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vivace.base.errors import InputError, ProviderError, UnsupportedError
from vivace.graph.graph import Graph
from vivace.graph.reference import evaluate
from vivace.onnx.exporter import DEFAULT, NEWEST, OLDEST, count_operators, export, opset_of, save
from vivace.onnx.importer import import_model
from vivace.optimize.check import compare, random_inputs, sizes_to_try
from vivace.optimize.pipeline import Level, optimize
from vivace.optimize.report import Report
from vivace.providers.provider import LoadOptions, find

SEEDS = (0, 1)


def optimize_model(
    source: Path | str,
    target: Path | str | None,
    *,
    level: int = Level.EXTENDED,
    disable: tuple[str, ...] = (),
    explain: tuple[str, ...] = (),
    opset: int | None = None,
    sizes: Mapping[str, int] | None = None,
    dry_run: bool = False,
) -> Report:
    """Optimize a model file and write the result, unless `dry_run`. Levels above EXTENDED are not portable and count
    as EXTENDED.

    `opset` is the source's, at least 20, unless given. `sizes` fixes symbolic dims for the check.
    Raises: ModelError, UnsupportedError for a model that cannot be read or written; InputError where the disk refuses;
    GateError when an output differs. Nothing is written then, and a file that was there stays as it was.
    """
    if target is None and not dry_run:
        raise InputError("no file to write", where="target", expected="a path, or a dry run")
    path = Path(source)
    graph = import_model(path)
    report = Report(explain=explain)
    result = optimize(graph, min(level, Level.EXTENDED), disable, report)
    was = opset_of(path)
    model = export(result, opset or (was if OLDEST <= was <= NEWEST and was > DEFAULT else DEFAULT))
    report.operators_before, report.operators_after = count_operators(path), count_operators(model)
    try:
        with tempfile.TemporaryDirectory(
            dir=None if target is None else Path(target).resolve().parent, prefix=".vivace-"
        ) as folder:
            made = Path(folder) / (path.name if target is None else Path(target).name)
            save(model, made)
            report.largest_error = check(graph, result, path, made, sizes)
            if not dry_run and target is not None:
                for part in sorted(made.parent.iterdir(), key=lambda p: p == made):  # the weights first, the model last
                    os.replace(part, Path(target).resolve().parent / part.name)
    except OSError as e:
        raise InputError(
            f"cannot be written: {e.strerror or e}", where=str(target or tempfile.gettempdir()),
            expected="a folder with room for the model", hint="freeing space, or another folder",
        ) from e  # fmt: skip
    return report


def check(graph: Graph, result: Graph, before: Path, after: Path, sizes: Mapping[str, int] | None = None) -> float:
    """The largest difference between the two files in ONNX Runtime, on random inputs; between the graphs where it is
    missing.

    Raises: GateError where it is above the tolerance; UnsupportedError when no inputs could be found that the original
    accepts.
    """
    try:
        sessions = [find("onnxruntime").load(p, LoadOptions(level=0)) for p in (before, after)]
    except ProviderError:
        return _check_graphs(graph, result, sizes)
    for env in sizes_to_try(graph, sizes):
        try:
            want = [sessions[0].run(random_inputs(graph, env, seed)) for seed in SEEDS]
        except ProviderError:
            continue
        got = [sessions[1].run(random_inputs(graph, env, seed)) for seed in SEEDS]
        return max(compare(a, b, str(after.name)) for a, b in zip(want, got))
    raise UnsupportedError(
        "no random inputs were found that the model accepts", where=before.name, hint="give the sizes of its dims"
    )


def _check_graphs(graph: Graph, result: Graph, sizes: Mapping[str, int] | None) -> float:
    names = [v.name for v in graph.outputs]
    for env in sizes_to_try(graph, sizes):
        feeds = random_inputs(graph, env, SEEDS[0])
        try:
            want = evaluate(graph, feeds)
        except InputError:
            continue
        got: list[np.ndarray] = evaluate(result, feeds)
        return compare(dict(zip(names, want)), dict(zip(names, got)), "the optimized graph")
    raise UnsupportedError(
        "no random inputs were found that the model accepts", where="the check", hint="give the sizes of its dims"
    )
