"""The disk cache: whole files, checked entries, bounds, and many processes at once."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vivace.base import cache as cache_module
from vivace.base import events
from vivace.base.cache import Cache, default_cache, write_atomic
from vivace.base.errors import InputError
from vivace.base.knobs import knobs

HEADER_BYTES = cache_module._HEADER.size


def entries(cache: Cache) -> list[Path]:
    return sorted(p for p in cache.root.rglob("*") if p.is_file())


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", limit_bytes=1 << 20)


@given(data=st.binary(max_size=200), key=st.text(max_size=20))
def test_round_trip(cache: Cache, data: bytes, key: str) -> None:
    assert cache.put("kernel", key, data)
    assert cache.get("kernel", key) == data
    assert cache.get("tuning", key) is None


def test_a_new_value_replaces_the_old(cache: Cache) -> None:
    cache.put("kernel", "k", b"old")
    cache.put("kernel", "k", memoryview(b"new"))
    assert cache.get("kernel", "k") == b"new"
    assert cache.size_bytes() == HEADER_BYTES + 3


@pytest.mark.parametrize("kind", ["", "..", "a/b", "a b", "a.b"])
def test_a_kind_is_a_plain_word(cache: Cache, kind: str) -> None:
    with pytest.raises(InputError, match="kind of cache entry"):
        cache.get(kind, "k")


@given(position=st.integers(0, HEADER_BYTES + 4), bit=st.integers(0, 7))
def test_any_flipped_bit_is_a_miss_and_removed(cache: Cache, position: int, bit: int) -> None:
    cache.put("kernel", "k", b"hello")
    [path] = entries(cache)
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << bit
    path.write_bytes(raw)
    with events.collecting() as records:
        assert cache.get("kernel", "k") is None
    assert [r.level for r in records if isinstance(r, events.Notice)] == ["warning"]
    assert entries(cache) == []


@given(length=st.integers(0, HEADER_BYTES + 4))
def test_any_truncation_is_a_miss(cache: Cache, length: int) -> None:
    cache.put("kernel", "k", b"hello")
    [path] = entries(cache)
    path.write_bytes(path.read_bytes()[:length])
    assert cache.get("kernel", "k") is None
    assert entries(cache) == []


def test_an_entry_under_another_name_is_a_miss(cache: Cache) -> None:
    cache.put("kernel", "a", b"code of a")
    [path_a] = entries(cache)
    cache.put("kernel", "b", b"code of b")
    [path_b] = set(entries(cache)) - {path_a}
    path_b.write_bytes(path_a.read_bytes())
    assert cache.get("kernel", "b") is None
    assert cache.get("kernel", "a") == b"code of a"


def test_what_was_unused_for_longest_goes_first(tmp_path: Path) -> None:
    size = 100
    cache = Cache(tmp_path, limit_bytes=3 * (HEADER_BYTES + size))
    for age, key in ((300, "a"), (200, "b"), (100, "c")):
        before = set(entries(cache))
        cache.put("kernel", key, bytes(size))
        [path] = set(entries(cache)) - before
        stamp = time.time() - age
        os.utime(path, (stamp, stamp))
    assert cache.get("kernel", "a") is not None  # now the one used last
    cache.put("kernel", "d", bytes(size))
    assert [cache.get("kernel", key) is not None for key in "abcd"] == [True, False, True, True]


def test_the_size_is_bounded(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=4000)
    for i in range(200):
        cache.put("kernel", str(i), bytes(i))
        assert cache.size_bytes() <= 4000 * 17 // 16
    assert cache.size_bytes() > 2000


def test_the_first_write_sees_what_others_left(tmp_path: Path) -> None:
    Cache(tmp_path, limit_bytes=10_000).put("kernel", "big", bytes(9000))
    Cache(tmp_path, limit_bytes=1000).put("kernel", "small", bytes(10))
    assert Cache(tmp_path, limit_bytes=10_000).get("kernel", "big") is None


def test_an_entry_above_the_limit_is_not_stored(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=100)
    assert not cache.put("kernel", "k", bytes(100))
    assert entries(cache) == []


def test_a_limit_of_zero_turns_the_cache_off(cache: Cache) -> None:
    cache.put("kernel", "k", b"data")
    off = Cache(cache.root, limit_bytes=0)
    assert off.get("kernel", "k") is None
    assert not off.put("kernel", "k", b"")


def test_clear(cache: Cache) -> None:
    cache.put("kernel", "k", b"data")
    cache.put("tuning", "k", b"data")
    cache.clear()
    assert cache.size_bytes() == 0


def test_trimming_removes_what_killed_writers_left(cache: Cache) -> None:
    cache.put("kernel", "k", b"data")
    folder = entries(cache)[0].parent
    stale, fresh = folder / ".x.1.ab.tmp", folder / ".y.1.ab.tmp"
    stale.write_bytes(b"half")
    fresh.write_bytes(b"half")
    os.utime(stale, (0, 0))
    cache.trim()
    assert not stale.exists()
    assert fresh.exists()
    assert cache.get("kernel", "k") == b"data"


def test_a_full_disk_is_a_warning_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(Path, "replace", fail)
    with events.collecting() as records:
        assert not cache.put("kernel", "k", b"data")
        assert not cache.put("kernel", "l", b"data")
    [notice] = records
    assert isinstance(notice, events.Notice) and "No space left" in notice.text
    assert entries(cache) == []


def test_a_root_that_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = Cache(tmp_path / "file" / "cache", limit_bytes=1000)
    with events.collecting() as records:
        assert not cache.put("kernel", "k", b"data")
    assert len(records) == 1
    assert cache.get("kernel", "k") is None
    assert cache.size_bytes() == 0


def test_the_default_cache_follows_the_knobs(tmp_path: Path) -> None:
    with knobs.scope(cache_dir=tmp_path, cache_bytes="1KiB"):
        cache = default_cache()
        assert default_cache() is cache  # it warns once, and counts all that is written
    assert (cache.root, cache.limit_bytes) == (tmp_path, 1024)


def test_write_atomic_writes_chunks_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "out"
    assert write_atomic(path, [b"ab", bytearray(b"c"), memoryview(b"de")], mode=0o600) == 5
    assert path.read_bytes() == b"abcde"
    assert path.stat().st_mode & 0o777 == 0o600
    assert write_atomic(path, [], durable=False) == 0
    assert path.read_bytes() == b""


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError("bad")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")

    def chunks() -> Iterator[bytes]:
        yield b"half of the new"
        raise failure

    with pytest.raises(type(failure)):
        write_atomic(path, chunks())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomic_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "missing" / "out", [b"x"])


HAMMER = """
import sys
from pathlib import Path
from vivace.base.cache import Cache
cache = Cache(Path(sys.argv[1]), limit_bytes=6000)
for i in range(150):
    key = str(i % 20)
    found = cache.get("kernel", key)
    assert found is None or found == key.encode() * 200, found
    assert cache.put("kernel", key, key.encode() * 200)
"""


def test_a_file_may_vanish_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process evicts it between two looks."""
    monkeypatch.setattr(Path, "exists", lambda *_: True)
    assert write_atomic(tmp_path / "gone", [b"data"]) == 4
    assert (tmp_path / "gone").read_bytes() == b"data"


def test_many_processes_at_once(tmp_path: Path) -> None:
    """Readers, writers and evictions race; no process fails and no reader sees a part of an entry."""
    hammers = [
        subprocess.Popen([sys.executable, "-c", HAMMER, str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    errors = [hammer.communicate()[1] for hammer in hammers]
    assert errors == [""] * 3
    cache = Cache(tmp_path, limit_bytes=6000)
    cache.trim()
    assert 0 < cache.size_bytes() <= 6000
    assert all(path.suffix == ".entry" for path in entries(cache))


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="not a regular file"):
        write_atomic(pipe, [b"x"])
    assert pipe.is_fifo()
