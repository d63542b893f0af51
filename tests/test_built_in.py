"""Models that come with the package."""

import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image, ImageDraw

from lediflow import LeDiFlowPipeline, models
from lediflow.errors import UserError
from lediflow.metrics.pairs import psnr
from lediflow.pictures import to_float
from lediflow.pipelines.load import load_pipeline, load_upsampler


@pytest.fixture
def packaged(tiny_run, tmp_path, monkeypatch):
    """The tiny run's pipeline as a model of the package, and another folder to work in."""
    monkeypatch.setattr(models, "FOLDER", tmp_path / "models")
    shutil.copytree(tiny_run / "pipeline", tmp_path / "models" / "tiny")
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path


def made(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(2, seed=1, output_type="pt").images


def test_a_built_in_name_loads_as_its_folder_does(packaged, tiny_run):
    expected = made(load_pipeline(tiny_run))
    assert torch.equal(made(load_pipeline("tiny")), expected)
    assert torch.equal(made(LeDiFlowPipeline.from_pretrained("tiny")), expected)


def test_a_folder_with_a_pipeline_goes_before_and_another_does_not(packaged):
    (packaged / "desk" / "tiny").mkdir()  # of pictures, say
    assert models.built_in("tiny") == packaged / "models" / "tiny"
    (packaged / "desk" / "tiny" / "model_index.json").write_text("{}")
    assert models.built_in("tiny") is None


def test_an_unknown_name_tells_which_there_are(packaged):
    with pytest.raises(UserError, match=r"no model tinny.* comes with lediflow \(tiny\)"):
        load_pipeline("tinny")


# The model that ships


@pytest.fixture(scope="module")
def emoji():
    pipeline = load_pipeline("emoji")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_emoji_answers_in_one_evaluation_of_each_network(emoji):
    out = emoji(4, seed=0, output_type="pt")
    assert out.nfe == {"sampler": 1, "decoder": 1, "flow": 1}
    assert out.images.shape == (4, 3, 32, 32)
    corners = out.images[..., [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() > 0.7, "drawings stand on white"
    assert out.images.std() > 0.2, "and are no blank sheets"


def test_emoji_follows_words(emoji):
    """The mean colour of hearts that are said to be red and blue."""
    hearts = [emoji(16, seed=0, prompt=f"{word} heart", output_type="pt").images for word in ("red", "blue")]
    warmth = [(images[:, 0] - images[:, 2]).mean() for images in hearts]
    assert warmth[0] > warmth[1] + 0.1


@pytest.mark.parametrize(
    ("name", "command", "most"),
    [("emoji", "lediflow train emoji-32", 15e6), ("emoji-x4", "lediflow train upsample-emoji", 3e6)],
)
def test_a_model_that_ships_has_its_card_and_is_small(name, command, most):
    folder = models.FOLDER / name
    card = (folder / "README.md").read_text(encoding="utf-8")
    sets = ("Noto Emoji", "Fluent Emoji", "Firefox OS Emoji")
    for told in (*sets, "Apache-2.0", "MIT", command):
        assert told in card
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= most
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".py")]


def smiley(side):
    """A face as emoji have it, drawn large and made small."""
    picture = Image.new("RGB", (1024, 1024), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((80, 80, 944, 944), fill=(255, 204, 50))
    for x in (300, 620):
        draw.ellipse((x, 330, x + 100, 480), fill=(90, 60, 20))
    draw.arc((280, 360, 744, 780), 20, 160, fill=(90, 60, 20), width=40)
    return picture.resize((side, side), Image.Resampling.BOX)


def test_the_emoji_upsampler_enlarges_in_one_evaluation_and_better_than_a_filter():
    def tensor(image):
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return to_float(pixels.view(1, 128, 128, 3).movedim(-1, 1))

    pipeline = load_upsampler("emoji-x4")
    pipeline.set_progress_bar_config(disable=True)
    real, low = smiley(128), smiley(32)
    out = pipeline(low, seed=0)
    assert out.nfe == {"flow": 1, "prior": 1}
    assert out.images[0].size == (128, 128)
    bicubic = low.resize((128, 128), Image.Resampling.BICUBIC)
    decibels = [float(psnr(tensor(image), tensor(real))) for image in (out.images[0], bicubic)]
    assert decibels[0] > decibels[1] + 1


@pytest.mark.parametrize(
    ("kind", "name"), [("LeDiFlowPipeline", "emoji"), ("FlowUpsamplePipeline", "emoji-x4")]
)
def test_a_fresh_interpreter_loads_a_model_by_its_name(kind, name):
    """Diffusers loads networks of modules that are imported already; here nothing else imports them."""
    code = f"from lediflow import {kind}; {kind}.from_pretrained({name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
