"""`vivace opt`: for developers of the optimizer: chosen passes, with the graph printed between them and their times."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from vivace.base.errors import InputError
from vivace.cli import options


def run_passes(
    model: options.Model,
    passes: Annotated[
        str, typer.Option("--passes", "-p", metavar="PASS,...", help="Passes in order; all where none is named.")
    ] = "",
    shapes: options.Shapes = [],
    disable: options.Disable = [],
    explain: Annotated[str, typer.Option(metavar="RULE,...", help="Say why these rules did not fire.")] = "",
    print_between: Annotated[bool, typer.Option("--print-between", help="Print the graph after each pass.")] = False,
    time: Annotated[bool, typer.Option("--time", help="Print how long each pass took and what it did.")] = False,
    as_json: options.Json = False,
) -> None:
    """Runs chosen passes of the optimizer and prints the graph.

    Example: vivace opt model.onnx -p simplify,fuse --time
    """
    from vivace.cli.console import duration, print_json
    from vivace.graph.passes import Run, run_passes
    from vivace.graph.text import print_graph
    from vivace.onnx.importer import import_model
    from vivace.optimize.pipeline import PIPELINE

    known = {item.name: item for item in PIPELINE}
    unknown = [name for name in options.split(passes) if name not in known]
    if unknown:
        raise InputError(f"unknown pass {unknown[0]!r}", where="--passes", expected=f"some of {', '.join(known)}")
    options.check_model(model)
    chosen = [known[name] for name in options.split(passes)] or list(PIPELINE)
    graph = import_model(model, overrides=options.shapes_of(shapes) or None)
    disabled = frozenset(options.split(*disable))
    done = []
    for item in chosen:
        record = Run()
        # A pass that was chosen by hand runs on whatever is there; what it requires is the developer's concern.
        alone = replace(item, requires=frozenset())
        graph = run_passes(graph, [alone], disabled=disabled, explain=options.split(explain), record=record)
        if as_json:
            done.append({
                "pass": item.name, "seconds": record.seconds, "n_nodes": len(graph.nodes), "fired": dict(record.fired),
                "notes": list(map(str, record.notes)), **({"graph": print_graph(graph)} if print_between else {}),
            })  # fmt: skip
            continue
        if time:
            fired = ", ".join(f"{n} {rule}" for rule, n in record.fired.most_common())
            print(f"# {item.name}: {duration(record.seconds)}, {len(graph.nodes)} nodes{'; ' + fired if fired else ''}")
        for note in record.notes:
            print(f"# {note}")
        if print_between:
            print(f"# after {item.name}\n{print_graph(graph)}\n")
    if as_json:
        print_json({"passes": done, "graph": print_graph(graph)})
    elif not print_between:
        print(print_graph(graph))
