"""Which function lowers which op. Element-wise groups share one rule."""

from __future__ import annotations

from collections.abc import Callable

from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.rules.attention import lower_attention
from vivace.lower.rules.blockwise import lower_matmul_blocks
from vivace.lower.rules.contraction import lower_matmul
from vivace.lower.rules.control import lower_if, lower_loop, lower_onnx
from vivace.lower.rules.conv import lower_conv
from vivace.lower.rules.conv_transpose import lower_conv_transpose
from vivace.lower.rules.elementwise import dims_values, lower_elementwise
from vivace.lower.rules.indexing import (
    lower_gather,
    lower_gather_elements,
    lower_gather_nd,
    lower_scatter_elements,
    lower_scatter_nd,
)
from vivace.lower.rules.pixels import lower_pixels
from vivace.lower.rules.placement import lower_concat, lower_pad
from vivace.lower.rules.pool import lower_pool
from vivace.lower.rules.quantized import lower_conv_integer, lower_matmul_integer
from vivace.lower.rules.recurrent import lower_recurrent
from vivace.lower.rules.resize import lower_resize
from vivace.lower.rules.rowwise import lower_norm, lower_reduce, lower_softmax
from vivace.lower.rules.scan import lower_arg, lower_cumsum
from vivace.lower.rules.topk import lower_topk
from vivace.lower.rules.trees import lower_tree_ensemble

RULES: dict[str, Callable[[Lowering, Group], None]] = {
    "elementwise": lower_elementwise,
    "dims": dims_values,
    "matmul": lower_matmul,
    "conv": lower_conv,
    "conv_transpose": lower_conv_transpose,
    "pixels": lower_pixels,
    "conv_integer": lower_conv_integer,
    "matmul_integer": lower_matmul_integer,
    "matmul_blocks": lower_matmul_blocks,
    "softmax": lower_softmax,
    "log_softmax": lower_softmax,
    "layer_norm": lower_norm,
    "rms_norm": lower_norm,
    **dict.fromkeys(("reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod"), lower_reduce),
    "max_pool": lower_pool,
    "avg_pool": lower_pool,
    "concat": lower_concat,
    "pad": lower_pad,
    "attention": lower_attention,
    **dict.fromkeys(("lstm", "gru", "rnn"), lower_recurrent),
    "resize": lower_resize,
    "argmax": lower_arg,
    "argmin": lower_arg,
    "cumsum": lower_cumsum,
    "topk": lower_topk,
    "gather": lower_gather,
    "gather_elements": lower_gather_elements,
    "gather_nd": lower_gather_nd,
    "scatter_elements": lower_scatter_elements,
    "scatter_nd": lower_scatter_nd,
    "tree_ensemble": lower_tree_ensemble,
    "if": lower_if,
    "loop": lower_loop,
    "onnx": lower_onnx,
}
