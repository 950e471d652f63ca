"""The real models that tests, benchmarks and the demo use: where each comes from, what it needs, which inputs to try.

A model without an extra is an ONNX file inside a wheel (`member`). The others are trained or exported once, see
`making.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from benchmarks.models import inputs as generators
from benchmarks.models import sources
from benchmarks.models.fetch import Member, Wheel


class Extra(StrEnum):
    """What making a model needs beside the core: nothing, scikit-learn with skl2onnx, or the extra `torch`."""

    NONE = "none"
    TABULAR = "sklearn"
    TORCH = "torch"


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs at one shape; `shape` is that of the main input, for the decoder (batch, new tokens, past tokens)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """One model. `cases[0]` is what benchmarks time; `member` is the ONNX file itself where no extra is needed."""

    name: str
    kind: str
    licence: str
    wheels: tuple[Wheel, ...]
    generate: generators.Generator
    cases: tuple[Case, ...]
    extra: Extra = Extra.TORCH
    member: Member | None = None
    recipe: int = 1
    variant_of: str | None = None

    @property
    def file_name(self) -> str:
        return f"{self.name}.onnx"

    def case(self, name: str) -> Case:
        found = next((case for case in self.cases if case.name == name), None)
        if found is None:
            raise KeyError(
                f"{self.name} has no case {name!r}; its cases: {', '.join(case.name for case in self.cases)}"
            )
        return found


def _shapes(*shapes: tuple[int, ...]) -> tuple[Case, ...]:
    return tuple(Case("x".join(map(str, shape)), shape) for shape in shapes)


_IMAGES = _shapes((1, 3, 224, 224), (3, 3, 224, 224))
_TOKENS = _shapes((1, 128), (1, 16), (4, 64))
_RANDOM = "random weights (architecture: Apache-2.0, transformers)"
_SILERO_CASES = _shapes((1, 576), (3, 576), (1, 288))
_SMOLLM2_CASES = (
    Case("decode-past127", (1, 1, 127)),
    Case("prefill-64", (1, 64, 0)),
    Case("append-5-past16-batch2", (2, 5, 16)),
)

MODELS: tuple[Model, ...] = (
    Model(
        "ppocrv4-det",
        "text detector (DBNet)",
        "Apache-2.0",
        (sources.RAPIDOCR,),
        generators.detector,
        _shapes((1, 3, 640, 480), (1, 3, 320, 320), (2, 3, 320, 480)),
        Extra.NONE,
        sources.PPOCR_DET,
    ),
    Model(
        "ppocrv4-rec",
        "text recogniser (CNN, transformer, CTC)",
        "Apache-2.0",
        (sources.RAPIDOCR,),
        generators.recogniser,
        _shapes((1, 3, 48, 320), (1, 3, 48, 160), (3, 3, 48, 320)),
        Extra.NONE,
        sources.PPOCR_REC,
    ),
    Model(
        "ppocr-cls",
        "text angle classifier (MobileNetV3)",
        "Apache-2.0",
        (sources.RAPIDOCR,),
        generators.angle_classifier,
        _shapes((1, 3, 48, 192), (3, 3, 48, 192)),
        Extra.NONE,
        sources.PPOCR_CLS,
    ),
    Model(
        "silero-vad",
        "voice activity (convolutions, LSTM, nested If)",
        "MIT",
        (sources.SILERO,),
        generators.silero,
        _SILERO_CASES,
        Extra.NONE,
        sources.SILERO_VAD,
    ),
    Model(
        "silero-vad-ifless",
        "the same, one If (the rate), opset 18",
        "MIT",
        (sources.SILERO,),
        generators.silero,
        _SILERO_CASES,
        Extra.NONE,
        sources.SILERO_VAD_IFLESS,
        variant_of="silero-vad",
    ),
    Model(
        "silero-vad-16k",
        "the same, 16 kHz only, opset 15",
        "MIT",
        (sources.SILERO,),
        generators.silero,
        _SILERO_CASES[:2],
        Extra.NONE,
        sources.SILERO_VAD_16K,
        variant_of="silero-vad",
    ),
    Model(
        "magika",
        "file type from bytes",
        "Apache-2.0",
        (sources.MAGIKA,),
        generators.magika,
        _shapes((1, 2048), (6, 2048)),
        Extra.NONE,
        sources.MAGIKA_V3_3,
    ),
    Model(
        "basic-pitch",
        "notes in sound (CQT in the graph, CNN)",
        "Apache-2.0",
        (sources.BASIC_PITCH,),
        generators.basic_pitch,
        _shapes((1, 43844, 1), (2, 43844, 1)),
        Extra.NONE,
        sources.BASIC_PITCH_NMP,
    ),
    Model(
        "tabular-forest",
        "random forest on digits (ai.onnx.ml)",
        "BSD-3-Clause (scikit-learn)",
        (),
        generators.digits,
        _shapes((1, 64), (32, 64)),
        Extra.TABULAR,
    ),
    Model(
        "tabular-mlp",
        "scaler and perceptron on digits",
        "BSD-3-Clause (scikit-learn)",
        (),
        generators.digits,
        _shapes((1, 64), (32, 64)),
        Extra.TABULAR,
    ),
    Model("resnet50", "CNN, 1000 classes", _RANDOM, (), generators.photographs, _IMAGES),
    Model(
        "resnet50-bn",
        "the same, BatchNormalization kept",
        _RANDOM,
        (),
        generators.photographs,
        _IMAGES,
        variant_of="resnet50",
    ),
    Model("mobilenetv2", "depthwise CNN, 1000 classes", _RANDOM, (), generators.photographs, _IMAGES),
    Model(
        "mobilenetv2-bn",
        "the same, BatchNormalization kept",
        _RANDOM,
        (),
        generators.photographs,
        _IMAGES,
        variant_of="mobilenetv2",
    ),
    Model("minilm-l6", "sentence encoder (all-MiniLM-L6-v2)", "MIT", (sources.MINILM,), generators.sentences, _TOKENS),
    Model(
        "minilm-l6-eager",
        "the same, attention written out plainly",
        "MIT",
        (sources.MINILM,),
        generators.sentences,
        _TOKENS,
        variant_of="minilm-l6",
    ),
    Model(
        "minilm-l6-op23",
        "the same in opset 23, attention as one operator",
        "MIT",
        (sources.MINILM,),
        generators.sentences,
        _TOKENS,
        variant_of="minilm-l6",
    ),
    Model(
        "efficientnet-lite0",
        "depthwise CNN, 1000 classes",
        "Apache-2.0",
        (sources.EFFICIENTNET_WHEEL, sources.EFFICIENTNET_CODE),
        generators.photographs_lite,
        _IMAGES,
    ),
    Model(
        "efficientnet-lite0-ts",
        "the same by the TorchScript exporter",
        "Apache-2.0",
        (sources.EFFICIENTNET_WHEEL, sources.EFFICIENTNET_CODE),
        generators.photographs_lite,
        _IMAGES,
        variant_of="efficientnet-lite0",
    ),
    Model("bert-base", "transformer encoder", _RANDOM, (), generators.sentences, _TOKENS),
    Model("vit-b", "vision transformer, 1000 classes", _RANDOM, (), generators.photographs, _IMAGES),
    Model(
        "smollm2-135m",
        "decoder with key/value cache (SmolLM2-135M-Instruct)",
        "Apache-2.0",
        (sources.SMOLLM2_WHEEL,),
        generators.decoder,
        _SMOLLM2_CASES,
    ),
    Model(
        "whisper-tiny-en-encoder",
        "speech encoder",
        "MIT",
        (sources.WHISPER_WHEEL,),
        generators.whisper,
        _shapes((1, 80, 3000), (2, 80, 3000)),
    ),
)

BY_NAME: dict[str, Model] = {model.name: model for model in MODELS}


def find(name: str) -> Model:
    """The record of a model.

    Raises: KeyError naming the models that there are.
    """
    if name not in BY_NAME:
        raise KeyError(f"no model is called {name!r}; the models: {', '.join(BY_NAME)}")
    return BY_NAME[name]


def inputs(name: str, case: str | None = None, seed: int = 0) -> generators.Inputs:
    """Arrays for one case of a model, the main one unless named: realistic values, the same for the same arguments.

    Raises: KeyError for an unknown model or case; ModelUnavailable when something that makes the inputs is missing.
    """
    model = find(name)
    chosen = model.case(case) if case is not None else model.cases[0]
    return model.generate(chosen.shape, seed)
