"""3x3 convolutions with fewer products: m x m results from (m+2) x (m+2) products per channel pair (see `cook_toom`).

    V[t, tile, c] = (Bt d B)[t]                            d: the (m+2) x (m+2) inputs of a tile, t: a position in it
    M[t, tile, k] = sum over c of V[t, tile, c] * U[t, c, k]     U = G w G', made at compile time
    y[tile, k]    = At M A, then bias and epilogue

One `Blocked` kernel: a block is some tiles, V of a block and M of one part of the output channels stay in the
second-level cache.

Error: a result is a sum over positions of f32 sums over C, weighted by At on both sides of values weighted by Bt and G.
By the bound of Barabasz et al. 2018 (theorem for two dimensions) it is off by at most `||At||_1^2 ||Bt||_F^2 ||G||_F^2
(C + small) 2^-24 ||x|| ||w||`, which grows like the direct sum's `9C 2^-24 ||x|| ||w||`, with a constant that the
points decide; in practice errors are random and grow with the root of C. Measured against f64 (16x16 images, 64 to 512
channels, normal and ReLU inputs; `tests/lower/test_winograd.py`), relative to the largest result: direct 6e-7 to
1.7e-6, m = 2 3e-7 to 1.1e-6, m = 4 1.0e-6 to 4e-6; root mean square 1 : 0.7 : 2.2. A NaN or infinity in the input
reaches every result of the tiles that read it, not only those of its own windows.

Not handled: strides, dilations, groups, other kernels, weights that are not constant.
"""

from __future__ import annotations

from vivace.base.dims import Dim, ceildiv, minimum, symbol
from vivace.base.dtypes import DType
from vivace.base.machine import Isa, Machine, host
from vivace.graph.graph import Node, Value
from vivace.loops.blocked import BLOCK, PART, Blocked, Stage
from vivace.loops.contraction import Axis, Contraction, Packing
from vivace.loops.kernel import Binary, Buffer, Expr, For, Guard, Index, Kernel, Let, Load, Read, Stmt, Store
from vivace.lower.cook_toom import N_TAPS, PAIRS, transform_input, transform_output, transform_weights
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.pack import aligned_zeros, pack_panels
from vivace.lower.rules.elementwise import Params, Tree
from vivace.lower.tile import max_rows, panel_lanes, staged_stride
from vivace.lower.views import View

F32 = DType.f32

# Larger tiles save more products and err more. 4 keeps within the bounds in the head of this file; 0 turns it off.
LARGEST_M = 4
LARGEST_ERROR = 1e-5  # of any result, over the largest magnitude of all: what tests hold every m in use to

# Costs in the time of one flop of a product at full speed (Zen 4, AVX-512, one thread, 110 GFLOP/s; measured by
# `benchmarks/winograd.py`). Transforms: input and output together take 2.3 ns (m = 2) to 3.3 ns (m = 4) per position
# and vector of 16 channels, at C = K.
_TRANSFORM_FLOPS = 11  # per position and channel, for C and for K
# Weights come from memory at about 30 GB/s, by all threads together. They are counted in full, as if nothing hid their
# way: the larger ones must also be worth the memory that they take.
_WEIGHT_FLOPS = 15  # per element of U or of the weights
_LEAST_GAIN = 1.15  # below it the direct way is as good, and simpler in memory and rounding
_GUESS = 64  # for symbolic dims


def choose(node: Node, isa: Isa) -> int:
    """The m to use for a convolution, or 0 for the direct way: the least by counted flops and bytes of weights."""
    if not is_possible(node):
        return 0
    w, y = node.inputs[1], node.outputs[0]
    assert w is not None
    n_out, channels = int(w.shape[0]), int(w.shape[1])  # type: ignore[arg-type]
    spatial = y.shape[1:3] if node.attrs["layout"] == "NHWC" else y.shape[2:4]
    images, height, width = (d if isinstance(d, int) else _GUESS for d in (y.shape[0], *spatial))
    lanes = isa.n_f32_lanes
    padded = sum(-(-c // lanes) * lanes for c in (channels, n_out))
    costs = {0: 2 * 9 * images * height * width * channels * n_out + _WEIGHT_FLOPS * 9 * channels * n_out}
    for m in (m for m in PAIRS if m <= LARGEST_M):
        positions = (m + 2) ** 2
        tiles = images * -(-height // m) * -(-width // m)
        products = 2 * tiles * channels * n_out + _TRANSFORM_FLOPS * tiles * padded
        costs[m] = int(_LEAST_GAIN * positions * (products + _WEIGHT_FLOPS * channels * n_out))
    return min(costs, key=lambda m: costs[m])


def is_possible(node: Node) -> bool:
    x, w = node.inputs[0], node.inputs[1]
    assert x is not None and w is not None
    a = node.attrs
    return (
        w.data is not None and tuple(w.shape[2:]) == (N_TAPS, N_TAPS) and a["group"] == 1 and x.dtype is F32
        and all(s == 1 for s in (*a["strides"], *a["dilations"]))
        and not any((*a["before"], *a["after"]))
    )  # fmt: skip


def block_tiles(n_tiles: Dim, m: int, channels: int, columns: int, isa: Isa, machine: Machine) -> int:
    """Tiles per block: V and M in half of the second-level cache, whole row tiles, little waste."""
    rows = max_rows(2, isa)
    room = machine.cache_bytes(2) // 2
    most = max(rows, room // ((m + 2) ** 2 * (channels + columns) * 4))
    if not isinstance(n_tiles, int):
        return most // rows * rows
    blocks = -(-n_tiles // most)
    return max(1, -(-n_tiles // blocks))


def lower_winograd(ctx: Lowering, g: Group, m: int, x: View, out: View, bias: View | None, last: bool) -> None:
    """Append the step. `x` and `out` are channels-last views; `bias` is aligned with the anchor's shape, which is
    channels-last if `last`."""
    w = g.anchor.inputs[1]
    assert w is not None
    n_positions = (m + 2) ** 2
    channels, n_out = w.shape[1], w.shape[0]
    assert isinstance(channels, int) and isinstance(n_out, int)
    lanes = panel_lanes(n_out, ctx.isa)
    parts = -(-n_out // lanes)
    n_images, height, width, _ = out.shape
    down, across = ceildiv(height, m), ceildiv(width, m)
    n_tiles = n_images * down * across
    tiles = block_tiles(n_tiles, m, channels, lanes, ctx.isa, host())
    grid = _Grid(m, tiles, n_tiles, down, across)

    u = _packed_weights(ctx, w, m, lanes)
    row = _apart(channels)
    v_step, m_step = _apart(tiles * row), _apart(tiles * lanes)
    v_buf = Buffer("v", F32, (n_positions, tiles, row), (v_step, row, 1), True)
    m_buf = Buffer("m", F32, (n_positions, tiles, lanes), (m_step, lanes, 1), True)
    u_buf = u.buffer("u")
    x_buf = x.buffer("x")
    first = Kernel("k", (x_buf, v_buf), (_input_loop(grid, x_buf, v_buf, channels),))
    product = Contraction(
        "k", (Axis("t", n_positions, v_step, channels * lanes, m_step),), (Axis("tile", tiles, row, 0, lanes),),
        (Axis("c", channels, 1),), lanes, v_buf, u_buf, m_buf, Packing("panels", lanes),
    )  # fmt: skip
    params = Params()
    loop = _output_loop(ctx, g, grid, m_buf, params, out, bias, last, lanes)
    final = Kernel("k", (m_buf, *params.buffers), (loop,))
    spec = Blocked(
        "k", ceildiv(n_tiles, tiles), parts, (Stage(first),),
        (Stage(product, ((u_buf, symbol(PART, 0) * (n_positions * channels * lanes)),)), Stage(final)), (v_buf, m_buf),
    )  # fmt: skip
    views = {x_buf: x, u_buf: u, **dict(zip(params.buffers, params.views, strict=True))}
    ordered = [views[b] for b in spec.params]
    written = [i for i, b in enumerate(spec.params) if b.writable]
    flops = 2 * n_positions * n_tiles * channels * n_out
    ctx.emit(f"winograd{m}", spec, ordered, written, g.nodes, flops)


def _packed_weights(ctx: Lowering, w: Value, m: int, lanes: int) -> View:
    """U as [part][t][c][lanes]."""
    key = ("winograd", m, id(w.data), lanes)
    if key in ctx.packed:
        data = ctx.packed[key].data
    else:
        assert w.data is not None
        u = transform_weights(w.data, m)
        n = u.shape[0]
        panels = pack_panels(u.reshape(n * n, *u.shape[2:]), lanes)  # [t][part][c][lanes]
        data = aligned_zeros((panels.shape[1], n * n, *panels.shape[2:]))
        data[...] = panels.transpose(1, 0, 2, 3)
    assert data is not None
    return ctx.constant(data, f"{w.name}_winograd{m}", key)


def _apart(n: int) -> int:
    """Elements between runs of `n`: an odd number of cache lines, so that equal places of many runs fill all sets."""
    stride = staged_stride(n)
    assert isinstance(stride, int)
    return stride


class _Grid:
    """Where a block's tiles lie: the loop over them, and what the statements of a tile need."""

    def __init__(self, m: int, tiles: int, n_tiles: Dim, down: Dim, across: Dim) -> None:
        self.m, self.tiles, self.down, self.across = m, tiles, down, across
        start = symbol(BLOCK, 0) * tiles
        self.count = tiles if isinstance(n_tiles, int) and n_tiles % tiles == 0 else minimum(tiles, n_tiles - start)
        self.tile = symbol("tile", 0, tiles - 1)
        number = start + self.tile
        self.image, self.y, self.x = symbol("image", 0), symbol("y", 0), symbol("x", 0)
        self.lets: list[Stmt] = [
            Let("image", Index(number // (down * across))),
            Let("y", Index(number // across % down * m)),
            Let("x", Index(number % across * m)),
        ]

    def loop(self, body: list[Stmt]) -> For:
        return For("tile", self.count, (*self.lets, *body))


def _input_loop(g: _Grid, x: Buffer, v: Buffer, channels: int) -> For:
    """V of a block. For what lies beyond the input stands its last row or column: no result that is stored sees it."""
    n = g.m + 2
    c = symbol("c", 0, channels - 1)
    clamps: list[Stmt] = []
    at: list[list[Dim]] = []
    for name, start, extent in (("row", g.y, x.shape[1]), ("col", g.x, x.shape[2])):
        if _divides(g.m, extent - N_TAPS + 1):
            at.append([start + i for i in range(n)])
            continue
        clamps += [Let(f"{name}{i}", Index(minimum(start + i, extent - 1))) for i in range(N_TAPS, n)]
        at.append([start + i if i < N_TAPS else symbol(f"{name}{i}", 0) for i in range(n)])
    body: list[Stmt] = []
    for j in range(n):
        for i in range(n):
            body.append(Let(f"d{i}_{j}", Load(x, (g.image, at[0][i], at[1][j], c))))
        column = transform_input(g.m, [Read(f"d{i}_{j}", F32) for i in range(n)])
        body += [Let(f"h{i}_{j}", e) for i, e in enumerate(column)]
    for i in range(n):
        line = transform_input(g.m, [Read(f"h{i}_{j}", F32) for j in range(n)])
        body += [Store(v, (i * n + j, g.tile, c), e) for j, e in enumerate(line)]
    return g.loop([*clamps, For("c", channels, tuple(body), "vector")])


def _output_loop(
    ctx: Lowering, group: Group, g: _Grid, products: Buffer, params: Params, out: View, bias: View | None, last: bool,
    lanes: int
) -> For:  # fmt: skip
    """Results of a block for one part of the channels, each finished by bias and epilogue and stored."""
    n, anchor = g.m + 2, group.anchor.outputs[0]
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
    for j in range(n):
        column = [keep(Load(products, (i * n + j, g.tile, c))) for i in range(n)]
        half.append([keep(e) for e in transform_output(g.m, column, keep)])
    for i in range(g.m):
        line = transform_output(g.m, [half[j][i] for j in range(n)], keep)
        stores: list[Stmt] = []
        for j, y in enumerate(line):
            index = (g.image, g.y + i, g.x + j, k)
            at = index if last else (index[0], index[3], index[1], index[2])
            if bias is not None:
                y = Binary("add", y, params.load(bias.expand(anchor.shape), at))
            if tree is not None:
                y = tree.expr(lambda v, at=at: params.load(tree.leaves[v], at), {anchor: y})  # type: ignore[misc]
            store = Store(params.buffer(out, writable=True), index, y)
            stores.append(_guarded(store, g.m, g.x + j, out.shape[2], j))
        body += [_guarded(s, g.m, g.y + i, out.shape[1], i) for s in stores]
    extent = lanes if n_out % lanes == 0 else minimum(lanes, n_out - symbol(PART, 0) * lanes)
    return g.loop([For("c", extent, tuple(body), "vector")])


def _guarded(s: Stmt, m: int, at: Dim, extent: Dim, offset: int) -> Stmt:
    """A statement that runs where `at`, which is `offset` after a tile's begin, lies inside the result."""
    if offset == 0 or _divides(m, extent):
        return s
    return Guard(Binary("lt", Index(at), Index(extent)), (s,))


def _divides(m: int, d: Dim) -> bool:
    return isinstance(d, int) and d % m == 0
