"""Other engines behind one small interface, and how to find the installed ones.

    session = find("onnxruntime").load("model.onnx", threads=2)
    outputs = session.run({"x": x})

Rules:
* FAIR: a provider gets the settings that its makers recommend for latency with the given threads, and returns arrays
  that belong to the caller, as our own engine does.
* LAZY: a provider's package is imported when a model is loaded with it, not before.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np

from vivace.base.errors import ProviderError
from vivace.base.specs import TensorSpec

Arrays = Mapping[str, np.ndarray]
Precision = Literal["f32", "bf16", "f16"]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a provider prepares a model.

    `shapes` fixes input shapes for good, which some providers need to plan well; `dims` gives the sizes of the
    symbols in them. `level` is ONNX Runtime's: 0, 1, 2, 3 or 99. `spin` lets idle worker threads burn CPU.
    """

    threads: int = 1
    precision: Precision = "f32"
    level: int = 99
    spin: bool = True
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)


class Session(Protocol):
    """A model that a provider has loaded."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def run(self, inputs: Arrays, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Computes the outputs, or the named ones."""
        ...


class Provider(Protocol):
    """An engine that can load ONNX models."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def load(self, source: Path | str | bytes, options: LoadOptions) -> Session:
        """Loads a model file, or the bytes of one. Raises: ProviderError when the engine refuses the model."""
        ...


@dataclass(frozen=True, slots=True)
class Known:
    """Where a provider comes from: its module here, the package behind it, and how to install it."""

    name: str
    module: str
    package: str
    install: str


KNOWN: dict[str, Known] = {
    "onnxruntime": Known("onnxruntime", "vivace.providers.onnxruntime", "onnxruntime", "pip install onnxruntime"),
    "openvino": Known("openvino", "vivace.providers.openvino", "openvino", "pip install openvino"),
}


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a provider can be used here, and why not."""

    name: str
    version: str
    is_available: bool
    reason: str


def availability(name: str) -> Availability:
    """Looks for a provider's package without importing it. Raises: ProviderError for an unknown name."""
    known = _known(name)
    if importlib.util.find_spec(known.package) is None:
        return Availability(name, "", False, f"the package {known.package} is not installed ({known.install})")
    try:
        version = importlib.metadata.version(known.package)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return Availability(name, version, True, "")


def find(name: str) -> Provider:
    """The provider of a name, imported.

    Raises: ProviderError for an unknown name, a package that is not installed, or one that does not import.
    """
    known = _known(name)
    found = availability(name)
    if not found.is_available:
        raise ProviderError(f"the package {known.package} is not installed", where=name, hint=known.install)
    try:
        module = importlib.import_module(known.module)
    except ImportError as error:
        raise ProviderError(
            f"the package {known.package} does not import: {error}",
            where=name,
            hint=f"{known.install} --force-reinstall",
        ) from error
    return cast(Provider, module.PROVIDER)


def _known(name: str) -> Known:
    if name not in KNOWN:
        raise ProviderError(f"unknown provider {name!r}", expected=f"one of {', '.join(KNOWN)}")
    return KNOWN[name]
