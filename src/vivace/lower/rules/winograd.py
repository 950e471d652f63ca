"""Convolutions of 3 taps an axis with fewer products: m x m results from (m+2) x (m+2), at stride 2 2 x 2 from 5 x 5
(see `cook_toom`).

    V[t, tile, c] = (Bt d B)[t]                            d: the inputs of a tile, t: a position in it
    M[t, tile, k] = sum over c of V[t, tile, c] * U[t, c, k]     U = G w G', made at compile time
    y[tile, k]    = At M A, then bias and epilogue

m is chosen for each axis; an axis with a single tap, or one that a 1-D convolution lacks, has m = 1 and no transform.

One `Blocked` kernel: a block is some tiles, V of a block and M of one part of the output channels stay in the
second-level cache.

Error: every result is a sum of products `at * (g w) * (bt d)`, each rounded at most C + 20 times on its way (4 times
per axis in Bt, once in U, C times in the sum, 5 times per axis in At), so that with u = 2**-24

    |error| <= (C + 20) u * C max|w| max|d| * amplification(m rows) * amplification(m columns)

where `amplification` (in `cook_toom`) is 3 for a direct sum of 3 taps, 8 for m = 2, 27.4 for m = 4 and 5 at stride 2;
a direct sum is rounded 9C times. Errors in practice are random and far smaller. Measured against f64, largest over the
largest result, for 16x16 images of 64 to 512 channels, normal and ReLU inputs: direct 6e-7 to 2.7e-6, m = 2 3e-7 to
1e-6, m = 4 1e-6 to 5e-6; root mean square 1 : 0.7 : 2. Source of the method and of the choice of points: see
`cook_toom`.
A NaN or infinity in the input reaches every result of the tiles that read it, not only those of its own windows.

Not handled: other strides, dilations, groups, more taps, three dimensions, weights that are not constant.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np

from vivace.base.dims import TYPICAL, Dim, ceildiv, minimum, symbol
from vivace.base.dtypes import DType
from vivace.base.machine import Isa, Machine, host
from vivace.base.mapped import forget
from vivace.graph.graph import Node, Value
from vivace.loops.blocked import BLOCK, PART, Blocked, Stage
from vivace.loops.contraction import Axis, Contraction, Packing
from vivace.loops.kernel import Binary, Buffer, Cast, Expr, For, Guard, Index, Kernel, Let, Load, Read, Stmt, Store
from vivace.lower.choices import DEFAULT, DIRECT, Choice, Site
from vivace.lower.cook_toom import (
    N_TAPS,
    n_inputs,
    n_weights,
    runs,
    tile_sizes,
    transform_input,
    transform_output,
    transform_weights,
)
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.pack import aligned_zeros, without_denormals
from vivace.lower.rules.elementwise import Params, Tree
from vivace.lower.tile import panel_lanes, staged_stride
from vivace.lower.views import View

F32 = DType.f32
Size = tuple[int, int]  # m for rows and for columns

# Larger tiles save more products and err more. 4 keeps within the bounds in the head of this file; 0 turns it off.
LARGEST_M = 4
LARGEST_ERROR = 1e-5  # of any result, over the largest magnitude of all: what tests hold every m in use to

# Costs in the time of one flop of a product at full speed (Zen 4, AVX-512, one thread, 110 GFLOP/s; measured by
# `benchmarks/winograd.py`). Transforms: input and output together take 2.3 ns (m = 2) to 3.3 ns (m = 4) per position
# and vector of 16 channels, at C = K.
_TRANSFORM_FLOPS = 11  # per position and channel, for C and for K
# Weights come from memory or the third-level cache, once for each block that finds them no more in the second. They are
# counted in full, as if nothing hid their way: the larger ones must also be worth the memory that they take. Fitted to
# times of layers it is 15 where 30 GB/s feed 110 GFLOP/s (Zen 4), 30 where 20 GB/s feed 171 (Sapphire Rapids).
_WEIGHT_FLOPS = 20  # per element of U or of the weights
# By stride. Below it the direct way is as good where caches are cold (112x112, 3 to 64 channels). At stride 2 it is
# dearer than counted: 28x28x256 to 14x14 takes 1.31 of the time of these products, by count 1.16 (Emerald Rapids).
_LEAST_GAIN = {1: 1.25, 2: 1.15}
_TILE_SPEED = 5  # of bf16 in tile registers over f32: 880 to 1420 GFLOP/s in layers of ResNet-50, against 164
_MOST_TILES = 256  # of a block that was chosen for a symbolic size
_LEAST_TILES = 6  # rows of a micro-kernel that hide the latency of its sums


def choose(node: Node, isa: Isa, half: bool = False, machine: Machine | None = None) -> Size | None:
    """The m to use for each axis, or None for the direct way: the least by counted flops and bytes of weights.

    `half`: the direct way would multiply bf16, at twice the speed (1.0 ms for the 3x3 layers of ResNet-50, against 0.6
    to 0.8 in f32 by tiles for 56x56 to 14x14), with tile registers at more (56x56: 0.26 ms against 0.59).
    """
    if not is_possible(node):
        return None
    machine = machine or host()
    w, y = node.inputs[1], node.outputs[0]
    assert w is not None
    n_out, channels = guessed(w.shape[0]), guessed(w.shape[1])
    spatial = y.shape[1:-1] if node.attrs["layout"] == "NHWC" else y.shape[2:]
    if len(spatial) == 1 and not isinstance(spatial[0], int):
        # A sequence may be of a few steps, where tiles are mostly empty: 114 us against 3.5 in a voice detector.
        return None
    images, height, width = (guessed(d) for d in (y.shape[0], *(1,) * (2 - len(spatial)), *spatial))
    n_taps = math.prod(_taps(w))
    stride = stride_of(node)
    best = n_taps * channels * n_out * (2 * images * height * width + _WEIGHT_FLOPS) / _LEAST_GAIN[stride]
    if half:
        best *= _LEAST_GAIN[stride] / (_TILE_SPEED if isa.has("amx_bf16") else 2)
    found = None
    for m in sizes(node):
        tiles = images * -(-height // m[0]) * -(-width // m[1])
        leaves = _leaves(m, w, machine, stride)
        times = -(-tiles // block_tiles(tiles, m, w, panel_lanes(n_out, isa), machine, stride)) if leaves else 1
        weights = _n_weights(m, stride) * channels * n_out * times * _WEIGHT_FLOPS
        if (cost := counted_flops(m, tiles, channels, n_out, isa, stride) + weights) < best:
            best, found = cost, m
    return found


def counted_flops(m: Size, n_tiles: int, channels: int, n_out: int, isa: Isa, stride: int = 1) -> int:
    """Products and transforms of so many tiles, in flops of a product."""
    lanes = isa.n_f32_lanes
    padded = sum(-(-c // lanes) * lanes for c in (channels, n_out))
    return _n_positions(m, stride) * n_tiles * (2 * channels * n_out + _TRANSFORM_FLOPS * padded)


def ways(node: Node, isa: Isa, half: bool = False) -> tuple[str, ...]:
    """What could compute a convolution, by name, the default first; none where there is the direct way only."""
    if not is_possible(node):
        return ()
    default = choose(node, isa, half)
    return tuple(dict.fromkeys("{}x{}".format(*m) if m else DIRECT for m in (default, None, *sizes(node))))


def size_of(way: str) -> Size | None:
    """The inverse of the names."""
    if way == DIRECT:
        return None
    rows, columns = way.split("x")
    return int(rows), int(columns)


def sizes(node: Node) -> list[Size]:
    """What `choose` chooses from."""
    w = node.inputs[1]
    assert w is not None
    possible = [m for m in tile_sizes(stride_of(node)) if m <= LARGEST_M]
    rows, columns = (possible if taps > 1 else [1] for taps in _taps(w))
    return [(i, j) for i in rows for j in columns]


def is_possible(node: Node) -> bool:
    x, w = node.inputs[0], node.inputs[1]
    assert x is not None and w is not None
    a, kernel = node.attrs, w.shape[2:]
    return (
        w.data is not None and a["group"] == 1 and x.dtype is F32
        and len(kernel) <= 2 and set(kernel) <= {1, N_TAPS} and N_TAPS in kernel
        and all(d == 1 for d in a["dilations"])
        and (set(a["strides"]) == {1} or (set(a["strides"]) == {2} and set(kernel) == {N_TAPS}))
        and not any((*a["before"], *a["after"]))
    )  # fmt: skip


def stride_of(node: Node) -> int:
    """Of the axes with several taps."""
    return int(node.attrs["strides"][0])


def _taps(w: Value) -> tuple[int, int]:
    """Of rows and columns."""
    kernel = (1, *w.shape[2:])[-2:]
    return guessed(kernel[0]), guessed(kernel[1])


def guessed(d: Dim) -> int:
    """The extent of an axis; whatever the expression, `TYPICAL` where only a run will tell: the images of deep layers
    are no thirty-second part of it high."""
    return d if isinstance(d, int) else TYPICAL


def _n_positions(m: Size, stride: int) -> int:
    return n_inputs(m[0], stride) * n_inputs(m[1], stride)


def _n_weights(m: Size, stride: int) -> int:
    return n_weights(m[0], stride) * n_weights(m[1], stride)


def _leaves(m: Size, w: Value, machine: Machine, stride: int) -> bool:
    """Whether U is too large to stay in the second-level cache from block to block."""
    return _n_weights(m, stride) * guessed(w.shape[0]) * guessed(w.shape[1]) * 4 > machine.cache_bytes(2) // 2


def block_tiles(n_tiles: Dim, m: Size, w: Value, lanes: int, machine: Machine, stride: int = 1) -> int:
    """Tiles per block, the last block as full as can be.

    Where U stays in the second-level cache, V and M take about a quarter of it: small blocks make enough units for the
    threads. Where it does not, they take half, so that it is read few times: 28x28x128 with m = 4 takes 1.07 ms in
    blocks of 7 tiles and 0.75 ms in two of 25, where 20 GB/s come from beyond that cache of 2 MiB.
    """
    leaves = _leaves(m, w, machine, stride)
    tile_bytes = _n_positions(m, stride) * (guessed(w.shape[1]) + lanes) * 4
    most = max(_LEAST_TILES + 2, machine.cache_bytes(2) // (2 if leaves else 4) // tile_bytes)
    if not isinstance(n_tiles, int):
        return most
    if n_tiles <= _LEAST_TILES:
        return max(1, n_tiles)
    if leaves:
        return -(-n_tiles // -(-n_tiles // most))
    return min(range(_LEAST_TILES, most * 3 // 2 + 1), key=lambda t: (-(-n_tiles // t) * t, abs(t - most)))


def lower_winograd(
    ctx: Lowering, g: Group, m: Size, x: View, out: View, bias: View | None, last: bool, site: Site,
    choice: Choice = DEFAULT,
) -> None:  # fmt: skip
    """Append the step. `x` and `out` are channels-last views; `bias` is aligned with the anchor's shape, which is
    channels-last if `last`."""
    w = g.anchor.inputs[1]
    assert w is not None
    stride = stride_of(g.anchor)
    n_positions = _n_positions(m, stride)
    channels, n_out = w.shape[1], w.shape[0]
    assert isinstance(channels, int) and isinstance(n_out, int)
    lanes = panel_lanes(n_out, ctx.isa, chosen=choice.lanes)
    parts = -(-n_out // lanes)
    is_line = len(out.shape) == 3
    x, out = (_as_image(v) if is_line else v for v in (x, out))
    n_tiles = out.shape[0] * ceildiv(out.shape[1], m[0]) * ceildiv(out.shape[2], m[1])
    tiles = block_tiles(n_tiles, m, w, lanes, host(), stride)
    tiles = max(1, min(choice.tiles or tiles, n_tiles if isinstance(n_tiles, int) else _MOST_TILES))
    grid = _Grid(m, stride, tiles, n_tiles, out.shape)

    u = _packed_weights(ctx, w, m, stride, lanes)
    row = _apart(channels)
    v_step, m_step = _apart(tiles * row), _apart(tiles * lanes)
    v_buf = Buffer("v", F32, (n_positions, tiles, row), (v_step, row, 1), True)
    m_buf = Buffer("m", F32, (n_positions, tiles, lanes), (m_step, lanes, 1), True)
    u_buf = u.buffer("u")
    x_buf = x.buffer("x")
    first = Kernel("k", (x_buf, v_buf), (_input_loop(grid, x_buf, v_buf, channels),))
    products = _products(m, stride, v_buf, u_buf, m_buf, channels, lanes)
    params = Params()
    loop = _output_loop(ctx, g, grid, m_buf, params, out, bias, _axes(last, is_line), lanes)
    final = Kernel("k", (m_buf, *params.buffers), (loop,))
    spec = Blocked(
        "k", ceildiv(n_tiles, tiles), parts, (Stage(first),),
        (*products, Stage(final)), (v_buf, m_buf),
    )  # fmt: skip
    views = {x_buf: x, u_buf: u, **dict(zip(params.buffers, params.views, strict=True))}
    ordered = [views[b] for b in spec.params]
    written = [i for i, b in enumerate(spec.params) if b.writable]
    flops = 2 * n_positions * n_tiles * channels * n_out
    ctx.emit(f"winograd{m[0]}x{m[1]}", spec, ordered, written, g.nodes, flops, site=site)


def _products(m: Size, stride: int, v: Buffer, u: Buffer, m_buf: Buffer, channels: int, lanes: int) -> list[Stage]:
    """M of a block and part, a stage for each pair of runs: products that share weights are rows of one contraction."""
    n_columns = n_inputs(m[1], stride)
    _, tiles, row = v.shape
    of_part = _n_weights(m, stride) * channels * lanes
    stages: list[Stage] = []
    before = 0
    for (i, rows), (j, columns) in itertools.product(*(_placed_runs(k, stride) for k in m)):
        first = i * n_columns + j
        at = ((v, first * v.strides[0]), (u, symbol(PART, 0) * of_part + before), (m_buf, first * m_buf.strides[0]))

        def axis(name: str, extent: int, step: int, in_u: int = 0) -> Axis:
            return Axis(name, extent, step * v.strides[0], in_u, step * m_buf.strides[0])

        per_line = columns[0] * channels * lanes
        batch = (axis("i", rows[0], n_columns, per_line), axis("j", columns[0], 1, channels * lanes))
        shared = (axis("si", rows[1], n_columns), axis("sj", columns[1], 1), Axis("tile", tiles, row, 0, lanes))
        product = Contraction(
            "k", batch, shared, (Axis("c", channels, 1),), lanes, v, u, m_buf, Packing("panels", lanes)
        )  # fmt: skip
        stages.append(Stage(product, at))
        before += rows[0] * per_line
    return stages


def _placed_runs(m: int, stride: int) -> list[tuple[int, tuple[int, int]]]:
    """The runs of an axis, each with the number of its first product."""
    starts = itertools.accumulate((n * times for n, times in runs(m, stride)), initial=0)
    return list(zip(starts, runs(m, stride)))


def _packed_weights(ctx: Lowering, w: Value, m: Size, stride: int, lanes: int) -> View:
    """U as [part][t][c][lanes], the weights of the products that a stage computes side by side."""
    source = w.data
    assert source is not None

    def transformed() -> np.ndarray:
        n_out, channels = source.shape[:2]
        data = aligned_zeros((-(-n_out // lanes), _n_weights(m, stride), channels, lanes))
        rows, columns = (np.cumsum([n for n, _ in runs(k, stride)])[:-1] for k in m)
        for part, first in enumerate(range(0, n_out, lanes)):  # a part at a time: all of U in f64 would be large
            some = source[first : first + lanes]
            u = transform_weights(some.reshape(*some.shape[:2], *_taps(w)), m, stride)
            stages = [x for line in np.split(u, rows) for x in np.split(line, columns, axis=1)]
            data[part, :, :, : len(some)] = np.concatenate([x.reshape(-1, channels, len(some)) for x in stages])
        forget(source)
        return without_denormals(data)

    return ctx.made_of((source,), ("winograd", m, stride, lanes), f"{w.name}_winograd{m[0]}x{m[1]}", transformed)


def _as_image(v: View) -> View:
    """A line of pixels as an image of one row."""
    shape, strides = v.shape, v.strides
    return replace(v, shape=(shape[0], 1, *shape[1:]), strides=(strides[0], 0, *strides[1:]))


def _axes(last: bool, is_line: bool) -> tuple[int, ...]:
    """For each axis of the convolution's result which one of (image, row, column, channel) it is."""
    spatial = (2,) if is_line else (1, 2)
    return (0, *spatial, 3) if last else (0, 3, *spatial)


def _apart(n: int) -> int:
    """Elements between runs of `n`: an odd number of cache lines, so that equal places of many runs fill all sets."""
    stride = staged_stride(n)
    assert isinstance(stride, int)
    return stride


class _Grid:
    """Where a block's tiles lie: the loop over them, and what the statements of a tile need."""

    def __init__(self, m: Size, stride: int, tiles: int, n_tiles: Dim, shape: tuple[Dim, ...]) -> None:
        self.m, self.stride, self.tiles, self.shape = m, stride, tiles, shape
        self.n_inputs = n_inputs(m[0], stride), n_inputs(m[1], stride)
        down, across = ceildiv(shape[1], m[0]), ceildiv(shape[2], m[1])
        start = symbol(BLOCK, 0) * tiles
        self.count = tiles if isinstance(n_tiles, int) and n_tiles % tiles == 0 else minimum(tiles, n_tiles - start)
        self.tile = symbol("tile", 0, tiles - 1)
        number = start + self.tile
        self.image, self.y, self.x = symbol("image", 0), symbol("y", 0), symbol("x", 0)
        self.lets: list[Stmt] = [
            Let("image", Index(number // (down * across))),
            Let("y", Index(number // across % down * m[0])),
            Let("x", Index(number % across * m[1])),
        ]

    def loop(self, body: list[Stmt]) -> For:
        return For("tile", self.count, (*self.lets, *body))


def _input_loop(g: _Grid, x: Buffer, v: Buffer, channels: int) -> For:
    """V of a block. For what lies beyond the input stands its last row or column: no result that is stored sees it."""
    n_rows, n_columns = g.n_inputs
    c = symbol("c", 0, channels - 1)
    clamps: list[Stmt] = []
    at: list[list[Dim]] = []
    for axis, (name, start) in enumerate((("row", g.y), ("col", g.x))):
        m, n, start = g.m[axis], g.n_inputs[axis], start * g.stride
        first = n if _divides(m, g.shape[axis + 1]) else n - (m - 1) * g.stride  # up to it all lie inside, always
        for i in range(first, n):
            clamps.append(Let(f"{name}{i}", Index(minimum(start + i, x.shape[axis + 1] - 1))))
        at.append([start + i if i < first else symbol(f"{name}{i}", 0) for i in range(n)])
    body: list[Stmt] = []
    for j in range(n_columns):
        for i in range(n_rows):
            d: Expr = Load(x, (g.image, at[0][i], at[1][j], c))
            body.append(Let(f"d{i}_{j}", d if x.dtype is F32 else Cast(F32, d)))
        column = transform_input(g.m[0], [Read(f"d{i}_{j}", F32) for i in range(n_rows)], g.stride)
        body += [Let(f"h{i}_{j}", e) for i, e in enumerate(column)]
    for i in range(n_rows):
        line = transform_input(g.m[1], [Read(f"h{i}_{j}", F32) for j in range(n_columns)], g.stride)
        body += [Store(v, (i * n_columns + j, g.tile, c), e) for j, e in enumerate(line)]
    return g.loop([*clamps, For("c", channels, tuple(body), "vector")])


def _output_loop(
    ctx: Lowering, group: Group, g: _Grid, products: Buffer, params: Params, out: View, bias: View | None,
    axes: tuple[int, ...], lanes: int
) -> For:  # fmt: skip
    """Results of a block for one part of the channels, each finished by bias and epilogue and stored."""
    anchor = group.anchor.outputs[0]
    n_rows, n_columns = g.n_inputs
    n_out = out.shape[-1]
    assert isinstance(n_out, int)
    c = symbol("c", 0, lanes - 1)
    k = symbol(PART, 0) * lanes + c
    rest = [node for node in group.nodes if node is not group.anchor]
    tree = Tree(ctx, rest, group.output, given=[anchor]) if rest else None
    body: list[Stmt] = []

    def keep(e: Expr) -> Expr:
        name = f"s{len(body)}"
        body.append(Let(name, e))
        return Read(name, F32)

    half: list[list[Expr]] = []
    for j in range(n_columns):
        column = [keep(Load(products, (i * n_columns + j, g.tile, c))) for i in range(n_rows)]
        half.append([keep(e) for e in transform_output(g.m[0], column, keep, g.stride)])
    for i in range(g.m[0]):
        line = transform_output(g.m[1], [half[j][i] for j in range(n_columns)], keep, g.stride)
        stores: list[Stmt] = []
        for j, y in enumerate(line):
            index = (g.image, g.y + i, g.x + j, k)
            at = tuple(index[a] for a in axes)
            if bias is not None:
                y = Binary("add", y, params.load(bias.expand(anchor.shape), at))
            if tree is not None:
                y = tree.expr(lambda v, at=at: params.load(tree.leaves[v], at), {anchor: y})  # type: ignore[misc]
            store = Store(params.buffer(out, writable=True), index, y)
            stores.append(_guarded(store, g.m[1], g.x + j, out.shape[2], j))
        body += [_guarded(s, g.m[0], g.y + i, out.shape[1], i) for s in stores]
    extent = lanes if n_out % lanes == 0 else minimum(lanes, n_out - symbol(PART, 0) * lanes)
    return g.loop([For("c", extent, tuple(body), "vector")])


def _guarded(s: Stmt, m: int, at: Dim, extent: Dim, offset: int) -> Stmt:
    """A statement that runs where `at`, which is `offset` after a tile's begin, lies inside the result."""
    if offset == 0 or _divides(m, extent):
        return s
    return Guard(Binary("lt", Index(at), Index(extent)), (s,))


def _divides(m: int, d: Dim) -> bool:
    return isinstance(d, int) and d % m == 0
