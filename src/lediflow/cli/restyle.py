"""`lediflow restyle`: sketches and collages as the model's own kind of pictures (SDEdit)."""

from __future__ import annotations

from pathlib import Path

from lediflow.cli.editing import Images, Output, Replace, Strength, Variants, edit_each
from lediflow.cli.options import (
    BatchSize,
    Classes,
    CodecFolder,
    Device,
    Dtype,
    FlowSolver,
    Json,
    LatentSolver,
    LatentSteps,
    Model,
    Seed,
    Steps,
)


def restyle(
    model: Model,
    images: Images,
    output: Output = Path("restyled"),
    strength: Strength = 0.5,
    num_images: Variants = 4,
    steps: Steps = None,
    solver: FlowSolver = None,
    latent_steps: LatentSteps = None,
    latent_solver: LatentSolver = None,
    classes: Classes = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    overwrite: Replace = False,
    codec: CodecFolder = None,
    device: Device = None,
    dtype: Dtype = "fp32",
    as_json: Json = False,
) -> None:
    """Make sketches and collages look like the pictures that the model was trained on.

    The flow starts partway, at a mixture of the picture and of noise, instead of at the beginning.

    Examples:

        lediflow restyle runs/flowers sketch.png --strength 0.6 -n 8 --output restyled

        lediflow restyle runs/flowers/baseline sketch.png --strength 0.6 --steps 8 --output restyled-fm
    """
    settings = {
        "strength": strength,
        "num_images": num_images,
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
        "restyle", model, images, output, settings,
        device=device, codec=codec, overwrite=overwrite, as_json=as_json,
    )  # fmt: skip
