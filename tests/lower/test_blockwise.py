"""Weights with scales per block, from the ONNX file to generated code: MatMulNBits and blocked DequantizeLinear."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tests.lower.harness import BEST, HERE, check, check_engine

import vivace
from vivace.base.dims import evaluate, symbol
from vivace.base.dtypes import DType
from vivace.base.machine import isa
from vivace.graph import reference
from vivace.graph.build import Builder, constant
from vivace.graph.graph import Graph, Type, Value
from vivace.graph.ops.quantized import rounded_to
from vivace.graph.text import print_graph
from vivace.loops.digits import Digits
from vivace.lower.lowering import lower
from vivace.lower.plan import steps_of
from vivace.onnx.exporter import export
from vivace.onnx.importer import import_model
from vivace.optimize.pipeline import optimize
from vivace.targets.cpu.amx import host_isa

Array = np.ndarray
TOLERANCE = 3e-5  # sums of 32 to 300 products of numbers around 1


def weights(k: int, n: int, bits: int, block: int, zeros: str, seed: int = 0) -> list[Value]:
    """Levels, scales and zero points: `none` (the middle), `whole`, or `real`."""
    random, blocks = np.random.default_rng(seed), -(-k // block)
    q = random.integers(0, 1 << bits, (k, n)).astype((DType.u4 if bits == 4 else DType.u8).numpy)
    scale = (random.uniform(0.5, 2, (blocks, n)) / (1 << bits)).astype(np.float32)
    zero = np.full((blocks, n), 1 << (bits - 1), np.float32)
    if zeros == "whole":
        zero = random.integers(0, 1 << bits, (blocks, n)).astype(np.float32)
    if zeros == "real":
        zero = random.uniform(0, 1 << bits, (blocks, n)).astype(np.float32)
    return [constant(x, name) for x, name in ((q, "q"), (scale, "scale"), (zero, "zero"))]


def product(a: Type, made: list[Value], block: int, end: str = "") -> Graph:
    b = Builder()
    x = b.input("x", a)
    y = b.matmul_blocks(x, *made, block=block)
    if end == "bias":
        y = b.relu(b.add(y, constant(np.linspace(-1, 1, y.shape[-1], dtype=np.float32), "bias")))
    if end == "residual":
        y = b.add(y, b.input("r", y.type))
    if end == "rows":
        y = b.mul(y, b.input("r", Type(DType.f32, (*y.shape[:-2], 1, 1))))
    return b.finish([y])


def given(graph: Graph, **dims: int) -> list[Array]:
    random = np.random.default_rng(3)
    return [
        random.standard_normal([d if isinstance(d, int) else dims[str(d)] for d in v.shape], np.float32)
        for v in graph.inputs
    ]


@pytest.mark.parametrize("zeros", ["none", "whole", "real"])
@pytest.mark.parametrize("bits, block", [(4, 32), (4, 128), (8, 16), (8, 64)])
def test_kernels_compute_what_the_op_means(bits: int, block: int, zeros: str) -> None:
    made = weights(160, 70, bits, block, zeros)
    for shape in ((160,), (1, 160), (2, 3, 160), (7, 160), (2, 0, 160)):
        graph = product(Type(DType.f32, shape), made, block, "bias")
        check(graph, *given(graph), isas=HERE, tol=TOLERANCE)


@pytest.mark.parametrize("end", ["bias", "residual", "rows"])
def test_the_number_of_rows_may_be_symbolic(end: str) -> None:
    made = weights(96, 130, 4, 32, "whole")
    graph = product(Type(DType.f32, (symbol("B"), symbol("S"), 96)), made, 32, end)
    for b, s in ((1, 1), (3, 1), (2, 2), (2, 9), (1, 0)):
        check(graph, *given(graph, B=b, S=s), tol=TOLERANCE)
        check_engine(graph, *given(graph, B=b, S=s), tol=TOLERANCE)


@pytest.mark.parametrize("zeros", ["none", "whole", "real"])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, 1e-38, 1e37, 0.0])
def test_numbers_without_digits_take_the_way_of_floats(special: float, zeros: str) -> None:
    made = weights(64, 70, 4, 32, zeros)
    for rows in (1, 3, 8):
        graph = product(Type(DType.f32, (rows, 64)), made, 32)
        (x,) = given(graph)
        x[0, 5] = special
        check(graph, x, isas=HERE, tol=TOLERANCE)
        if abs(special) < 1:
            x[0] = special
            check(graph, x, isas=HERE, tol=TOLERANCE)


def test_rows_that_do_not_lie_evenly() -> None:
    made = weights(64, 33, 8, 32, "none")
    b = Builder()
    x = b.input("x", Type(DType.f32, (3, 64, 2)))
    turned = b.transpose(x, perm=(2, 0, 1))
    y = b.transpose(b.matmul_blocks(turned, *made, block=32), perm=(1, 2, 0))
    graph = b.finish([y])
    check(graph, *given(graph), tol=TOLERANCE)


# ---- from ONNX


def model(nodes: list[Any], constants: dict[str, Array], k: int, n: int, opset: int = 21) -> ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["S", k])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["S", n])
    initializers = [numpy_helper.from_array(v, name) for name, v in constants.items()]
    g = helper.make_graph(nodes, "g", [x], [y], initializers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(g, opset_imports=imports, ir_version=10)


def n_bits(
    k: int, n: int, bits: int, block: int, zeros: str, bias: bool = False, seed: int = 0, level: int = 0
) -> ModelProto:
    random, blocks = np.random.default_rng(seed), -(-k // block)
    constants: dict[str, Array] = {
        "b": random.integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8),
        "s": random.uniform(0.01, 0.02, n * blocks).astype(np.float32),
    }
    if zeros == "packed":
        constants["z"] = random.integers(0, 256, (n, -(-blocks * bits // 8))).astype(np.uint8)
    if zeros == "real":
        constants["z"] = random.uniform(0, 1 << bits, (n, blocks)).astype(np.float32)
    if bias:
        constants["c"] = random.standard_normal(n).astype(np.float32)
    ins = ["x", "b", "s", "z" if "z" in constants else "", "", "c" if bias else ""]
    while not ins[-1]:
        ins.pop()
    node = helper.make_node("MatMulNBits", ins, ["y"], domain="com.microsoft", K=k, N=n, bits=bits, block_size=block)
    if level:
        node.attribute.append(helper.make_attribute("accuracy_level", level))
    return model([node], constants, k, n)


def in_onnxruntime(m: ModelProto, x: Array) -> Array:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # it rounds x to 8 bits else
    session = ort.InferenceSession(m.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def steps(m: ModelProto) -> list[str]:
    return [n.op.name for n in optimize(import_model(m)).nodes]


@pytest.mark.parametrize("zeros", ["", "packed", "real"])
@pytest.mark.parametrize("bits, block", [(2, 32), (4, 16), (4, 32), (4, 256), (8, 32), (8, 128)])
def test_matmul_n_bits(bits: int, block: int, zeros: str) -> None:
    m = n_bits(300, 70, bits, block, zeros, bias=True)
    assert steps(m)[0] == "matmul_blocks"
    engine = vivace.compile(m, providers=("native",), cache=False)
    for rows in (1, 3, 20):
        x = np.random.default_rng(rows).standard_normal((rows, 300), np.float32)
        if bits == 8 and zeros == "real":  # which onnxruntime refuses
            want = reference.evaluate(import_model(m), {"x": x})[0]
        else:
            want = in_onnxruntime(m, x)
        np.testing.assert_allclose(engine.run({"x": x})["y"], want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("level, rounded", [(1, "f32"), (2, "f16"), (3, "bf16"), (4, "i8")])
def test_rows_may_be_rounded_to_what_the_model_says(level: int, rounded: str) -> None:
    graph = optimize(import_model(n_bits(96, 70, 4, 32, "packed", level=level)))
    assert rounded_to(graph.nodes[0].attrs) is DType(rounded)
    assert (f"rounded=@{rounded}" in print_graph(graph)) == (level > 1)
    plan = lower(graph, isa("avx512+avx512_vnni"))
    (digits,) = (s.spec for s in steps_of(plan.body) if isinstance(s.spec, Digits))
    assert digits.layout.few == {"f32": 3, "i8": 1}.get(rounded, 2)


@pytest.mark.skipif(not host_isa().has("avx512_vnni"), reason="few rows are multiplied in f32 here")
def test_rows_of_bytes_are_as_near_as_those_of_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIVACE_CHECK", "1")
    x = np.random.default_rng(0).standard_normal((1, 320), np.float32)
    exact, rounded = (n_bits(320, 70, 4, 32, "packed", level=level) for level in (0, 4))
    want = in_onnxruntime(exact, x)
    theirs = ort.InferenceSession(rounded.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    ours = vivace.compile(rounded, providers=("native",), cache=False).run({"x": x})["y"]
    off, their_off = (float(np.sqrt(np.mean((y - want) ** 2))) for y in (ours, theirs[0]))
    assert 1e-4 < off <= 1.25 * their_off


def test_reordered_blocks_go_to_onnxruntime_and_say_so() -> None:
    m = n_bits(64, 8, 4, 32, "packed")
    m.graph.initializer.append(numpy_helper.from_array(np.zeros(64, np.int32), "g"))
    m.graph.node[0].input.append("g")
    (node,) = import_model(m).nodes
    assert node.op.name == "onnx" and "reordered" in node.attrs["reason"]


def blocked(kind: int, axis: int, zeros: bool, gemm: bool = False, scale: type = np.float32) -> ModelProto:
    """x @ DequantizeLinear(w), blocks of 32 along k."""
    random, k, n = np.random.default_rng(kind), 96, 40
    shape, per = ((k, n), (3, n)) if axis == 0 else ((n, k), (n, 3))
    low, high = {TensorProto.INT4: (-8, 7), TensorProto.UINT4: (0, 15), TensorProto.INT8: (-128, 127)}.get(
        kind, (0, 255)
    )
    q, z = (random.integers(low, high + 1, s) for s in (shape, per))
    tensors = [helper.make_tensor(name, kind, v.shape, v.reshape(-1)) for name, v in (("q", q), ("z", z))]
    ins = ["q", "s", "z"] if zeros else ["q", "s"]
    nodes = [helper.make_node("DequantizeLinear", ins, ["w0"], axis=axis, block_size=32)]
    if scale is np.float16:
        nodes.append(helper.make_node("Cast", ["w0"], ["w"], to=TensorProto.FLOAT))
    else:
        nodes[0].output[0] = "w"
    if gemm:
        nodes.append(helper.make_node("Gemm", ["x", "w"], ["y"], transB=axis))
    elif axis == 1:
        nodes += [
            helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ]
    else:
        nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"]))
    m = model(nodes, {"s": random.uniform(0.01, 0.02, per).astype(scale)}, k, n)
    m.graph.initializer.extend(tensors[: 2 if zeros else 1])
    return m


@pytest.mark.parametrize("gemm", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8, TensorProto.UINT8])
def test_blocked_dequantize_linear_stays_packed(kind: int, axis: int, zeros: bool, gemm: bool) -> None:
    m = blocked(kind, axis, zeros, gemm)
    assert steps(m) == ["matmul_blocks"]
    x = np.random.default_rng(1).standard_normal((2, 96), np.float32)
    want = in_onnxruntime(m, x)
    np.testing.assert_allclose(reference.evaluate(import_model(m), {"x": x})[0], want, rtol=1e-4, atol=1e-4)
    got = vivace.compile(m, providers=("native",), cache=False).run({"x": x})["y"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [96, 256, 100])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("kind", [TensorProto.INT8, TensorProto.UINT8])
def test_weights_with_a_scale_per_column_stay_packed(kind: int, per_column: bool, axis: int, k: int) -> None:
    """Unless they are no whole blocks."""
    random, n = np.random.default_rng(k), 40
    q = random.integers(-127, 128, (k, n) if axis else (n, k)) + (128 if kind == TensorProto.UINT8 else 0)
    zero = 130 if kind == TensorProto.UINT8 else 0
    nodes = [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], **({"axis": axis} if per_column else {}))]
    if not axis:
        nodes.append(helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["x", "w" if axis else "t"], ["y"]))
    size = (n,) if per_column else ()
    m = model(nodes, {"s": random.uniform(0.01, 0.02, size).astype(np.float32)}, k, n)
    tensors = (("q", q), ("z", np.full(size, zero)))
    m.graph.initializer.extend(helper.make_tensor(name, kind, v.shape, v.reshape(-1)) for name, v in tensors)
    assert steps(m) == (["matmul_blocks"] if k % 32 == 0 else ["matmul"])
    engine = vivace.compile(m, providers=("native",), cache=False)
    for rows in (1, 2, 7):
        x = random.standard_normal((rows, k), np.float32)
        got = engine.run({"x": x})["y"]
        np.testing.assert_allclose(got, in_onnxruntime(m, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zeros", ["", "packed", "real"])
@pytest.mark.parametrize("k, bits", [(96, 4), (100, 4), (96, 8)])
def test_export_is_portable_and_comes_back(k: int, bits: int, zeros: str) -> None:
    graph = import_model(n_bits(k, 40, bits, 32, zeros))
    again = export(graph)
    assert {n.domain for n in again.graph.node} == {""}
    x = np.random.default_rng(1).standard_normal((2, k), np.float32)
    want = reference.evaluate(graph, {"x": x})[0]
    np.testing.assert_allclose(in_onnxruntime(again, x), want, rtol=1e-4, atol=1e-4)
    assert (steps(again) == ["matmul_blocks"]) == (k % 32 == 0 and zeros != "real")


def test_bf16_values_meet_weights_rounded_to_bf16() -> None:
    made = weights(96, 64, 4, 32, "whole")
    b = Builder()
    x = b.input("x", Type(DType.f32, (symbol("S"), 96)))
    more = weights(64, 70, 8, 32, "none")
    y = b.matmul_blocks(b.relu(b.matmul_blocks(x, *made, block=32)), *more, block=32)
    graph = b.finish([y])
    engine = vivace.compile(graph, precision="bf16", cache=False)  # type: ignore[arg-type]
    f32 = vivace.compile(graph, cache=False)  # type: ignore[arg-type]
    for rows in (1, 4, 40):
        v = np.random.default_rng(rows).standard_normal((rows, 96), np.float32)
        (got,), (want,) = engine.run({"x": v}).values(), f32.run({"x": v}).values()
        assert np.abs(got - want).max() <= 2.0**-7 * np.abs(want).max()


def test_packed_weights_take_their_bits() -> None:
    made = weights(1024, 256, 4, 32, "none")
    made[1] = constant(np.full((32, 256), 0.5, np.float32), "scale")
    plan = check(product(Type(DType.f32, (1, 1024)), made, 32), np.ones((1, 1024), np.float32), tol=1e-3)
    n_bytes = sum(s.data.nbytes for s in plan.storages if s.data is not None)
    assert n_bytes == 1024 * 256 // 2 + 32 * 256 * (2 if BEST != "sse" else 4)


def test_levels_are_stored_one_per_byte() -> None:
    assert weights(32, 4, 4, 32, "none")[0].data is not None
    assert DType.u4.numpy == np.dtype(ml_dtypes.uint4)


def test_rows_are_split_once_for_the_products_that_share_them() -> None:
    b = Builder()
    x = b.input("x", Type(DType.f32, (symbol("S"), 96)))
    made = [weights(96, n, 4, 32, "real") for n in (40, 70)]
    ys = [b.matmul_blocks(b.input("one", Type(DType.f32, (1, 96))), *made[0], block=32)]
    ys += [b.matmul_blocks(x, *w, block=32) for w in made]
    graph = b.finish(ys)

    def labels(target: str) -> list[str]:
        return [s.label for s in steps_of(lower(graph, isa(target)).body)]

    assert labels("avx512+amx_bf16+amx_tile") == ["matmul_blocks", "split", "matmul_blocks", "matmul_blocks"]
    assert "split" not in labels("avx512")
    apart = lower(graph, isa("avx512+amx_bf16+amx_tile"), frozenset({"shared_rows"}))
    assert [s.label for s in steps_of(apart.body)].count("split") == 2


def test_digits_are_made_once_for_the_products_that_share_rows() -> None:
    b = Builder()
    x = b.input("x", Type(DType.f32, (symbol("S"), 96)))
    made = [weights(96, n, 4, 32, zeros) for n, zeros in ((40, "real"), (70, "real"), (40, "none"))]
    graph = b.finish([b.matmul_blocks(x, *w, block=32) for w in made])

    def digits(target: str, *without: str) -> list[Digits]:
        steps = steps_of(lower(graph, isa(target), frozenset(without)).body)
        return [s.spec for s in steps if isinstance(s.spec, Digits)]

    assert [d.center for d in digits("avx512+avx512_vnni")] == [0, 8]  # what sums start from differs
    assert len(digits("avx512+avx512_vnni", "shared_rows")) == 3
    assert not digits("avx512")
    assert [evaluate(digits("avx512+avx512_vnni")[0].units, {"S": n}) for n in (0, 1, 4, 5, 40)] == [0, 1, 4, 0, 0]
