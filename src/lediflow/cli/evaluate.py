"""`lediflow evaluate`: quality, evaluations and time of models by solver and steps, with a report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lediflow.cli.options import Device, LatentSteps


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Run folders, saved pipelines or Hub ids; RUN/baseline is plain FM, "
            "RUN/flow a refined model before.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(help="Real images: a folder, Parquet files or 'digits'; the training split is used."),
    ],
    validation: Annotated[
        str | None, typer.Option(help="Held-out real images; default: that split of --data, if there is one.")
    ] = None,
    steps: Annotated[str, typer.Option(help="Solver steps of the flow, comma-separated.")] = "1,2,4,8",
    solver: Annotated[
        str | None,
        typer.Option(
            help="Solvers of the flow, comma-separated; a model without average velocity leaves mean out. "
            "Default: midpoint, and mean where the model has it.",
            show_default=False,
        ),
    ] = None,
    latent_solver: Annotated[
        str | None,
        typer.Option(
            help="Solver of the latent sampler. Default: mean where it has an average velocity, else the "
            "row's solver, or midpoint where that is mean.",
            show_default=False,
        ),
    ] = None,
    latent_steps: LatentSteps = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            help="Feature network: folder or Hub id of a transformers vision model, 'inception' (FID, KID) "
            "or 'classifier' (a small one trained on the labels of --data). May be given again. Default: "
            "CLIP ViT-L/14-336 (CMMD), or the classifier where that cannot be had.",
            show_default=False,
        ),
    ] = None,
    num_images: Annotated[int, typer.Option("-n", "--num-images", help="Images of each row.")] = 1000,
    reference_images: Annotated[int, typer.Option(help="Most real images used.")] = 50_000,
    bootstrap: Annotated[int, typer.Option(help="Replicates behind the intervals; 0 for none.")] = 100,
    lpips: Annotated[bool, typer.Option("--lpips", help="LPIPS of reconstructions (package lpips).")] = False,
    classifier_steps: Annotated[int, typer.Option(help="Training steps of the classifier.")] = 400,
    output: Annotated[
        Path, typer.Option(help="Folder of the report; an unfinished evaluation there goes on.")
    ] = Path("evaluation"),
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of real images' features; default: ~/.cache/lediflow.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) only.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images at a time; the batch that is timed.")] = 64,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16 (autocast).")] = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of the table.")] = False,
) -> None:
    """Measure models against real images, by solver and number of steps.

    Writes report.html (pictures inside), results.json, table.md, plots and grids. What was measured is kept:
    the same command goes on where it was stopped, and measures only what is new. A model with classes makes
    all of them in turn.

    Examples:

        lediflow evaluate runs/demo runs/demo/baseline --data digits --features classifier

        lediflow evaluate runs/flowers runs/flowers/flow runs/flowers/baseline --data flowers/

        lediflow evaluate runs/flowers runs/flowers/baseline --data flowers/ --solver mean,midpoint,heun3
    """
    from lediflow.evaluation.evaluate import evaluate as run
    from lediflow.evaluation.evaluation_report import speed_table, verdicts
    from lediflow.evaluation.ranks import is_first
    from lediflow.evaluation.settings import Settings

    settings = Settings(
        data=data,
        validation=validation,
        steps=_numbers(steps),
        solvers=tuple(dict.fromkeys(name.strip() for name in (solver or "").split(",") if name.strip())),
        latent_solver=latent_solver,
        latent_steps=latent_steps,
        features=tuple(features or ()),
        num_images=num_images,
        reference_images=reference_images,
        seed=seed,
        batch_size=batch_size,
        dtype=dtype,
        bootstrap=bootstrap,
        lpips=lpips,
        classifier_steps=classifier_steps,
    )
    results = run(models, settings, output, cache=cache, device=device)
    if not is_first():
        return
    if as_json:
        print(json.dumps(results))
        return
    headline = results["features"][0]["headline"]
    print(f"\n{speed_table(results, headline)}\n")
    for text in verdicts(results, headline):
        print(text)
    for note in results["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(f"\nreport: {output / 'report.html'}\nnumbers: {output / 'results.json'}, {output / 'table.md'}")


def _numbers(text: str) -> tuple[int, ...]:
    from lediflow.errors import UserError

    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UserError(f"--steps {text!r}: give whole numbers, comma-separated, as in 1,2,4,8") from None
