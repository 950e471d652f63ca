"""`vivace run`: one inference on given or generated inputs, and what came out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vivace.base.errors import GateError, InputError
from vivace.cli import options

if TYPE_CHECKING:
    import numpy as np

    from vivace.measure.compare import Difference


def run_model(
    model: options.ModelOrEngine,
    inputs: options.Inputs = [],
    shapes: options.Shapes = [],
    seed: options.Seed = 0,
    provider: options.Provider = "native,onnxruntime",
    threads: options.Threads = 0,
    precision: options.FixedPrecision = "f32",
    target: options.Target = "host",
    level: options.Level = "all",
    tune: options.Tune = "off",
    tune_budget: options.TuneBudget = 0.0,
    timing_cache: options.TimingCache = None,
    save: Annotated[
        Path | None, typer.Option("--save", "-o", help="Write the outputs to this .npz file.", show_default=False)
    ] = None,
    against: Annotated[
        str, typer.Option("--against", help="Compare the outputs with this engine's: onnxruntime or openvino.")
    ] = "",
    absolute: options.Absolute = 1e-3,
    relative: options.Relative = 1e-3,
    as_json: options.Json = False,
) -> None:
    """Runs a model once and prints its outputs.

    Example: vivace run model.onnx --input x=picture.npy --against onnxruntime
    """
    from vivace.cli.console import duration, plain, print_json, print_table, progress, shapes_text
    from vivace.cli.contestants import Job, demands_of, open_engine

    _check_archive(save)
    if against and options.is_saved(model):
        raise InputError(options.NOTHING_TO_COMPARE, where="--against", expected="an ONNX model")
    options.check_timings(timing_cache)
    given = options.shapes_of(shapes)
    job = Job(model, options.threads_of(threads), precision, given, level=options.level_of(level), target=target,
              tune=tune, tune_budget=tune_budget, timing_cache=str(timing_cache or ""))  # fmt: skip
    with progress() as show:
        engine = open_engine(provider, job, show)
    arrays, _ = options.gather(engine.inputs, given, inputs, seed, (engine.inputs, demands_of(engine)))
    start = time.perf_counter()
    outputs = engine.run(arrays)
    seconds = time.perf_counter() - start
    if save is not None:
        options.write_archive(save, outputs)
    differences = _differences(against, job, arrays, outputs, absolute, relative) if against else ()
    if as_json:
        print_json(
            {
                "seconds": seconds,
                "inputs": {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in arrays.items()},
                "outputs": {name: _facts(a) for name, a in outputs.items()},
                "differences": plain(differences),
            }
        )
    else:
        print(f"inputs   {shapes_text({name: a.shape for name, a in arrays.items()})}")
        rows = [
            [name, str(a.dtype), "x".join(map(str, a.shape)) or "scalar", *_summary(a)] for name, a in outputs.items()
        ]
        print_table("", ["output", "dtype", "shape", "least", "mean", "most", "first values"], rows, left=3)
        print(f"one run took {duration(seconds)}, the first after loading")
    if differences:
        _judge(differences, against, as_json)


def _differences(
    against: str,
    job: Any,
    arrays: dict[str, np.ndarray],
    outputs: dict[str, np.ndarray],
    absolute: float,
    relative: float,
) -> tuple[Difference, ...]:
    from dataclasses import replace

    from vivace.cli.contestants import open_engine
    from vivace.measure.compare import Tolerance, compare

    other = open_engine(against, replace(job, precision="f32", level=99))
    return compare(outputs, other.run(arrays), Tolerance(absolute, relative))


def _judge(differences: tuple[Difference, ...], against: str, as_json: bool) -> None:
    from vivace.cli.console import print_table

    if not as_json:
        rows = [
            [
                d.name,
                f"{d.max_absolute:.2e}",
                f"{d.max_relative:.2e}",
                f"{d.snr_db:.1f}",
                str(d.n_special),
                str(d.n_over),
            ]
            for d in differences
        ]
        columns = ["output", "max abs", "max rel", "SNR dB", "NaN/inf only in one", "over tolerance"]
        print_table(f"difference from {against}", columns, rows)
    bad = [d.name for d in differences if not d.agrees]
    if bad:
        raise GateError(f"the outputs differ from those of {against}", where=", ".join(bad), hint="--atol and --rtol")


def _summary(array: np.ndarray) -> list[str]:
    if array.size == 0 or array.dtype.kind in "OUS":
        return ["-", "-", "-", " ".join(str(v) for v in array.ravel()[:4])]
    values = array.astype("float64") if array.dtype.kind != "b" else array
    first = " ".join(f"{v:.4g}" for v in values.ravel()[:4].astype("float64"))
    return [
        f"{values.min():.4g}",
        f"{values.mean():.4g}",
        f"{values.max():.4g}",
        first + (" ..." if array.size > 4 else ""),
    ]


def _facts(array: np.ndarray) -> dict[str, Any]:
    from vivace.cli.console import plain

    facts: dict[str, Any] = {"shape": list(array.shape), "dtype": str(array.dtype)}
    if array.size and array.dtype.kind not in "OUS":
        values = array.astype("float64")
        facts |= {"min": plain(values.min()), "mean": plain(values.mean()), "max": plain(values.max())}
        facts["first"] = plain(values.ravel()[:8])
    return facts


def _check_archive(path: Path | None) -> None:
    options.check_output(path)
    if path is not None and path.suffix != ".npz":
        raise InputError("outputs are written as .npz", where=str(path), expected="a name that ends in .npz")
