"""One operator at a time, with random attributes, dtypes and open sizes, against ONNX Runtime.

    python -m tests.networks.single 0 1000            seeds 0 to 999, a line each
    python -m tests.networks.single 0 1000 conv pool  of these families alone

Where `wide` tries how operators meet, this tries what each of them can say. What ONNX Runtime refuses is passed over.
"""

from __future__ import annotations

import sys
from functools import partial
from random import Random

import numpy as np
from onnx import ModelProto, ValueInfoProto, helper, numpy_helper
from tests.networks import cases, single_moves, single_products, single_values, single_windows
from tests.networks.draw import Array, Draw, Family
from tests.networks.ways import TARGETS
from tests.networks.wide import session

import vivace
from vivace.base.errors import UnsupportedError
from vivace.base.machine import isa
from vivace.targets.cpu.amx import missing_here

FAMILIES: dict[str, Family] = {
    f.__name__: f for module in (single_windows, single_moves, single_values, single_products) for f in module.FAMILIES
}
EXACT_IN = ("resize", "cast", "scales", "dynamic", "integer_matmul", "integer_conv")  # dtypes are their own
TOLERANCE = {"float16": 2e-2, "float32": 2e-4, "float64": 1e-6}  # of the largest; functions of f64 are of f32 in places


def model_of(d: Draw, results: list[str], is_open: bool) -> ModelProto:
    """With some sizes of inputs open, but no 1, which may be there to be broadcast."""
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(a.dtype),
            [f"{name}_{i}" if is_open and n > 1 and d.flip() else n for i, n in enumerate(a.shape)],
        )
        for name, a in d.inputs.items()
    ]  # fmt: skip
    constants = [numpy_helper.from_array(a, name) for name, a in d.constants.items()]
    graph = helper.make_graph(d.nodes, "g", inputs, [ValueInfoProto(name=r) for r in results], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", d.opset)], ir_version=10)


def check(seed: int, families: tuple[str, ...] = tuple(FAMILIES)) -> str:
    """Raises: AssertionError, or whatever a compile or a run raises. Returns what was tried, or why not."""
    random = Random(seed)
    name = random.choice(families)
    d = Draw(random)
    results = list(FAMILIES[name](d))
    dtype = random.choice((np.float32,) * 4 + (np.float64, np.float16))
    if name not in EXACT_IN:
        for arrays in (d.inputs, d.constants):
            arrays |= {k: a.astype(dtype) for k, a in arrays.items() if a.dtype == np.float32}
    model = model_of(d, results, random.random() < 0.5)
    told = [f"{name}: {' '.join(n.op_type for n in d.nodes)}", np.dtype(dtype).name, f"opset {d.opset}"]
    try:
        want = session(model)(d.inputs)
    except Exception:
        return ", ".join(["refused by ONNX Runtime", *told])
    targets = [t for t in TARGETS if t == "host" or not missing_here(isa(t).flags)]
    level, target = random.choice((0, 1, 99, 99)), random.choice(targets)
    try:
        engine = vivace.compile(model, level=level, target=target, threads=1, cache=False)
        compare(engine.run(d.inputs), want)
    except UnsupportedError as e:
        if "unknown rank" not in str(e):
            raise
        return ", ".join(["its rank only shows when it runs", *told])
    except Exception as e:
        attrs = " ".join(f"{a.name}={helper.get_attribute_value(a)}" for n in d.nodes for a in n.attribute)
        shapes = {k: a.shape for k, a in (*d.inputs.items(), *d.constants.items())}
        raise AssertionError(f"{', '.join(told)}, level {level}, {target}, {shapes}, {attrs}: {e}") from e
    return ", ".join(told)


def compare(got: dict[str, Array], want: list[Array]) -> None:
    """Floats within a share of the largest, bytes to the neighbour, everything else exactly."""
    for (name, y), w in zip(got.items(), map(np.asarray, want), strict=True):
        assert (y.shape, y.dtype) == (w.shape, w.dtype), f"{name} is {y.dtype}{y.shape}, not {w.dtype}{w.shape}"
        fine = y == w
        with np.errstate(all="ignore"):
            if w.dtype.kind == "f":
                largest = np.abs(w[np.isfinite(w)], dtype=np.float64).max(initial=1e-3)
                scale = np.maximum(np.abs(w), largest if largest < 1e30 else 1)
                fine |= (np.isnan(y) & np.isnan(w)) | (np.abs(y - w) <= TOLERANCE[w.dtype.name] * scale)
            elif w.dtype.itemsize == 1 and w.dtype != bool:
                fine |= np.abs(y.astype(int) - w.astype(int)) <= 1
        assert fine.all(), f"{int((~fine).sum())} of {fine.size} in {name}{w.shape}: {y[~fine][:4]}, not {w[~fine][:4]}"


if __name__ == "__main__":
    cases.main(int(sys.argv[1]), int(sys.argv[2]), partial(check, families=tuple(sys.argv[3:]) or tuple(FAMILIES)))
