"""The three networks of `vivace demo`, out of the wheel that publishes them.

The wheel is downloaded once by pip, without its dependencies; a wheel is a zip archive, and only the model files are
taken out of it. No code of the package runs, and a file whose SHA-256 is not the recorded one is refused.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from vivace.base.cache import write_atomic
from vivace.base.errors import InputError
from vivace.base.knobs import knobs

REQUIREMENT = "rapidocr-onnxruntime==1.4.4"  # Apache-2.0


@dataclass(frozen=True, slots=True)
class DemoModel:
    """One network: its file here, its path in the wheel, and its digest."""

    file: str
    member: str
    sha256: str


MODELS = {
    "detector": DemoModel(
        "ppocrv4-det.onnx",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
    ),
    "classifier": DemoModel(
        "ppocr-cls.onnx",
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
    ),
    "recogniser": DemoModel(
        "ppocrv4-rec.onnx",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
    ),
}


def find_models(folder: Path | None = None) -> dict[str, Path]:
    """Paths by role, from a folder that holds the files, or from the cache, filled first where it lacks them.

    Raises: InputError for a missing or altered file, and where pip cannot download.
    """
    place = folder or knobs.cache_dir / "models"
    missing = [model for model in MODELS.values() if not _is_right(place / model.file, model)]
    if missing and folder is not None:
        raise InputError(
            "the file is missing or not the recorded one", where=str(folder / missing[0].file), hint="without --models"
        )
    if missing:
        _download(place)
    return {role: place / model.file for role, model in MODELS.items()}


def _is_right(path: Path, model: DemoModel) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256
    except OSError:
        return False


def _download(place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vivace-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            complaint = (done.stderr.strip().splitlines() or ["pip left no wheel"])[-1]
            raise InputError(
                f"pip cannot download the demo's models: {complaint}",
                where=REQUIREMENT,
                expected="a package index that pip can reach",
                hint="vivace demo --models FOLDER",
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            for model in MODELS.values():
                data = archive.read(model.member)
                if hashlib.sha256(data).hexdigest() != model.sha256:
                    raise InputError("the file is not the recorded one", where=f"{REQUIREMENT}: {model.member}")
                write_atomic(place / model.file, [data])
