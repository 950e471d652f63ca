"""Damaged, inconsistent and hostile files: each gets one error of ours that says what, where and what was expected."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from tests.onnx.making import F32, I64, graph, model, node, value

from vivace.base.errors import ModelError, UnsupportedError, VivaceError
from vivace.onnx.importer import import_model
from vivace.onnx.reader import read

X, Y = value("x", [2, 3]), value("y", [2, 3])


def small() -> ModelProto:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    return model([node("Add", "x w", "t"), node("Relu", "t", "y")], [X], [Y], {"w": weight})


def test_a_path_bytes_and_a_proto_are_one_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(small().SerializeToString())
    for source in (path, str(path), path.read_bytes(), small()):
        assert [n.op.name for n in import_model(source).nodes] == ["add", "relu"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "cannot be parsed|not an ONNX model"),
        (b'{"a": 1}', "cannot be parsed|not an ONNX model"),
        (ModelProto().SerializeToString() + b"\x08\x08", "not an ONNX model"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=expected):
        read(path)


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path, tmp_path / ("x" * 5000)):
        with pytest.raises(ModelError, match="cannot be read"):
            read(path)


def test_truncated_files_are_refused() -> None:
    data = small().SerializeToString()
    for n in range(len(data)):
        with pytest.raises(VivaceError):
            import_model(data[:n])


def test_flipped_bytes_never_escape_as_foreign_errors() -> None:
    data = bytearray(small().SerializeToString())
    refused = 0
    for i in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytes(data[:i]) + bytes([data[i] ^ flip]) + bytes(data[i + 1 :])
            try:
                import_model(damaged)
            except VivaceError as e:
                assert str(e)
                refused += 1
    assert refused > len(data)


def test_a_cycle_is_named() -> None:
    m = model([node("Add", "x b", "a"), node("Relu", "a", "b")], [X], [value("b", [2, 3])])
    with pytest.raises(ModelError, match="depends on itself"):
        read(m)


def test_an_unsorted_graph_is_sorted() -> None:
    m = model([node("Relu", "t", "y"), node("Neg", "s", "t"), node("Abs", "x", "s")], [X], [Y])
    assert [n.op.name for n in import_model(m).nodes] == ["abs", "neg", "relu"]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node("Relu", "x", "y"), node("Neg", "x", "y")], "already defined"),
        ([node("Relu", "nothing", "y")], "reads 'nothing', which nothing defines"),
        ([node("Relu", "x", "z")], "output 'y' is never computed"),
        ([node("Relu", "x x", "y")], "breaks the definition of Relu"),
        ([node("Concat", "x x", "y", axis=1.5)], "breaks the definition of Concat"),
        ([node("LeakyRelu", "x", "y", slope=0.1)], "breaks the definition of LeakyRelu"),
        ([node("Concat", "x x", "y", axis=graph([], [X], [X]))], r"breaks the definition of Concat \(attribute axis"),
        ([node("Transpose", "x", "y", perm=[0, 2])], "perm"),
        ([node("Concat", "x x", "y", axis=7)], "axis 7 is out of range"),
        ([node("GatherND", "x i", "y", batch_dims=-1)], "coordinates within the rank"),
        ([node("GatherND", "x i", "y", batch_dims=-2)], "coordinates within the rank"),
        ([node("Resize", "x _ s", "y", nearest_mode="far")], "nearest_mode 'far' is unknown"),
        ([node("Resize", "x _ s", "y", mode="far")], "mode 'far' with 'half_pixel' is unknown"),
    ],
)
def test_inconsistent_graphs(nodes: list, expected: str) -> None:
    constants = {"i": np.zeros((2, 1), np.int64), "s": np.float32([1, 2])}
    with pytest.raises(ModelError, match=expected):
        import_model(model(nodes, [X], [Y], constants))


def test_interpolation_of_what_is_no_number_is_left_to_others() -> None:
    for dtype in (TensorProto.BOOL, TensorProto.INT4, TensorProto.FLOAT8E5M2):
        m = model([node("Resize", "x _ s", "y", mode="linear")], [value("x", [2, 3], dtype)], [value("y", None, dtype)],
                  {"s": np.float32([1, 2])}, opset=22)  # fmt: skip
        assert [n.op.name for n in import_model(m).nodes] == ["onnx"]


def test_inconsistent_types_name_the_node() -> None:
    m = model([helper.make_node("Add", ["x", "k"], ["y"], name="sum")], [X, value("k", [2, 3], I64)], [Y])
    with pytest.raises(ModelError, match=r"'sum' \(Add\).*f32 and i64"):
        import_model(m)
    m = model([helper.make_node("MatMul", ["x", "k"], ["y"], name="fc")], [X, value("k", [4, 5])], [Y])
    with pytest.raises(ModelError, match=r"'fc' \(MatMul\).*3 and 4"):
        import_model(m)


def test_unknown_operators_and_domains_are_named() -> None:
    with pytest.raises(UnsupportedError, match="'Frobnicate' of opset 18 is unknown"):
        read(model([node("Frobnicate", "x", "y")], [X], [Y]))
    with pytest.raises(UnsupportedError, match=r"domain 'org.acme'.*'Relu'"):
        read(model([node("Relu", "x", "y", domain="org.acme")], [X], [Y], org_acme=1))
    with pytest.raises(ModelError, match="without importing"):
        read(model([node("Scaler", "x", "y", domain="ai.onnx.ml")], [X], [Y]))
    with pytest.raises(UnsupportedError, match="NoSuchOp"):
        import_model(
            model([node("NoSuchOp", "x", "y", domain="com.microsoft")], [X], [value("y", None)], com_microsoft=1)
        )


@pytest.mark.parametrize("opset", [1, 6, 999])
def test_opsets_out_of_range(opset: int) -> None:
    with pytest.raises(ModelError, match=rf"opset {opset}\. Expected 7 to"):
        read(model([node("Relu", "x", "y")], [X], [Y], opset=opset))


def test_opset_imports_may_repeat_but_not_contradict() -> None:
    m = small()
    m.opset_import.append(helper.make_opsetid("ai.onnx", 18))
    assert read(m).opsets == {"": 18}
    m.opset_import.append(helper.make_opsetid("", 17))
    with pytest.raises(ModelError, match="versions 18 and 17"):
        read(m)


def test_local_functions_are_inlined() -> None:
    body = helper.make_function(
        "my", "Twice", ["a"], ["b"], [node("Add", "a a", "b")], opset_imports=[helper.make_opsetid("", 18)]
    )
    m = model([node("Twice", "x", "t", domain="my"), node("Twice", "t", "y", domain="my")], [X], [Y], my=1)
    m.functions.append(body)
    assert [n.op.name for n in import_model(m).nodes] == ["add", "add"]


def test_absurd_sizes_are_refused_before_memory_is_taken() -> None:
    huge = TensorProto(name="w", data_type=F32, dims=[1 << 40, 1 << 40])
    m = model([node("Add", "x w", "y")], [X], [Y])
    m.graph.initializer.append(huge)
    with pytest.raises(ModelError, match=r"make .* bytes"):
        import_model(m)
    m.graph.initializer[0].CopyFrom(TensorProto(name="w", data_type=F32, dims=[-1, 3]))
    with pytest.raises(ModelError, match="negative"):
        import_model(m)
    m.graph.initializer[0].CopyFrom(TensorProto(name="w", data_type=F32, dims=[2, 3], raw_data=bytes(23)))
    with pytest.raises(ModelError, match=r"23 bytes. Expected 24"):
        import_model(m)
    m.graph.initializer[0].CopyFrom(TensorProto(name="w", data_type=F32, dims=[2, 3], float_data=[1.0]))
    with pytest.raises(ModelError, match="'w'"):
        import_model(m)
    with pytest.raises(ModelError, match=r"make .* bytes"):
        import_model(model([node("Relu", "v", "y")], [value("v", [1 << 62, 1 << 62])], [value("y", None)]))
    for op in (node("ConstantOfShape", "s", "y"), node("Expand", "one s", "y")):
        constants = {"s": np.array([1 << 30, 1 << 30]), "one": np.float32(1)}
        with pytest.raises(ModelError, match="bytes"):
            import_model(model([op], [X], [value("y", None)], constants))


def _external(tmp_path: Path, **entries: str | int) -> Path:
    """A model whose weight lies in a file `w.bin` of 24 bytes after 8 others."""
    m = small()
    (tmp_path / "w.bin").write_bytes(bytes(8) + np.arange(6, dtype=np.float32).tobytes())
    tensor = m.graph.initializer[0]
    set_external_data(tensor, **({"location": "w.bin", "offset": 8, "length": 24} | entries))  # type: ignore[arg-type]
    tensor.ClearField("raw_data")
    path = tmp_path / "m.onnx"
    path.write_bytes(m.SerializeToString())
    return path


def test_external_data_is_mapped(tmp_path: Path) -> None:
    (weight,) = import_model(_external(tmp_path)).constants()
    assert weight.data is not None
    np.testing.assert_array_equal(weight.data, np.arange(6, dtype=np.float32).reshape(2, 3))
    base = weight.data
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)
    assert not weight.data.flags.writeable


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"location": "none.bin"}, "cannot be found"),
        ({"location": "../w.bin"}, "escapes"),
        ({"location": "/etc/passwd"}, "escapes"),
        ({"location": "a\\..\\w.bin"}, "escapes"),
        ({"location": "x" * 5000}, "cannot be found"),
        ({"location": "."}, "is no file"),
        ({"offset": 16}, "ends at byte 40. Expected at most 32"),
        ({"offset": 1 << 60}, "Expected at most 32"),
        ({"offset": -8}, "Expected at most 32"),
        ({"length": 20}, "20 bytes. Expected 24"),
        ({"length": 1 << 50}, "Expected 24"),
    ],
)
def test_external_data_that_cannot_be_trusted(tmp_path: Path, entries: dict, expected: str) -> None:
    path = _external(tmp_path, **entries)
    with pytest.raises(ModelError, match=re.escape(expected).replace(r"\ ", " ")):
        import_model(path)


def test_external_data_behind_a_link_that_leads_out(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = _external(inside)
    (tmp_path / "secret").write_bytes(bytes(32))
    (inside / "w.bin").unlink()
    (inside / "w.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="leads out"):
        import_model(path)


def test_external_data_needs_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="came as bytes"):
        import_model(_external(tmp_path).read_bytes())


def test_sparse_initializers_are_made_dense() -> None:
    m = model([node("Add", "x w", "y")], [X], [Y])
    values = numpy_helper.from_array(np.array([5, 7], np.float32), "w")
    m.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([1, 5]), "i"), [2, 3])
    )
    (weight,) = import_model(m).constants()
    np.testing.assert_array_equal(weight.data, [[0, 5, 0], [0, 0, 7]])


@pytest.mark.parametrize(
    "indices",
    [[0, 6], [-1, 0], [[0, 1], [1, 3]], [[0, 1], [-1, 0]], [[0], [1]], [[0, 1, 2], [0, 1, 2]], [0], 3, [0.0, 1.0]],
    ids=str,
)
def test_sparse_initializers_that_do_not_fit(indices: object) -> None:
    m = model([node("Add", "x w", "y")], [X], [Y])
    values = numpy_helper.from_array(np.array([5, 7], np.float32), "w")
    m.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array(indices), "i"), [2, 3])
    )
    with pytest.raises(ModelError, match="the indices of a sparse tensor do not fit its dims"):
        import_model(m)


def test_nested_graphs_are_checked_too() -> None:
    inner = graph([node("Relu", "nothing", "b")], [], [value("b", [2, 3])])
    m = model([helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)], [X, value("c", [], 9)], [Y])
    with pytest.raises(ModelError, match="reads 'nothing'"):
        read(m)


@pytest.mark.parametrize("attribute", [{"slope": [1.0] * 5000}, {"slope": ["a"] * 5000}, {"slope": list(range(5000))}])
def test_long_attributes_are_checked_too(attribute: dict[str, list[object]]) -> None:
    proto = model([node("Relu", "x", "y", **attribute)], [X], [Y])
    with pytest.raises(ModelError, match="breaks the definition of Relu"):
        import_model(proto)
