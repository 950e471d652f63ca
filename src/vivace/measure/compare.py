"""How far two sets of outputs are apart.

Rules:
* FINITE: errors are taken over the elements that are finite in both; NaN must meet NaN and an infinity its like, and
  every place where they do not is counted.
* SCALE: the relative error is |got - want| / (1 + |want|), so that values near zero do not dominate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vivace.base.errors import InputError

# Of outputs in bf16 against f32. Each product adds two roundings of at most 2**-9 (weights and operand), a power of
# 2 * 2**-18 / 3: 50 of them stand 39 dB below the values. Networks that amplify errors, as MobileNetV2, lose up to 18.
LEAST_SNR_DB = 20.0


@dataclass(frozen=True, slots=True)
class Tolerance:
    """An element agrees when |got - want| <= absolute + relative * |want|.

    With `least_snr_db` an output agrees as a whole, when the power of its errors is that far below its own: the measure
    for reduced precision, whose errors are random and follow the largest values of a layer.
    """

    absolute: float = 1e-3
    relative: float = 1e-3
    least_snr_db: float | None = None

    def __str__(self) -> str:
        if self.least_snr_db is not None:
            return f"errors at least {self.least_snr_db:g} dB below the values"
        return f"|got - want| <= {self.absolute:g} + {self.relative:g} |want|"


@dataclass(frozen=True, slots=True)
class Difference:
    """One output of two engines. `n_special` counts NaN or infinity on one side only, `n_over` what is over tolerance.

    `snr_db` is the power of the wanted values over that of the errors; infinite for equal arrays.
    """

    name: str
    shape: tuple[int, ...]
    max_absolute: float
    max_relative: float
    snr_db: float
    n_special: int
    n_over: int

    @property
    def agrees(self) -> bool:
        return self.n_special == 0 and self.n_over == 0


def compare_arrays(name: str, got: np.ndarray, want: np.ndarray, tolerance: Tolerance) -> Difference:
    """Raises: InputError where the arrays have different shapes."""
    if got.shape != want.shape:
        raise InputError(
            f"shapes differ: {list(got.shape)} and {list(want.shape)}", where=name, expected="equal shapes"
        )
    if want.dtype.kind in "OUS":
        n_over = int(np.count_nonzero(got != want))
        return Difference(name, want.shape, float(n_over > 0), float(n_over > 0), math.inf, 0, n_over)
    a, b = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    same_special = (np.isnan(a) & np.isnan(b)) | (np.isinf(a) & (a == b))
    n_special = int(np.count_nonzero(~finite & ~same_special))
    x, y = a[finite], b[finite]
    if x.size == 0:
        return Difference(name, want.shape, 0.0, 0.0, math.inf, n_special, 0)
    errors = np.abs(x - y)
    noise, signal = float(np.sum(errors**2)), float(np.sum(y**2))
    snr_db = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf
    over = errors > tolerance.absolute + tolerance.relative * np.abs(y)
    is_whole = tolerance.least_snr_db is not None and snr_db >= tolerance.least_snr_db
    n_over = 0 if is_whole else int(np.count_nonzero(over))
    largest_relative = float(np.max(errors / (1 + np.abs(y))))
    return Difference(name, want.shape, float(errors.max()), largest_relative, snr_db, n_special, n_over)


def compare(
    got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray], tolerance: Tolerance | None = None
) -> tuple[Difference, ...]:
    """One record per wanted output. Raises: InputError where one is missing or has another shape."""
    missing = [name for name in want if name not in got]
    if missing:
        raise InputError(f"output {missing[0]!r} is missing", expected=", ".join(want))
    return tuple(compare_arrays(name, got[name], want[name], tolerance or Tolerance()) for name in want)
