"""What several tests share: tiny settings, a tiny trained run, and where real data may lie."""

import gc
import logging
import os
import random
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

# before torch loads: threads that spin while they wait slow everybody down on a busy machine (cli/app.py)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import numpy as np
import pytest
import torch

# of every test; the suite was run at several, so what a test says must hold at any
SEED = int(os.environ.get("LEDIFLOW_TEST_SEED", "0"))
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

ROOT = Path(__file__).resolve().parent.parent

FIRST_STAGES = ("auxiliary", "flow", "sampler", "baseline")
REFINING = ("meanflow", "sampler-meanflow", "baseline-meanflow", "distill", "meanflow-distill")
UPSAMPLING = (
    "upsampler",
    "upsampler-meanflow",
    "upsampler-gaussian",
    "upsampler-regression",
    "upsampler-diffusion",
    "upsampler-prior",
    "upsampler-learned",
    "upsampler-learned-meanflow",
)

# the smallest digits run that still has every part: two levels, neighbourhood attention, a decoder of its own
TINY = [
    "clusters.count=0",
    "temperature=1",
    "training.sampler_meanflow.guidance=null",
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
    "upsampler.scale=4",
    "upsampler.transformer={patch_size: 4, widths: [16], depths: [1], d_head: 8, mapping_width: 16}",
    "upsampler.prior={width: 8, depth: 1}",
    "training.precision=fp32",
    "training.log_every=2",
    "training.distill.pairs=300",
    "training.meanflow_distill.pairs=300",
    f"training.stages=[{', '.join(FIRST_STAGES)}]",
    *(
        f"training.{stage}.{setting}"
        for stage in (name.replace("-", "_") for name in (*FIRST_STAGES, *REFINING, *UPSAMPLING))
        for setting in ("steps=6", "batch_size=8", "warmup_steps=2", "schedule=constant")
    ),
]


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """What is imported by now stays; to look through it would take each stage a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """Every test meets the same random numbers, alone and in company."""
    random.seed(SEED)
    np.random.seed(SEED % 2**32)
    torch.manual_seed(SEED)


def shared(name: str) -> Path:
    """Path of real data beside the checkout (or in LEDIFLOW_SHARED); skips the test where it is absent."""
    path = Path(os.environ.get("LEDIFLOW_SHARED", ROOT.parent / "shared")) / name
    if not path.exists():
        pytest.skip(f"real data not here: {path}")
    return path


def weights(run, stage):
    """The averaged weights of a stage's last checkpoint, by name."""
    from safetensors.torch import load_file

    from lediflow.training.run_pipelines import last_checkpoint

    return load_file(last_checkpoint(run, stage) / "ema.safetensors")


def randomized(model, scale=0.2):
    """Give a network weights of which none is zero, for those would hide what is not connected."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise.abs() if p.ndim == 1 else scale * noise)
    return model.eval()


def giant_png(path, side):
    """A few bytes that say they are a black and white square of so many pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


# Commands


@pytest.fixture
def lediflow(monkeypatch, capsys):
    """Run a command in this process; what a shell would start differs only in time."""
    from lediflow.cli.app import main

    # diffusers' logger writes to the stderr that it first met, which may be an earlier test's
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lediflow", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, end.value.code or 0, out, err)

    return run


def refused(result, *parts):
    """A user's mistake: exit code 2, a short message, no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr
    return True


# Stages without a run: of networks with random weights, on the held-out digits

CPU = torch.device("cpu")


def random_network(config, stage):
    """What a finished stage might have left: random weights, and statistics of z that are not 0 and 1."""
    from lediflow.training.builders import build_network
    from lediflow.training.stages import STAGES

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # frequencies are drawn too
        network = randomized(build_network(STAGES[stage], config))
    if hasattr(network, "z_mean"):
        channels = torch.arange(1.0, network.z_mean.numel() + 1).view_as(network.z_mean)
        network.z_mean.copy_(0.3 * channels)
        network.z_std.copy_(0.5 + 0.4 * channels)
    return network


def context_of(data, *settings):
    """What the stages of a run share, with random networks for those that are finished."""
    from lediflow.training.config import load_config
    from lediflow.training.couplings import Context

    config = load_config("digits", [*TINY, *settings])
    return Context(config, data, CPU, lambda stage: random_network(config, stage))


def stage_of(data, name, *settings):
    """A stage as training would begin it, were random networks the finished ones."""
    from lediflow.training.builders import build_stage

    return build_stage(name, context_of(data, *settings))


def digits_data(**options):
    """The held-out digits."""
    from lediflow.data.images import ImageData

    settings = {"split": "validation", "image_size": 16, "channels": 1, "flip": False, **options}
    return ImageData("digits", **settings)


def batch_of(data, count=8, seed=0):
    """The first batch that a stage would get."""
    from lediflow.data.batches import batches

    return next(batches(data, batch_size=count, seed=seed, stop=1))


def step_noise(count=8, seed=3):
    """The noise of one step; asked again it gives the same."""
    from lediflow.sources import BatchNoise

    return BatchNoise(seed, batch_size=count, positions=range(count), device=CPU)


@pytest.fixture(scope="session")
def digits():
    """The held-out digits, none mirrored, all in memory."""
    return digits_data()


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

    run = tmp_path_factory.mktemp("runs") / "mean"
    shutil.copytree(tiny_run, run)
    return train(load_config("digits", TINY), run, stages=REFINING, device="cpu")


@pytest.fixture(scope="session")
def tiny_upsampler_run(tmp_path_factory):
    """A run folder of upsamplers, six steps each: from a learned start, a regression, a diffusion model."""
    from lediflow.training.config import load_config
    from lediflow.training.run import train

    stages = [name for name in UPSAMPLING if name != "upsampler-gaussian"]
    return train(
        load_config("digits", [*TINY, "upsampler.crop=8"]),
        tmp_path_factory.mktemp("runs") / "upsamplers",
        stages=stages,
        device="cpu",
    )


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


# The browser app


@pytest.fixture(scope="session")
def app_models(tiny_run):
    """The tiny run with its baseline, as the app loads it."""
    from lediflow.app.models import Models

    return Models.load(str(tiny_run), device="cpu")


@pytest.fixture
def app_limits():
    """What one visitor may ask for."""
    from lediflow.app.limits import Limits

    return Limits()


@pytest.fixture
def app_session(tmp_path):
    """A visitor's pictures."""
    from lediflow.app.session import Session

    return Session(tmp_path, 200)


@pytest.fixture(scope="session")
def served_page(app_models):
    """The page of the tiny model, at a free port of this machine."""
    pytest.importorskip("gradio", reason="the extra app is not installed")
    from lediflow.app.limits import Limits
    from lediflow.app.serve import served

    with served(app_models, Limits()) as page:
        yield page


@pytest.fixture
def photo(tmp_path):
    """A file of 40 x 30 pixels by chance, of which no two neighbours are alike."""
    from PIL import Image

    pixels = np.random.default_rng(SEED).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path
