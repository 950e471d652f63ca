"""Random small ONNX models of the kinds that real ones have, with any sizes, of which some are open.

make(Random(7))      a model, and its maker, which knows sizes to run it at
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from onnx import ModelProto
from tests.networks import flow, images, operators, steps
from tests.networks.maker import CHANNELS, Maker, Move, Value
from tests.onnx import making

from vivace.base.dims import Dim, symbol

IMAGE: tuple[Move, ...] = (
    *[images.conv] * 3, *[images.mobile] * 4, images.residual, images.branches, images.halves, images.pool,
    images.resize, images.turned, images.transposed_conv, images.padded, images.normed_image, images.added,
    images.beside, images.flat,
)  # fmt: skip
STEPS: tuple[Move, ...] = (
    *[steps.project] * 2, *[steps.mlp] * 3, *[steps.norm] * 2, *[steps.attention] * 2, *[steps.attention_op] * 2,
    steps.recurrent, steps.conv1d, steps.placed, steps.cut, images.added, images.beside,
)  # fmt: skip
# Moves of wide models, as often as all others together.
BOTH: tuple[Move, ...] = (
    *[operators.function] * 3, operators.step, *[operators.moved] * 3, operators.reduced, operators.normed, flow.branch,
    flow.loop,
)  # fmt: skip
WIDE_IMAGE = (*BOTH, operators.spaced)
WIDE_STEPS = (*BOTH, *[operators.narrow_linear] * 5, flow.scan, *[flow.late] * 2, *[flow.rotary] * 3)

LENGTHS = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 40)
LONG = (64, 65, 100, 140)


def finish(m: Maker, x: Value) -> str:
    """What a model makes of its last value: that, a vector, classes or shares."""
    match m.random.choice(("all", "all", "mean", "classes", "softmax", "max")):
        case "mean":
            return m.op("ReduceMean", x.name, m.ints(*((2, 3) if x.is_image else (1,))), keepdims=int(m.flip()))
        case "classes":
            n = m.random.choice((1, 5, 10, 33))
            if x.is_image:
                y = m.op("Flatten", m.op("GlobalAveragePool", x.name))
            else:
                y = m.op("ReduceMax", x.name, m.ints(1), keepdims=0)
            return m.op("Gemm", y, m.weights(n, x.width, fan=x.width), m.weights(n), transB=1)
        case "softmax":
            return m.op("Softmax", x.name, axis=1 if x.is_image else 2)
        case "max":
            return m.op("ReduceMax", x.name, m.ints(1), keepdims=0)
    return m.op("Identity", x.name)


def make(random: Random, is_wide: bool = False) -> tuple[ModelProto, Maker]:
    """A model, and its maker, which knows sizes to run it at and makes inputs. Wide ones have any operators."""
    is_image = random.random() < 0.6
    of_image = random.choice(("", "", "", "h", "hw"))
    opened = {*of_image, *(k for k in "ns" if random.random() < 0.5)}
    least = random.choice((1, 1, 4, 9))
    usual = [n for n in (LENGTHS if is_image else LENGTHS + LONG) if n >= least]
    fixed = {"n": random.choice((1, 1, 2, 3)), **{k: random.choice(usual) for k in "hws"}}

    def some(k: str) -> int:
        if k == "p":
            return random.choice((0, 1, 9))
        if k not in opened:
            return fixed[k]
        return random.choice((0, 1, 1, 2, 3, 5) if k == "n" else usual)

    sizes = [{k: some(k) for k in "nhwsp"} for _ in range(4 if opened else 1)]
    m = Maker(random, sizes, "n" if "n" in opened else fixed["n"])
    dims = {k: symbol(k, 0) if k in opened else fixed[k] for k in "hws"}
    names = {k: k if k in opened else fixed[k] for k in "hws"}
    m.values += _inputs(m, is_image, dims, names, usual)
    wanted = len(m.values) + random.randint(1, 4)
    for _ in range(40):
        if len(m.values) < wanted:
            x = m.values[-1] if m.flip(0.8) else random.choice(m.values)
            moves = IMAGE if x.is_image else STEPS
            if is_wide and m.flip(0.7):
                moves = WIDE_IMAGE if x.is_image else WIDE_STEPS
            m.grow(random.choice(moves), x)
    ends = [finish(m, m.values[-1]), *m.ends]
    if m.flip(0.3):
        ends.append(m.op("Identity", random.choice(m.values).name))
    opset = 23 if any(n.op_type == "Attention" for n in m.nodes) else 21 if is_wide else 18
    results = [making.value(name, None) for name in ends]
    return making.model(m.nodes, m.inputs, results, m.constants, opset, com_microsoft=1), m


def _inputs(
    m: Maker, is_image: bool, dims: Mapping[str, Dim], names: Mapping[str, int | str], usual: Sequence[int]
) -> list[Value]:
    """Values that a model begins with: an image, or a sequence of features or of places in a table, and often another
    sequence.
    """
    c = m.random.choice(CHANNELS)
    if is_image:
        return [Value(m.input("x", "x", m.batch, c, names["h"], names["w"]), (c, dims["h"], dims["w"]))]
    if m.flip(0.3):
        ids = m.input("x", "ids", m.batch, names["s"])
        return [Value(m.op("Gather", m.weights(20, c), ids), (dims["s"], c))]
    x = Value(m.input("x", "x", m.batch, names["s"], c), (dims["s"], c))
    if m.flip(0.7):
        return [x]
    n, width = m.random.choice(usual), m.random.choice(CHANNELS)
    return [x, Value(m.input("y", "x", m.batch, n, width), (n, width)), x]
