"""Quantized graphs in integers: to the last bit what the rewritten graph says, at most one quantum from the graph as
it was written, equal to ONNX Runtime's QLinear operators."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import vivace
from vivace.base.dtypes import DType
from vivace.base.machine import host, isa, missing_flags
from vivace.building import make_plan, optimize_for_native
from vivace.graph.graph import Graph
from vivace.graph.reference import evaluate
from vivace.graph.rewrite import Example
from vivace.loops.contraction import Contraction
from vivace.loops.kernel import Binary, Const, Read, Unary, walk
from vivace.loops.reference import value_of
from vivace.lower.magnitude import magnitude
from vivace.lower.plan import steps_of
from vivace.lower.requantize import rounded_product
from vivace.onnx.importer import import_model
from vivace.optimize.pipeline import optimize

ort = pytest.importorskip("onnxruntime")
Array = np.ndarray
U8, S8 = np.uint8, np.int8
each_target = pytest.mark.parametrize(
    "target", [n for n in ("sse", "avx2", "avx512", "host") if n == "host" or not missing_flags(host(), isa(n))]
)


def numbers(seed: int, dtype: type, *shape: int) -> Array:
    """Random bytes, half of them extreme."""
    random = np.random.default_rng(seed)
    limits = np.iinfo(dtype)
    anything = random.integers(limits.min, limits.max + 1, shape)
    extremes = random.choice([limits.min, limits.max], shape)
    return np.where(random.random(shape) < 0.5, anything, extremes).astype(dtype)


class Model:
    """A model under construction; every operand but the input is an initializer."""

    def __init__(self, dtype: type, shape: tuple[int, ...]) -> None:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.inputs = [helper.make_tensor_value_info("x", kind, shape)]
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def const(self, data: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(data), name))
        return name

    def emit(self, op: str, *ins: str, domain: str = "", **attrs: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(ins), [name], domain=domain, **attrs))
        return name

    def add_input(self, name: str, dtype: type, shape: tuple[int, ...]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape))
        return name

    def finish(self, y: str, dtype: type) -> onnx.ModelProto:
        out = helper.make_tensor_value_info(y, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None)
        graph = helper.make_graph(self.nodes, "g", self.inputs, [out], self.constants)
        domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=8)
        return onnx.shape_inference.infer_shapes(model)


def dequantized(m: Model, q: str, scale: Any, zero: Any, **attrs: Any) -> str:
    return m.emit("DequantizeLinear", q, m.const(np.float32(scale)), m.const(zero), **attrs)


def quantized(m: Model, x: str, scale: float, zero: Any) -> str:
    return m.emit("QuantizeLinear", x, m.const(np.float32(scale)), m.const(zero))


def ran_by_ort(model: onnx.ModelProto, feeds: dict[str, Array], level: int = 0) -> Array:
    options = ort.SessionOptions()
    options.graph_optimization_level = [
        ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    ][level]  # fmt: skip
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def compiled(model: onnx.ModelProto | Graph, feeds: dict[str, Array], target: str, threads: int = 2) -> Array:
    engine = vivace.compile(
        model if isinstance(model, Graph) else model.SerializeToString(),
        target=target,
        threads=threads,
        providers="native",
    )
    (found,) = engine.run(feeds).values()
    return np.asarray(found)


def gap(a: Array, b: Array) -> int:
    assert a.shape == b.shape and a.dtype == b.dtype
    return int(np.abs(a.astype(np.int64) - b.astype(np.int64)).max(initial=0))


def check(model: onnx.ModelProto, feeds: dict[str, Array], target: str, quanta: int = 1, rare: int = 0) -> list[str]:
    """Compares a model with an integer result; the ops that the native graph has. `rare`: how far one result in 100
    may be from the native graph, whose nodes round one by one."""
    graph = import_model(model.SerializeToString())
    native = optimize(graph)
    got = compiled(model, feeds, target)
    expected = evaluate(native, feeds)[0]
    assert gap(got, expected) <= rare and np.mean(got != expected) <= 0.01
    assert gap(got, evaluate(graph, feeds)[0]) <= quanta
    assert gap(got, ran_by_ort(model, feeds)) <= quanta
    return [n.op.name for n in native.nodes]


CONVOLUTIONS = [
    # channels, filters, groups, kernel, stride, dilation, pad
    (8, 20, 1, 3, 1, 1, 1),
    (3, 33, 1, 7, 2, 1, 3),
    (16, 48, 1, 1, 1, 1, 0),
    (12, 24, 3, 3, 1, 1, 1),
    (40, 40, 40, 3, 2, 1, 1),
    (17, 17, 17, 5, 1, 2, 4),
    (6, 1, 1, 3, 1, 2, 0),
]


def convolution(case: tuple[int, ...], x_dtype: type, bias: bool, per_channel: bool) -> tuple[Any, dict[str, Array]]:
    c, oc, groups, k, stride, dilation, pad = case
    random = np.random.default_rng(c * oc)
    m = Model(x_dtype, (2, c, 11, 13))
    zero = x_dtype(7) if x_dtype is U8 else x_dtype(-3)
    w = numbers(oc, S8, oc, c // groups, k, k)
    scales = random.uniform(0.01, 0.03, oc if per_channel else 1).astype(np.float32)
    scales = scales if per_channel else scales.reshape(())
    axis: dict[str, Any] = {"axis": 0} if per_channel else {}
    ins = [dequantized(m, "x", 0.04, zero), dequantized(m, m.const(w), scales, np.zeros(scales.shape, S8), **axis)]
    if bias:
        b = random.integers(-30000, 30000, oc).astype(np.int32)
        wide = np.broadcast_to(np.float32(0.04) * scales, (oc,)).astype(np.float32)
        ins.append(dequantized(m, m.const(b), wide, np.zeros(oc, np.int32), axis=0))
    y = m.emit("Conv", *ins, strides=[stride] * 2, dilations=[dilation] * 2, pads=[pad] * 4, group=groups)
    y = quantized(m, m.emit("Relu", y), 3.7, U8(0) if x_dtype is U8 else S8(-9))
    return m.finish(y, x_dtype), {"x": numbers(1, x_dtype, 2, c, 11, 13)}


@each_target
@pytest.mark.parametrize("x_dtype", [U8, S8])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions(target: str, x_dtype: type, case: tuple[int, ...]) -> None:
    model, feeds = convolution(case, x_dtype, bias=True, per_channel=True)
    assert "conv_integer" in check(model, feeds, target)


@pytest.mark.parametrize(("bias", "per_channel"), [(False, False), (True, False), (False, True)])
def test_bias_and_scales_may_be_left_out(bias: bool, per_channel: bool) -> None:
    model, feeds = convolution(CONVOLUTIONS[0], U8, bias, per_channel)
    assert "conv_integer" in check(model, feeds, "host")


@each_target
@pytest.mark.parametrize("x_dtype", [U8, S8])
def test_padding_holds_the_zero_point(target: str, x_dtype: type) -> None:
    """An input that is zero everywhere gives the bias everywhere, the border included."""
    model, feeds = convolution(CONVOLUTIONS[0], x_dtype, bias=True, per_channel=True)
    feeds["x"][...] = 7 if x_dtype is U8 else -3
    got = compiled(model, feeds, target)
    assert (got == got[:1, :, :1, :1]).all()


def qlinear_conv(x_dtype: type) -> tuple[onnx.ModelProto, dict[str, Array]]:
    m = Model(x_dtype, (1, 8, 9, 9))
    random = np.random.default_rng(5)
    zero = m.const(x_dtype(5))
    w, w_scale = m.const(numbers(2, S8, 24, 8, 3, 3)), m.const(random.uniform(0.01, 0.03, 24).astype(np.float32))
    bias = m.const(random.integers(-30000, 30000, 24).astype(np.int32))
    y = m.emit("QLinearConv", "x", m.const(np.float32(0.04)), zero, w, w_scale, m.const(np.zeros(24, S8)),
               m.const(np.float32(3.1)), m.const(x_dtype(11)), bias, pads=[1] * 4)  # fmt: skip
    return m.finish(y, x_dtype), {"x": numbers(3, x_dtype, 1, 8, 9, 9)}


@each_target
@pytest.mark.parametrize("x_dtype", [U8, S8])
def test_qlinear_conv_is_that_of_onnxruntime(target: str, x_dtype: type) -> None:
    model, feeds = qlinear_conv(x_dtype)
    np.testing.assert_array_equal(compiled(model, feeds, target), ran_by_ort(model, feeds))


@each_target
@pytest.mark.parametrize("x_dtype", [U8, S8])
@pytest.mark.parametrize(("m_rows", "k", "n"), [(1, 5, 3), (37, 64, 96), (19, 515, 40)])
def test_matrix_products(target: str, x_dtype: type, m_rows: int, k: int, n: int) -> None:
    random = np.random.default_rng(k)
    m = Model(x_dtype, (2, m_rows, k))
    scales = random.uniform(0.01, 0.03, n).astype(np.float32)
    w = dequantized(m, m.const(numbers(4, S8, k, n)), scales, np.zeros(n, S8), axis=1)
    y = m.emit("MatMul", dequantized(m, "x", 0.05, x_dtype(3)), w)
    bias = random.integers(-9000, 9000, n).astype(np.int32)
    y = m.emit("Add", y, dequantized(m, m.const(bias), np.float32(0.05) * scales, np.zeros(n, np.int32), axis=0))
    model = m.finish(quantized(m, y, 1.9, x_dtype(20)), x_dtype)
    ops = check(model, {"x": numbers(5, x_dtype, 2, m_rows, k)}, target)
    assert "matmul_integer" in ops and "dequantize" not in ops


@each_target
def test_dynamic_quantization(target: str) -> None:
    """The zero point is only known at run time; sums and rounding are exact, the products with the scale in f32."""
    m = Model(np.float32, (3, 21, 64))
    m.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]))
    total = m.emit("MatMulInteger", "q", m.const(numbers(4, S8, 64, 50)), "z", m.const(np.full(50, 0, S8)))
    number = m.emit("Cast", total, to=TensorProto.FLOAT)
    y = m.emit("Mul", number, m.emit("Mul", "s", m.const(np.float32(0.02))))
    model = m.finish(y, np.float32)
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 21, 64)).astype(np.float32)}
    assert "matmul_integer" in [n.op.name for n in optimize(import_model(model.SerializeToString())).nodes]
    np.testing.assert_allclose(compiled(model, feeds, target), ran_by_ort(model, feeds), rtol=1e-6, atol=1e-6)


def residual_block(scale: float = 0.8) -> tuple[onnx.ModelProto, dict[str, Array]]:
    m = Model(U8, (1, 32, 9, 9))
    x = dequantized(m, "x", 0.05, U8(9))
    y = x
    for i, k in enumerate((1, 3)):
        w = dequantized(
            m, m.const(numbers(i, S8, 32, 32, k, k)), np.full(32, 0.01, np.float32), np.zeros(32, S8), axis=0
        )
        y = m.emit("Conv", y, w, pads=[k // 2] * 4)
        y = dequantized(m, quantized(m, y, 1.3, U8(120)), 1.3, U8(120))
    y = m.emit("Relu", m.emit("Add", y, x))
    return m.finish(quantized(m, y, scale, U8(0)), U8), {"x": numbers(9, U8, 1, 32, 9, 9)}


@each_target
def test_a_residual_block_has_no_step_but_its_convolutions(target: str) -> None:
    model, feeds = residual_block()
    # Two roundings one after the other, the first one of 1.6 quanta of the second. A sum in 16
    # is 1.625 i + j / 16 just between two quanta, where it decides whether products are rounded before they are added.
    check(model, feeds, target, quanta=2, rare=1)
    engine = vivace.compile(model.SerializeToString(), target=target, providers="native")
    labels = [e.kernel.split(":")[1] for e in engine.profile(feeds)]
    assert [x for x in labels if x not in ("copy", "fill", "conv_integer")] == []
    assert labels.count("conv_integer") == 2


def test_a_residual_sum_takes_few_operations() -> None:
    """The sum of the convolution, as it is rounded on the way, and the residual: three multiply-adds, no
    rounding of its own but the last."""
    model, _ = residual_block()
    plan = make_plan(optimize_for_native(import_model(model.SerializeToString())), isa("avx2"), ("native",))
    last = [s.spec for s in steps_of(plan.body) if isinstance(s.spec, Contraction)][-1]
    assert last.epilogue is not None
    found = Counter(e.fn if isinstance(e, (Unary, Binary)) else type(e).__name__ for e in walk(last.epilogue))
    assert (found["Fma"], found["round"], found["mul"]) == (3, 1, 0)


def test_rounding_by_addition_is_rounding() -> None:
    """Also halves, what is clipped, and what is too large for f32 to have fractions."""
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 300, 4e6, 2e7, 3e38, -3e38, -128.5, 129.49], np.float32)
    product = Binary("mul", Read("x", DType.f32), Read("s", DType.f32))
    low, high = Const(-128.0, DType.f32), Const(127.0, DType.f32)
    rounded = Unary("round", Binary("min", Binary("max", product, low), high))
    brief = rounded_product(rounded)
    assert brief is not None
    for s in (1, -1, 0.37):
        names = {"x": x, "s": np.float32(s)}
        np.testing.assert_array_equal(value_of(brief, {}, {}, names), value_of(rounded, {}, {}, names))


def test_limits_between_whole_numbers_are_no_place_to_round_by_addition() -> None:
    product = Binary("mul", Read("x", DType.f32), Const(2.0, DType.f32))
    clipped = Binary("min", Binary("max", product, Const(-1.5, DType.f32)), Const(9.0, DType.f32))
    assert rounded_product(Unary("round", clipped)) is None


@each_target
@pytest.mark.parametrize("x_dtype", [U8, S8])
def test_bytes_pass_through_movement_and_pools(target: str, x_dtype: type) -> None:
    m = Model(x_dtype, (1, 6, 8, 8))
    m.add_input("x2", x_dtype, (1, 2, 8, 8))
    zero = x_dtype(4)
    x, x2 = (dequantized(m, v, 0.25, zero) for v in ("x", "x2"))
    y = m.emit("Concat", x, x2, axis=1)
    y = m.emit("MaxPool", y, kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2])
    y = m.emit("Transpose", y, perm=[0, 2, 3, 1])
    y = m.emit("Reshape", y, m.const(np.array([16, 8])))
    model = m.finish(quantized(m, y, 0.25, zero), x_dtype)
    feeds = {"x": numbers(1, x_dtype, 1, 6, 8, 8), "x2": numbers(2, x_dtype, 1, 2, 8, 8)}
    ops = check(model, feeds, target, quanta=0)
    assert not {"quantize", "dequantize"} & set(ops)


def test_operands_of_a_concatenation_take_its_scale() -> None:
    m = Model(U8, (1, 6, 4, 4))
    m.add_input("x2", U8, (1, 3, 4, 4))
    x, x2 = dequantized(m, "x", 0.25, U8(4)), dequantized(m, "x2", 0.125, U8(100))
    model = m.finish(quantized(m, m.emit("Concat", x, x2, axis=1), 0.3, U8(50)), U8)
    check(model, {"x": numbers(1, U8, 1, 6, 4, 4), "x2": numbers(2, U8, 1, 3, 4, 4)}, "host")


@each_target
@pytest.mark.parametrize("n", [*range(1, 19), 31, 33, 65])
def test_a_last_vector_of_any_width_stays_in_bounds(target: str, n: int) -> None:
    """Channels of a depthwise convolution and columns of a product; pixels lie side by side, so that a store that is
    too wide would show in the next one."""
    model, feeds = convolution((n, n, n, 3, 1, 1, 1), U8, bias=True, per_channel=True)
    check(model, feeds, target)
    m = Model(U8, (6, 8))
    y = m.emit("MatMul", dequantized(m, "x", 0.05, U8(3)), dequantized(m, m.const(numbers(n, S8, 8, n)), 0.02, S8(0)))
    check(m.finish(quantized(m, y, 1.5, U8(90)), U8), {"x": numbers(5, U8, 6, 8)}, target)


def test_activations_between_integers() -> None:
    chains: list[tuple[str, dict[str, Any]]] = [
        ("Sigmoid", {}),
        ("HardSwish", {}),
        ("Tanh", {}),
        ("LeakyRelu", {"alpha": 0.1}),
    ]
    for op, attrs in chains:
        m = Model(U8, (3, 40))
        y = m.emit(op, dequantized(m, "x", 0.05, U8(128)), **attrs)
        check(m.finish(quantized(m, y, 0.02, U8(100)), U8), {"x": np.arange(120, dtype=U8).reshape(3, 40) * 2}, "host")


def test_weights_with_a_zero_point() -> None:
    """Unsigned weights around 128 fit i8; those around 5 do not, and stay in f32."""
    for zero, ops in ((128, "matmul_integer"), (5, "matmul")):
        m = Model(U8, (4, 32))
        w = dequantized(m, m.const(numbers(3, U8, 32, 24)), 0.02, U8(zero))
        model = m.finish(quantized(m, m.emit("MatMul", dequantized(m, "x", 0.05, U8(3)), w), 1.5, U8(90)), U8)
        assert ops in check(model, {"x": numbers(5, U8, 4, 32)}, "host")


@pytest.mark.parametrize(("depth", "op"), [(32, "matmul_blocks"), (30, "matmul")])
def test_weights_alone_stay_bytes_in_whole_blocks_and_else_fold(depth: int, op: str) -> None:
    m = Model(np.float32, (4, depth))
    y = m.emit("MatMul", "x", dequantized(m, m.const(numbers(3, S8, depth, 24)), 0.02, S8(0)))
    model = m.finish(y, np.float32)
    feeds = {"x": np.random.default_rng(0).standard_normal((4, depth)).astype(np.float32)}
    assert [n.op.name for n in optimize(import_model(model.SerializeToString())).nodes] == [op]
    np.testing.assert_allclose(compiled(model, feeds, "host"), ran_by_ort(model, feeds), rtol=1e-4, atol=1e-4)


def test_sums_that_may_not_fit_stay_in_floats() -> None:
    e = Example()
    depth = 70_000
    x = e.dequantize(e.x(f"u8[1,{depth}]"), e.const(np.float32(1)), e.const(U8(0)))
    w = e.dequantize(e.const(np.full((depth, 1), 127, S8)), e.const(np.float32(1)), e.const(S8(0)))
    graph = e.finish([e.matmul(x, w)])
    assert "matmul_integer" not in [n.op.name for n in optimize(graph).nodes]


def test_thread_counts_agree() -> None:
    model, feeds = residual_block()
    wanted = compiled(model, feeds, "host", threads=1)
    for threads in (2, 3, 5):
        np.testing.assert_array_equal(compiled(model, feeds, "host", threads=threads), wanted)


@each_target
@pytest.mark.parametrize("dtype", [U8, S8])
@pytest.mark.parametrize("channels", [3, 4])
def test_an_image_is_read_four_bytes_a_pixel(target: str, dtype: type, channels: int) -> None:
    m = Model(np.float32, (2, channels, 19, 21))
    zero = dtype(113) if dtype is U8 else dtype(-128)
    x = dequantized(m, quantized(m, "x", 0.02, zero), 0.02, zero)
    w = dequantized(m, m.const(numbers(2, S8, 16, channels, 3, 3)), 0.01, S8(0))
    y = quantized(m, m.emit("Conv", x, w, strides=[2, 2], pads=[1] * 4), 0.11, dtype(5))
    image = np.random.default_rng(0).standard_normal((2, channels, 19, 21)).astype(np.float32) * 3
    image[0, :, 0, :4] = [np.inf, -np.inf, 1e30, -1e30]
    model = m.finish(y, dtype)
    check(model, {"x": image}, target)
    labels = {line.label for line in vivace.compile(model.SerializeToString(), target=target).image.lines}
    assert ("pixels" in labels) == (channels == 3)


def test_what_follows_bytes_element_by_element_is_one_table() -> None:
    """A hard swish and a scale, in parts that are each quantized: one epilogue, equal to the parts to the last bit."""
    m = Model(U8, (1, 8, 9, 9))
    w = dequantized(m, m.const(numbers(2, S8, 80, 8, 3, 3)), 0.01, S8(0))
    y = quantized(m, m.emit("Conv", dequantized(m, "x", 0.02, U8(3)), w, pads=[1] * 4), 0.05, U8(120))
    x = dequantized(m, y, 0.05, U8(120))
    gate = m.emit("Clip", m.emit("Add", x, m.const(np.float32(3))), m.const(np.float32(0)), m.const(np.float32(6)))
    gate = dequantized(m, quantized(m, gate, 0.03, U8(0)), 0.03, U8(0))
    x = dequantized(m, quantized(m, m.emit("Mul", x, gate), 0.2, U8(10)), 0.2, U8(10))
    x = m.emit("Mul", x, dequantized(m, m.const(U8([40])), 0.05, U8(0)))
    model = m.finish(quantized(m, x, 0.3, U8(9)), U8)
    feeds = {"x": numbers(1, U8, 1, 8, 9, 9)}
    # A neighbour of the convolution's result may be a whole step of the parts after it, each 0.2 * 2 / 0.3 quanta.
    ops = check(model, feeds, "host", quanta=3)
    assert ops.count("lookup") == 1 and "dequantize" not in ops
    engine = vivace.compile(model.SerializeToString())
    assert [line.label for line in engine.image.lines if line.label not in ("fill", "copy")] == ["conv_integer"]


@each_target
@pytest.mark.parametrize("dtype", [U8, S8])
def test_means_and_nearest_neighbours_read_bytes(target: str, dtype: type) -> None:
    m = Model(dtype, (2, 20, 6, 7))
    x = dequantized(m, "x", 0.07, dtype(9))
    sizes = m.const(np.array([2, 20, 12, 14], np.int64))
    large = m.emit("Resize", x, "", "", sizes, mode="nearest", nearest_mode="floor",
                   coordinate_transformation_mode="asymmetric")  # fmt: skip
    large = dequantized(m, quantized(m, large, 0.07, dtype(9)), 0.07, dtype(9))
    model = m.finish(quantized(m, m.emit("GlobalAveragePool", large), 0.03, dtype(1)), dtype)
    feeds = {"x": numbers(4, dtype, 2, 20, 6, 7)}
    assert "dequantize" not in check(model, feeds, target)
    engine = vivace.compile(model.SerializeToString(), target=target)
    assert {line.label for line in engine.image.lines} <= {"resize", "reduce_mean", "avg_pool", "copy"}
    assert not any(p.reason for p in engine.placement)


def test_an_epilogue_ends_with_the_bytes_that_it_makes() -> None:
    """Of two convolutions that are added the first stores bytes, not what they stand for in f32."""
    m = Model(U8, (1, 16, 8, 8))
    parts = []
    for seed in (1, 2):
        w = dequantized(m, m.const(numbers(seed, S8, 32, 16, 1, 1)), 0.01, S8(0))
        y = quantized(m, m.emit("Conv", dequantized(m, "x", 0.02, U8(3)), w), 0.05, U8(120))
        parts.append(dequantized(m, y, 0.05, U8(120)))
    model = m.finish(quantized(m, m.emit("Add", *parts), 0.09, U8(100)), U8)
    check(model, {"x": numbers(1, U8, 1, 16, 8, 8)}, "host")
    lines = vivace.compile(model.SerializeToString()).image
    assert [line.label for line in lines.lines if line.label != "copy"] == ["conv_integer", "conv_integer"]
    assert max(s.n_bytes for s in lines.storages if s.kind == "arena") == 32 * 8 * 8


@each_target
def test_rounded_rows_are_one_step(target: str) -> None:
    """A softmax whose result is quantized and dequantized, and a normalization that is stored as bytes."""
    m = Model(np.float32, (2, 5, 70))
    p = dequantized(m, quantized(m, m.emit("Softmax", "x", axis=-1), 1 / 255, U8(0)), 1 / 255, U8(0))
    w = np.random.default_rng(0).standard_normal((70, 37)).astype(np.float32)
    n = m.emit("LayerNormalization", m.emit("MatMul", p, m.const(w)), m.const(np.ones(37, np.float32)), axis=-1)
    model = m.finish(quantized(m, n, 0.02, U8(128)), U8)
    x = np.random.default_rng(1).standard_normal((2, 5, 70)).astype(np.float32) * 3
    graph = import_model(model.SerializeToString())
    assert gap(compiled(model, {"x": x}, target), evaluate(graph, {"x": x})[0]) <= 1
    engine = vivace.compile(model.SerializeToString(), target=target)
    assert [line.label for line in engine.image.lines] == ["softmax", "matmul", "layer_norm"]


@each_target
@pytest.mark.parametrize("dtype", [U8, S8])
@pytest.mark.parametrize("op", ["MatMulInteger", "ConvInteger"])
def test_casts_of_sums_to_bytes_wrap(target: str, op: str, dtype: type) -> None:
    """Without limits of its own a cast keeps the low byte of a sum; it does not saturate."""
    if op == "MatMulInteger":
        m, w = Model(U8, (5, 40)), numbers(1, S8, 40, 64)
        y = m.emit(op, "x", m.const(w))
        feeds = {"x": numbers(2, U8, 5, 40)}
        sums = feeds["x"].astype(np.int32) @ w.astype(np.int32)
    else:
        m, w = Model(U8, (1, 64, 6, 7)), numbers(1, S8, 64, 1, 3, 3)
        y = m.emit(op, "x", m.const(w), group=64)
        feeds = {"x": numbers(2, U8, 1, 64, 6, 7)}
        windows = np.lib.stride_tricks.sliding_window_view(feeds["x"].astype(np.int32), (3, 3), (2, 3))
        sums = np.einsum("nchwij,cij->nchw", windows, w[:, 0].astype(np.int32))
    to = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = m.finish(m.emit("Cast", y, to=to), dtype)
    np.testing.assert_array_equal(compiled(model, feeds, target), sums.astype(dtype))


def test_what_is_rounded_anyway_is_multiplied_and_not_divided() -> None:
    """The scale of a `quantize` after a norm is a factor, and what a norm makes is known to fit i32."""

    def normalized(e: Example) -> object:
        y = e.layer_norm(e.x("f32[3,40]"), e.w("f32[40]"), axis=1, epsilon=1e-5)
        return e.quantize(y, e.const(np.float32(0.03)), e.const(np.uint8(9)))

    graph = optimize(Example().graph(normalized))
    (q,) = (n for n in graph.nodes if n.op.name == "quantize")
    assert q.inputs[1] is not None and q.inputs[1].data == 1
    assert magnitude(q.inputs[0], graph.producers()) < 1e4
    feed = np.random.default_rng(0).standard_normal((3, 40), np.float32)
    (want,) = evaluate(graph, [feed])
    (got,) = vivace.compile(graph).run({"x0": feed}).values()
    assert np.abs(got.astype(int) - want).max() <= 1
