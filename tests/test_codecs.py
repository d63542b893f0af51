"""Codecs: units, what is refused, and the scale of latents."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DModel, VQModel

from lediflow.codecs import Codec, CodecSpace, latent_digest
from lediflow.errors import UserError


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def tiny_autoencoder():
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
        scaling_factor=0.5,
    )


def test_latents_of_a_kl_autoencoder_are_in_the_units_of_its_config(tiny_codec, images):
    codec = Codec.load(tiny_codec)
    assert (codec.factor, codec.channels, codec.in_channels, codec.has_variance) == (2, 4, 3, True)
    raw = AutoencoderKL.from_pretrained(tiny_codec / "vae").encode(images).latent_dist
    encoded = codec.encode(images)
    assert encoded.mean.shape == (3, 4, 8, 8)
    torch.testing.assert_close(encoded.mean, (raw.mean - 0.1) * 0.7)
    torch.testing.assert_close(encoded.std, raw.std * 0.7)
    decoded = codec.decode(encoded.mean, batch_size=2)
    torch.testing.assert_close(decoded, codec.model.decode(raw.mean).sample.clamp(-1, 1))
    assert not codec.model.training and not any(p.requires_grad for p in codec.model.parameters())


def test_latents_of_a_tiny_autoencoder_have_no_variance(tiny_autoencoder, images, tmp_path):
    tiny_autoencoder.save_pretrained(tmp_path)
    codec = Codec.load(str(tmp_path))
    assert (codec.factor, codec.channels, codec.has_variance) == (4, 4, False)
    encoded = codec.encode(images)
    assert encoded.mean.shape == (3, 4, 4, 4)
    torch.testing.assert_close(encoded.mean, tiny_autoencoder.encode(images).latents * 0.5)
    assert torch.equal(encoded.at(torch.ones_like(encoded.mean)), encoded.mean)
    wanted = tiny_autoencoder.decode(encoded.mean / 0.5).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(encoded.mean), wanted)


def test_the_hash_tells_weights_and_config_apart(tiny_codec, tmp_path):
    first = Codec.load(tiny_codec)
    assert first.hash == Codec.load(tiny_codec / "vae").hash
    model = Codec.load(tiny_codec).model
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(tmp_path / "weights")
    config = shutil.copytree(tiny_codec / "vae", tmp_path / "config") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.8}))
    hashes = {first.hash, *(Codec.load(tmp_path / name).hash for name in ("weights", "config"))}
    assert len(hashes) == 3


def test_what_is_no_codec_is_refused_by_name(tiny_codec, tmp_path):
    with pytest.raises(UserError, match="no codec .*nowhere"):
        Codec.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot load the codec"):
        Codec.load(tmp_path)
    with pytest.raises(UserError, match="cannot load the codec 'owner/name'"):
        Codec.load("owner/name", offline=True)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="is a UNet2DModel, no codec; give one of AutoencoderKL or"):
        Codec.load(tmp_path / "unet")
    broken = shutil.copytree(tiny_codec / "vae", tmp_path / "broken")
    weights = broken / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load the codec"):
        Codec.load(broken)
    weights.unlink()  # pickled weights are not an alternative
    torch.save(Codec.load(tiny_codec).model.state_dict(), weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="cannot load the codec"):
        Codec.load(broken)


def test_a_codec_space_normalises_and_back(tiny_codec):
    codec = Codec.load(tiny_codec)
    space = CodecSpace(str(tiny_codec), codec.hash, 2, 4, (0.0, 1.0, -2.0, 3.0), (1.0, 2.0, 0.5, 4.0))
    assert CodecSpace.from_dict(json.loads(json.dumps(space.to_dict() | {"other": 1}))) == space
    noise = torch.randn(500, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = space.denormalize(noise)
    assert latents.mean((0, 2, 3)).tolist() == pytest.approx([0, 1, -2, 3], abs=0.15)
    assert latents.std((0, 2, 3)).tolist() == pytest.approx([1, 2, 0.5, 4], rel=0.05)
    torch.testing.assert_close(space.normalize(latents), noise)
    assert space.load_codec().hash == space.hash
    other = CodecSpace(str(tiny_codec), "0" * 16, 2, 4, space.mean, space.std)
    with pytest.raises(UserError, match="is not the one that this model's latents were made with"):
        other.load_codec()


def half_of(folder):
    return Codec.load(folder).model.half()


def test_latents_with_a_mean_and_deviation_are_in_the_units_of_diffusers(images):
    """As SDXL's pipelines do: (v - mean) * scaling_factor / std, and back."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, scaling_factor=0.5,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.0, 2.0],
    ).eval()  # fmt: skip
    mean, std = (torch.tensor(v).view(4, 1, 1) for v in (model.config.latents_mean, model.config.latents_std))
    codec, raw = Codec(model), model.encode(images).latent_dist
    encoded = codec.encode(images)
    torch.testing.assert_close(encoded.mean, (raw.mean - mean) * 0.5 / std)
    torch.testing.assert_close(encoded.std, raw.std * 0.5 / std)
    decoded = codec.decode(encoded.mean)
    torch.testing.assert_close(decoded, model.decode(raw.mean).sample.clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_a_vector_quantised_model_is_a_codec_without_variance(images, tmp_path):
    torch.manual_seed(0)
    VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, num_vq_embeddings=16, scaling_factor=0.5,
    ).save_pretrained(tmp_path)  # fmt: skip
    codec = Codec.load(tmp_path)
    assert (codec.factor, codec.channels, codec.has_variance) == (2, 3, False)
    latents = codec.encode(images).mean
    torch.testing.assert_close(latents, codec.model.encode(images).latents * 0.5)
    torch.testing.assert_close(codec.decode(latents), codec.model.decode(latents / 0.5).sample.clamp(-1, 1))


def test_the_hash_of_latents_is_of_the_encoder_and_the_units_in_any_precision(tiny_codec):
    model = Codec.load(tiny_codec).model
    first = latent_digest(model)
    assert {
        latent_digest(Codec.load(tiny_codec).model.to(dtype)) for dtype in (torch.float16, torch.bfloat16)
    } == {first}
    with torch.no_grad():
        next(model.decoder.parameters()).neg_()
    assert latent_digest(model) == first, "another decoder reads the same latents"
    model.register_to_config(scaling_factor=0.8)
    units = latent_digest(model)
    model.register_to_config(scaling_factor=0.7)
    with torch.no_grad():
        next(model.encoder.parameters()).neg_()
    assert len({first, units, latent_digest(model)}) == 3


def test_an_offloaded_codec_computes_where_its_hook_says(tiny_codec):
    codec = Codec.load(tiny_codec)
    assert codec.device == torch.device("cpu")
    codec.model._hf_hook = SimpleNamespace(execution_device="cuda:1")
    assert codec.device == torch.device("cuda:1")


def test_a_codec_that_overflows_in_half_precision_works_in_full(tiny_codec, images):
    model = half_of(tiny_codec)
    exact = Codec(half_of(tiny_codec).float())
    codec = Codec(model)
    assert model.config.force_upcast
    encoded = codec.encode(images)
    torch.testing.assert_close(encoded.mean, exact.encode(images).mean)
    torch.testing.assert_close(codec.decode(encoded.mean), exact.decode(encoded.mean))
    assert model.dtype == torch.float16, "and is as it was"
