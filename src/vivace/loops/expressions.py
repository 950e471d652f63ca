"""Arithmetic on expressions of the loop IR, by its usual names."""

from __future__ import annotations

from vivace.loops.kernel import Binary, Expr


def add(a: Expr, b: Expr) -> Expr:
    return Binary("add", a, b)


def sub(a: Expr, b: Expr) -> Expr:
    return Binary("sub", a, b)


def mul(a: Expr, b: Expr) -> Expr:
    return Binary("mul", a, b)


def div(a: Expr, b: Expr) -> Expr:
    return Binary("div", a, b)
