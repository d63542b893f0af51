"""Training and sampling in a codec's latents, and what does not fit together."""

import json
import shutil

import pytest
import torch
from conftest import FIRST_STAGES, TINY, digits_data, tiny_codec_settings, weights

from lediflow import FlowMatchingPipeline, LeDiFlowPipeline, load_pipeline
from lediflow.codecs import CodecSpace
from lediflow.errors import UserError
from lediflow.training.config import load_config
from lediflow.training.run import train


@pytest.fixture(scope="module")
def latent_run(tiny_codec, tiny_latents, tmp_path_factory):
    config = load_config("digits", tiny_codec_settings(tiny_codec, tiny_latents))
    return train(config, tmp_path_factory.mktemp("runs") / "latent", device="cpu")


def test_a_latent_run_samples_images_through_the_codec(latent_run, tiny_codec, tiny_latents):
    pipe = load_pipeline(latent_run)
    assert isinstance(pipe, LeDiFlowPipeline) and pipe.vae is None
    assert not (latent_run / "pipeline" / "vae").exists()
    latents = pipe(3, steps=1, latent_steps=1, output_type="latent")
    assert pipe.vae is None, "latents need no codec"
    assert latents.images.shape == (3, 4, 8, 8) and "codec" not in latents.nfe
    out = pipe(3, steps=1, latent_steps=1, output_type="pt")
    assert out.nfe == {"sampler": 2, "decoder": 1, "flow": 2, "codec": 1}
    assert out.images.shape == (3, 3, 16, 16) and out.images.abs().max() <= 1
    space = CodecSpace.from_dict(json.loads((tiny_latents / "latents.json").read_text()))
    torch.testing.assert_close(out.images, space.load_codec().decode(latents.images))
    assert pipe(2).images[0].size == (16, 16)
    baseline = load_pipeline(latent_run / "baseline")
    assert isinstance(baseline, FlowMatchingPipeline)
    assert baseline(2, steps=1).nfe == {"flow": 2, "codec": 1}


def test_a_saved_pipeline_with_its_codec_needs_nothing_else(latent_run, tiny_codec, tmp_path):
    pipe = load_pipeline(latent_run)
    wanted = pipe(2, output_type="pt").images
    pipe.save_pretrained(tmp_path / "whole")
    index = json.loads((tmp_path / "whole" / "model_index.json").read_text())
    index["codec_space"]["codec"] = str(tmp_path / "gone")
    (tmp_path / "whole" / "model_index.json").write_text(json.dumps(index))
    again = load_pipeline(tmp_path / "whole")
    assert again.vae is not None
    torch.testing.assert_close(again(2, output_type="pt").images, wanted)


def test_a_codec_that_is_gone_or_another_is_named_with_the_way_out(
    latent_run, tiny_codec, tiny_run, tmp_path
):
    folder = shutil.copytree(latent_run / "pipeline", tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    index["codec_space"]["codec"] = str(tmp_path / "gone")
    (folder / "model_index.json").write_text(json.dumps(index))
    pipe = load_pipeline(folder)
    with pytest.raises(UserError, match=r"no codec .*gone.*--codec or load_codec\(FOLDER\), or .*'latent'"):
        pipe(1)
    pipe.load_codec(tiny_codec)
    assert pipe(1, output_type="pt").images.shape == (1, 3, 16, 16)
    other = shutil.copytree(tiny_codec / "vae", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "scaling_factor": 1.0}))
    with pytest.raises(UserError, match="is not the one that this model's latents were made with"):
        pipe.load_codec(other)
    with pytest.raises(UserError, match="makes pixels; it has no codec"):
        load_pipeline(tiny_run).load_codec(tiny_codec)


def test_a_resumed_latent_run_has_the_weights_of_one_that_never_stopped(
    latent_run, tiny_codec, tiny_latents, tmp_path
):
    settings = tiny_codec_settings(tiny_codec, tiny_latents)
    half = [f"training.{stage}.steps=3" for stage in FIRST_STAGES]
    train(load_config("digits", settings + half), tmp_path / "run", device="cpu", stages=["auxiliary"])
    train(load_config("digits", settings), tmp_path / "run", device="cpu")
    for stage in FIRST_STAGES:
        left, right = weights(latent_run, stage), weights(tmp_path / "run", stage)
        assert all(torch.equal(left[name], right[name]) for name in left), stage


def test_other_latents_are_not_trained_on_by_mistake(latent_run, tiny_codec, tiny_latents, tmp_path):
    run = shutil.copytree(latent_run, tmp_path / "run")
    other = shutil.copytree(tiny_latents, tmp_path / "other")
    meta = json.loads((other / "latents.json").read_text())
    (other / "latents.json").write_text(json.dumps({**meta, "std": [2.0] * 4}))
    longer = [*tiny_codec_settings(tiny_codec, other), "training.baseline.steps=8"]
    with pytest.raises(UserError, match="was trained on other latents than those in .*other"):
        train(load_config("digits", longer), run, device="cpu", stages=["baseline"])
    train(load_config("digits", longer), tmp_path / "fresh", device="cpu", stages=["baseline"])
    assert json.loads((tmp_path / "fresh" / "codec_space.json").read_text())["std"] == [2.0] * 4


def test_what_does_not_fit_the_config_is_refused_by_name(tiny_codec, tiny_latents, tmp_path):
    settings = tiny_codec_settings(tiny_codec, tiny_latents)

    def refused(overrides, message):
        with pytest.raises(UserError, match=message):
            train(load_config("digits", overrides), tmp_path / "run", device="cpu")
        assert not (tmp_path / "run").exists()

    refused(
        [*settings, "data.train=digits"],
        f"(?s)not on images.*lediflow encode digits --codec {tiny_codec} --image-size 16 --output latents",
    )
    refused([*TINY, f"data.train={str(tiny_latents)!r}"], "this config trains on pixels")
    refused([*settings, "codec.model=owner/vae"], f"codec {tiny_codec}, not owner/vae")
    refused([*settings, "data.image_size=32", "auxiliary.z_size=8"], "image size 16, not 32")
    refused([*settings, "codec.channels=8"], "channels 4, not 8")
    refused([*settings, "data.crop=random"], "data.crop=random does not work on latents")
    refused([*settings, "data.streaming=true"], "data.streaming=true does not work on latents")


def test_training_on_a_stream(tmp_path):
    """Stages that cannot keep what they encode, statistics from a pass, previews from the head."""
    config = load_config("digits", [*TINY, "data.streaming=true", "data.shuffle_block=100"])
    run = train(config, tmp_path / "run", device="cpu")
    assert (run / "pipeline" / "model_index.json").is_file()
    auxiliary = load_pipeline(run).auxiliary
    with torch.no_grad():
        z = auxiliary.encode(digits_data(split="train").first(2000)).mean
    torch.testing.assert_close(auxiliary.z_mean, z.mean((0, 2, 3), keepdim=True), rtol=1e-3, atol=1e-4)
    assert (auxiliary.z_std != 1).all()
    again = train(config, tmp_path / "again", device="cpu", stages=["auxiliary"])
    left, right = weights(run, "auxiliary"), weights(again, "auxiliary")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_what_was_left_out_is_listed_in_the_run_folder(tmp_path):
    from PIL import Image

    (tmp_path / "set").mkdir()
    for n in range(4):
        Image.new("RGB", (16, 16), (60 * n, 0, 0)).save(tmp_path / "set" / f"{n}.png")
    (tmp_path / "set" / "bad.png").write_bytes(b"no picture")
    config = load_config("digits", [*TINY, f"data.train={str(tmp_path / 'set')!r}", "data.channels=3"])
    with pytest.warns(UserWarning, match="bad.png"):
        run = train(config, tmp_path / "run", device="cpu", stages=["baseline"])
    assert (run / "broken-images.txt").read_text().endswith("bad.png\tnot a picture\n")
