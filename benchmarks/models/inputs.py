"""Real or realistic inputs for each model: one function per kind, `(shape, seed) -> {input name: array}`.

`shape` is the shape of the model's main input as the case names it; for the decoder it is (batch, new tokens, past
tokens). The same shape and seed give the same arrays. What cannot be had here (no Pillow, say) raises
ModelUnavailable.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from benchmarks.models import passages, pictures, sounds, train_tabular
from benchmarks.models.fetch import ModelUnavailable, cache_dir, write_atomically
from numpy.typing import NDArray

Inputs = dict[str, NDArray[np.generic]]
Generator = Callable[[tuple[int, ...], int], Inputs]

SMOLLM2_LAYERS, SMOLLM2_HEADS, SMOLLM2_HEAD_DIM = 30, 3, 64
MAGIKA_PADDING = 256
MAGIKA_BLOCK = 1024
SILERO_CONTEXT = {16_000: 64, 8_000: 32}


def detector(shape: tuple[int, ...], seed: int) -> Inputs:
    return {"x": pictures.page_batch(shape, seed)}


def recogniser(shape: tuple[int, ...], seed: int) -> Inputs:
    return {"x": pictures.line_batch(shape, seed)}


def angle_classifier(shape: tuple[int, ...], seed: int) -> Inputs:
    return {"x": pictures.line_batch(shape, seed, turn_every_second=True)}


def photographs(shape: tuple[int, ...], seed: int) -> Inputs:
    return {"pixel_values": pictures.photograph_batch(shape, seed)}


def photographs_lite(shape: tuple[int, ...], seed: int) -> Inputs:
    return {"inputs": pictures.photograph_batch_lite(shape, seed)}


def silero(shape: tuple[int, ...], seed: int) -> Inputs:
    """A window of speech with its context of 64 samples (32 at 8 kHz); seed 0 starts with an empty state."""
    rate_hz = next(rate for rate, context in SILERO_CONTEXT.items() if shape[1] == 9 * context)
    state = np.zeros((2, shape[0], 128), np.float32)
    if seed:
        state = np.tanh(np.random.default_rng(seed).normal(0, 0.7, state.shape)).astype(np.float32)
    return {"input": sounds.speech_windows(shape, rate_hz, seed), "state": state, "sr": np.array(rate_hz, np.int64)}


def magika(shape: tuple[int, ...], seed: int) -> Inputs:
    """First and last 1024 bytes of files of several kinds, stripped of white space at the ends, padded with 256."""
    files = _files()
    rows = [_magika_features(files[(seed + i) % len(files)]) for i in range(shape[0])]
    return {"bytes": np.stack(rows)}


def _magika_features(content: bytes) -> NDArray[np.int32]:
    row = np.full(2 * MAGIKA_BLOCK, MAGIKA_PADDING, np.int32)
    first = content[:4096].lstrip()[:MAGIKA_BLOCK]
    last = content[-4096:].rstrip()[-MAGIKA_BLOCK:]
    row[: len(first)] = np.frombuffer(first, np.uint8)
    row[2 * MAGIKA_BLOCK - len(last) :] = np.frombuffer(last, np.uint8)
    return row


def _files() -> list[bytes]:
    """Python source, JSON, a zip archive, plain text, CSV and a PNG, made here so that they are the same everywhere."""
    text = passages.PASSAGE.encode()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr(zipfile.ZipInfo("passage.txt"), text)
    record = {"sentences": passages.SENTENCES, "tokens": passages.PASSAGE_WORDPIECES}
    table = "id,tokens,text\n" + "".join(f'{i},{len(s.split())},"{s}"\n' for i, s in enumerate(passages.SENTENCES))
    header = struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0)  # 16x16 pixels, 8 bits of grey
    png = b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", zlib.compress(text))
    source = Path(__file__).with_name("sounds.py").read_bytes()
    return [source, json.dumps(record, indent=2).encode(), archive.getvalue(), text, table.encode(), png]


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def basic_pitch(shape: tuple[int, ...], seed: int) -> Inputs:
    return {"serving_default_input_2:0": sounds.note_windows(shape, 22_050, seed)}


def digits(shape: tuple[int, ...], seed: int) -> Inputs:
    """Held-out rows of scikit-learn's digits, written when the models were trained."""
    path = cache_dir() / train_tabular.PIXELS_FILE
    if not path.exists():
        raise ModelUnavailable(
            f"{path} is missing; it is written by: python -m benchmarks.models get tabular-forest --again"
        )
    pixels: NDArray[np.float32] = np.load(path, allow_pickle=False)
    return {"X": np.take(pixels, range(seed * shape[0], (seed + 1) * shape[0]), axis=0, mode="wrap")}


def sentences(shape: tuple[int, ...], seed: int) -> Inputs:
    """One row is a piece of the passage that fills the window; several are sentences of different lengths, padded."""
    n, length = shape
    ids = np.zeros(shape, np.int64)
    mask = np.zeros(shape, np.int64)
    for i in range(n):
        row = (
            _filling_tokens(length, seed)
            if n == 1
            else passages.SENTENCE_WORDPIECES[(seed + i) % len(passages.SENTENCE_WORDPIECES)]
        )
        kept = min(len(row), length)
        ids[i, :kept], mask[i, :kept] = row[:kept], 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros(shape, np.int64)}


def _filling_tokens(length: int, seed: int) -> tuple[int, ...]:
    words = np.roll(np.array(passages.PASSAGE_WORDPIECES[1:-1]), -7 * seed)
    return (101, *np.resize(words, length - 2).tolist(), 102)


def whisper(shape: tuple[int, ...], seed: int) -> Inputs:
    return {"input_features": sounds.whisper_features(shape, seed)}


def decoder(shape: tuple[int, ...], seed: int) -> Inputs:
    """New tokens with an empty cache, or with what reading the tokens before them left (by onnxruntime, once)."""
    n, n_new, n_past = shape
    stream = np.roll(np.array(passages.PASSAGE_SMOLLM2_TOKENS), -7 * seed)
    rows = np.stack([np.resize(np.roll(stream, -i), n_past + n_new) for i in range(n)])
    inputs = _decoder_step(rows[:, n_past:], _empty_cache(n))
    if n_past == 0:
        return inputs
    return _decoder_step(rows[:, n_past:], _cache_after(rows[:, :n_past]))


def _cache_names() -> list[str]:
    return [f"past_key_values.{i}.{part}" for i in range(SMOLLM2_LAYERS) for part in ("key", "value")]


def _empty_cache(n: int) -> Inputs:
    return {name: np.zeros((n, SMOLLM2_HEADS, 0, SMOLLM2_HEAD_DIM), np.float32) for name in _cache_names()}


def _decoder_step(tokens: NDArray[np.int64], cache: Inputs) -> Inputs:
    n, n_new = tokens.shape
    n_past = next(iter(cache.values())).shape[2]
    positions = np.broadcast_to(np.arange(n_past, n_past + n_new, dtype=np.int64), (n, n_new)).copy()
    mask = np.ones((n, n_past + n_new), np.int64)
    return {"input_ids": tokens.astype(np.int64), "attention_mask": mask, "position_ids": positions, **cache}


def _cache_after(tokens: NDArray[np.int64]) -> Inputs:
    n, n_past = tokens.shape
    path = cache_dir() / "inputs" / f"smollm2-135m-{n}x{n_past}-{zlib.crc32(tokens.tobytes()):08x}.npz"
    if not path.exists():
        present = _run_decoder(_decoder_step(tokens, _empty_cache(n)))
        cache = dict(zip(_cache_names(), present, strict=True))
        write_atomically(path, lambda unfinished: np.savez(unfinished, allow_pickle=False, **cache))
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in _cache_names()}


def _run_decoder(inputs: Inputs) -> list[NDArray[np.generic]]:
    model = cache_dir() / "smollm2-135m.onnx"
    if not model.exists():
        raise ModelUnavailable(f"{model} is missing; make it with: python -m benchmarks.models get smollm2-135m")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    wanted = [name.replace("past_key_values", "present") for name in _cache_names()]
    present: list[NDArray[np.generic]] = session.run(wanted, inputs)
    return present
