"""`vivace optimize`: a model becomes a smaller model that any runtime can run."""

from __future__ import annotations

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
    disable: options.Disable = "",
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
    with progress() as show:
        report = optimize_model(
            model,
            output,
            level=options.level_of(level),
            disable=options.split(disable),
            dry_run=dry_run,
            explain=options.split(explain),
            progress=show,
        )
    if as_json:
        print_json(report_dict(report))
    else:
        print_optimization(report)
        print(f"wrote {output}" if not dry_run else "wrote nothing (--dry-run)")


def report_dict(report: Report) -> dict[str, Any]:
    """The report as JSON holds it."""
    return {
        "nodes_before": report.ops_before.total(),
        "nodes_after": report.ops_after.total(),
        "ops_before": dict(report.ops_before),
        "ops_after": dict(report.ops_after),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "fired": dict(report.fired),
        "seconds": report.seconds,
        "notes": list(report.notes),
    }


def print_optimization(report: Report) -> None:
    """Operators before and after, what each rule did, and the memory traffic."""
    from vivace.cli.console import duration, print_table, size

    names = sorted({*report.ops_before, *report.ops_after}, key=lambda op: (-report.ops_before[op], op))
    rows = [[op, str(report.ops_before[op] or ""), str(report.ops_after[op] or "")] for op in names]
    total = ["all", str(report.ops_before.total()), str(report.ops_after.total())]
    print_table("nodes", ["op", "before", "after"], [*rows, total])
    print_table("rules", ["rule", "times"], [[rule, str(n)] for rule, n in report.fired.most_common()])
    print(f"memory traffic {size(report.bytes_before)} -> {size(report.bytes_after)}; {duration(report.seconds)}")
    for note in report.notes:
        print(note)
