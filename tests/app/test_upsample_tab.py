"""The tab *Upsample*, with the upsampler that comes with the package."""

from dataclasses import replace

import pytest
from PIL import Image

from lediflow.app import upsample
from lediflow.app.limits import Limits
from lediflow.app.models import Models
from lediflow.cli import browser
from lediflow.errors import UserError
from lediflow.networks.velocity import VelocityTransformer
from lediflow.pipelines.upsample import FlowUpsamplePipeline


@pytest.fixture(scope="module")
def models(tiny_run):
    return Models.load(str(tiny_run), upsampler=browser.UPSAMPLER, device="cpu")


@pytest.fixture
def drawing(tmp_path):
    path = tmp_path / "drawing.png"
    Image.new("RGB", (20, 12), "orange").save(path)
    return path


def test_a_picture_is_enlarged_as_the_pipeline_does(models, app_session, app_limits, drawing):
    edited = upsample.enlarge(models, app_session, app_limits, str(drawing), steps=1, seed=3)
    (kept,) = edited.made
    expected = models.upsampler(Image.open(drawing), 1, seed=3).images[0]
    assert Image.open(kept.path).tobytes() == expected.tobytes()
    assert expected.size == (80, 48) and edited.nfe == {"flow": 1, "prior": 1}


def test_a_grey_model_takes_a_photo_in_colour(models, app_session, app_limits, photo):
    network = VelocityTransformer(
        16, 1, 2, (16,), (1,), d_head=8, mapping_width=16, mapping_depth=1,
        conditions={
            "image": {"embedder": "grid", "channels": 1, "size": 16},
            "noise_level": {"embedder": "scalar"},
        },
    )  # fmt: skip
    grey = replace(models, upsampler=FlowUpsamplePipeline(network, scale=4))
    edited = upsample.enlarge(grey, app_session, app_limits, str(photo), steps=2, seed=0)
    assert Image.open(edited.made[0].path).size == (160, 120)


def test_what_cannot_be_enlarged_is_said_in_a_sentence(app_models, models, app_session, app_limits, drawing):
    def refused(which, limits, path, sentence, **asked):
        with pytest.raises(UserError, match=sentence):
            upsample.enlarge(which, app_session, limits, path, **{"steps": 1, "seed": 0, **asked})

    refused(app_models, app_limits, str(drawing), "start it with --upsampler")
    refused(models, Limits(made_pixels=1000), str(drawing), "would be 80 x 48 pixels")
    refused(models, app_limits, None, "choose a picture first")
    refused(models, app_limits, str(drawing), "from 1 to 64, not 65", steps=65)
    words = drawing.with_name("words.png")
    words.write_text("no picture")
    refused(models, app_limits, str(words), "not a picture")
    assert app_session.kept == []


def test_the_page_of_the_emoji_has_the_tab_and_that_of_another_model_has_not(monkeypatch, lediflow):
    asked = []

    def load(model, **options):
        asked.append((model, options["upsampler"]))
        raise UserError("enough")

    monkeypatch.setattr(Models, "load", load)
    for arguments in (["app"], ["app", "runs/mine"], ["app", "runs/mine", "--upsampler", "runs/x4"]):
        lediflow(*arguments)
    assert asked == [("emoji", "emoji-x4"), ("runs/mine", None), ("runs/mine", "runs/x4")]
