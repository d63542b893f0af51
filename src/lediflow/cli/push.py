"""`lediflow push`: a trained model and its card, to the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lediflow.cli.options import Device, Json


def push(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, or one of its stages, as RUN/flow.")
    ],
    name: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub; made if it is not there.")
    ],
    revision: Annotated[
        str | None,
        typer.Option(help="Branch to upload to; made if it is not there. Default: main.", show_default=False),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only you see.")] = False,
    licence: Annotated[
        str,
        typer.Option(
            "--license", help="Of the weights, as the Hub names it: mit, cc-by-4.0, ...; none is said else."
        ),
    ] = "",
    images: Annotated[int, typer.Option(help="Images on the card; 0 for no picture.")] = 16,
    half: Annotated[
        bool, typer.Option("--half", help="Store the weights as fp16, half as large; they load as fp32.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Write the folder there to look at, and upload nothing.",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Upload a trained model with a model card; anybody loads it by OWNER/NAME.

    The card says on what it was trained, what was measured, and what to beware of. Paths of this machine are
    left out. Log in first: `hf auth login`.

    Examples:

        lediflow push runs/flowers owner/flowers --output look

        lediflow push runs/flowers owner/flowers --license cc-by-4.0

        lediflow push runs/flowers/flow owner/flowers --revision unrefined --private
    """
    import tempfile

    from lediflow.devices import check_device
    from lediflow.errors import UserError
    from lediflow.files import explained, shown, write_folder
    from lediflow.hub import check_repository, upload_model
    from lediflow.training.publish import write_publication

    check_repository(name)
    if images < 0:
        raise UserError(f"--images must be at least 0, not {images}")
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{shown(output)} is there already; choose another --output")
    where = check_device(device)

    def fill(folder: Path) -> None:
        write_publication(run, folder, name, licence=licence, images=images, half=half, device=where)

    if output is not None:
        write_folder(output, fill)
        print(json.dumps({"folder": str(output)}) if as_json else f"{output}: nothing was uploaded")
        return
    with tempfile.TemporaryDirectory() as made, explained(Path(made)):
        fill(Path(made))
        address = upload_model(Path(made), name, revision=revision, private=private)
    report = {"model": name, "revision": revision, "commit": address}
    if as_json:
        print(json.dumps(report))
        return
    print(f"{address}")
    print(f"lediflow sample {name}{f'@{revision}' if revision else ''} -n 16")
