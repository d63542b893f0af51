"""`lediflow data inspect`: what a DATASET holds, before a long run depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lediflow.cli.options import Dataset, Split

app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)


@app.callback()
def _data() -> None:
    pass


@app.command()
def inspect(
    dataset: Dataset,
    split: Split = "train",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Folder for contact-sheet.png and report.json.", show_default=False
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Count and decode every image: sizes, formats, classes, and which are broken and why.

    Examples:

        lediflow data inspect photos/ --output inspected

        lediflow data inspect "flowers/*.parquet" --json
    """
    import json

    from lediflow.cli.counting import counting
    from lediflow.data.inspect import contact_sheet, inspect_dataset
    from lediflow.files import check_output, clear_files, explained, shown, write_text, written_whole

    if output is not None:
        check_output(output)
    with counting("inspect") as progress:
        report = inspect_dataset(dataset, split, workers=workers, progress=progress)
    if output is not None:
        with explained(output):
            clear_files(output)
            with written_whole(output / "contact-sheet.png") as path:
                contact_sheet(dataset, split).save(path)
            write_text(output / "report.json", json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
    print(json.dumps(report.to_dict(), ensure_ascii=False) if as_json else report.to_text(), end="")
    if as_json:
        print()
    elif output is not None:
        print(f"files: {shown(output / 'contact-sheet.png')}, {shown(output / 'report.json')}")
