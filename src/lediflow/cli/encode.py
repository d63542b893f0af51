"""`lediflow encode`: images -> a folder of latents, once, for all training that follows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lediflow.cli.options import Dataset, Device, Split


def encode(
    dataset: Dataset,
    codec: Annotated[
        str, typer.Option(metavar="MODEL", help="AutoencoderKL or AutoencoderTiny: folder or Hub id.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the latents; an unfinished one is gone on with.")],
    image_size: Annotated[int, typer.Option(help="Side of the images, pixels.")] = 256,
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
) -> None:
    """Encode images and their mirror images to latents that training reads with no codec in memory.

    Several processes share the work, each making its own files; stopped, the same command goes on where it
    was. Images are cropped at the centre; broken ones are left out and named in latents.json.

    Examples:

        lediflow encode photos/ --codec stabilityai/sd-vae-ft-mse --output latents

        accelerate launch --multi-gpu -m lediflow encode "shards/{000..099}.tar" --codec vae/ --output latents
    """
    import sys
    from contextlib import nullcontext

    from accelerate import PartialState
    from rich.console import Console
    from rich.progress import Progress

    from lediflow.codecs import Codec
    from lediflow.data.encode import encode as encode_dataset
    from lediflow.training.processes import check_device

    place = check_device(device)
    state = PartialState(cpu=place.type == "cpu")
    loaded = Codec.load(codec, device=state.device if state.device.type == place.type else place)
    bar = Progress(console=Console(stderr=True)) if state.is_main_process and sys.stderr.isatty() else None
    with bar or nullcontext():
        task = bar.add_task("encoding", total=None) if bar else None

        def progress(done: int, total: int) -> None:
            if bar is not None and task is not None:
                bar.update(task, completed=done, total=total)

        meta = encode_dataset(
            dataset,
            loaded,
            output,
            image_size=image_size,
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
    side = image_size // meta["factor"]
    print(f"{meta['count']:,} images as latents of {meta['channels']}x{side}x{side} in {output}")
    if meta["broken"]:
        name, reason = meta["broken"][0]
        print(f"{len(meta['broken']):,} could not be read, for example {name} ({reason}); see latents.json")
    print(f"next: lediflow train PRESET --data {output} --set codec.model={meta['codec']}")
