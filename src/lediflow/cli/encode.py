"""`lediflow encode`: images -> a folder of latents, once, for all training that follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lediflow.cli.options import Dataset, Device, Json, Split


def encode(
    dataset: Dataset,
    codec: Annotated[
        str, typer.Option(metavar="MODEL", help="AutoencoderKL or AutoencoderTiny: folder or Hub id.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the latents; an unfinished one is resumed.")
    ],
    image_size: Annotated[int, typer.Option(help="Side of the images, pixels.")] = 256,
    pairs: Annotated[
        str | None,
        typer.Option(
            metavar="LOW:HIGH",
            help="Pairs for an upsampler: images of HIGH px, and the same made LOW px small; instead of "
            "--image-size.",
            show_default=False,
        ),
    ] = None,
    enlarge: Annotated[
        str,
        typer.Option(
            help="With --pairs: latents keeps those of the small images; pixels enlarges them as images and "
            "encodes them again (upsampler.enlarge=pixels)."
        ),
    ] = "latents",
    text: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Keep the texts of this column beside the latents, for a model that is told words "
            "(text.encoder); a+b joins two, label takes the names of the classes.",
            show_default=False,
        ),
    ] = None,
    split: Split = "train",
    dtype: Annotated[str, typer.Option(help="Of the stored latents: fp16 (finer) or bf16 (wider).")] = "fp16",
    sample: Annotated[
        str | None,
        typer.Option(
            help="posterior stores mean and variance, to draw from in training; mode stores the mean only. "
            "Default: what the codec has.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 16,
    shard_size: Annotated[int, typer.Option(help="Images in a file.")] = 2048,
    workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Encode images and their mirror images to latents that training reads with no codec in memory.

    Several processes share the work, each making its own files; stopped, the same command resumes where it
    was. Images are cropped at the centre; broken ones are left out and named in latents.json.

    Examples:

        lediflow encode photos/ --codec stabilityai/sd-vae-ft-mse --output latents

        lediflow encode photos/ --codec stabilityai/sd-vae-ft-mse --pairs 256:1024 --output pairs

        accelerate launch --multi-gpu -m lediflow encode "shards/{000..099}.tar" --codec vae/ --output latents
    """
    from accelerate import PartialState

    from lediflow.cli.counting import counting
    from lediflow.codecs import Codec
    from lediflow.data.encode import encode as encode_dataset
    from lediflow.devices import check_device
    from lediflow.files import check_output, shown

    low_size, image_size = _sizes(pairs, image_size)
    place = check_device(device)
    state = PartialState(cpu=place.type == "cpu")
    check_output(output)
    loaded = Codec.load(codec, device=state.device if state.device.type == place.type else place)
    with counting("encode", silent=not state.is_main_process) as progress:
        meta = encode_dataset(
            dataset,
            loaded,
            output,
            image_size=image_size,
            low_size=low_size,
            enlarge=enlarge,
            text=text,
            split=split,
            dtype=dtype,
            sample=sample,
            batch_size=batch_size,
            shard_size=shard_size,
            workers=workers,
            rank=state.process_index,
            world_size=state.num_processes,
            progress=progress,
        )
    if meta is None:  # the process that ends last tells
        return
    if as_json:
        print(json.dumps(meta))
        return
    side = image_size // meta["factor"]
    print(f"{meta['count']:,} images as latents of {meta['channels']}x{side}x{side} in {shown(output)}")
    if meta["broken"]:
        name, reason = meta["broken"][0]
        print(f"{len(meta['broken']):,} could not be read, for example {name} ({reason}); see latents.json")
    print(f"next: lediflow train PRESET --data {shown(output)} --set codec.model={meta['codec']}")


def _sizes(pairs: str | None, image_size: int) -> tuple[int | None, int]:
    """Return the sides of the small images, if there are any, and of the large ones."""
    from lediflow.errors import UserError

    if pairs is None:
        return None, image_size
    low, _, high = pairs.partition(":")
    if not (low.isdecimal() and high.isdecimal()):
        raise UserError(f"--pairs {pairs!r}: write it as LOW:HIGH in pixels, such as 256:1024")
    return int(low), int(high)
