"""Saved engines: one file that loads in milliseconds.

    8 bytes   magic "VIVACE\\0E"
    4 bytes   format version, little-endian
    8 bytes   length of the header
    32 bytes  SHA-256 of the header
    header    JSON: the parts without their bytes, and a table of sections (offset, length, check)
    sections  each at a multiple of 64: of part P `P/code/N` (machine code), `P/constant/N` (weights), `P/foreign/N`,
              `P/model` (ONNX for another provider); `portable` (the whole model as ONNX)

Rules:
* CHECKED: nothing is mapped executable before header and code match their SHA-256. Weights carry block sums (see
  `block_check`), which find damage, not malice: weights cannot run code.
* MAPPED: weights stay in the file, memory-mapped and shared between processes.
* ELSEWHERE: on a CPU that lacks what the code needs the portable model is compiled again.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vivace.base.cache import write_atomic
from vivace.base.dim_notation import from_data, to_data
from vivace.base.dims import Dim
from vivace.base.dtypes import DType
from vivace.base.errors import EngineError, ModelError
from vivace.base.machine import isa
from vivace.base.specs import TensorSpec
from vivace.base.version import ENGINE_MAGIC
from vivace.lower.image import Appended, Batch, ForeignEntry, Image, KernelEntry, LineEntry, Part, StorageEntry

FORMAT = 6
_HEAD = struct.Struct("<8sIQ32s")
_BLOCK = 1 << 22  # bytes per block sum
_MAX_HEADER = 1 << 28


@dataclass(frozen=True, slots=True)
class Program:
    """What is saved of an engine: an engine of ours alone is a program of one part. `placement` are the fields of its
    records."""

    parts: tuple[Part, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    placement: list[list[str]]
    facts: dict[str, Any]


def block_check(data: np.ndarray) -> str:
    """A check of weights at memory speed: SHA-256 over the 64-bit sum and xor of each 4 MiB block and over the odd
    tail."""
    raw = data.reshape(-1).view(np.uint8)
    whole = raw[: raw.size // 8 * 8].view(np.uint64)
    digest = hashlib.sha256(raw[raw.size // 8 * 8 :].tobytes())
    step = _BLOCK // 8
    for at in range(0, whole.size, step):
        block = whole[at : at + step]
        digest.update(struct.pack("<QQQ", at, int(block.sum(dtype=np.uint64)), int(np.bitwise_xor.reduce(block))))
    return digest.hexdigest()


def save(path: Path, program: Program, portable: bytes) -> int:
    """Write an engine atomically; returns its size in bytes. Raises: EngineError where the disk refuses; no part
    stays."""
    sections: dict[str, tuple[bytes | np.ndarray, str]] = {}
    for k, part in enumerate(program.parts):
        if part.image is None:
            sections[f"{k}/model"] = (part.model, hashlib.sha256(part.model).hexdigest())
            continue
        for i, code in enumerate(part.image.objects):
            sections[f"{k}/code/{i}"] = (code, hashlib.sha256(code).hexdigest())
        for i, f in enumerate(part.image.foreign):
            sections[f"{k}/foreign/{i}"] = (f.model, hashlib.sha256(f.model).hexdigest())
        for i, c in enumerate(part.image.constants):
            sections[f"{k}/constant/{i}"] = (c, block_check(np.ascontiguousarray(c)))
    sections["portable"] = (portable, hashlib.sha256(portable).hexdigest())
    table, at = {}, 0
    for name, (data, check) in sections.items():
        size = data.nbytes if isinstance(data, np.ndarray) else len(data)
        table[name] = [at, size, check]
        at = -(-(at + size) // 64) * 64
    header = json.dumps(
        {
            "parts": list(map(_part_data, program.parts)),
            "inputs": list(map(_spec_data, program.inputs)),
            "outputs": list(map(_spec_data, program.outputs)),
            "facts": program.facts,
            "sections": table,
            "flags": sorted({f for p in program.parts if p.image for f in isa(p.image.isa).flags}),
            "placement": program.placement,
            "schema_version": 2,
        }
    ).encode()
    start = _data_start(len(header))

    def chunks() -> Iterator[bytes | memoryview]:
        yield _HEAD.pack(ENGINE_MAGIC, FORMAT, len(header), hashlib.sha256(header).digest())
        yield header
        yield bytes(start - _HEAD.size - len(header))
        for data, _ in sections.values():
            raw = (
                np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
                if isinstance(data, np.ndarray)
                else memoryview(data)
            )
            yield raw
            yield bytes(-raw.nbytes % 64)

    try:
        return write_atomic(path, chunks())
    except OSError as e:
        raise EngineError(
            f"cannot be written: {e.strerror or e}", where=str(path), expected="a folder with room for the engine",
            hint="freeing space, or another folder",
        ) from e  # fmt: skip


def _data_start(header_bytes: int) -> int:
    return -(-(_HEAD.size + header_bytes) // 4096) * 4096


class SavedEngine:
    """An engine file, opened and checked. Raises: EngineError when it is damaged, of another format, or no engine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            n_bytes = path.stat().st_size
            if n_bytes < _HEAD.size:
                raise self._damaged("it is shorter than its head")
            self.data = np.memmap(path, np.uint8, "r").view(np.ndarray)  # whose slices cost a tenth
        except OSError as e:
            raise EngineError(f"cannot be read: {e.strerror}", where=str(path), expected="a saved engine") from e
        magic, version, length, digest = _HEAD.unpack(self.data[: _HEAD.size].tobytes())
        if magic != ENGINE_MAGIC:
            raise EngineError(
                "is no saved engine",
                where=str(path),
                expected="a file written by engine.save",
                hint="vivace.compile for models",
            )
        if version != FORMAT:
            raise EngineError(
                f"has format {version}", where=str(path), expected=f"format {FORMAT}", hint="compiling the model again"
            )
        if length > min(_MAX_HEADER, n_bytes - _HEAD.size):
            raise self._damaged("its header is cut off")
        raw = self.data[_HEAD.size : _HEAD.size + length].tobytes()
        if hashlib.sha256(raw).digest() != digest:
            raise self._damaged("its header does not match its checksum")
        self.header: dict[str, Any] = json.loads(raw)
        self.start = _data_start(length)

    def _damaged(self, why: str) -> EngineError:
        return EngineError(f"is damaged: {why}", where=str(self.path), hint="saving it again from the model")

    def section(self, name: str) -> np.ndarray:
        """The bytes of a section, still mapped, not checked."""
        at, size, _ = self.header["sections"][name]
        if size and self.start + at + size > self.data.size:
            raise self._damaged(f"section {name} is cut off")
        return self.data[self.start + at : self.start + at + size]

    def checked_bytes(self, name: str) -> bytes:
        """A copy of a section that matches its SHA-256."""
        raw = self.section(name).tobytes()
        if hashlib.sha256(raw).hexdigest() != self.header["sections"][name][2]:
            raise self._damaged(f"section {name} does not match its checksum")
        return raw

    def program(self) -> Program:
        """The program, its weights mapped. Raises: EngineError where a check fails."""
        h = self.header
        try:
            parts = tuple(self._part(k, data) for k, data in enumerate(h["parts"]))
            inputs, outputs = tuple(map(_spec, h["inputs"])), tuple(map(_spec, h["outputs"]))
            return Program(parts, inputs, outputs, h["placement"], h["facts"])
        except (KeyError, IndexError, TypeError, ValueError, ModelError) as e:
            raise self._damaged(f"its header does not describe an image ({e})") from e

    def _part(self, k: int, data: dict[str, Any]) -> Part:
        specs = tuple(map(_spec, data["inputs"])), tuple(map(_spec, data["outputs"]))
        if data["image"] is None:
            return Part(data["provider"], *specs, model=self.checked_bytes(f"{k}/model"))
        return Part(data["provider"], *specs, self._image(k, data["image"]))

    def _check(self, part: int, constants: list[np.ndarray]) -> None:
        """Read all weights, in two threads: NumPy sums without holding the interpreter's lock."""
        damaged: list[int] = []
        numbers = iter(range(len(constants)))

        def work() -> None:
            for i in numbers:
                if block_check(constants[i]) != self.header["sections"][f"{part}/constant/{i}"][2]:
                    damaged.append(i)

        beside = threading.Thread(target=work, name="vivace-check")
        beside.start()
        work()
        beside.join()
        if damaged:
            raise self._damaged(f"weights number {min(damaged)} do not match their check")

    def _image(self, part: int, data: dict[str, Any]) -> Image:
        constants = []
        for i, (dtype, shape) in enumerate(data["constants"]):
            constants.append(self.section(f"{part}/constant/{i}").view(DType(dtype).numpy).reshape(shape))
        self._check(part, constants)
        return Image(
            data["isa"],
            tuple(map(_spec, data["inputs"])),
            tuple(map(_spec, data["outputs"])),
            tuple(StorageEntry(k, from_data(n), i, a, b) for k, n, i, a, b in data["storages"]),
            tuple(
                KernelEntry(s, tuple(d), from_data(u), from_data(g), from_data(m)) for s, d, u, g, m in data["kernels"]
            ),
            tuple(
                LineEntry(
                    k, n, tuple((s, from_data(o)) for s, o in ops), t, se, be, la, tuple(no), *map(from_data, counts)
                )
                for k, n, ops, t, se, be, la, no, *counts in data["lines"]
            ),
            tuple(
                ForeignEntry(self.checked_bytes(f"{part}/foreign/{i}"), _places(ins), _places(outs))
                for i, (ins, outs) in enumerate(data["foreign"])
            ),
            tuple(self.checked_bytes(f"{part}/code/{i}") for i in range(data["n_objects"])),
            tuple(constants),
            data["facts"],
            Batch(from_data(data["batch"][0]), data["batch"][1]) if data["batch"] else None,
            tuple(Appended(*a) for a in data["appended"]),
        )


def _part_data(part: Part) -> dict[str, Any]:
    return {
        "provider": part.provider,
        "inputs": list(map(_spec_data, part.inputs)),
        "outputs": list(map(_spec_data, part.outputs)),
        "image": None if part.image is None else _image_data(part.image),
    }


def _image_data(image: Image) -> dict[str, Any]:
    def places(items: tuple[tuple[int, Dim, str, tuple[Dim, ...]], ...]) -> list[object]:
        return [[s, to_data(o), t, [to_data(d) for d in shape]] for s, o, t, shape in items]

    return {
        "batch": [to_data(image.batch.rows), image.batch.each] if image.batch else None,
        "appended": [[a.input, a.output, a.axis, a.room, a.kept] for a in image.appended],
        "isa": image.isa,
        "inputs": list(map(_spec_data, image.inputs)),
        "outputs": list(map(_spec_data, image.outputs)),
        "storages": [[s.kind, to_data(s.n_bytes), s.index, s.first, s.last] for s in image.storages],
        "kernels": [
            [k.symbol, list(k.dims), to_data(k.units), to_data(k.grain), to_data(k.scratch_bytes)]
            for k in image.kernels
        ],
        "lines": [
            [
                line.kind, line.kernel, [[s, to_data(o)] for s, o in line.operands], line.target,
                line.serial, line.beside, line.label,
                list(line.nodes), to_data(line.flops), to_data(line.n_bytes), to_data(line.lacks),
            ]
            for line in image.lines
        ],
        "foreign": [[places(f.inputs), places(f.outputs)] for f in image.foreign],
        "n_objects": len(image.objects),
        "constants": [[str(DType.of(c.dtype)), list(c.shape)] for c in image.constants],
        "facts": image.facts,
    }  # fmt: skip


def _spec_data(s: TensorSpec) -> list[Any]:
    return [s.name, str(s.dtype), [to_data(d) for d in s.shape]]


def _spec(data: list[Any]) -> TensorSpec:
    return TensorSpec(data[0], DType(data[1]), tuple(map(from_data, data[2])))


def _places(items: list[Any]) -> tuple[tuple[int, Dim, str, tuple[Dim, ...]], ...]:
    return tuple((s, from_data(o), t, tuple(map(from_data, shape))) for s, o, t, shape in items)
