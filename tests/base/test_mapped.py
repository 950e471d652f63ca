"""Pages of mapped arrays can be given back and are read again."""

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from vivace.base.mapped import forget
from vivace.building import optimize_for_native
from vivace.compilation import load_graph


def resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssFile"].split()[0]) * 1024


def test_mapped_pages_leave_memory_and_come_back(tmp_path: Path) -> None:
    n = 1 << 22
    path = tmp_path / "weights"
    np.arange(n, dtype=np.float32).tofile(path)
    array = np.memmap(path, np.float32, "r")[1000:].reshape(8, -1)
    total = float(array.sum(dtype=np.float64))
    before = resident_bytes()
    assert forget(array)
    assert before - resident_bytes() > array.nbytes * 0.9
    assert float(array.sum(dtype=np.float64)) == total


def test_other_arrays_are_left_alone() -> None:
    assert not forget(np.ones(10))
    assert not forget(np.frombuffer(b"12345678", np.uint8))


def test_weights_that_folding_read_leave_memory(tmp_path: Path) -> None:
    w, scale = np.ones((1024, 1024, 2, 2), np.float32), np.full((1024, 1, 1), 2, np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Mul", ["c", "s"], ["y"])]
    x, y = (helper.make_tensor_value_info(n, 1, [1, 1024, d, d]) for n, d in (("x", 3), ("y", 2)))
    weights = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(scale, "s")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.save(model, tmp_path / "m.onnx")
    graph = load_graph(tmp_path / "m.onnx", {})
    before = resident_bytes()
    folded = optimize_for_native(graph)
    assert [n.op.name for n in folded.nodes].count("mul") == 0
    assert resident_bytes() - before < w.nbytes / 4
