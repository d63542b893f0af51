"""`lediflow train`: a preset or config, and images -> a run folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lediflow.cli.options import Device, Set


def train(
    config: Annotated[str, typer.Argument(metavar="PRESET|CONFIG.yaml", help="See `lediflow presets`.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Images: a folder, Parquet, Arrow or tar files, a Hub dataset, or 'digits'; for a config "
            "with a codec the folder that `lediflow encode` wrote. Same as --set data.train=..."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/NAME. An unfinished run there goes on.")
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="auxiliary, flow, sampler or baseline; may be given again. Default: all."),
    ] = None,
    settings: Set = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the last checkpoints, or move them aside and start again.")
    ] = True,
    seed: Annotated[int | None, typer.Option(help="Same as --set training.seed=...")] = None,
    device: Device = None,
) -> None:
    """Train the stages of LeDiFlow, and plain flow matching as the baseline.

    Ctrl-C saves and leaves; the same command goes on where it stopped.

    Examples:

        lediflow train flowers-64 --data photos/ --output runs/flowers

        lediflow train faces-32 --data "faces/*.parquet" --stage auxiliary --set training.auxiliary.beta=0.5
    """
    from lediflow.training.config import STAGES, load_config
    from lediflow.training.run import train as train_run
    from lediflow.training.trainer import Interrupted

    overrides = list(settings or [])
    if data is not None:
        overrides.append(f"data.train={data!r}")
    if seed is not None:
        overrides.append(f"training.seed={seed}")
    run = output or Path("runs") / Path(config).stem
    try:
        train_run(load_config(config, overrides), run, stages=stage or STAGES, device=device, resume=resume)
    except Interrupted as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"run folder: {run}")
    for model in (run, run / "baseline"):
        if (model / "pipeline").is_dir():
            print(f"next: lediflow sample {model} -n 64 --output {model / 'samples'}")
