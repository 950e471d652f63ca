"""`vivace timings`: what timing caches hold, and several of them as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vivace.base.errors import InputError
from vivace.cli import options


def show_timings(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Timing caches. [default: this machine's own]", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write all of them as one file.", show_default=False)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Shows what tuning measured and chose, by machine; merges timing caches.

    Example: vivace timings laptop.jsonl server.jsonl -o both.jsonl
    """
    from vivace.base.machine import host
    from vivace.cli.console import print_json, print_table
    from vivace.lower.timings import merge, own_file, read, summary, write

    options.check_output(output)
    given = files or [own_file()]
    for path in files or []:
        if not path.is_file():
            raise InputError("no such file", where=str(path), expected="a timing cache")
        options.check_timings(path)
    timings = merge(t for path in given for t in read(path))
    found = summary(timings)
    if output is not None:
        write(output, timings)
    if as_json:
        rows = [{"machine": m, "isa": isa, "threads": n, **counts} for (m, isa, n), counts in found.items()]
        print_json({"files": list(map(str, given)), "output": None if output is None else str(output), "timings": rows})
        return
    if not found:
        print(f"nothing was measured yet in {', '.join(map(str, given))}: vivace compile --tune fast measures")
        return
    here = host().fingerprint()
    lines = [
        [f"{m}{' (this one)' if m == here else ''}", isa, str(n), *map(str, counts.values())]
        for (m, isa, n), counts in found.items()
    ]
    print_table("", ["machine", "instruction set", "threads", "ways measured", "sites decided", "changed"], lines, 2)
