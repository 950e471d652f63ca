"""ONNX operators as functions over core ops, by family. Importing this package registers them."""

from __future__ import annotations

from vivace.onnx.ops import activation, classic, control, logic, math, movement, nn, normalization, pooling, recurrent, reduction, resize, shape

FAMILIES = (activation, classic, control, logic, math, movement, nn, normalization, pooling, recurrent, reduction, resize, shape)
