"""Contraction kernels against NumPy: matrix products and convolutions, every way that B lies, every instruction set
that this CPU has.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest

from vivace.base.dims import Dim, evaluate, symbol
from vivace.base.dtypes import DType
from vivace.base.machine import ISAS, CacheLevel, Isa, host, missing_flags
from vivace.loops.contraction import Axis, Contraction, Packing
from vivace.loops.kernel import Binary, Buffer, Const, Expr, Load, Read, Unary
from vivace.lower.lanes import product_lanes
from vivace.lower.pack import aligned_zeros, pack_panels
from vivace.lower.tile import Tile, choose_tile, panel_lanes, split_axis
from vivace.targets.cpu import jit
from vivace.targets.cpu.code import NOTES_BYTES
from vivace.targets.cpu.contraction import emit_contraction

f32 = DType.f32
ACC = Read("acc", f32)
PAGE = mmap.PAGESIZE
UNTOUCHED = 5.0


def isas() -> list[object]:
    """Every instruction set, those that this CPU lacks as skipped."""
    found = []
    for name, isa in ISAS.items():
        missing = missing_flags(host(), isa)
        found.append(pytest.param(isa, id=name, marks=pytest.mark.skipif(bool(missing), reason=f"CPU lacks {missing}")))
    return found


each_isa = pytest.mark.parametrize("isa", isas())


def at_page_end(values: np.ndarray) -> np.ndarray:
    """A copy that ends where readable memory ends: a kernel that reads beyond it is stopped by the hardware."""
    pages = max(1, -(-values.nbytes // PAGE))
    area = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(start + pages * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    copy = np.frombuffer(area, np.float32, values.size, pages * PAGE - values.nbytes).reshape(values.shape)
    copy[...] = values
    return copy


def buffer(name: str, values: np.ndarray, writable: bool = False) -> Buffer:
    return Buffer(name, f32, values.shape, tuple(s // 4 for s in values.strides), writable)


@dataclass
class Case:
    """A contraction with its arrays; `expected` is without the epilogue."""

    c: Contraction
    arrays: dict[Buffer, np.ndarray]
    expected: np.ndarray
    dims: dict[str, int] = field(default_factory=dict)
    tile: Tile | None = None

    def run(self, isa: Isa, splits: int = 3) -> np.ndarray:
        """The out buffer after running all units in `splits` ranges."""
        code = emit_contraction(self.c, isa, self.tile)
        library = jit.load(jit.compile_objects([code], isa, "light"))
        kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(
            library.address(code.name)
        )
        words = [self.arrays[p].ctypes.data for p in code.params] + [self.dims[d] for d in code.dims]
        args = np.array(words, np.int64)
        scratch = aligned_zeros((evaluate(code.scratch_bytes, self.dims) // 4 + 16,))
        scratch[...] = np.nan
        scratch[: NOTES_BYTES // 4] = 0
        scratch[-16:] = UNTOUCHED
        units = evaluate(code.units, self.dims)
        edges = [units * i // splits for i in range(splits + 1)]
        for begin, end in pairwise(edges):
            kernel(args.ctypes.data, begin, end, scratch.ctypes.data)
        assert (scratch[-16:] == UNTOUCHED).all()
        return self.arrays[self.c.out]


def rng(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def matmul(
    m: int,
    k: int,
    n: int,
    isa: Isa,
    kind: str = "panels",
    heads: int = 1,
    shared: bool = False,
    symbolic: str = "",
    gap: int = 0,
    vectors: int = 0,
) -> Case:
    """`out[h, m, n] = a[h, m, k] @ b[h, k, n]`; dims named in `symbolic` are passed at run time; rows of `out` lie
    `gap` apart. Panels have so many `vectors`, or (0) as many as is usual.
    """
    dims = {name.upper(): value for name, value in (("m", m), ("k", k), ("n", n)) if name in symbolic}
    dim_m, dim_k, dim_n = (symbol(s.upper()) if s in symbolic else v for s, v in (("m", m), ("k", k), ("n", n)))
    a = at_page_end(rng(heads, m, k))
    b = rng(1 if shared else heads, k, n)
    lanes, n_stride = 0, 1
    step_head: Dim
    step_k: Dim
    if kind == "panels":
        lanes = panel_lanes(dim_n, isa, chosen=vectors * isa.n_f32_lanes)
        stored, step_head, step_k = pack_panels(b, lanes), 1, 1
    elif kind == "plain":
        stored, step_head, step_k = at_page_end(b), dim_k * dim_n, dim_n
    else:
        stored, step_head, step_k, n_stride = at_page_end(b.transpose(0, 2, 1)), dim_k * dim_n, 1, dim_k
    out = np.full((heads, m, n + gap), UNTOUCHED, np.float32)
    c = Contraction(
        "product",
        (Axis("h", heads, dim_m * dim_k, 0 if shared else step_head, dim_m * (dim_n + gap)),),
        (Axis("m", dim_m, dim_k, 0, dim_n + gap),),
        (Axis("k", dim_k, 1, step_k),),
        dim_n,
        buffer("a", a),
        buffer("b", stored),
        buffer("out", out, True),
        Packing(kind, lanes, n_stride),
    )
    return Case(c, {c.a: a, c.b: stored, c.out: out}, a.astype(np.float64) @ b.astype(np.float64), dims)


def check(case: Case, isa: Isa, finish: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> None:
    out = case.run(isa)
    n = case.expected.shape[-1]
    expected = finish(case.expected)
    scale = max(1.0, float(np.abs(case.expected).max(initial=0)))
    np.testing.assert_allclose(out[..., :n].reshape(expected.shape), expected, rtol=2e-5, atol=3e-6 * scale)
    assert (out[..., n:] == UNTOUCHED).all()


@each_isa
@pytest.mark.parametrize("kind", ["panels", "plain", "transposed"])
@pytest.mark.parametrize(
    "m, k, n", [(1, 1, 1), (1, 64, 96), (3, 17, 33), (14, 16, 32), (29, 40, 48), (49, 33, 100), (61, 128, 16)]
)
def test_matrix_product(isa: Isa, kind: str, m: int, k: int, n: int) -> None:
    check(matmul(m, k, n, isa, kind, gap=3), isa)


@each_isa
@pytest.mark.parametrize("kind", ["plain", "transposed"])
@pytest.mark.parametrize("shared", [False, True])
def test_batch(isa: Isa, kind: str, shared: bool) -> None:
    check(matmul(37, 20, 45, isa, kind, heads=5, shared=shared), isa)
    check(matmul(37, 20, 45, isa, "panels", heads=5, shared=shared), isa)


@each_isa
@pytest.mark.parametrize("kind", ["plain", "transposed"])
def test_run_time_dims(isa: Isa, kind: str) -> None:
    for m, k, n in [(1, 5, 7), (2, 16, 64), (31, 30, 29), (75, 64, 130)]:
        check(matmul(m, k, n, isa, kind, heads=2, symbolic="mkn", gap=2), isa)
        check(matmul(m, k, n, isa, "panels", symbolic="mk"), isa)


@each_isa
@pytest.mark.parametrize("m, k, n", [(0, 4, 4), (4, 0, 20), (4, 4, 0)])
@pytest.mark.parametrize("symbolic", ["", "mkn"])
def test_empty_dims(isa: Isa, m: int, k: int, n: int, symbolic: str) -> None:
    case = matmul(m, k, n, isa, "plain", symbolic=symbolic)
    case.c = replace(case.c, epilogue=Binary("add", ACC, Const(2.0, f32)))
    check(case, isa, lambda x: x + 2)


@each_isa
def test_rows_that_share_cache_sets_are_staged(isa: Isa) -> None:
    case = matmul(30, 1024, 70, isa)
    unknown = replace(host(), caches=())  # 8 ways
    assert choose_tile(case.c, isa, unknown).stage_a or isa.n_vector_registers < 32
    check(case, isa)


def conv(
    h: int, w: int, ci: int, co: int, k: int, stride: int, isa: Isa, dilation: int = 1, symbolic: bool = False
) -> Case:
    span = (k - 1) * dilation + 1
    oh, ow = (h - span) // stride + 1, (w - span) // stride + 1
    x, weights = at_page_end(rng(2, h, w, ci)), rng(k, k, ci, co)
    lanes = panel_lanes(co, isa)
    packed = pack_panels(weights.reshape(k * k * ci, co), lanes)
    out = np.full((2, oh, ow, co), UNTOUCHED, np.float32)
    dims = {"H": h, "W": w} if symbolic else {}
    dim_h: Dim = symbol("H", span) if symbolic else h
    dim_w: Dim = symbol("W", span) if symbolic else w
    dim_oh, dim_ow = (dim_h - span) // stride + 1, (dim_w - span) // stride + 1
    c = Contraction(
        "conv",
        (),
        (
            Axis("image", 2, dim_h * dim_w * ci, 0, dim_oh * dim_ow * co),
            Axis("oh", dim_oh, stride * dim_w * ci, 0, dim_ow * co),
            Axis("ow", dim_ow, stride * ci, 0, co),
        ),
        (Axis("kh", k, dilation * dim_w * ci), Axis("kw", k, dilation * ci), Axis("channel", ci, 1)),
        co,
        buffer("a", x),
        buffer("b", packed),
        buffer("out", out, True),
        Packing("panels", lanes),
    )
    expected = np.zeros(out.shape)
    for i in range(k):
        for j in range(k):
            y, z = i * dilation, j * dilation
            part = x[:, y : y + stride * (oh - 1) + 1 : stride, z : z + stride * (ow - 1) + 1 : stride]
            expected += part.astype(np.float64) @ weights[i, j].astype(np.float64)
    return Case(c, {c.a: x, c.b: packed, c.out: out}, expected, dims)


@each_isa
@pytest.mark.parametrize(
    "h, w, ci, co, k, stride, dilation",
    [
        (9, 9, 8, 32, 3, 1, 1),
        (7, 7, 16, 48, 1, 1, 1),
        (8, 30, 3, 20, 3, 2, 1),
        (15, 13, 3, 33, 7, 2, 1),
        (12, 12, 5, 16, 3, 1, 2),
        (9, 9, 4, 1, 3, 1, 1),
        (5, 40, 6, 64, 1, 2, 1),
    ],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_convolution(
    isa: Isa, h: int, w: int, ci: int, co: int, k: int, stride: int, dilation: int, symbolic: bool
) -> None:
    check(conv(h, w, ci, co, k, stride, isa, dilation, symbolic), isa)


@each_isa
def test_convolution_with_colliding_rows_takes_smaller_tiles(isa: Isa) -> None:
    check(conv(5, 9, 1024, 32, 3, 1, isa), isa)


def with_epilogue(case: Case) -> tuple[Case, np.ndarray]:
    """`max(acc * scale[m] + bias[n] + residual[m, n], 0)`; the residual lies in the out buffer."""
    _, m, n = case.expected.shape
    bias, scale = rng(n), rng(m)
    b, s = buffer("bias", bias), buffer("scale", scale)
    case.arrays |= {b: bias, s: scale}
    index_m, index_n = symbol("m"), symbol("n")
    e: Expr = Binary("mul", ACC, Load(s, (index_m,)))
    e = Binary("add", e, Load(b, (index_n,)))
    e = Binary("add", e, Load(case.c.out, (symbol("h"), index_m, index_n)))
    e = Binary("max", e, Const(0.0, f32))
    case.c = replace(case.c, epilogue=e, extra=(b, s, case.c.out))
    before = case.arrays[case.c.out].astype(np.float64)[..., :n]
    return case, np.maximum(case.expected * scale[:, None] + bias + before, 0)


@each_isa
@pytest.mark.parametrize("m, n", [(1, 1), (12, 32), (50, 77)])
def test_epilogue_in_place(isa: Isa, m: int, n: int) -> None:
    case, expected = with_epilogue(matmul(m, 24, n, isa))
    check(case, isa, lambda _: expected)


@each_isa
@pytest.mark.parametrize("kind", ["panels", "plain", "transposed"])
def test_passes_over_the_taps(isa: Isa, kind: str) -> None:
    case = matmul(45, 48, 70, isa, kind, heads=2)
    for tiles, panels, k_block in ((2, 1, 16), (1, 3, 24), (100, 100, 16)):
        plan = choose_tile(case.c, isa)
        case.tile = replace(plan, k_block=k_block, tiles_per_unit=tiles, panels_per_unit=panels)
        check(case, isa)
    case = conv(9, 9, 8, 40, 3, 1, isa)
    case.tile = replace(choose_tile(case.c, isa), k_block=1, tiles_per_unit=3, panels_per_unit=2)
    check(case, isa)
    case, expected = with_epilogue(matmul(50, 24, 77, isa))
    case.tile = replace(choose_tile(case.c, isa), k_block=8)
    check(case, isa, lambda _: expected)


@each_isa
@pytest.mark.parametrize("vectors", [3, 4])
def test_wide_panels(isa: Isa, vectors: int) -> None:
    case, expected = with_epilogue(matmul(29, 24, 100, isa, vectors=vectors))
    check(case, isa, lambda _: expected)


@each_isa
def test_tiles_outside_panels(isa: Isa) -> None:
    case = matmul(45, 48, 70, isa)
    case.tile = replace(choose_tile(case.c, isa), tiles_outside=True, tiles_per_unit=2, panels_per_unit=2)
    check(case, isa)


def test_panels_pass_inside_only_where_a_is_the_larger_operand() -> None:
    isa, machine = ISAS["avx512"], replace(host(), caches=())
    assert choose_tile(matmul(3136, 64, 64, isa).c, isa, machine).tiles_outside
    assert not choose_tile(matmul(40, 120, 6625, isa).c, isa, machine).tiles_outside


@each_isa
@pytest.mark.parametrize("splits", [1, 3])
def test_threads_keep_rows(isa: Isa, splits: int) -> None:
    case = matmul(45, 48, 70, isa)
    tile = replace(choose_tile(case.c, isa), tiles_outside=False, tiles_per_unit=2, panels_per_unit=1)
    case.tile = replace(tile, rows_outer=True, keeps_rows=True)
    out = case.run(isa, splits)
    np.testing.assert_allclose(out[0], case.expected[0], rtol=2e-5, atol=1e-4)


def test_units_keep_rows_where_b_is_the_larger_operand_and_near() -> None:
    isa, machine = ISAS["avx512"], replace(host(), caches=())
    near = choose_tile(matmul(196, 64, 512, isa).c, isa, machine)
    n_tiles = sum(count for count, _ in near.inner)
    assert near.keeps_rows and near.rows_outer and near.tiles_per_unit * 2 == n_tiles
    for m, k, n in [(49, 64, 512), (196, 512, 2048), (3136, 64, 64)]:  # few rows; a large B; a small one
        assert not choose_tile(matmul(m, k, n, isa).c, isa, machine).keeps_rows


@pytest.mark.parametrize(("rows", "k", "n"), [(392, 1024, 256), (512, 384, 384)])
def test_many_rows_meet_a_panel_of_a_large_b(rows: int, k: int, n: int) -> None:
    machine = replace(host(), caches=(CacheLevel(2, "unified", 2**21, 16, 64, 1),))
    tile = choose_tile(matmul(rows, k, n, ISAS["avx512"]).c, ISAS["avx512"], machine)
    assert tile.rows_outer and tile.tiles_per_unit * tile.inner[0][1] >= 60


@pytest.mark.parametrize(
    ("rows", "k", "n", "fetches"),
    [(1, 960, 160, False), (7, 960, 160, True), (40, 960, 160, True), (40, 960, 32, False), (196, 576, 96, False)],
    ids=["no work", "few rows", "rows", "one panel", "panels that are near"],
)
def test_the_next_panel_is_fetched_ahead_where_there_is_one_afar_and_work(
    rows: int, k: int, n: int, fetches: bool
) -> None:
    isa = ISAS["avx512"]
    text = emit_contraction(matmul(rows, k, n, isa).c, isa).llvm_text
    assert ("ptr %ahead" in text and ", i32 0, i32 2, i32 1)" in text) == fetches


def test_what_an_epilogue_reads_is_fetched_and_what_it_writes_is_not() -> None:
    isa = ISAS["avx512"]
    soon = "i32 0, i32 3, i32 1)"
    assert soon not in emit_contraction(matmul(28, 24, 64, isa).c, isa).llvm_text
    case, _ = with_epilogue(matmul(28, 24, 64, isa))
    assert emit_contraction(case.c, isa).llvm_text.count(soon) == 14 * 2  # lines of the residual


@pytest.mark.parametrize("fn", ["erf", "gelu"])
def test_erf_of_whole_registers_goes_by_tables(fn: str) -> None:
    c = replace(matmul(28, 24, 64, ISAS["avx512"]).c, epilogue=Unary(fn, ACC))
    assert "vpermi2var.ps.512" in emit_contraction(c, ISAS["avx512"]).llvm_text
    assert "vpermi2var" not in emit_contraction(c, ISAS["avx2"]).llvm_text


def test_rows_are_finished_one_by_one() -> None:
    case, _ = with_epilogue(matmul(28, 24, 64, ISAS["avx512"]))
    assert emit_contraction(case.c, ISAS["avx512"]).llvm_text.count('asm sideeffect "", "~{memory}"()') == 14


@pytest.mark.parametrize(
    ("rows", "n", "vectors"),
    [(49, 384, 4), (49, 512, 4), (49, 96, 3), (49, 240, 4), (49, 80, 3), (49, 32, 2), (49, 16, 1), (13, 384, 2)],
)
def test_panels_are_as_wide_as_makes_few_instructions(rows: int, n: int, vectors: int) -> None:
    c = matmul(rows, 8, n, ISAS["avx512"]).c
    assert product_lanes(c, ISAS["avx512"]) == 16 * vectors
    assert product_lanes(c, ISAS["avx512"], chosen=32) == 32
    assert product_lanes(c, ISAS["avx2"]) == panel_lanes(n, ISAS["avx2"])


def test_large_products_are_cut_for_the_caches() -> None:
    isa = ISAS["avx512"]
    tile = choose_tile(matmul(128, 3072, 768, isa).c, isa, replace(host(), caches=()))
    assert tile.k_block and 3072 % tile.k_block == 0
    assert choose_tile(matmul(64, 64, 64, isa).c, isa, replace(host(), caches=())).k_block == 0


@pytest.mark.parametrize("pixels", [3136, 196])
def test_few_rows_make_units_for_threads_where_their_number_shows_at_run_time(pixels: int) -> None:
    images, isa = symbol("N"), ISAS["avx512"]
    c = matmul(pixels, 256, 2048, isa).c
    merged = replace(c, rows=(replace(c.rows[0], extent=images * pixels),))
    apart = replace(c, rows=(Axis("i", images, pixels * 256 + 1, 0, pixels * 2048), *c.rows))
    for open_c in (merged, apart):
        assert evaluate(emit_contraction(open_c, isa).units, {"N": 1}) >= 8


@each_isa
def test_nan_and_infinity_propagate(isa: Isa) -> None:
    case = matmul(20, 12, 40, isa, "plain")
    a, b = case.arrays[case.c.a], case.arrays[case.c.b]
    a[0, 3, 5] = np.nan
    a[0, 4, 6] = np.inf
    a[0, 5, :] = 0
    b[0, :, 7] = np.inf
    out = case.run(isa)[0]
    assert np.isnan(out[3]).all()
    assert not np.isfinite(out[4]).any()
    assert np.isnan(out[5, 7])
    assert (np.delete(out[5], 7) == 0).all()


@pytest.mark.parametrize("most", [1, 6, 14])
def test_splits_cover_an_axis_exactly(most: int) -> None:
    dynamic = split_axis(symbol("E"), most)
    for extent in range(200):
        static = split_axis(extent, most)
        assert sum(n * size for n, size in static) == extent
        assert all(size <= most for _, size in static)
        assert sum(evaluate(n, {"E": extent}) * size for n, size in dynamic) == extent


def test_panels_are_padded_with_zeros_and_aligned() -> None:
    b = rng(2, 5, 20)
    packed = pack_panels(b, 16)
    assert packed.shape == (2, 2, 5, 16)
    assert packed.ctypes.data % 64 == 0
    np.testing.assert_array_equal(packed[:, 0], b[:, :, :16])
    np.testing.assert_array_equal(packed[:, 1, :, :4], b[:, :, 16:])
    assert (packed[:, 1, :, 4:] == 0).all()
