"""Tensors of ONNX files as NumPy arrays; data outside the model file is memory-mapped.

External data is read only from inside the model's directory: a location that is absolute, climbs with `..`, or leads
out through a symbolic link is refused. Sizes are compared before any memory is taken.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from vivace.base.dtypes import DType
from vivace.base.errors import ModelError, UnsupportedError
from vivace.onnx.wire import OWN_FILE

_DTYPES: dict[int, DType] = {
    TensorProto.FLOAT: DType.f32,
    TensorProto.DOUBLE: DType.f64,
    TensorProto.FLOAT16: DType.f16,
    TensorProto.BFLOAT16: DType.bf16,
    TensorProto.FLOAT8E4M3FN: DType.f8e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: DType.f8e4m3fnuz,
    TensorProto.FLOAT8E5M2: DType.f8e5m2,
    TensorProto.FLOAT8E5M2FNUZ: DType.f8e5m2fnuz,
    TensorProto.FLOAT8E8M0: DType.f8e8m0,
    TensorProto.FLOAT4E2M1: DType.f4e2m1,
    TensorProto.INT4: DType.i4,
    TensorProto.INT8: DType.i8,
    TensorProto.INT16: DType.i16,
    TensorProto.INT32: DType.i32,
    TensorProto.INT64: DType.i64,
    TensorProto.UINT4: DType.u4,
    TensorProto.UINT8: DType.u8,
    TensorProto.UINT16: DType.u16,
    TensorProto.UINT32: DType.u32,
    TensorProto.UINT64: DType.u64,
    TensorProto.BOOL: DType.bool,
    TensorProto.STRING: DType.string,
}
_NUMBERS = {d: n for n, d in _DTYPES.items()}
_TWO_PER_BYTE = (DType.i4, DType.u4, DType.f4e2m1)
MAX_BYTES = 1 << 42
"""No tensor of a model that fits a machine is larger than 4 TiB; a larger one is a damaged or hostile file."""


def dtype_of(data_type: int, where: str) -> DType:
    """The DType of an ONNX element type. Raises: ModelError, UnsupportedError."""
    if data_type in _DTYPES:
        return _DTYPES[data_type]
    if data_type in TensorProto.DataType.values() and data_type != TensorProto.UNDEFINED:
        raise UnsupportedError(f"element type {TensorProto.DataType.Name(data_type)} is not supported", where=where)
    raise ModelError(f"element type {data_type} is not one of ONNX", where=where)


def data_type_of(dtype: DType) -> int:
    return _NUMBERS[dtype]


def checked_shape(dims: list[int], dtype: DType, where: str) -> tuple[int, ...]:
    """Dims that are not negative and whose product is a size that a machine can have."""
    if any(d < 0 for d in dims):
        raise ModelError(f"dims {dims} hold a negative size", where=where)
    if math.prod(dims) * dtype.size_bytes > MAX_BYTES:
        raise ModelError(
            f"dims {dims} make {math.prod(dims) * dtype.size_bytes:.3g} bytes",
            where=where,
            expected=f"at most {MAX_BYTES} bytes",
            hint="copy or download the file again, or export the model again",
        )
    return tuple(dims)


class Tensors:
    """Reads the tensors of one model.

    `directory` is where its external data lies, `model` the mapped file itself; both are None when it came as bytes.
    """

    def __init__(self, directory: Path | None, model: np.ndarray | None = None) -> None:
        self.directory = None if directory is None else directory.resolve()
        self.model = model
        self._files: dict[Path, np.ndarray] = {}

    def array(self, t: TensorProto, where: str) -> np.ndarray:
        """The contents of a tensor, read-only where they are mapped or shared."""
        where = f"{where} tensor {t.name!r}" if t.name else where
        dtype = dtype_of(t.data_type, where)
        shape = checked_shape(list(t.dims), dtype, where)
        if t.data_location == TensorProto.EXTERNAL:
            return self._external(t, dtype, shape, where)
        n = math.prod(shape)
        if t.HasField("raw_data"):
            packed = dtype in _TWO_PER_BYTE
            want = (n + 1) // 2 if packed else n * dtype.size_bytes
            if dtype is DType.string or len(t.raw_data) != want:
                raise ModelError(
                    f"holds {len(t.raw_data)} bytes", where=where, expected=f"{want} for {dtype}{list(shape)}"
                )
            if not packed:
                return np.frombuffer(t.raw_data, dtype.numpy).reshape(shape)
        try:
            array = numpy_helper.to_array(t)
        except (ValueError, TypeError, OverflowError) as e:
            raise ModelError(
                f"its data does not fit its type {dtype}{list(shape)}", where=where, hint="export the model again"
            ) from e
        if array.shape != shape:
            raise ModelError(f"holds {array.size} elements", where=where, expected=f"{n}")
        return array if dtype is DType.string else array.astype(dtype.numpy, copy=False)

    def sparse(self, t: onnx.SparseTensorProto, where: str) -> np.ndarray:
        """A sparse tensor made dense."""
        values = self.array(t.values, where)
        indices = self.array(t.indices, where)
        shape = checked_shape(list(t.dims), DType.of(values.dtype), where)
        sizes = np.array(shape if indices.ndim == 2 else [math.prod(shape)], np.int64)
        places = indices if indices.ndim == 2 else indices.reshape(-1, 1)
        fits = (
            indices.dtype == np.int64 and indices.ndim in (1, 2) and places.shape == (values.size, max(1, sizes.size))
        )
        if not fits or ((places < 0) | (places >= sizes)).any():
            raise ModelError("the indices of a sparse tensor do not fit its dims", where=where)
        flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), shape)
        out = np.zeros(math.prod(shape), values.dtype)
        out[flat] = values
        return out.reshape(shape)

    def _external(self, t: TensorProto, dtype: DType, shape: tuple[int, ...], where: str) -> np.ndarray:
        entries = {e.key: e.value for e in t.external_data}
        file, name = self._file(entries.get("location", ""), where)
        packed = dtype in _TWO_PER_BYTE
        want = (math.prod(shape) + 1) // 2 if packed else math.prod(shape) * dtype.size_bytes
        try:
            offset, length = int(entries.get("offset") or 0), int(entries.get("length") or want)
        except ValueError as e:
            raise ModelError("the offset or length of its external data is no number", where=where) from e
        if length != want or dtype is DType.string:
            raise ModelError(
                f"its external data has {length} bytes", where=where, expected=f"{want} for {dtype}{list(shape)}"
            )
        if offset < 0 or offset + length > file.size:
            raise ModelError(
                f"its external data ends at byte {offset + length}",
                where=where,
                expected=f"at most {file.size}, the size of {name}",
                hint="copy the data file again, it may be truncated",
            )
        data = file[offset : offset + length]
        if packed:
            inline = TensorProto(dims=shape, data_type=t.data_type, raw_data=data.tobytes())
            return self.array(inline, where)
        return data.view(dtype.numpy).reshape(shape)

    def _file(self, location: str, where: str) -> tuple[np.ndarray, str]:
        if location == OWN_FILE and self.model is not None:
            return self.model, "the model"
        path = self._path(location, where)
        if path not in self._files:
            size = path.stat().st_size
            self._files[path] = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        return self._files[path], path.name

    def _path(self, location: str, where: str) -> Path:
        if self.directory is None:
            raise ModelError(
                "its data lies outside the model, which came as bytes",
                where=where,
                hint="pass the path of the model file",
            )
        if not location or "\0" in location:
            raise ModelError("its external data has no location", where=where)
        path = Path(location)
        safe = f"a file inside {self.directory}"
        if path.is_absolute() or ".." in path.parts or "\\" in location:
            raise ModelError(
                f"its external data {location!r} escapes from the model's directory", where=where, expected=safe,
                hint="save the model again with its data beside it (onnx.save, location=)",
            )  # fmt: skip
        try:
            real = (self.directory / path).resolve(strict=True)
        except (OSError, RuntimeError, ValueError) as e:
            raise ModelError(
                f"its external data {location[:200]!r} cannot be found", where=where, expected=safe,
                hint="copy the data file to where the model is",
            ) from e  # fmt: skip
        if not real.is_relative_to(self.directory) or not real.is_file():
            raise ModelError(
                f"its external data {location!r} leads out of the model's directory or is no file",
                where=where,
                expected=safe,
                hint="replace the symbolic link by the file",
            )
        return real
