"""The smallest part of a model that still fails, for `vivace reduce`.

    all nodes -> half of them left out? a quarter? ... -> no single node can be left out any more

What nodes that were left out computed becomes an input, with the array that it was in a run of the whole model. So
whether a part fails is asked of the part alone, wherever the fault is.

Source: Zeller and Hildebrandt, "Simplifying and isolating failure-inducing input" (2002).
Not handled: parts that would need a value that is no tensor as an input (they are taken as not failing); single nodes
inside of branches and loops, which stay as wholes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from vivace.base.errors import InputError
from vivace.onnx.reader import label, needs, read

Arrays = Mapping[str, np.ndarray]


def with_every_value(model: ModelProto) -> ModelProto:
    """The model with everything that its nodes compute as outputs."""
    found = ModelProto()
    found.CopyFrom(model)
    have = {v.name for v in found.graph.output}
    names = dict.fromkeys(o for n in found.graph.node for o in n.output if o and o not in have)
    found.graph.output.extend(ValueInfoProto(name=name) for name in names)
    return found


def part_of(model: ModelProto, nodes: Sequence[int], values: Arrays) -> ModelProto:
    """The nodes with these numbers as a model; `values` are those of a run of the whole.

    Raises: InputError where a value that it would take as an input is no tensor.
    """
    graph = model.graph
    kept = [graph.node[i] for i in nodes]
    made = dict.fromkeys(o for n in kept for o in n.output if o)
    read = dict.fromkeys(name for n in kept for name in needs(n))
    tensors = {t.name: t for t in graph.initializer}
    sparse = {t.values.name: t for t in graph.sparse_initializer}
    declared = {v.name: v for v in graph.input}
    wanted = [name for name in read if name not in made and name not in tensors and name not in sparse]
    inside = set(nodes)
    elsewhere = {name for i, n in enumerate(graph.node) if i not in inside for name in needs(n)}
    given = {v.name: v for v in graph.output}
    results = [o for o in made if o in given or o in elsewhere or o not in read]
    part = ModelProto()
    part.CopyFrom(model)
    part.graph.ClearField("node")
    part.graph.node.extend(kept)
    for field in ("input", "output", "initializer", "sparse_initializer"):
        part.graph.ClearField(field)
    part.graph.input.extend(declared[name] if name in declared else _info(name, values, True) for name in wanted)
    part.graph.output.extend(given[o] if o in given else _info(o, values, False) for o in results)
    part.graph.initializer.extend(tensors[name] for name in read if name in tensors)
    part.graph.sparse_initializer.extend(sparse[name] for name in read if name in sparse)
    return part


def _info(name: str, values: Arrays, is_input: bool) -> ValueInfoProto:
    a = values.get(name)
    if not isinstance(a, np.ndarray):
        if is_input:
            raise InputError("is no tensor", where=f"value {name!r}")
        return ValueInfoProto(name=name)
    kind = TensorProto.STRING if a.dtype.kind in "OUS" else helper.np_dtype_to_tensor_dtype(a.dtype)
    return helper.make_tensor_value_info(name, kind, a.shape if is_input else [None] * a.ndim)


def minimize(n: int, fails: Callable[[Sequence[int]], bool]) -> list[int]:
    """Numbers below `n` of which none can be left out: without any one of them what remains does not fail.

    All of them together must fail. Cost: at best about 2 log2(n) trials, at worst n squared.
    """
    kept, size = list(range(n)), max(1, n // 2)
    while True:
        before, at = len(kept), 0
        while at < len(kept):
            rest = kept[:at] + kept[at + size :]
            if rest and fails(rest):
                kept = rest
            else:
                at += size
        if size == 1 and len(kept) == before:
            return kept
        size = max(1, min(size // 2, len(kept) // 2))


def read_whole(path: Path) -> ModelProto:
    """A model with its weights in memory."""
    read(path)  # which says better what is wrong with a damaged file
    return onnx.load(path)


def names_of(model: ModelProto) -> list[str]:
    """What a person calls the nodes."""
    return [f"{label(n)} ({n.op_type})" for n in model.graph.node]
