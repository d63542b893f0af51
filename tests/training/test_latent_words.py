"""Texts beside latents: kept by `lediflow encode`, looked up in training."""

import json

import pytest
import torch
from conftest import CPU, random_network, refused, step_noise, tiny_codec_settings
from tiny_texts import write_clip

from lediflow.codecs import Codec
from lediflow.data.batches import batches
from lediflow.data.codec_latents import CodecLatents
from lediflow.data.encode import encode
from lediflow.data.images import ImageData
from lediflow.data.listing import open_dataset
from lediflow.errors import UserError
from lediflow.training import texts
from lediflow.training.builders import build_stage
from lediflow.training.config import load_config
from lediflow.training.couplings import Context
from lediflow.training.inputs import open_data
from lediflow.training.processes import make_accelerator
from lediflow.training.run import train

NAMES = ("a", "c", "t", "cat", "act", "a cat", "tact", "a t", "c a t", "at")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """The held-out digits with a broken picture among them; each has the words of its class, one has none."""
    rows = open_dataset("digits", "validation")
    said = [None, *(NAMES[label] for label in rows["label"][1:])]
    folder = tmp_path_factory.mktemp("named")
    rows = rows.add_column("words", said).select(range(60))
    table = rows.to_pandas()
    table.at[7, "image"] = {"bytes": b"no picture", "path": "broken.png"}
    table.to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def latents(named, tiny_codec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "named"
    codec = Codec.load(tiny_codec)
    encode(str(named), codec, folder, image_size=16, text="words", shard_size=25, batch_size=10)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("encoders") / "tiny-clip")


def settings_of(codec, latents, clip, *more):
    told = [f"text.encoder={clip}", "text.column=words", "text.max_length=6"]
    return [*tiny_codec_settings(codec, latents), *told, *more]


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_latents_have_the_texts_of_their_images(named, latents, cache_gb):
    opened = CodecLatents(str(latents), cache_gb=cache_gb)
    assert opened.meta["text"] == "words"
    images = ImageData(str(named), image_size=16, texts=("words",))
    assert len(opened) == len(images) == 59, "the broken picture is left out, and its text with it"
    assert list(opened.texts) == list(images.texts)
    assert opened.texts[0] == "" and set(opened.texts[1:]) <= set(NAMES)


def test_a_batch_tells_what_the_encoder_makes_of_its_texts(tiny_codec, latents, clip):
    config = load_config("digits", settings_of(tiny_codec, latents, clip))
    accelerator = make_accelerator(config.training, "cpu")
    config, encoder = texts.settle_text(config, accelerator)
    model = encoder.model
    data = open_data(config)
    encoded = encoder.encode(config, data.texts, accelerator)
    context = Context(config, data, CPU, lambda stage: random_network(config, stage), encoded)
    stage = build_stage("sampler", context)
    batch = next(batches(data, batch_size=8, seed=0, stop=1))
    _, told = stage.coupling.targets(batch, step_noise())
    said = [data.texts[i] for i in batch["index"].tolist()]
    assert torch.equal(told["text"], model.encode(said, 6, tokens=False))


def test_a_model_in_latents_is_trained_on_words_and_asked_by_them(
    lediflow, tiny_codec, latents, clip, tmp_path
):
    config = load_config("digits", settings_of(tiny_codec, latents, clip))
    run = train(config, tmp_path / "run", device="cpu", stages=["auxiliary", "flow", "sampler"])
    card = (run / "README.md").read_text()
    assert f"frozen text encoder `{clip.name}`" in card and str(clip.parent) not in card
    assert json.loads((run / texts.RECORD).read_text())["fingerprint"] in card
    made = lediflow("sample", run, "-n", 2, "--prompt", "a cat", "--json", "-o", tmp_path / "made")
    assert json.loads(made.stdout)["prompt"] == ["a cat"]


def test_texts_that_are_not_there_are_asked_for(tiny_codec, tiny_latents, latents, clip):
    with pytest.raises(UserError, match="(?s)hold no texts; encode the images with.*--text words"):
        open_data(load_config("digits", settings_of(tiny_codec, tiny_latents, clip)))
    other = settings_of(tiny_codec, latents, clip, "text.column=caption")
    with pytest.raises(UserError, match="(?s)hold the texts of column words; .*--text caption"):
        open_data(load_config("digits", other))


def test_the_command_keeps_texts(lediflow, named, tiny_codec, tmp_path):
    out = tmp_path / "out"
    asked = ("encode", named, "--codec", tiny_codec, "--image-size", 16, "--output", out)
    done = lediflow(*asked, "--text", "words", "--json")
    assert json.loads(done.stdout)["text"] == "words"
    refused(lediflow(*asked), "another encoding (text: words there")
    refused(
        lediflow(*asked[:-1], tmp_path / "x", "--text", "caption"),
        "no column caption of texts",
    )


def test_an_evaluation_takes_the_encoder_from_elsewhere(lediflow, tiny_run, clip, tmp_path):
    asked = ("--data", "digits", "--text-encoder", clip, "-o", tmp_path / "e")
    refused(lediflow("evaluate", tiny_run, *asked), "reads no prompts")
