import json

import pytest
from conftest import giant_png
from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo

from lediflow.app import create
from lediflow.app.limits import Limits
from lediflow.app.session import Session
from lediflow.errors import UserError
from lediflow.pipelines.recipes import read_recipe


def same(a, b):
    return a.size == b.size and ImageChops.difference(a.convert("L"), b.convert("L")).getbbox() is None


def test_pictures_come_in_batches_and_are_those_of_the_pipeline(app_models, app_session, app_limits):
    told = list(create.create(app_models, app_session, app_limits, {"seed": 5, "count": 19, "steps": 1}))
    assert [len(progress.done) for progress in told] == [8, 16, 19]
    whole = app_models.pipeline(19, seed=5, steps=1, batch_size=create.BATCH)
    for kept, image in zip(told[-1].done, whole.images, strict=True):
        assert same(Image.open(kept.path), image)
    assert told[-1].nfe == whole.nfe
    assert "19 pictures" in told[-1].text() and "16 of 19" in told[1].text()
    assert app_session.kept == told[-1].done


def test_every_picture_says_how_it_is_made_again(app_models, app_session, app_limits):
    asked = {"seed": 5, "count": 9, "solver": "euler", "steps": 3}
    *_, last = create.create(app_models, app_session, app_limits, asked)
    kept = last.done[8]
    recipe = read_recipe(kept.path)
    assert same(recipe.make(app_models.pipeline).images[recipe.image], Image.open(kept.path))
    found, restored = create.restore(app_models, app_limits, kept.path)
    assert found == recipe
    assert {name: restored[name] for name in asked} == asked
    assert "--solver euler --steps 3" in create.described(kept)


def test_one_that_is_stopped_keeps_what_is_done(app_models, app_session, app_limits):
    request = create.create(app_models, app_session, app_limits, {"seed": 1, "count": 32})
    next(request)
    request.close()
    assert len(app_session.kept) == create.BATCH
    assert all(kept.path.exists() for kept in app_session.kept)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"seed": 1, "count": 65}, "from 1 to 64, not 65"),
        ({"seed": 1, "count": 0}, "from 1 to 64"),
        ({"seed": -1, "count": 1}, "the seed must be from 0"),
        ({"seed": 1.5, "count": 1}, "the seed must be a whole number"),
        ({"seed": float("nan"), "count": 1}, "whole number"),
        ({"seed": None, "count": 1}, "whole number"),
        ({"seed": 1, "count": 1, "steps": 1000}, "from 1 to 64, not 1,000"),
        ({"seed": 1, "count": 1, "solver": "magic"}, "unknown solver"),
        ({"seed": 1, "count": 1, "class_labels": "cat"}, "no such class"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(app_models, app_session, app_limits, asked, sentence):
    with pytest.raises(UserError, match=sentence):
        next(create.create(app_models, app_session, app_limits, asked))
    assert app_session.kept == []


def test_restoring_what_is_no_picture_of_ours(app_models, app_session, app_limits, tmp_path, photo):
    text = tmp_path / "words.png"
    text.write_text("no picture")
    giant = tmp_path / "giant.png"
    giant_png(giant, 20_000)
    for path, sentence in (
        (None, "choose a picture first"),
        (text, "'words.png' cannot be used: not a picture"),
        (giant, "far too large, and at most 16 million pixels"),
        (photo, "does not say how it was made"),
    ):
        with pytest.raises(UserError, match=sentence) as error:
            create.restore(app_models, app_limits, path)
        assert str(tmp_path) not in str(error.value)  # where files lie is nobody's business


def forged(path, recipe, **changed):
    """A PNG that says of itself what anybody may have written."""
    from dataclasses import asdict

    values = {**asdict(recipe), **changed}
    text = PngInfo()
    text.add_itxt("lediflow", json.dumps(values))
    Image.new("L", (16, 16)).save(path, pnginfo=text)
    return path


def test_restoring_what_was_forged_or_of_another_model(app_models, app_session, app_limits, tmp_path):
    *_, last = create.create(app_models, app_session, app_limits, {"seed": 5, "count": 1})
    recipe = last.done[0].recipe
    settings = dict(recipe.settings)
    for changed, sentence in (
        ({"weights": "x"}, "by a model with other weights"),
        ({"tool": "vary"}, "not made on the tab Create but by vary"),
        ({"settings": {**settings, "seed": "x"}}, "cannot be restored"),
        ({"settings": {**settings, "steps": 10**9}}, "cannot be restored"),
        ({"settings": {**settings, "num_images": None}}, "cannot be restored"),
        ({"settings": {}}, "cannot be restored"),
        ({"settings": {**settings, "solver": ["euler"]}}, "cannot be restored"),
        ({"settings": {**settings, "class_labels": {"a": 1}}}, "cannot be restored"),
        ({"settings": {**settings, "cluster": "x"}}, "cannot be restored"),
    ):
        path = forged(tmp_path / "forged.png", recipe, **changed)
        with pytest.raises(UserError, match=sentence):
            create.restore(app_models, app_limits, path)


def test_a_session_forgets_its_oldest_pictures_and_leaves_nothing(tmp_path):
    session = Session(tmp_path, most=3)
    made = [session.keep(Image.new("L", (4, 4)), None, str(i)) for i in range(5)]
    assert [kept.caption for kept in session.kept] == ["2", "3", "4"]
    assert [kept.path.exists() for kept in made] == [False, False, True, True, True]
    session.close()
    assert list(tmp_path.iterdir()) == []


def test_limits_are_those_of_the_page(app_models, app_session):
    with pytest.raises(UserError, match="from 1 to 2, not 3"):
        next(create.create(app_models, app_session, Limits(pictures=2), {"seed": 0, "count": 3}))


def test_words_are_asked_for_where_a_model_takes_them(app_models, app_limits, monkeypatch):
    asked = {"seed": 0, "count": 1, "prompt": " red heart "}
    assert "prompt" not in create.request_of(app_models, app_limits, asked)
    monkeypatch.setattr(type(app_models), "takes_text", True)
    assert create.request_of(app_models, app_limits, asked)["prompt"] == "red heart"
    assert create.request_of(app_models, app_limits, {**asked, "prompt": " "})["prompt"] is None
    with pytest.raises(UserError, match="longer than 500 letters"):
        create.request_of(app_models, app_limits, {**asked, "prompt": "a" * 501})


def test_rolled_seeds_differ():
    assert len({create.roll() for _ in range(20)}) > 10
