"""What an evaluation keeps in its folder, so that it can be resumed and is not mixed with another.

OUTPUT/request.json             what was asked for; the report of another request is not replaced unasked
OUTPUT/rows/<key>.json          one measured row; <key> is a digest of all it depends on
OUTPUT/rows/<key>.safetensors   its first images, and those closest to training images
OUTPUT/rows/times-<keys>.json   the times of all rows of one evaluation, taken in turn
OUTPUT/results.json, table.md, report.html and the pictures are written from the rows
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lediflow.errors import UserError
from lediflow.files import claim_folder, clear_files, explained, write_text, written_whole

REPORT = ("results.json", "table.md", "report.html", "quality-*.png", "grid-*.png", "closest-*.png")


def claim(output: Path, request: Mapping[str, Any], overwrite: bool) -> None:
    """Make `output` the folder of a request, and make sure that it can be written; all processes must ask.

    Raises:
        UserError: it holds the report of another request, or cannot be written.
    """
    failure = None
    if PartialState().is_main_process:
        try:
            with explained(output):
                (output / "rows").mkdir(parents=True, exist_ok=True)
                clear_files(output / "rows")
                TemporaryFile(dir=output / "rows").close()
            claim_folder(output, request, _report_files, called="the report", overwrite=overwrite)
        except UserError as error:
            failure = str(error)
    (failure,) = broadcast_object_list([failure])
    if failure:
        raise UserError(failure)


def read_row(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return a row and its pictures, None if they are not there."""
    try:
        row = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return row, load_file(path.with_suffix(".safetensors"))
    except (OSError, ValueError, SafetensorError):  # none, or damaged: measured again
        return None


def write_row(path: Path, row: dict[str, Any], shown: dict[str, Tensor]) -> None:
    """Write a row and its pictures, the latter first."""
    with explained(path.parent):
        with written_whole(path.with_suffix(".safetensors")) as unfinished:
            save_file({name: tensor.contiguous() for name, tensor in shown.items()}, unfinished)
        write_text(path.with_suffix(".json"), json.dumps(row, indent=1))


def _report_files(output: Path) -> Iterator[Path]:
    for pattern in REPORT:
        yield from output.glob(pattern)
