"""`lediflow inpaint`: what a mask shows is made anew, and the rest stays bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lediflow.cli.editing import (
    ConstantNoise,
    EditSolver,
    EditSteps,
    Images,
    Output,
    Replace,
    Variants,
    edit_each,
)
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


def inpaint(
    model: Model,
    images: Images,
    mask: Annotated[
        str,
        typer.Option(
            help="White is made anew, grey blends: a file, a folder of them by name, or alpha, for what is "
            "transparent."
        ),
    ],
    output: Output = Path("inpainted"),
    strength: Annotated[
        float, typer.Option(help="0 keeps the picture's latent; up to 1 changes what is made more.")
    ] = 0.0,
    num_images: Variants = 1,
    padding_mask_crop: Annotated[
        int | None,
        typer.Option(help="Show the model only the mask and so many pixels around it; default: all it can."),
    ] = None,
    masked_content: Annotated[
        str, typer.Option(help="original: what is under the mask guides; fill: it is not looked at.")
    ] = "original",
    feather: Annotated[int, typer.Option(help="Soften the mask's edge over so many pixels.")] = 0,
    constant_noise: ConstantNoise = False,
    steps: Steps = None,
    solver: FlowSolver = None,
    latent_steps: EditSteps = None,
    latent_solver: EditSolver = None,
    classes: Classes = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    overwrite: Replace = False,
    codec: CodecFolder = None,
    device: Device = None,
    dtype: Dtype = "fp32",
    as_json: Json = False,
) -> None:
    """Make anew what a mask shows in white. Photos of any size keep it, and all else bit for bit.

    Examples:

        lediflow inpaint runs/flowers rose.jpg --mask hole.png -n 4 --output inpainted

        lediflow inpaint runs/flowers photos --mask masks --padding-mask-crop 32 --strength 0.5

        lediflow inpaint runs/flowers cut-out.png --mask alpha
    """
    settings = {
        "strength": strength,
        "num_images": num_images,
        "padding_mask_crop": padding_mask_crop,
        "masked_content": masked_content,
        "feather": feather,
        "constant_noise": constant_noise,
        "steps": steps,
        "solver": solver,
        "latent_steps": latent_steps,
        "latent_solver": latent_solver,
        "class_labels": classes,
        "seed": seed,
        "batch_size": batch_size,
        "dtype": dtype,
    }
    edit_each(
        "inpaint", model, images, output, settings, mask=mask,
        device=device, codec=codec, overwrite=overwrite, as_json=as_json,
    )  # fmt: skip
