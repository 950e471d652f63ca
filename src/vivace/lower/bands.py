"""Depthwise convolutions over low images, whose rows of padding are neither made nor multiplied.

    before   rows and columns of x padded, all taps for all rows     3 rows, 5x5: 15 rows of taps, 6 of them on zeros
    after    columns of x padded; for each band of rows whose taps meet the same rows of the image, a step with these

Rules:
* LOW: only where enough of the rows of taps lie on padding (`MOST_MET`): in higher images the border is a small part of
  the work. On one core (AVX-512, f32, 5x5) 3x80x480 takes 0.37 of the time of padded rows, 12x80x240 0.79, 14x14x672
  0.84.
* FEW: at most `MOST_BANDS` steps. Large windows over low images have nearly one for each row.
* NEAR: only where the images and the results stay in the second-level cache: others may be computed in strips
  (`strips`), which want one step.

Not handled: sizes that only show when the model runs, columns, other convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.base.machine import host
from vivace.graph.graph import Node
from vivace.loops.contraction import Depthwise, substitute_expr
from vivace.loops.kernel import Buffer
from vivace.lower.halves import is_depthwise
from vivace.lower.views import View

MOST_MET = 0.95  # of the rows of taps
MOST_BANDS = 8
_LEAST_CHANNELS = 5  # fewer are computed otherwise (`rules/narrow.py`)


@dataclass(frozen=True, slots=True)
class Band:
    """Rows of the result from `start` to `end`, which `n_taps` rows of taps from `first` on meet the image for."""

    start: int
    end: int
    first: int
    n_taps: int


def is_low(n: Node) -> bool:
    """Whether a convolution keeps its rows of padding, to be computed in bands (rules LOW, FEW, NEAR)."""
    if not is_depthwise(n) or n.outputs[0].dtype is not DType.f32 or n.attrs["group"] < _LEAST_CHANNELS:
        return False
    found, (x, w) = bands_of(n), n.inputs[:2]
    assert x is not None and w is not None and w.data is not None
    known = (prod([d for d in v.shape if isinstance(d, int)]) for v in (x, n.outputs[0]))
    if sum(known) * DType.f32.size_bytes > host().cache_bytes(2):
        return False
    met = sum((b.end - b.start) * b.n_taps for b in found)
    every = sum((b.end - b.start) * w.data.shape[2] for b in found)
    return len(found) <= MOST_BANDS and all(b.n_taps > 0 for b in found) and 0 < met <= MOST_MET * every


def bands_of(n: Node) -> list[Band]:
    """The bands of a depthwise convolution, top down; none where it is over no images of a known height."""
    attrs, (x, w) = n.attrs, n.inputs[:2]
    assert x is not None and w is not None
    at = 1 if attrs["layout"] == "NHWC" else 2
    if x.rank != 4 or attrs["dilations"][0] != 1:
        return []
    height, n_rows, n_taps, top = x.shape[at], n.outputs[0].shape[at], w.shape[2], attrs["before"][0]
    if not (isinstance(height, int) and isinstance(n_rows, int) and isinstance(n_taps, int) and isinstance(top, int)):
        return []
    found: list[Band] = []
    for row in range(n_rows):
        begin = row * attrs["strides"][0] - top
        first = max(0, -begin)
        band = Band(row, row + 1, first, min(n_taps, height - begin) - first)
        if found and (found[-1].first, found[-1].n_taps) == (band.first, band.n_taps):
            band = replace(band, start=found.pop().start)
        found.append(band)
    return found


def bands(
    n: Node, d: Depthwise, views: Mapping[Buffer, View], flops: Dim
) -> Iterator[tuple[Depthwise, Mapping[Buffer, View], Dim]]:
    """The steps that compute a depthwise convolution, each with its views and operations; `d` is the whole of it, with
    A from the first row of the image on."""
    if not any(n.attrs["before"][:1] + n.attrs["after"][:1]):
        yield d, views, flops
        return
    (images, down, across), (tap, *taps) = d.rows, d.taps
    found = bands_of(n)
    for band in found:
        n_rows, top = band.end - band.start, band.start * n.attrs["strides"][0] - n.attrs["before"][0] + band.first
        last = (n_rows - 1) * n.attrs["strides"][0] + band.n_taps
        a, b, out = views[d.a], views[d.b], views[d.out]
        a, out = _rows(a, 1, top, last), _rows(out, 1, band.start, n_rows)
        b = _rows(b, 0, band.first, band.n_taps)
        epilogue = d.epilogue
        if epilogue is not None:
            epilogue = substitute_expr(epilogue, {down.name: symbol(down.name, 0) + band.start})
        part = replace(
            d, rows=(images, replace(down, extent=n_rows), across), taps=(replace(tap, extent=band.n_taps), *taps),
            a=a.buffer(d.a.name), b=b.buffer(d.b.name), out=out.buffer(d.out.name, writable=True), epilogue=epilogue,
        )  # fmt: skip
        share = flops * n_rows // found[-1].end
        yield part, {**views, part.a: a, part.b: b, part.out: out}, share


def _rows(view: View, axis: int, start: int, n: int) -> View:
    starts = tuple(start if i == axis else 0 for i in range(len(view.shape)))
    sizes = tuple(n if i == axis else d for i, d in enumerate(view.shape))
    return view.slice(starts, sizes, (1,) * len(view.shape))
