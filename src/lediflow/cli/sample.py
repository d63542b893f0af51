"""`lediflow sample`: a trained model -> PNG files and a grid."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lediflow.cli.options import Device

GRID_IMAGES = 256


def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Run folder, saved pipeline folder, or Hub id.")
    ],
    num_images: Annotated[int, typer.Option("-n", "--num-images", help="How many images.")] = 16,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Solver steps of the flow; default 1 with mean, else 2, or 8 for plain flow matching.",
            show_default=False,
        ),
    ] = None,
    latent_steps: Annotated[
        int | None,
        typer.Option(
            help="Solver steps of the latent sampler; default 1 with mean, else 4. LeDiFlow only.",
            show_default=False,
        ),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help="Of the flow: mean (one evaluation a step), euler, midpoint, heun2, heun3, rk4 or dopri5. "
            "Default: mean where the model has an average velocity (stage meanflow or distill), else "
            "midpoint.",
            show_default=False,
        ),
    ] = None,
    latent_solver: Annotated[
        str | None,
        typer.Option(
            help="Of the latent sampler. Default: mean where it has an average velocity (stage "
            "sampler-meanflow), else that of the flow, or midpoint where that is mean. LeDiFlow only.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="Class by name or index; given again, images take them in turn."),
    ] = None,
    guidance: Annotated[
        float, typer.Option(help="Classifier-free guidance of the flow; 1 for none, else twice the work.")
    ] = 1.0,
    latent_guidance: Annotated[
        float | None, typer.Option(help="The same for the latent sampler; default 1. LeDiFlow only.")
    ] = None,
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
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16 or auto (autocast).")] = "fp32",
    compile: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the model first: a minute or more, then faster. For many images."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Make new images with a trained model.

    A model refined to one evaluation (see `lediflow train`) takes one step by default; RUN/flow is the same
    model before.

    Examples:

        lediflow sample runs/flowers -n 64 --output samples

        lediflow sample runs/flowers/flow -n 64 --solver midpoint --steps 2 --latent-steps 4

        lediflow sample runs/flowers/baseline -n 64 --steps 8 --output samples-fm

        torchrun --nproc-per-node 8 -m lediflow sample runs/flowers -n 50000 --class tulips --guidance 1.5
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from lediflow.errors import UserError
    from lediflow.evaluation.report import image_grid
    from lediflow.evaluation.sampling import in_words, latent_words
    from lediflow.files import written_whole
    from lediflow.pipelines.base import load_pipeline, to_pil
    from lediflow.precision import DTYPES, settle_precision
    from lediflow.training.processes import batches_of_process, check_device

    where = check_device(device)
    dtype = settle_precision(dtype, where)
    processes = PartialState(cpu=where.type == "cpu")
    pipeline = load_pipeline(model).to(where if processes.num_processes == 1 else processes.device)
    if codec is not None:
        pipeline.load_codec(codec)
    if compile:
        pipeline.compile()
    pipeline.set_progress_bar_config(disable=processes.num_processes > 1)
    options = _options(
        pipeline,
        model,
        {"solver": solver, "steps": steps},
        {"latent_solver": latent_solver, "latent_steps": latent_steps},
        latent_guidance,
    )

    shown, nfe, seconds = [], {}, 0.0
    try:
        for part in batches_of_process(
            num_images, batch_size, processes.process_index, processes.num_processes
        ):
            began = time.perf_counter()
            out = pipeline(
                len(part),
                class_labels=classes,
                guidance=guidance,
                seed=seed,
                first_image=first_image + part.start,
                batch_size=batch_size,
                dtype=DTYPES[dtype],
                output_type="pt",
                **options,
            )
            seconds += time.perf_counter() - began
            nfe = out.nfe
            for i, image, pil in zip(part, out.images, to_pil(out.images), strict=True):
                if i < GRID_IMAGES:
                    shown.append((i, image.cpu()))
                with written_whole(output / f"{first_image + i:06d}.png") as path:
                    pil.save(path)
        if processes.num_processes > 1:
            shown = sorted(gather_object(shown), key=lambda pair: pair[0])
        if not processes.is_main_process:
            return
        images = torch.stack([image for _, image in shown])
        with written_whole(output / "grid.png") as path:
            image_grid(images, scale=max(1, 64 // images.shape[-1])).save(path)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error}") from None

    report = {
        "model": str(model),
        "images": num_images,
        "output": str(output),
        **options,
        "nfe": nfe,
        "ms_per_image": round(1000 * seconds / num_images, 3),
    }
    if as_json:
        print(json.dumps(report))
    else:
        evaluations = ", ".join(f"{name} {n}" for name, n in nfe.items())
        print(f"{num_images} images in {output}; grid.png shows the first {len(images)} together")
        latent = f", latent sampler {words}" if (words := latent_words(options)) else ""
        print(f"flow {in_words(options['solver'], options['steps'])}{latent}")
        print(f"network evaluations: {evaluations}")
        print(f"{report['ms_per_image']} ms per image, the first batch's warm-up included")


def _options(
    pipeline: Any,
    model: str,
    flow: dict[str, Any],
    latent: dict[str, Any],
    latent_guidance: float | None,
) -> dict[str, Any]:
    """Settle solvers and steps; refuse what only a latent sampler has, where there is none."""
    from lediflow.errors import UserError

    if hasattr(pipeline, "sampler"):
        guidance = {} if latent_guidance is None else {"latent_guidance": latent_guidance}
        return pipeline.settle(**flow, **latent) | guidance
    for name, value in (latent | {"latent_guidance": latent_guidance}).items():
        if value is not None:
            option = name.replace("_", "-")
            raise UserError(f"{model} is plain flow matching: it has no latent sampler, leave --{option} out")
    return pipeline.settle(**flow)
