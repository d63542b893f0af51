"""Does the data keep up? Share of time training waits for it, images decoded and latents read per second.

    python benchmarks/data.py --data "flowers/*.parquet" --preset flowers-64 --json data.json

Training is the real loop of `lediflow train` on a preset's stages, with the time in which it asks for batches
measured apart: from memory, decoding every image at every visit in worker processes, and on latents.
The latents come from a small untrained codec (factor 8, 4 channels; the numbers do not depend on its weights)
unless --latents names a folder, and are trained on by the preset's own networks with patches of one latent.
Stop other work first: the numbers are those of this machine as it is.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from lediflow import UserError, load_config, train
from lediflow.codecs import Codec
from lediflow.data.batches import batches
from lediflow.data.codec_latents import CodecLatents
from lediflow.data.encode import encode
from lediflow.data.images import ImageData
from lediflow.training import trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="DATASET of images")
    parser.add_argument("--preset", default="flowers-64")
    parser.add_argument("--latents", help="folder that `lediflow encode` wrote; default: made here")
    parser.add_argument("--steps", type=int, default=15, help="training steps timed in each case")
    parser.add_argument("--stage", action="append", help="default: auxiliary and baseline")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="decoding processes, at most"
    )
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    a = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(a, Path(folder))
    except UserError as error:
        sys.exit(f"error: {error}")
    print("| what | where from | workers | value |\n| --- | --- | ---: | ---: |")
    for row in rows:
        print(f"| {row['what']} | {row['source']} | {row['workers']} | {row['value']:,.2f} {row['unit']} |")
    if a.json:
        a.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=1))


def measure(a, folder: Path) -> list[dict]:
    config = load_config(a.preset)
    size = config.data.image_size
    latents = a.latents or make_latents(a.data, size, folder)
    rows = []

    def add(what, source, workers, value, unit):
        rows.append({"what": what, "source": source, "workers": workers, "value": value, "unit": unit})
        print(rows[-1], file=sys.stderr, flush=True)

    for workers in range(a.workers + 1):
        data = ImageData(a.data, image_size=size, channels=config.data.channels, crop="random", flip=True)
        add("images decoded", a.data, workers, per_second(data, workers, 20), "images/s")
    for source, cache_gb in (("memory", 1e3), ("disk", 0.0)):
        data = CodecLatents(latents, flip=True, cache_gb=cache_gb)
        add("latents read", source, 0, per_second(data, 0, 100), "latents/s")
    in_latents = latent_settings(latents)
    cases = [
        ("images in memory", 0, [f"data.train={a.data!r}", "data.cache_gb=1000"]),
        (
            "images decoded",
            a.workers,
            [f"data.train={a.data!r}", "data.crop=random", f"data.workers={a.workers}"],
        ),
        ("latents in memory", 0, [*in_latents, "data.cache_gb=1000"]),
        ("latents on disk", 0, [*in_latents, "data.cache_gb=0"]),
    ]
    for source, workers, settings in cases:
        for stage in a.stage or ("auxiliary", "baseline"):
            share = waiting(a.preset, settings, stage, a.steps, folder, a.device)
            add(f"{stage}: waiting for data", source, workers, 100 * share, "%")
    return rows


def make_latents(dataset: str, size: int, folder: Path) -> str:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            mid_block_add_attention=False,
        )
    vae.save_pretrained(folder / "codec")
    encode(dataset, Codec.load(folder / "codec"), folder / "latents", image_size=size, batch_size=64)
    return str(folder / "latents")


def latent_settings(folder: str) -> list[str]:
    space = CodecLatents(folder).space
    return [
        f"data.train={folder!r}",
        f"codec={{model: {space.codec}, factor: {space.factor}, channels: {space.channels}}}",
        "auxiliary.patch_size=1",
        "auxiliary.z_size=4",
        "flow.patch_size=1",
    ]


def per_second(data, workers: int, steps: int, batch_size: int = 64) -> float:
    """Items per second over `steps` batches, after those that start the workers and fill caches."""
    stream = batches(data, batch_size=batch_size, seed=0, stop=steps + 1 + workers, workers=workers)
    for _ in range(1 + workers):
        next(stream)
    began = time.perf_counter()
    count = sum(len(batch["index"]) for batch in stream)
    return count / (time.perf_counter() - began)


def waiting(preset: str, settings: list[str], stage: str, steps: int, folder: Path, device) -> float:
    """Share of the time between the first batch and the last in which the training loop waits for batches."""
    times: list[tuple[float, float]] = []  # when a batch was asked for, and when it was there

    def timed(*args, **kwargs):
        stream = batches(*args, **kwargs)
        while True:
            asked = time.perf_counter()
            batch = next(stream, None)
            times.append((asked, time.perf_counter()))
            if batch is None:
                return
            yield batch

    quiet = ["checkpoint_every", "preview_every", "log_every"]
    overrides = [*settings, *(f"training.{key}=1000000" for key in quiet), f"training.{stage}.steps={steps}"]
    original, trainer.batches = trainer.batches, timed
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            train(
                load_config(preset, overrides),
                Path(tempfile.mkdtemp(dir=folder)),
                stages=[stage],
                device=device,
            )
    finally:
        trainer.batches = original
    between = times[:steps]  # the first is the start; after the last come checkpoint and preview
    return sum(there - asked for asked, there in between[1:]) / (between[-1][1] - between[0][1])


if __name__ == "__main__":
    main()
