"""The command line: one file per verb. Importing this package imports nothing heavy."""

from __future__ import annotations


def main() -> None:
    """The entry point of the `vivace` command."""
    import os
    import sys

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # a shell closed it
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    try:
        from vivace.cli.app import run

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # while modules load, or while an error is being told
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # app.INTERRUPTED
