"""What a call is given: names, arrays, and the caller's own arrays for results, checked before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations, pairwise
from typing import NoReturn

import numpy as np

from vivace.base.errors import InputError
from vivace.base.specs import TensorSpec


def refuse_inputs(inputs: object, specs: Sequence[TensorSpec]) -> NoReturn:
    """Raises: InputError that says which names are missing or unknown, or that names are wanted at all."""
    wanted = ", ".join(map(str, specs))
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"the inputs are of type {type(inputs).__name__}", where="engine.run",
            expected=f"a dict of arrays by name, with {wanted}",
            hint='engine.run({"name": array}), or engine(array, ...)',
        )  # fmt: skip
    names = [s.name for s in specs]
    missing, unknown = [n for n in names if n not in inputs], [n for n in inputs if n not in names]
    what = [f"{kind} inputs {found}" for kind, found in (("missing", missing), ("unknown", unknown)) if found]
    raise InputError(" and ".join(what), where="engine.run", expected=wanted)


def shapes_of(shapes: object, specs: Sequence[TensorSpec]) -> list[tuple[int, ...]]:
    """Shapes by name in the order of the inputs. Raises: InputError for missing or unknown names."""
    if not isinstance(shapes, Mapping) or shapes.keys() != {s.name for s in specs}:
        raise InputError(
            f"shapes are given for {sorted(shapes) if isinstance(shapes, Mapping) else type(shapes).__name__}",
            where="engine.memory", expected=f"a dict of shapes by name, for {', '.join(map(str, specs))}",
        )  # fmt: skip
    return [tuple(shapes[s.name]) for s in specs]


def check_outputs(outputs: object, specs: Sequence[TensorSpec]) -> None:
    """Raises: InputError for an array that belongs to no output."""
    if not isinstance(outputs, Mapping) or not outputs.keys() <= {s.name for s in specs}:
        refuse_outputs(outputs, specs)


def refuse_outputs(outputs: object, specs: Sequence[TensorSpec]) -> NoReturn:
    """Raises: InputError that says which names are unknown, or that names are wanted at all."""
    names = [s.name for s in specs]
    if not isinstance(outputs, Mapping):
        raise InputError(f"the outputs are of type {type(outputs).__name__}", where="engine.run",
                         expected=f"a dict of arrays by name, out of {', '.join(map(str, specs))}")  # fmt: skip
    unknown = [n for n in outputs if n not in names]
    raise InputError(f"unknown outputs {unknown}", where="engine.run", expected=", ".join(map(str, specs)))


def apart(
    given: Sequence[np.ndarray], results: Sequence[np.ndarray], in_place: Collection[int] = ()
) -> list[np.ndarray]:
    """Inputs, copied where a result is written over them. Those `in_place` lie inside of one result, so that they meet
    no other: results lie apart from each other.

    Cost: arrays are compared where their memory may be the same allocation, so that those of a decoder's 60 caches are
    not all compared with each other.
    """
    by_owner: dict[int | None, list[np.ndarray]] = {}
    for r in results:
        by_owner.setdefault(_owner(r), []).append(r)

    def is_written(a: np.ndarray) -> bool:
        owner = _owner(a)
        near = results if owner is None else (*by_owner.get(owner, ()), *by_owner.get(None, ()))
        return any(np.may_share_memory(a, r) for r in near)

    return [a.copy() if i not in in_place and is_written(a) else a for i, a in enumerate(given)]


def refuse_overlaps(outputs: Mapping[str, np.ndarray]) -> None:
    """Raises: InputError for the caller's arrays of which two lie over each other: one result would spoil the other."""
    extents = sorted((*np.lib.array_utils.byte_bounds(y), name) for name, y in outputs.items() if y.size)
    if all(end <= begin for (_, end, _), (begin, _, _) in pairwise(extents)):
        return
    for (one, x), (other, y) in combinations(outputs.items(), 2):
        if np.shares_memory(x, y):
            raise InputError(
                f"the arrays for {one!r} and {other!r} lie over each other", where="engine.run",
                expected="outputs apart from each other",
            )  # fmt: skip


def _owner(a: np.ndarray) -> int | None:
    """Which array's own memory an array lies in; None where that is no array's."""
    if a.flags.owndata:
        return id(a)
    return id(a.base) if type(a.base) is np.ndarray and a.base.flags.owndata else None


def checked(spec: TensorSpec, given: object) -> np.ndarray:
    """An input as kernels read it: of the very dtype, and C-contiguous. Raises: InputError for another dtype."""
    array = np.asarray(given)
    if array.dtype != spec.dtype.numpy:
        raise InputError(
            f"the array has dtype {array.dtype}", where=f"input {spec.name!r}", expected=str(spec),
            hint=f"array.astype({spec.dtype.numpy.name!r})",
        )  # fmt: skip
    if array.dtype is not spec.dtype.numpy:  # an equal one: that of an unpickled array, or `longlong`
        array = array.view(spec.dtype.numpy)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def fitting(
    name: str, array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, has_gaps: bool = False
) -> np.ndarray:
    """The caller's array for a result, dense unless it `has_gaps`. Raises: InputError for one that cannot take it."""
    if not isinstance(array, np.ndarray):
        raise InputError(f"is of type {type(array).__name__}", where=f"output {name!r}", expected="an array")
    fits = array.dtype == dtype and array.shape == shape
    is_dense = has_gaps or array.flags.c_contiguous
    if not fits or not is_dense or not array.flags.writeable:
        kind = "" if array.flags.writeable else "read-only "
        strides = "" if is_dense else f" with strides {array.strides}"
        raise InputError(
            f"the array is {kind}{array.dtype}{list(array.shape)}{strides}",
            where=f"output {name!r}",
            expected=f"writable C-contiguous {dtype}{list(shape)}",
            hint="" if is_dense else "caches in place: all of one length in views with the same room (engine.appended)",
        )
    return array


def result_for(
    name: str, shape: tuple[int, ...], dtype: np.dtype, outputs: Mapping[str, np.ndarray], has_gaps: bool
) -> np.ndarray:
    array = outputs.get(name)
    return np.empty(shape, dtype) if array is None else fitting(name, array, shape, dtype, has_gaps)
