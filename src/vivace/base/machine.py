"""Facts about the machine, as data: instruction sets, caches, usable cores, memory.

Everything is read from the files that Linux publishes under `/proc` and `/sys`; `read_machine(root)` reads the same
files under another folder, so that a recorded machine can be studied anywhere. What a file does not say gets a
conservative value, never an error.

Rules that the code cites:
    QUOTA     a container's CPU quota of 1.5 cores gives work to 2 threads: round up, never below 1.
    FLAGS     the CPU's name can be older than its features (virtual machines): only flags are trusted.
    IDENTITY  a fingerprint holds what generated code and its tuning depend on, not how many cores or how much memory
              this process was given.

Not handled: caches and quotas of systems other than Linux (they get the conservative values), mixes of big and
little cores, NUMA distances.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, cast

from vivace.base.control_groups import cpu_quota, memory_limit, number_in, text_of
from vivace.base.errors import InputError, UnsupportedError

CacheKind = Literal["data", "instruction", "unified"]

# The smallest caches of x86-64 server and desktop CPUs of the last ten years: tiles made for them fit everywhere.
_DEFAULT_CACHE_BYTES = {1: 32 << 10, 2: 256 << 10, 3: 2 << 20}


@dataclass(frozen=True, slots=True)
class CacheLevel:
    """One cache as the first usable core sees it; 0 stands for what the system does not tell."""

    level: int
    kind: CacheKind
    size_bytes: int
    n_ways: int
    line_bytes: int
    n_sharing_cores: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process can use of the hardware."""

    arch: str
    vendor: str
    model: str
    flags: frozenset[str]
    caches: tuple[CacheLevel, ...]
    affinity: tuple[int, ...]
    n_physical_cores: int
    quota_cores: float | None
    memory_bytes: int
    memory_limit_bytes: int | None

    @property
    def n_cores(self) -> int:
        """Logical cores that this process may keep busy: its affinity mask within its CPU quota."""
        n_allowed = max(1, len(self.affinity))
        return n_allowed if self.quota_cores is None else min(n_allowed, max(1, math.ceil(self.quota_cores)))  # QUOTA

    @property
    def n_compute_threads(self) -> int:
        """Threads that arithmetic profits from: `n_cores`, but one per physical core."""
        return max(1, min(self.n_cores, self.n_physical_cores))

    @property
    def usable_memory_bytes(self) -> int:
        """Memory that this process may hold: the machine's, within the container's limit."""
        return self.memory_bytes if self.memory_limit_bytes is None else min(self.memory_bytes, self.memory_limit_bytes)

    def data_cache(self, level: int) -> CacheLevel | None:
        """The data or unified cache of a level, or None where the machine has or tells none."""
        return next((c for c in self.caches if c.level == level and c.kind != "instruction"), None)

    def cache_bytes(self, level: int) -> int:
        """Size of a data cache; a conservative one where the machine does not tell."""
        found = self.data_cache(level)
        return found.size_bytes if found and found.size_bytes else _DEFAULT_CACHE_BYTES.get(level, 0)

    @property
    def line_bytes(self) -> int:
        """Size of a cache line."""
        found = self.data_cache(1)
        return found.line_bytes if found and found.line_bytes else 64

    def fingerprint(self) -> str:
        """A short stable text that is equal on machines that can share generated code and its tuning (IDENTITY)."""
        caches = [(c.level, c.kind, c.size_bytes, c.n_ways, c.line_bytes, c.n_sharing_cores) for c in self.caches]
        facts = repr((self.arch, self.vendor, self.model, sorted(self.flags), caches))
        return f"{self.arch}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set that kernels are generated for.

    `features` are in LLVM's notation; `flags` are the names by which `/proc/cpuinfo` shows the same. `name` is the
    level, followed by the extras it was given: `avx512+avx512_bf16+avx512_vnni`.
    """

    name: str
    vector_bits: int
    n_vector_registers: int
    features: tuple[str, ...]
    flags: frozenset[str]

    @property
    def level(self) -> str:
        """The level of the x86-64 psABI without extras: a name of `ISAS`."""
        return self.name.partition("+")[0]

    def has(self, flag: str) -> bool:
        """Whether kernels may use what this CPU flag stands for (`avx512_vnni`, `amx_int8`, ...)."""
        return flag in self.flags

    @property
    def n_f32_lanes(self) -> int:
        """Numbers of type f32 in one vector register."""
        return self.vector_bits // 32

    @property
    def has_fma(self) -> bool:
        """Whether multiply-add is one instruction with one rounding."""
        return "+fma" in self.features

    @property
    def feature_text(self) -> str:
        """The features as LLVM's target machine takes them."""
        return ",".join(self.features)


# Source: the levels v2, v3 and v4 of the x86-64 psABI. NumPy's own wheels need v2, so nothing runs below it.
# Each table maps LLVM's name of a feature to the kernel's.
_SSE = {"sse3": "pni", "ssse3": "ssse3", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "popcnt": "popcnt", "cx16": "cx16"}
_AVX2 = _SSE | {
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "lzcnt": "abm",
    "movbe": "movbe",
}
_AVX512 = _AVX2 | {name: name for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd")}


def _isa(name: str, vector_bits: int, n_registers: int, features: dict[str, str], *options: str) -> Isa:
    return Isa(name, vector_bits, n_registers, (*(f"+{f}" for f in features), *options), frozenset(features.values()))


# From the plainest to the widest. Without `-prefer-256-bit` LLVM splits 512-bit vectors for some CPU names.
ISAS: dict[str, Isa] = {
    "sse": _isa("sse", 128, 16, _SSE),
    "avx2": _isa("avx2", 256, 16, _AVX2),
    "avx512": _isa("avx512", 512, 32, _AVX512, "-prefer-256-bit"),
}


# What CPUs of one level have or lack; each table maps the kernel's name of a flag to LLVM's of the feature.
_EXTRAS: dict[str, dict[str, str]] = {
    "sse": {},
    "avx2": {"avx_vnni": "avxvnni"},
    "avx512": {"avx512_bf16": "avx512bf16", "avx512_vnni": "avx512vnni", "avx512vbmi": "avx512vbmi"},
}
# Tiles need the kernel's permission besides (`targets/cpu/amx.py`), so that flags alone never choose them.
AMX_FLAGS = {"amx_bf16": "amx-bf16", "amx_int8": "amx-int8", "amx_tile": "amx-tile"}


def with_extras(level: Isa, flags: Collection[str]) -> Isa:
    """The instruction set with extras of its level, named by CPU flags.

    Raises: InputError for a flag that is no extra of the level.
    """
    known = _EXTRAS[level.level] | (AMX_FLAGS if level.level == "avx512" else {})
    if unknown := sorted(set(flags) - known.keys()):
        raise InputError(
            f"{unknown[0]!r} is no extra of {level.level}", where="instruction set", expected=", ".join(known) or "none"
        )
    added = sorted(set(flags) - level.flags)
    if not added:
        return level
    extras = sorted({*added, *(level.flags & known.keys())})
    features = (*level.features, *(f"+{known[f]}" for f in added))
    return replace(
        level, name="+".join([level.level, *extras]), features=features, flags=level.flags | frozenset(added)
    )


def without_amx(wide: Isa) -> Isa:
    """The instruction set without tiles."""
    if not wide.flags & AMX_FLAGS.keys():
        return wide
    extras = wide.flags - ISAS[wide.level].flags - AMX_FLAGS.keys()
    return with_extras(ISAS[wide.level], extras)


def isa(name: str) -> Isa:
    """The instruction set of a name: a level, or a level with extras as `Isa.name` spells it.

    Raises: InputError for an unknown name.
    """
    level, *extras = name.split("+")
    if level not in ISAS:
        raise InputError(f"unknown instruction set {name!r}", expected=f"one of {', '.join(ISAS)}")
    return with_extras(ISAS[level], extras)


def missing_flags(machine: Machine, wanted: Isa) -> tuple[str, ...]:
    """CPU flags that `wanted` needs and the machine lacks; empty where its code can run."""
    return tuple(sorted(wanted.flags - machine.flags))  # rule FLAGS


def best_isa(machine: Machine) -> Isa:
    """The widest instruction set whose code runs on the machine, with the extras that its flags show.

    Raises: UnsupportedError where none does.
    """
    for candidate in reversed(ISAS.values()):
        if not missing_flags(machine, candidate):
            return with_extras(candidate, _EXTRAS[candidate.name].keys() & machine.flags)
    lacking = ", ".join(missing_flags(machine, ISAS["sse"]))
    raise UnsupportedError(
        f"no code can be generated for this {machine.arch} CPU (it lacks {lacking})",
        expected="an x86-64 CPU with SSE4.2",
        hint="providers=('onnxruntime',)",
    )


@cache
def host() -> Machine:
    """The machine that this process runs on, read once."""
    return read_machine()


def read_machine(root: Path = Path("/"), affinity: Collection[int] | None = None) -> Machine:
    """Reads the facts from the `proc` and `sys` folders under `root`.

    `affinity` lists the logical cores that the process may use; by default the ones of this process.
    """
    cpus = list(_cpu_records(root))
    allowed = tuple(sorted(affinity if affinity is not None else _own_affinity()))
    first = cpus[0] if cpus else {}
    total_bytes = _memory_bytes(root)
    limit_bytes = memory_limit(root)
    return Machine(
        arch=platform.machine() or "unknown",
        vendor=first.get("vendor_id", first.get("CPU implementer", "unknown")),
        model=first.get("model name") or platform.processor() or "unknown",
        flags=frozenset(first.get("flags", first.get("Features", "")).split()),
        caches=_caches(root, allowed[0] if allowed else 0),
        affinity=allowed,
        n_physical_cores=_n_physical_cores(cpus, allowed),
        quota_cores=cpu_quota(root),
        memory_bytes=total_bytes,
        # Version 1 writes "no limit" as a number near 2**63.
        memory_limit_bytes=None if limit_bytes is None or limit_bytes >= total_bytes else limit_bytes,
    )


def _own_affinity() -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _cpu_records(root: Path) -> Iterator[dict[str, str]]:
    """The paragraphs of `/proc/cpuinfo`, one per logical core."""
    for paragraph in text_of(root / "proc/cpuinfo").split("\n\n"):
        pairs = (line.partition(":") for line in paragraph.splitlines() if ":" in line)
        record = {key.strip(): value.strip() for key, _, value in pairs}
        if record:
            yield record


def _n_physical_cores(cpus: list[dict[str, str]], allowed: tuple[int, ...]) -> int:
    """Distinct physical cores behind the allowed logical ones; all of them distinct where nothing is told."""
    place = {cpu.get("processor"): (cpu.get("physical id"), cpu.get("core id")) for cpu in cpus}
    places = [place.get(str(number), (None, None)) for number in allowed]
    if any(core is None for _, core in places):
        return max(1, len(allowed))
    return max(1, len(set(places)))


def _memory_bytes(root: Path) -> int:
    for line in text_of(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) << 10
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 4 << 30


def _caches(root: Path, cpu: int) -> tuple[CacheLevel, ...]:
    found = []
    for folder in sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")):
        level, kind = number_in(folder / "level"), text_of(folder / "type").strip().lower()
        if level is None or kind not in ("data", "instruction", "unified"):
            continue
        found.append(
            CacheLevel(
                level=level,
                kind=cast(CacheKind, kind),
                size_bytes=_size(text_of(folder / "size").strip()),
                n_ways=number_in(folder / "ways_of_associativity") or 0,
                line_bytes=number_in(folder / "coherency_line_size") or 0,
                n_sharing_cores=_count_list(text_of(folder / "shared_cpu_list").strip()),
            )
        )
    return tuple(sorted(found, key=lambda c: (c.level, c.kind)))


def _size(text: str) -> int:
    """`32K` in bytes; 0 for what is no size."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    digits = text.rstrip("KMG")
    return int(digits) * factor if digits.isdigit() else 0


def _count_list(text: str) -> int:
    """How many numbers `0-3,8` stands for; 1 for an empty list."""
    n = 0
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        n += int(last or first) - int(first) + 1
    return max(1, n)
