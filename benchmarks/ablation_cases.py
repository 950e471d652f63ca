"""What `benchmarks/ablations.py` leaves out, and the models whose lines show it.

A *fusion* is left out by names in `disable=`. A *decision* of the cost model is held against one setting for all
products and convolutions of a model that are neither Winograd's nor attention (`lower/choices.py`). What has no name, a
recurrent layer or a tree ensemble as one kernel, is held against the same function written out (`spelled_out.py`), and
a cache in place against the same engine with a cache that it writes anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from benchmarks import spelled_out
from benchmarks.models import inputs, materialise
from benchmarks.models.blockwise import materialise_blockwise
from benchmarks.models.quantized import materialise_quantized

from vivace.lower.choices import DIRECT, Choice

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Case:
    """A model, so many times its usual batch, in a precision: `int8` is the quantized (QDQ) version, `int4` that with
    weights in blocks."""

    model: str
    batch: int = 1
    precision: str = "f32"

    def __str__(self) -> str:
        text = self.model + (f" x{self.batch}" if self.batch > 1 else "")
        return text if self.precision == "f32" else f"{text} {self.precision}"

    @property
    def arithmetic(self) -> str:
        """What the model is compiled with as `precision`."""
        return "bf16" if self.precision == "bf16" else "f32"

    def load(self) -> tuple[object, Arrays]:
        """The model, a path or in memory, and its inputs. Raises: ModelUnavailable."""
        if made := MADE.get(self.model):
            return made()
        arrays = {k: np.repeat(v, self.batch, axis=0) if self.batch > 1 else v for k, v in inputs(self.model).items()}
        match self.precision:
            case "int8":
                return materialise_quantized(self.model, "qdq"), arrays
            case "int4":
                return materialise_blockwise("int4"), arrays
        return materialise(self.model), arrays


@dataclass(frozen=True, slots=True)
class Ablation:
    """What something does, the names that leave it out, and where."""

    about: str
    without: tuple[str, ...]
    cases: tuple[Case, ...]


RESNET, MOBILENET, EFFICIENTNET = Case("resnet50"), Case("mobilenetv2"), Case("efficientnet-lite0")
DET, REC, CLS, PITCH = Case("ppocrv4-det"), Case("ppocrv4-rec"), Case("ppocr-cls"), Case("basic-pitch")
BERT, MINILM, VIT, SMOLLM = Case("bert-base"), Case("minilm-l6"), Case("vit-b"), Case("smollm2-135m")
WHISPER = Case("whisper-tiny-en-encoder")
RESNET_INT8, BERT_INT8 = Case("resnet50", 1, "int8"), Case("bert-base", 1, "int8")
REC_INT8, CLS_INT8 = Case("ppocrv4-rec", 1, "int8"), Case("ppocr-cls", 1, "int8")
_NORMS = ("fuse_layer_norm", "fuse_rms_norm", "scale_into_norm", "bias_into_norm")
_ATTENTION = ("fuse_attention", "group_queries", "scale_into_attention", "causal_mask")
_ACTIVATIONS = ("fuse_gelu", "fuse_gelu_halves", "fuse_gelu_tanh", "fuse_sigmoid", "fuse_silu", "fuse_hard_swish",
                "fuse_hard_sigmoid", "fuse_affine_hard_sigmoid")  # fmt: skip
_WEIGHTS = ("scale_into_conv", "bias_into_conv", "scale_before_conv", "bias_before_conv", "scale_into_matmul",
            "scale_past_bias", "scale_before_matmul")  # fmt: skip
ABLATIONS: dict[str, Ablation] = {
    "winograd": Ablation("convolutions of 3 taps with fewer products", ("winograd",), (RESNET, DET)),
    "epilogues": Ablation("element-wise nodes on results in registers", ("epilogues",), (RESNET, BERT, REC)),
    "requantized": Ablation("sums of bytes scaled and rounded in registers", ("epilogues",), (RESNET_INT8, BERT_INT8)),
    "trees": Ablation("element-wise nodes where they are read", ("trees",), (Case("silero-vad"),)),
    "placement": Ablation("operands of concat and pad written in place", ("placement",), (DET, PITCH)),
    "strips": Ablation("depthwise convolutions with their neighbours", ("strips",), (MOBILENET, EFFICIENTNET)),
    "bands": Ablation("depthwise convolutions over low images without rows of padding", ("bands",), (CLS, REC)),
    "row_blocks": Ablation(
        "both halves of an MLP by blocks of rows", ("row_blocks",), (WHISPER, Case("minilm-l6", 16, "bf16"))
    ),
    "in_place": Ablation("sums written over a residual", ("in_place",), (RESNET, MINILM)),
    "slices": Ablation(
        "large batches a few rows at a time", ("slices",), (Case("resnet50", 8), Case("resnet50", 8, "bf16"))
    ),
    "attention": Ablation("attention without scores in memory", _ATTENTION, (BERT, VIT, WHISPER, SMOLLM)),
    "grouped_queries": Ablation("keys and values read once for a group of queries", ("group_queries",), (SMOLLM,)),
    "windowed_attention": Ablation("the same, with a mask of a sliding window", _ATTENTION, (Case("windowed"),)),
    "norms": Ablation("normalizations as one op: fewer kernels, statistics in f32 in bf16", _NORMS, (REC, SMOLLM)),
    "activations": Ablation("activations as one function", _ACTIVATIONS, (BERT, REC)),
    "tables": Ablation("functions of bytes as tables of 256", ("tabulate", "join_tables"), (CLS_INT8, REC_INT8)),
    "integers": Ablation(
        "quantized products in integers", ("conv_in_integers", "matmul_in_integers"), (RESNET_INT8, BERT_INT8)
    ),
    "weights": Ablation("scales and biases in weights", _WEIGHTS, (Case("mobilenetv2-bn"), Case("resnet50-bn"))),
    "squeeze_excite": Ablation("gates in the filters after them", ("gate_into_weights",), (CLS, Case("ppocr-cls", 4))),
    "channels_last": Ablation("channels side by side", ("put_channels_last",), (RESNET, CLS)),
    "gathered_rows": Ablation(
        "rows side by side where tile registers would be half empty", ("gathered_rows",),
        (Case("resnet50", 1, "bf16"), RESNET_INT8),
    ),
    "shared_rows": Ablation(
        "digits of rows once for all products", ("shared_rows",), (Case("smollm2-135m", 1, "int4"),)
    ),
    "embeddings": Ablation("gathers of embeddings added as they are read", ("epilogues",), (Case("embeddings"),)),
    "gather_one_hot": Ablation("rows of weights for products of one-hot rows", ("gather_one_hot",), (Case("magika"),)),
    "argmax_head": Ablation("the best class without softmax", ("argmax_before_softmax",), (Case("text_head"),)),
}  # fmt: skip
MADE: dict[str, Callable[[], tuple[onnx.ModelProto, Arrays]]] = {
    "text_head": spelled_out.text_head,
    "embeddings": spelled_out.embeddings,
    "windowed": spelled_out.windowed_attention,
}
SPELLED_OUT: dict[str, Callable[[], tuple[onnx.ModelProto, onnx.ModelProto, Arrays]]] = {
    "lstm": spelled_out.spelled_lstm,
    "gru": spelled_out.spelled_gru,
    "rnn": spelled_out.spelled_rnn,
    "tree_ensemble": spelled_out.spelled_forest,
}
CACHE = "cache_in_place"
NEUTRAL = Choice(way=DIRECT)  # as the cost model says, but that rows are kept to no thread (`lower/tile.py`)
SETTLED = (RESNET, MINILM)
# One setting for all products in place of the cost model's decision for each.
DECISIONS: dict[str, tuple[str, Choice]] = {
    "units": ("one tile of one panel at a time", Choice(tiles=1, panels=1)),
    "unit_order": ("blocks of panels outside, of rows inside", Choice(rows_outer=False)),
    "tile_order": ("panels outside, tiles inside a unit", Choice(tiles_outside=False)),
    "rows_kept": ("no rows kept to a thread", NEUTRAL),
    "tile_rows": ("tiles of 6 rows", Choice(rows=6)),
    "panel_lanes": ("panels of one vector", Choice(lanes=16)),
    "staged_rows": ("rows of A read where they are", Choice(stage_a=False)),
    "passes": ("all steps of a sum at once", Choice(k_block=0)),
}
WHAT: dict[str, str] = {
    **{name: ablation.about for name, ablation in ABLATIONS.items()},
    "lstm": "an LSTM as one kernel, against a Scan",
    "gru": "a GRU as one kernel, against a Scan",
    "rnn": "an RNN as one kernel, against a Scan",
    "tree_ensemble": "a forest as one kernel, against gathers level by level",
    CACHE: "a decoder's cache of 1023 tokens in place, against written anew",
    **{name: f"chosen by kernel, against {setting}" for name, (setting, _) in DECISIONS.items()},
}
