"""Tile kernels: on CPUs without AMX their tile instructions are replaced by calls of the model below, so that all but
the instructions themselves is tested everywhere. Source: Intel's instruction set reference."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from tests.targets.low_precision import Case, convolution, product
from tests.targets.test_contraction_int8 import quantized

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.machine import CacheLevel, host, isa, missing_flags
from vivace.loops.contraction import Axis, Contraction
from vivace.loops.kernel import Binary, Buffer, Expr, Load, Read, Unary
from vivace.lower.tile import Tile, choose_tile
from vivace.targets.cpu import jit
from vivace.targets.cpu.amx import is_permitted

TILES = isa("avx512+amx_bf16+amx_int8+amx_tile")
PLAIN = isa("avx512")
bf16 = ml_dtypes.bfloat16
lacks_avx512 = pytest.mark.skipif(bool(missing_flags(host(), PLAIN)), reason="the CPU lacks AVX-512")
lacks_amx = pytest.mark.skipif(
    bool(missing_flags(host(), TILES)) or not is_permitted(), reason="the CPU lacks AMX, or Linux refuses it"
)


class Model:
    """Eight tile registers and the instructions that kernels use, as functions that generated code calls."""

    def __init__(self) -> None:
        self.registers: list[np.ndarray] = []
        self.n_configured = 0
        operands = {
            "ldtilecfg": 1,
            "tilerelease": 0,
            "tilezero": 1,
            "tileloadd64": 3,
            "tileloaddt164": 3,
            "tilestored64": 3,
        }
        operands |= {"tdpbusd": 3, "tdpbssd": 3, "tdpbf16ps": 3}
        self.calls = {}
        for name, n in operands.items():
            kinds = {
                "ldtilecfg": (ctypes.c_void_p,), "tileloadd64": (ctypes.c_int8, ctypes.c_void_p, ctypes.c_int64),
                "tileloaddt164": (ctypes.c_int8, ctypes.c_void_p, ctypes.c_int64),
                "tilestored64": (ctypes.c_int8, ctypes.c_void_p, ctypes.c_int64),
            }.get(name, (ctypes.c_int8,) * n)  # fmt: skip
            self.calls[name] = ctypes.CFUNCTYPE(None, *kinds)(self._guarded(getattr(self, name)))
        self.errors: list[BaseException] = []

    def _guarded(self, f: Callable[..., None]) -> Callable[..., None]:
        def call(*operands: int) -> None:
            try:
                f(*operands)
            except BaseException as e:
                self.errors.append(e)

        return call

    def ldtilecfg(self, at: int) -> None:
        raw = np.frombuffer(ctypes.string_at(at, 64), np.uint8)
        assert raw[0] == 1 and not raw[1:16].any() and not raw[32:48].any() and not raw[56:].any()
        columns, rows = raw[16:32].view(np.uint16), raw[48:56]
        assert (columns <= 64).all() and (rows <= 16).all() and (columns % 4 == 0).all()
        self.registers = [np.zeros((r, c), np.uint8) for r, c in zip(rows, columns)]
        self.n_configured += 1

    def tilerelease(self) -> None:
        self.registers = []

    def tilezero(self, x: int) -> None:
        self.registers[x][...] = 0

    def tileloadd64(self, x: int, at: int, stride: int) -> None:
        for i, row in enumerate(self.registers[x]):
            row[...] = np.frombuffer(ctypes.string_at(at + i * stride, len(row)), np.uint8)

    def tileloaddt164(self, x: int, at: int, stride: int) -> None:
        self.tileloadd64(x, at, stride)

    def tilestored64(self, x: int, at: int, stride: int) -> None:
        for i, row in enumerate(self.registers[x]):
            ctypes.memmove(at + i * stride, row.tobytes(), len(row))

    def _multiply(self, c: int, a: int, b: int, left: type, right: type, group: int, acc: type) -> None:
        total, x, y = self.registers[c].view(acc), self.registers[a].view(left), self.registers[b].view(right)
        assert (
            x.shape[0] == total.shape[0] and x.shape[1] == y.shape[0] * group and y.shape[1] == total.shape[1] * group
        )
        wide = np.int64 if acc is np.int32 else np.float64
        flat = y.reshape(y.shape[0], -1, group).transpose(0, 2, 1).reshape(x.shape[1], -1)
        total += (x.astype(wide) @ flat.astype(wide)).astype(acc)

    def tdpbusd(self, c: int, a: int, b: int) -> None:
        self._multiply(c, a, b, np.uint8, np.int8, 4, np.int32)

    def tdpbssd(self, c: int, a: int, b: int) -> None:
        self._multiply(c, a, b, np.int8, np.int8, 4, np.int32)

    def tdpbf16ps(self, c: int, a: int, b: int) -> None:
        self._multiply(c, a, b, bf16, bf16, 2, np.float32)

    def run(self, case: Case) -> np.ndarray:
        """The results of a case, its tile instructions being calls of this model."""
        code = case.code(TILES)

        def call(match: re.Match[str]) -> str:
            address = ctypes.cast(self.calls[match[1]], ctypes.c_void_p).value
            return f"call void inttoptr (i64 {address} to ptr)("

        text = re.sub(r"call void @llvm\.x86\.(\w*tile\w*|tdp\w+)\(", call, code.llvm_text)
        library = jit.load([jit.compile_text(text, PLAIN, "light")])
        case.call(code, library.address(code.name), 3)
        if self.errors:
            raise self.errors[0]
        assert not self.registers
        out, n = case.arrays[case.c.out], case.expected.shape[-1]
        assert (out[..., n:] == 77).all()
        return out[..., :n]


def cases() -> list[object]:
    random = np.random.default_rng(0)

    def numbers(dtype: type, *shape: int) -> np.ndarray:
        if dtype is bf16:
            return random.integers(-9, 10, shape).astype(bf16)
        return random.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, shape).astype(dtype)

    found = []
    for dtype, weights, out in ((np.uint8, np.int8, np.int32), (np.int8, np.int8, np.int32), (bf16, bf16, np.float32)):
        for m, k, n in ((8, 32, 16), (49, 64, 100), (33, 96, 70), (16, 256, 33), (100, 144, 7)):
            for symbolic in (False, True):
                case = product(numbers(dtype, 2, m, k), numbers(weights, 2, k, n), out, TILES, symbolic=symbolic)
                found.append(pytest.param(case, id=f"{np.dtype(dtype)} {m}x{k}x{n}{' symbolic' if symbolic else ''}"))
        for size, ci, co, k, stride in ((9, 32, 40, 3, 1), (20, 64, 33, 3, 1), (16, 32, 32, 1, 2), (16, 64, 40, 3, 2)):
            case = convolution(numbers(dtype, 2, size, size, ci), numbers(weights, k, k, ci, co), stride, out, TILES)
            found.append(pytest.param(case, id=f"{np.dtype(dtype)} conv {size} {ci}->{co} {k}x{k}/{stride}"))
    return found


each_case = pytest.mark.parametrize("case", cases())


@lacks_avx512
@each_case
def test_with_modelled_instructions(case: Case) -> None:
    np.testing.assert_array_equal(Model().run(case), case.expected)


@lacks_amx
@each_case
def test_with_tile_registers(case: Case) -> None:
    np.testing.assert_array_equal(case.run(TILES), case.expected)


def test_rows_between_images_fill_tile_registers() -> None:
    """7 x 7 results of an image 9 wide: 61 rows in 4 tile registers of A, not 7 rows in each of 7."""

    def tile(size: int, stride: int = 1) -> Tile:
        image = np.zeros((1, size, size, 64), np.uint8)
        c = convolution(image, np.zeros((3, 3, 64, 32), np.int8), stride, np.int32, TILES).c
        assert isinstance(c, Contraction)
        return choose_tile(c, TILES)

    assert (tile(9).pitch, tile(9).outer, tile(9).inner) == (9, ((1, 1),), ((1, 31), (1, 30)))
    assert (tile(9, 2).pitch, tile(9, 2).inner) == (9, ((1, 31),))
    assert tile(18).pitch == 0  # 16 rows fill a register as they are


def test_rows_fill_as_few_tile_registers_as_there_can_be() -> None:
    """784 rows in 50, not in 56 with 14 rows each; pieces of 31 and 32 rows share one shape of registers."""
    case = product(np.zeros((1, 784, 64), np.uint8), np.zeros((1, 64, 32), np.int8), np.int32, TILES)
    assert isinstance(case.c, Contraction)
    assert choose_tile(case.c, TILES).inner == ((9, 32), (16, 31))
    assert len(re.findall(r"^@product\.shapes", case.code(TILES).llvm_text, re.MULTILINE)) == 1


@each_case
def test_objects_are_made_of_tile_instructions(case: Case) -> None:
    text = case.code(TILES).llvm_text
    lines = jit.assembly(text, TILES, "light")
    assert re.search(r"\btdpb(us|ss|f16p)", lines) and "tilerelease" in lines and "ldtilecfg" in lines
    assert jit.compile_kernel(case.code(TILES), TILES).startswith(b"\x7fELF")


@each_case
def test_few_tile_registers_hold_something(case: Case) -> None:
    """Four accumulators, one of A and one of B: what a program holds is missing for results under way."""
    text = case.code(TILES).llvm_text
    used = re.findall(r"tileloadd64\(i8 (\d)|tilezero\(i8 (\d)", text)
    assert {int(a or b) for a, b in used} <= {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize(("n", "through_memory"), [(16, set()), (96, set()), (100, {True})])
def test_sums_that_nothing_follows_go_to_their_place(n: int, through_memory: set[bool]) -> None:
    """Only columns that do not fill a register are stored by a mask, from a copy."""
    a, b = np.ones((1, 40, 64), bf16), np.ones((1, 64, n), bf16)
    text = product(a, b, np.float32, TILES).code(TILES).llvm_text
    kernels = [x for x in text.split("define ")[1:] if x.startswith("internal void @product.tile")]
    assert kernels and {"tail" in x for x in kernels if "store ptr %out" in x} == through_memory


def test_sums_are_finished_while_the_next_are_made() -> None:
    """Each chunk of a tile's products finishes some rows of the tile before."""
    case = product(np.ones((1, 64, 512), bf16), np.ones((1, 512, 100), bf16), np.float32, TILES)
    _, text = case.code(TILES).llvm_text.split("define internal void @product.tile1x32.tail(")
    kernel, _ = text.split("\n}", 1)
    products, results, sums = (
        kernel.index(x) for x in ("void @llvm.x86.tdp", "void @llvm.masked.store", "tilestored64")
    )
    assert products < results < sums


@pytest.mark.parametrize(("k", "waits"), [(64, False), (512, True)])
def test_sums_wait_where_products_take_longer_than_what_follows(k: int, waits: bool) -> None:
    case = product(np.ones((1, 64, k), bf16), np.ones((1, k, 32), bf16), np.float32, TILES)
    assert isinstance(case.c, Contraction)
    e: Expr = Read("acc", DType.f32)
    for _ in range(10):
        e = Unary("neg", e)
    text = replace(case, c=replace(case.c, epilogue=e)).code(TILES).llvm_text
    assert ("call void @product.finish0(" in text) == waits


@lacks_avx512
@pytest.mark.parametrize(("k", "n", "zeroed"), [(64, 64, {False}), (64, 40, {False, True}), (512, 64, {True})])
def test_sums_of_whole_panels_start_from_the_bias(k: int, n: int, zeroed: set[bool]) -> None:
    """Where nothing waits: else finishing costs nothing. The last panel may be wider than the bias."""
    random = np.random.default_rng(k + n)
    a, b = (random.integers(-9, 10, shape).astype(bf16) for shape in ((1, 40, k), (1, k, n)))
    case = product(a, b, np.float32, TILES)
    assert isinstance(case.c, Contraction)
    bias = Buffer("bias", DType.f32, (n,), (1,))
    e: Expr = Binary("add", Read("acc", DType.f32), Load(bias, (symbol("n"),)))
    for _ in range(10):
        e = Unary("neg", e)
    data = random.integers(-99, 100, n).astype(np.float32)
    biased = replace(case, c=replace(case.c, epilogue=e, extra=(bias,)), arrays={**case.arrays, bias: data})
    text = biased.code(TILES).llvm_text
    kernels = [x for x in text.split("define ")[1:] if x.startswith("internal void @product.tile")]
    assert {"void @llvm.x86.tilezero" in x for x in kernels} == zeroed
    np.testing.assert_array_equal(Model().run(biased), case.expected + data)


@lacks_avx512
@pytest.mark.parametrize("n_chunks", [0, 1, 3, 40])
def test_as_many_chunks_as_show_at_run_time(n_chunks: int) -> None:
    """Also none: what waits is finished all the same."""
    random = np.random.default_rng(n_chunks)
    k = 64 * max(n_chunks, 1)
    a, b = random.integers(0, 9, (2, 70, k)).astype(np.uint8), random.integers(-9, 10, (2, k, 40)).astype(np.int8)
    case = product(a, b, np.int32, TILES)
    assert isinstance(case.c, Contraction)
    steps = Axis("k", 64 * symbol("chunks"), 1)
    opened = replace(case, c=replace(case.c, taps=(steps,)), dims={"chunks": n_chunks})
    np.testing.assert_array_equal(Model().run(opened), case.expected if n_chunks else 0 * case.expected)


WITH_DOTS = isa("avx512+amx_bf16+amx_int8+amx_tile+avx512_bf16+avx512_vnni")


@lacks_amx
@pytest.mark.skipif(bool(missing_flags(host(), WITH_DOTS)), reason="the CPU lacks dot products in vector registers")
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 7, 31, 39])
@pytest.mark.parametrize("left, right, out", [(bf16, bf16, np.float32), (np.uint8, np.int8, np.int32)])
@pytest.mark.parametrize("k, n", [(32, 16), (96, 70), (576, 100)])
def test_few_rows_known_at_run_time(rows: int, left: type, right: type, out: type, k: int, n: int) -> None:
    """Pieces of fewer than 8 rows read the same panels in vector registers."""
    random = np.random.default_rng(rows)
    a, b = random.integers(0, 10, (2, rows, k)).astype(left), random.integers(-9, 10, (2, k, n)).astype(right)
    case = product(a, b, out, WITH_DOTS, symbolic=True)
    np.testing.assert_array_equal(case.run(WITH_DOTS), case.expected)
    text = case.code(WITH_DOTS).llvm_text
    small = next(x for x in text.split("define ")[1:] if re.match(r"internal void @product\.tile1x1(\.tail)?\(", x))
    assert re.search(r"@llvm\.x86\..*dp(bf16ps|busd)", small) and "call void @llvm.x86.tileload" not in small


@pytest.mark.parametrize("left, right, out", [(bf16, bf16, np.float32), (np.uint8, np.int8, np.int32)])
def test_rows_left_over_of_many_stay_in_tile_registers(left: type, right: type, out: type) -> None:
    """7 rows of 49, three tiles being of two steps of the image."""
    image, weights = np.zeros((1, 16, 16, 64), left), np.zeros((3, 3, 64, 32), right)
    text = convolution(image, weights, 2, out, WITH_DOTS).code(WITH_DOTS).llvm_text
    kernels = [x for x in text.split("define ")[1:] if re.match(r"internal void @conv\.tile", x)]
    assert len(kernels) == 2 and all("call void @llvm.x86.tileload" in x for x in kernels)


@each_case
def test_fetches_stand_evenly_between_products(case: Case) -> None:
    """They share what carries lines to the core with the loads of tiles."""
    text = case.code(TILES).llvm_text
    for body in re.split(r"^t\d+:", text, flags=re.MULTILINE):
        first, *later = (part.count("call void @llvm.prefetch") for part in body.split("call void @llvm.x86.tdp"))
        assert first == 0 and max(later, default=0) - min(later, default=0) <= 1


def test_tiles_that_meet_a_panel_fetch_the_next_together() -> None:
    """However they are shared out to units; and none does where panels come again from near."""
    case = product(np.zeros((1, 128, 256), np.uint8), np.zeros((1, 256, 512), np.int8), np.int32, TILES)
    assert isinstance(case.c, Contraction)
    lines_of_panel = 256 * 32 // 64
    tile = replace(choose_tile(case.c, TILES), tiles_per_unit=1, panels_per_unit=1, rows_outer=False)

    def n_fetched(tile: Tile) -> int:
        """Lines that the four tiles of rows ask into the second-level cache."""
        text = replace(case, tile=tile).code(TILES).llvm_text
        return 4 * (256 // 64) * len(re.findall(r"prefetch.*i32 2, i32 1\)", text))

    assert n_fetched(tile) == n_fetched(replace(tile, tiles_per_unit=4)) == lines_of_panel
    assert n_fetched(replace(tile, rows_outer=True)) == 0


@pytest.mark.parametrize("k, n, level", [(256, 64, 1), (512, 128, 2), (64, 256, None)])
def test_panels_that_meet_a_tile_fetch_the_rows_of_the_next_together(k: int, n: int, level: int | None) -> None:
    """Into the first-level cache where panels leave them room; not where there are more results than rows of A."""
    case = product(np.zeros((1, 128, k), np.uint8), np.zeros((1, k, n), np.int8), np.int32, TILES)
    assert isinstance(case.c, Contraction)
    inside = replace(
        choose_tile(case.c, TILES), tiles_per_unit=2, panels_per_unit=n // 32, rows_outer=True, tiles_outside=False
    )

    def n_fetched(tile: Tile) -> dict[int, int]:
        """Lines that all panels together ask into the caches while they meet a tile of 32 rows."""
        text = replace(case, tile=tile).code(TILES).llvm_text
        return {x: k // 64 * n // 32 * len(re.findall(rf"prefetch.*i32 {4 - x}, i32 1\)", text)) for x in (1, 2)}

    more, fewer = n_fetched(replace(inside, tiles_outside=True)), n_fetched(inside)
    assert {x: more[x] - fewer[x] for x in more} == {x: 32 * k // 64 * (x == level) for x in more}


@lacks_avx512
@pytest.mark.parametrize("k", [64, 512])
def test_bytes_of_two_rows_are_packed_together(k: int) -> None:
    """At once or while the next tile is multiplied; of an odd number of rows the last is finished twice."""
    random = np.random.default_rng(k)
    a, b = random.integers(0, 256, (2, 37, k), np.uint8), random.integers(-128, 128, (2, k, 64)).astype(np.int8)
    case = product(a, b, np.uint8, TILES)
    expected = quantized(case, DType.u8, 3, True, is_bounded=True)
    np.testing.assert_array_equal(Model().run(case), expected)
    assert len(re.findall(r"store <32 x i8>.*ptr", case.code(TILES).llvm_text)) % 2 == 0


@pytest.mark.parametrize("k, n_each", [(64, 32), (1024, 2), (4096, 1)])
def test_results_are_fetched_row_by_row_while_the_taps_are_summed(k: int, n_each: int) -> None:
    """32 rows in as many parts as a row has chunks, two lines a row."""
    a, b = np.zeros((1, 32, k), np.uint8), np.zeros((1, k, 32), np.int8)
    text = product(a, b, np.int32, TILES).code(TILES).llvm_text
    assert len(re.findall(r"prefetch.*i32 3, i32 1\)", text)) == 2 * n_each + 32  # and the next chunk of B


@pytest.mark.parametrize(
    "k, n, tiles, panels, hinted",
    [(256, 64, 1, 2, ""), (256, 256, 1, 8, "5"), (1024, 256, 4, 1, "4"), (64, 32, 4, 1, "")],
)
def test_what_is_larger_than_the_first_level_cache_passes_by(
    k: int, n: int, tiles: int, panels: int, hinted: str
) -> None:
    """Panels where a tile meets all of them, tiles where they meet a panel, neither where there is room."""
    case = product(np.zeros((1, 128, k), np.uint8), np.zeros((1, k, n), np.int8), np.int32, TILES)
    assert isinstance(case.c, Contraction)
    plan = replace(choose_tile(case.c, TILES), tiles_outside=False, tiles_per_unit=tiles, panels_per_unit=panels)
    text = replace(case, tile=plan).code(TILES).llvm_text
    assert set(re.findall(r"tileloaddt164\(i8 (\d)", text)) == set(hinted)


def test_many_rows_meet_a_panel_that_comes_from_far() -> None:
    """B is larger than what stays near: its panels are cut from each other, not the rows that meet them."""

    def tile(m: int, n: int) -> Tile:
        c = product(np.zeros((1, m, 1024), bf16), np.zeros((1, 1024, n), bf16), np.float32, TILES).c
        assert isinstance(c, Contraction)
        return choose_tile(c, TILES, replace(host(), caches=(CacheLevel(2, "unified", 2**21, 16, 64, 1),)))

    far, near = tile(2048, 2048), tile(2048, 256)
    assert far.tiles_per_unit >= 8 and far.panels_per_unit < 64 // 4
    assert near.panels_per_unit == 8 and near.tiles_per_unit < 8
