"""Convolutions and matrix products of real models, one layer at a time: our kernels against ONNX Runtime's and
OpenVINO's.

    python benchmarks/gemm.py [resnet50|mobilenetv2|bert|vit|llm ...] [--seconds 0.3]

Each layer is a model of one node with constant weights, bias and ReLU. The other engines convert layouts around a
single node, which a whole model would not: what is compared is the time of the node itself, by their own profilers.
All engines take turns; the best of the turns counts. `share` is of the multiply-add peak that a loop without memory
reaches on this core.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.machine import Isa, best_isa, host
from vivace.loops.contraction import Axis, Contraction, Depthwise, Packing
from vivace.loops.kernel import Binary, Buffer, Const, Load, Read
from vivace.lower.pack import aligned_zeros, pack_panels
from vivace.lower.tile import panel_lanes
from vivace.measure.peaks import machine_peaks
from vivace.targets.cpu import jit
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
    return Buffer(name, f32, x.shape, tuple(s // 4 for s in x.strides), writable)


def _aligned(x: np.ndarray) -> np.ndarray:
    copy = aligned_zeros(x.shape)
    copy[...] = x
    return copy


class Ours:
    """One layer as our kernel; `x` channels last, already padded."""

    def __init__(self, layer: Layer, x: np.ndarray, w: np.ndarray, bias: np.ndarray, isa: Isa) -> None:
        spec, arrays = _spec(layer, x, w, bias, isa)
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
        start = time.perf_counter_ns()
        self._run(self._args.ctypes.data, 0, self._units, self._scratch.ctypes.data)
        return time.perf_counter_ns() - start


def _units(d: object) -> int:
    assert isinstance(d, int)
    return d


def _spec(
    layer: Layer, x: np.ndarray, w: np.ndarray, bias: np.ndarray, isa: Isa
) -> tuple[Contraction | Depthwise, dict[Buffer, np.ndarray]]:
    shift = _buffer("bias", bias)
    lane = "c" if layer.depthwise else "n"
    e = Binary("max", Binary("add", Read("acc", f32), Load(shift, (symbol(lane),))), Const(0.0, f32))
    a, n = _buffer("a", x), layer.outputs
    out = aligned_zeros((layer.size, n) if not layer.kernel else (layer.out_size, layer.out_size, n))
    o = _buffer("out", out, True)
    if not layer.kernel:
        lanes = panel_lanes(n, isa)
        panels = pack_panels(w, lanes)
        b = _buffer("b", panels)
        rows, taps = (Axis("m", layer.size, layer.inputs, 0, n),), (Axis("k", layer.inputs, 1, n),)
        product = Contraction("layer", (), rows, taps, n, a, b, o, Packing("panels", lanes), e, (shift,))
        return product, {a: x, b: panels, o: out, shift: bias}
    row, k, s, c = a.strides[0], layer.kernel, layer.stride, layer.inputs
    rows = (Axis("oh", layer.out_size, s * row, 0, layer.out_size * n), Axis("ow", layer.out_size, s * c, 0, n))
    if layer.depthwise:
        weights = _aligned(w[:, 0].transpose(1, 2, 0))
        b = _buffer("b", weights)
        taps = (Axis("kh", k, row, k * n), Axis("kw", k, c, n))
        return Depthwise("layer", rows, taps, n, a, b, o, e, (shift,)), {a: x, b: weights, o: out, shift: bias}
    lanes = panel_lanes(n, isa)
    panels = pack_panels(w.transpose(2, 3, 1, 0).reshape(k * k * c, n), lanes)
    b = _buffer("b", panels)
    taps = (Axis("kh", k, row), Axis("kw", k, c), Axis("channel", c, 1))
    return Contraction("layer", (), rows, taps, n, a, b, o, Packing("panels", lanes), e, (shift,)), {
        a: x, b: panels, o: out, shift: bias,
    }  # fmt: skip


def _model(layer: Layer, w: np.ndarray, bias: np.ndarray) -> bytes:
    weights = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(bias, "bias")]
    if layer.kernel:
        pad = layer.kernel // 2
        attributes = {"strides": [layer.stride] * 2, "pads": [pad] * 4, "group": layer.inputs if layer.depthwise else 1}
        node = helper.make_node("Conv", ["x", "w", "bias"], ["z"], "layer", **attributes)
        shape = [1, layer.inputs, layer.size, layer.size]
    else:
        node = helper.make_node("Gemm", ["x", "w", "bias"], ["z"], "layer")
        shape = [layer.size, layer.inputs]
    relu = helper.make_node("Relu", ["z"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node, relu], "layer", [x], [y], weights)
    return onnx.helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


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
        names = ("Conv", "Gemm", "FusedConv", "FusedGemm", "MatMul")
        return (
            min(e["dur"] for e in events if e.get("args", {}).get("op_name") in names and "kernel_time" in e["name"])
            * 1e3
        )


class OpenVino:
    """The layer in OpenVINO, with its own times per node."""

    def __init__(self, model: bytes) -> None:
        import openvino as ov

        core = ov.Core()
        settings = {"INFERENCE_NUM_THREADS": 1, "PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32"}
        self._request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()

    def time_ns(self, x: np.ndarray) -> float:
        self._request.infer({0: x})
        kinds = ("Convolution", "FullyConnected", "MatMul", "GroupConvolution")
        times = [p.real_time.total_seconds() for p in self._request.get_profiling_info() if p.node_type in kinds]
        return sum(times) * 1e9


def measure(layer: Layer, isa: Isa, seconds: float) -> tuple[float, float, float, float]:
    """Best times in ns of ours, ONNX Runtime's and OpenVINO's, and our largest difference from ONNX Runtime."""
    random = np.random.default_rng(0)
    bias = _aligned(random.standard_normal(layer.outputs, dtype=np.float32))
    fan = layer.inputs if not layer.kernel else layer.kernel**2 * (1 if layer.depthwise else layer.inputs)
    if layer.kernel:
        pad = layer.kernel // 2
        x = random.standard_normal((1, layer.inputs, layer.size, layer.size), dtype=np.float32)
        shape: tuple[int, ...] = (layer.outputs, 1 if layer.depthwise else layer.inputs, layer.kernel, layer.kernel)
        own_x = _aligned(np.pad(x[0].transpose(1, 2, 0), ((pad, pad), (pad, pad), (0, 0))))
    else:
        x = random.standard_normal((layer.size, layer.inputs), dtype=np.float32)
        shape, own_x = (layer.inputs, layer.outputs), _aligned(x)
    w = random.standard_normal(shape, dtype=np.float32) / np.float32(fan**0.5)
    ours = Ours(layer, own_x, w, bias, isa)
    model = _model(layer, w, bias)
    with tempfile.TemporaryDirectory() as folder:
        runtime, vino = OnnxRuntime(model, folder), OpenVino(model)
        expected = runtime.run(x)
        own, theirs = [ours.time_ns()], [vino.time_ns(x)]
        got = ours.out.transpose(2, 0, 1)[None] if layer.kernel else ours.out
        error = float(np.abs(got - expected).max())
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
    parser.add_argument("--seconds", type=float, default=0.3, help="per layer")
    options = parser.parse_args()
    isa = best_isa(host())
    peak = machine_peaks().operations("f32", 1) / 1e9
    print(f"{isa.name}, 1 thread, peak {peak:.1f} GFLOP/s")
    print(f"{'layer':36} {'ours us':>9} {'share':>6} {'ORT us':>9} {'ratio':>6} {'OV us':>9} {'ratio':>6} {'error':>8}")
    for name in options.models:
        ratios = []
        for layer in MODELS[name]:
            ours, runtime, vino, error = measure(layer, isa, options.seconds)
            ratios.append(ours / min(runtime, vino))
            print(
                f"{layer!s:36} {ours / 1e3:9.1f} {layer.flops / ours / peak:6.1%}"
                f" {runtime / 1e3:9.1f} {ours / runtime:6.2f} {vino / 1e3:9.1f} {ours / vino:6.2f} {error:8.1e}",
                flush=True,
            )
        mean = float(np.exp(np.mean(np.log(ratios))))
        print(f"{name}: geometric mean of ours over the better of the two {mean:.3f}, worst {max(ratios):.2f}")


if __name__ == "__main__":
    main()
