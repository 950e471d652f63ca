"""The command line: one file per verb. Importing this package imports nothing heavy."""

from __future__ import annotations


def main() -> None:
    """The entry point of the `vivace` command."""
    import sys

    from vivace.cli.app import run

    sys.exit(run(sys.argv[1:]))
