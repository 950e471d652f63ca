"""Quantized graphs in integers: the rules, in the order in which they are tried."""

from __future__ import annotations

from vivace.graph.rewrite import Rule
from vivace.optimize.rules.quantized_moves import dequantize_joined, dequantize_later, mean_of_bytes, quantize_earlier
from vivace.optimize.rules.quantized_products import bias_in_integers, conv_in_integers, matmul_in_integers
from vivace.optimize.rules.quantized_scales import quantized_already, saturate_for_clip

RULES: tuple[Rule, ...] = (
    conv_in_integers,
    matmul_in_integers,
    bias_in_integers,
    quantized_already,
    saturate_for_clip,
    dequantize_later,
    mean_of_bytes,
    dequantize_joined,
    quantize_earlier,
)
