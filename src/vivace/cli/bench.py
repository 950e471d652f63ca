"""`vivace bench`: engines side by side on one model, with the answers checked and the distance to the limit shown."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vivace.base.errors import GateError, InputError, VivaceError
from vivace.cli import options

if TYPE_CHECKING:
    import numpy as np

    from vivace.cli.contestants import Job
    from vivace.measure.bench import Bench, Contestant, EngineTimes, Settings
    from vivace.measure.compare import Tolerance
    from vivace.measure.memory import ColdStart
    from vivace.measure.peaks import Peaks
    from vivace.measure.roofline import Total


def bench_model(
    model: options.ModelOrEngine,
    against: Annotated[
        str | None,
        typer.Option(
            help="Engines to compare with: onnxruntime, openvino; of a saved engine none. [default: onnxruntime]",
            show_default=False,
        ),
    ] = None,
    shapes: options.Shapes = [],
    inputs: options.Inputs = [],
    seed: options.Seed = 0,
    provider: options.Provider = "native,onnxruntime",
    threads: options.Threads = 0,
    precision: options.FixedPrecision = "f32",
    level: options.Level = "all",
    target: options.Target = "host",
    tune: options.Tune = "off",
    tune_budget: options.TuneBudget = 0.0,
    timing_cache: options.TimingCache = None,
    budget: Annotated[float, typer.Option(min=0, help="Seconds of measuring.")] = 10.0,
    half_width: Annotated[
        float, typer.Option(min=0, help="Stop early once ratios are known so closely, such as 0.01.")
    ] = 0.0,
    memory: Annotated[bool, typer.Option(help="Measure peak memory and cold start in fresh processes.")] = True,
    limit: Annotated[bool, typer.Option(help="Show the share of this machine's limit.")] = True,
    layers: Annotated[bool, typer.Option(help="Show the time of each kernel of our engine.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the kernels and a roofline picture.", show_default=False)
    ] = None,
    max_ratio: Annotated[
        float, typer.Option(min=0, help="Exit with 1 unless our median over the best other one is at most this.")
    ] = math.inf,
    absolute: options.Absolute = 1e-3,
    relative: options.Relative = 1e-3,
    as_json: options.Json = False,
) -> None:
    """Times engines on a model, interleaved in one process with equal threads, and checks their outputs.

    Example: vivace bench model.onnx --against onnxruntime,openvino --threads 1
    """
    from vivace.cli.console import print_json, progress
    from vivace.cli.contestants import Job
    from vivace.measure.bench import Settings
    from vivace.measure.compare import LEAST_SNR_DB, Tolerance

    options.check_model(model, or_engine=True)
    if against and options.is_saved(model):
        raise InputError(options.NOTHING_TO_COMPARE, where="--against", expected="an ONNX model")
    options.check_output(html)
    options.check_timings(timing_cache)
    if (layers or html) and not options.is_native(provider):
        raise InputError("only our own engine shows its kernels", where="--layers", expected="--provider native")
    given = options.shapes_of(shapes)
    job = Job(model, options.threads_of(threads), precision, given, level=options.level_of(level), target=target,
              tune=tune, tune_budget=tune_budget, timing_cache=str(timing_cache or ""))  # fmt: skip
    if against is None:
        against = "" if options.is_saved(model) else "onnxruntime"
    others = [name for name in options.split(against) if name != "native"]
    settings = Settings(budget_seconds=budget, half_width=half_width, seed=seed)
    with progress() as show:
        arrays, job = gather_inputs(job, inputs, seed)
        tolerance = Tolerance(absolute, relative, None if precision == "f32" else LEAST_SNR_DB)
        wanted = Wanted((provider, *others), settings, tolerance, memory, limit)
        report = measure(job, arrays, wanted, show)
    kernels = _kernel_table(provider, job, arrays, report) if layers or html else None
    if as_json:
        data = report.to_dict()
        if kernels is not None:
            data["kernels"] = kernels.to_dicts()
        print_json(data)
    else:
        print_report(report)
        if layers and kernels is not None:
            kernels.print()
    if html is not None and kernels is not None:
        kernels.write_html(html, model.name)
    _judge(report, max_ratio)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure: the engines (ours first), how long, and what beside times.

    `more` are contestants that no provider loads, for benchmarks that bring their own.
    """

    providers: tuple[str, ...]
    settings: Settings
    tolerance: Tolerance
    memory: bool = True
    limit: bool = True
    more: tuple[Contestant, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """One model measured on one machine."""

    job: Job
    shapes: Mapping[str, Sequence[int]]
    bench: Bench
    cold: Mapping[str, ColdStart]
    total: Total | None
    peaks: Peaks | None
    notes: tuple[str, ...]

    @property
    def best_ratio(self) -> float:
        """Our median over the least median of the other engines; NaN where one of them is missing."""
        ours, *others = self.bench.engines
        medians = [engine.median for engine in others if not engine.failure]
        return ours.median / min(medians) if medians and not ours.failure else math.nan

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it; times in seconds."""
        from vivace.base.machine import host
        from vivace.cli.console import plain
        from vivace.cli.system import machine_facts

        return {
            "model": str(self.job.model),
            "shapes": plain(dict(self.shapes)),
            "threads": self.job.threads,
            "precision": None if options.is_saved(self.job.model) else self.job.precision,
            "best_ratio": plain(self.best_ratio),
            "engines": [_engine_dict(engine, self) for engine in self.bench.engines],
            "reference": self.bench.reference,
            "tolerance": plain(self.bench.tolerance),
            "n_rounds": self.bench.n_rounds,
            "seconds": self.bench.seconds,
            "noise": plain(self.bench.noise),
            "limit": plain(self.total),
            "notes": list(self.notes),
            "machine": plain(machine_facts(host())),
        }


def gather_inputs(job: Job, inputs: Sequence[str], seed: int) -> tuple[dict[str, np.ndarray], Job]:
    """Arrays for the inputs of a model or a saved engine, and the job with all shapes fixed to theirs."""
    from dataclasses import replace

    from vivace.cli.contestants import demands_of, input_specs, learnt_inputs, open_engine

    specs = input_specs(job)
    learnt = (specs, demands_of(open_engine("native", job))) if options.is_saved(job.model) else learnt_inputs(job)
    arrays, sizes = options.gather(specs, job.shapes, inputs, seed, learnt)
    return arrays, replace(job, shapes={name: tuple(a.shape) for name, a in arrays.items()}, sizes=sizes)


def measure(job: Job, arrays: dict[str, np.ndarray], wanted: Wanted, progress: Any = None) -> Report:
    """Everything that `vivace bench` shows; a saved engine is measured alone, without a reference and a limit."""
    from dataclasses import replace

    from vivace.cli.compile import describe_choice
    from vivace.cli.contestants import contestant, open_engine
    from vivace.measure.bench import bench

    notes: list[str] = []
    is_saved = options.is_saved(job.model)
    exact = replace(job, precision="f32", level=99)
    reference = None if is_saved else open_engine("onnxruntime", exact).run(arrays)
    found = bench(
        [*(contestant(name, job, progress) for name in wanted.providers), *wanted.more],
        arrays,
        wanted.settings,
        reference=reference,
        reference_name="" if is_saved else "onnxruntime f32",
        tolerance=wanted.tolerance,
        progress=progress,
    )
    if wanted.providers[0] == "auto" and not found.engines[0].failure:
        engine: Any = open_engine("auto", job)
        notes.append(describe_choice(engine.stats, getattr(engine, "parts", ())))
    total, peaks = _limit(job, notes, progress) if wanted.limit and not is_saved else (None, None)
    able = [name for name, engine in zip(wanted.providers, found.engines, strict=False) if not engine.failure]
    cold = _cold_starts(job, arrays, able, notes, progress) if wanted.memory else {}
    shapes = {name: array.shape for name, array in arrays.items()}
    return Report(job, shapes, found, cold, total, peaks, tuple(notes))


def _limit(job: Job, notes: list[str], progress: Any) -> tuple[Total | None, Peaks | None]:
    from vivace.measure.peaks import machine_peaks
    from vivace.measure.roofline import total

    try:
        from vivace.compilation import load_graph
        from vivace.optimize.pipeline import optimize

        graph = optimize(load_graph(job.model, job.shapes))
        peaks = machine_peaks(progress=progress)
        return total(graph, job.sizes, peaks, job.threads, job.precision), peaks
    except (VivaceError, ImportError) as error:
        notes.append(f"no limit: {error}")
        return None, None


def _cold_starts(
    job: Job, arrays: Any, providers: Sequence[str], notes: list[str], progress: Any
) -> dict[str, ColdStart]:
    from vivace.cli.child import cold_command
    from vivace.cli.contestants import label_of
    from vivace.measure.memory import cold_start

    found = {}
    with tempfile.TemporaryDirectory(prefix="vivace-") as folder:
        for i, name in enumerate(providers):
            if progress:
                progress(f"cold start of {label_of(name)}", i, len(providers))
            try:
                found[label_of(name)] = cold_start(cold_command(Path(folder), name, job, arrays))
            except VivaceError as error:
                notes.append(f"no cold start of {label_of(name)}: {error}")
    return found


def _engine_dict(engine: EngineTimes, report: Report) -> dict[str, Any]:
    from vivace.cli.console import plain

    cold = report.cold.get(engine.name)
    return {
        "name": engine.name,
        "version": engine.version,
        "failure": engine.failure or None,
        "median": plain(engine.median),
        "least": plain(engine.least),
        "percentiles": {f"p{fraction * 100:g}": plain(estimate) for fraction, estimate in engine.percentiles},
        "n_samples": int(engine.calls.size),
        "variation": plain(engine.variation),
        "ours_over_this": plain(engine.ratio),
        "load_seconds": plain(engine.load_seconds),
        "first_run_seconds": plain(engine.first_run_seconds),
        "agrees": engine.agrees,
        "differences": plain(engine.differences),
        "cold_start": plain(cold),
        "share_of_limit": plain(report.total.share(engine.median)) if report.total and not engine.failure else None,
    }


def print_report(report: Report) -> None:
    """The table for people."""
    from vivace.cli.console import amount, duration, print_table, shapes_text, size

    shapes = shapes_text(report.shapes)
    precision = "" if options.is_saved(report.job.model) else f", {report.job.precision}"
    title = f"{report.job.model.name}  {shapes}  {report.job.threads} thread(s){precision}"
    columns = [
        "engine",
        "median",
        "least",
        "p90",
        "p99",
        "ours / this",
        "of limit",
        "load",
        "first run",
        "memory",
        "answer",
    ]
    print_table(title, columns, [_row(engine, report) for engine in report.bench.engines])
    for engine in report.bench.engines:
        if engine.failure:
            print(f"{engine.name} failed: {engine.failure}")
    if report.total is not None and report.peaks is not None:
        limit_s = duration(report.total.seconds)
        weights = size(report.total.weight_bytes)
        print(f"limit    {limit_s} for {amount(report.total.flops)}FLOP and {weights} of weights at the measured peaks"
              f" ({amount(report.peaks.operations(report.total.dtype, report.job.threads))}FLOP/s)")  # fmt: skip
    noise, bench = report.bench.noise, report.bench
    quiet = "quiet" if noise.is_quiet else "NOT QUIET"
    print(f"measured {bench.n_rounds} rounds in {duration(bench.seconds)}; machine {quiet}: others used "
          f"{noise.foreign_cores:.2f} cores, {noise.steal:.1%} stolen, load {noise.load_average:.2f}")  # fmt: skip
    if bench.reference:
        print(f"checked  against {bench.reference}: {bench.tolerance}")
    print("'-' is a figure that was not measured, or that so small a sample cannot give")
    for note in report.notes:
        print(f"note     {note}")


def _row(engine: EngineTimes, report: Report) -> list[str]:
    from vivace.cli.console import duration, size

    if engine.failure:
        return [f"{engine.name} {engine.version}", *["-"] * 9, "failed"]
    cold = report.cold.get(engine.name)
    tails = dict(engine.percentiles)
    ratio = "" if engine.ratio is None else _interval(engine.ratio.value, engine.ratio.low, engine.ratio.high)
    errors = max((d.max_absolute for d in engine.differences), default=0.0)
    return [
        f"{engine.name} {engine.version}",
        duration(engine.median),
        duration(engine.least),
        *(duration(tails[f].value) if tails[f].high is not None else "-" for f in (0.9, 0.99)),
        ratio,
        f"{report.total.share(engine.median):.0%}" if report.total else "-",
        duration(cold.load_seconds if cold else engine.load_seconds),
        duration(cold.first_run_seconds if cold else engine.first_run_seconds),
        size(cold.peak_bytes) if cold else "-",
        "-" if engine.agrees is None else f"{'equal' if engine.agrees else 'DIFFERS'} ({errors:.0e})",
    ]


def _interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _kernel_table(provider: str, job: Job, arrays: Any, report: Report) -> Any:
    from vivace.cli.contestants import open_engine
    from vivace.cli.kernels import KernelTable
    from vivace.measure.peaks import machine_peaks

    engine = open_engine(provider, job)
    if not hasattr(engine, "profile"):
        raise InputError("only our own engine shows its kernels", where="--layers", expected="--provider native")
    dtype = report.total.dtype if report.total else job.precision
    return KernelTable.of(engine, arrays, report.peaks or machine_peaks(), job.threads, dtype)


def _judge(report: Report, max_ratio: float) -> None:
    ours = report.bench.engines[0]
    if ours.failure:
        raise GateError(f"our engine could not run the model: {ours.failure}", where=str(report.job.model))
    if ours.agrees is False:
        bad = ", ".join(d.name for d in ours.differences if not d.agrees)
        raise GateError("our outputs differ from onnxruntime's", where=bad, expected=str(report.bench.tolerance))
    if report.best_ratio > max_ratio:
        raise GateError(
            f"our median is {report.best_ratio:.3f} of the best other one",
            where=str(report.job.model),
            expected=f"at most {max_ratio:g}",
        )
