"""Every block of README.md and of docs/guide.md runs: the Python as it stands, each command on a real model."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/guide.md")


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    x = np.arange(16, dtype=np.float32).reshape(2, 8)
    w = names["model"].graph.initializer[0]  # type: ignore[attr-defined]
    want = np.maximum(x @ np.array(w.float_data, np.float32).reshape(8, 4), 0)
    np.testing.assert_array_equal(names["y"], want)


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks one after the other."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python", "docs/guide.md"):
        exec(compile(block, "docs/guide.md", "exec"), names)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{page} links to {target}"


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


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_run(folder: Path, page: str) -> None:
    (block,) = blocks("console", page)
    lines = block.strip().splitlines()
    assert len(lines) >= 2
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
