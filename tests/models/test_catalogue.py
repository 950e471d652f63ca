"""The catalogue is consistent, its inputs are repeatable, and models that need nothing run in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.models import BY_NAME, MODELS, Extra, Model, ModelUnavailable, inputs, is_ready, materialise
from benchmarks.models.__main__ import main

LIGHT = [model for model in MODELS if model.extra is Extra.NONE]
HEAVY = [model for model in MODELS if model.extra is not Extra.NONE]


def test_names_are_unique_and_variants_exist() -> None:
    assert len(BY_NAME) == len(MODELS)
    assert {model.variant_of for model in MODELS} - {None} <= set(BY_NAME)


def test_at_least_six_models_need_nothing() -> None:
    assert len([model for model in LIGHT if model.variant_of is None]) >= 6


@pytest.mark.parametrize("model", LIGHT, ids=lambda model: model.name)
def test_light_models_are_members_of_their_wheels(model: Model) -> None:
    assert model.member is not None
    assert model.member.wheel in model.wheels


def run_all_cases(model: Model) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(materialise(model.name)), options, providers=["CPUExecutionProvider"])
    for case in model.cases:
        feeds, same = inputs(model.name, case.name), inputs(model.name, case.name)
        for name, array in feeds.items():
            np.testing.assert_array_equal(array, same[name], err_msg=f"{case.name}: {name} differs between two calls")
        for output in session.run(None, feeds):
            assert np.isfinite(output).all(), f"{case.name}: infinity or NaN in an output"


@pytest.mark.parametrize("model", LIGHT, ids=lambda model: model.name)
def test_light_model_runs_at_every_case(model: Model) -> None:
    run_all_cases(model)


@pytest.mark.slow
@pytest.mark.parametrize("model", HEAVY, ids=lambda model: model.name)
def test_cached_model_runs_at_every_case(model: Model) -> None:
    if not is_ready(model.name):
        pytest.skip(f"{model.name} is not in the cache; make it with: python -m benchmarks.models get {model.name}")
    run_all_cases(model)


def test_seeds_give_different_inputs() -> None:
    first, second = inputs("silero-vad", seed=1), inputs("silero-vad", seed=2)
    assert not np.array_equal(first["input"], second["input"])


def test_unknown_names_are_named_with_what_there_is() -> None:
    with pytest.raises(KeyError, match="ppocrv4-det"):
        materialise("resnet5000")
    with pytest.raises(KeyError, match="1x3x640x480"):
        inputs("ppocrv4-det", "7x7")


def test_missing_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable, match=r"pip install .\.\[torch\]"):
        materialise("resnet50")


def test_altered_model_file_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("benchmarks.models.making.read_member", lambda member: b"from the wheel")
    path = tmp_path / "vivace" / "models" / "basic-pitch.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"altered")
    assert not is_ready("basic-pitch")
    assert materialise("basic-pitch").read_bytes() == b"from the wheel"


@pytest.mark.parametrize("arguments", [["get"], ["get", "no-such-model"]])
def test_command_line_refuses_what_it_does_not_know(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_command_line_lists_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in BY_NAME)
