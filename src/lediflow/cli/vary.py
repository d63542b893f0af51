"""`lediflow vary`: variants of pictures."""

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
    Strength,
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


def vary(
    model: Model,
    images: Images,
    output: Output = Path("varied"),
    strength: Strength = 0.5,
    num_images: Variants = 4,
    constant_noise: ConstantNoise = False,
    mask: Annotated[
        str | None,
        typer.Option(help="What may change is white: a file, a folder of them by name, or alpha."),
    ] = None,
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
    """Make variants of pictures: near ones with a small --strength, distant ones with a large one.

    Strength 0 keeps the picture's latent z, so only details differ; --constant-noise keeps those details.

    Examples:

        lediflow vary runs/flowers rose.jpg --strength 0.5 -n 8 --output varied

        lediflow vary runs/flowers photos --strength 0 --output details
    """
    settings = {
        "strength": strength,
        "num_images": num_images,
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
        "vary", model, images, output, settings, mask=mask,
        device=device, codec=codec, overwrite=overwrite, as_json=as_json,
    )  # fmt: skip
