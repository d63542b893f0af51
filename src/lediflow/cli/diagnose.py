"""`lediflow diagnose`: does the learned prior help here, and what to change where it does not."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lediflow.cli.options import Device, Json, LatentSolver, LatentSteps


def diagnose(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Run folder or pipeline of LeDiFlow.")],
    data: Annotated[str, typer.Option(help="The images it was trained on.")],
    validation: Annotated[
        str | None, typer.Option(help="Held-out images; default: that split of --data.")
    ] = None,
    num_images: Annotated[int, typer.Option("-n", "--num-images", help="Images of each kind.")] = 512,
    latent_solver: LatentSolver = None,
    latent_steps: LatentSteps = None,
    seed: Annotated[int, typer.Option(help="Of all noise.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 64,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure transport cost, curvature, calibration of sigma, and what z carries, each with a verdict.

    Where RUN/baseline is trained too, its paths from N(0, I) are measured beside those from the prior. For a
    model refined to one evaluation, how far that ends from where many steps end is measured too.

    Example:

        lediflow diagnose runs/flowers --data flowers/
    """
    from lediflow.diagnosis.diagnose import diagnose as run

    result = run(
        model,
        data,
        validation=validation,
        num_images=num_images,
        latent_solver=latent_solver,
        latent_steps=latent_steps,
        seed=seed,
        batch_size=batch_size,
        device=device,
    )
    if as_json:
        print(json.dumps(result))
        return
    for finding in result["findings"]:
        print(f"[{finding['grade']}] {finding['name']}: {finding['value']}")
        print(f"       {finding['says']}" + (f" {finding['change']}" if finding["change"] else ""))
    print(f"\n{result['verdict']}")
