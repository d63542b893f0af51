"""`lediflow reconstruct`: what a model makes of pictures that are encoded and made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lediflow.cli.editing import Images, Output, Replace, cell, edit_each
from lediflow.cli.options import (
    BatchSize,
    Classes,
    CodecFolder,
    Device,
    Dtype,
    FlowSolver,
    Json,
    Model,
    Seed,
    Steps,
)


def reconstruct(
    model: Model,
    images: Images,
    output: Output = Path("reconstructed"),
    steps: Steps = None,
    solver: FlowSolver = None,
    classes: Classes = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    overwrite: Replace = False,
    codec: CodecFolder = None,
    device: Device = None,
    dtype: Dtype = "fp32",
    as_json: Json = False,
) -> None:
    """Encode pictures and make them again: what the model can hold of them.

    grid.png shows the picture, the prior's mean, a sample of the prior, and the image made of that.

    Examples:

        lediflow reconstruct runs/flowers rose.jpg --output reconstructed

        lediflow reconstruct runs/flowers photos --steps 4 --solver midpoint --output reconstructed-4
    """
    settings = {
        "steps": steps,
        "solver": solver,
        "class_labels": classes,
        "seed": seed,
        "batch_size": batch_size,
        "dtype": dtype,
    }
    edit_each(
        "reconstruct", model, images, output, settings,
        device=device, codec=codec, overwrite=overwrite, as_json=as_json, row=_row,
    )  # fmt: skip


def _row(photo: Any, out: Any, shape: tuple[int, int, int]) -> list[Any]:
    return [
        cell(picture, shape) for picture in (photo, out.prior_mean[0], out.prior_sample[0], out.images[0])
    ]
