"""Operators of com.microsoft and quantized operators against ONNX Runtime, which defines them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto
from tests.onnx.making import model, node, value

from vivace.graph.reference import evaluate
from vivace.graph.verify import verify
from vivace.onnx.importer import import_model

RNG = np.random.default_rng(7)
DOMAIN = "com.microsoft"


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def check(m: ModelProto, feed: dict[str, np.ndarray], atol: float = 2e-5, levels: int = 0) -> None:
    """Our outputs and ONNX Runtime's agree; `levels` is how far integers may differ where rounding meets a tie."""
    m.ir_version = 10
    g = import_model(m)
    verify(g)
    assert not any(n.op.name == "onnx" for n in g.walk())
    session = ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])
    for got, want in zip(evaluate(g, feed), session.run(None, feed), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        if want.dtype.kind == "f":
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=atol)
        else:
            assert np.abs(got.astype(np.int64) - want.astype(np.int64)).max() <= levels


def single(
    op: str, feed: dict[str, np.ndarray], constants: dict[str, np.ndarray], order: str, n_outputs: int = 1, **attrs: Any
) -> ModelProto:
    outputs = [f"y{i}" for i in range(n_outputs)]
    inputs = [value(n, a.shape) for n, a in feed.items()]
    n = node(op, order, " ".join(outputs), domain=DOMAIN, **attrs)
    return model([n], inputs, [value(o, None) for o in outputs], constants, com_microsoft=1)


@pytest.mark.parametrize("op", ["Gelu", "FastGelu", "QuickGelu"])
def test_activations(op: str) -> None:
    check(single(op, {"x": f32(3, 8)}, {}, "x"), {"x": f32(3, 8)}, atol=1e-3 if op == "FastGelu" else 1e-5)


def test_bias_gelu() -> None:
    check(single("BiasGelu", {"x": f32(3, 8)}, {"b": f32(8)}, "x b"), {"x": f32(3, 8)})


@pytest.mark.parametrize("op", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_skip_normalization(op: str) -> None:
    feed = {"x": f32(2, 3, 8), "s": f32(2, 3, 8)}
    constants = {"g": f32(8), "b": f32(8), "c": f32(8)}
    order = "x s g b c" if op == "SkipLayerNormalization" else "x s g c"
    m = model(
        [node(op, order, "y _ _ total", domain=DOMAIN, epsilon=1e-5)],
        [value(n, a.shape) for n, a in feed.items()],
        [value("y", None), value("total", None)],
        constants,
        com_microsoft=1,
    )
    check(m, feed)


def test_multi_head_attention() -> None:
    feed = {"q": f32(2, 3, 8), "k": f32(2, 5, 8), "v": f32(2, 5, 8)}
    check(single("MultiHeadAttention", feed, {"b": f32(24)}, "q k v b", num_heads=2), feed)


def test_multi_head_attention_with_padding_and_bias() -> None:
    feed = {"q": f32(2, 3, 8), "k": f32(2, 5, 8), "v": f32(2, 5, 8), "bias": f32(1, 2, 3, 5)}
    padding = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    check(single("MultiHeadAttention", feed, {"p": padding}, "q k v _ p bias", num_heads=2), feed)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "k", "block"), [(4, 64, 16), (4, 40, 32), (8, 64, 32)])
def test_matmul_n_bits(bits: int, k: int, block: int, zeros: bool) -> None:
    n, blocks = 6, -(-k // block)
    constants = {
        "b": RNG.integers(0, 256, (n, blocks, block * bits // 8), dtype=np.uint8),
        "s": np.abs(f32(n, blocks)),
        "z": RNG.integers(0, 256, (n, -(-blocks * bits // 8)), dtype=np.uint8),
    }
    feed = {"a": f32(3, k)}
    order = "a b s z" if zeros else "a b s"
    used = constants if zeros else {key: constants[key] for key in "bs"}
    check(single("MatMulNBits", feed, used, order, K=k, N=n, bits=bits, block_size=block), feed, atol=1e-3)


def test_dynamic_quantization_as_onnxruntime_writes_it() -> None:
    nodes = [
        node("DynamicQuantizeLinear", "x", "xq xs xz"),
        node("MatMulInteger", "xq w xz wz", "i"),
        node("Cast", "i", "f", to=1),
        node("Mul", "xs ws", "s"),
        node("Mul", "f s", "y"),
    ]
    constants = {"w": RNG.integers(-127, 127, (8, 5), dtype=np.int8), "wz": np.int8(0), "ws": np.float32(0.02)}
    m = model(nodes, [value("x", ["n", 8])], [value("y", None)], constants)
    check(m, {"x": f32(4, 8)}, atol=1e-3)
    check(m, {"x": np.zeros((2, 8), np.float32)})


def test_static_quantization_per_channel() -> None:
    nodes = [
        node("QuantizeLinear", "x xs xz", "q"),
        node("DequantizeLinear", "q xs xz", "d"),
        node("DequantizeLinear", "w ws wz", "dw", axis=0),
        node("Conv", "d dw", "c", pads=[1, 1, 1, 1]),
        node("QuantizeLinear", "c ys yz", "y"),
    ]
    constants = {
        "xs": np.float32(0.03),
        "xz": np.uint8(120),
        "ys": np.float32(0.2),
        "yz": np.int8(-3),
        "w": RNG.integers(-127, 127, (4, 3, 3, 3), dtype=np.int8),
        "ws": np.abs(f32(4)) * 0.01,
        "wz": np.zeros(4, np.int8),
    }
    m = model(nodes, [value("x", [1, 3, 6, 6])], [value("y", None, 3)], constants)
    check(m, {"x": f32(1, 3, 6, 6)}, levels=1)


def test_qlinear_convolution_with_bias_and_padding() -> None:
    constants = {
        "xs": np.float32(0.03),
        "xz": np.uint8(12),
        "ws": np.abs(f32(4)) * 0.01,
        "wz": np.zeros(4, np.int8),
        "ys": np.float32(0.1),
        "yz": np.uint8(100),
        "w": RNG.integers(-127, 127, (4, 2, 3, 3), dtype=np.int8),
        "b": RNG.integers(-900, 900, 4, dtype=np.int32),
    }
    nodes = [
        node("QuantizeLinear", "x xs xz", "q"),
        node("QLinearConv", "q xs xz w ws wz ys yz b", "y", pads=[1, 1, 1, 1]),
    ]
    check(model(nodes, [value("x", [1, 2, 5, 5])], [value("y", None, 2)], constants), {"x": f32(1, 2, 5, 5)}, levels=1)


SCALES = {"xs": np.float32(0.05), "xz": np.uint8(100), "ys": np.float32(0.03), "yz": np.uint8(7)}
U8_OPERATORS = {
    "QLinearSigmoid": {},
    "QLinearLeakyRelu": {"alpha": 0.1},
    "QLinearSoftmax": {"axis": 1, "opset": 13},
    "QLinearSoftmax flat": {"axis": 2, "opset": 11},
    "QLinearAveragePool": {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1},
    "QLinearGlobalAveragePool": {},
}


@pytest.mark.parametrize("name", U8_OPERATORS)
def test_operators_from_bytes_to_bytes(name: str) -> None:
    nodes = [
        node("QuantizeLinear", "x xs xz", "q"),
        node(name.split()[0], "q xs xz ys yz", "p", domain=DOMAIN, **U8_OPERATORS[name]),
        node("DequantizeLinear", "p ys yz", "y"),
    ]
    m = model(nodes, [value("x", [2, 4, 5, 6])], [value("y", None)], SCALES, com_microsoft=1)
    check(m, {"x": f32(2, 4, 5, 6)}, atol=float(SCALES["ys"]))


def test_choice_of_bytes() -> None:
    constants = SCALES | {"zs": np.float32(0.06), "zz": np.uint8(128), "b": np.array([[3], [250]], np.uint8)}
    nodes = [
        node("QuantizeLinear", "x xs xz", "q"),
        node("QLinearWhere", "c q xs xz b ys yz zs zz", "p", domain=DOMAIN),
        node("DequantizeLinear", "p zs zz", "y"),
    ]
    inputs = [value("x", [2, 6]), value("c", [6], 9)]
    feed = {"x": f32(2, 6), "c": np.array([1, 0, 1, 0, 0, 1], bool)}
    check(model(nodes, inputs, [value("y", None)], constants, com_microsoft=1), feed, atol=0.06)


@pytest.mark.parametrize("n_scales", [1, 5])
@pytest.mark.parametrize("op", ["DynamicQuantizeMatMul", "MatMulIntegerToFloat"])
def test_integer_products_scaled_to_f32(op: str, n_scales: int) -> None:
    constants = {
        "w": RNG.integers(-128, 128, (8, 5), dtype=np.int8),
        "ws": np.abs(f32(n_scales)) * 0.01,
        "wz": np.full(n_scales, 2, np.int8),
        "b": f32(5),
        **SCALES,
    }
    nodes = [
        node("QuantizeLinear", "x xs xz", "q"),
        node(op, "x w ws wz b" if op == "DynamicQuantizeMatMul" else "q w xs ws xz wz b", "y", domain=DOMAIN),
    ]
    check(model(nodes, [value("x", [3, 8])], [value("y", None)], constants, com_microsoft=1), {"x": f32(3, 8)})
