"""What disappears into constant weights: the rules, in the order in which they are tried.

The products of constants are rounded once at compile time instead of once per element: equal up to the rounding of one
multiplication.
"""

from __future__ import annotations

from vivace.graph.rewrite import Rule
from vivace.optimize.rules.conv_taps import crop_taps
from vivace.optimize.rules.conv_weights import (
    bias_before_conv,
    bias_into_conv,
    pad_into_window,
    scale_before_conv,
    scale_into_conv,
)
from vivace.optimize.rules.matmul_weights import (
    scale_before_matmul,
    scale_into_matmul,
    scale_past_bias,
    transpose_into_matmul,
)

RULES: tuple[Rule, ...] = (
    scale_into_conv,
    bias_into_conv,
    scale_before_conv,
    bias_before_conv,
    scale_into_matmul,
    scale_past_bias,
    scale_before_matmul,
    pad_into_window,
    transpose_into_matmul,
    crop_taps,
)
