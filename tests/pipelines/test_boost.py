"""The upsampler behind real diffusers pipelines, the smallest of each kind, which are saved and loaded."""

import math
import re

import pytest
import torch
from conftest import ROOT
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from tiny_bases import KINDS, SIDE, request, save_and_load
from toy_upsampler import TOLD, Told, space_of, transformer

from lediflow import UserError, boost
from lediflow.codecs import Codec
from lediflow.pipelines.boost import ScaledAttention, base_latents, codec_of, scaled_attention
from lediflow.pipelines.recognise import unpacked
from lediflow.pipelines.upsample import FlowUpsamplePipeline


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases by kind, each loaded from its folder when it is first asked for."""
    loaded = {}

    def base(kind):
        if kind not in loaded:
            loaded[kind] = save_and_load(kind, tmp_path_factory.mktemp("bases") / kind)
        return loaded[kind]

    return base


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def upsampler_for(pipe, folder, **settings):
    """An upsampler trained for a base's codec, as its user gets it."""
    vae = codec_of(pipe)
    channels = vae.config.latent_channels
    made = FlowUpsamplePipeline(
        transformer(channels, 16), codec_space=space_of(vae, standard=True), scale=2, **settings
    )
    made.save_pretrained(folder)
    pipeline = FlowUpsamplePipeline.from_pretrained(folder, vae=vae)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("kind", KINDS)
def test_behind_every_kind_of_base_in_one_call_and_in_two(kind, bases, tmp_path):
    pipe = bases(kind)
    up = upsampler_for(pipe, tmp_path)
    out = boost(pipe, up, flow_steps=2, seed=3, **request(kind))
    assert out.images[0].size == (4 * SIDE, 4 * SIDE) and out.nfe == {"flow": 2, "codec": 1}

    g = generator(3)
    latents = base_latents(pipe, **request(kind), generator=g)
    two_calls = up(latents, 2, generator=g, input_type="latent")
    assert out.images[0].tobytes() == two_calls.images[0].tobytes()
    other = boost(pipe, up, flow_steps=2, seed=4, **request(kind))
    assert out.images[0].tobytes() != other.images[0].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_codec_reads_a_bases_latents_in_its_own_units(kind, bases):
    """Decoded by our codec they are the picture that the base itself makes of them."""
    pipe = bases(kind)
    latents = base_latents(pipe, **request(kind), generator=generator())
    if latents.ndim == 3:
        from lediflow.codecs import CodecSpace

        latents = unpacked(latents, CodecSpace.from_dict(space_of(pipe.vae)), None, None)
    assert latents.shape[2:] == (SIDE, SIDE)
    kind_of_array = "numpy" if kind == "ldm" else "pt"
    own = torch.as_tensor(pipe(**request(kind), generator=generator(), output_type=kind_of_array).images)
    own = own.movedim(-1, 1) if kind == "ldm" else own
    torch.testing.assert_close(Codec(codec_of(pipe)).decode(latents), own * 2 - 1, rtol=1e-3, atol=1e-3)


def test_several_prompts_and_sizes_that_are_not_square(bases, tmp_path):
    pipe = bases("flux")
    up = upsampler_for(pipe, tmp_path)
    out = boost(
        pipe,
        up,
        ["a cat", "a"],
        num_inference_steps=1,
        flow_steps=1,
        height=16,
        width=32,
        max_sequence_length=8,
    )
    assert [image.size for image in out.images] == [(64, 32)] * 2
    tiles = boost(
        pipe, up, "a", num_inference_steps=1, flow_steps=1, height=16, width=32, max_sequence_length=8,
        tile_size=32, output_type="latent",
    )  # fmt: skip
    assert tiles.images.shape == (1, 16, 16, 32) and tiles.nfe == {"flow": 3}


def test_a_lists_of_generators_is_one_for_each_image(bases, tmp_path):
    pipe = bases("sd")
    up = upsampler_for(pipe, tmp_path)
    both = boost(
        pipe,
        up,
        ["a cat"] * 2,
        generator=[generator(1), generator(2)],
        num_inference_steps=1,
        output_type="pt",
    )
    second = boost(pipe, up, "a cat", generator=[generator(2)], num_inference_steps=1, output_type="pt")
    torch.testing.assert_close(both.images[1:], second.images, rtol=0, atol=1e-4)


def test_the_codec_of_another_base_is_refused_with_words(bases, tmp_path):
    """SD 1.5 and SDXL both have four channels; SD3 has sixteen."""
    up = upsampler_for(bases("sd"), tmp_path)
    assert boost(bases("lcm"), up, "a", num_inference_steps=1).images, "the same codec behind another base"
    with pytest.raises(UserError, match="latents are others, though of the same shape"):
        boost(bases("sdxl"), up, "a", num_inference_steps=1)
    with pytest.raises(UserError, match="latents are 16 channels of 1/2 of a side; .*4 channels of 1/2"):
        boost(bases("sd3"), up, "a", num_inference_steps=1)
    with pytest.raises(UserError, match="latents are others"):
        FlowUpsamplePipeline.from_pretrained(tmp_path, vae=bases("sdxl").vae)


def test_a_base_in_bfloat16_has_the_same_codec(bases, tmp_path):
    up = upsampler_for(bases("sd"), tmp_path / "up")
    pipe = save_and_load("sd", tmp_path / "sd").to(torch.bfloat16)
    out = boost(pipe, up, "a cat", num_inference_steps=1, flow_steps=1, output_type="pt")
    assert out.images.isfinite().all() and out.images.shape == (1, 3, 32, 32)


def test_an_upsampler_of_pixels_enlarges_what_any_base_shows(bases):
    up = FlowUpsamplePipeline(Told(conditions=TOLD))
    up.set_progress_bar_config(disable=True)
    pipe = bases("sd")
    out = boost(pipe, up, "a cat", num_inference_steps=1, seed=2)
    g = generator(2)
    small = pipe("a cat", num_inference_steps=1, generator=g).images
    assert out.images[0].size == (64, 64)
    assert out.images[0].tobytes() == up(small, generator=g).images[0].tobytes()


@pytest.fixture(scope="module")
def plain():
    """A base of pixels, without a codec and without output_type="latent"."""
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    pipe = DDPMPipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_base_of_pixels(plain, bases, tmp_path):
    up = FlowUpsamplePipeline(Told(conditions=TOLD))
    up.set_progress_bar_config(disable=True)
    assert boost(plain, up, num_inference_steps=1).images[0].size == (32, 32)
    with pytest.raises(UserError, match="DDPMPipeline has no autoencoder, so it makes no latents"):
        boost(plain, upsampler_for(bases("sd"), tmp_path), num_inference_steps=1)


def test_the_lines_of_the_docs_run(tmp_path, monkeypatch):
    pipe = save_and_load("sd", tmp_path / "base")
    upsampler_for(pipe, tmp_path / "upsampler")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "behind-diffusers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    made = {}
    for block in blocks[1:4]:  # the first enlarges a picture
        quick = block.replace("num_inference_steps=30", "num_inference_steps=2").replace("256", "8")
        exec(compile(quick, "behind-diffusers.md", "exec"), made)
        assert made["image"].size == (32, 32)
    assert made["latents"].shape == (1, 4, 4, 4), "of 8 pixels a side"


# Attention at another size


def test_the_scale_is_the_logarithm_of_tokens_to_the_base_of_those_in_training():
    halved = ScaledAttention(None, trained=4.0)  # an image of half the side
    assert halved.factor(1024) == pytest.approx(math.sqrt(math.log(1024, 4096)))
    assert ScaledAttention(None, trained=0.25).factor(4096) == pytest.approx(math.sqrt(math.log(4096, 1024)))
    assert ScaledAttention(None, trained=1.0).factor(64) == 1.0
    assert halved.factor(1) == 1.0, "one token attends to itself whatever the scale"


def test_self_attention_is_softmax_with_that_scale_and_goes_back(bases):
    unet = bases("sd").unet
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    x, text = torch.randn(2, 16, 8), torch.randn(2, 3, 8)
    before, crossed, processor = block.attn1(x), block.attn2(x, text), block.attn1.processor
    with scaled_attention(bases("sd"), 8, 8):  # 4x4 latents where 8x8 were trained on
        assert isinstance(block.attn1.processor, ScaledAttention)
        scaled = block.attn1(x)
        assert torch.equal(block.attn2(x, text), crossed), "attention to the text is left alone"
    assert block.attn1.processor is processor and torch.equal(block.attn1(x), before)

    def heads(y):
        return y.view(2, 16, block.attn1.heads, -1).transpose(1, 2)

    q, k, v = (heads(layer(x)) for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v))
    scale = math.sqrt(math.log(16, 64) / q.shape[-1])
    mixed = (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v
    torch.testing.assert_close(scaled, block.attn1.to_out[0](mixed.transpose(1, 2).reshape(2, 16, 8)))
    assert (scaled - before).abs().max() > 1e-6


def test_a_boosted_base_of_another_size_may_have_its_attention_scaled(bases, tmp_path):
    for kind in ("sdxl", "ldm"):
        pipe = bases(kind)
        up = upsampler_for(pipe, tmp_path / kind)
        size = {} if kind == "ldm" else {"height": 32, "width": 32}
        latents = [
            boost(
                pipe, up, flow_steps=1, output_type="latent", scale_attention=on, **request(kind), **size
            ).images
            for on in (False, True)
        ]
        if kind == "ldm":  # which makes its own size only
            assert torch.equal(*latents)
        else:
            assert latents[0].shape == (1, 4, 32, 32) and not torch.equal(*latents)
    with pytest.raises(RuntimeError, match="broken"), scaled_attention(pipe, 8, 8):
        raise RuntimeError("broken")
    assert not any(isinstance(getattr(m, "processor", None), ScaledAttention) for m in pipe.unet.modules()), (
        "off again after an error too"
    )
    with pytest.raises(UserError, match="StableDiffusion3Pipeline has no U-Net"):
        boost(bases("sd3"), up, "a", scale_attention=True)
