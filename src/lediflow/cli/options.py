"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, get_args

import typer

from lediflow.choices import SOLVERS, Precision


def completed(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what completes one of some names in the shell; a wrong one is refused with the nearest."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; default: the best there is.", show_default=False)
]
Dtype = Annotated[
    str,
    typer.Option(
        help="fp32, bf16, fp16, or auto: bf16 where the device multiplies it, else fp32.",
        autocompletion=completed(get_args(Precision)),
    ),
]
Dataset = Annotated[
    str,
    typer.Argument(
        metavar="DATASET",
        help="Folder of images, Parquet, Arrow or tar files, Hub dataset owner/name[:config][@revision], "
        "or 'digits'.",
    ),
]
FlowSolver = Annotated[
    str | None,
    typer.Option(
        autocompletion=completed(SOLVERS),
        help=f"Solver of the flow: {', '.join(SOLVERS)}; mean is one evaluation a step. Default: mean where "
        "the model has an average velocity (stage meanflow or distill), else midpoint.",
        show_default=False,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Solver steps of the flow; default 1 with mean, else 2, or 8 for plain flow matching.",
        show_default=False,
    ),
]
LatentSolver = Annotated[
    str | None,
    typer.Option(
        autocompletion=completed(SOLVERS),
        help="Solver of the latent sampler. Default: mean where it has an average velocity (stage "
        "sampler-meanflow), else that of the flow, or midpoint where that is mean. LeDiFlow only.",
        show_default=False,
    ),
]
LatentSteps = Annotated[
    int | None,
    typer.Option(
        help="Solver steps of the latent sampler; default 1 with mean, else 4. LeDiFlow only.",
        show_default=False,
    ),
]
Classes = Annotated[
    list[str] | None,
    typer.Option("--class", help="Classes by name or index, which the images take in turn."),
]
Clusters = Annotated[
    list[str] | None,
    typer.Option(
        "--cluster",
        help="Clusters of z by number, 3 or 3,7, which the images take in turn; `lediflow clusters RUN` "
        "shows them. Default: drawn as often as in the training images.",
        show_default=False,
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        help="What the images show, in words; given again, the images take them in turn. For a model that "
        "was trained with texts.",
        show_default=False,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Guidance of the flow by class, cluster and text; 1 for none. Default: the best that training "
        "found, or 1. A model that has not learned its guidance works twice.",
        show_default=False,
    ),
]
LatentGuidance = Annotated[
    float | None,
    typer.Option(help="The same for the latent sampler. LeDiFlow only.", show_default=False),
]
Autoguidance = Annotated[
    float | None,
    typer.Option(
        help="Guidance of the flow away from its weak self (stage weak-flow); likewise.", show_default=False
    ),
]
LatentAutoguidance = Annotated[
    float | None,
    typer.Option(help="The same for the latent sampler (stage weak-sampler).", show_default=False),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="How much of the source's noise an image starts with, 0 to 1.5; below 1 images are cleaner and "
        "vary less. Default: the model's own, or 1.",
        show_default=False,
    ),
]
CodecFolder = Annotated[
    str | None,
    typer.Option(
        "--codec",
        help="Folder or Hub id of the codec, if it is not where it was when the latents were made.",
        show_default=False,
    ),
]
TextEncoderFolder = Annotated[
    str | None,
    typer.Option(
        "--text-encoder",
        help="Folder or Hub id of the frozen text encoder, if it is not where it was in training.",
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Remove the images of another request from the folder.")
]
NumImages = Annotated[int, typer.Option("-n", "--num-images", help="How many images.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Run folder, saved pipeline folder, or Hub id.")]
Compiled = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the model first: a minute or more, then faster. For many images."
    ),
]
Seed = Annotated[int, typer.Option(help="Image i depends on (seed, i) only.")]
BatchSize = Annotated[int, typer.Option(help="Images at a time.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Split = Annotated[str, typer.Option(help="train, validation, or another name that the files use.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Change one setting; may be given again."),
]


def listed(values: Iterable[str] | None) -> list[str]:
    """Return the parts of an option that takes several values: given again, or separated by commas."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]
