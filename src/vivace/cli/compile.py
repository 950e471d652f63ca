"""`vivace compile`: a model becomes a saved engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from vivace.cli import options


def tuned(facts: Any) -> str:
    """What tuning did, in a sentence."""
    is_cut = not facts.get("is_complete", True)
    is_known = not facts["n_measured"] and not is_cut
    done = "took all from the cache" if is_known else f"measured {facts['n_measured']} ways"
    cut = ", as far as the budget went" if is_cut else ""
    return f"{done}{cut}: {facts['n_changed']} of {facts['n_sites']} kernels are made otherwise than by default"


def chosen_formats(stats: Any) -> str:
    """What choosing formats by layer came to, and on which inputs."""
    layers = stats["layers"]
    n_narrow = sum(layer["format"] != "f32" for layer in layers)
    return (
        f"{n_narrow} of {len(layers)} layers are narrow; {stats['metric']} error {stats['error']:.2g} of the"
        f" {stats['max_drop']:.2g} allowed, measured on {stats['measured_on']}"
    )


def describe_choice(stats: Any, parts: Any) -> str:
    """What `providers="auto"` chose, by which times, and who was refused why."""
    times = sorted(stats["auto_ms"].items(), key=lambda item: item[1])
    measured = ", ".join(f"{name} {ms:.3g} ms" for name, ms in times)
    refused = "".join(f"; {name} refused: {why}" for name, why in stats["auto_refused"].items())
    order = f" ({', '.join(part.provider for part in parts)})" if len(parts) > 1 else ""
    return f"auto chose {stats['auto_choice']}{order}: {measured}{refused}"


def compile_model(
    model: options.Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The engine file. [default: MODEL.vivace]", show_default=False)
    ] = None,
    shapes: options.Shapes = [],
    threads: options.Threads = 0,
    precision: options.Precision = "f32",
    max_drop: options.MaxDrop = None,
    metric: options.Metric = "relative",
    calibration: options.Calibration = [],
    provider: options.Provider = "native,onnxruntime",
    target: options.Target = "host",
    tune: options.Tune = "off",
    tune_budget: options.TuneBudget = 0.0,
    timing_cache: options.TimingCache = None,
    level: options.Level = "all",
    disable: options.Disable = [],
    cache: Annotated[bool, typer.Option(help="Use the cache of compiled kernels.")] = True,
    as_json: options.Json = False,
) -> None:
    """Compiles a model and saves the engine.

    Example: vivace compile model.onnx -o model.vivace --shapes x:1x3x224x224
    """
    import vivace
    from vivace.cli.console import print_json, progress

    options.check_model(model)
    path = output or model.with_suffix(".vivace")
    options.check_output(path, model)
    options.check_timings(timing_cache)
    start = time.perf_counter()
    with progress() as show:
        engine = vivace.compile(
            model,
            precision=precision,
            threads=options.threads_of(threads),
            providers=provider if provider == "auto" else options.split(provider),
            target=target,
            tune=tune,
            tune_budget=tune_budget or None,
            timing_cache=timing_cache,
            cache=cache,
            shapes=options.shapes_of(shapes) or None,
            level=options.level_of(level),
            disable=options.split(*disable),
            progress=show,
            calibration=options.read_samples(calibration),
            max_drop=max_drop,
            metric=metric,
        )
        engine.save(path)
    seconds = time.perf_counter() - start
    facts = {
        "engine": str(path),
        "file_bytes": path.stat().st_size,
        "seconds": seconds,
        "inputs": list(map(str, engine.inputs)),
        "outputs": list(map(str, engine.outputs)),
        "stats": {name: value for name, value in engine.stats.items() if isinstance(value, (int, float, str, bool))},
        "tuning": engine.stats.get("tuning"),
        "auto_ms": engine.stats.get("auto_ms"),
        "conversions": engine.conversions,
        "layers": engine.stats.get("layers"),
    }
    if as_json:
        print_json(facts)
        return
    _print(engine, path, seconds)


def _print(engine: Any, path: Path, seconds: float) -> None:
    """The lines for people."""
    from vivace.cli.console import duration, size

    n_foreign = sum(place.provider != "native" for place in engine.placement)
    print(f"{path}: {size(path.stat().st_size)}, compiled in {duration(seconds)}")
    print(f"  inputs   {', '.join(map(str, engine.inputs))}")
    print(f"  outputs  {', '.join(map(str, engine.outputs))}")
    print(f"  nodes    {len(engine.placement) - n_foreign} native, {n_foreign} in other engines")
    if "auto_choice" in engine.stats:
        print(f"  provider {describe_choice(engine.stats, getattr(engine, 'parts', ()))}")
    left = engine.conversions
    cost = f", {sum(float(str(c['cost_us'])) for c in left):.0f} us on one core" if left else ""
    print(f"  conversions of layout and format that are steps of their own: {len(left)}{cost}")
    if "tuning" in engine.stats:
        print(f"  tuning   {tuned(engine.stats['tuning'])}")
    if "layers" in engine.stats:
        print(f"  formats  {chosen_formats(engine.stats)}")
    for place in engine.placement:
        if place.provider != "native":
            print(f"           {place.node} ({place.op}): {place.provider}, because {place.reason}")
