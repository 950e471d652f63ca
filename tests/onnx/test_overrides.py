"""Sizes that the caller fixes hold wherever the model uses the same symbol."""

from __future__ import annotations

import pytest
from onnx import TensorProto, helper

from vivace.base.errors import ModelError
from vivace.onnx.importer import import_model


def model():  # type: ignore[no-untyped-def]
    """Appends `new` to a cache of `past` rows."""
    kept = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", "past", 4]) for n in ("key", "value")]
    new = helper.make_tensor_value_info("new", TensorProto.FLOAT, ["batch", "step", 4])
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("keys", "values")]
    nodes = [helper.make_node("Concat", [a, "new"], [b], axis=1) for a, b in (("key", "keys"), ("value", "values"))]
    graph = helper.make_graph(nodes, "cache", [*kept, new], outs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("past", [0, 7])
def test_a_size_given_for_one_input_holds_for_all(past: int) -> None:
    graph = import_model(model(), overrides={"key": (2, past, 4)})
    assert [str(v.type) for v in graph.inputs] == [f"f32[2,{past},4]", f"f32[2,{past},4]", "f32[2,step,4]"]
    assert str(graph.outputs[1].type) == ("f32[2,step,4]" if not past else "f32[2,step+7,4]")


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ModelError, match=r"input 'value': is given the size 3.*Expected 2"):
        import_model(model(), overrides={"key": (1, 2, 4), "value": (1, 3, 4)})
