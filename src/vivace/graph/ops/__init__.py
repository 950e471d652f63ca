"""The core ops, by family. `OPS` maps a name to its record; the families' docstrings give each op's attributes.

An op is core only if it has its own lowering or cannot be written with the others. Everything else of ONNX is a
function over these.
"""

from __future__ import annotations

from vivace.graph.graph import Op
from vivace.graph.ops import (
    contraction,
    control,
    elementwise,
    indexing,
    movement,
    normalization,
    quantized,
    recurrent,
    reduction,
    resampling,
    trees,
)

OPS: dict[str, Op] = {
    op.name: op
    for family in (
        elementwise,
        movement,
        indexing,
        reduction,
        contraction,
        quantized,
        normalization,
        resampling,
        recurrent,
        control,
        trees,
    )
    for op in family.FAMILY
}
