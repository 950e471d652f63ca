"""Weights are left in the file, and every other byte of the model is what it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tests.onnx.making import I64, model, node, value

from vivace.base.errors import VivaceError
from vivace.onnx.importer import import_model
from vivace.onnx.wire import OWN_FILE, _prefix, skeleton


def _with_weights(*sizes: int) -> ModelProto:
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.standard_normal(n).astype(np.float32) for i, n in enumerate(sizes)}
    nodes = [node("Concat", " ".join(weights), "c", axis=0), node("ReduceMax", "c", "m", keepdims=0)]
    nodes.append(node("Add", "x m", "y"))
    return model(nodes, [value("x", [2])], [value("y", [2])], weights)


def test_only_large_raw_data_is_left_out() -> None:
    proto = _with_weights(10, 5000, 7, 9000)
    data = np.frombuffer(proto.SerializeToString(), np.uint8)
    small = skeleton(data)
    assert len(small) < len(data) - 4 * 14000 + 1000
    parsed = ModelProto.FromString(small)
    for before, after in zip(proto.graph.initializer, parsed.graph.initializer):
        if before.dims[0] < 1000:
            assert after == before
            continue
        entries = {e.key: e.value for e in after.external_data}
        assert entries["location"] == OWN_FILE
        start = int(entries["offset"])
        assert data[start : start + int(entries["length"])].tobytes() == before.raw_data
    for proto_ in (proto, parsed):
        del proto_.graph.initializer[:]
    assert parsed == proto


def test_weights_of_a_file_are_mapped_and_equal(tmp_path: Path) -> None:
    proto = _with_weights(5001, 3)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    mapped = {v.name: v.data for v in import_model(path).constants()}
    plain = {v.name: v.data for v in import_model(proto).constants()}
    assert mapped.keys() == plain.keys()
    for name, array in plain.items():
        np.testing.assert_array_equal(mapped[name], array)
    proto.graph.node.insert(0, helper.make_node("Identity", ["w0"], ["again"]))
    path.write_bytes(proto.SerializeToString())
    import_model(path)


def test_constant_nodes_are_left_in_the_file_too(tmp_path: Path) -> None:
    """Exporters of some frameworks keep all weights so."""
    weights = np.arange(5000, dtype=np.float32).reshape(2, 2500)
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weights))
    alike = helper.make_node("ConstantOfShape", ["s"], ["z"], value=numpy_helper.from_array(np.ones(1, np.float32)))
    nodes = [constant, alike, node("Add", "w z", "v"), node("MatMul", "x v", "y")]
    proto = model(nodes, [value("x", [1, 2])], [value("y", [1, 2500])], {"s": np.array([2, 2500], np.int64)})
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    assert len(skeleton(np.frombuffer(path.read_bytes(), np.uint8))) < path.stat().st_size - weights.nbytes + 200
    (found,) = (v.data for v in import_model(path).constants() if v.shape == (2, 2500))
    np.testing.assert_array_equal(found, weights)


def test_a_model_in_memory_cannot_name_its_own_file() -> None:
    proto = _with_weights(3, 4)
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    tensor.external_data.add(key="location", value=OWN_FILE)
    with pytest.raises(VivaceError, match="came as bytes"):
        import_model(proto)


def test_damage_is_left_to_the_parser() -> None:
    data = np.frombuffer(_with_weights(2000, 2000).SerializeToString(), np.uint8)
    for n in range(0, len(data) - 1, 997):
        assert skeleton(data[:n]) == data[:n].tobytes()
    rng = np.random.default_rng(1)
    for _ in range(200):
        noise = rng.integers(0, 256, rng.integers(1, 200), dtype=np.uint8)
        skeleton(noise)


def test_strings_and_other_fields_survive() -> None:
    proto = _with_weights(2000, 1)
    proto.producer_name = "maker"
    proto.metadata_props.add(key="k", value="v" * 9000)
    proto.graph.initializer.append(numpy_helper.from_array(np.array(["a", "b"], object), "s"))
    parsed = ModelProto.FromString(skeleton(np.frombuffer(proto.SerializeToString(), np.uint8)))
    assert parsed.producer_name == "maker"
    assert parsed.metadata_props == proto.metadata_props
    assert parsed.graph.initializer[2] == proto.graph.initializer[2]


def test_a_file_that_protobuf_cannot_parse(tmp_path: Path) -> None:
    """3 GiB of zeros in a second `graph` field, which protobuf merges with the first; the file has a hole."""
    size = 3 << 30
    nodes = [node("Gather", "w i", "row", axis=0), node("Add", "x row", "y")]
    proto = model(nodes, [value("x", [4]), value("i", [], I64)], [value("y", [4])])
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[size >> 4, 4]).SerializeToString()
    tensor += _prefix(9, size)
    graph = _prefix(5, len(tensor) + size) + tensor
    path = tmp_path / "large.onnx"
    with path.open("wb") as f:
        f.write(proto.SerializeToString() + _prefix(7, len(graph) + size) + graph)
        f.seek(size - 4, 1)
        f.write(np.float32(5).tobytes())
    (weight,) = import_model(path).constants()
    assert weight.data is not None
    np.testing.assert_array_equal(weight.data[-1], [0, 0, 0, 5])
