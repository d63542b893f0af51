"""The upsampler's couplings and objectives, against their definitions, in pixels and in latents."""

import math

import pytest
import torch
from conftest import CPU, TINY, batch_of, context_of, random_network, randomized, stage_of, step_noise
from torch.nn.functional import avg_pool2d, interpolate

from lediflow import flow
from lediflow.codecs import Codec
from lediflow.data.batches import batches
from lediflow.data.codec_latents import CodecLatents
from lediflow.data.encode import encode
from lediflow.data.encoded_images import EncodedImages
from lediflow.data.images import ImageData
from lediflow.errors import UserError
from lediflow.sources import BatchNoise
from lediflow.training.config import load_config
from lediflow.training.couplings import COUPLINGS
from lediflow.training.inputs import open_data
from lediflow.training.run import train
from lediflow.training.upsampled import blurred, compressed
from lediflow.training.upsampling_objectives import ddim, ddim_scheduler
from lediflow.upsampling import shrunk, signal_share

STAGE = {
    "upsampled": "upsampler",
    "upsampled-gaussian": "upsampler-gaussian",
    "upsampled-plain": "upsampler-regression",
    "upsampled-learned": "upsampler-learned",
}


def pairs_of(digits, name="upsampled", *settings, count=8, noise=None):
    context = context_of(digits, *(f"upsampler.{setting}" for setting in settings))
    coupling = COUPLINGS[name](context, context.config.stage(STAGE[name]))
    with torch.no_grad():
        return coupling.pairs(batch_of(digits, count), noise or step_noise(count))


def large(low):
    return low.repeat_interleave(4, -1).repeat_interleave(4, -2)


# Where the flow starts


def test_upsampled_starts_at_the_enlarged_image_with_noise(digits):
    y = batch_of(digits)["image"]
    pairs = pairs_of(digits)
    image = large(avg_pool2d(y, 4))
    torch.testing.assert_close(pairs.y, y)
    torch.testing.assert_close(pairs.conditions["image"], image)
    assert (pairs.conditions["noise_level"] == 200).all()
    a = signal_share(torch.tensor([200.0]))
    assert a.sqrt().item() == pytest.approx(0.951, abs=1e-3)
    torch.testing.assert_close(
        pairs.x, a.sqrt() * image + (1 - a).sqrt() * step_noise().normal((1, 16, 16), "x")
    )
    assert pairs.sigma is None and "label" not in pairs.conditions


def test_the_comparisons_are_the_ends_of_the_noise(digits):
    noise = step_noise().normal((1, 16, 16), "x")
    gaussian, plain = pairs_of(digits, "upsampled-gaussian"), pairs_of(digits, "upsampled-plain")
    torch.testing.assert_close(gaussian.x, noise)
    assert torch.equal(plain.x, plain.conditions["image"])
    assert torch.equal(gaussian.conditions["image"], plain.conditions["image"])
    learned, prior = (
        pairs_of(digits, "upsampled-learned"),
        random_network(context_of(digits).config, "upsampler-prior"),
    )
    with torch.no_grad():
        found = prior(learned.conditions["image"])
    torch.testing.assert_close(learned.x, found.mean + (found.log_var / 2).exp() * noise)
    torch.testing.assert_close(learned.sigma, (found.log_var / 2).exp())


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (["enlarge=bilinear"], lambda y: interpolate(avg_pool2d(y, 4), (16, 16), mode="bilinear")),
        (["enlarge=pixels"], lambda y: interpolate(avg_pool2d(y, 4), (16, 16), mode="bilinear")),
        (["scale=2"], lambda y: avg_pool2d(y, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)),
        (
            ["shrink=bicubic"],
            lambda y: large(interpolate(y, (4, 4), mode="bicubic", antialias=True).clamp(-1, 1)),
        ),
    ],
)
def test_how_images_are_made_small_and_large(settings, wanted, digits):
    torch.testing.assert_close(
        pairs_of(digits, "upsampled", *settings).conditions["image"], wanted(batch_of(digits)["image"])
    )


def test_noise_levels_of_a_range_are_all_drawn_and_belong_to_the_image(digits):
    told = pairs_of(digits, "upsampled", "noise_level=[100, 103]", count=200).conditions["noise_level"]
    assert sorted(told.unique().tolist()) == [100, 101, 102, 103]
    again = pairs_of(digits, "upsampled", "noise_level=[100, 103]", count=200).conditions["noise_level"]
    assert torch.equal(told, again)


def test_sigma_min_moves_a_path_as_a_whole(digits):
    still, moved = pairs_of(digits), pairs_of(digits, "upsampled", "sigma_min=0.1")
    torch.testing.assert_close(flow.velocity(moved.x, moved.y), flow.velocity(still.x, still.y))
    assert (moved.y - still.y).std().item() == pytest.approx(0.1, rel=0.1)


def test_crops_are_cut_alike_and_lie_everywhere(digits):
    pairs, y = pairs_of(digits, "upsampled", "crop=8", count=64), batch_of(digits, 64)["image"]
    assert pairs.y.shape == pairs.x.shape == (64, 1, 8, 8)
    torch.testing.assert_close(pairs.conditions["image"], large(avg_pool2d(pairs.y, 4)))
    places = [
        {
            (top, left)
            for top in (0, 4, 8)
            for left in (0, 4, 8)
            if torch.equal(whole[:, top : top + 8, left : left + 8], part)
        }
        for whole, part in zip(y, pairs.y, strict=True)
    ]
    assert all(places) and len(set().union(*(found for found in places if len(found) == 1))) == 9


# Worse images


def test_blur_and_jpeg_are_drawn_for_each_image_alone(digits):
    settings = ("blur=2", "jpeg=20")
    whole = pairs_of(digits, "upsampled", *settings).conditions["image"]
    assert (whole - pairs_of(digits).conditions["image"]).abs().amax((1, 2, 3)).min() > 1e-3
    context = context_of(digits, *(f"upsampler.{setting}" for setting in settings))
    coupling, batch = COUPLINGS["upsampled"](context, context.config.stage("upsampler")), batch_of(digits)
    noise = BatchNoise(3, batch_size=8, positions=range(5, 8), device=CPU)
    part = coupling.pairs({name: x[5:] for name, x in batch.items()}, noise)
    torch.testing.assert_close(part.conditions["image"], whole[5:], rtol=0, atol=1 / 127)


def test_blur_keeps_what_is_flat_and_spreads_a_point_as_a_gaussian():
    flat = torch.full((2, 3, 16, 16), 0.3)
    torch.testing.assert_close(blurred(flat, torch.tensor([0.0, 2.0])), flat)
    point = torch.zeros(2, 1, 33, 33)
    point[:, :, 16, 16] = 1
    none, spread = blurred(point, torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(none, point[0])
    assert spread[0, 16, 16].item() == pytest.approx(1 / (2 * math.pi * 4), rel=0.01)
    assert (spread[0, 16, 18] / spread[0, 16, 16]).item() == pytest.approx(math.exp(-0.5), rel=1e-4)


def test_jpeg_is_nearly_the_image_at_100_and_not_at_5():
    images = shrunk(torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, 2)
    fine, coarse = (compressed(images, [q, q]).sub(images).abs().mean().item() for q in (100, 5))
    assert fine < 0.03 < 0.08 < coarse


# What is learned


def test_regression_is_the_velocity_at_0(digits):
    stage = stage_of(digits, "upsampler-regression")
    randomized(stage.network)
    batch = batch_of(digits)
    pairs = pairs_of(digits, "upsampled-plain")
    made = pairs.x + stage.network(pairs.x, torch.zeros(8), pairs.conditions)
    loss, _ = stage.loss(stage.network, batch, step_noise())
    torch.testing.assert_close(loss, (made - batch["image"]).square().mean())
    torch.testing.assert_close(stage.carry(pairs.x, pairs.conditions, 5), made)


def test_diffusion_learns_the_noise_at_the_time_it_is_told(digits):
    stage = stage_of(digits, "upsampler-diffusion")
    randomized(stage.network)
    batch, noise = batch_of(digits), step_noise()
    eps, steps = noise.normal((1, 16, 16), "x"), (noise.times() * 1000).long()
    a = stage.scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1)
    assert a.max() > 0.9 > 0.1 > a.min()
    told = pairs_of(digits, "upsampled-gaussian").conditions
    found = stage.network(a.sqrt() * batch["image"] + (1 - a).sqrt() * eps, steps / 999, told)
    loss, _ = stage.loss(stage.network, batch, noise)
    torch.testing.assert_close(loss, (found - eps).square().mean())


@pytest.mark.parametrize("steps", [1, 4])
def test_ddim_with_the_right_noise_ends_at_the_image(steps, digits):
    y, scheduler = batch_of(digits)["image"], ddim_scheduler(pixels=True)
    asked = []

    def network(state, t, conditions):
        asked.append(t[0].item())
        a = scheduler.alphas_cumprod[(t * 999).round().long()].view(-1, 1, 1, 1)
        return (state - a.sqrt() * y) / (1 - a).sqrt()

    end = ddim(network, step_noise().normal((1, 16, 16), "x"), None, steps, scheduler)
    torch.testing.assert_close(end, y, rtol=0, atol=2e-2)
    assert len(asked) == steps and asked[0] == 1.0


def test_the_prior_learns_the_likelihood(digits):
    stage = stage_of(digits, "upsampler-prior")
    randomized(stage.network)
    batch = batch_of(digits)
    found = stage.network(large(avg_pool2d(batch["image"], 4)))
    wanted = torch.distributions.Normal(found.mean, (found.log_var / 2).exp())
    loss, metrics = stage.loss(stage.network, batch, step_noise())
    torch.testing.assert_close(loss, -wanted.log_prob(batch["image"]).mean())
    torch.testing.assert_close(metrics["sigma"], wanted.stddev.mean())
    y, image, mean, sample = stage.preview()
    torch.testing.assert_close(image, large(avg_pool2d(y, 4)))
    assert mean.shape == sample.shape == y.shape


def test_previews_show_the_way(digits):
    rows = stage_of(digits, "upsampler", "upsampler.crop=8").preview()
    y, image, x, *made = rows
    assert y.shape == (8, 1, 8, 8) and len(made) == 3
    torch.testing.assert_close(image, large(avg_pool2d(y, 4)))
    assert (x - image).std().item() == pytest.approx(0.31, abs=0.1)
    assert all(torch.equal(one, x) for one in made), "an untrained network stays where it is"


# Latents


@pytest.fixture(scope="module", params=["latents", "pixels"])
def pairs_folder(request, tiny_codec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / request.param
    options = {"image_size": 16, "low_size": 8, "enlarge": request.param, "split": "validation"}
    encode("digits", Codec.load(tiny_codec), folder, **options)
    return folder, request.param


def latent_settings(codec, folder, way, *settings):
    return [
        *(f"codec.model={codec}", "codec.factor=2", f"data.train={folder}", "upsampler.scale=2"),
        f"upsampler.enlarge={'pixels' if way == 'pixels' else 'nearest'}",
        *settings,
    ]


def test_latents_come_with_their_partners(pairs_folder, tiny_codec):
    folder, way = pairs_folder
    data, codec = CodecLatents(str(folder), flip=True), Codec.load(tiny_codec)
    batch = next(batches(data, batch_size=12, seed=0, stop=1))
    assert set(batch["flipped"].tolist()) == {False, True}
    images = ImageData("digits", image_size=16, split="validation").images[batch["index"]].float() / 127.5 - 1
    images = torch.where(batch["flipped"].view(-1, 1, 1, 1), images.flip(-1), images)
    low = codec.encode(avg_pool2d(images, 2)).mean
    if way == "pixels":
        low = codec.encode(interpolate(codec.decode(low), (16, 16), mode="bilinear")).mean
    torch.testing.assert_close(batch["low"], data.space.normalize(low), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(data.first_low(3), CodecLatents(str(folder), cache_gb=0).first_low(3))
    encoding = EncodedImages(ImageData("digits", image_size=16, split="validation"), codec, (8, 16, way))
    fresh = next(batches(encoding, batch_size=3, seed=0, stop=1))
    wanted = data.space.normalize(fresh["low"])
    rows = fresh["index"]
    torch.testing.assert_close(wanted, data.first_low(len(data))[rows], rtol=1e-2, atol=1e-2)


def test_crops_of_latents_go_with_crops_of_their_partners(pairs_folder, tiny_codec):
    folder, way = pairs_folder
    settings = latent_settings(tiny_codec, folder, way, "upsampler.crop=4", "training.stages=[upsampler]")
    config = load_config("digits", [*TINY, *settings])
    context = context_of(open_data(config), *settings)
    coupling = COUPLINGS["upsampled"](context, config.training.upsampler)
    batch = batch_of(context.data)
    image = coupling.pairs(batch, step_noise()).conditions["image"]
    assert image.shape == (8, 4, 4, 4)
    if way == "latents":
        assert torch.equal(image[..., ::2, ::2], image[..., 1::2, 1::2])
    assert [len(row) for row in coupling.preview(lambda x, told, steps: x)] == [8] * 6
    on_the_fly = [*settings, "data.encode=true", "data.train=digits"]
    fresh = COUPLINGS["upsampled"](
        context_of(open_data(load_config("digits", [*TINY, *on_the_fly])), *on_the_fly), None
    )
    assert fresh.pairs(batch_of(fresh.context.data), step_noise()).conditions["image"].shape == (8, 4, 4, 4)


def test_what_does_not_fit_is_named(tiny_latents, pairs_folder, tiny_codec, digits):
    folder, way = pairs_folder

    def coupling(data, *settings):
        context = context_of(data, *settings)
        return COUPLINGS["upsampled"](context, None)

    plain = latent_settings(tiny_codec, tiny_latents, way)
    with pytest.raises(
        UserError, match="no low-resolution partners; encode the images with --pairs LOW:HIGH"
    ):
        coupling(CodecLatents(str(tiny_latents)), *plain)
    with pytest.raises(UserError, match=r"pairs of 8 and 16 px, and upsampler.scale is 4"):
        coupling(CodecLatents(str(folder)), *plain, "upsampler.scale=4")
    other = "nearest" if way == "pixels" else "pixels"
    with pytest.raises(
        UserError, match=f"upsampler.enlarge is {other}, and these latents were encoded for {way}"
    ):
        coupling(CodecLatents(str(folder)), *plain, f"upsampler.enlarge={other}")
    with pytest.raises(UserError, match=r"upsampler.crop 20 is larger than the sample of 16x16"):
        coupling(digits, "upsampler.crop=20")
    for wrong, message in (
        ("upsampler.crop=6", "crop 6 is not divisible by scale 4"),
        ("upsampler.noise_level=[300,200]", "noise_level must rise"),
        ("upsampler.unet={}", "give either unet or transformer"),
        ("upsampler.noise_level=1000", "noise_level"),
    ):
        with pytest.raises(UserError, match=message):
            load_config("digits", [*TINY, wrong])
    with pytest.raises(UserError, match="missing key 'upsampler', which stage upsampler needs"):
        load_config("digits", ["training.stages=[upsampler]"])
    with pytest.raises(UserError, match="missing key 'upsampler', which stage upsampler-prior needs"):
        train(load_config("digits"), "nowhere", stages=["upsampler-prior"], device="cpu")


def test_pairs_are_refused_that_cannot_be_made(tiny_codec, tmp_path):
    for options, message in (
        ({"low_size": 6}, "pairs of 6 and 16 px: the second is no multiple of the first"),
        ({"low_size": 16}, "no multiple"),
        ({"low_size": 1}, "pairs of 1 px are no multiple of the codec's factor 2"),
        ({"low_size": 8, "enlarge": "pixel"}, "unknown --enlarge 'pixel'.*did you mean 'pixels'"),
    ):
        with pytest.raises(UserError, match=message):
            encode("digits", Codec.load(tiny_codec), tmp_path, image_size=16, split="validation", **options)
    assert not list(tmp_path.iterdir())
