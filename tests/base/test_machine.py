"""Machine facts are read from recorded `/proc` and `/sys` trees of other machines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vivace.base.errors import InputError, UnsupportedError
from vivace.base.machine import ISAS, Machine, best_isa, host, isa, missing_flags, read_machine

V2_FLAGS = "fpu sse sse2 pni ssse3 cx16 sse4_1 sse4_2 popcnt"
V3_FLAGS = f"{V2_FLAGS} avx avx2 fma f16c bmi1 bmi2 abm movbe"
V4_FLAGS = f"{V3_FLAGS} avx512f avx512bw avx512dq avx512vl avx512cd"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def cpuinfo(n_cores: int, flags: str, threads_per_core: int = 1) -> str:
    paragraphs = [
        f"processor\t: {i}\nvendor_id\t: GenuineIntel\nmodel name\t: A CPU: fast\n"
        f"physical id\t: 0\ncore id\t\t: {i // threads_per_core}\nflags\t\t: {flags}\n"
        for i in range(n_cores)
    ]
    return "\n".join(paragraphs)


def cache_files(cpu: int, index: int, level: int, kind: str, size: str, ways: int, shared: str) -> dict[str, str]:
    folder = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
    values = {"level": level, "type": kind, "size": size, "ways_of_associativity": ways, "coherency_line_size": 64}
    return {f"{folder}/{name}": f"{value}\n" for name, value in {**values, "shared_cpu_list": shared}.items()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An eight-core machine without control groups."""
    write(tmp_path, {"proc/cpuinfo": cpuinfo(8, V3_FLAGS), "proc/meminfo": "MemTotal:  16777216 kB\nMemFree: 1 kB\n"})
    return tmp_path


def read(root: Path, n_allowed: int = 8) -> Machine:
    return read_machine(root, affinity=range(n_allowed))


UNIFIED_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
CPU_MOUNT = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
MEMORY_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def test_reads_cpu_and_memory(root: Path) -> None:
    machine = read(root)
    assert machine.vendor == "GenuineIntel"
    assert machine.model == "A CPU: fast"
    assert "avx2" in machine.flags
    assert machine.memory_bytes == machine.usable_memory_bytes == 16 << 30
    assert machine.quota_cores is None
    assert (machine.n_cores, machine.n_compute_threads) == (8, 8)


def test_affinity_limits_cores(root: Path) -> None:
    machine = read_machine(root, affinity={5, 2})
    assert machine.affinity == (2, 5)
    assert machine.n_cores == 2


def test_hyperthreads_share_a_physical_core(root: Path) -> None:
    write(root, {"proc/cpuinfo": cpuinfo(8, V3_FLAGS, threads_per_core=2)})
    machine = read(root)
    assert (machine.n_cores, machine.n_physical_cores, machine.n_compute_threads) == (8, 4, 4)
    assert read_machine(root, affinity={0, 1}).n_compute_threads == 1


def test_cores_that_tell_no_place_count_as_distinct(root: Path) -> None:
    write(root, {"proc/cpuinfo": "processor: 0\nflags: fma\n\nprocessor: 1\nflags: fma\n"})
    assert read(root, n_allowed=2).n_physical_cores == 2


@pytest.mark.parametrize(
    ("text", "quota", "n_cores"),
    [
        ("150000 100000", 1.5, 2),
        ("max 100000", None, 8),
        ("20000 100000", 0.2, 1),
        ("6400000 100000", 64.0, 8),
        ("nonsense", None, 8),
    ],
)
def test_unified_quota(root: Path, text: str, quota: float | None, n_cores: int) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "proc/self/mountinfo": UNIFIED_MOUNT,
            "sys/fs/cgroup/pod/box/cpu.max": text,
        },
    )
    machine = read(root)
    assert machine.quota_cores == quota
    assert machine.n_cores == n_cores


def test_an_ancestor_limits_its_group(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "proc/self/mountinfo": UNIFIED_MOUNT,
            "sys/fs/cgroup/pod/cpu.max": "200000 100000",
            "sys/fs/cgroup/pod/box/cpu.max": "400000 100000",
            "sys/fs/cgroup/pod/memory.max": "max",
            "sys/fs/cgroup/memory.max": str(1 << 30),
        },
    )
    machine = read(root)
    assert machine.n_cores == 2
    assert machine.memory_limit_bytes == machine.usable_memory_bytes == 1 << 30


def test_a_container_sees_its_limit_at_the_mount(root: Path) -> None:
    """With a private mount and the host's path, the group's files lie at the mount point itself."""
    write(
        root,
        {
            "proc/self/cgroup": "0::/host/path/nobody/mounted\n",
            "proc/self/mountinfo": UNIFIED_MOUNT,
            "sys/fs/cgroup/cpu.max": "300000 100000",
        },
    )
    assert read(root).n_cores == 3


def test_a_mount_of_a_subtree(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "0::/docker/abc/inner\n",
            "proc/self/mountinfo": "30 23 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n",
            "sys/fs/cgroup/inner/cpu.max": "100000 100000",
        },
    )
    assert read(root).n_cores == 1


def test_version_1_quota(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "4:memory:/box\n1:cpu,cpuacct:/box\n0::/\n",
            "proc/self/mountinfo": CPU_MOUNT + MEMORY_MOUNT,
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "250000",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": str(2 << 30),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        },
    )
    machine = read(root)
    assert machine.quota_cores == 2.5
    assert machine.n_cores == 3
    assert machine.memory_limit_bytes == 2 << 30


def test_version_1_without_limits(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "4:memory:/\n1:cpu:/\n",
            "proc/self/mountinfo": CPU_MOUNT + MEMORY_MOUNT,
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        },
    )
    machine = read(root)
    assert machine.quota_cores is None
    assert machine.memory_limit_bytes is None


def test_reads_caches(root: Path) -> None:
    write(
        root,
        {
            **cache_files(2, 0, 1, "Data", "48K", 12, "2"),
            **cache_files(2, 1, 1, "Instruction", "32K", 8, "2"),
            **cache_files(2, 2, 2, "Unified", "2048K", 16, "2"),
            **cache_files(2, 3, 3, "Unified", "105M", 15, "0-3,6"),
        },
    )
    machine = read_machine(root, affinity={2, 3})
    assert [(c.level, c.kind) for c in machine.caches] == [
        (1, "data"),
        (1, "instruction"),
        (2, "unified"),
        (3, "unified"),
    ]
    assert [machine.cache_bytes(level) for level in (1, 2, 3)] == [48 << 10, 2 << 20, 105 << 20]
    first, last = machine.data_cache(1), machine.data_cache(3)
    assert first is not None and (first.n_ways, first.line_bytes) == (12, 64)
    assert last is not None and last.n_sharing_cores == 5


def test_conservative_caches_where_nothing_is_told(root: Path) -> None:
    machine = read(root)
    assert machine.caches == ()
    assert machine.data_cache(2) is None
    assert [machine.cache_bytes(level) for level in (1, 2, 3)] == [32 << 10, 256 << 10, 2 << 20]
    assert machine.line_bytes == 64


def test_an_empty_tree_gives_a_machine(tmp_path: Path) -> None:
    machine = read_machine(tmp_path)
    assert machine.n_cores >= 1
    assert machine.memory_bytes > 0
    assert machine.flags == frozenset()


def test_host_is_read_once_and_usable() -> None:
    assert host() is host()
    assert host().n_compute_threads >= 1
    assert host().usable_memory_bytes > 1 << 20


@pytest.mark.parametrize(("flags", "name"), [(V2_FLAGS, "sse"), (V3_FLAGS, "avx2"), (V4_FLAGS, "avx512")])
def test_best_isa_needs_all_its_flags(root: Path, flags: str, name: str) -> None:
    write(root, {"proc/cpuinfo": cpuinfo(1, flags)})
    machine = read(root)
    assert best_isa(machine) is ISAS[name]
    lacking = replace(machine, flags=machine.flags - {flags.split()[-1]})
    assert missing_flags(lacking, ISAS[name]) == (flags.split()[-1],)


def test_no_isa_for_another_architecture(root: Path) -> None:
    write(root, {"proc/cpuinfo": "processor: 0\nFeatures: fp asimd\nCPU implementer: 0x41\n"})
    with pytest.raises(UnsupportedError, match="lacks"):
        best_isa(read(root))


def test_isa_records() -> None:
    widths = [(i.vector_bits, i.n_f32_lanes, i.n_vector_registers, i.has_fma) for i in ISAS.values()]
    assert widths == [(128, 4, 16, False), (256, 8, 16, True), (512, 16, 32, True)]
    assert isa("avx512").feature_text.endswith("-prefer-256-bit")
    assert all(f[0] in "+-" for record in ISAS.values() for f in record.features)
    with pytest.raises(InputError, match="sse, avx2, avx512"):
        isa("mmx")


def test_fingerprint_ignores_what_this_process_was_given(root: Path) -> None:
    machine = read(root)
    same = replace(machine, affinity=(0,), quota_cores=1.0, memory_bytes=1, memory_limit_bytes=1)
    assert machine.fingerprint() == same.fingerprint()
    assert machine.fingerprint() == read(root).fingerprint()


@pytest.mark.parametrize("change", [{"flags": frozenset({"sse"})}, {"model": "Another"}, {"arch": "riscv64"}])
def test_fingerprint_tells_machines_apart(root: Path, change: dict[str, object]) -> None:
    machine = read(root)
    assert replace(machine, **change).fingerprint() != machine.fingerprint()  # type: ignore[arg-type]
