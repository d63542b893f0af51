import io

import numpy as np
import pytest
from conftest import giant_png
from PIL import Image

from lediflow.app import edit, uploads
from lediflow.app.limits import Limits
from lediflow.errors import UserError
from lediflow.faces import Face


def layer(size, box=None):
    """The bytes of a transparent layer with a painted box."""
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    if box:
        picture.paste((229, 72, 77, 255), box)
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def test_a_mask_is_the_first_layers_alpha_at_the_pictures_size():
    painted = {"layers": [layer((80, 60), (20, 10, 60, 30)), layer((80, 60), (0, 0, 80, 60))]}
    mask = np.asarray(uploads.painted_mask(painted, (160, 120)))  # the editor showed it at half of its size
    wanted = np.zeros((120, 160), np.uint8)
    wanted[20:60, 40:120] = 255
    assert np.array_equal(mask, wanted)


@pytest.mark.parametrize(
    "painted", [None, {}, {"layers": []}, {"layers": None}, {"layers": [None]}, {"layers": [layer((8, 8))]}]
)
def test_nothing_painted_is_said(painted):
    with pytest.raises(UserError, match="nothing is painted"):
        uploads.painted_mask(painted, (8, 8))


def test_paint_that_is_no_picture_or_a_bomb_is_refused(tmp_path):
    giant_png(tmp_path / "giant.png", 20_000)
    for data in (b"words", (tmp_path / "giant.png").read_bytes()):
        with pytest.raises(UserError, match="did not arrive whole"):
            uploads.painted_mask({"layers": [data]}, (8, 8))


def test_inpainting_leaves_all_other_pixels_bit_for_bit(app_models, app_session, app_limits, photo):
    mask = Image.new("L", (40, 30), 0)
    mask.paste(255, (10, 5, 25, 20))
    edited = edit.inpaint(app_models, app_session, app_limits, str(photo), mask, count=2)
    before = np.asarray(Image.open(photo).convert("L"))
    outside = np.asarray(mask) == 0
    assert len(edited.made) == 2
    for kept in edited.made:
        after = np.asarray(Image.open(kept.path))
        assert np.array_equal(after[outside], before[outside])
        assert (after[~outside] != before[~outside]).any()
    recipe = edited.made[0].recipe
    assert recipe.inputs[0]["path"] == "photo.png" and recipe.mask["path"].endswith(".png")
    assert "/" not in recipe.mask["path"]  # where it lay is not told


def test_restyling_with_strength_0_leaves_the_picture(app_models, app_session, app_limits):
    kept = app_session.keep(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)), None, "")
    edited = edit.restyle(app_models, app_session, app_limits, str(kept.path), strength=0.0, count=1)
    assert np.array_equal(np.asarray(Image.open(edited.made[0].path)), np.asarray(Image.open(kept.path)))


def test_only_the_chosen_faces_change(app_models, app_session, app_limits, photo):
    faces = [Face((2, 2, 14, 14)), Face((22, 12, 36, 26))]
    assert edit.face_names(faces) == ["face 1", "face 2"]
    edited = edit.anonymize(app_models, app_session, app_limits, str(photo), faces, ["face 2"])
    before, after = np.asarray(Image.open(photo)), np.asarray(Image.open(edited.made[0].path))
    assert np.array_equal(after[:, :18], before[:, :18])
    assert (after[12:26, 22:36] != before[12:26, 22:36]).any()
    assert set(Image.open(edited.made[0].path).text) == {"Software", "Description"}  # and no seed
    with pytest.raises(UserError, match="no face is switched on"):
        edit.anonymize(app_models, app_session, app_limits, str(photo), faces, [])
    assert edit.box_inside(Face((-3.4, 2.2, 50, 9.6)), (40, 30)) == (0, 2, 40, 10)


@pytest.mark.parametrize("bad", ["words", "giant", "animated", "empty"])
def test_bad_pictures_have_a_sentence_each(app_models, app_session, app_limits, tmp_path, bad):
    path = tmp_path / f"{bad}.png"
    if bad == "words":
        path.write_text("no picture")
    elif bad == "giant":
        giant_png(path, 20_000)
    elif bad == "animated":
        frames = [Image.new("L", (8, 8), i) for i in range(3)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    else:
        path.touch()
    sentence = {"words": "not a picture", "giant": "at most 16 million", "animated": "it is animated",
                "empty": "not a picture"}[bad]  # fmt: skip
    for tool in (edit.restyle, lambda *given: edit.inpaint(*given, Image.new("L", (8, 8), 255))):
        with pytest.raises(UserError, match=sentence) as error:
            tool(app_models, app_session, app_limits, str(path))
        assert f"{bad}.png" in str(error.value) and str(tmp_path) not in str(error.value)


def test_too_many_variants_are_refused(app_models, app_session, photo):
    with pytest.raises(UserError, match="from 1 to 2, not 3"):
        edit.restyle(app_models, app_session, Limits(variants=2), str(photo), count=3)


@pytest.mark.parametrize(
    ("size", "shown"), [((16, 16), (512, 512)), ((600, 20), (600, 20)), ((4000, 2000), (1024, 512))]
)
def test_what_is_painted_on_has_a_size_to_paint_on(size, shown):
    assert uploads.to_paint_on(Image.new("RGB", size)).size == shown
