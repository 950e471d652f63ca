"""Files that survive: atomic writes, and a bounded content-keyed cache on disk that many processes share.

Rules that the code cites:
    WHOLE    a reader sees a file as it was or as it will be, never a part: write beside it, then rename over it.
    CHECKED  an entry is used only after its magic, length and SHA-256 are verified; a damaged one is a miss, and goes.
    OPTIONAL a cache that cannot be read or written (full disk, no permission) costs time and never an error.
    BOUNDED  entries unused for longest go first. A process looks at the whole cache once it wrote a sixteenth of the
             limit, so the cache can stand above its limit by that much for each process that writes.
    RACES    any file may vanish between two lines of this module, because another process evicted it.

Not handled: secrecy (entries have the permissions of the user's umask), file systems whose rename is not atomic.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import secrets
import stat
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from vivace.base import events
from vivace.base.errors import InputError
from vivace.base.knobs import knobs

Chunk = bytes | bytearray | memoryview

_MAGIC = b"vivace\x00c"
_FORMAT = 1
_HEADER = struct.Struct("<8sIQ32s")  # magic, format, length of the data, SHA-256 of key and data
_SUFFIX = ".entry"
_TEMPORARY = ".tmp"
_STALE_SECONDS = 3600.0  # a temporary file this old was left by a killed process


def write_atomic(path: Path, chunks: Iterable[Chunk], *, mode: int | None = None, durable: bool = True) -> int:
    """Writes a file as a whole or not at all (WHOLE), and returns how many bytes.

    `mode` are the permission bits, by default those of any new file. `durable=False` leaves out waiting for the disk,
    for files that carry a checksum and can be made again. On any failure, an interrupt included, the old file stays
    and nothing is left beside it.

    Raises: OSError as the file system gives it, with this file's name, also for a device, a pipe or a folder; whatever
    `chunks` raises.
    """
    if not stat.S_ISREG(_mode_of(path)):  # a rename would replace the device itself
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}{_TEMPORARY}")
    n_bytes = 0
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                n_bytes += memoryview(chunk).nbytes
            file.flush()
            if mode is not None:
                temporary.chmod(mode)
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary), temporary):
            error.filename, error.filename2 = str(path), None  # which the caller knows
        raise
    if durable:
        _sync_folder(path.parent)
    return n_bytes


def _mode_of(path: Path) -> int:
    """The kind and permissions of a file; of what is not there, of a file (one look: RACES)."""
    try:
        return path.stat().st_mode
    except OSError:
        return stat.S_IFREG


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable where the system lets a folder be synchronised."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Cache:
    """Bytes by kind and key, on disk, bounded, safe under concurrent processes.

    `kind` is a short plain word and names the subfolder; `key` is any text that determines the data completely.
    A limit of 0 turns the cache off.
    """

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        self._written_bytes = limit_bytes  # the first write looks at what other processes left
        self._has_warned = False

    def get(self, kind: str, key: str) -> bytes | None:
        """The data stored under a key, or None."""
        path = self._path(kind, key)
        if self.limit_bytes == 0:
            return None
        try:
            raw = path.read_bytes()
        except OSError:
            return None  # OPTIONAL
        data = _open_entry(raw, key)
        if data is None:
            events.warn("cache", f"dropped a damaged entry: {path}")
            _remove(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of last use; access times are often switched off
        return data

    def put(self, kind: str, key: str, data: Chunk) -> bool:
        """Stores data under a key, replacing what was there; whether it was stored.

        Cost: the data is hashed and written once; at times the cache is listed (BOUNDED).
        """
        path = self._path(kind, key)
        n_bytes = _HEADER.size + memoryview(data).nbytes
        if n_bytes > self.limit_bytes:
            return False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, (_header(key, data), data), durable=False)  # CHECKED finds what a crash tore
        except OSError as error:
            if not self._has_warned:
                events.warn("cache", f"cannot store entries under {self.root}: {error.strerror or error}")
            self._has_warned = True
            return False
        self._written_bytes += n_bytes
        if self._written_bytes * 16 > self.limit_bytes:
            self.trim()
        return True

    def size_bytes(self) -> int:
        """What the entries take together."""
        return sum(size for _, size, _ in self._entries())

    def trim(self) -> None:
        """Removes the entries unused for longest until the rest is within the limit, and what killed writers left."""
        entries = sorted(self._entries())
        total_bytes = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total_bytes <= self.limit_bytes:
                break
            _remove(path)
            total_bytes -= size
        self._written_bytes = 0

    def clear(self) -> None:
        """Removes every entry."""
        for _, _, path in list(self._entries()):
            _remove(path)

    def _path(self, kind: str, key: str) -> Path:
        if not (kind.isascii() and kind.replace("-", "").isalnum()):
            raise InputError(f"{kind!r} cannot name a kind of cache entry", expected="letters, digits and dashes")
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.root / kind / name[:2] / (name + _SUFFIX)

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """Time of last use, size and path of each entry; stale temporary files are removed on the way."""
        oldest_ns = time.time_ns() - int(_STALE_SECONDS * 1e9)
        for folder in _folders(self.root, depth=2):
            for item in _scan(folder):
                with contextlib.suppress(OSError):  # RACES
                    status = item.stat(follow_symlinks=False)
                    if item.name.endswith(_SUFFIX):
                        yield status.st_mtime_ns, status.st_size, Path(item.path)
                    elif item.name.endswith(_TEMPORARY) and status.st_mtime_ns < oldest_ns:
                        _remove(Path(item.path))


def default_cache() -> Cache:
    """The cache that the knobs `cache_dir` and `cache_bytes` describe: one for each, so that a process warns once and
    counts all that it writes (BOUNDED).
    """
    return _cache(knobs.cache_dir, knobs.cache_bytes)


_cache = functools.cache(Cache)


def _header(key: str, data: Chunk) -> bytes:
    return _HEADER.pack(_MAGIC, _FORMAT, memoryview(data).nbytes, _digest(key, data))


def _digest(key: str, data: Chunk) -> bytes:
    """The key is part of it, so that an entry renamed to another key's name is damaged."""
    digest = hashlib.sha256(struct.pack("<Q", len(key.encode())) + key.encode())
    digest.update(data)
    return digest.digest()


def _open_entry(raw: bytes, key: str) -> bytes | None:
    """The data of an entry, or None where anything about it is wrong (CHECKED)."""
    if len(raw) < _HEADER.size:
        return None
    magic, version, n_bytes, digest = _HEADER.unpack_from(raw)
    data = raw[_HEADER.size :]
    if (magic, version, n_bytes) != (_MAGIC, _FORMAT, len(data)) or digest != _digest(key, data):
        return None
    return data


def _folders(root: Path, depth: int) -> Iterator[Path]:
    if depth == 0:
        yield root
        return
    for item in _scan(root):
        if item.is_dir(follow_symlinks=False):
            yield from _folders(Path(item.path), depth - 1)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return list(items)
    except OSError:
        return []


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
