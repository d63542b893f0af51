"""What a cheaper decoder costs in quality: auxiliary models that differ in nothing but theta_D.

    python benchmarks/decoder.py digits --decoder-widths 64,64 32,64 32,32
    python benchmarks/decoder.py faces-64 --data faces64-train.parquet --steps 900 \
        --validation faces64-validation.parquet --decoder-widths 96,96,96 64,128,128

Widths and depths stand finest level first; the first row is the config's own decoder. Each model is trained
as `lediflow train --stage auxiliary` does it, for --steps steps with the same seed, and measured on held-out
images with z drawn from q(z|y): the mean VGL (eq. 4) and the ELBO loss (eq. 5 with beta 1) in nats per image
element, KL in nats per image, and the transport cost E||y - x||^2 per element. Decoders are timed in turns.
Models that are there already are only measured again.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from lediflow import UserError
from lediflow.data.images import ImageData
from lediflow.devices import DTYPES
from lediflow.diagnosis.measurements import transport
from lediflow.evaluation.latency import compare
from lediflow.evaluation.tables import markdown_table
from lediflow.gaussian import DiagonalGaussian, elbo_loss
from lediflow.pictures import to_float
from lediflow.sources import image_noise
from lediflow.training.config import load_config
from lediflow.training.run import train
from lediflow.training.run_pipelines import load_network

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
HEADERS = [
    "decoder widths", "depths", "parameters", "ms / image", "VGL", "KL", "ELBO loss", "transport cost"
]  # fmt: skip


def train_decoder(settings: list[str], common: list[str], a):
    """Return the config and the trained auxiliary model with the decoder that the settings give."""
    config = load_config(a.config, common + settings)
    c = config.auxiliary
    name = "-".join(str(n) for n in (*(c.decoder_widths or c.widths), "d", *(c.decoder_depths or c.depths)))
    run = train(config, a.output / Path(a.config).stem / name, stages=["auxiliary"], device=a.device)
    return config, load_network(run, "auxiliary", config)


@torch.no_grad()
def held_out_quality(model, images: torch.Tensor) -> list[str]:
    """VGL, KL, ELBO loss and transport cost over images y (N, C, H, W) in [-1, 1]."""
    posteriors = [model.encode(y) for y in images.split(64)]
    posterior = DiagonalGaussian(
        *(torch.cat([getattr(p, k) for p in posteriors]) for k in ("mean", "log_var"))
    )
    noise = image_noise(model.z_shape, seed=0, indices=range(len(images)), stream="z")
    priors = [model.decode(z) for z in posterior.at(noise).split(64)]
    prior = DiagonalGaussian(*(torch.cat([getattr(p, k) for p in priors]) for k in ("mean", "log_var")))
    return [
        f"{prior.nll(images).mean():.4f}",
        f"{posterior.kl().flatten(1).sum(1).mean():.2f}",
        f"{elbo_loss(prior, images, posterior):.4f}",
        f"{transport(images, prior)['learned']:.4f}",
    ]


def timings(models, batch: int, repeats: int, dtype, clock) -> list[str]:
    """Milliseconds of each decoder for one image of a batch."""
    calls = {}
    for i, model in enumerate(models):
        z = torch.randn(batch, *model.z_shape, dtype=dtype)
        calls[str(i)] = lambda model=model.to(dtype), z=z: torch.no_grad()(model.decode)(z)
    times = compare(calls, images=batch, repeats=repeats, warmup=2, clock=clock)
    return [f"{time.ms_per_image:.3f}" for time in times.values()]


def decoders(a) -> list[list[str]]:
    """Settings of each decoder, the config's own first.

    Raises:
        UserError: not as many depths as widths.
    """
    depths = a.decoder_depths or [None] * len(a.decoder_widths)
    if len(depths) != len(a.decoder_widths):
        raise UserError("--decoder-depths needs one list for each of --decoder-widths, or leave it out")
    found = [[]]
    for width, depth in zip(a.decoder_widths, depths, strict=True):
        chosen = {"decoder_widths": width, "decoder_depths": depth}
        found.append([f"auxiliary.{k}=[{v}]" for k, v in chosen.items() if v])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="digits", help="preset or YAML file")
    parser.add_argument("--decoder-widths", nargs="+", required=True, metavar="W,W,...")
    parser.add_argument(
        "--decoder-depths", nargs="+", metavar="D,D,...", help="one list for each of the widths"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--data", help="images; default: the config's")
    parser.add_argument("--validation", help="held-out images; default: the data's own split")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="for all decoders")
    parser.add_argument("--batch-size", type=int, default=64, help="of the timing")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the timing")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: for one thread on a machine that others share"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/decoders"))
    parser.add_argument("--device", help="of the training")
    a = parser.parse_args()
    common = [*a.settings, f"training.auxiliary.steps={a.steps}", "training.preview_every=1000000"]
    common += ["training.tracker=none"]
    common += [f"data.{k}={v!r}" for k, v in (("train", a.data), ("validation", a.validation)) if v]
    try:
        trained = [train_decoder(settings, common, a) for settings in decoders(a)]
        data = trained[0][0].data
        held_out = ImageData(
            data.validation or data.train,
            split="train" if data.validation else "validation",
            image_size=data.image_size,
            channels=data.channels,
        )
        images = to_float(held_out.images)
    except UserError as error:
        sys.exit(f"error: {error}")
    models = [model for _, model in trained]
    quality = [held_out_quality(model, images) for model in models]
    ms = timings(models, a.batch_size, a.repeats, DTYPES[a.dtype] or torch.float32, CLOCKS[a.clock])
    rows = []
    for (config, model), taken, measured in zip(trained, ms, quality, strict=True):
        c = config.auxiliary
        count = sum(p.numel() for name, p in model.named_parameters() if is_decoder(name))
        widths, depths = c.decoder_widths or c.widths, c.decoder_depths or c.depths
        rows.append(
            [", ".join(map(str, widths)), ", ".join(map(str, depths)), f"{count:,}", taken, *measured]
        )
    print(markdown_table(HEADERS, rows))


def is_decoder(parameter: str) -> bool:
    return parameter.split(".")[0] in (
        "latent_in", "decoder", "mapping_in", "mapping", "splits", "prior_norm", "prior_out"
    )  # fmt: skip


if __name__ == "__main__":
    main()
