"""Few rows of A against block-wise weights in f32: weights become f32 in registers. A block is summed without its
scale, which then multiplies the sum; but with shifts that are floats, weights are made as they are.
"""

from __future__ import annotations

from vivace.base.dtypes import DType
from vivace.loops.blockwise import BlockwiseProduct
from vivace.targets.cpu.blockwise_store import store_rows
from vivace.targets.cpu.blockwise_weights import Panel, Weights
from vivace.targets.cpu.contraction_plan import Plan, load_dims
from vivace.targets.cpu.contraction_step import multiply_add, splat
from vivace.targets.cpu.contraction_text import Text
from vivace.targets.cpu.contraction_vector import mask_text, vector_type


def float_symbol(w: BlockwiseProduct, rows: int, tail: bool) -> str:
    return f"{w.name}.rows{rows}{'.tail' if tail else ''}"


def float_function(w: BlockwiseProduct, p: Plan, rows: int, tail: bool) -> tuple[str, dict[str, str]]:
    """The function for `rows` rows of A and one panel."""
    t, isa, kind = Text(), p.isa, vector_type(p.isa)
    width, weights = isa.n_f32_lanes, Weights(w, isa)
    vectors = -(-(w.n % w.lanes) // width) if tail else w.lanes // width
    dims = load_dims(t, p)
    size = w.a.dtype.size_bytes
    a_rows = [t.mul(t.mul(t.dim(w.m.a, dims), size), r) for r in range(rows)]
    zero = "zeroinitializer"
    adds = w.shifts is not None and not w.shifts.dtype.is_float
    is_whole = w.shifts is not None and w.shifts.dtype.is_float

    def weight(level: str, scale: str, shift: str) -> str:
        if adds:
            return t.op(f"fadd {kind} {level}, {shift}")
        return multiply_add(t, isa, level, scale, shift) if is_whole else level

    def group(a: str, b: str, n_steps: int, numbers: list[tuple[str, str]], acc: list[str]) -> list[str]:
        """Adds up to a word of steps to the accumulators of a block."""
        levels = [weights.levels(t, b, v) for v in range(vectors)]
        for s in range(n_steps):
            values = [splat(t, isa, _element(t, w, t.at(t.at(a, x), s * size)), "float") for x in a_rows]
            for v in range(vectors):
                q = weight(levels[v](s), *numbers[v])
                for r in range(rows):
                    acc[r * vectors + v] = multiply_add(t, isa, values[r], q, acc[r * vectors + v])
        return acc

    def block(a: str, at: Panel, n_steps: int, totals: list[str]) -> list[str]:
        n_groups, left = divmod(n_steps, w.steps)
        numbers = [(weights.scale(t, at.scales, v), weights.shift(t, at.shifts, v)) for v in range(vectors)]
        acc = totals if is_whole else [zero] * (rows * vectors)
        if n_groups:
            acc = t.reduce_loop(
                n_groups,
                [(kind, x) for x in acc],
                lambda g, c: group(
                    t.at(a, t.mul(g, size * w.steps)), t.at(at.b, t.mul(g, weights.group_bytes)), w.steps, numbers,
                    list(c),
                ),
            )  # fmt: skip
        if left:
            end = t.at(at.b, weights.group_bytes * n_groups)
            acc = group(t.at(a, size * w.steps * n_groups), end, left, numbers, list(acc))
        if is_whole:
            return list(acc)
        return [multiply_add(t, isa, x, numbers[i % vectors][0], totals[i]) for i, x in enumerate(acc)]

    whole, left_over = divmod(w.k, w.block)
    totals = [zero] * (rows * vectors)
    panel = Panel("%b", "%scales", "%shifts")
    if whole:
        totals = t.reduce_loop(
            whole,
            [(kind, x) for x in totals],
            lambda i, c: block(t.at("%a", t.mul(i, w.block * size)), panel.block(t, w, i), w.block, list(c)),
        )
    if left_over:
        totals = block(t.at("%a", whole * w.block * size), panel.block(t, w, whole), left_over, list(totals))
    masks = [mask_text(t, isa, w.n % w.lanes - v * width) if tail else None for v in range(vectors)]
    store_rows(t, w, p, dims, [totals[r * vectors : (r + 1) * vectors] for r in range(rows)], masks)
    parameters = "ptr %args, ptr %a, ptr %b, ptr %scales, ptr %shifts, ptr %out, i64 %n, i64 %m"
    head = f"define internal void @{float_symbol(w, rows, tail)}({parameters}) noinline #0 {{"
    return "\n".join([head, "entry:", *t.lines, "}"]), t.declares


def _element(t: Text, w: BlockwiseProduct, pointer: str) -> str:
    """An element of A as f32."""
    if w.a.dtype is DType.f32:
        return t.op(f"load float, ptr {pointer}, align 4")
    wide = t.op(f"zext i16 {t.op(f'load i16, ptr {pointer}, align 2')} to i32")
    return t.op(f"bitcast i32 {t.op(f'shl i32 {wide}, 16')} to float")
