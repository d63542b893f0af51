"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or mps; default: the best there is.", show_default=False)
]
Dataset = Annotated[
    str,
    typer.Argument(
        metavar="DATASET",
        help="Folder of images, Parquet, Arrow or tar files, Hub dataset owner/name[:config], or 'digits'.",
    ),
]
LatentSteps = Annotated[
    int | None,
    typer.Option(help="Steps of the latent sampler; default 1 with mean, else 4.", show_default=False),
]
Split = Annotated[str, typer.Option(help="train, validation, or another name that the files use.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Change one setting; may be given again."),
]
