"""`lediflow upsample`: pictures -> larger ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lediflow.choices import SOLVERS
from lediflow.cli.options import CodecFolder, Device, Dtype, Json, Model, Overwrite, completed


def upsample(
    model: Model,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE|FOLDER...", help="Pictures, and folders of pictures.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the results, named as the pictures are.")
    ] = Path("upsampled"),
    scale: Annotated[
        int | None,
        typer.Option(
            help="How many times larger: what the model was trained for (the default), or a power of that.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Solver steps; default 10, or 1 with mean or from a learned prior.", show_default=False
        ),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            autocompletion=completed(SOLVERS),
            help=f"One of {', '.join(SOLVERS)}. Default: mean where the model has an average velocity, else "
            "euler.",
            show_default=False,
        ),
    ] = None,
    noise_level: Annotated[
        float | None,
        typer.Option(help="Of the start, 0 to 999; default: the model's own.", show_default=False),
    ] = None,
    tile_size: Annotated[
        int | None,
        typer.Option(
            help="Side of tiles, in pixels of the result, for images that do not fit in memory.",
            show_default=False,
        ),
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Of tiles, pixels; default a quarter.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    seed: Annotated[int, typer.Option(help="What a picture becomes depends on this and its name.")] = 0,
    codec: CodecFolder = None,
    device: Device = None,
    dtype: Dtype = "fp32",
    as_json: Json = False,
) -> None:
    """Enlarge pictures with a coupling flow.

    A picture that cannot be read is named, and the others are made. The same command again makes what is
    missing.

    Examples:

        lediflow upsample emoji-x4 smiley.png --output large

        lediflow upsample runs/upsampler photos/ --scale 4 --steps 4 --output large

        lediflow upsample runs/upsampler panorama.jpg --scale 16 --tile-size 512
    """
    from lediflow.cli.counting import counting
    from lediflow.devices import DTYPES, check_device, settle_precision
    from lediflow.errors import UserError
    from lediflow.fingerprints import weights_digest
    from lediflow.pipelines.load import load_upsampler
    from lediflow.pipelines.upsample_files import picture_files, upsample_files

    where = check_device(device)
    number_format = settle_precision(dtype, where)
    pictures = picture_files(images)
    pipeline = load_upsampler(model).to(where)
    if codec is not None:
        pipeline.load_codec(codec)
    options = {
        "scale": pipeline.config.scale if scale is None else scale,
        "num_inference_steps": steps,
        "solver": solver,
        "noise_level": noise_level,
        "tile_size": tile_size,
        "overlap": overlap,
    }
    settled = pipeline.settled(**options)
    networks = [part for name, part in pipeline.components.items() if name != "vae" and part is not None]
    request = {
        "weights": weights_digest(*networks),
        "seed": seed,
        **{name: value for name, value in options.items() if name not in ("num_inference_steps", "solver")},
        "solver": settled.solver,
        "steps": settled.steps,
        "noise_level": settled.noise_level,
        "dtype": number_format,
    }
    pipeline.set_progress_bar_config(disable=True)
    with counting("upsample") as progress:
        done = upsample_files(
            pipeline,
            pictures,
            output,
            request=request,
            overwrite=overwrite,
            progress=progress,
            seed=seed,
            dtype=DTYPES[number_format],
            **options,
        )
    if done.broken and not done.made and not done.found:
        raise UserError(
            f"none of the pictures could be enlarged; {done.broken[0].name}: {done.broken[0].reason}"
        )
    report = {
        "model": str(model),
        "output": str(output),
        **request,
        "images": {name: list(size) for name, size in done.made.items()},
        "found": done.found,
        "broken": [{"name": one.name, "reason": one.reason} for one in done.broken],
        "nfe": done.nfe,
        "ms_per_image": round(1000 * done.seconds / len(done.made), 1) if done.made else None,
    }
    print(json.dumps(report) if as_json else _text(report))


def _text(report: dict[str, Any]) -> str:
    from lediflow.files import shown
    from lediflow.ode import in_words

    found = f"; {report['found']} were there already" if report["found"] else ""
    lines = [
        f"{len(report['images'])} images, {report['scale']} times as large, in {shown(report['output'])}"
        f"{found}"
    ]
    if report["images"]:
        evaluations = ", ".join(f"{name} {n}" for name, n in report["nfe"].items())
        lines += [
            f"{in_words(report['solver'], report['steps'])}; network evaluations an image: {evaluations}",
            f"{report['ms_per_image']} ms per image, reading and writing included",
        ]
    lines += [f"could not enlarge {one['name']}: {one['reason']}" for one in report["broken"]]
    return "\n".join(lines)
