"""What several tests share: tiny settings, a tiny trained run, and where real data may lie."""

import os
import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

FIRST_STAGES = ("auxiliary", "flow", "sampler", "baseline")

# the smallest digits run that still has every part: two levels, neighbourhood attention, a decoder of its own
TINY = [
    "auxiliary.widths=[16,16]",
    "auxiliary.d_head=8",
    "flow.patch_size=2",
    "flow.widths=[16,16]",
    "flow.depths=[1,1]",
    "flow.d_head=8",
    "flow.mapping_width=16",
    "sampler.widths=[16]",
    "sampler.depths=[1]",
    "sampler.d_head=8",
    "sampler.mapping_width=16",
    "training.precision=fp32",
    "training.log_every=2",
    "training.distill.pairs=300",
    f"training.stages=[{', '.join(FIRST_STAGES)}]",
    *(
        f"training.{stage}.{setting}"
        for stage in (
            *FIRST_STAGES,
            *("meanflow", "sampler_meanflow", "baseline_meanflow", "distill"),
        )
        for setting in ("steps=6", "batch_size=8", "warmup_steps=2", "schedule=constant")
    ),
]


def shared(name: str) -> Path:
    """Path of real data beside the checkout (or in LEDIFLOW_SHARED); skips the test where it is absent."""
    path = Path(os.environ.get("LEDIFLOW_SHARED", ROOT.parent / "shared")) / name
    if not path.exists():
        pytest.skip(f"real data not here: {path}")
    return path


def weights(run, stage):
    """The averaged weights of a stage's last checkpoint, by name."""
    from safetensors.torch import load_file

    from lediflow.training.run import last_checkpoint

    return load_file(last_checkpoint(run, stage) / "ema.safetensors")


def randomized(model, scale=0.2):
    """Give a network weights of which none is zero, for those would hide what is not connected."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise.abs() if p.ndim == 1 else scale * noise)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run folder with all four stages trained for six steps; copy it before you change it."""
    from lediflow.training.config import load_config
    from lediflow.training.run import train

    return train(load_config("digits", TINY), tmp_path_factory.mktemp("runs") / "tiny", device="cpu")


@pytest.fixture(scope="session")
def tiny_mean_run(tiny_run, tmp_path_factory):
    """The same with the stages that refine to one evaluation, six steps each."""
    from lediflow.training.config import load_config
    from lediflow.training.run import train
    from lediflow.training.stage_config import TEACHERS

    run = tmp_path_factory.mktemp("runs") / "mean"
    shutil.copytree(tiny_run, run)
    return train(load_config("digits", TINY), run, stages=TEACHERS, device="cpu")


@pytest.fixture(scope="session")
def tiny_codec(tmp_path_factory):
    """A pipeline folder with a random AutoencoderKL in `vae`: factor 2, 4 channels, a scale and a shift."""
    import torch
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.7,
            shift_factor=0.1,
        )
    folder = tmp_path_factory.mktemp("codecs") / "tiny"
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="session")
def tiny_latents(tiny_codec, tmp_path_factory):
    """The held-out digits at 16 px as latents, in three shards."""
    from lediflow.codecs import Codec
    from lediflow.data.encode import encode

    folder = tmp_path_factory.mktemp("latents") / "digits"
    codec = Codec.load(tiny_codec)
    encode("digits", codec, folder, image_size=16, split="validation", shard_size=100, batch_size=50)
    return folder


def tiny_codec_settings(codec, latents):
    """Settings of the smallest digits run in latents."""
    return [
        *TINY,
        f"codec={{model: {codec}, factor: 2, channels: 4}}",
        f"data.train={str(latents)!r}",
        "data.image_size=16",
        "data.channels=3",
        "data.flip=true",
    ]
