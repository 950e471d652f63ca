"""Pictures as network inputs: rendered pages and lines of text, and labelled photographs. Needs Pillow (the `demo`
extra).

All arrays are float32 NCHW. Everything is seeded; the pixels may differ in the last bits between versions of Pillow.
"""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from benchmarks.models import sources
from benchmarks.models.fetch import ModelUnavailable, read_member, unpack_member
from benchmarks.models.passages import PASSAGE, SENTENCES
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image, ImageFont

FloatArray = NDArray[np.float32]

INK = (30, 30, 40)
LINE_HEIGHT = 48
LINE_FONT_SIZE = 34
LINE_MARGIN = 8
LINES = (
    *SENTENCES,
    "Invoice No. 20418",
    "TOTAL: 1,284.50 EUR",
    "open 9 am to 5 pm",
    "Section 7: Real Models",
    "vivace!",
)
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def _need_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as missing:
        raise ModelUnavailable(
            "drawing text and reading photographs needs Pillow; install it: pip install pillow"
        ) from missing


@lru_cache(maxsize=16)
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans from matplotlib's wheel, which is read and not installed."""
    _need_pillow()
    from PIL import ImageFont

    return ImageFont.truetype(str(font_path()), size)


def font_path() -> Path:
    return unpack_member(sources.DEJAVU_SANS)


def text_page(height: int, width: int, seed: int) -> Image.Image:
    """A scanned-looking page: paper colour, lines of the passage in several sizes, a little noise and a slight turn."""
    _need_pillow()
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    page = Image.new("RGB", (width, height), tuple(int(c) for c in rng.integers(225, 255, 3)))
    draw = ImageDraw.Draw(page)
    words = np.roll(np.array(PASSAGE.split()), -int(rng.integers(0, 40))).tolist() * 4
    top = int(rng.integers(12, 30))
    while top < height - 40:
        size = int(rng.choice([18, 22, 28, 36]))
        line = fitting_words(" ".join(words[:20]), size, int(0.82 * width))
        words = words[len(line.split()) :]
        draw.text((int(0.06 * width), top), line, font=font(size), fill=INK)
        top += int(size * rng.uniform(1.5, 2.2))
    turned = page.rotate(
        float(rng.uniform(-1.5, 1.5)), resample=Image.Resampling.BILINEAR, fillcolor=page.getpixel((0, 0))
    )
    return _with_noise(turned, rng)


def text_line(text: str, seed: int, upside_down: bool = False) -> Image.Image:
    """One line of text as an angle classifier or a recogniser sees it: cut tightly, 48 pixels high."""
    _need_pillow()
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    face = font(LINE_FONT_SIZE)
    left, top, right, bottom = face.getbbox(text)
    line = Image.new(
        "RGB", (int(right - left) + 2 * LINE_MARGIN, LINE_HEIGHT), tuple(int(c) for c in rng.integers(215, 255, 3))
    )
    ImageDraw.Draw(line).text((LINE_MARGIN - left, (LINE_HEIGHT - bottom - top) / 2), text, font=face, fill=INK)
    return _with_noise(line.rotate(180) if upside_down else line, rng)


def _with_noise(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    from PIL import Image

    pixels = np.asarray(picture, np.float32) + rng.normal(0, 4, (picture.height, picture.width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def page_batch(shape: tuple[int, ...], seed: int) -> FloatArray:
    """Pages for the text detector, `f32[N,3,H,W]`, BGR, scaled to -1..1 as RapidOCR does."""
    n, _, height, width = shape
    return np.stack([_to_chw(text_page(height, width, seed * 101 + i)) for i in range(n)])


def line_batch(shape: tuple[int, ...], seed: int, turn_every_second: bool = False) -> FloatArray:
    """Lines of text, `f32[N,3,48,W]`: as many words as fit, zeros on the right where they are narrower."""
    n, channels, height, width = shape
    batch = np.zeros((n, channels, height, width), np.float32)
    for i in range(n):
        text = fitting_words(LINES[(seed + i) % len(LINES)], LINE_FONT_SIZE, width - 2 * LINE_MARGIN)
        line = text_line(text, seed + i, upside_down=turn_every_second and i % 2 == 1)
        kept = min(line.width, width)
        batch[i, :, :, :kept] = _to_chw(line.resize((kept, height)))
    return batch


def fitting_words(text: str, size: int, width: int) -> str:
    """The first words of `text` that fit into `width` pixels in this size of type; one word at least."""
    words = text.split()
    while len(words) > 1 and font(size).getlength(" ".join(words)) > width:
        words.pop()
    return " ".join(words)


def _to_chw(picture: Image.Image) -> FloatArray:
    bgr = np.asarray(picture, np.float32)[:, :, ::-1]
    return np.ascontiguousarray((bgr / 255 - 0.5).transpose(2, 0, 1) / 0.5)


def photographs() -> list[tuple[int, bytes]]:
    """Twenty (ImageNet label, JPEG bytes); the label stands in the file's name."""
    return [(int(Path(m.path).stem.rsplit("_", 1)[1]), read_member(m)) for m in sources.PHOTOGRAPHS]


def photograph_batch(shape: tuple[int, ...], seed: int) -> FloatArray:
    """Photographs for a classifier: shorter side to 256, centre crop, ImageNet mean and deviation; RGB."""
    scaled = _crops(shape, seed) / np.float32(255)
    return (scaled - IMAGENET_MEAN[:, None, None]) / IMAGENET_STD[:, None, None]


def photograph_batch_lite(shape: tuple[int, ...], seed: int) -> FloatArray:
    """The same for EfficientNet-Lite: (x - 127) / 128."""
    return (_crops(shape, seed) - np.float32(127)) / np.float32(128)


def _crops(shape: tuple[int, ...], seed: int) -> FloatArray:
    n, _, height, width = shape
    start = seed * n
    members = [sources.PHOTOGRAPHS[(start + i) % len(sources.PHOTOGRAPHS)] for i in range(n)]
    return np.stack([centre_crop(read_member(member), height, width) for member in members])


def centre_crop(jpeg: bytes, height: int, width: int) -> FloatArray:
    """`f32[3,height,width]` of 0..255: bicubic resize that leaves a border of 1/8, then the centre."""
    _need_pillow()
    from PIL import Image

    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    scale = 8 / 7 * max(height / picture.height, width / picture.width)
    size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    cut = picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
    return np.ascontiguousarray(np.asarray(cut, np.float32).transpose(2, 0, 1))
