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
        typer.Option(
            help="auxiliary, flow, sampler, baseline, meanflow, sampler-meanflow, baseline-meanflow or "
            "distill; may be given again. Default: those of training.stages in the config.",
            show_default=False,
        ),
    ] = None,
    settings: Set = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the last checkpoints, or move them aside and start again.")
    ] = True,
    seed: Annotated[int | None, typer.Option(help="Same as --set training.seed=...")] = None,
    device: Device = None,
) -> None:
    """Train the stages of LeDiFlow, and plain flow matching as the baseline.

    The stages meanflow, sampler-meanflow and baseline-meanflow refine a trained flow, sampler or baseline to
    one evaluation; distill does it for the flow by learning where it ends.

    Ctrl-C saves and leaves; the same command goes on where it stopped. On many GPUs start it with
    `torchrun --nproc-per-node 8 -m lediflow train ...` or `accelerate launch -m lediflow train ...`.

    Examples:

        lediflow train flowers-64 --data photos/ --output runs/f

        lediflow train flowers-64 --data photos/ --output runs/f --stage meanflow --stage sampler-meanflow

        lediflow train faces-32 --data "faces/*.parquet" --stage auxiliary --set training.auxiliary.beta=0.5
    """
    from lediflow.training.config import load_config
    from lediflow.training.processes import is_main_process
    from lediflow.training.run import summary
    from lediflow.training.run import train as train_run
    from lediflow.training.trainer import Interrupted

    overrides = list(settings or [])
    if data is not None:
        overrides.append(f"data.train={data!r}")
    if seed is not None:
        overrides.append(f"training.seed={seed}")
    run = output or Path("runs") / Path(config).stem
    settled = load_config(config, overrides)
    try:
        train_run(settled, run, stages=stage or None, device=device, resume=resume)
    except Interrupted as stop:
        if is_main_process():
            print(f"{stop}; the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    if is_main_process():
        print(summary(run, settled))
