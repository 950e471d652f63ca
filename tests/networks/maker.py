"""A random model under construction: its nodes, constants and inputs, and the sizes of its open dims to run it at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

import numpy as np
from tests.onnx import making

from vivace.base.dims import Dim, evaluate

CHANNELS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 16, 17, 24, 31, 32, 32, 33, 48, 64, 100, 130)
Array = np.ndarray
Sizes = Mapping[str, int]
ACTIVATIONS = (
    "relu", "relu", "six", "swish", "silu", "silu2", "leaky", "gelu", "sigmoid", "tanh", "prelu", "none", "elu", "hard",
)  # fmt: skip
LARGEST = 100_000  # elements of a value


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the model: [batch, channels, height, width] or [batch, steps, features], batch left out."""

    name: str
    shape: tuple[Dim, ...]

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3

    @property
    def width(self) -> int:
        """Channels or features."""
        n = self.shape[0 if self.is_image else 1]
        assert isinstance(n, int)
        return n


@dataclass
class Maker:
    """A model under construction."""

    random: Random
    sizes: list[Sizes]
    batch: int | str
    nodes: list[making.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    inputs: list[making.ValueInfoProto] = field(default_factory=list)
    feeds: dict[str, tuple[str, tuple[int | str, ...]]] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    n_made: int = 0

    def __post_init__(self) -> None:
        self.numbers = np.random.default_rng(self.random.randrange(1 << 30))

    def op(self, op: str, *inputs: str, n: int = 1, **attrs: object) -> str:
        """Append a node; the name of its result, or of several with spaces between."""
        names = " ".join(f"v{self.n_made}_{i}" for i in range(n))
        self.n_made += 1
        self.nodes.append(making.node(op, " ".join(inputs), names, **attrs))
        return names

    def const(self, array: object, dtype: type = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array, dtype)
        return name

    def ints(self, *values: int) -> str:
        return self.const(list(values), np.int64)

    def weights(self, *shape: int, fan: int = 0) -> str:
        return self.const(self.numbers.standard_normal(shape) * (1.4 / max(fan, 1) ** 0.5 if fan else 0.3))

    def input(self, name: str, kind: str, *shape: int | str) -> str:
        self.feeds[name] = (kind, shape)
        self.inputs.append(making.value(name, shape, making.I64 if kind in ("ids", "mask") else making.F32))
        return name

    def flip(self, p: float = 0.5) -> bool:
        return self.random.random() < p

    def fits(self, *dims: Dim) -> bool:
        """Whether these sizes are some, and not too large, whatever the open dims are."""
        found = [[evaluate(d, s) for d in dims] for s in self.sizes]
        most = [int(np.prod(one)) * max(1, s["n"]) for one, s in zip(found, self.sizes, strict=True)]
        return all(min(sizes) > 0 for sizes in found) and max(most) <= LARGEST

    def grow(self, move: Move, x: Value) -> None:
        """Append what a move makes of a value, if anything."""
        kept = len(self.nodes), dict(self.constants), dict(self.feeds), list(self.inputs), list(self.ends)
        y = move(self, x)
        if y is not None:
            self.values.append(y)
            return
        del self.nodes[kept[0] :]
        self.constants, self.feeds, self.inputs, self.ends = kept[1:]

    def taken(self, since: int) -> list[making.NodeProto]:
        """The nodes since then, which are those of a nested graph from now on."""
        nodes = self.nodes[since:]
        del self.nodes[since:]
        return nodes

    def like(self, x: Value) -> Value | None:
        """Another value of the same shape."""
        found = [v for v in self.values if v.shape == x.shape and v.name != x.name]
        return self.random.choice(found) if found else None

    def feed(self, sizes: Sizes) -> dict[str, Array]:
        """Inputs at one size."""
        made = {}
        for name, (kind, dims) in self.feeds.items():
            shape = [sizes.get(d, 0) if isinstance(d, str) else d for d in dims]
            if kind == "ids":
                made[name] = self.numbers.integers(0, 20, shape).astype(np.int64)
            elif kind == "mask":
                made[name] = (self.numbers.random(shape) < 0.7).astype(np.int64)
                made[name][..., :1] = 1
            else:
                made[name] = self.numbers.standard_normal(shape).astype(np.float32)
        return made


Move = Callable[[Maker, Value], Value | None]


def activate(m: Maker, x: str, channels: int = 0) -> str:
    """An activation as exporters write it; `channels` of an image."""
    match m.random.choice(ACTIVATIONS):
        case "relu":
            return m.op("Relu", x)
        case "six":
            return m.op("Clip", x, m.const(0), m.const(6))
        case "swish":
            return m.op("HardSwish", x)
        case "silu":
            return m.op("Mul", x, m.op("Sigmoid", x))
        case "silu2":
            return m.op("Mul", m.op("Sigmoid", x), x)
        case "leaky":
            return m.op("LeakyRelu", x, alpha=0.1)
        case "gelu":
            erf = m.op("Erf", m.op("Div", x, m.const(2**0.5)))
            return m.op("Mul", m.op("Mul", x, m.op("Add", erf, m.const(1))), m.const(0.5))
        case "sigmoid":
            return m.op("Sigmoid", x)
        case "tanh":
            return m.op("Tanh", x)
        case "prelu" if channels:
            return m.op("PRelu", x, m.const(m.numbers.random((channels, 1, 1)) / 4))
        case "elu":
            return m.op("Elu", x)
        case "hard":
            clipped = m.op("Clip", m.op("Add", x, m.const(3)), m.const(0), m.const(6))
            return m.op("Div", m.op("Mul", x, clipped), m.const(6))
    return x
