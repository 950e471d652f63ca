"""The one tree of errors.

Every error says what went wrong, where (the ONNX node, file or argument), what was expected, and what to try.
The command line maps an error to its exit code: 1 a gate failed, 2 bad input, 3 internal error.
"""

from __future__ import annotations


class VivaceError(Exception):
    """Root of every error that vivace raises on purpose.

    `where` names the ONNX node, file, argument or kernel; `expected` and `hint` complete the sentence for a person.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", expected: str = "", hint: str = "") -> None:
        self.what, self.where, self.expected, self.hint = what, where, expected, hint
        parts = [f"{where}: {what}" if where else what]
        if expected:
            parts.append(f"Expected {expected}.")
        if hint:
            parts.append(f"Try: {hint}.")
        super().__init__(" ".join(p if p.endswith((".", "!", "?")) else p + "." for p in parts))


class ModelError(VivaceError):
    """The model file is damaged, inconsistent, or unsafe to read."""


class BranchError(ModelError):
    """A nested graph contradicts the sizes around it; whether it ever runs, the file does not say."""


class UnsupportedError(VivaceError):
    """The model is valid, but needs something that the chosen providers cannot do."""


class UnknownSizeError(UnsupportedError):
    """A size only shows when the model runs, so that memory cannot be planned before."""


class InputError(VivaceError):
    """A value passed by the caller has the wrong name, dtype, rank, shape or range."""


class ShapeError(InputError):
    """The shape of an array does not fit what the model says of it."""


class EngineError(VivaceError):
    """A saved engine or cache entry is damaged, from another format, or made for another machine."""


class ProviderError(VivaceError):
    """Another engine (ONNX Runtime, OpenVINO) is missing or refused the model."""


class GateError(VivaceError):
    """A check that the user asked for did not hold: accuracy, speed or size."""

    exit_code = 1


class InternalError(VivaceError):
    """A promise inside vivace was broken; please report it with the saved graph."""

    exit_code = 3


class GraphError(InternalError):
    """A graph breaks a rule of the notation; raised by the verifier, with the lines around the fault."""
