"""OpenVINO on the CPU, behind the provider interface.

It is told what its own guide recommends for latency: one stream, the given threads, the precision by name. It plans
much better for fixed shapes, so a model is reshaped to the ones that `LoadOptions` fixes. Threads are not pinned when
the process may use only a part of the machine: pinned workers of two processes would share one core.

Not handled: other devices; compile-time caches (`CACHE_DIR`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.base.errors import ProviderError, UnsupportedError
from vivace.base.machine import host
from vivace.base.specs import TensorSpec
from vivace.providers.provider import Arrays, LoadOptions

_DTYPES = {"boolean": DType.bool, **{d.value: d for d in DType if d is not DType.bool}}
_OPTIMIZED_LEVEL = 99


class OpenVinoSession:
    """A model loaded by OpenVINO."""

    def __init__(self, compiled: Any, output_names: Sequence[str]) -> None:
        self._compiled = compiled
        self._idle = [compiled.create_infer_request()]  # one for each run at a time
        self.inputs = tuple(_spec(port, _name(port)) for port in compiled.inputs)
        self.outputs = tuple(_spec(port, name) for port, name in zip(compiled.outputs, output_names))
        self._ports = dict(zip(output_names, compiled.outputs))
        self._keys = {name: port for port in compiled.inputs for name in port.get_names()}

    def run(self, inputs: Arrays, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        names = self._ports if outputs is None else outputs
        missing = [spec.name for spec in self.inputs if spec.name not in inputs]
        if missing:  # OpenVINO would take the array of the run before
            raise ProviderError(f"no array for input {missing[0]!r}", where="openvino")
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            found = request.infer({self._keys[k]: v for k, v in inputs.items() if k in self._keys}, share_inputs=True)
        except RuntimeError as error:
            raise ProviderError(_first_line(error), where="openvino") from error
        finally:
            self._idle.append(request)
        return {name: found[self._ports[name]] for name in names}


class OpenVino:
    """The installed OpenVINO."""

    name = "openvino"
    version: str = ov.__version__.split("-")[0]

    def load(self, source: Path | str | bytes, options: LoadOptions) -> OpenVinoSession:
        """Raises: ProviderError when OpenVINO refuses the model; UnsupportedError for an optimization level."""
        if options.level != _OPTIMIZED_LEVEL:
            raise UnsupportedError("optimization levels cannot be asked of OpenVINO", where="openvino", expected="99")
        try:
            core = ov.Core()
            model = core.read_model(source) if isinstance(source, bytes) else core.read_model(str(source))
            names = [_name(port) for port in model.outputs]
            known = {name: port for port in model.inputs for name in port.get_names()}
            fixed = {
                known[name]: ov.PartialShape(list(shape)) for name, shape in options.shapes.items() if name in known
            }
            if fixed and model.is_dynamic():
                model.reshape(fixed)
            return OpenVinoSession(core.compile_model(model, "CPU", _settings(options)), names)
        except RuntimeError as error:
            raise ProviderError(_first_line(error), where="openvino", expected="a model that it can load") from error


def _settings(options: LoadOptions) -> dict[str, Any]:
    machine = host()
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": options.threads,
        "INFERENCE_PRECISION_HINT": options.precision,
    }
    if machine.quota_cores is not None or options.threads < len(machine.affinity):
        settings["ENABLE_CPU_PINNING"] = False
    return settings


def _name(port: Any) -> str:
    names = port.get_names()
    return str(port.get_any_name()) if names else ""


def _spec(port: Any, name: str) -> TensorSpec:
    dims = tuple(_dim(d, name, axis) for axis, d in enumerate(port.get_partial_shape()))
    return TensorSpec(name, _DTYPES.get(port.get_element_type().get_type_name(), DType.string), dims)


def _dim(dim: Any, name: str, axis: int) -> Dim:
    return int(dim.get_length()) if dim.is_static else symbol(f"{name}.{axis}")


def _first_line(error: Exception) -> str:
    """The last line says what is wrong; those above name OpenVINO's source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


PROVIDER = OpenVino()
