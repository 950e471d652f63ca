"""What the benchmarks share: where they are, what their figures depend on, and which records still count."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PROVIDERS = ("native,onnxruntime", "onnxruntime", "openvino")

Record = dict[str, Any]


def output_names(model: Path) -> list[str]:
    """The outputs of an ONNX model, in order."""
    import onnx

    return [value.name for value in onnx.load(model, load_external_data=False).graph.output]


def versions() -> dict[str, str]:
    """What the times depend on beside the machine."""
    from importlib.metadata import version

    packages = ("vivace", "onnxruntime", "openvino", "numpy", "llvmlite")
    return {**{name: version(name) for name in packages}, "python": platform.python_version()}


def kept(path: Path, *keys: str) -> Record | None:
    """A record that was taken before, where it is of these versions and has these keys, as this form of it does."""
    record: Record = json.loads(path.read_text()) if path.exists() else {}
    return record if record.get("versions") == versions() and record.keys() >= set(keys) else None


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
