"""The distinct convolutions and products of all models, one at a time: as our compiler builds them, against OpenVINO
(whose kernels are oneDNN's) and ONNX Runtime.

    python -m benchmarks.sweep                          # the largest layers of each model; takes up where it was
    python -m benchmarks.sweep resnet50 --dtype int8 --most 999

Each layer is a model of one node with constant weights, bias and ReLU, channels last, compiled with all choices that
the compiler makes. What is compared is the time of the node itself, by each engine's own profiler, on one thread; all
engines take turns and the best of the turns counts. A step stands before it, as in a model. In bf16, ONNX Runtime has
no such kernels and is left out; in int8 the model is quantized as quantize-dequantize pairs, per channel. `share` is of
the arithmetic peak of a core in that type; the limit counts bytes too. `benchmarks/gemm.py` does the same for chosen
shapes with kernels built by hand.

Rules:
* DISTINCT: a shape counts once, with how often the models have it.
* RESUMABLE: each layer is a record of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import onnx
from benchmarks.gemm import OnnxRuntime, OpenVino
from benchmarks.limits import limit_line
from benchmarks.models import MODELS, ModelUnavailable, inputs, materialise
from benchmarks.records import ROOT, kept, versions
from onnx import TensorProto, helper, numpy_helper

import vivace
from vivace.base.machine import host
from vivace.building import optimize_for_native
from vivace.compilation import load_graph
from vivace.graph.graph import Node
from vivace.lower.pack import aligned_zeros
from vivace.measure import roofline
from vivace.measure.peaks import machine_peaks
from vivace.measure.statistics import geometric_mean
from vivace.runtime.engine import Engine

RECORDS = ROOT / "benchmarks" / "out" / "sweep"
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = ("f32", "bf16", "int8")
LOSS = 1.1
_BURST = 6  # calls of one engine before the next has its turn: the first find cold caches and idle units

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution over images of `size`; one over 1x1 without taps is a product of `batch` rows."""

    batch: int
    size: tuple[int, int]
    inputs: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    group: int = 1

    @property
    def is_product(self) -> bool:
        return self.size == (1, 1) and self.kernel == (1, 1)

    @property
    def out_size(self) -> tuple[int, int]:
        (h, w), (kh, kw), (sh, sw), (t, left, b, r) = self.size, self.kernel, self.strides, self.pads
        return (h + t + b - kh) // sh + 1, (w + left + r - kw) // sw + 1

    def least_seconds(self, dtype: str) -> float:
        """What it takes at the measured peaks, with weights and activations in the nearest caches that hold them."""
        size = {"f32": 4, "bf16": 2, "int8": 1}[dtype]
        weights = self.outputs * self.inputs // self.group * math.prod(self.kernel)
        values = self.batch * (math.prod(self.size) * self.inputs + math.prod(self.out_size) * self.outputs)
        kind = "i8" if dtype == "int8" else dtype
        work = roofline.Layer("", "conv", self.flops, weights * size, values * size, False, kind)
        return next(roofline.limits([work], machine_peaks(), 1)).seconds

    @property
    def flops(self) -> int:
        return 2 * self.batch * math.prod((*self.out_size, self.outputs, self.inputs // self.group, *self.kernel))

    def __str__(self) -> str:
        if self.is_product:
            return f"{self.batch}x{self.inputs} @ {self.inputs}x{self.outputs}"
        (h, w), (kh, kw), (sh, sw) = self.size, self.kernel, self.strides
        kind = "depthwise" if self.group == self.inputs > 1 else f"->{self.outputs}"
        groups = f" /{self.group}" if 1 < self.group < self.inputs else ""
        return f"{h}x{w}x{self.inputs} {kind} {kh}x{kw}{groups} stride {sh}x{sw}"


def layers_of(name: str) -> dict[Layer, int]:
    """The layers of a model with constant weights, and how often it has each. Raises: ModelUnavailable."""
    shapes = {key: array.shape for key, array in inputs(name).items()}
    found: dict[Layer, int] = {}
    for node in optimize_for_native(load_graph(materialise(name), shapes)).walk():
        layer = _layer_of(node)
        if layer is not None:
            found[layer] = found.get(layer, 0) + 1
    return found


def _layer_of(node: Node) -> Layer | None:
    if node.op.name not in ("conv", "matmul"):
        return None
    x, w = node.inputs[:2]
    if x is None or w is None or w.data is None or not all(isinstance(d, int) for d in x.shape):
        return None
    shape = [int(d) for d in x.shape]  # type: ignore[arg-type]
    if node.op.name == "matmul":
        return Layer(math.prod(shape[:-1]), (1, 1), *w.data.shape) if w.data.ndim == 2 else None
    attrs = node.attrs
    if any(d != 1 for d in attrs["dilations"]) or len(shape) > 4 or attrs["layout"] != "NHWC":
        return None
    ones = (1,) * (4 - len(shape))  # a convolution along one axis is one over images of height 1
    pads = [tuple(p) for p in (attrs["before"], attrs["after"])]
    none = (0,) * len(ones)
    size = (*ones, *shape[1:-1])
    return Layer(
        shape[0], size, shape[-1], w.data.shape[0], (*ones, *w.data.shape[2:]), (*ones, *attrs["strides"]),
        (*none, *pads[0], *none, *pads[1]), attrs["group"],
    )  # fmt: skip


def model_of(layer: Layer, dtype: str) -> tuple[bytes, np.ndarray]:
    """The layer as an ONNX model with channels last outside, and an input for it."""
    random = np.random.default_rng(0)
    fan = layer.inputs // layer.group * math.prod(layer.kernel)
    product = layer.is_product
    x_shape = (layer.batch, layer.inputs) if product else (layer.batch, *layer.size, layer.inputs)
    w_shape = (layer.inputs, layer.outputs) if product else (layer.outputs, layer.inputs // layer.group, *layer.kernel)
    is_int = dtype == "int8"
    constants = _int8_constants(layer, w_shape, fan, random) if is_int else {
        "w": (random.standard_normal(w_shape) / fan**0.5).astype(np.float32),
        "b": random.standard_normal(layer.outputs).astype(np.float32),
    }  # fmt: skip
    # A step before, as models have: it leaves its results where and as the layer wants them.
    before = ["QuantizeLinear", "x", "x_scale", "zero"] if is_int else ["Tanh", "x"]
    nodes = [helper.make_node(before[0], before[1:], ["x.made"], "before")]
    at = "x.made"
    if not product:
        nodes.append(helper.make_node("Transpose", [at], ["x.first"], perm=[0, 3, 1, 2]))
        at = "x.first"
    if is_int:
        axis = 1 if product else 0
        nodes += [
            helper.make_node("DequantizeLinear", [at, "x_scale", "zero"], ["xf"]),
            helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wf"], axis=axis),
            helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["bf"], axis=0),
        ]
    names = ["xf", "wf", "bf"] if is_int else [at, "w", "b"]
    if product:
        nodes.append(helper.make_node("Gemm", names, ["z"], "layer"))
    else:
        attrs = {"strides": list(layer.strides), "pads": list(layer.pads), "group": layer.group}
        nodes.append(helper.make_node("Conv", names, ["z"], "layer", **attrs))
    last = "y" if product else "y.first"
    if is_int:  # unsigned around 0: the ReLU is in the rounding
        nodes.append(helper.make_node("QuantizeLinear", ["z", "y_scale", "zero"], [last]))
    else:
        nodes.append(helper.make_node("Relu", ["z"], [last]))
    if not product:
        nodes.append(helper.make_node("Transpose", [last], ["y"], perm=[0, 2, 3, 1]))
    kind = TensorProto.UINT8 if is_int else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x_shape))],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = random.standard_normal(x_shape, np.float32)
    return onnx.shape_inference.infer_shapes(model).SerializeToString(), np.abs(x) * 2 if is_int else x


def _int8_constants(
    layer: Layer, w_shape: tuple[int, ...], fan: int, random: np.random.Generator
) -> dict[str, np.ndarray]:
    n = layer.outputs
    x_scale = np.float32(0.02)
    w_scale = (random.random(n, dtype=np.float32) + 1) * np.float32(0.02 / fan**0.5)
    return {
        "w": random.integers(-127, 128, w_shape).astype(np.int8), "w_scale": w_scale, "w_zero": np.zeros(n, np.int8),
        "b": random.integers(-5000, 5000, n).astype(np.int32), "b_scale": x_scale * w_scale,
        "b_zero": np.zeros(n, np.int32), "x_scale": x_scale, "y_scale": np.float32(0.05),
        "zero": np.zeros((), np.uint8),
    }  # fmt: skip


class Ours:
    """The layer in our engine: the time of the steps that compute the node."""

    def __init__(self, model: bytes, dtype: str) -> None:
        engine = vivace.compile(model, threads=1, precision="bf16" if dtype == "bf16" else "f32")
        assert isinstance(engine, Engine)
        self.engine = engine
        self.kernels = {p.kernel for p in engine.placement if p.node == "layer"}
        self._lines = {int(kernel.partition(":")[0]) for kernel in self.kernels}
        self._results: dict[str, np.ndarray] | None = None

    def time_ns(self, x: np.ndarray) -> float:
        """The best of a few runs one after another, as the other engines have them. Results go to whole cache lines, as
        between steps of a model: NumPy's own memory begins 16 bytes behind one, and storing there takes up to 7 % more.
        """
        if self._results is None:
            plain = self.engine.run({"x": x})
            self._results = {name: aligned_zeros(y.shape, y.dtype) for name, y in plain.items()}
        run = self.engine.recorder({"x": x}, outputs=self._results)
        runs = (run() for _ in range(_BURST))
        return min(float(sum(c.duration_ns for c in chunks if c.step in self._lines)) for chunks in runs)


def measure(layer: Layer, dtype: str, seconds: float) -> Record:
    """Best times in us of all engines on one layer."""
    model, x = model_of(layer, dtype)
    ours = Ours(model, dtype)
    vino = OpenVino(model, "bf16" if dtype == "bf16" else "f32")
    with tempfile.TemporaryDirectory() as folder:
        runtime = OnnxRuntime(model, folder) if dtype != "bf16" else None
        own, theirs = [ours.time_ns(x)], [vino.time_ns(x)]
        if runtime:
            runtime.run(x)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            own.append(ours.time_ns(x))
            theirs += [vino.time_ns(x) for _ in range(_BURST)]
            for _ in range(_BURST if runtime else 0):
                runtime.run(x)  # type: ignore[union-attr]
        ort_ns = runtime.best_ns() if runtime else None
    peers = [t for t in (min(theirs) or None, ort_ns) if t]  # OpenVINO shows no time for what it folds away
    return {
        "layer": str(layer), "key": astuple(layer), "dtype": dtype, "flops": layer.flops,
        "vivace_us": min(own) / 1e3, "openvino_us": min(theirs) / 1e3, "onnxruntime_us": ort_ns and ort_ns / 1e3,
        "share": layer.flops / (min(own) / 1e9) / machine_peaks().operations("i8" if dtype == "int8" else dtype, 1),
        "least_us": layer.least_seconds(dtype) * 1e6,
        "ratio": min(own) / min(peers) if peers else None,
        "steps": sorted(ours.kernels), "machine": host().model, "versions": versions(),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing per layer and type")
    parser.add_argument("--most", type=int, default=8, help="layers of each model, those with most arithmetic")
    parser.add_argument("--again", action="store_true", help="measure anew what is already there")
    options = parser.parse_args(arguments)
    RECORDS.mkdir(parents=True, exist_ok=True)
    users: dict[Layer, list[str]] = {}
    for name in options.names or [model.name for model in MODELS if model.variant_of is None]:
        try:
            found = layers_of(name)
        except ModelUnavailable as missing:
            print(f"{name}: {missing}")
            continue
        for layer in sorted(found, key=lambda x: -x.flops * found[x])[: options.most]:
            users.setdefault(layer, []).append(f"{name} x{found[layer]}")
    for dtype, (layer, where) in itertools.product(options.dtype, users.items()):
        name = "-".join("x".join(map(str, p)) if isinstance(p, tuple) else str(p) for p in astuple(layer))
        path = RECORDS / f"{dtype}-{name}.json"
        if not options.again and kept(path, "least_us"):
            continue
        record = measure(layer, dtype, options.seconds) | {"models": where}
        path.write_text(json.dumps(record))
        ratio = f"{record['ratio']:.2f} of the best peer" if record["ratio"] else "no peer shows its time"
        print(
            f"{dtype} {record['layer']:44} {record['vivace_us']:9.1f} us  {record['share']:6.1%}  {ratio}", flush=True
        )
    records = [r for path in sorted(RECORDS.glob("*.json")) if (r := kept(path, "least_us"))]
    (RESULTS / "sweep.json").write_text(json.dumps(records, separators=(",", ":")) + "\n")
    (RESULTS / "sweep.md").write_text(markdown(records))
    return 0


def markdown(records: Sequence[Record]) -> str:
    """A table for each data type, the layers that lose most to a peer first, and the geometric means."""
    lines = ["# Layers against oneDNN (OpenVINO) and ONNX Runtime", ""]
    lines += [
        f"{'; '.join(sorted({r['machine'] for r in records}))}; 1 thread. Made by `python -m benchmarks.sweep`.",
        "",
    ]
    for dtype in DTYPES:
        rows = [r for r in records if r["dtype"] == dtype]
        ratios = [r["ratio"] for r in rows if r["ratio"]]
        if not ratios:
            continue
        mean = geometric_mean(ratios)
        lines += [f"## {dtype}: geometric mean {mean:.2f} of the better peer's time, worst {max(ratios):.2f}", ""]
        losing = [r for r in rows if r["ratio"] and r["ratio"] > LOSS]
        lost = ", ".join(r["layer"] for r in sorted(losing, key=lambda r: -r["ratio"]))
        lines += [
            f"* {len(losing)} of {len(ratios)} take more than {LOSS} of the better peer's time{': ' * bool(lost)}{lost}"
        ]
        said = limit_line((r["layer"], r["vivace_us"], min(r["least_us"] / r["vivace_us"], 1)) for r in rows)
        lines += [*([f"* {said}"] if said else []), ""]
        lines.append("| layer | models | vivace us | of peak | openvino us | onnxruntime us | ratio |")
        lines.append("|---|---|---|---|---|---|---|")
        for r in sorted(rows, key=lambda r: -(r["ratio"] or 0)):
            peers = [f"{r[k]:.1f}" if r[k] else "-" for k in ("openvino_us", "onnxruntime_us")]
            ratio = f"{r['ratio']:.2f}" if r["ratio"] else "-"
            lines.append(
                f"| {r['layer']} | {', '.join(r['models'])} | {r['vivace_us']:.1f} | {r['share']:.0%}"
                f" | {' | '.join(peers)} | {ratio} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
