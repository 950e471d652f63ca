"""Reads the weights of a CTranslate2 `model.bin` (versions 3 to 6) as NumPy arrays, without the library.

Layout, little-endian: u32 version, string spec, u32 revision, u32 count, then per variable: string name, u8 rank,
u32 dims[rank], u8 data type, u32 bytes, data; then u32 count of aliases, each two strings. A string is u16 length
(with its final NUL) and bytes. Every length is checked against the file's size, so a damaged file is refused and
never read past its end.

Source: CTranslate2's python/ctranslate2/specs/model_spec.py (`_serialize`).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


class _Cursor:
    """A position in a buffer; every read checks the bound."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, n_bytes: int) -> bytes:
        end = self.at + n_bytes
        if end > len(self.data):
            raise ValueError(
                f"{self.path}: truncated at byte {self.at} (needs {n_bytes} more, has {len(self.data) - self.at})"
            )
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def unsigned(self, n_bytes: int) -> int:
        return int.from_bytes(self.take(n_bytes), "little")

    def string(self) -> str:
        return self.take(self.unsigned(2)).rstrip(b"\0").decode()


def read_weights(path: Path) -> dict[str, NDArray[np.generic]]:
    """All variables and aliases of the model, by name.

    Raises: ValueError when the file is not such a model or is damaged.
    """
    cursor = _Cursor(path.read_bytes(), path)
    version = cursor.unsigned(4)
    if not 3 <= version <= 6:
        raise ValueError(f"{path}: CTranslate2 file version {version}, expected 3 to 6")
    cursor.string()
    cursor.unsigned(4)
    arrays: dict[str, NDArray[np.generic]] = {}
    for _ in range(cursor.unsigned(4)):
        name = cursor.string()
        dims = tuple(cursor.unsigned(4) for _ in range(cursor.unsigned(1)))
        arrays[name] = _read_array(cursor, name, dims)
    for _ in range(cursor.unsigned(4)):
        alias, name = cursor.string(), cursor.string()
        arrays[alias] = arrays[name]
    return arrays


def _read_array(cursor: _Cursor, name: str, dims: tuple[int, ...]) -> NDArray[np.generic]:
    kind = cursor.unsigned(1)
    if kind not in DTYPES:
        raise ValueError(f"{cursor.path}: variable {name} has data type {kind}, expected one of {sorted(DTYPES)}")
    dtype = np.dtype(DTYPES[kind])
    n_bytes = cursor.unsigned(4)
    if n_bytes != dtype.itemsize * math.prod(dims):
        raise ValueError(f"{cursor.path}: variable {name} has {n_bytes} bytes, which is not {dtype}{list(dims)}")
    return np.frombuffer(cursor.take(n_bytes), dtype).reshape(dims)
