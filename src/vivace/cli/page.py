"""The picture of the demo: a page of text drawn with Pillow, or a picture from disk; and boxes drawn over it.

Pillow is the extra `demo`; without it these functions raise an InputError that says so.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vivace.base.cache import write_atomic
from vivace.base.errors import InputError

TEXT = (
    ("vivace", 54),
    ("An ONNX file becomes a fast native engine.", 28),
    ("The answer is checked, and the distance", 28),
    ("to the machine's limit is shown.", 28),
    ("", 16),
    ("Invoice No. 20418", 32),
    ("3 x espresso          7.50", 26),
    ("1 x almond cake       4.20", 26),
    ("TOTAL                11.70 EUR", 32),
    ("", 16),
    ("Paid in cash, 22 November 2026. Thank you!", 22),
)
_WIDTH, _HEIGHT, _MARGIN = 736, 736, 48
_FONTS = (
    "DejaVuSans.ttf",  # found by Pillow in the system's folders of fonts
    "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf",
    "/usr/share/fonts/dejavu/DejaVuSans.ttf",
    "/usr/share/fonts/TTF/DejaVuSans.ttf",
)


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
    except ImportError as missing:
        raise InputError(
            "drawing and reading pictures needs Pillow", where="vivace demo", hint="pip install pillow"
        ) from missing
    return PIL


def draw_page(seed: int = 0) -> np.ndarray:
    """`u8[736,736,3]`: the page, turned by up to a degree and a little noisy, as a scanner would give it."""
    pillow = _pillow()
    generator = np.random.default_rng(seed)
    paper = tuple(int(c) for c in generator.integers(232, 250, 3))
    page = pillow.Image.new("RGB", (_WIDTH, _HEIGHT), paper)
    pen = pillow.ImageDraw.Draw(page)
    top = _MARGIN
    for text, size in TEXT:
        pen.text((_MARGIN, top), text, font=_font(size), fill=(28, 28, 38))
        top += round(size * 1.75)
    turned = page.rotate(float(generator.uniform(-1, 1)), resample=pillow.Image.Resampling.BICUBIC, fillcolor=paper)
    pixels = np.asarray(turned, np.float32) + generator.normal(0, 4, (_HEIGHT, _WIDTH, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _font(size: int) -> Any:
    fonts = _pillow().ImageFont
    for name in _FONTS:
        try:
            return fonts.truetype(name, size)
        except OSError:
            continue
    return fonts.load_default(size)


def read_picture(path: Path) -> np.ndarray:
    """`u8[H,W,3]` in RGB. Raises: InputError for a file that is no picture."""
    pillow = _pillow()
    try:
        with pillow.Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except FileNotFoundError as error:
        raise InputError("no such file", where=str(path), expected="a picture") from error
    except (OSError, ValueError, pillow.Image.DecompressionBombError) as error:
        raise InputError(f"cannot read a picture: {error}", where=str(path), expected="a PNG or JPEG file") from error


def write_picture(path: Path, picture: np.ndarray, boxes: Iterable[np.ndarray]) -> None:
    """Writes the picture with a frame around each box, as a whole or not at all."""
    pillow = _pillow()
    page = pillow.Image.fromarray(picture)
    pen = pillow.ImageDraw.Draw(page)
    for box in boxes:
        corners = [tuple(map(float, corner)) for corner in box]
        pen.line([*corners, corners[0]], fill=(214, 40, 40), width=2)
    held = io.BytesIO()
    page.save(held, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG")
    write_atomic(path, [held.getbuffer()])
