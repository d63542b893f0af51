"""Photos and masks as users hand them over, the region a model sees, and the paste without a seam."""

import numpy as np
import pytest
import torch
from conftest import giant_png
from PIL import Image

from lediflow import UserError
from lediflow.pictures import to_float
from lediflow.pipelines.photos import (
    Region,
    covered,
    feathered,
    filled,
    largest_region,
    mask_tensor,
    open_photo,
    pasted,
    photo_tensor,
    region_around,
)


def noise(height, width, channels=3):
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return values[..., 0] if channels == 1 else values


# Images


def test_a_photo_is_the_same_as_picture_array_and_tensor():
    array = noise(5, 7)
    expected = torch.from_numpy(array).movedim(-1, 0)
    assert torch.equal(photo_tensor(array, 3), expected)
    assert torch.equal(photo_tensor(Image.fromarray(array), 3), expected)
    tensor = to_float(expected)
    assert torch.equal(photo_tensor(tensor, 3), tensor) and torch.equal(photo_tensor(tensor[None], 3), tensor)
    grey = photo_tensor(noise(5, 7, 1), 3)
    assert grey.shape == (3, 5, 7) and torch.equal(grey[0], grey[2])
    assert photo_tensor(array, 1).shape == photo_tensor(tensor, 1).shape == (1, 5, 7)
    clear = np.zeros((2, 2, 4), np.uint8)
    assert photo_tensor(clear, 3).eq(255).all(), "what is transparent lies on white"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("photo.png", "not str"),
        (torch.zeros(2, 3, 4, 4), r"not torch.float32 of \(2, 3, 4, 4\)"),
        (torch.zeros(4, 4, 4), "with C 1 or 3"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "not torch.uint8"),
        (torch.full((1, 4, 4), 2.0), r"values in \[-1, 1\]"),
        (torch.full((1, 4, 4), torch.nan), r"values in \[-1, 1\]"),
        (np.zeros((4, 4)), "not float64"),
        (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(UserError, match=message):
        photo_tensor(image, 3)


def test_animations_and_giants_are_refused(tmp_path):
    frames = [Image.new("L", (4, 4), 60 * i) for i in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    giant_png(tmp_path / "giant.png", 12_000)
    for name, message in (("moving.gif", "animated"), ("giant.png", "too large: 12000x12000")):
        with pytest.raises(UserError, match=message):
            open_photo(tmp_path / name)
        with Image.open(tmp_path / name) as picture, pytest.raises(UserError, match=message):
            photo_tensor(picture, 3)
    giant_png(tmp_path / "giant.png", 20_000)
    with pytest.raises(UserError, match="400000000 pixels. exceeds limit"):
        open_photo(tmp_path / "giant.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match=r"cannot use '.*text.png': not a picture"):
        open_photo(tmp_path / "text.png")


def test_a_file_is_opened_upright_at_its_full_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned
    Image.fromarray(noise(30, 50)).save(tmp_path / "a.jpg", exif=exif)
    assert open_photo(tmp_path / "a.jpg").size == (30, 50)


# Masks


def test_masks_of_all_kinds_say_the_same():
    values = np.zeros((4, 6), np.uint8)
    values[1:3, 2:4] = 255
    expected = torch.from_numpy(values).float()[None] / 255
    painted = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    painted.paste((255, 255, 255, 255), (2, 1, 4, 3))
    image = np.dstack([noise(4, 6), 255 - values])
    for mask in (
        values, values // 255, values > 0, values / 255, values[..., None], Image.fromarray(values),
        Image.fromarray(values).convert("1"), Image.fromarray(values).convert("RGB"), painted,
        torch.from_numpy(values), expected, expected[None], expected[0].bool(), "alpha",
    ):  # fmt: skip
        assert torch.equal(mask_tensor(mask, image, (4, 6)), expected), mask
    half = mask_tensor(np.full((4, 6), 51, np.uint8), image, (4, 6))
    torch.testing.assert_close(half, torch.full((1, 4, 6), 0.2))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((4, 5), np.uint8), "the mask is 5x4 pixels and the image 6x4"),
        (np.zeros((4, 6), np.uint8), "black everywhere"),
        (np.ones((4, 6, 3), np.uint8), "one channel"),
        (np.full((4, 6), 2.0), r"values in \[0, 1\]"),
        ("alpha", "no alpha channel"),
        ("beta", "not 'beta'"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_mask_is_refused(mask, message):
    with pytest.raises(UserError, match=message):
        mask_tensor(mask, noise(4, 6), (4, 6))


def test_a_feathered_mask_keeps_what_is_white_and_falls_off_outside():
    mask = torch.zeros(1, 1, 21)
    mask[..., 8:13] = 1
    soft = feathered(mask, 3)
    assert torch.equal(feathered(mask, 0), mask) and soft[..., 8:13].eq(1).all()
    assert (soft[0, 0, 2:8].diff() > 0).all() and soft[..., :2].eq(0).all()
    with pytest.raises(UserError, match="at least 0 pixels"):
        feathered(mask, -1)


def test_specks_of_jpeg_in_a_mask_are_black_and_white():
    values = np.array([[0, 8, 9, 246, 247, 255]], np.uint8)
    expected = torch.tensor([[[0, 0, 9 / 255, 246 / 255, 1, 1]]])
    torch.testing.assert_close(mask_tensor(Image.fromarray(values), None, (1, 6)), expected)


# The region


@pytest.mark.parametrize(
    ("box", "padding", "expected"),
    [
        ((10, 20, 14, 30), 0, Region(20, 7, 10, 10)),
        ((10, 20, 14, 30), 3, Region(17, 4, 16, 16)),
        ((10, 20, 14, 30), None, Region(5, 0, 40, 40)),
        ((30, 90, 40, 100), None, Region(60, 0, 40, 40)),
        ((36, 0, 40, 4), 2, Region(0, 32, 8, 8)),
        ((5, 10, 9, 90), 0, Region(10, -20, 80, 80)),
    ],
)
def test_the_region_is_of_the_models_aspect_around_the_mask_and_inside_where_it_can(box, padding, expected):
    top, left, bottom, right = box
    mask = torch.zeros(1, 40, 100)
    mask[:, top:bottom, left:right] = 1
    assert region_around(mask, padding, (16, 16)) == expected
    with pytest.raises(UserError, match="at least 0 pixels"):
        region_around(mask, -1, (16, 16))


def test_a_model_that_is_not_square_sees_its_own_aspect():
    mask = torch.zeros(1, 60, 60)
    mask[:, 20:30, 10:20] = 1
    assert region_around(mask, 0, (8, 16)) == Region(5, 20, 20, 10)
    assert region_around(mask, None, (8, 16)) == Region(0, 10, 60, 30)
    assert largest_region((60, 100), (8, 16)) == Region(0, 5, 100, 50)


def test_beyond_the_photo_it_is_mirrored():
    row = torch.arange(4.0).view(1, 1, 4)
    assert Region(-3, 0, 10, 1).cut(row)[0, 0].tolist() == [2, 1, 0, 0, 1, 2, 3, 3, 2, 1]


def test_a_cell_of_which_any_part_is_to_be_made_is_made():
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[0, 0, 3, 4] = True
    expected = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    expected[0, 0, 1, 2] = True
    assert torch.equal(covered(mask, (4, 4)), expected) and torch.equal(covered(mask, (8, 8)), mask)


# Filling and pasting


def test_what_is_filled_in_is_a_smooth_continuation():
    unknown = torch.zeros(1, 1, 17, 23, dtype=torch.bool)
    unknown[..., 4:12, 5:20] = True
    flat = torch.full((2, 3, 17, 23), 0.4)
    torch.testing.assert_close(filled(flat.masked_fill(unknown, torch.inf).nan_to_num(0, 0), unknown), flat)
    ramp = torch.linspace(-1, 1, 23).expand(1, 1, 17, 23)
    error = (filled(ramp.masked_fill(unknown, 0.0), unknown) - ramp).abs()
    assert error[~unknown].max() == 0 and error.max() < 0.35
    assert filled(ramp, torch.ones_like(unknown)).eq(0).all()


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_pasting_leaves_the_photo_where_the_mask_is_black_and_has_no_seam(kind):
    """What is made is darker all over: that difference is taken off, so the edge does not show."""
    photo = torch.full((3, 40, 60), 180, dtype=torch.uint8)
    photo[:, :3] = torch.randint(0, 256, (3, 3, 60), dtype=torch.uint8)
    photo = photo if kind is torch.uint8 else to_float(photo)
    mask = torch.zeros(1, 40, 60)
    mask[:, 15:25, 30:40] = 1
    mask[:, 14, 30:40] = 0.5
    made = torch.full((2, 3, 8, 8), to_float(torch.tensor(180.0)).item() - 0.3)
    made[1, :, 3:5, 3:5] += 0.2
    whole = pasted(photo, made, mask, Region(25, 10, 20, 20))
    assert whole.dtype == kind and whole.shape == (2, 3, 40, 60)
    black = (mask == 0).expand_as(photo)
    assert all(torch.equal(one[black], photo[black]) for one in whole)
    flat, other = (whole if kind is torch.float32 else to_float(whole)).unbind()
    assert (flat[:, 10:30] - flat[0, 20, 20]).abs().max() < 0.01
    assert (other - flat).abs().max() > 0.1


def test_a_grey_mask_is_a_blend():
    photo, made = torch.zeros(1, 4, 4), torch.ones(1, 1, 4, 4)
    mask = torch.full((1, 4, 4), 0.25)  # nothing is known of which a difference could be told
    torch.testing.assert_close(pasted(photo, made, mask, Region(0, 0, 4, 4)), torch.full((1, 1, 4, 4), 0.25))
