import pytest
from PIL import Image, ImageChops

from lediflow.app import create, explore
from lediflow.errors import UserError


def same(a, b):
    return ImageChops.difference(a, b).getbbox() is None


@pytest.mark.parametrize("end", ["seed", "picture"])
def test_a_place_on_the_way_is_that_of_interpolate(app_models, app_limits, photo, end, monkeypatch):
    monkeypatch.setattr(explore, "STOPS", 5)
    ends = (3, 4 if end == "seed" else str(photo))
    way = explore.way_between(app_models, app_limits, ends)
    settings = {**way.settings, "dtype": None}
    other = 4 if end == "seed" else Image.open(photo)
    whole = app_models.pipeline.interpolate(3, other, **settings)
    for stop in (0, 3, 4):
        image, nfe, _ = way.at(stop)
        assert same(image, whole.images[stop])
        assert nfe["flow"] == whole.nfe["flow"] and nfe["sampler"] == whole.nfe["sampler"]
    recipe = way.recipe(3)
    assert recipe.image == 3 and recipe.settings["num_images"] == explore.STOPS


def test_a_model_of_one_evaluation_takes_one_a_move(tiny_mean_run, app_limits):
    from lediflow.app.models import Models

    models = Models.load(str(tiny_mean_run), device="cpu")
    _, nfe, _ = explore.way_between(models, app_limits, (1, 2)).at(50)
    assert nfe == {"sampler": 1, "decoder": 1, "flow": 1}


def test_variations_lie_around_their_centre_and_say_how_they_were_made(app_models, app_session, app_limits):
    centre = explore.first_picture(app_models, app_session, app_limits, 7)
    kept, nfe, _ = explore.vary(app_models, app_session, app_limits, centre, strength=0.5, seed=3)
    assert len(kept) == explore.AROUND and nfe["flow"] > 0
    grid = explore.centred(centre, kept)
    assert grid[4] == (centre, "the centre") and [cell[0] for cell in grid[:4]] == [
        str(one.path) for one in kept[:4]
    ]
    whole = app_models.pipeline.vary(Image.open(centre), 0.5, num_images=8, seed=3, batch_size=8)
    assert all(same(Image.open(one.path), image) for one, image in zip(kept, whole.images, strict=True))
    assert kept[2].recipe.inputs[0]["path"] == "lediflow-sample-00000.png"
    with pytest.raises(UserError, match="made on the tab Create but by vary"):
        create.restore(app_models, app_limits, kept[0].path)


def test_plain_flow_matching_has_no_way(app_models, app_limits):
    from lediflow.app.models import Models

    plain = Models("plain", app_models.baseline, "")
    with pytest.raises(UserError, match="plain flow matching and has no latent z"):
        explore.way_between(plain, app_limits, (1, 2))


def test_a_picture_is_not_written_again_while_another_visitor_is_sent_it(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    from lediflow.app.components import picture_shown

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    drawing = Image.new("RGB", (8, 8), "red")
    path = picture_shown(drawing)
    assert same(Image.open(path), drawing)
    assert picture_shown(Image.new("RGB", (4, 16), "red")) != path  # the same bytes in another shape
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", None)
        assert picture_shown(drawing.copy()) == path
