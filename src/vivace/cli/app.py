"""The verbs put together, and what happens when one fails.

Rules:
* CODES: 0 done; 1 a gate that the user asked for did not hold; 2 bad input; 3 a fault of ours; 130 interrupted; 141 the
  reader of the output went away.
* PARAGRAPH: an error is one paragraph on standard error. Where `--json` was given it is JSON on standard output too,
  unless the verb has printed its document already and a gate failed after it. The traceback is shown only with the
  knob `traceback`.
* LIGHT: a verb imports what it needs when it runs, so that `vivace --help` starts at once.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from vivace.base.errors import VivaceError
from vivace.cli import bench, compile, console, demo, inspect, opt, optimize, reduce, run_model, system, timings

# Typer has Click inside or beside it, depending on its version; this is the root of its complaints in both.
_ClickException = typer.BadParameter.__mro__[2]

INTERRUPTED, READER_GONE = 130, 141
_TO_TRY = {
    errno.ENOSPC: "freeing space, or another folder",
    errno.ENOENT: "another spelling of the path",
    errno.EACCES: "another folder, or changing its permissions",
}

app = typer.Typer(
    name="vivace",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compile")(compile.compile_model)
app.command("run")(run_model.run_model)
app.command("bench")(bench.bench_model)
app.command("inspect")(inspect.inspect_model)
app.command("optimize")(optimize.optimize)
app.command("sys")(system.show_system)
app.command("demo")(demo.show_demo)
app.command("opt")(opt.run_passes)
app.command("reduce")(reduce.reduce_model)
app.command("timings")(timings.show_timings)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from vivace import __version__

        print(f"vivace {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compiles ONNX models to native code, runs them, and shows how near to the machine's limit they are.

    Example: vivace bench model.onnx --against onnxruntime,openvino
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit code (CODES, PARAGRAPH)."""
    n_before = console.n_documents
    try:
        with console.notices():
            code = app(list(arguments), standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # Typer's way of handing on Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (BrokenPipeError, SystemExit):  # nothing but Typer's own answer to a broken pipe exits here
        # What is left in the buffer must not be written when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        _show_traceback(error)
        kind, text, code = describe(error)
        _report(kind, text, code, "--json" in arguments and console.n_documents == n_before)
        return code


def describe(error: Exception) -> tuple[str, str, int]:
    """Kind, one paragraph and exit code of an error."""
    if isinstance(error, VivaceError):
        return type(error).__name__, str(error), error.exit_code
    if isinstance(error, _ClickException):
        text = str(error.format_message())  # type: ignore[attr-defined]
        verb = getattr(getattr(error, "ctx", None), "info_name", None)
        is_known = verb in {command.name for command in app.registered_commands}
        return "UsageError", f"{text.rstrip('.')}. Try: vivace {f'{verb} ' if is_known else ''}--help.", 2
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        hint = _TO_TRY.get(error.errno or 0, "another file or folder")
        return "InputError", f"{where}{error.strerror or error}. Try: {hint}.", 2
    if isinstance(error, MemoryError):
        return "InputError", f"not enough memory: {str(error) or 'an allocation failed'}.", 2
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return "InternalError", f"a fault inside vivace: {text}. Try: VIVACE_TRACEBACK=1, and report what it shows.", 3


def _report(kind: str, text: str, code: int, as_json: bool) -> None:
    paragraph = " ".join(text.split())
    print(f"error: {paragraph}", file=sys.stderr)
    if as_json:
        print(json.dumps({"schema_version": 1, "error": {"kind": kind, "message": paragraph, "exit_code": code}}))


def _show_traceback(error: Exception) -> None:
    from vivace.base.knobs import knobs

    try:
        is_wanted = knobs.traceback
    except VivaceError:
        return  # the environment itself is wrong, which is what will be reported
    if is_wanted:
        import traceback

        traceback.print_exception(error)
