"""Small real models, their steps shared out among more threads than there are cores, in a changing order."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.models import find, inputs
from benchmarks.models.quantized import materialise_quantized
from tests import races
from tests.models.test_engines import file_of

import vivace
from vivace.base.knobs import knobs
from vivace.runtime.engine import Engine

# Convolutions, text, recurrence with branches, trees, a plain network.
NAMES = ("ppocr-cls", "magika", "silero-vad", "tabular-forest", "tabular-mlp")


def check(path: Path, name: str, precision: str = "f32") -> None:
    with races.sharing_all():
        engine = vivace.compile(path, threads=1, providers=("native",), precision=precision)
    assert isinstance(engine, Engine)
    races.check(engine.image, inputs(name), threads=(1, 2, 5), repeats=2)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_gives_the_same_bits_in_any_order(name: str) -> None:
    check(file_of(find(name)), name)


def test_a_model_in_bf16_does() -> None:
    with knobs.scope(emulate=True):
        check(file_of(find("ppocr-cls")), "ppocr-cls", "bf16")


def test_a_quantized_model_does() -> None:
    check(materialise_quantized("ppocr-cls"), "ppocr-cls")
