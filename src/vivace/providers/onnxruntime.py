"""ONNX Runtime on the CPU, behind the provider interface: the reference for answers, and the engine of last resort.

Not handled: other execution providers, sequences and maps as outputs (they are handed through as they come).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from vivace.base.dim_notation import parse
from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.base.errors import ModelError, ProviderError, UnsupportedError
from vivace.base.specs import TensorSpec
from vivace.providers.provider import Arrays, LoadOptions

_LEVELS = {
    0: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    2: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    3: ort.GraphOptimizationLevel.ORT_ENABLE_LAYOUT,
    99: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_DTYPES = {
    "float": DType.f32,
    "double": DType.f64,
    "float16": DType.f16,
    "bfloat16": DType.bf16,
    "float8e4m3fn": DType.f8e4m3fn,
    "float8e5m2": DType.f8e5m2,
    "int4": DType.i4,
    "uint4": DType.u4,
    **{f"{'u' if d.value[0] == 'u' else ''}int{d.value[1:]}": d for d in DType if d.is_int and d.value[1:] != "4"},
    "bool": DType.bool,
    "string": DType.string,
}


class OnnxRuntimeSession:
    """A model loaded by ONNX Runtime."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.inputs = tuple(map(_spec, session.get_inputs()))
        self.outputs = tuple(map(_spec, session.get_outputs()))
        self._names = [spec.name for spec in self.outputs]

    def run(self, inputs: Arrays, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        names = self._names if outputs is None else list(outputs)
        try:
            return dict(zip(names, self._session.run(names, inputs)))
        except (ValueError, *_ERRORS) as error:
            raise ProviderError(_first_line(error), where="onnxruntime") from error


class OnnxRuntime:
    """The installed ONNX Runtime."""

    name = "onnxruntime"
    version: str = ort.__version__

    def load(self, source: Path | str | bytes, options: LoadOptions) -> OnnxRuntimeSession:
        """Raises: ProviderError when ONNX Runtime refuses the model; UnsupportedError for a precision that it lacks."""
        if options.precision != "f32":
            raise UnsupportedError(
                f"precision {options.precision} cannot be asked of ONNX Runtime", where="onnxruntime", expected="f32"
            )
        model = source if isinstance(source, bytes) else str(source)
        try:
            return OnnxRuntimeSession(
                ort.InferenceSession(model, _settings(options), providers=["CPUExecutionProvider"])
            )
        except (ValueError, RuntimeError, *_ERRORS) as error:
            raise ProviderError(_first_line(error), where="onnxruntime", expected="a model that it can load") from error


def _settings(options: LoadOptions) -> ort.SessionOptions:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = _LEVELS[options.level]
    settings.log_severity_level = 4  # what goes wrong comes as an exception
    if not options.spin:
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, size in options.dims.items():
        settings.add_free_dimension_override_by_name(name, size)
    return settings


_STATE = ort.capi.onnxruntime_pybind11_state
_ERRORS = tuple(
    getattr(_STATE, name)
    for name in (
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
    )
)


def _spec(arg: ort.NodeArg) -> TensorSpec:
    inner = arg.type.removeprefix("tensor(").removesuffix(")")
    dims = arg.shape if isinstance(arg.shape, list) else []
    return TensorSpec(
        arg.name, _DTYPES.get(inner, DType.string), tuple(_dim(d, arg.name, i) for i, d in enumerate(dims))
    )


def _dim(size: int | str | None, name: str, axis: int) -> Dim:
    if isinstance(size, int) and size >= 0:
        return size
    if not isinstance(size, str) or not any(map(str.isalpha, size)):  # "", "?", "-1": a size of its own
        return symbol(f"{name}.{axis}")
    try:
        return parse(size)
    except ModelError:
        return symbol(size)


def _first_line(error: Exception) -> str:
    """The message without ONNX Runtime's numbers and code words."""
    text = str(error).partition("\n")[0].strip()
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text) or type(error).__name__


def runner(model: bytes, threads: int) -> Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]:
    """A function from arrays to arrays, in the model's order: how an engine of ours runs what it has no kernel for.

    Its threads do not spin while they wait: they would take the cores from the kernels around it.
    """
    session = PROVIDER.load(model, LoadOptions(threads=threads, spin=False))
    names = [spec.name for spec in session.inputs]

    def run(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        return list(session.run(dict(zip(names, arrays, strict=True))).values())

    return run


PROVIDER = OnnxRuntime()
