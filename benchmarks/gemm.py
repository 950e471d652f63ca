"""Convolutions and matrix products of real models, one layer at a time: our kernels against ONNX Runtime's and
OpenVINO's.

    python -m benchmarks.gemm [resnet50|mobilenetv2|bert|vit|llm ...] [--dtype f32|bf16|int8] [--seconds 0.3]

Each layer is a model of one node with constant weights, bias and ReLU. In bf16, OpenVINO is told to compute in bf16 and
ONNX Runtime, which has no such kernels, computes in f32. In int8, the model is quantized as quantize-dequantize pairs,
per channel, and our result should equal ONNX Runtime's. The other engines convert layouts around a single node, which a
whole model would not: what is compared is the time of the node itself, by their own profilers. All engines take turns;
the best of the turns counts. `share` is of the peak that a loop without memory reaches on this core in that type.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.machine import Isa
from vivace.loops.contraction import Axis, Contraction, Depthwise, Packing
from vivace.loops.kernel import Binary, Buffer, Const, Expr, Load, Read
from vivace.lower.arithmetic import arithmetic_of
from vivace.lower.lanes import product_lanes
from vivace.lower.pack import aligned_zeros, contiguous_run, pack_groups, pack_panels
from vivace.lower.requantize import ACC, requantize
from vivace.lower.tile import panel_lanes
from vivace.measure.peaks import machine_peaks
from vivace.measure.statistics import geometric_mean
from vivace.targets.cpu import jit
from vivace.targets.cpu.amx import host_isa
from vivace.targets.cpu.code import NOTES_BYTES
from vivace.targets.cpu.contraction import emit_contraction
from vivace.targets.cpu.depthwise import emit_depthwise

f32 = DType.f32


@dataclass(frozen=True)
class Layer:
    """A convolution over `size x size` images, or, with `kernel` 0, a product of `size` rows."""

    size: int
    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False

    def __str__(self) -> str:
        if not self.kernel:
            return f"{self.size}x{self.inputs} @ {self.inputs}x{self.outputs}"
        kind = "depthwise" if self.depthwise else f"->{self.outputs}"
        return f"{self.size}x{self.size}x{self.inputs} {kind} {self.kernel}x{self.kernel}/{self.stride}"

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    @property
    def flops(self) -> int:
        if not self.kernel:
            return 2 * self.size * self.inputs * self.outputs
        each = 2 * self.out_size**2 * self.outputs * self.kernel**2
        return each if self.depthwise else each * self.inputs


def _products(rows: int, *shapes: tuple[int, int]) -> list[Layer]:
    return [Layer(rows, k, n, 0) for k, n in shapes]


def _depthwise(*layers: tuple[int, int, int]) -> list[Layer]:
    return [Layer(size, c, c, 3, stride, True) for size, c, stride in layers]


MODELS: dict[str, list[Layer]] = {
    "resnet50": [
        Layer(*x)
        for x in (
            (224, 3, 64, 7, 2),
            (56, 64, 64),
            (56, 64, 64, 3),
            (56, 64, 256),
            (56, 256, 64),
            (56, 256, 128),
            (56, 128, 128, 3, 2),
            (28, 128, 512),
            (56, 256, 512, 1, 2),
            (28, 512, 128),
            (28, 128, 128, 3),
            (28, 512, 256),
            (28, 256, 256, 3, 2),
            (14, 256, 1024),
            (28, 512, 1024, 1, 2),
            (14, 1024, 256),
            (14, 256, 256, 3),
            (14, 1024, 512),
            (14, 512, 512, 3, 2),
            (7, 512, 2048),
            (14, 1024, 2048, 1, 2),
            (7, 2048, 512),
            (7, 512, 512, 3),
        )
    ],
    "mobilenetv2": [
        Layer(*x)
        for x in (
            (224, 3, 32, 3, 2),
            (112, 32, 16),
            (112, 16, 96),
            (56, 96, 24),
            (56, 24, 144),
            (56, 144, 24),
            (28, 144, 32),
            (28, 32, 192),
            (28, 192, 32),
            (14, 192, 64),
            (14, 64, 384),
            (14, 384, 64),
            (14, 384, 96),
            (14, 96, 576),
            (14, 576, 96),
            (7, 576, 160),
            (7, 160, 960),
            (7, 960, 160),
            (7, 960, 320),
            (7, 320, 1280),
        )
    ]
    + _depthwise(
        (112, 32, 1), (112, 96, 2), (56, 144, 1), (56, 144, 2), (28, 192, 1), (28, 192, 2), (14, 384, 1), (14, 576, 1)
    )
    + _depthwise((14, 576, 2), (7, 960, 1)),
    "bert": _products(128, (384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768)),
    "vit": _products(197, (768, 768), (768, 3072), (3072, 768)),
    "llm": _products(1, (576, 576), (576, 1536), (1536, 576)) + _products(64, (576, 576), (576, 1536), (1536, 576)),
}


def _buffer(name: str, x: np.ndarray, writable: bool = False) -> Buffer:
    return Buffer(name, DType.of(x.dtype), x.shape, tuple(s // x.itemsize for s in x.strides), writable)


def _aligned(x: np.ndarray) -> np.ndarray:
    copy = aligned_zeros(x.shape, x.dtype)
    copy[...] = x
    return copy


@dataclass
class Problem:
    """A layer with its numbers: `x` and `w` as the model has them, `epilogue` over the results."""

    layer: Layer
    x: np.ndarray
    w: np.ndarray
    out: np.ndarray
    epilogue: Callable[[str], Expr]
    extra: dict[Buffer, np.ndarray]
    model: bytes


class Ours:
    """One layer as our kernel."""

    def __init__(self, spec: Contraction | Depthwise, arrays: dict[Buffer, np.ndarray], isa: Isa) -> None:
        code = emit_depthwise(spec, isa) if isinstance(spec, Depthwise) else emit_contraction(spec, isa)
        self.out = arrays[spec.out]
        self._library = jit.load(jit.compile_objects([code], isa, "light"))
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(
            self._library.address(code.name)
        )
        self._keep = arrays
        self._args = np.array([arrays[p].ctypes.data for p in code.params], np.int64)
        self._scratch = aligned_zeros((_units(code.scratch_bytes) // 4 + 16,))
        self._units = _units(code.units)

    def time_ns(self) -> float:
        self._scratch[: NOTES_BYTES // 4] = 0
        start = time.perf_counter_ns()
        self._run(self._args.ctypes.data, 0, self._units, self._scratch.ctypes.data)
        return time.perf_counter_ns() - start


def _units(d: object) -> int:
    assert isinstance(d, int)
    return d


def _spec(p: Problem, isa: Isa) -> tuple[Contraction | Depthwise, dict[Buffer, np.ndarray]]:
    """Our kernel's contraction, `x` channels last and padded."""
    layer, n, k, pad = p.layer, p.layer.outputs, max(p.layer.kernel, 1), p.layer.kernel // 2
    x = _aligned(np.pad(p.x[0].transpose(1, 2, 0), ((pad, pad), (pad, pad), (0, 0))) if layer.kernel else p.x)
    a, o, c = _buffer("a", x), _buffer("out", p.out, True), layer.inputs
    arrays = {a: x, o: p.out, **p.extra}
    extra = tuple(p.extra)
    s, row = layer.stride, x.strides[0] // x.itemsize
    rows: tuple[Axis, ...] = (
        Axis("oh", layer.out_size, s * row, 0, layer.out_size * n),
        Axis("ow", layer.out_size, s * c, 0, n),
    )
    if layer.depthwise:
        weights = _aligned(p.w[:, 0].transpose(1, 2, 0))
        b = _buffer("b", weights)
        taps = (Axis("kh", k, row, k * n), Axis("kw", k, c, n))
        return Depthwise("layer", rows, taps, n, a, b, o, p.epilogue("c"), extra), {**arrays, b: weights}
    taps = (Axis("kh", k, row), Axis("kw", k, c), Axis("channel", c, 1))
    flat = p.w.transpose(2, 3, 1, 0).reshape(k * k * c, n) if layer.kernel else p.w
    if not layer.kernel:
        rows, taps = (Axis("m", layer.size, c, 0, n),), (Axis("k", c, 1),)
    product = Contraction(
        "layer", (), rows, taps, n, a, _buffer("w", flat), o, Packing("panels"), p.epilogue("n"), extra,
        DType.i32 if DType.of(flat.dtype).is_int else f32,
    )  # fmt: skip
    arithmetic = arithmetic_of(product, isa)
    grouped = arithmetic.group > 1
    lanes = panel_lanes(n, isa, arithmetic) if grouped else product_lanes(product, isa)
    panels = (
        pack_groups(flat[None], lanes, arithmetic.group, contiguous_run(product))
        if grouped
        else pack_panels(flat, lanes)
    )
    b = _buffer("b", panels)
    return replace(product, b=b, packing=Packing("panels", lanes)), {**arrays, b: panels}


def _shapes(layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of x and w in the model, and of our result."""
    n, c, size, k = layer.outputs, layer.inputs, layer.size, layer.kernel
    if not k:
        return (size, c), (c, n), (size, n)
    return (1, c, size, size), (n, 1 if layer.depthwise else c, k, k), (layer.out_size, layer.out_size, n)


def _float_problem(layer: Layer, dtype: DType) -> Problem:
    random = np.random.default_rng(0)
    x_shape, w_shape, out_shape = _shapes(layer)
    fan = layer.inputs if not layer.kernel else layer.kernel**2 * (1 if layer.depthwise else layer.inputs)
    x, w, bias = (random.standard_normal(shape, dtype=np.float32) for shape in (x_shape, w_shape, (layer.outputs,)))
    x, w = x.astype(dtype.numpy), (w / np.float32(fan**0.5)).astype(dtype.numpy)
    shift = _buffer("bias", bias)

    def epilogue(lane: str) -> Expr:
        return Binary("max", Binary("add", Read("acc", f32), Load(shift, (symbol(lane),))), Const(0.0, f32))

    out = aligned_zeros(out_shape, dtype.numpy)
    return Problem(layer, x, w, out, epilogue, {shift: bias}, _float_model(layer, w.astype(np.float32), bias))


def _node(layer: Layer, inputs: list[str]) -> onnx.NodeProto:
    if not layer.kernel:
        return helper.make_node("Gemm", inputs, ["z"], "layer")
    pad, group = layer.kernel // 2, layer.inputs if layer.depthwise else 1
    return helper.make_node("Conv", inputs, ["z"], "layer", strides=[layer.stride] * 2, pads=[pad] * 4, group=group)


def _serialized(layer: Layer, kind: int, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> bytes:
    values = [numpy_helper.from_array(v, name) for name, v in constants.items()]
    x = helper.make_tensor_value_info("x", kind, list(_shapes(layer)[0]))
    graph = helper.make_graph(nodes, "layer", [x], [helper.make_tensor_value_info("y", kind, None)], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def _float_model(layer: Layer, w: np.ndarray, bias: np.ndarray) -> bytes:
    nodes = [_node(layer, ["x", "w", "bias"]), helper.make_node("Relu", ["z"], ["y"])]
    return _serialized(layer, TensorProto.FLOAT, nodes, {"w": w, "bias": bias})


def _int8_problem(layer: Layer) -> Problem:
    """u8 activations with zero point 0, as they follow a ReLU, and i8 weights with a scale per channel."""
    random = np.random.default_rng(0)
    x_shape, w_shape, out_shape = _shapes(layer)
    n = layer.outputs
    x, w = random.integers(0, 256, x_shape).astype(np.uint8), random.integers(-127, 128, w_shape).astype(np.int8)
    fan = int(np.prod(w_shape)) // n
    x_scale, y_scale = np.float32(0.02), np.float32(0.05)
    w_scale = (random.random(n, dtype=np.float32) + 1) * np.float32(0.02 / fan**0.5)
    bias = random.integers(-5000, 5000, n).astype(np.int32)
    scale = x_scale * w_scale / y_scale
    shift, factor = _buffer("bias", bias), _buffer("scale", scale)

    def epilogue(lane: str) -> Expr:
        at = (symbol(lane),)
        return requantize(Binary("add", ACC, Load(shift, at)), Load(factor, at), 0, DType.u8, is_bounded=True)

    axis = {"axis": 0 if layer.kernel else 1}
    constants = {
        "w": w, "w_scale": w_scale, "w_zero": np.zeros(n, np.int8), "bias": bias, "b_scale": x_scale * w_scale,
        "b_zero": np.zeros(n, np.int32), "x_scale": x_scale.reshape(()), "y_scale": y_scale.reshape(()),
        "zero": np.zeros((), np.uint8),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "x_scale", "zero"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wf"], **axis),
        helper.make_node("DequantizeLinear", ["bias", "b_scale", "b_zero"], ["bf"], axis=0),
        _node(layer, ["xf", "wf", "bf"]),
        helper.make_node("QuantizeLinear", ["z", "y_scale", "zero"], ["y"]),
    ]
    model = _serialized(layer, TensorProto.UINT8, nodes, constants)
    return Problem(layer, x, w, aligned_zeros(out_shape, np.uint8), epilogue, {shift: bias, factor: scale}, model)


class OnnxRuntime:
    """The layer in ONNX Runtime; node times are read from its profile at the end."""

    def __init__(self, model: bytes, folder: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling = 1, True
        options.profile_file_prefix = str(Path(folder) / "ort")
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(self, x: np.ndarray) -> np.ndarray:
        return self._session.run(None, {"x": x})[0]  # type: ignore[no-any-return]

    def best_ns(self) -> float:
        events = json.loads(Path(self._session.end_profiling()).read_text())
        names = ("Conv", "Gemm", "FusedConv", "FusedGemm", "MatMul", "QLinearConv", "QGemm", "QLinearMatMul")
        return (
            min(e["dur"] for e in events if e.get("args", {}).get("op_name") in names and "kernel_time" in e["name"])
            * 1e3
        )


class OpenVino:
    """The layer in OpenVINO, with its own times per node."""

    def __init__(self, model: bytes, precision: str) -> None:
        import openvino as ov

        core = ov.Core()
        settings = {"INFERENCE_NUM_THREADS": 1, "PERF_COUNT": True, "INFERENCE_PRECISION_HINT": precision}
        self._request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()

    def time_ns(self, x: np.ndarray) -> float:
        self._request.infer({0: x})
        kinds = ("Convolution", "FullyConnected", "FullyConnectedQuantizedLegacy", "MatMul", "GroupConvolution")
        nodes = self._request.get_profiling_info()
        times = [p.real_time.total_seconds() for p in nodes if p.node_type in kinds]
        return sum(times) * 1e9


def measure(layer: Layer, dtype: str, isa: Isa, seconds: float) -> tuple[float, float, float, float]:
    """Best times in ns of ours, ONNX Runtime's and OpenVINO's, and our largest difference from ONNX Runtime."""
    problem = _int8_problem(layer) if dtype == "int8" else _float_problem(layer, DType(dtype))
    ours = Ours(*_spec(problem, isa), isa)
    x = problem.x if dtype == "int8" else problem.x.astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        runtime = OnnxRuntime(problem.model, folder)
        vino = OpenVino(problem.model, "bf16" if dtype == "bf16" else "f32")
        expected = runtime.run(x).astype(np.float32)
        own, theirs = [ours.time_ns()], [vino.time_ns(x)]
        got = ours.out.transpose(2, 0, 1)[None] if layer.kernel else ours.out
        error = float(np.abs(got.astype(np.float32) - expected).max())
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            own += [ours.time_ns() for _ in range(3)]
            for _ in range(3):
                runtime.run(x)
            theirs += [vino.time_ns(x) for _ in range(3)]
        return min(own), runtime.best_ns(), min(theirs), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--dtype", choices=("f32", "bf16", "int8"), default="f32")
    parser.add_argument("--seconds", type=float, default=0.3, help="per layer")
    options = parser.parse_args()
    isa = host_isa()
    peak = machine_peaks().operations("i8" if options.dtype == "int8" else options.dtype, 1) / 1e9
    print(f"{isa.name}, {options.dtype}, 1 thread, peak {peak:.1f} G operations/s")
    print(f"{'layer':36} {'ours us':>9} {'share':>6} {'ORT us':>9} {'ratio':>6} {'OV us':>9} {'ratio':>6} {'error':>8}")
    for name in options.models:
        ratios = []
        for layer in MODELS[name]:
            ours, runtime, vino, error = measure(layer, options.dtype, isa, options.seconds)
            ratios.append(ours / min(runtime, vino))
            print(
                f"{layer!s:36} {ours / 1e3:9.1f} {layer.flops / ours / peak:6.1%}"
                f" {runtime / 1e3:9.1f} {ours / runtime:6.2f} {vino / 1e3:9.1f} {ours / vino:6.2f} {error:8.1e}",
                flush=True,
            )
        mean = geometric_mean(ratios)
        print(f"{name}: geometric mean of ours over the better of the two {mean:.3f}, worst {max(ratios):.2f}")


if __name__ == "__main__":
    main()
