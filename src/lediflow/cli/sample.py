"""`lediflow sample`: a trained model -> PNG files and a grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lediflow.cli.again import make_again
from lediflow.cli.options import (
    Autoguidance,
    BatchSize,
    Classes,
    Clusters,
    CodecFolder,
    Compiled,
    Device,
    Dtype,
    FlowSolver,
    Guidance,
    Json,
    LatentAutoguidance,
    LatentGuidance,
    LatentSolver,
    LatentSteps,
    NumImages,
    Overwrite,
    Prompts,
    Seed,
    Steps,
    Temperature,
    TextEncoderFolder,
    listed,
)


def sample(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Run folder, saved pipeline folder, or Hub id."),
    ] = None,
    num_images: NumImages = 16,
    steps: Steps = None,
    latent_steps: LatentSteps = None,
    solver: FlowSolver = None,
    latent_solver: LatentSolver = None,
    classes: Classes = None,
    cluster: Clusters = None,
    prompt: Prompts = None,
    guidance: Guidance = None,
    latent_guidance: LatentGuidance = None,
    autoguidance: Autoguidance = None,
    latent_autoguidance: LatentAutoguidance = None,
    temperature: Temperature = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for 000000.png ... and grid.png.")
    ] = Path("samples"),
    overwrite: Overwrite = False,
    seed: Seed = 0,
    first_image: Annotated[int, typer.Option(help="Index of the first image, to extend a request.")] = 0,
    batch_size: BatchSize = 64,
    codec: CodecFolder = None,
    text_encoder: TextEncoderFolder = None,
    device: Device = None,
    dtype: Dtype = "fp32",
    compile: Compiled = False,
    again: Annotated[
        Path | None,
        typer.Option(help="Make the image of this PNG again, bit for bit, also an edited one."),
    ] = None,
    model_now: Annotated[
        str | None, typer.Option("--model", help="With --again: where its model is now, if it moved.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make new images with a trained model.

    A model refined to one evaluation (see `lediflow train`) takes one step by default; RUN/flow is the
    unrefined model. A request that was cut off resumes: images that are there are not made again.

    Examples:

        lediflow sample runs/flowers -n 64 --output samples

        lediflow sample runs/flowers/flow -n 64 --solver midpoint --steps 2 --latent-steps 4

        lediflow sample runs/flowers/baseline -n 64 --steps 8 --output samples-fm

        lediflow sample emoji -n 16 --prompt "red heart" --prompt "grinning face"

        torchrun --nproc-per-node 8 -m lediflow sample runs/flowers -n 50000 --class tulips --guidance 1.5

        lediflow sample --again samples/000007.png --output again
    """
    if again is not None:
        make_again(
            again,
            model or model_now,
            output,
            overwrite=overwrite,
            codec=codec,
            text_encoder=text_encoder,
            device=device,
            as_json=as_json,
        )
        return

    from accelerate import PartialState

    from lediflow.devices import DTYPES, check_device, settle_precision
    from lediflow.errors import UserError
    from lediflow.files import claim_folder
    from lediflow.pipelines.load import load_pipeline
    from lediflow.pipelines.recipes import Recipe
    from lediflow.pipelines.save import batches_of_process, save_grid, save_images, saved_images

    if model is None or model_now is not None:
        raise UserError("name the model as `lediflow sample MODEL`; --model belongs to --again FILE.png")
    where = check_device(device)
    number_format = settle_precision(dtype, where)
    processes = PartialState(cpu=where.type == "cpu")
    pipeline = load_pipeline(model).to(where if processes.num_processes == 1 else processes.device)
    if codec is not None:
        pipeline.load_codec(codec)
    if text_encoder is not None:
        pipeline.load_text_encoder(text_encoder)
    told: dict[str, Any] = {
        "class_labels": _class_labels(pipeline, classes),
        "cluster": listed(cluster) or None,
        **({"prompt": prompt} if prompt else {}),
    }
    pipeline.check_request(num_images, batch_size=batch_size, **told)
    request = {
        "seed": seed,
        **_settled(
            pipeline,
            model,
            {"solver": solver, "steps": steps},
            {"latent_solver": latent_solver, "latent_steps": latent_steps},
            {"guidance": guidance, "autoguidance": autoguidance, "temperature": temperature},
            {"latent_guidance": latent_guidance, "latent_autoguidance": latent_autoguidance},
            pipeline.labels_of([], **told).labels,
        ),
        **told,
        "dtype": number_format,
    }
    batches = batches_of_process(num_images, batch_size, processes.process_index, processes.num_processes)
    weights = pipeline.digest()
    if processes.is_main_process:
        claimed = {"weights": weights, **request}
        claim_folder(output, claimed, saved_images, called="images", overwrite=overwrite)
    processes.wait_for_everyone()
    if compile:
        pipeline.compile()
    pipeline.set_progress_bar_config(disable=True)  # `save_images` shows the whole request
    saved = save_images(
        pipeline,
        output,
        batches,
        silent=not processes.is_main_process,
        first_image=first_image,
        recipe=Recipe("sample", model, weights, request),
        **{**request, "dtype": DTYPES[number_format]},
    )
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return
    shown = save_grid(output, range(first_image, first_image + num_images))
    report = {
        "model": str(model),
        "images": num_images,
        "output": str(output),
        **request,
        "nfe": saved.nfe,
        "found": saved.found,
        "ms_per_image": round(1000 * saved.seconds / saved.made, 3) if saved.made else None,
    }
    print(json.dumps(report) if as_json else _text(report, shown))


def _settled(
    pipeline: Any,
    model: str,
    flow: dict[str, Any],
    latent: dict[str, Any],
    guidance: dict[str, float | None],
    latent_guidance: dict[str, float | None],
    labels: list[str],
) -> dict[str, Any]:
    """Settle solvers, steps and guidance; refuse what only a latent sampler has, where there is none."""
    from lediflow.errors import UserError

    if hasattr(pipeline, "sampler"):
        strengths = pipeline.settle_strengths(labels=labels, **guidance, **latent_guidance)
        return pipeline.settle(**flow, **latent) | strengths
    for name, value in (latent | latent_guidance).items():
        if value is not None:
            option = name.replace("_", "-")
            raise UserError(f"{model} is plain flow matching: it has no latent sampler, leave --{option} out")
    return pipeline.settle(**flow) | pipeline.settle_strengths(labels=labels, **guidance)


def _class_labels(pipeline: Any, classes: list[str] | None) -> list[str] | None:
    """Return the classes that were asked for; a name may itself have a comma."""
    if not classes:
        return None
    known = pipeline.class_names
    return [name for given in classes for name in ([given] if given in known else listed([given]))]


def _text(report: dict[str, Any], shown: int) -> str:
    from lediflow.ode import in_words

    where = f"{report['images']} images in {report['output']}; grid.png shows the first {shown} together"
    if report["ms_per_image"] is None:
        return f"{where}\nall of them were there already"
    latent = ""
    if "latent_solver" in report:
        latent = f", latent sampler {in_words(report['latent_solver'], report['latent_steps'])}"
    evaluations = ", ".join(f"{name} {n}" for name, n in report["nfe"].items())
    found = f"; {report['found']} were there already" if report["found"] else ""
    return (
        f"{where}{found}\n"
        f"flow {in_words(report['solver'], report['steps'])}{latent}\n"
        f"network evaluations: {evaluations}\n"
        f"{report['ms_per_image']} ms per image, the first batch's warm-up included"
    )
