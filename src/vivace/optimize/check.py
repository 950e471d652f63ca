"""Does a rewritten graph compute what the original did? Seeded random inputs, and a bound on the difference.

Sizes for symbolic dims are tried from small to large, since many models need a least extent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from vivace.base.dims import Dim, Symbol, substitute, symbols
from vivace.base.dtypes import DType
from vivace.base.errors import GateError
from vivace.graph.graph import Graph

Arrays = dict[str, np.ndarray]
SIZES = (2, 5, 16, 32, 64, 160, 512)
TOLERANCE = 1e-3
"""Largest difference, over the largest magnitude in the output: far above what reassociation does to f32, far below an
error."""


def sizes_to_try(graph: Graph, given: Mapping[str, int] | None = None) -> Iterator[dict[str, int]]:
    """Values for every symbol of the inputs, `given` ones first; each symbol inside its bounds."""
    found: dict[Symbol, None] = {s: None for v in graph.inputs for d in v.shape for s in symbols(d)}
    batch = {s for v in graph.inputs for s in (symbols(v.shape[0]) if v.rank else ())}
    for size in SIZES:
        env = {}
        for s in found:
            n = 2 if s in batch else size
            n = max(n, s.lo or 0)
            env[s.name] = n if s.hi is None else min(n, s.hi)
        yield {**env, **(given or {})}
        if all(s in batch or s.name in (given or {}) for s in found):
            return


def random_inputs(graph: Graph, sizes: Mapping[str, int], seed: int) -> Arrays:
    """Arrays for the inputs: floats around zero, small whole numbers that serve as indices, and both truth values."""
    random = np.random.default_rng(seed)
    found: Arrays = {}
    for v in graph.inputs:
        shape = [_size(d, sizes) for d in v.shape]
        if v.dtype.is_float:
            found[v.name] = random.standard_normal(shape).astype(v.dtype.numpy)
        elif v.dtype is DType.bool:
            found[v.name] = random.integers(0, 2, shape).astype(np.bool_)
        elif v.dtype is DType.string:
            found[v.name] = np.full(shape, "text", object)
        else:
            found[v.name] = random.integers(0, 2, shape).astype(v.dtype.numpy)
    return found


def _size(d: Dim, sizes: Mapping[str, int]) -> int:
    n = substitute(d, dict(sizes))
    return n if isinstance(n, int) else 1


def largest_difference(want: np.ndarray, got: np.ndarray) -> float:
    """Over the largest finite magnitude; infinite where shapes, NaN or infinities differ, or whole numbers by more
    than 1 in 1000."""
    if want.shape != got.shape or want.dtype != got.dtype:
        return float("inf")
    if want.dtype.kind not in "fV":
        return 0.0 if want.size == 0 or np.mean(want != got) <= 1e-3 else float("inf")
    a, b = want.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(np.max(np.abs(a[finite]))) or 1.0
    return float(np.max(np.abs(a[finite] - b[finite]))) / scale


def compare(want: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray], where: str) -> float:
    """The largest difference over all outputs. Raises: GateError naming the output that is out of tolerance."""
    worst = 0.0
    for name, array in want.items():
        gap = largest_difference(np.asarray(array), np.asarray(got[name]))
        if not gap <= TOLERANCE:
            raise GateError(
                f"output {name!r} differs by {gap:.2e} from the original model",
                where=where,
                expected=f"at most {TOLERANCE:.0e}",
                hint="--disable with the names of rules, from docs/rules.md, to find the one at fault",
            )
        worst = max(worst, gap)
    return worst
