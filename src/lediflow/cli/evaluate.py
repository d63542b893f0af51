"""`lediflow evaluate`: quality, evaluations and time of models by solver and steps, with a report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lediflow.choices import SOLVERS
from lediflow.cli.options import (
    Device,
    Dtype,
    LatentSolver,
    LatentSteps,
    Seed,
    TextEncoderFolder,
    completed,
    listed,
)

Strengths = Annotated[
    list[str] | None,
    typer.Option(
        help="Guidance as in `lediflow sample`, such as 1,1.5,2: each has rows of its own. Default: the "
        "model's.",
        show_default=False,
    ),
]


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Run folders, saved pipelines or Hub ids; RUN/baseline is plain FM, "
            "RUN/flow the unrefined model of a refined one.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(help="Real images: a folder, Parquet files or 'digits'; the training split is used."),
    ],
    validation: Annotated[
        str | None, typer.Option(help="Held-out real images; default: that split of --data, if there is one.")
    ] = None,
    steps: Annotated[
        list[str] | None,
        typer.Option(help="Solver steps of the flow, such as 1,2,4. Default: 1,2,4,8.", show_default=False),
    ] = None,
    solver: Annotated[
        list[str] | None,
        typer.Option(
            help="Solvers of the flow; a model without average velocity leaves mean out. Default: midpoint, "
            "and mean where the model has it.",
            autocompletion=completed(SOLVERS),
            show_default=False,
        ),
    ] = None,
    latent_solver: LatentSolver = None,
    latent_steps: LatentSteps = None,
    guidance: Strengths = None,
    latent_guidance: Strengths = None,
    autoguidance: Strengths = None,
    latent_autoguidance: Strengths = None,
    temperature: Annotated[
        list[str] | None,
        typer.Option(
            help="Temperatures of the source, such as 0.8,1, each with rows of its own.", show_default=False
        ),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            help="Feature network, or several with commas: folder or Hub id (id@revision) of a transformers "
            "vision model, 'inception' (FID, KID) or 'classifier' (a small one trained on the labels of "
            "--data). "
            "Default: CLIP ViT-L/14-336 (CMMD), or the classifier where that is not available.",
            show_default=False,
        ),
    ] = None,
    num_images: Annotated[int, typer.Option("-n", "--num-images", help="Images of each row.")] = 1000,
    reference_images: Annotated[int, typer.Option(help="Most real images used.")] = 50_000,
    prompts: Annotated[
        bool,
        typer.Option(help="Make a model that is told texts those of --data (columns text or caption)."),
    ] = True,
    bootstrap: Annotated[int, typer.Option(help="Replicates behind the intervals; 0 for none.")] = 100,
    lpips: Annotated[bool, typer.Option("--lpips", help="LPIPS of reconstructions (package lpips).")] = False,
    classifier_steps: Annotated[int, typer.Option(help="Training steps of the classifier.")] = 400,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Folder of the report; an unfinished evaluation there is resumed."
        ),
    ] = Path("evaluation"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another report there; rows that fit are kept.")
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of real images' features; default: ~/.cache/lediflow.", show_default=False),
    ] = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(help="Images at a time; the batch that is timed.")] = 64,
    device: Device = None,
    dtype: Dtype = "fp32",
    text_encoder: TextEncoderFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of the table.")] = False,
) -> None:
    """Measure models against real images, by solver and number of steps.

    Writes report.html (pictures inside), results.json, table.md, plots and grids. What was measured is kept:
    the same command resumes where it was stopped, and measures only what is new. A model with classes makes
    all of them in turn; one that is told texts makes those of --data, image i's drawn by (seed, i).

    Examples:

        lediflow evaluate runs/demo runs/demo/baseline --data digits --features classifier

        lediflow evaluate runs/flowers runs/flowers/flow runs/flowers/baseline --data flowers/

        lediflow evaluate runs/flowers runs/flowers/baseline --data flowers/ --solver mean,midpoint,heun3
    """
    from accelerate import PartialState

    from lediflow.devices import check_device, settle_precision
    from lediflow.evaluation.evaluate import evaluate as run
    from lediflow.evaluation.request import Settings
    from lediflow.evaluation.tables import markdown_table, speed_table, verdicts

    settings = Settings(
        data=data,
        validation=validation,
        steps=_numbers(steps),
        solvers=tuple(dict.fromkeys(listed(solver))),
        latent_solver=latent_solver,
        latent_steps=latent_steps,
        guidance=_strengths(guidance),
        autoguidance=_strengths(autoguidance),
        latent_guidance=_strengths(latent_guidance),
        latent_autoguidance=_strengths(latent_autoguidance),
        temperature=_strengths(temperature),
        features=tuple(listed(features)),
        num_images=num_images,
        reference_images=reference_images,
        seed=seed,
        batch_size=batch_size,
        dtype=settle_precision(dtype, check_device(device)),
        bootstrap=bootstrap,
        lpips=lpips,
        classifier_steps=classifier_steps,
        prompts=prompts,
    )
    results = run(
        models,
        settings,
        output,
        cache=cache,
        device=device,
        text_encoder=text_encoder,
        overwrite=overwrite,
    )
    if not PartialState().is_main_process:
        return
    if as_json:
        print(json.dumps(results))
        return
    headline = results["features"][0]["headline"]
    print(f"\n{markdown_table(*speed_table(results, headline))}\n")
    for text in verdicts(results, headline):
        print(text)
    for note in results["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(f"\nreport: {output / 'report.html'}\nnumbers: {output / 'results.json'}, {output / 'table.md'}")


def _strengths(texts: list[str] | None) -> tuple[float, ...]:
    from lediflow.errors import UserError

    try:
        return tuple(dict.fromkeys(float(part) for part in listed(texts)))
    except ValueError:
        raise UserError(f"guidance {','.join(texts or [])!r}: give numbers, as in 1,1.5,2") from None


def _numbers(texts: list[str] | None) -> tuple[int, ...]:
    from lediflow.errors import UserError

    try:
        return tuple(sorted({int(part) for part in listed(texts)})) or (1, 2, 4, 8)
    except ValueError:
        raise UserError(f"--steps {','.join(texts or [])!r}: give whole numbers, as in 1,2,4,8") from None
