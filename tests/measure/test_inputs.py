"""Shapes are read, sizes follow from them, and generated arrays are seeded and sensible."""

from __future__ import annotations

import numpy as np
import pytest

from vivace.base.dims import maximum, symbol
from vivace.base.dtypes import DType
from vivace.base.errors import InputError, UnsupportedError
from vivace.base.specs import TensorSpec
from vivace.measure.inputs import bind, check_arrays, choose_shapes, generate, parse_shapes

N, P, S = symbol("N"), symbol("past"), symbol("seq")
DECODER = (
    TensorSpec("input_ids", DType.i64, (N, S)),
    TensorSpec("attention_mask", DType.i64, (N, P + S)),
    TensorSpec("past.0.key", DType.f32, (N, 3, P, 64)),
)
PICTURE = (TensorSpec("x", DType.f32, (N, 3, symbol("H"), symbol("W"))),)


def test_grammar() -> None:
    assert parse_shapes("x:1x3x224x224,ids:1x16") == {"x": (1, 3, 224, 224), "ids": (1, 16)}
    assert parse_shapes("in:0:1x5,sr:") == {"in:0": (1, 5), "sr": ()}
    assert parse_shapes("") == {}


@pytest.mark.parametrize("text", ["x", "x=1x3", "x:1x-3", "x:1,3", ":1x3", "x:axb", "x:1x3,x:2x3"])
def test_grammar_refuses(text: str) -> None:
    with pytest.raises(InputError, match="--shapes"):
        parse_shapes(text)


def test_sizes_follow_from_expressions() -> None:
    assert bind(DECODER, {"attention_mask": (1, 20), "input_ids": (1, 4)}) == {"N": 1, "seq": 4, "past": 16}
    shapes, sizes = choose_shapes(DECODER, {"attention_mask": (2, 20), "input_ids": (2, 4)})
    assert shapes["past.0.key"] == (2, 3, 16, 64)
    assert sizes == {"N": 2, "seq": 4, "past": 16}


def test_usual_sizes() -> None:
    assert choose_shapes(PICTURE, {})[0] == {"x": (1, 3, 224, 224)}
    shapes, _ = choose_shapes(DECODER, {})
    assert shapes == {"input_ids": (1, 128), "attention_mask": (1, 128), "past.0.key": (1, 3, 0, 64)}


def test_usual_sizes_keep_to_bounds_and_to_what_branches_take() -> None:
    specs = (TensorSpec("x", DType.f32, (1, symbol("T", 1, 99))), TensorSpec("y", DType.f32, (N, symbol("S"))))
    assert choose_shapes(specs, {})[0] == {"x": (1, 99), "y": (1, 128)}
    s = symbol("S")
    one, other, far = (maximum(low - s, 0) + maximum(s - high, 0) for low, high in ((192, 703), (96, 351), (4, 9)))
    assert choose_shapes(specs, {}, (one, other, far))[0]["y"] == (1, 192)
    assert choose_shapes(specs, {}, (far, one))[0]["y"] == (1, 9)
    assert choose_shapes(specs, {"y": (2, 5)}, (one,))[0]["y"] == (2, 5)


@pytest.mark.parametrize(
    "shapes",
    [
        {"y": (1,)},
        {"x": (1, 3, 224)},
        {"x": (1, 4, 224, 224)},
    ],
)
def test_shapes_that_do_not_fit(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(InputError):
        choose_shapes(PICTURE, shapes)


def test_contradiction() -> None:
    with pytest.raises(InputError, match="attention_mask"):
        bind(DECODER, {"input_ids": (1, 4), "attention_mask": (2, 4)})
    with pytest.raises(InputError, match="impossible"):
        bind(DECODER, {"input_ids": (1, 4), "attention_mask": (1, 3)})


def test_arrays_are_seeded_and_sensible() -> None:
    specs = (
        *DECODER,
        TensorSpec("position_ids", DType.i64, (1, 4)),
        TensorSpec("token_type_ids", DType.i64, (1, 4)),
        TensorSpec("sr", DType.i64, ()),
        TensorSpec("image", DType.u8, (64,)),
        TensorSpec("flag", DType.bool, (64,)),
        TensorSpec("half", DType.f16, (4,)),
    )
    shapes, _ = choose_shapes(specs, {"input_ids": (1, 4)})
    arrays = generate(specs, shapes, seed=3)
    again = generate(specs, shapes, seed=3)
    other = generate(specs, shapes, seed=4)
    for spec in specs:
        assert arrays[spec.name].dtype == spec.dtype.numpy
        assert arrays[spec.name].shape == shapes[spec.name]
        np.testing.assert_array_equal(arrays[spec.name], again[spec.name])
    assert not np.array_equal(arrays["image"], other["image"])
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 1]]
    assert arrays["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert not arrays["token_type_ids"].any()
    assert arrays["sr"] == 16_000
    assert arrays["input_ids"].max() < 100
    check_arrays(specs, arrays)


def test_strings_cannot_be_generated() -> None:
    with pytest.raises(UnsupportedError, match="text"):
        generate([TensorSpec("text", DType.string, (1,))], {"text": (1,)})


def test_check_arrays() -> None:
    with pytest.raises(InputError, match="--input"):
        check_arrays(PICTURE, {})
    with pytest.raises(InputError, match="float64"):
        check_arrays(PICTURE, {"x": np.zeros((1, 3, 8, 8))})
