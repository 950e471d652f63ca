"""What rules for moves, indices and constants must leave alone: what would be something else, or cost more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.optimize.refusals import F32, USED, Case, full, leaves_alone, names

from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.graph.rewrite import Example


def one_hot(e: Example, first: int, w: Value) -> Value:
    """cast(x == first..) @ w"""
    line = e.const(np.arange(first, first + 4, dtype=np.int32))
    return e.matmul(e.cast(e.eq(e.x("i32[5,1]"), line), to=DType.f32), w)


def part(e: Example, start: int, step: int) -> Value:
    """Two elements of one tensor after the other."""
    whole = e.concat(e.x("f32[3]"), e.x("f32[4]"), axis=0)
    return e.slice(whole, starts=(start,), sizes=(2,), steps=(step,))


def pad(e: Example, x: Value, value: float, mode: str = "constant") -> Value:
    return e.pad(x, before=(1,), after=(0,), mode=mode, value=value)


def line(e: Example, n: int, *shape: int) -> Value:
    """0, 1, ... in a shape."""
    return e.reshape(e.iota(shape=(n,), axis=0, dtype=DType.i64), shape=shape or (n,))


def every(e: Example, x: str, *indices: Value, batch_dims: int = 0) -> Value:
    return e.gather_nd(e.x(x), e.concat(*indices, axis=-1), batch_dims=batch_dims)


def row_of(e: Example, ids: str, numbers: np.ndarray, on: float = 1.0) -> Value:
    """(`on` where x == numbers, 0 elsewhere) @ w"""
    same = e.eq(e.x(ids), e.const(numbers))
    return e.matmul(e.where(same, full(e, on), full(e, 0)), e.w("f32[4,3]"))


def pieces(e: Example, *slices: tuple[int, int], step: int = 1, other: bool = False) -> Value:
    """Slices of one tensor (or of two), begin and size, joined again."""
    x = e.x("f32[9]")
    sources = [x, e.x("f32[9]") if other else x]
    made = [e.slice(y, starts=(a,), sizes=(n,), steps=(step,)) for y, (a, n) in zip(sources, slices)]
    return e.neg(e.concat(*made, axis=0))


def corners(e: Example) -> Value:
    """Two columns of different rows."""
    x = e.x("f32[2,2]")
    a, b = (e.slice(x, starts=(i, i), sizes=(1, 1), steps=(1, 1)) for i in range(2))
    return e.neg(e.concat(a, b, axis=1))


def turned(e: Example, middle: tuple[int, ...]) -> Value:
    return e.transpose(e.reshape(e.x("f32[2,3,4,5]"), shape=middle), perm=(0, 2, 1))


def thin(e: Example, outer: float) -> Value:
    """A convolution of an image so low that the outer rows of the filters meet only padding."""
    w = np.ones((4, 1, 5, 5), F32)
    w[:, :, 0] = outer
    pads = {"before": (2, 2), "after": (2, 2)}
    one = {"strides": (1, 1), "dilations": (1, 1), "layout": "NCHW"}
    return e.conv(e.x("f32[1,4,2,9]"), e.const(w), group=4, **one, **pads)


CASES: list[Case] = [
    ("negate_comparison", "a NaN compares false", lambda e: e.not_(e.lt(e.x("f32[4]"), e.x("f32[4]")))),
    ("join_casts", "does not hold every i32", lambda e: e.cast(e.cast(e.x("i32[4]"), to=DType.f32), to=DType.f64)),
    ("join_casts", "does not hold every f32", lambda e: e.cast(e.cast(e.x("f32[4]"), to=DType.f16), to=DType.f32)),
    ("drop_zero", "-0.0 + 0.0", lambda e: e.neg(e.add(e.x("f32[4]"), 0.0))),
    ("drop_zero", "-0.0 + 0.0", lambda e: e.neg(e.sub(e.x("f32[4]"), full(e, -0.0)))),
    ("drop_one", "widens", lambda e: e.neg(e.mul(e.x("f32[4]"), full(e, 1, 2, 4)))),
    ("multiply_by_zero", None, lambda e: e.neg(e.mul(e.x("f32[4]"), 0.0))),
    ("join_clips", None, lambda e: e.max(e.x("f32[4]"), full(e, math.nan))),
    ("slice_of_one_part", "crosses", lambda e: part(e, 2, 1)),
    ("slice_of_one_part", "step", lambda e: part(e, 0, 2)),
    ("join_pads", "different values", lambda e: pad(e, pad(e, e.x("f32[3]"), 1.0), 2.0)),
    ("gather_as_slice", "no constant step", lambda e: e.gather(e.x("f32[4,3]"), e.const(np.array([0, 1, 3])), axis=0)),
    ("gather_one_hot", "not finite", lambda e: one_hot(e, 0, full(e, math.nan, 4, 3))),
    ("gather_one_hot", "no range", lambda e: one_hot(e, 1, e.w("f32[4,3]"))),
    ("compare_index_with_zero", None, lambda e: e.not_(e.ge(e.iota(shape=(5,), axis=0, dtype=DType.i64), 1))),
    ("negate_comparison", None, lambda e: (e.not_(c := e.eq(e.x("f32[4]"), e.x("f32[4]"))), c)),
    ("multiply_by_zero", None, lambda e: e.neg(e.mul(e.x("i64[N]"), 0))),
    ("join_clips", None, lambda e: e.max(e.x("i32[4]"), 0)),
    ("join_clips", None, lambda e: e.max(e.x("f32[4]"), full(e, 0, 1, 1))),
    ("subtract_as_add", None, lambda e: e.sub(e.x("u8[4]"), e.const(np.uint8(3)))),
    ("divide_as_multiply", "not a power of two", lambda e: e.div(e.x("f32[4]"), 3.0)),
    ("divide_as_multiply", "not a power of two", lambda e: e.div(e.x("f32[4]"), 2.0**-127)),
    ("divide_as_multiply", None, lambda e: e.div(e.x("i32[4]"), 2)),
    ("join_constants", USED, lambda e: (e.add(y := e.add(e.x("f32[4]"), e.w("f32[4]")), e.w("f32[4]")), e.neg(y))),
    ("join_constants", "larger than both", lambda e: e.add(e.add(e.x("f32[4,4]"), e.w("f32[4,1]")), e.w("f32[1,4]"))),
    ("join_constants", "overflow or underflow", lambda e: e.mul(e.mul(e.x("f32[4]"), 1e30), 1e30)),
    ("join_constants", "overflow or underflow", lambda e: e.mul(e.mul(e.x("f32[4]"), 1e-30), 1e-30)),
    ("fold_constant", "more than", lambda e: e.expand(e.const(F32(1)), shape=(1 << 15,))),
    ("fold_constant", "symbolic", lambda e: e.expand(full(e, 1), shape=e.x("f32[N]").shape)),
    ("gather_all_rows", None, lambda e: e.gather(e.x("f32[4,3]"), line(e, 3), axis=0)),
    ("gather_all_rows", None, lambda e: e.gather(e.x("f32[4]"), line(e, 4, 1, 4), axis=0)),
    ("gather_everything", "over its whole axis", lambda e: every(e, "f32[4,3]", line(e, 3, 3, 1))),
    ("gather_everything", "over its whole axis", lambda e: every(e, "f32[3,3]", *2 * [line(e, 3, 3, 1)])),
    ("gather_everything", "over its whole axis", lambda e: every(e, "f32[6]", line(e, 6, 2, 3, 1))),
    ("gather_everything", None, lambda e: every(e, "f32[3,3]", line(e, 3, 3, 1), batch_dims=1)),
    ("gather_one_hot", None, lambda e: row_of(e, "i32[5,1]", np.arange(4, dtype=np.int32), on=2)),
    ("gather_one_hot", "no range", lambda e: row_of(e, "f32[5,1]", np.arange(4, dtype=F32))),
    ("gather_one_hot", "no range", lambda e: row_of(e, "i32[5,4]", np.arange(4, dtype=np.int32))),
    (
        "gather_one_hot",
        "along other axes",
        lambda e: row_of(e, "i32[1,1]", np.tile(np.arange(4, dtype=np.int32), (5, 1))),
    ),
    ("gather_as_slice", "no constant step", lambda e: e.gather(e.x("f32[4,3]"), e.const(np.array([1, 1])), axis=0)),
    ("gather_as_slice", None, lambda e: e.gather(e.x("f32[4,3]"), e.const(np.array([[1], [2]])), axis=0)),
    ("gather_as_slice", None, lambda e: e.gather(e.x("f32[N,3]"), e.const(np.int64(-1)), axis=0)),
    (
        "reduce_without_the_axis",
        None,
        lambda e: (e.reshape(y := e.reduce_sum(e.x("f32[2,3]"), axes=(1,), keepdims=True), shape=(2,)), y),
    ),
    ("join_expands", None, lambda e: e.expand(e.reshape(e.x("f32[6]"), shape=(3, 2, 1)), shape=(3, 2, 4))),
    ("join_concats", None, lambda e: pieces(e, (0, 2), (3, 3))),
    ("join_concats", None, lambda e: corners(e)),
    ("join_concats", None, lambda e: pieces(e, (0, 2), (2, 4), other=True)),
    ("join_concats", None, lambda e: pieces(e, (0, 2), (2, 2), step=2)),
    ("join_pads", None, lambda e: (pad(e, y := pad(e, e.x("f32[3]"), 1.0), 1.0), e.neg(y))),
    ("join_pads", "different values", lambda e: pad(e, pad(e, e.x("f32[3]"), 0.0, "reflect"), 0.0, "reflect")),
    ("join_pads", "different values", lambda e: pad(e, pad(e, e.x("f32[3]"), 0.0, "edge"), 0.0)),
    ("transpose_before_joining", USED, lambda e: (e.reshape(t := turned(e, (6, 4, 5)), shape=(2, 3, 5, 4)), e.neg(t))),
    ("transpose_before_joining", "splits axes", lambda e: e.reshape(turned(e, (4, 6, 5)), shape=(20, 6))),
    (
        "meet_transposes",
        "splits axes",
        lambda e: e.transpose(e.reshape(e.transpose(e.x("f32[6,4]"), perm=(1, 0)), shape=(4, 2, 3)), perm=(2, 0, 1)),
    ),
    (
        "drop_ones_before_transpose",
        "does more",
        lambda e: e.reshape(e.transpose(e.x("f32[2,3,1]"), perm=(2, 1, 0)), shape=(6,)),
    ),
    (
        "drop_ones_before_transpose",
        None,
        lambda e: (e.reshape(t := e.transpose(e.x("f32[2,3,1]"), perm=(2, 1, 0)), shape=(3, 2)), e.neg(t)),
    ),
    ("crop_taps", "not finite", lambda e: thin(e, np.inf)),
]


@pytest.mark.parametrize(("name", "reason", "make"), CASES, ids=names(CASES))
def test_leaves_alone(name: str, reason: str | None, make: Callable[[Example], Any]) -> None:
    leaves_alone(name, reason, make)
