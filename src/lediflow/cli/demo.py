"""`lediflow demo`: train every stage on the embedded digits and compare LeDiFlow with plain flow matching."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lediflow.cli.options import Device, Set


def demo(
    output: Annotated[Path, typer.Option(help="Run folder; an unfinished demo there goes on.")] = Path(
        "runs/demo"
    ),
    settings: Set = None,
    device: Device = None,
) -> None:
    """Train on handwritten digits (no download, no GPU), then show quality against steps and time.

    Takes about ten minutes on 2 CPU cores, most of them training. Every number comes from the run.

    Example:

        lediflow demo --output runs/demo
    """
    from lediflow.evaluation.compare import compare_run
    from lediflow.training.config import load_config
    from lediflow.training.run import train
    from lediflow.training.trainer import Interrupted

    try:
        run = train(load_config("digits", settings), output, device=device)
    except Interrupted as stop:
        print(f"{stop}; `lediflow demo` goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    result = compare_run(run, device=device)
    print()
    print(result.table)
    print(f"\n{result.verdict}")
    print(f"floor (real digits that no model saw): {result.floor:.2f}; lower is better")
    print("\nfiles:")
    for path in result.files:
        print(f"  {path}")
    print(f"\nnext: lediflow sample {run} -n 64 --steps 2 --output {run / 'samples'}")
