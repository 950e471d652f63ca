"""One random operator under construction, for `single`: its node, constants, and inputs with their arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

import numpy as np
from onnx import NodeProto, helper

Array = np.ndarray
T = TypeVar("T")
OPSETS = (13, 17, 18, 18, 19, 21, 22)
LENGTHS = (1, 1, 2, 3, 4, 5, 7, 8, 16, 17, 33)


@dataclass
class Draw:
    """A model of one operator, or of few around it."""

    random: Random
    opset: int = 18
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    inputs: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.numbers = np.random.default_rng(self.random.randrange(1 << 30))
        self.opset = self.pick(*OPSETS)

    def pick(self, *of: T) -> T:
        return self.random.choice(of)

    def flip(self, p: float = 0.5) -> bool:
        return self.random.random() < p

    def size(self, low: int = 1, high: int = 9) -> int:
        return self.random.randint(low, high)

    def shape(self, rank: int, low: int = 1, high: int = 7) -> tuple[int, ...]:
        return tuple(self.size(low, high) for _ in range(rank))

    def axis(self, rank: int) -> int:
        return self.random.randint(-rank, rank - 1)

    def axes(self, rank: int, least: int = 0) -> list[int]:
        """Different ones, some counted from the end."""
        found = self.random.sample(range(rank), self.size(least, rank))
        return [a - rank if self.flip(0.3) else a for a in found]

    def normal(self, *shape: int) -> Array:
        return self.numbers.standard_normal(shape).astype(np.float32)

    def input(self, array: Any) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs[name] = np.asarray(array)
        return name

    def x(self, *shape: int, dtype: Any = np.float32, scale: float = 1.0) -> str:
        """An input of random numbers, small ones if they are integers."""
        kind = np.dtype(dtype).kind
        if kind in "iu":
            return self.input(self.numbers.integers(0 if kind == "u" else -9, 10, shape).astype(dtype))
        a = self.numbers.standard_normal(shape) * scale
        return self.input(a > 0 if kind == "b" else a.astype(dtype))

    def const(self, array: Any, dtype: Any = None) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array, dtype)
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def either(self, array: Any) -> str:
        """A constant or an input."""
        return self.const(array) if self.flip(0.6) else self.input(array)

    def weight(self, *shape: int) -> str:
        return self.const(self.normal(*shape))

    def op(self, op: str, *inputs: str, n: int = 1, **attrs: Any) -> str:
        """Append a node; the name of its first result. Trailing inputs without a name are left out, attributes that are
        None too.
        """
        names = [f"v{len(self.nodes)}_{i}" for i in range(n)]
        used = list(inputs)
        while used and not used[-1]:
            used.pop()
        given = {k: v for k, v in attrs.items() if v is not None}
        self.nodes.append(helper.make_node(op, used, names, **given))
        return names[0]

    def results(self, op: str, *inputs: str, n: int, **attrs: Any) -> Sequence[str]:
        """As `op`, for all results of a node of several."""
        self.op(op, *inputs, n=n, **attrs)
        return list(self.nodes[-1].output)


Family = Callable[[Draw], Sequence[str]]
