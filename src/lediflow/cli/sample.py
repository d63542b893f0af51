"""`lediflow sample`: a trained model -> PNG files and a grid."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from lediflow.cli.options import Device


def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Run folder, saved pipeline folder, or Hub id.")
    ],
    num_images: Annotated[int, typer.Option("-n", "--num-images", help="How many images.")] = 16,
    steps: Annotated[
        int | None, typer.Option(help="Solver steps of the flow; default 2, or 8 for plain flow matching.")
    ] = None,
    latent_steps: Annotated[
        int | None, typer.Option(help="Solver steps of the latent sampler; default 4. LeDiFlow only.")
    ] = None,
    solver: Annotated[str, typer.Option(help="euler, midpoint, heun2, heun3, rk4 or dopri5.")] = "midpoint",
    output: Annotated[Path, typer.Option(help="Folder for 000000.png ... and grid.png.")] = Path("samples"),
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) only.")] = 0,
    first_image: Annotated[int, typer.Option(help="Index of the first image, to go on with a request.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 64,
    codec: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of the codec, if it is not where it was when the latents were made.",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16 (autocast).")] = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Make new images with a trained model.

    Examples:

        lediflow sample runs/flowers -n 64 --steps 2 --latent-steps 4 --output samples

        lediflow sample runs/flowers/baseline -n 64 --steps 8 --output samples-fm
    """
    import torch

    from lediflow.errors import UserError, nearest
    from lediflow.evaluation.report import image_grid
    from lediflow.files import written_whole
    from lediflow.pipelines.base import load_pipeline, to_pil
    from lediflow.training.trainer import check_device

    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in dtypes:
        raise UserError(f"unknown dtype {dtype!r}{nearest(dtype, dtypes)}; choose from {', '.join(dtypes)}")
    pipeline = load_pipeline(model).to(check_device(device))
    if codec is not None:
        pipeline.load_codec(codec)
    options = {}
    if steps is not None:
        options["steps"] = steps
    if latent_steps is not None:
        if not hasattr(pipeline, "sampler"):
            raise UserError(
                f"{model} is plain flow matching: it has no latent sampler, leave --latent-steps out"
            )
        options["latent_steps"] = latent_steps

    began = time.perf_counter()
    out = pipeline(
        num_images,
        solver=solver,
        seed=seed,
        first_image=first_image,
        batch_size=batch_size,
        dtype=dtypes[dtype],
        output_type="pt",
        **options,
    )
    seconds = time.perf_counter() - began
    try:
        for i, image in enumerate(to_pil(out.images), start=first_image):
            with written_whole(output / f"{i:06d}.png") as path:
                image.save(path)
        with written_whole(output / "grid.png") as path:
            image_grid(out.images[:256], scale=max(1, 64 // out.images.shape[-1])).save(path)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error}") from None

    report = {
        "model": str(model),
        "images": num_images,
        "output": str(output),
        "nfe": out.nfe,
        "ms_per_image": round(1000 * seconds / num_images, 3),
    }
    if as_json:
        print(json.dumps(report))
    else:
        evaluations = ", ".join(f"{name} {n}" for name, n in out.nfe.items())
        print(f"{num_images} images in {output}; grid.png shows them together")
        print(f"network evaluations: {evaluations}")
        print(f"{report['ms_per_image']} ms per image, the first batch's warm-up included")
