"""Other engines behind one interface: they load, run, describe themselves, and refuse with our own errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from vivace.base.dtypes import DType
from vivace.base.errors import ProviderError, UnsupportedError
from vivace.providers.provider import KNOWN, LoadOptions, availability, find


@pytest.fixture(scope="module")
def model_bytes() -> bytes:
    """y = relu(x + 1), s = x + x, with a symbolic batch."""
    x, y, s = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in "xys")
    one = helper.make_tensor("one", TensorProto.FLOAT, [3], [1.0, 1.0, 1.0])
    nodes = [
        helper.make_node("Add", ["x", "one"], ["t"]),
        helper.make_node("Relu", ["t"], ["y"]),
        helper.make_node("Add", ["x", "x"], ["s"]),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y, s], [one])
    return onnx.helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


installed = pytest.mark.parametrize("name", [name for name in KNOWN if availability(name).is_available])


@installed
def test_runs_and_describes(name: str, model_bytes: bytes) -> None:
    session = find(name).load(model_bytes, LoadOptions(threads=1))
    assert [spec.name for spec in session.inputs] == ["x"]
    assert [spec.name for spec in session.outputs] == ["y", "s"]
    assert session.inputs[0].dtype is DType.f32
    assert session.inputs[0].shape[1] == 3
    x = np.array([[-2.0, 0.0, 1.5]], np.float32)
    found = session.run({"x": x})
    np.testing.assert_array_equal(found["y"], np.maximum(x + 1, 0))
    np.testing.assert_array_equal(found["s"], x + x)
    assert list(session.run({"x": x}, ["s"])) == ["s"]


@installed
def test_outputs_belong_to_the_caller(name: str, model_bytes: bytes) -> None:
    session = find(name).load(model_bytes, LoadOptions(shapes={"x": (1, 3)}))
    first = session.run({"x": np.zeros((1, 3), np.float32)})["y"]
    session.run({"x": np.ones((1, 3), np.float32)})
    np.testing.assert_array_equal(first, np.ones((1, 3), np.float32))


@installed
def test_loads_a_file(name: str, model_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model_bytes)
    session = find(name).load(path, LoadOptions(threads=2, shapes={"x": (2, 3)}, dims={"N": 2}))
    assert session.run({"x": np.zeros((2, 3), np.float32)})["y"].shape == (2, 3)


@installed
def test_refuses_with_our_error(name: str, model_bytes: bytes) -> None:
    with pytest.raises(ProviderError, match=name):
        find(name).load(b"no model", LoadOptions())
    with pytest.raises(ProviderError, match="x"):
        find(name).load(model_bytes, LoadOptions()).run({})


def test_unsupported_wishes(model_bytes: bytes) -> None:
    with pytest.raises(UnsupportedError, match="bf16"):
        find("onnxruntime").load(model_bytes, LoadOptions(precision="bf16"))


def test_unknown_provider() -> None:
    with pytest.raises(ProviderError, match="one of onnxruntime, openvino"):
        find("tensorflow")


def test_missing_package_names_the_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not availability("openvino").is_available
    with pytest.raises(
        ProviderError, match=r"^openvino: the package openvino is not installed\. Try: pip install openvino\.$"
    ):
        find("openvino")
