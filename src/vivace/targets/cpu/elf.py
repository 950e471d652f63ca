"""Loads relocatable ELF objects of x86-64 into memory: what `compile` made, a process runs without LLVM.

Objects are placed in three regions of one mapping, code (executable), constants (read-only), data (writable), so
that every distance fits 32 bits. Then the places that refer to symbols are filled in, and the pages get their rights.

Rules:
* CLOSED: code calls nothing outside the loaded objects; a symbol that none of them defines is an error.
* EXCLUSIVE: a page is writable or executable, never both.
* ALIVE: addresses of a `Library` are valid as long as the `Library` lives.

Not handled: thread-local data, weak and common symbols, tables for unwinding (generated code throws nothing).

Source: the ELF-64 specification; the System V ABI, AMD64 supplement, 4.4 (relocations).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vivace.base.errors import InternalError

_MAGIC = b"\x7fELF\x02\x01"
_RELOCATABLE, _X86_64 = 1, 62
_PROGRAM, _SYMBOLS, _RELOCATIONS, _ZEROS = 1, 2, 4, 8  # kinds of sections
_WRITE, _ALLOCATE, _EXECUTE = 1, 2, 4
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4

_REGIONS = ((_EXECUTE, _PROT_READ | _PROT_EXEC), (0, _PROT_READ), (_WRITE, _PROT_READ | _PROT_WRITE))

Places = dict[tuple[int, int], int]  # offset in the mapping, by object and section


@dataclass(frozen=True, slots=True)
class _Section:
    kind: int
    flags: int
    offset: int
    n_bytes: int
    link: int
    info: int
    alignment: int


class Library:
    """Loaded machine code."""

    def __init__(self, memory: mmap.mmap | None, addresses: dict[str, int]) -> None:
        self._memory = memory
        self._addresses = addresses

    def address(self, symbol: str) -> int:
        """The address of a function or of global data.

        Raises: InternalError when no loaded object defines the symbol.
        """
        try:
            return self._addresses[symbol]
        except KeyError:
            raise InternalError(
                f"symbol {symbol} is not in the loaded code", expected="the name of a compiled kernel"
            ) from None


def load(objects: Sequence[bytes]) -> Library:
    """Machine code in executable memory. No two objects may define the same symbol.

    Raises: InternalError for bytes that are no such object, for a symbol that is missing or there twice, and where the
    system allows no executable memory.
    """
    tables = [_sections(data) for data in objects]
    places, n_bytes, ends = _lay_out(tables)
    if n_bytes == 0:
        return Library(None, {})
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for i, (data, table) in enumerate(zip(objects, tables, strict=True)):
        for j, section in enumerate(table):
            if (i, j) in places and section.kind == _PROGRAM:
                memory[places[i, j] : places[i, j] + section.n_bytes] = data[
                    section.offset : section.offset + section.n_bytes
                ]
    symbols = [_symbols(data, table) for data, table in zip(objects, tables, strict=True)]
    exported = _define(symbols, places, base)
    for i, data in enumerate(objects):
        starts = {j: place for (k, j), place in places.items() if k == i}
        found = [
            base + starts[s.section] + s.value if s.section in starts else exported.get(s.name) for s in symbols[i]
        ]
        _relocate(data, tables[i], found, starts, symbols[i], memory, base)
    _protect(base, ends)
    return Library(memory, exported)


def _sections(data: bytes) -> list[_Section]:
    try:
        kind, machine = struct.unpack_from("<HH", data, 16)
        if not data.startswith(_MAGIC) or (kind, machine) != (_RELOCATABLE, _X86_64):
            raise struct.error
        (start,) = struct.unpack_from("<Q", data, 40)
        size, count = struct.unpack_from("<HH", data, 58)
        rows = [_SECTION.unpack_from(data, start + k * size) for k in range(count)]
    except struct.error:
        raise InternalError(
            "compiled code cannot be loaded: it is no ELF object", hint="emptying the code cache"
        ) from None
    return [_Section(row[1], row[2], row[4], row[5], row[6], row[7], row[8]) for row in rows]


def _lay_out(tables: Sequence[Sequence[_Section]]) -> tuple[Places, int, list[tuple[int, int, int]]]:
    """Offset of every section that takes memory, bytes in all, and start, end and rights of the regions."""
    places: Places = {}
    at, ends = 0, []
    for region, rights in _REGIONS:
        start = at
        for i, table in enumerate(tables):
            for j, section in enumerate(table):
                is_kept = section.flags & _ALLOCATE and section.kind in (_PROGRAM, _ZEROS)
                if is_kept and section.flags & (_EXECUTE | _WRITE) == region:
                    at = -(-at // max(1, section.alignment)) * max(1, section.alignment)
                    places[i, j] = at
                    at += section.n_bytes
        at = -(-at // mmap.PAGESIZE) * mmap.PAGESIZE
        if at > start:
            ends.append((start, at, rights))
    return places, at, ends


@dataclass(frozen=True, slots=True)
class _Symbol:
    name: str
    section: int
    value: int
    is_local: bool


def _symbols(data: bytes, table: Sequence[_Section]) -> list[_Symbol]:
    found = []
    for section in table:
        if section.kind == _SYMBOLS:  # an object has one such section
            names = table[section.link].offset
            rows = _SYMBOL.iter_unpack(data[section.offset : section.offset + section.n_bytes])
            for i, (name, _, _, index, value, _) in enumerate(rows):
                text = data[names + name : data.index(b"\0", names + name)].decode()
                found.append(_Symbol(text, index, value, is_local=i < section.info))
    return found


def _define(tables: Sequence[Sequence[_Symbol]], places: Places, base: int) -> dict[str, int]:
    """The address of every symbol that an object defines for others."""
    addresses: dict[str, int] = {}
    for i, symbols in enumerate(tables):
        for symbol in symbols:
            if symbol.is_local or (i, symbol.section) not in places:
                continue
            if symbol.name in addresses:
                raise InternalError(f"symbol {symbol.name} is defined twice", expected="one object that defines it")
            addresses[symbol.name] = base + places[i, symbol.section] + symbol.value
    return addresses


def _relocate(
    data: bytes,
    table: Sequence[_Section],
    addresses: Sequence[int | None],
    starts: Mapping[int, int],
    symbols: Sequence[_Symbol],
    memory: mmap.mmap,
    base: int,
) -> None:
    """Fills in the references of one object; `addresses` are those of its symbols, `starts` of its sections."""
    for section in table:
        if section.kind != _RELOCATIONS or section.info not in starts:
            continue
        rows = data[section.offset : section.offset + section.n_bytes]
        for offset, info, addend in _RELOCATION.iter_unpack(rows):
            target = addresses[info >> 32]
            if target is None:  # CLOSED
                name = symbols[info >> 32].name
                raise InternalError(f"generated code calls {name}", expected="code that calls nothing")
            _fill(memory, starts[section.info] + offset, info & 0xFFFFFFFF, target + addend, base)


def _fill(memory: mmap.mmap, at: int, kind: int, target: int, base: int) -> None:
    match kind:
        case 2 | 4:  # R_X86_64_PC32, and PLT32, which is the same without a table of procedures
            struct.pack_into("<i", memory, at, target - (base + at))
        case 1:  # R_X86_64_64
            struct.pack_into("<Q", memory, at, target)
        case 24:  # R_X86_64_PC64
            struct.pack_into("<q", memory, at, target - (base + at))
        case _:
            raise InternalError(
                f"compiled code holds a relocation of kind {kind}", expected="position-independent code"
            )


def _protect(base: int, ends: Sequence[tuple[int, int, int]]) -> None:
    """Gives the pages their rights (EXCLUSIVE)."""
    system = ctypes.CDLL(None, use_errno=True)
    for start, end, rights in ends:
        if system.mprotect(ctypes.c_void_p(base + start), ctypes.c_size_t(end - start), rights):
            reason = os.strerror(ctypes.get_errno())
            raise InternalError(f"the system allows no executable memory: {reason}", hint="a policy that allows it")
