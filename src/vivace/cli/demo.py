"""`vivace demo`: three real networks read the text in a picture on our engine, and are timed against other engines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vivace.base.errors import VivaceError
from vivace.base.events import warn
from vivace.cli import options

if TYPE_CHECKING:
    import numpy as np

    from vivace.cli.reading import Network, Reader


def show_demo(
    image: Annotated[
        Path | None, typer.Option(help="A picture to read. [default: a drawn page]", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture with boxes around the lines.")] = Path(
        "vivace-demo.png"
    ),
    models: Annotated[
        Path | None, typer.Option(help="A folder with the models. [default: the cache]", show_default=False)
    ] = None,
    provider: options.Provider = "native,onnxruntime",
    against: Annotated[
        str, typer.Option(help="Engines to compare with. [default: all installed]", show_default=False)
    ] = "",
    threads: options.Threads = 0,
    budget: Annotated[float, typer.Option(min=0, help="Seconds of measuring per model; 0 measures nothing.")] = 4.0,
    as_json: options.Json = False,
) -> None:
    """Reads the text in a picture (find lines, turn them, recognise them), then times the three networks.

    Example: vivace demo --image page.png
    """
    from vivace.cli.console import duration, plain, print_json, progress
    from vivace.cli.contestants import Job
    from vivace.cli.demo_models import find_models
    from vivace.cli.page import draw_page, read_picture, write_picture

    options.check_output(output)
    picture = read_picture(image) if image is not None else draw_page()
    with progress() as show:
        if show:
            show("fetching models", 0, 1)
        paths = find_models(models)
        jobs = {role: Job(path, options.threads_of(threads)) for role, path in paths.items()}
        start = time.perf_counter()
        reader, seen = open_reader(provider, jobs, show)
        ready = time.perf_counter()
        lines = reader.read(picture)
        done = time.perf_counter()
    write_picture(output, picture, [line.corners for line in lines])
    if not as_json:
        for line in lines:
            print(f"{line.confidence:4.0%}  {line.text}{'   (turned)' if line.is_turned else ''}")
        print(f"\n{len(lines)} lines in {duration(done - ready)} with {provider}, engines ready after "
              f"{duration(ready - start)}; boxes drawn in {output}")  # fmt: skip
    reports = _measure(jobs, seen, provider, against, budget, quiet=as_json)
    if as_json:
        print_json(
            {
                "lines": plain(lines),
                "read_seconds": done - ready,
                "ready_seconds": ready - start,
                "picture": str(output),
                "bench": {role: report.to_dict() for role, report in reports.items()},
            }
        )


def open_reader(
    provider: str, jobs: Mapping[str, Any], progress: Any = None
) -> tuple[Reader, dict[str, dict[str, np.ndarray]]]:
    """The reader on an engine, and a dict that keeps the last inputs of each network."""
    from vivace.cli.contestants import open_engine
    from vivace.cli.reading import Reader

    seen: dict[str, dict[str, np.ndarray]] = {}

    def network(role: str) -> Network:
        engine = open_engine(provider, jobs[role], progress)
        name = engine.inputs[0].name

        def run(array: np.ndarray) -> np.ndarray:
            seen[role] = {name: array}
            return next(iter(engine.run(seen[role]).values()))

        return run

    characters = _characters(jobs["recogniser"].model)
    return Reader(network("detector"), network("classifier"), network("recogniser"), characters), seen


def _characters(model: Path) -> list[str]:
    """The recogniser's alphabet, which its file carries as metadata; its last class is the space."""
    from vivace.onnx.reader import read

    metadata = {entry.key: entry.value for entry in read(model).proto.metadata_props}
    return [*metadata["character"].splitlines(), " "]


def _measure(
    jobs: Mapping[str, Any], seen: Mapping[str, Any], provider: str, against: str, budget: float, quiet: bool
) -> dict[str, Any]:
    from vivace.cli.bench import Wanted, measure, print_report
    from vivace.cli.console import progress
    from vivace.measure.bench import Settings
    from vivace.measure.compare import Tolerance
    from vivace.providers.provider import KNOWN, availability

    reports: dict[str, Any] = {}
    if budget <= 0:
        return reports
    others = options.split(against) or [name for name in KNOWN if availability(name).is_available]
    wanted = Wanted(
        (provider, *(o for o in others if o != provider)), Settings(budget_seconds=budget), Tolerance(), memory=False
    )
    for role, arrays in seen.items():
        fixed = replace(jobs[role], shapes={name: array.shape for name, array in arrays.items()})
        try:
            with progress() as show:
                reports[role] = measure(fixed, arrays, wanted, show)
        except VivaceError as error:
            warn(role, f"cannot be measured: {error}")
            continue
        if not quiet:
            print()
            print_report(reports[role])
    return reports
