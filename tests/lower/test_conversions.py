"""The report of conversions that are steps, with why they are left, and of those that are none."""

from __future__ import annotations

import numpy as np
from tests.lower.harness import BEST, build

from vivace.base.conversions import STEP_PS, format_ps, transpose_ps
from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.machine import ISAS
from vivace.graph.build import Builder
from vivace.graph.graph import Type, Value
from vivace.lower.conversions import conversions, report
from vivace.lower.lowering import lower
from vivace.lower.plan import Plan

ISA = ISAS[BEST]
IMAGE = Type(DType.f32, (1, 24, 9, 16))


def plan_of(make, *types: Type) -> Plan:  # type: ignore[no-untyped-def]
    return lower(build(make, *types), ISA)


def test_what_the_interface_asks_for_is_left() -> None:
    (turned,) = conversions(plan_of(lambda b, x: b.transpose(x, perm=(0, 2, 3, 1)), IMAGE))
    assert (turned.before, turned.after, turned.bytes) == ("f32", "f32", 2 * 4 * 24 * 9 * 16)
    assert turned.cost_us == round(transpose_ps(24 * 9 * 16, 4) * 1e-6, 3) and "output of the model" in turned.why
    (cast,) = conversions(plan_of(lambda b, x: b.cast(x, to=DType.bf16), IMAGE))
    assert (cast.before, cast.after) == ("f32", "bf16")
    assert cast.cost_us == round(format_ps(24 * 9 * 16) * 1e-6, 3) < turned.cost_us


def test_what_is_turned_into_another_format_costs_what_is_read() -> None:
    (halves,) = conversions(plan_of(lambda b, x: b.cast(b.transpose(x, perm=(0, 2, 3, 1)), to=DType.bf16), IMAGE))
    assert (halves.before, halves.after) == ("f32", "bf16")
    assert halves.cost_us == round(transpose_ps(24 * 9 * 16, 4) * 1e-6, 3)


def test_what_is_done_on_the_way_is_counted() -> None:
    def make(b: Builder, x: Value) -> Value:
        y = b.matmul(x, b.const(np.ones((16, 16), np.float32)))
        q = b.quantize(b.relu(y), b.const(np.float32(0.5)), b.const(np.uint8(3)))
        return b.softmax(b.dequantize(q, b.const(np.float32(0.5)), b.const(np.uint8(3))), axis=3)

    plan = plan_of(make, IMAGE)
    found = report(plan, {})
    (left,) = conversions(plan)
    assert found["conversions_fused"] == {"quantize": 1} and left.step == "dequantize"
    assert left.why == "softmax converts nothing as it loads" and (left.before, left.after) == ("u8", "f32")


def test_open_sizes_are_those_that_are_given() -> None:
    open_image = Type(DType.f32, (symbol("N"), 24, 9, 16))
    plan = plan_of(lambda b, x: b.transpose(x, perm=(0, 2, 3, 1)), open_image)
    (one,), (three,) = (report(plan, {"N": n})["conversions"] for n in (1, 3))  # type: ignore[misc]
    assert (one["bytes"], three["bytes"]) == (2 * 4 * 24 * 9 * 16, 3 * 2 * 4 * 24 * 9 * 16)
    assert one["cost_us"] == round(transpose_ps(24 * 9 * 16, 4) * 1e-6, 3) < three["cost_us"]


def test_a_pass_costs_its_elements_and_a_step() -> None:
    assert transpose_ps(0, 4) == format_ps(0) == STEP_PS
    assert transpose_ps(1000, 2) > transpose_ps(1000, 4) > format_ps(1000)  # two bytes are moved one by one
