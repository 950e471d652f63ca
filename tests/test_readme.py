"""Every block of README.md runs: the Python as it stands, each command on a real model."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    x = np.arange(16, dtype=np.float32).reshape(2, 8)
    w = names["model"].graph.initializer[0]  # type: ignore[attr-defined]
    want = np.maximum(x @ np.array(w.float_data, np.float32).reshape(8, 4), 0)
    np.testing.assert_array_equal(names["y"], want)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small convolutional `model.onnx`."""
    import onnx.parser

    path = tmp_path_factory.mktemp("readme")
    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 17]>
        net (float[N, 3, H, W] x) => (float[N, 4, 1, 1] y)
        <float[4, 3, 1, 1] w = {1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1}>
        { h = Conv(x, w)  r = Relu(h)  y = GlobalAveragePool(r) }
        """
    )
    onnx.save(model, path / "model.onnx")
    return path


def test_the_commands_run(folder: Path) -> None:
    (block,) = blocks("console")
    lines = block.strip().splitlines()
    assert len(lines) >= 6
    for line in lines:
        verb = shlex.split(line)
        assert verb[0] == "vivace"
        done = subprocess.run(
            [sys.executable, "-m", "vivace", *verb[1:]],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,  # `vivace sys` measures peaks until they agree
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip()
