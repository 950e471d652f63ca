"""What stands between the demo's networks: regions, rectangles, strips, and decoded text."""

from __future__ import annotations

import numpy as np
import pytest

from vivace.cli.reading import (
    Reader,
    convex_hull,
    cut_out,
    decode,
    detector_input,
    grow,
    label_regions,
    least_rectangle,
    order_corners,
    recogniser_input,
    rectangles,
    resize,
    sort_lines,
)


def test_regions_join_at_corners_and_around() -> None:
    mask = np.array(
        [
            [1, 0, 0, 0, 1, 0, 1],
            [0, 1, 0, 0, 1, 1, 1],
            [0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 1, 0, 1, 0],
        ],
        bool,
    )
    labels, n = label_regions(mask)
    assert n == 5
    assert labels[0, 0] == labels[1, 1]
    assert labels[0, 4] == labels[0, 6]  # two runs that a row below joins
    assert len({labels[3, 0], labels[3, 3], labels[3, 5], labels[0, 0], labels[0, 4]}) == 5
    assert not labels[~mask].any()


def test_least_rectangle_of_a_turned_one() -> None:
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    corners = np.array([[0, 0], [40, 0], [40, 10], [0, 10]]) @ turn + [50, 60]
    inside = np.array([[x, y] for x in (1, 20, 39) for y in (1, 5, 9)]) @ turn + [50, 60]
    points = np.unique(np.concatenate([corners, inside]), axis=0)
    found = least_rectangle(convex_hull(points))
    np.testing.assert_allclose(found, order_corners(corners), atol=1e-9)
    assert found[0, 0] < found[1, 0] and found[0, 1] < found[3, 1]


def test_growth() -> None:
    square = np.array([[10.0, 10], [20, 10], [20, 20], [10, 20]])
    np.testing.assert_allclose(grow(square, 2), [[8, 8], [22, 8], [22, 22], [8, 22]])


def test_rectangles_of_a_map() -> None:
    chances = np.zeros((64, 96), np.float32)
    chances[10:20, 5:65] = 0.9
    chances[40:42, 5:7] = 0.9  # too small
    chances[50:60, 70:90] = 0.4  # too unsure
    (found,) = rectangles(chances)
    growth = 60 * 10 * 1.6 / 140
    np.testing.assert_allclose(found[0], [5 - growth, 10 - growth])
    np.testing.assert_allclose(found[2], [65 + growth, 20 + growth])


def test_cut_out_is_straight() -> None:
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[10:20, 5:45] = 200
    strip = cut_out(picture, np.array([[5.5, 10.5], [44.5, 10.5], [44.5, 19.5], [5.5, 19.5]]))
    assert strip.shape == (9, 39, 3)
    assert (strip >= 199).all()
    tall = cut_out(picture.transpose(1, 0, 2), np.array([[10.5, 5.5], [19.5, 5.5], [19.5, 44.5], [10.5, 44.5]]))
    assert tall.shape[1] > tall.shape[0]


def test_resize_keeps_gradients() -> None:
    ramp = np.repeat(np.arange(0, 200, 10, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(10, axis=0)
    wide = resize(ramp, 10, 40)
    assert wide.shape == (10, 40, 3)
    assert (np.diff(wide[0, :, 0].astype(int)) >= 0).all()
    np.testing.assert_allclose(wide[0, 1:-1:2, 0], wide[0, 2::2, 0] - 5, atol=1)


def test_inputs_of_networks() -> None:
    page = np.full((100, 300, 3), (255, 127, 0), np.uint8)
    array = detector_input(page)
    assert array.shape == (1, 3, 736, 2208)
    np.testing.assert_allclose(array[0, :, 0, 0], [-1, 0, 1], atol=0.01)  # BGR
    strip = recogniser_input(page)
    assert strip.shape == (1, 3, 48, 320)
    assert not strip[..., 144:].any()
    assert recogniser_input(np.zeros((24, 400, 3), np.uint8)).shape == (1, 3, 48, 800)


def test_lines_are_sorted_as_read() -> None:
    def box(x: float, y: float) -> np.ndarray:
        return np.array([[x, y], [x + 30, y], [x + 30, y + 10], [x, y + 10]])

    order = sort_lines([box(50, 42), box(0, 80), box(5, 40), box(2, 0)])
    assert [corners[0].tolist() for corners in order] == [[2, 0], [5, 40], [50, 42], [0, 80]]


def test_decode_merges_and_drops() -> None:
    classes = [0, 1, 1, 0, 1, 2, 2, 3, 0]
    columns = np.full((len(classes), 4), 0.1, np.float32)
    columns[np.arange(len(classes)), classes] = 0.7
    text, confidence = decode(columns, ["a", "b", " "])
    assert text == "aab "
    assert confidence == pytest.approx(0.7)
    assert decode(columns[:1], ["a", "b", " "]) == ("", 0.0)


def test_reader_turns_lines() -> None:
    picture = np.full((736, 736, 3), 255, np.uint8)
    picture[100:140, 100:500, 0] = 7
    seen = []

    def detect(array: np.ndarray) -> np.ndarray:
        chances = np.zeros((1, 1, *array.shape[2:]), np.float32)
        chances[0, 0, 100:140, 100:500] = 0.9
        return chances

    def recognise(array: np.ndarray) -> np.ndarray:
        seen.append(array)
        return np.array([[[0.1, 0.9], [0.8, 0.2]]], np.float32)

    reader = Reader(detect, lambda array: np.array([[0.01, 0.99]], np.float32), recognise, ["a"])
    (line,) = reader.read(picture)
    assert (line.text, line.is_turned) == ("a", True)
    assert line.corners[0][0] < 100 < line.corners[1][0]
    assert len(seen) == 1
