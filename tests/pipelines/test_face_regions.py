"""The square around a face: where it lies, and that what is outside of it never changes."""

import numpy as np
import pytest
from PIL import Image

from lediflow.faces import UTKFACE, Face
from lediflow.pipelines.face_regions import face_region


def photo(size=(90, 70), mode="RGB"):
    """A smooth one, which survives being resampled twice."""
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [127 + 100 * np.sin(x / 9 + phase) * np.cos(y / 7 + phase) for phase in (0, 1, 2)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8)).convert(mode)


def placed_face(side, degrees, corner):
    """A face that lies in a photo just as those of UTKFace lie in their pictures, enlarged and turned."""
    turn = side * np.exp(1j * np.radians(degrees))
    points = np.array(UTKFACE.landmarks) @ [1, 1j] * turn + complex(*corner)
    left, top, right, bottom = np.array(UTKFACE.box) * side
    box = (left + corner[0], top + corner[1], right + corner[0], bottom + corner[1])
    return Face(box, 0.9, tuple((p.real, p.imag) for p in points))


@pytest.mark.parametrize("degrees", [0, 25, -70])
def test_landmarks_come_to_where_they_are_in_training(degrees):
    face = placed_face(40, degrees, (30, 20))
    region = face_region(face, UTKFACE)
    places = (np.array(face.landmarks) @ [1, 1j]) * region.turn + region.shift
    np.testing.assert_allclose(places, np.array(UTKFACE.landmarks) @ [1, 1j], atol=1e-9)
    assert region.side == 40


@pytest.mark.parametrize("degrees", [0, 25])
def test_cut_turns_the_face_upright(degrees):
    face = placed_face(40, degrees, (30, 14))
    region = face_region(face, UTKFACE)
    square = np.asarray(region.cut(photo()).convert("L"), float)
    # the square's pixel at each landmark is the photo's pixel there
    grey = np.asarray(photo().convert("L"), float)
    for (x, y), (u, v) in zip(face.landmarks, UTKFACE.landmarks, strict=True):
        assert abs(square[int(40 * v), int(40 * u)] - grey[int(y), int(x)]) < 16


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("degrees", [0, 25])
@pytest.mark.parametrize("corner", [(30, 14), (-15, 40), (70, 50)])
def test_pixels_outside_stay_bit_for_bit_and_what_is_pasted_lies_where_it_was(mode, degrees, corner):
    before = photo(mode=mode)
    region = face_region(placed_face(40, degrees, corner), UTKFACE)
    same = np.asarray(region.paste(before, region.cut(before)), int)
    assert np.abs(same - np.asarray(before, int)).max() <= 12  # resampled twice
    white = np.asarray(region.paste(before, Image.new(mode, (region.side,) * 2, "white")))
    rows, columns = region._inside(before.size)
    changed = np.zeros((70, 90), bool)
    changed[rows, columns] = region.weights(before.size) > 0
    assert changed.any()
    assert np.array_equal(white[~changed], np.asarray(before)[~changed])
    whole = np.zeros((70, 90), bool)
    whole[rows, columns] = region.weights(before.size) == 1
    assert (white[whole] == 255).all()


def test_eyes_nose_and_mouth_are_replaced_wholly():
    face = placed_face(60, 15, (20, 5))
    region = face_region(face, UTKFACE)
    rows, columns = region._inside((90, 70))
    weights = region.weights((90, 70))
    for x, y in face.landmarks:
        assert weights[int(y) - rows.start, int(x) - columns.start] == 1
    # what is blended in was generated: the edge of the one lies within the other
    assert np.asarray(region.generated())[30, 30] == 255
    assert np.asarray(region.generated())[0, 0] == 0


def test_landmarks_of_a_profile_do_not_bring_the_square_too_near():
    face = placed_face(40, 0, (20, 10))
    narrow = tuple((40 + 0.3 * (x - 40), y - 0.4 * (y - 30)) for x, y in face.landmarks)
    region = face_region(Face(face.box, 0.9, narrow), UTKFACE)
    assert region.side >= 40 / 1.15 - 1


def test_a_box_is_its_own_ellipse_and_its_corners_stay():
    region = face_region(Face((20, 10, 60, 30)), UTKFACE)
    assert region.turn.imag == 0
    rows, columns = region._inside((90, 70))
    weights = np.zeros((70, 90))
    weights[rows, columns] = region.weights((90, 70))
    found = np.nonzero(weights)
    assert [found[1].min(), found[1].max() + 1, found[0].min(), found[0].max() + 1] == [20, 60, 10, 30]
    assert weights[20, 40] == 1
    assert weights[10, 20] == weights[29, 59] == 0


def test_a_mask_is_kept_to_and_its_grey_is_blended():
    mask = np.zeros((70, 90), np.float32)
    mask[10:30, 20:50] = 1
    mask[20, 30] = 0.25
    region = face_region(Face((20, 10, 50, 30)), UTKFACE, mask)
    before = Image.new("L", (90, 70), 100)
    after = np.asarray(region.paste(before, Image.new("L", (region.side,) * 2, 200)))
    assert after[20, 30] == 125
    assert (after[mask == 1] == 200).all()
    assert (after[mask == 0] == 100).all()
    made = np.asarray(region.generated())
    assert set(np.unique(made)) == {0, 255}
    assert (made == 255).sum() >= 20 * 30
