"""Floats of 8 and 4 bits: every code, and every rounding between codes, against ml_dtypes; models against onnx."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from tests.lower.harness import HERE, build, check, run_plan

import vivace
from vivace.base.dtypes import NARROW_FLOATS, DType
from vivace.base.machine import ISAS
from vivace.graph.graph import Type
from vivace.lower.lowering import lower

F32 = np.float32
ROUNDED = [t for t in NARROW_FLOATS if t is not DType.f8e8m0]


@pytest.mark.parametrize("t", NARROW_FLOATS, ids=str)
def test_every_code_widens(t: DType) -> None:
    codes = np.arange(16 if t is DType.f4e2m1 else 256, dtype=np.uint8).view(t.numpy)
    check(build(lambda b, x: b.cast(x, to=DType.f32), Type(t, codes.shape)), codes, isas=HERE)


def between(t: DType) -> np.ndarray:
    """Numbers that the type holds, those halfway between two, their neighbours, and others of all sizes."""
    codes = np.arange(16 if t is DType.f4e2m1 else 256, dtype=np.uint8).view(t.numpy).astype(F32)
    held = np.sort(codes[np.isfinite(codes)])
    halves = (held[1:] + held[:-1]) / 2
    random = np.random.default_rng(0)
    others = random.standard_normal(500) * np.exp(random.uniform(-20, 12, 500))
    near = [np.nextafter(halves, F32(to)) for to in (np.inf, -np.inf)]
    special = [0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, *([] if t is DType.f4e2m1 else [np.inf, -np.inf, np.nan])]
    return np.concatenate([held, halves, *near, others, special]).astype(F32)


@pytest.mark.parametrize("target", HERE)
@pytest.mark.parametrize("t", ROUNDED, ids=str)
def test_numbers_round_to_nearest_even(t: DType, target: str) -> None:
    x = between(t)
    plan = lower(build(lambda b, v: b.cast(v, to=t), Type(DType.f32, x.shape)), ISAS[target])
    (got,) = run_plan(plan, [x], {}, target)
    want = x.astype(t.numpy)
    is_nan = np.isnan(want.astype(F32)) & np.isnan(got.astype(F32))
    assert ((got.view(np.uint8) == want.view(np.uint8)) | is_nan).all()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "kind", [TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2], ids=TensorProto.DataType.Name
)
def test_microscaled_weights(kind: int, axis: int) -> None:
    """x @ DequantizeLinear(w) with one power of two per block of 32."""
    random = np.random.default_rng(kind)
    shape, per = ((64, 40), (2, 40)) if axis == 0 else ((40, 64), (40, 2))
    w = helper.make_tensor("w", kind, shape, random.uniform(-5, 5, shape).reshape(-1).tolist())
    scale = onnx.numpy_helper.from_array(np.exp2(random.integers(-3, 3, per)).astype(DType.f8e8m0.numpy), "s")
    nodes = [
        helper.make_node(
            "DequantizeLinear", ["w", "s"], ["d"], axis=axis, block_size=32, output_dtype=TensorProto.FLOAT
        ),
        helper.make_node("Transpose" if axis else "Identity", ["d"], ["t"]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["S", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["S", 40])
    graph = helper.make_graph(nodes, "g", [x], [y], [w, scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)
    given = random.standard_normal((3, 64), F32)
    d = onnx.numpy_helper.to_array(w).astype(F32) * np.repeat(onnx.numpy_helper.to_array(scale).astype(F32), 32, axis)
    want = given @ (d.T if axis else d)
    got = vivace.compile(model, providers=("native",), cache=False).run({"x": given})["y"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2], ids=TensorProto.DataType.Name)
def test_quantized_at_run_time(kind: int) -> None:
    zero = helper.make_tensor("z", kind, [], [0.0])
    scale = helper.make_tensor("s", TensorProto.FLOAT, [], [0.25])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])
    graph = helper.make_graph(nodes, "g", [x], [y], [scale, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    given = np.linspace(-30, 30, 211).astype(F32)
    got = vivace.compile(model, providers=("native",), cache=False).run({"x": given})["y"]
    np.testing.assert_array_equal(got, ReferenceEvaluator(model).run(None, {"x": given})[0])
