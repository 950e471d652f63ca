"""Trains the two tabular models on scikit-learn's digits and converts them; needs scikit-learn and skl2onnx.

Digits: 1797 pictures of 8x8 pixels with values 0 to 16 and ten labels. The last 360 are not trained on and become
the real inputs of the models (`tabular-digits.npy` in the cache). Training is seeded, so the same versions give the
same model; other versions may not, which is why these files carry no recorded digest.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from benchmarks.models.fetch import ModelUnavailable, cache_dir, write_atomically

HELD_OUT = 360
OPSET = {"": 18, "ai.onnx.ml": 3}
PIXELS_FILE = "tabular-digits.npy"


def train_forest(path: Path) -> None:
    """Writes a random forest of 100 trees of depth at most 10 (one TreeEnsembleClassifier)."""
    ensemble = _need("sklearn.ensemble")
    _train(path, ensemble.RandomForestClassifier(n_estimators=100, max_depth=10, random_state=0), "tabular-forest")


def train_mlp(path: Path) -> None:
    """Writes a scaler and a perceptron 64-128-64-10, as one would ship a tabular pipeline."""
    network = _need("sklearn.neural_network")
    pipeline = _need("sklearn.pipeline")
    scaling = _need("sklearn.preprocessing")
    mlp = network.MLPClassifier(hidden_layer_sizes=(128, 64), max_iter=200, random_state=0)
    _train(path, pipeline.make_pipeline(scaling.StandardScaler(), mlp), "tabular-mlp")


def _train(path: Path, estimator: Any, name: str) -> None:
    import numpy as np

    datasets = _need("sklearn.datasets")
    skl2onnx = _need("skl2onnx")
    pixels, labels = datasets.load_digits(return_X_y=True)
    pixels = pixels.astype(np.float32)
    estimator.fit(pixels[:-HELD_OUT], labels[:-HELD_OUT])
    converted = skl2onnx.to_onnx(estimator, pixels[:1], name=name, target_opset=OPSET, options={"zipmap": False})
    path.write_bytes(converted.SerializeToString())
    held_out = pixels[-HELD_OUT:]
    write_atomically(cache_dir() / PIXELS_FILE, lambda unfinished: _save(np, unfinished, held_out))


def _save(np: Any, path: Path, array: Any) -> None:
    with path.open("wb") as stream:
        np.save(stream, array)


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise ModelUnavailable(
            f"training the tabular models needs scikit-learn and skl2onnx ({missing}); "
            "pip install scikit-learn skl2onnx (the extra `torch` has them too)"
        ) from missing
