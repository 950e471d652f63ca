"""The surface of the command line: its verbs, help, exit codes and errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vivace import __version__
from vivace.base.errors import GateError, InternalError, ModelError
from vivace.base.events import warn
from vivace.cli import app
from vivace.cli.app import describe

VERBS = ["compile", "run", "bench", "inspect", "optimize", "sys", "demo", "opt", "reduce", "timings"]


def test_verbs_are_these() -> None:
    assert [command.name for command in app.app.registered_commands] == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(cli, verb: str) -> None:  # type: ignore[no-untyped-def]
    result = cli(verb, "--help")
    assert result.code == 0
    assert f"Example: vivace {verb}" in " ".join(result.out.split())


def test_no_verb_shows_the_help(cli) -> None:  # type: ignore[no-untyped-def]
    result = cli()
    assert (result.code, result.err) == (0, "")
    assert result.out == cli("--help").out and "Example: vivace" in result.out


def test_version(cli) -> None:  # type: ignore[no-untyped-def]
    result = cli("--version")
    assert (result.code, result.out) == (0, f"vivace {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["run"],
        ["run", "nowhere.onnx"],
        ["run", "nowhere.onnx", "--speed", "9"],
        ["inspect", "nowhere.onnx"],
        ["compile", "nowhere.onnx"],
        ["bench", "nowhere.onnx"],
        ["bench", "nowhere.vivace"],
        ["run", "nowhere.onnx", "--seed", "-1"],
        ["bench", "nowhere.onnx", "--budget", "-1"],
        ["compile", "."],
        ["reduce", "."],
        ["sys", "--threads", "-1"],
        ["bench", "nowhere.onnx", "--threads", "5000"],
        ["demo", "--image", "nowhere.png"],
        ["run", "nowhere.onnx", "--level", "quick"],
        ["run", "nowhere.onnx", "--shapes", "x=3"],
        ["opt", "nowhere.onnx", "-p", "fly"],
        ["optimize", "nowhere.onnx"],
        ["optimize", "nowhere.onnx", "no/folder/out.onnx"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_bad_input_is_one_paragraph(cli, arguments: list[str]) -> None:  # type: ignore[no-untyped-def]
    result = cli(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err


def test_error_as_json(cli) -> None:  # type: ignore[no-untyped-def]
    result = cli("inspect", "nowhere.onnx", "--json")
    error = json.loads(result.out)["error"]
    assert (error["kind"], error["exit_code"]) == ("InputError", 2)
    assert "nowhere.onnx" in error["message"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelError("is broken", where="m.onnx"), 2),
        (GateError("too slow"), 1),
        (InternalError("a promise was broken"), 3),
        (ZeroDivisionError("division by zero"), 3),
        (MemoryError(), 2),
        (OSError(28, "No space left on device", "out.onnx"), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(error: Exception, code: int) -> None:
    kind, text, found = describe(error)
    assert found == code
    assert kind and text and "\n" not in text
    if isinstance(error, OSError):
        assert text == "out.onnx: No space left on device. Try: freeing space, or another folder."


@pytest.mark.parametrize(
    ("arguments", "page"),
    [(["run"], "vivace run"), (["run", "m", "--fly"], "vivace run"), (["fly"], "vivace")],
    ids=["argument", "option", "verb"],
)
def test_usage_errors_name_the_page_that_helps(cli, arguments: list[str], page: str) -> None:  # type: ignore[no-untyped-def]
    assert f"Try: {page} --help." in cli(*arguments).err


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interrupt_while_modules_load() -> None:
    script = (
        "import os, signal, sys, vivace.cli\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "vivace.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (app.INTERRUPTED, "interrupted\n")


def test_faults_show_no_traceback_unless_wanted(cli, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def fail(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("vivace.base.machine.host", fail)
    result = cli("sys")
    assert result.code == 3
    assert "ZeroDivisionError" in result.err and "Traceback" not in result.err
    monkeypatch.setenv("VIVACE_TRACEBACK", "1")
    assert "Traceback" in cli("sys").err


def test_unknown_knob_is_an_error(cli, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("VIVACE_TURBO", "1")
    result = cli("run", "nowhere.onnx", "--threads", "0")
    assert result.code == 2
    assert "VIVACE_TURBO" in result.err


def _spawn(*arguments: str, **more: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vivace", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)  # type: ignore[call-overload]


def test_reader_that_goes_away_is_no_error(model: Path) -> None:
    process = _spawn("inspect", str(model), "--layers")
    assert process.stdout is not None
    process.stdout.close()
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == app.READER_GONE
    assert complaint == b""


def test_interrupt(model: Path) -> None:
    script = (
        "import os, signal, sys, vivace.cli.app as app, vivace.base.machine as machine\n"
        "machine.host = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(app.run(['sys']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "interrupted\n"


@pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX")
def test_a_closed_output_is_no_fault() -> None:
    process = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "from vivace.cli import main; main()" timings >&-', sys.executable],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (0, "")


def test_a_notice_is_told_once(cli, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def machine() -> None:
        warn("machine", "is odd")
        warn("machine", "is odd")
        raise ModelError("none")

    monkeypatch.setattr("vivace.base.machine.host", machine)
    assert cli("sys").err == "notice: machine: is odd\nerror: none.\n"
    assert cli("sys").err.startswith("notice: machine: is odd\n")


def test_no_escape_codes_in_pipes(model: Path) -> None:
    process = _spawn("inspect", str(model), env={**os.environ, "FORCE_COLOR": ""})
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"\x1b" not in out


def test_starting_is_light() -> None:
    script = (
        "import sys, vivace.cli.app\n"
        "print(*[m for m in ('numpy', 'onnx', 'onnxruntime', 'openvino', 'llvmlite', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
