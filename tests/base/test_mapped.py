"""Pages of mapped arrays can be given back and are read again."""

from pathlib import Path

import numpy as np

from vivace.base.mapped import forget


def resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssFile"].split()[0]) * 1024


def test_mapped_pages_leave_memory_and_come_back(tmp_path: Path) -> None:
    n = 1 << 22
    path = tmp_path / "weights"
    np.arange(n, dtype=np.float32).tofile(path)
    array = np.memmap(path, np.float32, "r")[1000:].reshape(8, -1)
    total = float(array.sum(dtype=np.float64))
    before = resident_bytes()
    assert forget(array)
    assert before - resident_bytes() > array.nbytes * 0.9
    assert float(array.sum(dtype=np.float64)) == total


def test_other_arrays_are_left_alone() -> None:
    assert not forget(np.ones(10))
    assert not forget(np.frombuffer(b"12345678", np.uint8))
