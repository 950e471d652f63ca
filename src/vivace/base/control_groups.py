"""What a container allows: CPU quota and memory limit of the process's control groups, of both versions, from the files
that Linux publishes under a root.

Rule CLIMB: a control group is limited by each of its ancestors: take the least.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def cpu_quota(root: Path) -> float | None:
    """Cores that the process may use on average, or None where that is not limited (CLIMB)."""
    return min((q for folder in _group_folders(root, "cpu") if (q := _quota(folder)) is not None), default=None)


def memory_limit(root: Path) -> int | None:
    """Bytes that the process may have, or None where that is not limited (CLIMB)."""
    return min((n for folder in _group_folders(root, "memory") if (n := _limit(folder)) is not None), default=None)


def _group_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the process's control group, from its own up to the mount, for both versions."""
    paths = _group_paths(root, controller)
    for mount, mount_root, is_unified in _group_mounts(root, controller):
        path = paths.get("" if is_unified else controller, "/")
        # In a container the path is often the host's, and is not seen below the mount: then the mount is the group.
        inside = path[len(mount_root.rstrip("/")) :] if path.startswith(mount_root) else path
        top = root / mount.lstrip("/")
        folder = top / inside.strip("/")
        yield folder
        for parent in folder.parents:
            if not parent.is_relative_to(top):
                break
            yield parent


def _group_paths(root: Path, controller: str) -> dict[str, str]:
    """The process's group by controller; the key of the unified hierarchy is empty."""
    paths = {}
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            paths[controller if controllers else ""] = path
    return paths


def _group_mounts(root: Path, controller: str) -> Iterator[tuple[str, str, bool]]:
    """Mount point, root within the hierarchy, and whether it is the unified one."""
    for line in text_of(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        mount, source = left.split(), right.split()
        if source[:1] == ["cgroup2"]:
            yield mount[4], mount[3], True
        elif source[:1] == ["cgroup"] and controller in source[-1].split(","):
            yield mount[4], mount[3], False


def _quota(group: Path) -> float | None:
    """Cores that one group may use on average."""
    unified = text_of(group / "cpu.max").split()
    if len(unified) == 2 and unified[0].isdigit():
        return int(unified[0]) / int(unified[1])
    quota_us, period_us = number_in(group / "cpu.cfs_quota_us"), number_in(group / "cpu.cfs_period_us")
    if quota_us is not None and quota_us > 0 and period_us:
        return quota_us / period_us
    return None


def _limit(group: Path) -> int | None:
    unified = number_in(group / "memory.max")
    return unified if unified is not None else number_in(group / "memory.limit_in_bytes")


def number_in(path: Path) -> int | None:
    """The whole number that a file holds, or None."""
    text = text_of(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def text_of(path: Path) -> str:
    """What a file holds; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
