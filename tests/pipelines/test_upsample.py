"""The upsampler against closed forms: what it starts at, what it is told, seeds, sizes, tiles, codecs."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_bases import autoencoder
from torch.nn import functional
from toy_upsampler import TOLD, Guess, Told, space_of, transformer

from lediflow import FlowMatchingPipeline, UserError, VelocityTransformer, load_pipeline
from lediflow.codecs import Codec, CodecSpace
from lediflow.pictures import to_float
from lediflow.pipelines.load import load_upsampler
from lediflow.pipelines.upsample import FlowUpsamplePipeline
from lediflow.sources import image_noise
from lediflow.upsampling import noised


def upsampler(flow=None, **settings):
    pipeline = FlowUpsamplePipeline(flow or Told(conditions=TOLD), **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def vae():
    return autoencoder(0, scaling_factor=0.7, shift_factor=0.1)


@pytest.fixture
def behind(vae):
    """An upsampler in the latents of `vae`: 4 channels, 1/2 of a side."""
    return upsampler(Told(4, conditions=TOLD), vae=vae, codec_space=space_of(vae), scale=2)


def noise(x, seed=0, first=0, stream="x"):
    return image_noise(x.shape[1:], seed=seed, indices=range(first, first + len(x)), stream=stream)


def by_hand(image, level=200, seed=0, first=0, stream="x"):
    """What `Told` makes of an enlarged image."""
    levels = torch.full((len(image),), float(level))
    return noised(image, levels, noise(image, seed, first, stream)) + image / 2 + level / 1000


def times(x, n):
    return x.repeat_interleave(n, 2).repeat_interleave(n, 3)


SMALL = torch.linspace(-0.5, 0.3, 2 * 3 * 4 * 6).view(2, 3, 4, 6)


# What it makes


def test_pixels_start_at_the_enlarged_image_with_noise_and_are_told_both():
    out = upsampler()(SMALL, 3, seed=5, first_image=2, output_type="pt")
    torch.testing.assert_close(out.images, by_hand(times(SMALL, 4), 200, 5, 2).clamp(-1, 1))
    assert out.nfe == {"flow": 3}
    louder = upsampler(noise_level=300)(SMALL, 1, output_type="pt").images
    torch.testing.assert_close(louder, by_hand(times(SMALL, 4), 300).clamp(-1, 1))
    torch.testing.assert_close(louder, upsampler()(SMALL, 1, noise_level=300, output_type="pt").images)


def test_a_network_is_told_what_it_has_conditions_for():
    only_image = Told(conditions={"image": {}})
    out = upsampler(only_image)(SMALL, 1, output_type="pt").images
    torch.testing.assert_close(out, (by_hand(times(SMALL, 4)) - 0.2).clamp(-1, 1))


def test_bilinear_and_pixels_are_smooth_for_a_model_of_pixels():
    smooth = functional.interpolate(SMALL, scale_factor=4, mode="bilinear", align_corners=False)
    for how in ("bilinear", "pixels"):
        out = upsampler(enlarge=how)(SMALL, 1, output_type="pt").images
        torch.testing.assert_close(out, by_hand(smooth).clamp(-1, 1))


def test_a_prior_is_where_the_flow_starts_and_there_is_no_noise_level():
    image = times(SMALL - 0.45, 4)
    expected = (image + 1 + (image / 4).exp() * noise(image) + image / 2).clamp(-1, 1)
    pipeline = upsampler(prior=Guess())
    out = pipeline(SMALL - 0.45, 1, output_type="pt")
    torch.testing.assert_close(out.images, expected)
    assert out.nfe == {"flow": 1, "prior": 1}
    tiles = pipeline(SMALL - 0.45, 1, output_type="pt", tile_size=8, overlap=4)
    torch.testing.assert_close(tiles.images, expected)
    assert tiles.nfe == {"flow": 15, "prior": 15}
    with pytest.raises(UserError, match="starts at a learned prior, which has no noise_level"):
        pipeline(SMALL, noise_level=200)


def test_tiles_lie_where_the_priors_own_patches_begin():
    pipeline = upsampler(prior=Guess(scale=4))
    with pytest.raises(UserError, match="tile_size 10 must be a multiple of 4, at least 8; try 8"):
        pipeline(SMALL, tile_size=10)


def test_latents_are_normalised_enlarged_carried_and_decoded(behind, vae):
    latents = torch.randn(3, 4, 4, 6)
    space = CodecSpace.from_dict(behind.config.codec_space)
    expected = space.denormalize(by_hand(times(space.normalize(latents), 2), seed=1))
    out = behind(latents, 2, seed=1, output_type="latent")
    torch.testing.assert_close(out.images, expected)
    assert out.nfe == {"flow": 2}
    decoded = behind(latents, 2, seed=1, output_type="pt")
    torch.testing.assert_close(decoded.images, Codec(vae).decode(expected), rtol=1e-4, atol=1e-4)
    assert decoded.images.shape == (3, 3, 16, 24) and decoded.nfe == {"flow": 2, "codec": 1}


def test_pixels_are_encoded_for_a_model_of_latents(behind, vae):
    pixels = torch.rand(1, 3, 8, 12) * 2 - 1
    latents = Codec(vae).encode(pixels).mean
    expected = behind(latents, 1, output_type="latent").images
    out = behind(pixels, 1, output_type="latent")
    torch.testing.assert_close(out.images, expected)
    assert out.nfe == {"flow": 1, "encoder": 1}


def test_enlarging_through_pixels_decodes_resizes_and_encodes_to_the_mode(vae):
    pipeline = upsampler(
        Told(4, conditions=TOLD), vae=vae, codec_space=space_of(vae), scale=2, enlarge="pixels"
    )
    codec, space = Codec(vae), CodecSpace.from_dict(pipeline.config.codec_space)
    latents = torch.randn(1, 4, 4, 4)
    pixels = codec.decode(latents)

    def carried(pixels, stream="x"):
        large = functional.interpolate(pixels, scale_factor=2, mode="bilinear", align_corners=False)
        return space.denormalize(by_hand(space.normalize(codec.encode(large).mean), stream=stream))

    out = pipeline(latents, 1, output_type="latent")
    torch.testing.assert_close(out.images, carried(pixels), rtol=1e-4, atol=1e-4)
    assert out.nfe == {"flow": 1, "codec": 1, "encoder": 1}
    torch.testing.assert_close(
        pipeline(pixels, 1, output_type="latent").images, out.images, rtol=1e-4, atol=1e-4
    )
    twice = pipeline(pixels, 1, scale=4, output_type="latent")
    again = carried(codec.decode(carried(pixels)), "x1")
    torch.testing.assert_close(twice.images, again, rtol=1e-3, atol=1e-3)
    assert twice.nfe == {"flow": 2, "codec": 1, "encoder": 2}


def test_solvers_and_evaluations():
    pipeline = upsampler(transformer())
    calls = []
    pipeline.flow.register_forward_hook(lambda *_: calls.append(1))
    for options, nfe in (
        ({}, 10),
        ({"num_inference_steps": 2}, 2),
        ({"num_inference_steps": 2, "solver": "midpoint"}, 4),
    ):
        calls.clear()
        assert pipeline(SMALL, **options).nfe == {"flow": nfe} == {"flow": len(calls)}
    adaptive = pipeline(SMALL, solver="dopri5", output_type="pt")
    torch.testing.assert_close(
        adaptive.images, pipeline(SMALL, 50, solver="rk4", output_type="pt").images, rtol=1e-3, atol=1e-3
    )
    averaged = upsampler(transformer(average_velocity=True))
    assert averaged(SMALL).nfe == {"flow": 1}, "one evaluation of the average velocity"
    with pytest.raises(UserError, match="needs an average velocity"):
        pipeline(SMALL, solver="mean")


# Seeds


def test_image_i_depends_on_seed_and_i_only():
    pipeline, images = upsampler(transformer()), torch.rand(5, 3, 4, 4)
    whole = pipeline(images, 2, seed=3, output_type="pt").images
    for size in (1, 2, 8):
        torch.testing.assert_close(
            pipeline(images, 2, seed=3, batch_size=size, output_type="pt").images, whole, rtol=0, atol=1e-5
        )
    last = pipeline(images[3:], 2, seed=3, first_image=3, output_type="pt").images
    torch.testing.assert_close(last, whole[3:], rtol=0, atol=1e-5)
    assert (pipeline(images, 2, seed=4, output_type="pt").images - whole).abs().max() > 1e-2


def test_generators_take_the_place_of_the_seed():
    pipeline = upsampler()

    def made(*seeds, calls=1):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        given = generators[0] if len(seeds) == 1 else generators
        return [pipeline(SMALL, 1, generator=given, output_type="pt").images for _ in range(calls)]

    first, second = made(1, calls=2)
    assert torch.equal(first, made(1)[0]) and not torch.equal(first, second), "it goes on"
    (both,), (swapped,) = made(1, 2), made(2, 1)
    alone = pipeline(SMALL[1:], 1, generator=torch.Generator().manual_seed(2), output_type="pt").images
    assert torch.equal(both[1:], alone) and not torch.equal(both, swapped)
    with pytest.raises(UserError, match="3 generators for 2 images"):
        made(1, 2, 3)
    before = torch.get_rng_state()
    pipeline(SMALL, 1)
    assert torch.equal(before, torch.get_rng_state()), "the global state is left alone"


# What is given


def test_pictures_of_any_size_come_out_scaled():
    pipeline = upsampler(transformer(side=32))
    pictures = [Image.new("RGB", size) for size in ((5, 9), (5, 9), (16, 4), (1, 1))]
    out = pipeline(pictures, 1)
    assert [image.size for image in out.images] == [(20, 36), (20, 36), (64, 16), (4, 4)]
    assert pipeline(pictures[0], 1).images[0].size == (20, 36)
    assert pipeline(SMALL.mul(127).add(127).byte(), 1).images[0].size == (24, 16)


def test_odd_sizes_are_padded_for_codec_and_patches_and_cut_off_again(vae):
    flow = transformer(4, 16)  # patches of two latents: four pixels of the result, two of what is given
    pipeline = upsampler(flow, vae=vae, codec_space=space_of(vae), scale=2)
    out = pipeline(Image.new("RGB", (7, 5)), 1)
    assert out.images[0].size == (14, 10)
    latent = pipeline(torch.zeros(1, 3, 5, 7), 1, output_type="latent").images
    assert latent.shape == (1, 4, 5, 7)
    exact = pipeline(torch.zeros(1, 3, 8, 8), 1, output_type="pt").images
    assert exact.shape == (1, 3, 16, 16)


def test_the_kind_of_picture_follows_the_model():
    pipeline = upsampler(Told(1, conditions=TOLD))
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    out = pipeline(clear, 1, output_type="pt").images
    assert out.shape == (1, 1, 16, 16)
    torch.testing.assert_close(out, by_hand(torch.ones(1, 1, 16, 16)).clamp(-1, 1))
    grey = upsampler()(Image.new("L", (4, 4), 128), 1, output_type="pt").images
    value = float(to_float(torch.tensor(128, dtype=torch.uint8)))
    torch.testing.assert_close(grey, by_hand(torch.full((1, 3, 16, 16), value)).clamp(-1, 1))


def test_packed_latents_are_unpacked_as_flux_packs_them(vae):
    from diffusers import FluxPipeline

    pipeline = upsampler(Told(4, conditions=TOLD), vae=vae, codec_space=space_of(vae), scale=2)
    for h, w, size in (
        (4, 4, {}),
        (4, 8, {"height": 8, "width": 16}),
        (4, 8, {"width": 16}),
        (4, 8, {"height": 9}),
    ):
        latents = torch.randn(2, 4, h, w)
        packed = FluxPipeline._pack_latents(latents, 2, 4, h, w)
        out = pipeline(packed, 1, output_type="latent", **size).images
        assert torch.equal(out, pipeline(latents, 1, output_type="latent").images)
    with pytest.raises(UserError, match="is not square; give its height and width"):
        pipeline(packed, 1)
    with pytest.raises(UserError, match="is not 8x8 pixels"):
        pipeline(packed, 1, height=8, width=8)


def test_where_channels_do_not_tell_the_user_does(vae):
    three = autoencoder(1, channels=3, scaling_factor=0.5)
    pipeline = upsampler(vae=three, codec_space=space_of(three), scale=2)
    x = torch.rand(1, 3, 4, 4)
    with pytest.raises(UserError, match="both have 3 channels here; say which with input_type"):
        pipeline(x)
    assert pipeline(x, 1, input_type="latent", output_type="latent").images.shape == (1, 3, 8, 8)
    assert pipeline(x, 1, input_type="pixels", output_type="latent").images.shape == (1, 3, 4, 4)


BROKEN = torch.full((1, 3, 4, 4), float("nan"))


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (torch.zeros(1, 4, 4, 4), {}, "this model enlarges pixels with 3 channels; what was given has 4"),
        (torch.zeros(1, 16, 64), {}, "as Flux packs latents; this model enlarges pixels"),
        (torch.zeros(4, 4), {}, r"a tensor must be \(B, C, H, W\), not \(4, 4\)"),
        (torch.zeros(0, 3, 4, 4), {}, "a tensor must be"),
        (np.zeros((4, 4, 3)), {}, "cannot enlarge a ndarray"),
        ([], {}, "cannot enlarge a list"),
        (SMALL * 200, {}, r"pixels must be in \[-1, 1\], or uint8; these go from -100 to 60"),
        (BROKEN, {}, "values that are no number"),
        (SMALL, {"input_type": "latent"}, "this model enlarges pixels, not latents"),
        (SMALL, {"input_type": "pixel"}, "input_type must be"),
        (SMALL, {"output_type": "latent"}, "output_type must be 'pil' or 'pt'"),
        (SMALL, {"scale": 8}, "trained to enlarge 4 times, and scale 8 is no power of that; take 4, 16, 64"),
        (SMALL, {"scale": 1}, "scale 1 is no power"),
        (SMALL, {"noise_level": 1000}, "noise_level must be from 0 to 999"),
        (SMALL, {"tile_size": 1}, "tile_size 1 must be a multiple of 1, at least 2; try 2"),
        (SMALL, {"tile_size": 8, "overlap": 5}, "overlap 5 must be a multiple of 1, from 1 to 4"),
        (SMALL, {"overlap": 5}, "an overlap needs a tile_size"),
        (SMALL, {"num_inference_steps": 0}, "steps must be at least 1"),
        (SMALL, {"solver": "eular"}, "did you mean 'euler'"),
        (SMALL, {"batch_size": 0}, "batch_size must be at least 1"),
        ([SMALL, SMALL[..., :3]], {"output_type": "pt"}, "several sizes make no one tensor"),
    ],
)
def test_what_cannot_be_is_refused_by_name(image, options, message):
    with pytest.raises(UserError, match=message):
        upsampler()(image, **options)


def test_latents_of_another_kind_are_refused_by_name(behind, vae):
    with pytest.raises(UserError, match="pixels with 3 channels or latents with 4 .*given has 16 channels"):
        behind(torch.zeros(1, 16, 4, 4))
    with pytest.raises(UserError, match="latents of 4 channels, not 16"):
        behind(torch.zeros(1, 16, 64))
    with pytest.raises(UserError, match="pictures were given, and input_type says latents"):
        behind(Image.new("RGB", (4, 4)), input_type="latent")
    with pytest.raises(UserError, match="some of the tensors are pixels and others latents"):
        behind([torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 4, 4)])
    coarse = upsampler(transformer(4, 16), vae=vae, codec_space=space_of(vae), scale=3)
    with pytest.raises(UserError, match="latents of 5x4 cannot be enlarged 3 times .*multiples of 2"):
        coarse(torch.zeros(1, 4, 5, 4))
    with pytest.raises(UserError, match="tile_size 10 must be a multiple of 4, at least 8; try 8"):
        coarse(torch.zeros(1, 4, 4, 4), tile_size=10)


def test_impossible_models_are_refused(vae):
    for settings, message in (
        ({"enlarge": "cubic"}, "enlarge must be one of"),
        ({"scale": 1}, "scale must be at least 2"),
        ({"noise_level": -1}, "noise_level must be from 0"),
        ({"vae": vae}, "this model makes pixels; it has no codec"),
    ):
        with pytest.raises(UserError, match=message):
            upsampler(**settings)


# Large images


def test_tiles_give_what_the_whole_gives_and_the_network_sees_no_more_than_one():
    pipeline, seen = upsampler(), []
    pipeline.flow.register_forward_hook(lambda _m, inputs, _o: seen.append(tuple(inputs[0].shape)))
    image = torch.rand(2, 3, 9, 12) - 0.5
    whole = pipeline(image, 2, output_type="pt")
    assert set(seen) == {(2, 3, 36, 48)}
    seen.clear()
    tiles = pipeline(image, 2, tile_size=16, overlap=4, output_type="pt")
    torch.testing.assert_close(tiles.images, whole.images)
    assert set(seen) == {(1, 3, 16, 16)} and tiles.nfe == {"flow": 2 * 3 * 4} and len(seen) == 2 * 24
    assert pipeline(image, 2, tile_size=64).nfe == {"flow": 2}, "an image that fits in one tile"


def test_the_seam_of_a_real_network_is_no_edge():
    """Neighbouring pixels across the middle of an overlap differ no more than elsewhere."""
    pipeline = upsampler(transformer(side=16), noise_level=0)
    image = torch.linspace(-0.3, 0.3, 16).expand(1, 3, 4, 16)
    row = pipeline(image, 4, tile_size=16, overlap=8, output_type="pt").images
    steps = row.diff(dim=3).abs().mean((0, 1, 2))  # between columns
    patch = torch.arange(1, 64) % 2 == 0  # where patches meet in any tile
    seams = torch.tensor([12, 20, 28, 36, 44, 52]) - 1
    assert float(steps[seams].max()) < 1.5 * float(steps[patch].mean())


def test_the_codec_sees_no_more_than_a_tile_either(behind, vae):
    sizes = []
    hooks = [
        part.register_forward_hook(lambda _m, inputs, _o: sizes.append(tuple(inputs[0].shape[2:])))
        for part in (vae.decoder, vae.encoder)
    ]
    pixels = torch.rand(1, 3, 24, 24)
    whole = behind(pixels, 1, output_type="pt")
    assert sizes == [(24, 24), (24, 24)], "pixels encoded, and twice as many latents decoded"
    sizes.clear()
    tiles = behind(pixels, 1, tile_size=16, overlap=8, output_type="pt")
    assert set(sizes) == {(16, 16), (8, 8)}
    assert tiles.nfe == {"encoder": 4, "flow": 25, "codec": 25} and len(sizes) == 29
    assert tiles.images.shape == (1, 3, 48, 48)
    # a codec's norms are of all that it sees, so tiles change it somewhat
    assert 0 < float((tiles.images - whole.images).abs().mean()) < 0.2
    for hook in hooks:
        hook.remove()


def test_tiles_of_a_codec_lie_where_its_pixels_do(behind, monkeypatch):
    """With a codec whose pixels are its latents repeated, tiles are the whole."""
    monkeypatch.setattr(Codec, "decode", lambda self, x, batch_size=16: times(x[:, :3], 2).clamp(-1, 1))
    latents = torch.randn(1, 4, 10, 13) / 3
    whole = behind(latents, 1, output_type="pt")
    tiles = behind(latents, 1, tile_size=16, overlap=4, output_type="pt")
    assert tiles.nfe["codec"] == tiles.nfe["flow"] == 12
    torch.testing.assert_close(tiles.images, whole.images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_a_power_of_the_scale_runs_the_model_again(kind, behind):
    if kind == "pixels":
        pipeline, x, options = (
            upsampler(Told(conditions={"image": {}}), scale=2),
            SMALL,
            {"output_type": "pt"},
        )
        x = x / 4  # so that nothing is clamped
    else:
        pipeline, x, options = behind, torch.randn(2, 4, 4, 4), {"output_type": "latent"}
    options |= {"noise_level": 0, "num_inference_steps": 2}
    once = pipeline(pipeline(x, **options).images, **options).images
    cascade = pipeline(x, scale=4, **options)
    torch.testing.assert_close(cascade.images, once, rtol=1e-3, atol=1e-3)
    assert cascade.nfe["flow"] == 4
    noisy = options | {"noise_level": 400}
    differ = pipeline(x, scale=4, **noisy).images - pipeline(pipeline(x, **noisy).images, **noisy).images
    assert differ.abs().max() > 1e-2, "each pass has noise of its own"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        MemoryError(),
    ],
)
def test_too_little_memory_suggests_tiles(error):
    pipeline = upsampler()

    def fail(*_):
        raise error

    pipeline.flow.register_forward_pre_hook(fail)
    with pytest.raises(UserError, match="not enough memory for images of 16x24 pixels; try .* tile_size=512"):
        pipeline(SMALL)
    with pytest.raises(UserError, match="smaller tiles: tile_size=16 is too large, try 8"):
        pipeline(SMALL, tile_size=16)


def test_other_errors_are_not_taken_for_too_little_memory():
    pipeline = upsampler(Told(5, conditions=TOLD))
    pipeline.flow.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        pipeline(torch.zeros(1, 5, 4, 4))


# Codecs, saving, loading


def test_the_codec_must_make_the_same_latents_in_any_precision_and_with_any_decoder(vae):
    flow, space = Told(4, conditions=TOLD), space_of(vae)
    other = autoencoder(7, scaling_factor=0.7, shift_factor=0.1)
    with pytest.raises(
        UserError, match="latents are others, though of the same shape; .* those of '/nowhere/codec'"
    ):
        upsampler(flow, vae=other, codec_space=space)
    units = autoencoder(0, scaling_factor=0.8, shift_factor=0.1)
    units.load_state_dict(vae.state_dict())
    with pytest.raises(UserError, match="latents are others"):
        upsampler(flow, vae=units, codec_space=space)
    wide = autoencoder(0, channels=16)
    with pytest.raises(UserError, match="latents are 16 channels of 1/2 of a side; .*4 channels of 1/2"):
        upsampler(flow, vae=wide, codec_space=space)
    halved = autoencoder(0, scaling_factor=0.7, shift_factor=0.1).to(torch.bfloat16)
    assert upsampler(flow, vae=halved, codec_space=space).vae is halved
    decoder = autoencoder(7, scaling_factor=0.7, shift_factor=0.1)
    decoder.encoder.load_state_dict(vae.encoder.state_dict())
    decoder.quant_conv.load_state_dict(vae.quant_conv.state_dict())
    assert upsampler(flow, vae=decoder, codec_space=space).vae is decoder
    old = {**space, "latent_hash": ""}  # of a model that was made before there was such a hash
    assert upsampler(flow, vae=vae, codec_space=old).vae is vae
    with pytest.raises(UserError, match="load it in float32"):
        upsampler(flow, vae=halved, codec_space=old)


def test_saved_and_loaded_with_the_codec_of_a_base(vae, tmp_path):
    made = upsampler(
        transformer(4, 16), codec_space=space_of(vae), scale=2, noise_level=300, enlarge="bilinear"
    )
    made.save_pretrained(tmp_path / "up")
    again = FlowUpsamplePipeline.from_pretrained(tmp_path / "up", vae=vae)
    again.set_progress_bar_config(disable=True)
    assert again.vae is vae
    assert (again.config.scale, again.config.noise_level, again.config.enlarge) == (2, 300, "bilinear")
    latents = torch.randn(1, 4, 4, 4)
    made.use_codec(vae)
    assert torch.equal(
        again(latents, 2, output_type="latent").images, made(latents, 2, output_type="latent").images
    )
    with pytest.raises(UserError, match="latents are others"):
        FlowUpsamplePipeline.from_pretrained(tmp_path / "up", vae=autoencoder(7, scaling_factor=0.7))
    alone = FlowUpsamplePipeline.from_pretrained(tmp_path / "up")
    assert alone(latents, 1, output_type="latent").images.shape == (1, 4, 8, 8), "which needs no codec"
    for image, output_type in ((latents, "pil"), (torch.zeros(1, 3, 8, 8), "latent")):
        with pytest.raises(UserError, match="give that codec's folder"):
            alone(image, output_type=output_type)
    again.save_pretrained(tmp_path / "whole")  # with the codec: needs nothing else
    whole = load_upsampler(tmp_path / "whole")
    assert whole(latents, 1).images[0].size == (16, 16)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_what_enlarges_and_what_makes_images_are_told_apart(tmp_path):
    up, plain = tmp_path / "up", tmp_path / "plain"
    upsampler(transformer()).save_pretrained(up)
    FlowMatchingPipeline(VelocityTransformer(8, 1, 2, (16,), (1,), d_head=8)).save_pretrained(plain)
    assert isinstance(load_upsampler(up), FlowUpsamplePipeline)
    assert isinstance(load_pipeline(plain), FlowMatchingPipeline)
    with pytest.raises(UserError, match="enlarges images and makes none; .*lediflow upsample"):
        load_pipeline(up)
    with pytest.raises(UserError, match="makes images and enlarges none; .*lediflow sample"):
        load_upsampler(plain)


def test_a_request_in_bfloat16_is_close_and_leaves_weights_alone():
    pipeline = upsampler(transformer())
    exact = pipeline(SMALL, 2, output_type="pt").images
    rough = pipeline(SMALL, 2, dtype=torch.bfloat16, output_type="pt").images
    assert rough.dtype == torch.float32 and 0 < float((rough - exact).abs().max()) < 0.05
    assert pipeline.flow.dtype == torch.float32
