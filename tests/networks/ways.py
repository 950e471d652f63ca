"""Random ways to compile and run a model: number formats, instruction sets, threads, and machines with caches so small
that what is joined for large sizes is joined for small ones.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper
from tests import races
from tests.networks.maker import Array, Maker

from vivace.base import machine as machines
from vivace.base.knobs import knobs
from vivace.base.machine import CacheLevel, Machine, host
from vivace.base.machine import isa as named
from vivace.lower import bands, candidates, chains, row_blocks, strips, tile
from vivace.lower.rules import attention_halves, winograd
from vivace.runtime import slices
from vivace.targets.cpu import blockwise
from vivace.targets.cpu.amx import missing_here

READERS = (machines, bands, candidates, row_blocks, strips, tile, attention_halves, winograd, slices, blockwise)
TARGETS = ("sse", "avx2", "avx512", "avx512+avx512_bf16+avx512_vnni", "host", "host")
FORMATS = ("f32", "f32", "f32", "bf16", "f16", "int8", "int8")


@dataclass(frozen=True, slots=True)
class Way:
    """How to compile and run a model."""

    precision: str
    target: str
    threads: int
    level: int
    l1: int | None  # bytes; None for the caches that the host has
    l2: int
    is_joined: bool  # also where it does not pay
    disable: tuple[str, ...]

    @property
    def options(self) -> dict[str, object]:
        """Arguments of `vivace.compile`, without `disable`."""
        precision = "f32" if self.precision == "int8" else self.precision
        made = {"precision": precision, "threads": self.threads, "target": self.target, "level": self.level}
        return {**made, "providers": ("native",), "cache": False}

    @property
    def machine(self) -> Machine:
        if self.l1 is None:
            return host()
        near = (CacheLevel(1, "data", self.l1, 4, 64, 1), CacheLevel(2, "unified", self.l2, 8, 64, 1))
        return replace(host(), caches=near)


def some_way(random: Random) -> Way:
    targets = [t for t in TARGETS if t == "host" or not missing_here(named(t).flags)]
    return Way(
        random.choice(FORMATS), random.choice(targets), random.choice((1, 2, 3)), random.choice((0, 99, 99, 99)),
        random.choice((None, 1 << 10, 4 << 10, 32 << 10)), 1 << random.randint(10, 20), random.random() < 0.7,
        tuple(x for x in ("winograd", "slices", "epilogues", "placement") if random.random() < 0.1),
    )  # fmt: skip


@contextmanager
def on(way: Way) -> Iterator[None]:
    """As if the caches were of other sizes, everything were worth sharing, and joining paid."""
    machine = way.machine
    with ExitStack() as stack:
        for module in READERS:
            stack.enter_context(mock.patch.object(module, "host", lambda: machine))
        if way.is_joined:
            stack.enter_context(mock.patch.object(strips, "_rows_per_strip", _some_rows))
            stack.enter_context(mock.patch.object(row_blocks, "_rows_per_block", _some_rows))
        stack.enter_context(races.sharing_all())
        stack.enter_context(knobs.scope(emulate=True))
        yield


def _some_rows(chain: object, *_: object) -> int:
    """Rows of a strip or of a block, whether it pays or not."""
    n = chain.d.rows[1].extent if isinstance(chain, chains.Chain) else chain.products[0].n_rows  # type: ignore[attr-defined]
    most = min(n, (1, 2, 3, 5, 8, 1000)[n % 6])
    return -(-n // -(-n // most))


def quantized(model: ModelProto, m: Maker, random: Random) -> ModelProto | None:
    """The model with bytes between its operators, as ONNX Runtime's quantizer makes it; None where it cannot."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [m.feed(s) for s in m.sizes if s["n"]][:2]

        def get_next(self) -> dict[str, Array] | None:
            return self.left.pop() if self.left else None

    activations = random.choice((QuantType.QUInt8, QuantType.QInt8))
    per_channel, weights = random.random() < 0.6, random.choice((QuantType.QInt8, QuantType.QInt8, QuantType.QUInt8))
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):
        path = Path(folder) / "q.onnx"
        try:
            quantize_static(
                model, str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel,
                activation_type=activations, weight_type=weights,
            )  # fmt: skip
        except Exception:  # none of our faults
            return None
        finally:
            logging.disable(logging.NOTSET)
        made = onnx.load(path)
    scales = [numpy_helper.to_array(t) for t in made.graph.initializer if t.name.endswith("scale")]
    return made if all(np.isfinite(s).all() for s in scales) else None
