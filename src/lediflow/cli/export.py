"""`lediflow export`: a one-evaluation model as one graph, for ONNX Runtime or torch.export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, get_args

import typer

from lediflow.choices import ExportFormat
from lediflow.cli.options import CodecFolder, Json, Model, completed


def export(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; replaced if it is there.")],
    format: Annotated[
        str,
        typer.Option(
            help="onnx (model.onnx, needs the extra export) or torch (model.pt2 of torch.export).",
            autocompletion=completed(get_args(ExportFormat)),
        ),
    ] = "onnx",
    codec: CodecFolder = None,
    as_json: Json = False,
) -> None:
    """Write a one-evaluation model as one graph: noise, classes and strengths in, images out.

    The folder holds the graph and export.json, which describes its inputs. The graph is read again and
    compared with the model on the CPU; one that differs by more than 1e-4 is refused.

    Examples:

        lediflow export runs/flowers --output flowers-onnx

        lediflow export runs/flowers --output flowers-pt2 --format torch
    """
    from lediflow.errors import UserError, nearest
    from lediflow.pipelines.export import check_folder, write_export
    from lediflow.pipelines.load import load_pipeline

    if format not in get_args(ExportFormat):
        raise UserError(
            f"unknown --format {format!r}{nearest(format, get_args(ExportFormat))}; take onnx or torch"
        )
    check_folder(output)
    pipeline = load_pipeline(model)
    if codec is not None:
        pipeline.load_codec(codec)
    report = write_export(pipeline, output, format)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(report))
        return
    print(f"{output / report['file']}: {', '.join(i['name'] for i in report['inputs'])} -> images")
    print(f"largest difference to the model: {report['difference']:.1e} of images in [-1, 1]")
    for batch in report["milliseconds"]["export"]:
        ours, graph = (report["milliseconds"][side][batch] for side in ("pipeline", "export"))
        print(f"batch of {batch}: {graph:g} ms / image, PyTorch {ours:g} ms / image (CPU)")
