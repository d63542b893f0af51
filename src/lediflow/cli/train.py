"""`lediflow train`: a preset or config, and images -> a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lediflow.cli.options import Device, Json, Set, completed, listed
from lediflow.training.stages import STAGES


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
        Path | None,
        typer.Option(
            "-o", "--output", help="Run folder; default runs/NAME. An unfinished run there resumes."
        ),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="; ".join(f"{spec.name}: {spec.learns}" for spec in STAGES.values())
            + ". May be given again. Default: those of training.stages in the config.",
            show_default=False,
            autocompletion=completed(STAGES),
        ),
    ] = None,
    settings: Set = None,
    resume: Annotated[
        bool, typer.Option(help="Resume from the last checkpoints, or move them aside and start again.")
    ] = True,
    seed: Annotated[int | None, typer.Option(help="Same as --set training.seed=...")] = None,
    device: Device = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Write nothing: open the data, time a few steps of each stage, tell the rest."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train an image generator on a folder of pictures.

    By default that is the learned prior, the flow, the latent sampler, and the two stages that refine them to
    one evaluation each. `--stage baseline` trains plain flow matching to compare with.

    Ctrl-C saves and leaves; the same command resumes. On many GPUs start it with
    `torchrun --nproc-per-node 8 -m lediflow train ...` or `accelerate launch -m lediflow train ...`.

    Examples:

        lediflow train flowers-64 --data photos/ --output runs/flowers

        lediflow train flowers-64 --data photos/ --dry-run

        lediflow train flowers-64 --data photos/ --output runs/flowers --stage baseline

        lediflow train faces-32 --data "faces/*.parquet" --stage auxiliary --set training.auxiliary.beta=0.5
    """
    from lediflow.evaluation.strengths import find_strengths
    from lediflow.training.card import run_report, summary
    from lediflow.training.config import load_config
    from lediflow.training.processes import is_main_process
    from lediflow.training.run import train as train_run
    from lediflow.training.trainer import Interrupted

    run = output or Path("runs") / Path(config).stem
    settled = load_config(config, settings, values={"data.train": data, "training.seed": seed})
    if dry_run:
        print(_rehearsed(settled, listed(stage) or None, device, as_json))
        return
    try:
        train_run(settled, run, stages=listed(stage) or None, device=device, resume=resume)
    except Interrupted:
        raise typer.Exit(130) from None
    if is_main_process():
        find_strengths(run, device)
        report = run_report(run, settled)
        print(json.dumps(report) if as_json else summary(report))


def _rehearsed(config: Any, stages: list[str] | None, device: str | None, as_json: bool) -> str:
    from dataclasses import asdict

    from lediflow.training.rehearsal import rehearse, report_text

    report = rehearse(config, stages, device)
    if not as_json:
        return report_text(report)
    estimates = [asdict(e) | {"seconds": round(e.seconds, 1)} for e in report["stages"]]
    return json.dumps({**report, "stages": estimates})
