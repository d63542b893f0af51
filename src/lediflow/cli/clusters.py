"""`lediflow clusters`: what the clusters of a model look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lediflow.cli.options import Device, Json, Model, Seed


def clusters(
    model: Model,
    columns: Annotated[int, typer.Option(help="Images of each cluster.")] = 10,
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture to write.")] = Path(
        "clusters.png"
    ),
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show the clusters of z that a model was trained with, one in each row, by number.

    Clusters give images without labels handles: `lediflow sample MODEL --cluster 7` makes images of one. They
    come from the stage `clusters`, which trains where `clusters.count` is not 0.

    Examples:

        lediflow clusters runs/flowers

        lediflow clusters runs/flowers --columns 16 --output flowers-clusters.png
    """
    import torch

    from lediflow.devices import check_device
    from lediflow.errors import UserError
    from lediflow.evaluation.plots import labelled_grid
    from lediflow.files import explained
    from lediflow.pipelines.load import load_pipeline

    if columns < 1:
        raise UserError(f"--columns must be at least 1, not {columns}")
    pipeline = load_pipeline(model).to(check_device(device))
    if pipeline.clusters is None:
        raise UserError(
            f"{model} was trained without clusters; train with `--set clusters.count=auto` to have some"
        )
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline.clusters.images.sum(0).int().tolist()
    taken = [number for number, count in enumerate(images) if count]
    in_turn = [number for number in taken for _ in range(columns)]
    made = pipeline(len(in_turn), cluster=in_turn, seed=seed, output_type="pt").images.cpu()
    rows = dict(zip((f"{n}\n{images[n]} images" for n in taken), torch.split(made, columns), strict=True))
    with explained(output):
        labelled_grid(rows, output, scale=max(1, 48 // made.shape[-1]))
    report = {"model": str(model), "clusters": images, "picture": str(output)}
    if as_json:
        print(json.dumps(report))
        return
    print(f"{len(taken)} clusters of {min(images[n] for n in taken)} to {max(images)} images: {output}")
    print(f"images of one: lediflow sample {model} --cluster {taken[0]}")
