"""`vivace reduce`: a model that fails becomes one of a few nodes that fails in the same way."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vivace.base.errors import InputError, VivaceError
from vivace.cli import options

if TYPE_CHECKING:
    import numpy as np

    from vivace.cli.contestants import Job
    from vivace.measure.compare import Tolerance

DIFFERS = "gives other answers than onnxruntime"


def reduce_model(
    model: options.Model,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The small model; its inputs go beside it as .npz.", show_default=False),
    ] = None,
    inputs: options.Inputs = [],
    shapes: options.Shapes = [],
    seed: options.Seed = 0,
    provider: options.Provider = "native,onnxruntime",
    threads: options.Threads = 0,
    precision: options.FixedPrecision = "f32",
    target: options.Target = "host",
    level: options.Level = "all",
    disable: options.Disable = [],
    absolute: options.Absolute = 1e-3,
    relative: options.Relative = 1e-3,
    as_json: options.Json = False,
) -> None:
    """Leaves out nodes of a model as long as it fails in the same way: does not compile or run, or gives other answers
    than onnxruntime. With VIVACE_CHECK=1 in the environment a wrong kernel is a failure too.

    Example: vivace reduce model.onnx -o small.onnx
    """
    from vivace.cli.console import print_json, progress
    from vivace.cli.contestants import Job, input_specs
    from vivace.measure.compare import Tolerance
    from vivace.onnx.exporter import save
    from vivace.onnx.shrink import names_of, read_whole

    options.check_model(model)
    path = output or model.with_name(f"{model.stem}-reduced.onnx")
    options.check_output(path, model)
    job = Job(
        model, options.threads_of(threads), precision, options.shapes_of(shapes), {}, options.level_of(level),
        options.split(*disable), target,
    )  # fmt: skip
    arrays, _ = options.gather(input_specs(job), job.shapes, inputs, seed)
    with progress() as show:
        found = reduce(Trial(provider, job, Tolerance(absolute, relative)), read_whole(model), arrays, show)
    save(found.model, path)
    options.write_archive(path.with_suffix(".npz"), found.arrays)
    names = names_of(found.model)
    again = f"vivace run {path} --input {path.with_suffix('.npz')} --against onnxruntime"
    if as_json:
        facts = {"failure": found.failure, "nodes": names, "n_trials": found.n_trials, "model": str(path)}
        print_json({**facts, "n_nodes_before": found.n_before})
        return
    print(f"{path}: {len(names)} of {found.n_before} nodes, {found.n_trials} trials; it fails: {found.failure}")
    for name in names:
        print(f"  {name}")
    print(f"see it with: {again}")


@dataclass(frozen=True, slots=True)
class Trial:
    """How a model is compiled and held against ONNX Runtime."""

    provider: str
    job: Job
    tolerance: Tolerance

    def failure(self, model: Any, arrays: Mapping[str, np.ndarray], folder: Path) -> str:
        """The kind of failure; empty where all is well, or where ONNX Runtime cannot run the model either."""
        from vivace.cli.contestants import open_engine
        from vivace.measure.compare import compare
        from vivace.onnx.exporter import save

        path = folder / "part.onnx"
        save(model, path)
        shapes = {name: shape for name, shape in self.job.shapes.items() if name in arrays}
        job = replace(self.job, model=path, shapes=shapes)
        try:
            want = open_engine("onnxruntime", replace(job, precision="f32", level=0, shapes={})).run(arrays)
        except VivaceError:
            return ""
        try:
            got = open_engine(self.provider, job).run(arrays)
        except Exception as error:  # whatever it is, it is what was asked about
            return type(error).__name__
        try:
            return "" if all(d.agrees for d in compare(got, want, self.tolerance)) else DIFFERS
        except InputError:  # of another shape
            return DIFFERS


@dataclass(frozen=True, slots=True)
class Reduced:
    """The small model, its inputs, and how it fails."""

    model: Any
    arrays: dict[str, np.ndarray]
    failure: str
    n_before: int
    n_trials: int


def reduce(trial: Trial, model: Any, arrays: Mapping[str, np.ndarray], show: Any = None) -> Reduced:
    """Raises: InputError for a model that does not fail."""
    from vivace.onnx.shrink import minimize, part_of, with_every_value
    from vivace.providers.provider import LoadOptions, find

    n, n_trials = len(model.graph.node), 0
    with tempfile.TemporaryDirectory(prefix="vivace-") as name:
        folder = Path(name)
        failure = trial.failure(model, arrays, folder)
        if not failure:
            raise InputError(
                "does not fail", where=str(trial.job.model), expected="a model that fails",
                hint="VIVACE_CHECK=1, or smaller --atol and --rtol",
            )  # fmt: skip
        whole = find("onnxruntime").load(with_every_value(model).SerializeToString(), LoadOptions(level=0))
        values = {**arrays, **whole.run(arrays)}

        def fails(nodes: Sequence[int]) -> bool:
            nonlocal n_trials
            n_trials += 1
            if show:
                show(f"{len(nodes)} of {n} nodes", n - len(nodes), n)
            try:
                part = part_of(model, nodes, values)
            except InputError:
                return False
            return trial.failure(part, _taken(part, values), folder) == failure

        part = part_of(model, minimize(n, fails), values)
    return Reduced(part, _taken(part, values), failure, n, n_trials)


def _taken(part: Any, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {v.name: values[v.name] for v in part.graph.input}
