"""Shapes and arrays for a model's inputs: trtexec's shape grammar, sizes for symbols, seeded arrays that make sense.

    parse_shapes("images:1x3x224x224,ids:1x16")   ->  {"images": (1, 3, 224, 224), "ids": (1, 16)}

Rules:
* SEED: the same specs, shapes and seed give the same arrays.
* NAME: values follow the names that exporters use (`attention_mask` is ones, `position_ids` counts up), because random
  integers would index outside of tables.
* LAST: a tensor's name may hold colons, so the shape is what follows the last one.

Not handled: strings.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vivace.base.dims import Dim, Expr, Symbol, as_symbol, evaluate, linear, substitute, symbols
from vivace.base.dtypes import DType
from vivace.base.errors import InputError, UnsupportedError
from vivace.base.specs import TensorSpec

Shapes = dict[str, tuple[int, ...]]

_SIDE, _LENGTH = 224, 128  # of pictures and of sequences, where the user gives no shape
_SMALL_ID = 100  # every vocabulary has that many tokens


def parse_shapes(text: str) -> Shapes:
    """Shapes by input name (LAST); an empty shape, as in `sr:`, is a scalar's.

    Raises: InputError for what is not in the grammar, and for an input named twice.
    """
    shapes: Shapes = {}
    for part in filter(None, text.split(",")):
        name, colon, dims = part.rpartition(":")
        sizes = dims.split("x") if dims else []
        if not (colon and name) or not all(size.isdecimal() for size in sizes):
            raise InputError(
                f"cannot read the shape {part!r}",
                where="--shapes",
                expected="NAME:DIMxDIMx..., with commas between inputs",
                hint="--shapes x:1x3x224x224",
            )
        if name in shapes:
            raise InputError(f"the shape of {name!r} is given twice", where="--shapes", expected="one shape an input")
        shapes[name] = tuple(map(int, sizes))
    return shapes


def check_shapes(specs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises: InputError for an unknown input, another rank, or a fixed dim of another size."""
    known = {spec.name: spec for spec in specs}
    for name, shape in shapes.items():
        if name not in known:
            raise InputError(f"the model has no input {name!r}", expected=f"one of {', '.join(known)}")
        spec = known[name]
        is_fit = len(shape) == len(spec.shape) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(spec.shape, shape)
        )
        if not is_fit:
            raise InputError(f"the shape {'x'.join(map(str, shape))} does not fit", where=name, expected=str(spec))


def bind(specs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The size of every symbol that the shapes determine.

    Raises: InputError where the shapes do not fit the specs or contradict each other.
    """
    check_shapes(specs, shapes)
    pairs = [(spec, i, shapes[spec.name][i]) for spec in specs if spec.name in shapes for i in range(len(spec.shape))]
    sizes: dict[str, int] = {}
    for _ in range(len(pairs) + 1):  # an expression is solved once all but one of its symbols are known
        for spec, axis, size in pairs:
            _solve(substitute(spec.shape[axis], sizes), size, spec, sizes)
    return sizes


def _solve(dim: Dim, size: int, spec: TensorSpec, sizes: dict[str, int]) -> None:
    if isinstance(dim, int):
        if dim != size:
            raise InputError(f"a dim is {size}, where other inputs make it {dim}", where=spec.name, expected=str(spec))
        return
    names = {s.name for s in symbols(dim)}
    if len(names) != 1:
        return
    (name,) = names
    parts = linear(dim, name)
    if parts is None:
        return
    slope, rest = parts
    if not (isinstance(slope, int) and isinstance(rest, int)):
        return
    if slope and (size - rest) % slope == 0 and (size - rest) // slope >= 0:
        sizes[name] = (size - rest) // slope
    else:
        raise InputError(f"a dim of {size} is impossible", where=spec.name, expected=str(spec))


def choose_shapes(
    specs: Sequence[TensorSpec], given: Mapping[str, Sequence[int]], demands: Iterable[Dim] = ()
) -> tuple[Shapes, dict[str, int]]:
    """A shape for every input, and the sizes of all symbols: as given, and a usual size for what is not, or the one
    next to it that the bounds of its symbol allow.

    A first dim is a batch of 1; the third and fourth dim of a picture are 224; others are 128, or 0 for what is past.
    Demands are 0 for the sizes that a branch of the model takes: they are met as long as none before is broken.
    """
    sizes = bind(specs, given)
    for spec in specs:
        for axis, dim in enumerate(spec.shape):
            left = substitute(dim, sizes)
            found = as_symbol(left) if isinstance(left, Expr) else None
            if found is not None:
                sizes[found.name] = _nearest(_usual_size(spec, axis, found.name), found, sizes, demands)
    shapes = {}
    for spec in specs:
        dims = [substitute(dim, sizes) for dim in spec.shape]
        for dim in dims:
            for unknown in symbols(dim):
                sizes.setdefault(unknown.name, 1)
        shapes[spec.name] = tuple(evaluate(dim, sizes) for dim in dims)
    return shapes, sizes


def _usual_size(spec: TensorSpec, axis: int, name: str) -> int:
    if axis == 0 or "batch" in name.lower():
        return 1
    if "past" in name.lower() or "past" in spec.name.lower():
        return 0
    return _SIDE if len(spec.shape) == 4 and spec.dtype.is_float and axis >= 1 else _LENGTH


def _nearest(size: int, s: Symbol, sizes: Mapping[str, int], demands: Iterable[Dim]) -> int:
    """The size next to a usual one that a symbol may have, once the sizes of others are known."""
    size = max(size, s.lo or 0) if s.hi is None else min(max(size, s.lo or 0), s.hi)
    met: list[Dim] = []
    for demand in demands:
        alone = substitute(demand, sizes)
        if {t.name for t in symbols(alone)} != {s.name}:
            continue
        by = evaluate(alone, {s.name: size})
        for other in (size - by, size + by):
            if other >= 0 and not any(evaluate(d, {s.name: other}) for d in (*met, alone)):
                size, met = other, [*met, alone]
                break
    return size


def generate(specs: Iterable[TensorSpec], shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded arrays for inputs of these shapes (SEED, NAME)."""
    arrays = {}
    for spec in specs:
        generator = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
        arrays[spec.name] = _values(spec, tuple(shapes[spec.name]), generator)
    return arrays


def _values(spec: TensorSpec, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    dtype, name = spec.dtype, spec.name.lower()
    if dtype is DType.string:
        raise UnsupportedError("arrays of strings cannot be generated", where=spec.name, hint="--input NAME=FILE.npy")
    if dtype.is_float:
        return np.asarray(generator.standard_normal(shape, np.float32)).astype(dtype.numpy)
    if "mask" in name:
        return np.ones(shape, dtype.numpy)
    if dtype is DType.bool:
        return np.asarray(generator.integers(0, 2, shape)).astype(np.bool_)
    if "position" in name and shape:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype.numpy)
    if "token_type" in name or "segment" in name:
        return np.zeros(shape, dtype.numpy)
    if name in ("sr", "sample_rate", "sampling_rate"):
        return np.full(shape, 16_000, dtype.numpy)
    if dtype in (DType.u8, DType.i8):
        low, high = (0, 256) if dtype is DType.u8 else (-128, 128)
        return np.asarray(generator.integers(low, high, shape)).astype(dtype.numpy)
    return np.asarray(generator.integers(0, _SMALL_ID, shape)).astype(dtype.numpy)


def check_arrays(specs: Sequence[TensorSpec], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises: InputError for a missing or unknown input, and for a dtype or shape that does not fit."""
    known = {spec.name: spec for spec in specs}
    missing = [str(spec) for name, spec in known.items() if name not in arrays]
    if missing:
        raise InputError("no array is given for an input", where=missing[0], hint=f"--input {missing[0]}=FILE.npy")
    check_shapes(specs, {name: array.shape for name, array in arrays.items()})
    for name, array in arrays.items():
        if array.dtype != known[name].dtype.numpy:
            raise InputError(f"the array has dtype {array.dtype}", where=name, expected=str(known[name]))
