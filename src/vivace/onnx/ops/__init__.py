"""ONNX operators as functions over core ops, by family. Importing this package registers them."""

from __future__ import annotations

from vivace.onnx.ops import (
    activation,
    attention,
    classic,
    control,
    logic,
    math,
    movement,
    nn,
    normalization,
    pooling,
    quant,
    quant_integer,
    quant_linear,
    recurrent,
    reduction,
    resize,
    shape,
    trees,
)

FAMILIES = (
    activation,
    attention,
    classic,
    control,
    logic,
    math,
    movement,
    nn,
    normalization,
    pooling,
    quant,
    quant_integer,
    quant_linear,
    recurrent,
    reduction,
    resize,
    shape,
    trees,
)
