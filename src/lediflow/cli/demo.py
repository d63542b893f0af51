"""`lediflow demo`: train every stage on the embedded digits and compare LeDiFlow with plain flow matching."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lediflow.cli.options import Device, Json, Set

FIRST = ("auxiliary", "clusters", "flow", "sampler")  # what the first picture needs


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Run folder; an unfinished demo there is resumed.")
    ] = Path("runs/demo"),
    settings: Set = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train on handwritten digits (no download, no GPU), then show quality against steps and time.

    Takes four minutes on 2 CPU cores, most of them training; a first picture is there after two.
    Every number comes from the run.

    Example:

        lediflow demo --output runs/demo
    """
    from lediflow.evaluation.demo import compare_run, first_grid
    from lediflow.evaluation.strengths import find_strengths
    from lediflow.training.config import load_config
    from lediflow.training.run import train
    from lediflow.training.trainer import Interrupted

    config = load_config("digits", settings)
    stages = [spec.name for spec in config.chosen(None)]
    first = [name for name in stages if name in FIRST]
    try:
        if len(stages) > len(first) >= 3:
            train(config, output, stages=first, device=device)
            if not (output / "grid.png").exists():
                print(f"first picture: {first_grid(output, device)}", file=sys.stderr, flush=True)
            stages = [name for name in stages if name not in first]
        train(config, output, stages=stages, device=device)
    except Interrupted:
        raise typer.Exit(130) from None
    find_strengths(output, device)
    result = compare_run(output, device=device)
    if as_json:
        print((output / "results.json").read_text(encoding="utf-8"))
        return
    print()
    print(result.table)
    print(f"\n{result.verdict}")
    print(f"floor (real digits that no model saw): {result.floor:.2f}; lower is better")
    print("\nfiles:")
    for path in result.files:
        print(f"  {path}")
    print(f"\nnext: lediflow sample {output} -n 64 --output {output / 'samples'}")
