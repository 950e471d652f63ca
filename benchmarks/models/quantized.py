"""Quantized variants of the real models, made by onnxruntime's quantizer: what users have.

`qdq` marks integers by QuantizeLinear and DequantizeLinear: u8 activations, i8 weights per channel; `qdq-signed` has
i8 activations around 0. `qlinear` has the operators QLinearConv, QLinearMatMul, ... instead. `dynamic` quantizes
activations when the model runs (MatMulInteger). Ranges are calibrated on the catalogue's inputs, seeds beyond those
that benchmarks use, so that a timed input is not one that the model was made with.

The quantizer's result depends on its version and not on the machine; a file is kept in the cache with a side file that
names what it was made from, and made again when that changes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from benchmarks.models.catalogue import inputs
from benchmarks.models.fetch import cache_dir, sha256_of, write_atomically
from benchmarks.models.making import materialise

RECIPE = 1
OPSET = 13  # the first with an axis in QuantizeLinear
FORMS = ("qdq", "qdq-signed", "qlinear", "dynamic")
N_CALIBRATION = 8
FIRST_SEED = 100
# What the quantizer leaves in f32: operators that are no faster in integers in any runtime would only lose accuracy.
_OPERATORS = ["Conv", "MatMul", "Gemm", "Add", "MaxPool", "GlobalAveragePool", "AveragePool", "Concat", "Relu", "Clip",
              "Reshape", "Transpose", "Flatten", "Mul"]  # fmt: skip
_OF_ENCODERS = ["MatMul", "Gemm"]


@dataclass(frozen=True, slots=True)
class Quantized:
    """One variant: `base` is a name of the catalogue, `form` one of FORMS."""

    base: str
    form: str

    @property
    def name(self) -> str:
        return f"{self.base}-{self.form}"


QUANTIZED: tuple[Quantized, ...] = (
    *(Quantized(base, form) for base in ("resnet50", "mobilenetv2", "efficientnet-lite0") for form in FORMS[:3]),
    *(Quantized(base, form) for base in ("minilm-l6-eager", "bert-base") for form in ("qdq", "qdq-signed", "dynamic")),
    *(Quantized(base, "qdq") for base in ("ppocrv4-det", "ppocrv4-rec", "ppocr-cls")),
)


def materialise_quantized(base: str, form: str = "qdq") -> Path:
    """The path of the quantized model, made first where the cache lacks it.

    Raises: ModelUnavailable when the model itself cannot be made here; KeyError for an unknown name.
    """
    if form not in FORMS:
        raise KeyError(f"no form is called {form!r}; the forms: {', '.join(FORMS)}")
    source = materialise(base)
    path = cache_dir() / f"{base}-{form}.onnx"
    made_from = {"recipe": RECIPE, "source_size": source.stat().st_size}
    side = path.with_suffix(".json")
    if path.exists() and side.exists():
        record = json.loads(side.read_text())
        if {k: record.get(k) for k in made_from} == made_from and record.get("size_bytes") == path.stat().st_size:
            return path
    write_atomically(path, lambda unfinished: _quantize(base, form, source, unfinished))
    record = {**made_from, "size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_atomically(side, lambda unfinished: _write_text(unfinished, json.dumps(record, indent=1) + "\n"))
    return path


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


class _Samples:
    """The catalogue's inputs, one at a time, as onnxruntime's calibration reads them."""

    def __init__(self, base: str) -> None:
        self._all: Iterator[dict[str, np.ndarray]] = iter(
            inputs(base, seed=FIRST_SEED + i) for i in range(N_CALIBRATION)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._all, None)


def _quantize(base: str, form: str, source: Path, target: Path) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    CalibrationDataReader.register(_Samples)
    is_encoder = base.startswith(("minilm", "bert"))
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        prepared = Path(folder) / "prepared.onnx"
        _prepare(source, prepared)
        if form == "dynamic":
            quantize_dynamic(prepared, target, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)
            return
        signed = form == "qdq-signed"
        quantize_static(
            str(prepared), str(target), _Samples(base),
            quant_format=QuantFormat.QOperator if form == "qlinear" else QuantFormat.QDQ,
            op_types_to_quantize=_OF_ENCODERS if is_encoder else _OPERATORS,
            per_channel=True,
            activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": signed, "WeightSymmetric": True},
        )  # fmt: skip


def _prepare(source: Path, target: Path) -> None:
    """The model as the quantizer wants it: constants folded, BatchNormalization gone, scales per axis in its opset."""
    import onnx
    import onnx.version_converter
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    model = onnx.load(str(target))
    if next(i.version for i in model.opset_import if not i.domain) < OPSET:
        model = onnx.version_converter.convert_version(model, OPSET)
    onnx.save(model, str(target))
