"""`vivace optimize`: a model becomes a smaller model that any runtime can run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vivace.base.errors import InputError
from vivace.cli import options

if TYPE_CHECKING:
    from vivace.optimize.report import Report


def optimize(
    model: options.Model,
    output: Annotated[Path | None, typer.Argument(help="The file to write.", show_default=False)] = None,
    level: options.Level = "extended",
    disable: options.Disable = [],
    opset: Annotated[int, typer.Option(help="Opset of the file; 0 is the model's, at least 20.")] = 0,
    shapes: options.Shapes = [],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")] = False,
    explain: Annotated[str, typer.Option(metavar="RULE,...", help="Say why these rules did not fire.")] = "",
    as_json: options.Json = False,
) -> None:
    """Writes a portable ONNX file with fewer nodes, after checking it against the original on random inputs.

    Example: vivace optimize model.onnx smaller.onnx --explain fuse_attention
    """
    from vivace.cli.console import print_json, progress
    from vivace.optimizer import optimize_model

    if output is None and not dry_run:
        raise InputError("no file to write is named", where="OUTPUT", expected="a path", hint="--dry-run to only look")
    options.check_model(model)
    options.check_output(output)
    with progress() as show:
        if show:
            show(f"optimizing {model.name}", 0, 1)
        report = optimize_model(
            model,
            output,
            level=options.level_of(level),
            disable=options.split(*disable),
            explain=options.split(explain),
            opset=opset or None,
            sizes=_sizes(model, shapes) if shapes else None,
            dry_run=dry_run,
        )
    if as_json:
        print_json(report_dict(report))
    else:
        print_optimization(report)
        print(f"wrote {output}" if not dry_run else "wrote nothing (--dry-run)")


def _sizes(model: Path, shapes: Sequence[str]) -> dict[str, int]:
    """Sizes of symbols, for the check on random inputs."""
    from vivace.base.specs import TensorSpec
    from vivace.measure.inputs import bind
    from vivace.onnx.importer import import_model

    inputs = import_model(model).inputs
    return bind([TensorSpec(v.name, v.dtype, v.shape) for v in inputs], options.shapes_of(shapes))


def report_dict(report: Report) -> dict[str, Any]:
    """The report as JSON holds it."""
    return {
        "nodes_before": report.operators_before.total(),
        "nodes_after": report.operators_after.total(),
        "operators_before": dict(report.operators_before),
        "operators_after": dict(report.operators_after),
        "largest_error": report.largest_error,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "fired": dict(report.fired),
        "seconds": report.seconds,
        "notes": list(report.notes),
    }


def print_optimization(report: Report) -> None:
    """Operators before and after, what each rule did, and the memory traffic."""
    from vivace.cli.console import duration, print_table, size

    before, after = report.operators_before, report.operators_after
    rows = [
        [op, str(before[op] or ""), str(after[op] or "")]
        for op in sorted({*before, *after}, key=lambda op: (-before[op], op))
    ]
    print_table("nodes", ["operator", "before", "after"], [*rows, ["all", str(before.total()), str(after.total())]])
    if report.fired:
        print_table("rules", ["rule", "times"], [[rule, str(n)] for rule, n in report.fired.most_common()])
    print(f"memory traffic {size(report.bytes_before)} -> {size(report.bytes_after)}, in {duration(report.seconds)}")
    if report.largest_error is not None:
        print(f"checked on random inputs: largest difference {report.largest_error:.1e}")
    for note in report.notes:
        print(note)
    for rule in report.explain:
        if not any(note.split()[0] == rule for note in report.notes):
            print(f"{rule} fired {report.fired[rule]} times and nearly fired nowhere")
