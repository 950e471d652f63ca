"""Activations from every spelling that exporters use. Each is exact up to the rounding of the steps that it
replaces."""

from __future__ import annotations

from vivace.graph.graph import Value
from vivace.graph.pattern import SQRT_2_OVER_PI, SQRT_HALF, is_float, pattern
from vivace.graph.rewrite import Rule


def _floats_only(x: Value) -> str | None:
    return None if is_float(x) else f"{x.dtype} is no float"


fuse_gelu = pattern(
    "fuse_gelu",
    before=lambda op, x: op.mul(x, op.add(op.erf(op.either(op.mul(x, SQRT_HALF), op.div(x, SQRT_HALF * 2))), 1), 0.5),
    after=lambda op, x: op.gelu(x, approximate="none"),
    doc="x * (1 + erf(x / sqrt(2))) * 0.5 = gelu(x), in any order and association",
    choices=2,
)

fuse_gelu_halves = pattern(
    "fuse_gelu_halves",
    before=lambda op, x: op.mul(
        x, op.add(op.mul(op.erf(op.either(op.mul(x, SQRT_HALF), op.div(x, SQRT_HALF * 2))), 0.5), 0.5)
    ),
    after=lambda op, x: op.gelu(x, approximate="none"),
    doc="x * (0.5 + 0.5 * erf(x / sqrt(2))) = gelu(x)",
    choices=2,
)

fuse_gelu_tanh = pattern(
    "fuse_gelu_tanh",
    before=lambda op, x: op.mul(
        x,
        op.add(
            op.tanh(
                op.either(
                    op.mul(
                        op.add(x, op.either(op.mul(op.pow(x, 3.0), 0.044715), op.mul(x, x, x, 0.044715))),
                        SQRT_2_OVER_PI,
                    ),
                    op.mul(x, op.add(op.mul(op.mul(x, x), 0.044715), 1), SQRT_2_OVER_PI),
                    op.mul(x, op.add(op.mul(op.mul(x, x), 0.044715 * SQRT_2_OVER_PI), SQRT_2_OVER_PI)),
                    op.add(op.mul(x, SQRT_2_OVER_PI), op.mul(x, x, x, 0.044715 * SQRT_2_OVER_PI)),
                )
            ),
            1,
        ),
        0.5,
    ),
    after=lambda op, x: op.gelu(x, approximate="tanh"),
    doc="x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) * 0.5 = gelu(x, tanh), the cubic in four spellings",
    choices=4,
)

fuse_silu = pattern(
    "fuse_silu",
    before=lambda op, x: op.either(
        op.mul(x, op.sigmoid(x)),
        op.div(x, op.add(op.exp(op.neg(x)), 1)),
        op.mul(x, op.div(1.0, op.add(op.exp(op.neg(x)), 1))),
    ),
    after=lambda op, x: op.silu(x),
    when=_floats_only,
    doc="x * sigmoid(x) = x / (1 + exp(-x)) = silu(x)",
    choices=3,
)

fuse_sigmoid = pattern(
    "fuse_sigmoid",
    before=lambda op, x: op.div(1.0, op.add(op.exp(op.neg(x)), 1)),
    after=lambda op, x: op.sigmoid(x),
    when=_floats_only,
    doc="1 / (1 + exp(-x)) = sigmoid(x)",
)

fuse_hard_swish = pattern(
    "fuse_hard_swish",
    before=lambda op, x: op.either(
        op.mul(x, op.hard_sigmoid(x, alpha=op.attr("alpha", 1 / 6), beta=op.attr("beta", 0.5))),
        op.div(op.mul(x, op.clip(op.add(x, 3), min=op.attr("low", 0.0), max=op.attr("high", 6.0))), 6.0),
        op.mul(x, op.div(op.clip(op.add(x, 3), min=op.attr("low", 0.0), max=op.attr("high", 6.0)), 6.0)),
        op.mul(x, op.clip(op.add(x, 3), min=op.attr("low", 0.0), max=op.attr("high", 6.0)), 1 / 6),
    ),
    after=lambda op, x: op.hard_swish(x),
    when=lambda alpha, beta, low, high: (
        None
        if (alpha is None or (abs(alpha - 1 / 6) < 1e-6 and beta == 0.5))
        and (alpha is not None or (low == 0 and high == 6))
        else f"its constants are {alpha}, {beta}, {low}, {high}"
    ),
    doc="x * clip(x + 3, 0, 6) / 6 = x * hard_sigmoid(x, 1/6, 0.5) = hard_swish(x)",
    choices=4,
)

fuse_hard_sigmoid = pattern(
    "fuse_hard_sigmoid",
    before=lambda op, x: op.either(
        op.div(op.clip(op.add(x, 3), min=op.attr("low", 0.0), max=op.attr("high", 6.0)), 6.0),
        op.mul(op.clip(op.add(x, 3), min=op.attr("low", 0.0), max=op.attr("high", 6.0)), 1 / 6),
    ),
    after=lambda op, x: op.hard_sigmoid(x, alpha=1 / 6, beta=0.5),
    when=lambda low, high: None if low == 0 and high == 6 else f"it clips to {low}, {high}",
    doc="clip(x + 3, 0, 6) / 6 = hard_sigmoid(x, 1/6, 0.5)",
    choices=2,
)

fuse_affine_hard_sigmoid = pattern(
    "fuse_affine_hard_sigmoid",
    before=lambda op, x: op.clip(
        op.add(op.mul(x, op.scalar("alpha", 0.2)), op.scalar("beta", 0.5)),
        min=op.attr("low", 0.0),
        max=op.attr("high", 1.0),
    ),
    after=lambda op, x, alpha, beta: op.hard_sigmoid(x, alpha=float(alpha), beta=float(beta)),
    when=lambda low, high: None if low == 0 and high == 1 else f"it clips to {low}, {high}",
    doc="clip(a * x + b, 0, 1) = hard_sigmoid(x, a, b)",
)

fuse_leaky_relu = pattern(
    "fuse_leaky_relu",
    before=lambda op, x: op.max(x, op.mul(x, op.scalar("alpha", 0.1))),
    after=lambda op, x, alpha: op.leaky_relu(x, alpha=float(alpha)),
    when=lambda x, alpha: None if is_float(x) and 0 < alpha < 1 else f"alpha is {alpha}",
    doc="max(x, a * x) = leaky_relu(x, a) for 0 < a < 1",
)

fuse_log1p = pattern(
    "fuse_log1p",
    before=lambda op, x: op.log(op.add(x, 1)),
    after=lambda op, x: op.log1p(x),
    doc="log(x + 1) = log1p(x), which keeps the digits of a small x",
    sample=("f32[2,8]",),
)

fuse_expm1 = pattern(
    "fuse_expm1",
    before=lambda op, x: op.add(op.exp(x), -1),
    after=lambda op, x: op.expm1(x),
    doc="exp(x) - 1 = expm1(x), which keeps the digits of a small x",
)

RULES: tuple[Rule, ...] = (
    fuse_gelu,
    fuse_gelu_halves,
    fuse_gelu_tanh,
    fuse_sigmoid,
    fuse_silu,
    fuse_hard_swish,
    fuse_hard_sigmoid,
    fuse_affine_hard_sigmoid,
    fuse_leaky_relu,
    fuse_log1p,
    fuse_expm1,
)
