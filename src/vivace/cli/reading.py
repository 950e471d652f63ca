"""Reads the text in a picture with three networks: where is text, is a line upside down, what does it say.

    Reader(run_detector, run_classifier, run_recogniser, characters).read(picture) -> lines

The networks are PP-OCR's; what stands between them is here, in NumPy: the detector's map becomes rotated rectangles
(threshold, connected regions, convex hull, least rectangle, growth), each rectangle is sampled into a straight strip,
and the recogniser's columns are decoded greedily (CTC).

Rules:
* PIXELS: pictures are u8[height,width,3] in RGB; the networks want BGR scaled to -1..1.
* CORNERS: a rectangle is f64[4,2] of (x, y), from its top left clockwise as the text is read.

Source: Liao et al., Real-time Scene Text Detection with Differentiable Binarization, 2020 (growth by area over
perimeter); the constants are those of RapidOCR.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Network = Callable[[np.ndarray], np.ndarray]

_DETECT_SIDE, _DETECT_MULTIPLE = 736, 32
_THRESHOLD, _LEAST_SCORE, _GROWTH, _LEAST_SIDE = 0.3, 0.5, 1.6, 3.0
_STRIP_HEIGHT, _CLASSIFY_WIDTH, _LEAST_WIDTH = 48, 192, 320
_LEAST_TURNED = 0.9


@dataclass(frozen=True, slots=True)
class Line:
    """One line of text that was read: where it stands, what it says, and how sure the recogniser is (0 to 1)."""

    corners: np.ndarray
    text: str
    confidence: float
    is_turned: bool


@dataclass(frozen=True, slots=True)
class Reader:
    """The three networks as functions from one array to one array, and the recogniser's characters."""

    detect: Network
    classify: Network
    recognise: Network
    characters: Sequence[str]

    def read(self, picture: np.ndarray) -> list[Line]:
        """All lines of a picture, from top to bottom."""
        lines = []
        for corners in self.find(picture):
            strip = cut_out(picture, corners)
            scores = self.classify(classifier_input(strip))
            is_turned = bool(scores[0, 1] > _LEAST_TURNED)
            if is_turned:
                strip = strip[::-1, ::-1]
            text, confidence = decode(self.recognise(recogniser_input(strip))[0], self.characters)
            if text.strip():
                lines.append(Line(corners, text, confidence, is_turned))
        return lines

    def find(self, picture: np.ndarray) -> list[np.ndarray]:
        """The rectangles around lines of text, from top to bottom."""
        array = detector_input(picture)
        chances = self.detect(array)[0, 0]
        scale = np.array([picture.shape[1] / array.shape[3], picture.shape[0] / array.shape[2]])
        return sort_lines([corners * scale for corners in rectangles(chances)])


def detector_input(picture: np.ndarray) -> np.ndarray:
    """`f32[1,3,H,W]` with sides that are multiples of 32, the shorter at least 736."""
    height, width = picture.shape[:2]
    scale = max(1.0, _DETECT_SIDE / min(height, width))
    sides = [
        max(_DETECT_MULTIPLE, round(side * scale / _DETECT_MULTIPLE) * _DETECT_MULTIPLE) for side in (height, width)
    ]
    return _normalized(resize(picture, sides[0], sides[1]))


def classifier_input(strip: np.ndarray) -> np.ndarray:
    """`f32[1,3,48,192]`: the strip at its own proportions, zeros on the right."""
    return _padded(strip, _CLASSIFY_WIDTH, _CLASSIFY_WIDTH)


def recogniser_input(strip: np.ndarray) -> np.ndarray:
    """`f32[1,3,48,W]`: the whole strip, at least 320 wide, W a multiple of 8."""
    return _padded(strip, _LEAST_WIDTH, 1 << 14)


def _padded(strip: np.ndarray, least: int, most: int) -> np.ndarray:
    width = min(most, max(1, round(strip.shape[1] * _STRIP_HEIGHT / strip.shape[0])))
    total = max(least, -(-width // 8) * 8)
    found = np.zeros((1, 3, _STRIP_HEIGHT, total), np.float32)
    found[..., :width] = _normalized(resize(strip, _STRIP_HEIGHT, width))
    return found


def _normalized(picture: np.ndarray) -> np.ndarray:
    bgr = picture[..., ::-1].astype(np.float32)
    return np.ascontiguousarray((bgr / 127.5 - 1).transpose(2, 0, 1)[None])


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, aligned at pixel centres."""
    if picture.shape[:2] == (height, width):
        return picture
    y = (np.arange(height) + 0.5) * picture.shape[0] / height - 0.5
    x = (np.arange(width) + 0.5) * picture.shape[1] / width - 0.5
    return sample(picture, x[None, :], y[:, None])


def sample(picture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear samples at points, which are moved to the border where they lie outside."""
    height, width = picture.shape[:2]
    x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
    left, top = np.floor(x).astype(np.intp), np.floor(y).astype(np.intp)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    fx, fy = (x - left)[..., None].astype(np.float32), (y - top)[..., None].astype(np.float32)
    upper = picture[top, left] * (1 - fx) + picture[top, right] * fx
    lower = picture[bottom, left] * (1 - fx) + picture[bottom, right] * fx
    return np.clip(upper * (1 - fy) + lower * fy + 0.5, 0, 255).astype(np.uint8)


def cut_out(picture: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """The rectangle as a straight strip; one that is half again as high as wide is turned a quarter to the left."""
    across, down = corners[1] - corners[0], corners[3] - corners[0]
    width, height = max(2, round(float(np.hypot(*across)))), max(2, round(float(np.hypot(*down))))
    u, v = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    points = corners[0] + u[None, :, None] * across + v[:, None, None] * down
    strip = sample(picture, points[..., 0], points[..., 1])
    return np.rot90(strip) if height >= 1.5 * width else strip


def rectangles(chances: np.ndarray) -> list[np.ndarray]:
    """Rectangles around the regions of a map of chances `f32[H,W]`, grown by what the detector shrinks them."""
    labels, n_regions = label_regions(chances > _THRESHOLD)
    found = []
    for y, x in _points_by_label(labels, n_regions):
        if chances[y, x].mean() < _LEAST_SCORE:
            continue
        pixels = np.stack([x, y], 1)
        edges = np.unique(np.concatenate([pixels + step for step in np.ndindex(2, 2)]), axis=0)
        corners = least_rectangle(convex_hull(edges.astype(float)))
        sides = np.hypot(*(corners[1] - corners[0])), np.hypot(*(corners[3] - corners[0]))
        if min(sides) < _LEAST_SIDE:
            continue
        growth = sides[0] * sides[1] * _GROWTH / (2 * (sides[0] + sides[1]))
        found.append(grow(corners, float(growth)))
    return found


def _points_by_label(labels: np.ndarray, n_labels: int) -> list[tuple[np.ndarray, np.ndarray]]:
    y, x = np.nonzero(labels)
    order = np.argsort(labels[y, x], kind="stable")
    y, x = y[order], x[order]
    ends = np.searchsorted(labels[y, x], np.arange(1, n_labels + 2))
    return [(y[a:b], x[a:b]) for a, b in pairwise(ends)]


def label_regions(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Numbers from 1 for the 8-connected regions of a mask: runs of each row, joined with those above that touch."""
    parents: list[int] = [0]

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    labels = np.zeros(mask.shape, np.int32)
    above: list[tuple[int, int, int]] = []
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        runs = []
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist()):
            touching = {root(label) for s, e, label in above if s <= end and e >= start}
            label = min(touching) if touching else len(parents)
            if not touching:
                parents.append(label)
            for other in touching:
                parents[other] = label
            labels[y, start:end] = label
            runs.append((start, end, label))
        above = runs
    roots = [root(i) for i in range(len(parents))]
    numbers = {old: i for i, old in enumerate(dict.fromkeys(roots))}
    return np.array([numbers[r] for r in roots], np.int32)[labels], len(numbers) - 1


def convex_hull(points: np.ndarray) -> np.ndarray:
    """Corners of the hull, counter-clockwise (Andrew's monotone chain); `points` are sorted and distinct."""

    def chain(ordered: np.ndarray) -> list[np.ndarray]:
        hull: list[np.ndarray] = []
        for p in ordered:
            while len(hull) > 1 and _turn(hull[-2], hull[-1], p) <= 0:
                hull.pop()
            hull.append(p)
        return hull[:-1]

    return np.array(chain(points) + chain(points[::-1]))


def _turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    return float((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


def least_rectangle(hull: np.ndarray) -> np.ndarray:
    """The rectangle of least area around a hull (one of its sides lies on a side of the hull), in order CORNERS."""
    sides = np.roll(hull, -1, axis=0) - hull
    along = sides / np.hypot(sides[:, 0], sides[:, 1])[:, None]
    across = np.stack([-along[:, 1], along[:, 0]], 1)
    u, v = hull @ along.T, hull @ across.T  # [corner, side]
    best = int(np.argmin(np.ptp(u, axis=0) * np.ptp(v, axis=0)))
    axes = np.stack([along[best], across[best]])
    low, high = [u[:, best].min(), v[:, best].min()], [u[:, best].max(), v[:, best].max()]
    corners = np.array([[low[0], low[1]], [high[0], low[1]], [high[0], high[1]], [low[0], high[1]]]) @ axes
    return order_corners(corners)


def order_corners(corners: np.ndarray) -> np.ndarray:
    """Clockwise as seen (y grows downward), from the top left: the two leftmost corners are the left side."""
    by_x = corners[np.argsort(corners[:, 0], kind="stable")]
    left, right = by_x[:2], by_x[2:]
    left, right = left[np.argsort(left[:, 1])], right[np.argsort(right[:, 1])]
    return np.array([left[0], right[0], right[1], left[1]])


def grow(corners: np.ndarray, distance: float) -> np.ndarray:
    """The rectangle with every side moved outward by a distance."""
    across, down = corners[1] - corners[0], corners[3] - corners[0]
    a, d = across / np.hypot(*across) * distance, down / np.hypot(*down) * distance
    return corners + np.array([-a - d, a - d, a + d, d - a])


def sort_lines(found: Sequence[np.ndarray]) -> list[np.ndarray]:
    """From top to bottom; rectangles whose middles are less than half a height apart are of one line, left to right."""
    rest = sorted(found, key=lambda c: float(c[:, 1].mean()))
    lines: list[list[np.ndarray]] = []
    for corners in rest:
        middle, height = float(corners[:, 1].mean()), float(np.hypot(*(corners[3] - corners[0])))
        if lines and abs(middle - float(lines[-1][0][:, 1].mean())) < height / 2:
            lines[-1].append(corners)
        else:
            lines.append([corners])
    return [corners for line in lines for corners in sorted(line, key=lambda c: float(c[0, 0]))]


def decode(columns: np.ndarray, characters: Sequence[str]) -> tuple[str, float]:
    """Greedy CTC: the best class of each column, repeats merged, class 0 dropped; and the mean of what is kept.

    Shapes: columns f32[time, 1 + characters].
    """
    best = columns.argmax(1)
    is_kept = (best != 0) & np.concatenate([[True], best[1:] != best[:-1]])
    chances = columns.max(1)[is_kept]
    text = "".join(characters[i - 1] for i in best[is_kept])
    return text, float(chances.mean()) if len(chances) else 0.0
