"""Element types, with the spelling used everywhere (`f32`, `i64`, ...).

A `DType` is an enum member, so comparisons are by identity and a misspelling is an AttributeError, not a silent miss.
Half, bfloat16 and the floats of 8 and 4 bits are stored in NumPy through `ml_dtypes`.
"""

from __future__ import annotations

from enum import Enum

import ml_dtypes
import numpy as np

from vivace.base.errors import ModelError

_Bool = bool  # inside the class the name is a member


class DType(Enum):
    """Element type; the value is its spelling in the IR."""

    f32 = "f32"
    f64 = "f64"
    f16 = "f16"
    bf16 = "bf16"
    f8e4m3fn = "f8e4m3fn"
    f8e4m3fnuz = "f8e4m3fnuz"
    f8e5m2 = "f8e5m2"
    f8e5m2fnuz = "f8e5m2fnuz"
    f8e8m0 = "f8e8m0"
    f4e2m1 = "f4e2m1"
    i4 = "i4"
    i8 = "i8"
    i16 = "i16"
    i32 = "i32"
    i64 = "i64"
    u4 = "u4"
    u8 = "u8"
    u16 = "u16"
    u32 = "u32"
    u64 = "u64"
    bool = "bool"
    string = "string"

    def __str__(self) -> str:
        return self.value

    def __repr__(self) -> str:
        return self.value

    @property
    def numpy(self) -> np.dtype:
        """The NumPy dtype that stores one element (sub-byte types are stored one per byte)."""
        return _NUMPY[self]

    @property
    def size_bytes(self) -> int:
        """Bytes of one element in a buffer."""
        return _NUMPY[self].itemsize

    @property
    def is_float(self) -> _Bool:
        return self in _FLOATS

    @property
    def is_int(self) -> _Bool:
        """True for signed and unsigned integers, not for bool."""
        return not self.is_float and self not in (DType.bool, DType.string)

    @property
    def is_signed(self) -> _Bool:
        return self.is_float or self.value.startswith("i")

    @staticmethod
    def of(dtype: np.dtype | type) -> DType:
        """The DType stored by a NumPy dtype. Raises: ModelError for one that has none."""
        d = np.dtype(dtype)
        if d.kind in "OUS":
            return DType.string
        try:
            return _FROM_NUMPY[d]
        except KeyError:
            raise ModelError(
                f"element type {d} has no counterpart in ONNX", expected="a numeric or bool array"
            ) from None


_NUMPY: dict[DType, np.dtype] = {
    DType.f32: np.dtype(np.float32),
    DType.f64: np.dtype(np.float64),
    DType.f16: np.dtype(np.float16),
    DType.bf16: np.dtype(ml_dtypes.bfloat16),
    DType.f8e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn),
    DType.f8e4m3fnuz: np.dtype(ml_dtypes.float8_e4m3fnuz),
    DType.f8e5m2: np.dtype(ml_dtypes.float8_e5m2),
    DType.f8e5m2fnuz: np.dtype(ml_dtypes.float8_e5m2fnuz),
    DType.f8e8m0: np.dtype(ml_dtypes.float8_e8m0fnu),
    DType.f4e2m1: np.dtype(ml_dtypes.float4_e2m1fn),
    DType.i4: np.dtype(ml_dtypes.int4),
    DType.u4: np.dtype(ml_dtypes.uint4),
    DType.i8: np.dtype(np.int8),
    DType.i16: np.dtype(np.int16),
    DType.i32: np.dtype(np.int32),
    DType.i64: np.dtype(np.int64),
    DType.u8: np.dtype(np.uint8),
    DType.u16: np.dtype(np.uint16),
    DType.u32: np.dtype(np.uint32),
    DType.u64: np.dtype(np.uint64),
    DType.bool: np.dtype(np.bool_),
    DType.string: np.dtype(object),
}
_FROM_NUMPY = {n: d for d, n in _NUMPY.items()}
NARROW_FLOATS = (
    DType.f8e4m3fn,
    DType.f8e4m3fnuz,
    DType.f8e5m2,
    DType.f8e5m2fnuz,
    DType.f8e8m0,
    DType.f4e2m1,
)
_FLOATS = frozenset({DType.f32, DType.f64, DType.f16, DType.bf16, *NARROW_FLOATS})
