"""Makes the ONNX file of a model in the cache, or finds it there.

A model without an extra is read out of a wheel's zip, and its SHA-256 must be the recorded one. Trained and exported
models differ in their bytes between versions of the converters, so they have no fixed digest: a side file `NAME.json`
keeps the size, the digest and the recipe number of what was written, and a file that does not fit it, or is of an older
recipe, is made again.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.models import train_tabular
from benchmarks.models.catalogue import Extra, Model, find
from benchmarks.models.fetch import ModelUnavailable, cache_dir, read_member, sha256_of, write_atomically


def is_ready(name: str) -> bool:
    """Whether `materialise` would return at once."""
    model = find(name)
    path = cache_dir() / model.file_name
    if model.member is not None:
        return path.exists() and sha256_of(path) == model.member.sha256
    return path.exists() and _side_file_fits(path, model)


def can_make(name: str) -> bool:
    """Whether this environment has what making the model needs (a package index apart)."""
    needed = {
        Extra.NONE: (),
        Extra.TABULAR: ("sklearn", "skl2onnx"),
        Extra.TORCH: ("torch", "transformers", "onnxscript"),
    }
    return all(importlib.util.find_spec(module) is not None for module in needed[find(name).extra])


def materialise(name: str, again: bool = False) -> Path:
    """The path of the model's ONNX file, made first where the cache lacks it (or always, with `again`).

    Raises: KeyError for an unknown name; ModelUnavailable when it cannot be made here, with what to install.
    Cost: a download of 1 to 90 MB and, for the largest export, two minutes and 4 GB of memory.
    """
    model = find(name)
    path = cache_dir() / model.file_name
    if not again and is_ready(name):
        return path
    if model.member is not None:
        content = read_member(model.member)
        return write_atomically(path, lambda unfinished: _write(unfinished, content))
    make = _maker(model)
    try:
        write_atomically(path, make)
    except ModelUnavailable:
        raise
    except Exception as failure:  # whatever a converter of another version may raise
        raise ModelUnavailable(
            f"{name}: the conversion failed ({type(failure).__name__}: {str(failure)[:300]}); "
            f"benchmarks/models/README.md names the versions of the converters that work"
        ) from failure
    record = {"recipe": model.recipe, "size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
    side_text = json.dumps(record, indent=1) + "\n"
    write_atomically(_side_file(path), lambda unfinished: _write(unfinished, side_text.encode()))
    return path


def _maker(model: Model) -> Callable[[Path], None]:
    if model.extra is Extra.TABULAR:
        return {"tabular-forest": train_tabular.train_forest, "tabular-mlp": train_tabular.train_mlp}[model.name]
    if not can_make(model.name):
        raise ModelUnavailable(
            f"{model.name} is not in the cache, and making it needs PyTorch; install the extra: "
            f"pip install '.[torch]' "
            f"(only to make it: the finished file needs nothing), then: python -m benchmarks.models get {model.name}"
        )
    exporters = importlib.import_module("benchmarks.models.export_torch").EXPORTERS
    maker: Callable[[Path], None] = exporters[model.name]
    return maker


def _side_file(path: Path) -> Path:
    return path.with_suffix(".json")


def _side_file_fits(path: Path, model: Model) -> bool:
    try:
        record = json.loads(_side_file(path).read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(record, dict):
        return False
    return (record.get("recipe"), record.get("size_bytes")) == (model.recipe, path.stat().st_size)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
